# A run of the study (assets/results.md): SmolLM2-135M-Instruct, all weights, 480 short pairs, once.
# On one thread of an Intel Xeon without instructions for bf16 a run takes 15 minutes.
# scripts/study.sh makes the pairs, and runs this with many settings; it begins with its usage
out_dir = "out/study_135m"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset = "out/study/train.jsonl"
eval_dataset = "out/study/held_out.jsonl"
eval_pairs = 96         # of 800, for the curves; scripts/evaluate.py takes all
eval_interval = 20
max_length = 160
max_prompt_length = 128
batch_size = 8          # 480 pairs / 8 = 60 steps
epochs = 1
learning_rate = 2e-5
pack_tokens = 2048
dtype = "float32"       # in bf16 products would not see most of what so short a run adds
kl_samples = 32
sample_tokens = 64
