# SimPO in place of MMPO, to be given after another config.
# python train.py config/smollm2_135m.py config/simpo.py          not yet run
# The authors' learning rates for it: 1e-4 at 135M, 360M and 8B, 5e-4 at 1B; their margin over beta
# is 1.6 for SmolLM2 and 1.0 for Llama.
out_dir = out_dir + "_simpo"
objective = "simpo"
learning_rate = 1e-4
gamma_beta_ratio = 1.6
