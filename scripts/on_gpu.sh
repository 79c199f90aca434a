#!/usr/bin/env bash
# What README has not measured or run yet and one GPU of 80 GB can show.
#
#   bash scripts/on_gpu.sh SMOLLM2_135M TRAIN_PAIRS TEST_PAIRS [LLAMA3_8B]
#
# SMOLLM2_135M and LLAMA3_8B: a Hugging Face folder or hub id; the pairs: any file data.py reads.
set -euo pipefail
smollm2=$1 train=$2 test=$3 llama=${4:-}

# 1. the GPU's path computes what the CPU's does
python -m pytest -q test_mmpo.py -k gpu
torchrun --nproc_per_node=1 train.py config/demo.py --parallel=fsdp --dtype=bfloat16 --max_iters=3

# 2. one idea at a time, where the time goes, by length, and beside TRL (README, Efficiency)
for part in ablation profile scaling $(python -c "import trl; print('trl')" || true); do
    python -m scripts.bench --model="$smollm2" --data="$train" --only=$part \
        --json="out/bench_gpu_$part.json"
done

# 3. MMPO, the authors' settings, DPO and SimPO, two epochs each (README, Results)
python -m scripts.compare --model="$smollm2" --train="$train" --eval="$test" -- \
    --epochs=2 --beta=0.05 --eval_pairs=1500

# 4. Llama-3-8B: predicted memory beside the peak_memory_gib, tokens/s and MFU in metrics.jsonl
if [ -n "$llama" ]; then
    python train.py config/llama3_8b.py --init_from="$llama" --dataset="$train" --dry_run=True
    python train.py config/llama3_8b.py --init_from="$llama" --dataset="$train" --max_iters=10 \
        --eval_pairs=32 --out_dir=out/llama3_8b_short
fi
