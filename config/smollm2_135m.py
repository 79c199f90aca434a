# MMPO on SmolLM2-135M, all weights, one GPU (12 GiB predicted); 2,865 steps, not yet timed.
# python train.py config/smollm2_135m.py
# The authors' data, batch, learning rate and epochs (arXiv 2510.22881) with this project's defaults
# for the method: mean log-probs, no pairwise term. Add config/authors.py for theirs.
out_dir = "out/smollm2_135m"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"   # theirs is an SFT checkpoint of their own
batch_size = 128        # 73.3k pairs / 128 = 573 steps an epoch
epochs = 5
learning_rate = 5e-4
save_interval = 500     # after a crash the same command with --resume goes on
