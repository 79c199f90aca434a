# Ablation: pref_weight 2, a contrastive term on top of likelihood of the chosen, everything else as
# in config/smollm2_135m.py; one GPU; not yet timed.
# python train.py config/smollm2_135m_pref_weight.py
out_dir = "out/smollm2_135m_pref_weight"
pref_weight = 2.0
save_interval = 500
