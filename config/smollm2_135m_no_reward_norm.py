# Ablation: R as it is, not min-max normalized, everything else as in config/smollm2_135m.py;
# one GPU; not yet timed.
# python train.py config/smollm2_135m_no_reward_norm.py
out_dir = "out/smollm2_135m_no_reward_norm"
reward_norm = False
save_interval = 500
