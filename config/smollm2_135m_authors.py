# The authors' MMPO: summed log-probs and pref_weight 1 (chosen-only likelihood), everything else as
# in config/smollm2_135m.py; one GPU; not yet timed.
# python train.py config/smollm2_135m_authors.py
out_dir = "out/smollm2_135m_authors"
length_norm = False
pref_weight = 1.0       # by the identity in mmpo.py the rejected response has no gradient
reward_norm_group = 2   # R is normalized over a micro-batch of 2 pairs
save_interval = 500
