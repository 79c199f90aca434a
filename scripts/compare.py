"""
Train one model with several configs on the same pairs, and print the table that compares them.

$ pip install matplotlib
$ python -m scripts.compare --model=HuggingFaceTB/SmolLM2-135M-Instruct --train=train.jsonl \
      --eval=test.jsonl -- --epochs=2 --beta=0.05

Without --configs there are four runs: config/smollm2_135m.py alone, and with config/authors.py,
config/dpo.py or config/simpo.py applied after it. Every run also gets the settings that follow
`--`. A run that is complete in --out is not repeated. One that was interrupted goes on from its
last checkpoint, and its minutes are then those of the last part.
"""
import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/compare.py`
from configurator import (
    HERE, last_checkpoint, one_line_errors, read_json, reading, require, write_json)
from scripts.plot import plot, read_run

BASE = "config/smollm2_135m.py"
RUNS = [BASE, *(f"{BASE}+config/{name}.py" for name in ("authors", "dpo", "simpo"))]
COLUMNS = {"accuracy, mean": "eval/accuracy/mean", "accuracy, sum": "eval/accuracy/sum",
           "KL, nats/token": "eval/kl", "mean q_w": "eval/weights/chosen"}   # title: metric


def train(run, settings):
    """Train into the folder `run`, unless that is done -> the minutes it took."""
    record = os.path.join(run, "compare.json")
    if not os.path.exists(record):
        started = time.time()
        resume = ["--resume=True"] if last_checkpoint(run)[1] else []
        command = [sys.executable, os.path.join(HERE, "train.py"), *settings, *resume]
        if status := subprocess.run(command).returncode:
            sys.exit(status)   # train.py has said why
        write_json(record, {"settings": settings, "minutes": (time.time() - started) / 60})
    with reading(record, "a record of scripts/compare.py"):
        made = read_json(record)
        require(made["settings"] == settings,
                f"{run}: made with {' '.join(made['settings'])}; give another --out")
        return made["minutes"]


def cells(curves, which):
    """What the table shows of a run's first (0) or last (-1) evaluation."""
    return [f"{curves[metric][1][which]:.3f}" if metric in curves else ""
            for metric in COLUMNS.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or a hub id")
    parser.add_argument("--train", required=True, help="pairs to train on, as train.py's dataset")
    parser.add_argument("--eval", required=True, help="held-out pairs")
    parser.add_argument("--out", default="out/compare", help="a folder for all runs")
    parser.add_argument("--configs", default=",".join(RUNS),
                        help="other runs, as in config/a.py,config/b.py+config/c.py: the second\n"
                             "one has two config files, the later one applied last")
    parser.add_argument("settings", nargs="*", help="--key=value for every run, after --")
    args = parser.parse_args()

    table, runs = [], []
    for configs in args.configs.split(","):
        files = configs.split("+")
        name = "_".join(os.path.basename(file).removesuffix(".py") for file in files)
        run = os.path.join(args.out, name)
        minutes = train(run, [*files, f"--init_from={args.model}", f"--dataset={args.train}",
                              f"--eval_dataset={args.eval}", f"--out_dir={run}", *args.settings])
        _, curves = read_run(run)
        table = table or [["before", *cells(curves, 0), ""]]
        table.append([name, *cells(curves, -1), f"{minutes:.1f}"])
        runs.append(run)

    cuda = torch.cuda.is_available()
    print(f"\n{torch.cuda.get_device_name() if cuda else platform.processor() or 'CPU'}, "
          f"torch {torch.__version__}: python -m scripts.compare {' '.join(sys.argv[1:])}\n")
    print("| run | " + " | ".join(COLUMNS) + " | minutes |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for row in table:
        print(f"| {' | '.join(row)} |")
    print(plot(runs, os.path.join(args.out, "curves.png")))


if __name__ == "__main__":
    one_line_errors()
    main()
