#!/usr/bin/env bash
# Most of what assets/results.md couldn't measure on a GPU yet. In the checkout:
#
#   bash scripts/on_gpu.sh SMOLLM2_135M TRAIN TEST "CHOICES.jsonl.gz .." [LLAMA3_8B]
#
# SMOLLM2_135M and LLAMA3_8B are Hugging Face folders or hub ids, the pairs JSON lines with prompt,
# chosen and rejected. A step that fails doesn't end the others. Everything is written to out/gpu,
# which should not be there yet, but the study, which goes to out/study_gpu.
set -uo pipefail
smollm2=$1 train=$2 test=$3 choices=$4 llama=${5:-} out=out/gpu
mkdir -p "$out"

# 1. the GPU computes what the CPU does, and, with a copy of SmolLM2-135M-Instruct in
#    ~/.cache/nanommpo, is nearer to float64 than transformers
python -m pytest -q test_mmpo.py -k test_gpu

# 2. where the time goes (flex attention had 44% of a small pack before model.TILES), beside TRL, one
#    idea at a time, and tokens_per_second, mfu and peak_memory_gib, step by step
for part in profile trl ablation; do
    python -m scripts.bench --model="$smollm2" --data="$train" --only=$part --batch=64 \
        --json="$out/$part.json"
done
python train.py config/smollm2_135m.py --init_from="$smollm2" --dataset="$train" --max_iters=20 \
    --eval_pairs=64 --save_interval=0 --out_dir="$out/steps"

# 3. one process of FSDP, whose blocks didn't compile before 29067d4
torchrun --nproc_per_node=1 train.py config/smollm2_135m.py --init_from="$smollm2" --parallel=fsdp \
    --dataset="$train" --max_iters=20 --eval_pairs=64 --save_interval=0 --out_dir="$out/fsdp"

# 4. Llama-3-8B: the predicted memory, beside peak_memory_gib, tokens_per_second and mfu
if [ -n "$llama" ]; then
    python train.py config/llama3_8b.py --init_from="$llama" --dataset="$train" --dry_run=True
    python train.py config/llama3_8b.py --init_from="$llama" --dataset="$train" --max_iters=10 \
        --eval_pairs=32 --save_interval=0 --export_adapter=True --out_dir="$out/llama3_8b"
fi

# 5. the study on all pairs
bash scripts/study.sh "$smollm2" "$train" "$test" "$choices" 4
