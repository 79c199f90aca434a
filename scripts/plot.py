"""
Draw the curves of one or several runs into a PNG.

$ pip install matplotlib
$ python -m scripts.plot out/demo                                 # -> out/demo/curves.png
$ python -m scripts.plot out/mmpo out/dpo --out=compare.png
$ python -m scripts.plot --attention --out=assets/attention.png   # README's picture of a pack

A run is a folder with metrics.jsonl, or such a file. Thin lines are training steps, dots are
held-out pairs.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/plot.py`
import data
import model as llama
from configurator import one_line_errors, reading, require

PANELS = {   # metric: title
    "loss": "loss",
    "accuracy/mean": "chosen likelier, mean log-probs",
    "accuracy/sum": "chosen likelier, summed log-probs",
    "weights/chosen": "weight of the chosen response, q_w",
    "rewards/margins": "implicit reward margin",
    "kl": "KL(reference || policy), nats a token",
}


def read_run(path):
    """A run's folder, or its metrics.jsonl -> its name, {metric: (steps, values)}."""
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    require(os.path.exists(file), f"{file}: no such file; give a folder that train.py wrote")
    curves = {}
    with open(file, encoding="utf-8") as f, reading(file, "a run's metrics"):
        for record in map(json.loads, f):
            for metric, value in record.items():
                steps, values = curves.setdefault(metric, ([], []))
                steps.append(record["iter"])
                values.append(value)
    require(curves, f"{file}: empty; has the run logged a step yet?")
    return os.path.basename(os.path.dirname(os.path.abspath(file))), curves


def plot(paths, out):
    runs = [read_run(path) for path in paths]
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (metric, title) in zip(axes.flat, PANELS.items()):
        for i, (name, curves) in enumerate(runs):
            training, held_out = (curves.get(m, ([], [])) for m in (metric, f"eval/{metric}"))
            axis.plot(*training, color=f"C{i}", alpha=0.35, linewidth=1)
            axis.plot(*held_out, "o-", color=f"C{i}", markersize=4, label=name)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis in axes[-1]:
            axis.set_xlabel("step")
        if metric.startswith(("accuracy", "weights")):
            axis.set_ylim(-0.03, 1.03)
            axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.flat[0].plot([], [], color="grey", alpha=0.5, linewidth=1, label="training steps")
    axes.flat[0].legend(fontsize=8, frameon=False)
    figure.savefig(out, dpi=130)
    return out


def plot_attention(out):
    """Which keys a query sees in a pack of two pairs: data.collate under model.tree_rule."""
    sizes = [(5, 4, 3), (3, 3, 5)]   # tokens of prompt, chosen and rejected
    pairs = data.Pairs.from_ids([[np.zeros(n) for n in pair] for pair in sizes])
    pack = data.collate(pairs, np.arange(2), np.arange(2))
    tree, branch = pack.tree.numpy(), pack.branch.numpy()
    q, k = np.indices((len(tree), len(tree)))
    seen = llama.tree_rule(tree, branch)(None, None, q, k)
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.where(seen, 1 + branch[k], 0),
                cmap=ListedColormap(["white", "#9aa5b1", "#3b7dd8", "#e07a5f"]))
    edges = np.flatnonzero(np.diff(tree * 10 + branch)) + 0.5
    names = [f"{part} {t + 1}" for t in range(2) for part in ("prompt", "chosen", "rejected")]
    middles = [(a + b) / 2 for a, b in zip([-0.5, *edges], [*edges, len(tree) - 0.5])]
    axis.set_xticks(middles, names, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(middles, names, fontsize=8)
    axis.tick_params(length=0)
    for edge in edges:
        axis.axhline(edge, color="black", linewidth=0.5)
        axis.axvline(edge, color="black", linewidth=0.5)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    axis.set_title("what a token of a pack sees", fontsize=10)
    figure.savefig(out, dpi=130)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--attention", action="store_true", help="draw the attention rule instead")
    parser.add_argument("--out", help="the PNG; default: curves.png in the first run's folder")
    args = parser.parse_args()
    if args.attention:
        print(plot_attention(args.out or "attention.png"))
        return
    if not args.runs:
        parser.error("name a run: a folder that train.py wrote")
    first = args.runs[0] if os.path.isdir(args.runs[0]) else os.path.dirname(args.runs[0])
    print(plot(args.runs, args.out or os.path.join(first, "curves.png")))


if __name__ == "__main__":
    one_line_errors()
    main()
