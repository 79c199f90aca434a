# MMPO on SmolLM2-360M, all weights, one GPU (23 GiB predicted); 2,865 steps, not yet timed.
# python train.py config/smollm2_360m.py
# The authors' data, batch, learning rate and epochs.
out_dir = "out/smollm2_360m"
init_from = "HuggingFaceTB/SmolLM2-360M-Instruct"
batch_size = 128        # 73.3k pairs / 128 = 573 steps an epoch
epochs = 5
learning_rate = 5e-4
save_interval = 500     # after a crash the same command with --resume goes on
