# DPO in place of MMPO, to be given after another config.
# python train.py config/smollm2_135m.py config/dpo.py            not yet run
# The authors' learning rates for it: 5e-4 at 135M, 5e-5 at 360M, 5e-4 at 1B, 1e-5 at 8B (LoRA).
out_dir = out_dir + "_dpo"
objective = "dpo"
