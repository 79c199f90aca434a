# MMPO on Llama-3.2-1B with LoRA, one GPU (32 GiB predicted); 7,640 steps, not yet timed.
# python train.py config/llama32_1b.py
# The authors' data, batch, learning rate, epochs and adapters; the method is this project's.
out_dir = "out/llama32_1b"
init_from = "meta-llama/Llama-3.2-1B-Instruct"   # gated; theirs is an SFT checkpoint of their own
lora_rank = 64
lora_alpha = 64
lora_dropout = 0.01
lora_targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
batch_size = 48         # 73.3k pairs / 48 = 1,528 steps an epoch
epochs = 5
learning_rate = 5e-4
save_interval = 500     # after a crash the same command with --resume goes on
