#!/usr/bin/env bash
# What assets/results.md has not measured yet and one GPU of 80 GB can show. Run it in the checkout:
#
#   bash scripts/on_gpu.sh SMOLLM2_135M TRAIN_PAIRS TEST_PAIRS [LLAMA3_8B]
#
# SMOLLM2_135M and LLAMA3_8B are Hugging Face folders or hub ids, the pairs any files that data.py
# reads. Step 3 needs matplotlib; TRL takes part in step 2 if it is installed.
set -euo pipefail
smollm2=$1 train=$2 test=$3 llama=${4:-}

# 1. the GPU computes what the CPU does
python -m pytest -q test_mmpo.py -k gpu
torchrun --nproc_per_node=1 train.py config/demo.py --parallel=fsdp --dtype=bfloat16 --max_iters=3

# 2. one idea at a time, where the time goes, and beside TRL (results.md, Speed beside TRL)
for part in ablation profile $(python -c "import trl; print('trl')" 2> /dev/null || true); do
    python -m scripts.bench --model="$smollm2" --data="$train" --only="$part" \
        --json="out/bench_gpu_$part.json"
done

# 3. MMPO, the authors' settings, DPO and SimPO, two epochs each at three betas
python -m scripts.compare config/smollm2_135m.py --out=out/compare_gpu \
    --grid objective=mmpo,dpo beta=0.01,0.05,0.5 --grid pref_weight=10 beta=0.01,0.05,0.5 \
    --grid config=config/authors.py,config/simpo.py beta=0.01,0.05,0.5 \
    -- --init_from="$smollm2" --dataset="$train" --eval_dataset="$test" --epochs=2 --eval_pairs=1500

# 4. Llama-3-8B: the predicted memory, beside peak_memory_gib, tokens_per_second and mfu in
#    metrics.jsonl
if [ -n "$llama" ]; then
    python train.py config/llama3_8b.py --init_from="$llama" --dataset="$train" --dry_run=True
    python train.py config/llama3_8b.py --init_from="$llama" --dataset="$train" --max_iters=10 \
        --eval_pairs=32 --out_dir=out/llama3_8b_short
fi
