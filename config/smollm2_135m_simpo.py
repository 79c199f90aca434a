# SimPO, everything else as in config/smollm2_135m.py; one GPU; not yet timed.
# python train.py config/smollm2_135m_simpo.py
out_dir = "out/smollm2_135m_simpo"
objective = "simpo"
learning_rate = 1e-4    # the authors' choice for SimPO at 135M
gamma_beta_ratio = 1.6
save_interval = 500
