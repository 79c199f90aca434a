# What learned most of the preference and moved little, in the study and on a GPU
# (assets/results.md): MMPO with a contrastive term, a low rate, one epoch. Give it after a
# config that trains all weights.
# python train.py config/smollm2_135m.py config/recommended.py    not yet run on so many pairs
out_dir = out_dir + "_recommended"
pref_weight = 10.0
learning_rate = 2e-5    # for hundreds of steps 6e-6: it learned as much and moved a quarter as far
epochs = 1              # 344 steps in two epochs of 10,978 pairs went to a KL of 0.21
