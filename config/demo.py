# The embedded demo: MMPO teaches a rude model of 0.8M parameters manners, offline, on any CPU.
# python train.py config/demo.py      under a minute on 2 cores; held-out accuracy 0.125 to 0.979
out_dir = "out/demo"
init_from = "assets/demo"
dataset = "assets/demo/train.jsonl"
eval_dataset = "assets/demo/eval.jsonl"
sample_tokens = 48
eval_interval = 14
kl_samples = 96
kl_tokens = 32

batch_size = 32          # 432 pairs / 32 = 14 steps an epoch
epochs = 4
learning_rate = 5e-4
max_length = 128
max_prompt_length = 64
pack_tokens = 4096
dtype = "float32"        # so small a model gains nothing from bf16
