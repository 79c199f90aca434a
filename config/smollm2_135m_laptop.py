# MMPO on SmolLM2-135M, all weights, on a laptop's CPU: about 10 minutes on 2 cores
# python train.py config/smollm2_135m_laptop.py
out_dir = "out/smollm2_135m_laptop"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset = "HuggingFaceH4/ultrafeedback_binarized"
eval_pairs = 160
eval_interval = 20
kl_samples = 8
max_length = 256
max_prompt_length = 128
batch_size = 16         # 40 steps x 16 = 640 pairs
max_iters = 40
learning_rate = 2e-4
row_tokens = 2048       # up to 10 GB
