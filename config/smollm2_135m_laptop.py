# MMPO on SmolLM2-135M, all weights, on a laptop's CPU: 25 minutes on one core of a shared Xeon
# (216 tokens/s; two idle cores make 430). Held-out loss from 0.53 to 0.40 on GPT-4-judged Alpaca.
# python train.py config/smollm2_135m_laptop.py
out_dir = "out/smollm2_135m_laptop"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset = "HuggingFaceH4/ultrafeedback_binarized"
eval_pairs = 96
eval_interval = 8
max_length = 384
max_prompt_length = 192
kl_samples = 8
batch_size = 16         # 32 steps x 16 = 512 pairs
max_iters = 32
learning_rate = 1e-4
row_tokens = 2048       # up to 10 GB
