# DPO, everything else as in config/smollm2_135m.py; one GPU; not yet timed.
# python train.py config/smollm2_135m_dpo.py
out_dir = "out/smollm2_135m_dpo"
objective = "dpo"
learning_rate = 5e-4    # the authors' choice for DPO at 135M
save_interval = 500
