#!/usr/bin/env bash
# The study of assets/results.md: what each objective learns and what it forgets, on SmolLM2-135M.
#
#   bash scripts/study.sh MODEL TRAIN.jsonl.gz TEST.jsonl.gz "CHOICES.jsonl.gz .." [JOBS]
#
# MODEL is SmolLM2-135M-Instruct, a folder or hub id. The pairs have string fields prompt, chosen and
# rejected, and few prompts with many pairs each. Stopped and started again it goes on.
# Without a GPU a run goes once over 480 pairs of at most 160 tokens, in fp32; with one, twice over
# all pairs of at most 512 tokens, in bf16, which so many steps allow.
set -euo pipefail
model=$1 train=$2 test=$3 choices=$4 jobs=${5:-2}
out=out/study length=160 pairs=480 limit=300 more=()
if python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
    out=out/study_gpu length=512 pairs=1000000 limit=1000
    more=(--max_length=512 --max_prompt_length=384 --pack_tokens=16384 --batch_size=64 --epochs=2
          --eval_interval=50 --eval_pairs=400 --dtype=bfloat16)
fi
mkdir -p "$out"

# Held out are all prompts of TEST and 100 of TRAIN: 400 pairs whose chosen response is the longer
# one and 400 whose chosen one is shorter. Pairs of other prompts are trained on.
[ -e "$out/held_out.jsonl" ] || python - "$model" "$train" "$test" "$out" $length $pairs << 'EOF'
import json
import os
import sys

import numpy as np

import data
import model

folder, *files, out, length, pairs = sys.argv[1:]
tokenizer = data.Tokenizer(model.checkpoint_folder(folder))
rng = np.random.default_rng(0)
short = []
for file in files:
    rows = (data.parse_json(line.decode()) for _, line in data.read_rows(file, ""))
    short.append([])
    for row in ({key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows):
        prompt, (a, b) = tokenizer.encode_responses(
            [data.turn("user", row["prompt"])], [row["chosen"], row["rejected"]])
        if a != b and len(prompt) + max(len(a), len(b)) <= int(length):
            short[-1].append((row, len(a) - len(b)))
train, test = short
prompts = sorted({row["prompt"] for row, _ in train})
held = {*rng.permutation(prompts)[:100], *(row["prompt"] for row, _ in test)}
pool = [pair for pair in train + test if pair[0]["prompt"] in held]
pool = [pool[i] for i in rng.permutation(len(pool))]
balanced = ([row for row, longer in pool if longer > 0][:400]
            + [row for row, longer in pool if longer < 0][:400])
others = [row for row, _ in train if row["prompt"] not in held]
others = [others[i] for i in rng.permutation(len(others))[:int(pairs)]]
balanced = [balanced[i] for i in rng.permutation(len(balanced))]
for name, rows in (("train", others), ("held_out", balanced)):
    with open(f"{out}/{name}.tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(f.name, f"{out}/{name}.jsonl")
    print(f"{name}: {len(rows)} pairs of {len({row['prompt'] for row in rows})} prompts")
EOF

# The methods; betas; seeds; ablations; other learning rates, a factor of three apart.
python -m scripts.compare config/study_135m.py --out="$out" --jobs="$jobs" \
    --evaluate="--pairs=$out/held_out.jsonl --choices $choices --limit=$limit --prompts=64 --max_new_tokens=96" \
    --grid pref_weight=10,0 learning_rate=2e-5 \
    --grid objective=dpo,simpo learning_rate=6e-6 \
    --grid objective=dpo learning_rate=2e-5 --grid pref_weight=40 learning_rate=1e-5 \
    --grid config=config/authors.py learning_rate=2e-5 --grid objective=sft learning_rate=2e-5 \
    --grid objective=dpo learning_rate=6e-6 beta=0.01,0.5 \
    --grid pref_weight=0,10 learning_rate=2e-5 beta=0.01,0.5 \
    --grid objective=simpo learning_rate=6e-6 beta=0.01,0.5 \
    --grid pref_weight=0,10 learning_rate=2e-5 seed=1 \
    --grid objective=dpo,simpo learning_rate=6e-6 seed=1 \
    --grid pref_weight=40 learning_rate=2e-5 \
    --grid length_norm=False learning_rate=2e-5 --grid reward_norm=False learning_rate=2e-5 \
    --grid entropy_coef=0.05 learning_rate=2e-5 \
    --grid pref_weight=0.5,1,2 learning_rate=2e-5 \
    --grid reward_norm=False reward_chosen=5 reward_rejected=0 learning_rate=2e-5 \
    --grid objective=simpo learning_rate=2e-5 --grid pref_weight=0,10 learning_rate=6e-5 \
    --grid pref_weight=0,10 learning_rate=6e-6 --grid pref_weight=10 learning_rate=6e-6 seed=1 \
    --grid objective=dpo learning_rate=2e-6,6e-5 --grid objective=simpo learning_rate=2e-6 \
    --grid objective=sft learning_rate=6e-6,6e-5 \
    --grid config=config/authors.py learning_rate=6e-6,6e-5 --grid pref_weight=40 learning_rate=6e-6 \
    --grid pref_weight=0,10 learning_rate=2e-5 beta=0.01,0.5 seed=1 \
    --grid objective=dpo,simpo learning_rate=6e-6 beta=0.01,0.5 seed=1 \
    --grid objective=dpo,sft learning_rate=2e-5 seed=1 \
    -- --init_from="$model" --dataset="$out/train.jsonl" --eval_dataset="$out/held_out.jsonl" \
    ${more[@]+"${more[@]}"}
