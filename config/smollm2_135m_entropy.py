# Ablation: the entropy bonus, weighted like the reference, everything else as in
# config/smollm2_135m.py; one GPU; not yet timed.
# python train.py config/smollm2_135m_entropy.py
out_dir = "out/smollm2_135m_entropy"
entropy_coef = 0.05
save_interval = 500
