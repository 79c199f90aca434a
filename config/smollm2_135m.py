# MMPO on SmolLM2-135M, all weights, one GPU (predicted 12 GiB); 2,875 steps, not yet
# timed.
# python train.py config/smollm2_135m.py
# The authors' data, batch, learning rate and epochs (arXiv 2510.22881), this project's defaults for
# the method: mean log-probs and no pairwise term. config/smollm2_135m_authors.py has theirs.
out_dir = "out/smollm2_135m"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"   # theirs is an SFT checkpoint of their own
batch_size = 128        # 73.6k pairs / 128 = 575 steps an epoch, each about 8 rows of 16,384 tokens
epochs = 5
learning_rate = 5e-4
save_interval = 500     # then --resume=True goes on after a crash
