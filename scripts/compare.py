"""
Train one model with several configs on the same pairs and print the table that compares them.

$ python -m scripts.compare --model=HuggingFaceTB/SmolLM2-135M-Instruct --train=train.jsonl \
      --eval=test.jsonl -- --epochs=2 --beta=0.05

runs config/smollm2_135m.py, _authors.py, _dpo.py and _simpo.py (--configs names others) with what
follows `--` added to each. A run that is already in --out is not repeated, an interrupted one goes
on from its last checkpoint.
"""
import argparse
import os
import platform
import subprocess
import sys
import time

import torch

import model as llama
from configurator import one_line_errors
from scripts.plot import plot, read_run

COLUMNS = [   # title, metric of the last evaluation
    ("accuracy, mean", "eval/accuracy/mean"), ("accuracy, sum", "eval/accuracy/sum"),
    ("KL, nats/token", "eval/kl"), ("mean q_w", "eval/weights/chosen"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", default="out/compare")
    parser.add_argument("--configs", default=",".join(
        f"config/smollm2_135m{name}.py" for name in ("", "_authors", "_dpo", "_simpo")))
    parser.add_argument("settings", nargs="*", help="--key=value for every run, after --")
    args = parser.parse_args()

    rows, runs = [], []
    for config in args.configs.split(","):
        name = os.path.basename(config).removesuffix(".py")
        run = os.path.join(args.out, name)
        record = os.path.join(run, "compare.json")
        command = ["train.py", config, f"--init_from={args.model}", f"--dataset={args.train}",
                   f"--eval_dataset={args.eval}", f"--out_dir={run}", *args.settings]
        if not os.path.exists(record):
            t0 = time.time()
            go_on = ["--resume=True"] if llama.last_checkpoint(run)[1] else []
            if status := subprocess.run([sys.executable, *command, *go_on]).returncode:
                sys.exit(status)   # it said why
            llama.write_json(record, {"command": command, "minutes": (time.time() - t0) / 60})
        made = llama.read_json(record)
        if made["command"] != command:
            raise ValueError(f"{run}: made by {' '.join(made['command'])}; give another --out")
        evals = [r for r in read_run(run)[1] if "eval/loss" in r]
        rows = rows or [("before", evals[0], "")]
        rows.append((name, evals[-1], f"{made['minutes']:.1f}"))
        runs.append(run)

    cuda = torch.cuda.is_available()
    print(f"\n{torch.cuda.get_device_name() if cuda else platform.processor() or 'CPU'}, "
          f"torch {torch.__version__}: python -m scripts.compare {' '.join(sys.argv[1:])}\n")
    print("| run | " + " | ".join(title for title, _ in COLUMNS) + " | minutes |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name, metrics, minutes in rows:
        cells = [f"{metrics[m]:.3f}" if m in metrics else "" for _, m in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + f" | {minutes} |")
    print(plot(runs, os.path.join(args.out, "curves.png")))


if __name__ == "__main__":
    one_line_errors()
    main()
