# SFT of the base SmolLM2-135M, all weights, one GPU: the paper's first stage, from which the MMPO
# configs can start. Not yet run.
# python train.py config/smollm2_135m_sft.py
# python train.py config/smollm2_135m.py --init_from=out/smollm2_135m_sft
out_dir = "out/smollm2_135m_sft"
init_from = "HuggingFaceTB/SmolLM2-135M"   # a base model, without a chat template
chat_template = "chatml"                   # which the export has then
objective = "sft"
dataset = "HuggingFaceH4/ultrachat_200k"   # conversations; each turn of the assistant is a pair
train_split = "train_sft"
eval_dataset = "HuggingFaceH4/ultrachat_200k"
eval_split = "test_sft"
epochs = 1
batch_size = 256        # turns of the assistant
learning_rate = 5e-4
max_length = 2048
max_prompt_length = 1536
save_interval = 500     # after a crash the same command with --resume goes on
