# The short recipe: MMPO with a contrastive term on SmolLM2-135M, all weights, on a laptop's CPU. 60
# steps on 480 pairs; on one thread of an Intel Xeon in fp32, 10 minutes for short pairs to 25.
# What it teaches and keeps on six sets of pairs: assets/results.md, The short recipe.
# python train.py config/smollm2_135m_laptop.py --dataset=mine.jsonl
out_dir = "out/smollm2_135m_laptop"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset = "HuggingFaceH4/ultrafeedback_binarized"
eval_pairs = 200        # an accuracy's standard error is 0.035 then
eval_interval = 20
save_interval = 20      # after Ctrl-C the same command with --resume goes on
max_length = 256
max_prompt_length = 160
kl_samples = 32
pref_weight = 10.0      # learns more, and stays closer to its start, than MMPO alone
batch_size = 8          # 60 steps x 8 = 480 pairs
max_iters = 60
learning_rate = 1.5e-5  # the higher, the further from the start: watch KL
pack_tokens = 2048
dtype = "float32"       # in bf16 products would not see most of what so short a run adds
