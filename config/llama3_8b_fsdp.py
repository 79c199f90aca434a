# MMPO on Llama-3-8B, all weights, sharded over eight GPUs (24 GiB each, predicted); 573 steps, not
# yet timed.
# torchrun --nproc_per_node=8 train.py config/llama3_8b_fsdp.py
out_dir = "out/llama3_8b_fsdp"
init_from = "princeton-nlp/Llama-3-Base-8B-SFT"
parallel = "fsdp"       # 8.03e9 weights x 16 bytes (fp32, gradient, AdamW) / 8 = 15 GiB a GPU
activation_checkpointing = True
pack_tokens = 8192
batch_size = 128        # 73.3k pairs / 128 = 573 steps an epoch
epochs = 1
learning_rate = 1e-6    # all weights move, so far less than LoRA's
save_interval = 500     # after a crash the same command with --resume goes on
