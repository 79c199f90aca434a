# Ablation: summed instead of mean log-probs, everything else as in config/smollm2_135m.py; one GPU;
# not yet timed.
# python train.py config/smollm2_135m_no_length_norm.py
out_dir = "out/smollm2_135m_no_length_norm"
length_norm = False     # the weights saturate: length decides (README, "What the weights do")
save_interval = 500
