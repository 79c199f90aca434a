# MMPO on Llama-3-8B with LoRA, one GPU (52 GiB predicted, 20 GiB with
# --activation_checkpointing); 7,640 steps, not yet timed.
# python train.py config/llama3_8b.py
# The authors' data, batch, learning rate, epochs and adapters; the method is this project's.
out_dir = "out/llama3_8b"
init_from = "princeton-nlp/Llama-3-Base-8B-SFT"
lora_rank = 64
lora_alpha = 64
lora_dropout = 0.01
lora_targets = "q_proj,k_proj,v_proj,o_proj"
batch_size = 48         # 73.3k pairs / 48 = 1,528 steps an epoch
epochs = 5
learning_rate = 1e-4
pack_tokens = 8192
save_interval = 500     # after a crash the same command with --resume goes on
