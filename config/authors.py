# The authors' MMPO, to be given after another config: summed log-probs, and likelihood of the
# chosen response alone, which pref_weight = 1 amounts to (the identity in mmpo.py).
# python train.py config/smollm2_135m.py config/authors.py        not yet run
out_dir = out_dir + "_authors"
length_norm = False
pref_weight = 1.0
reward_norm_group = 2   # they normalize R over a micro-batch of 2 pairs
