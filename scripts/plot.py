"""
Draw the curves of one or several runs into a PNG.

$ pip install matplotlib
$ python -m scripts.plot out/demo                              # -> out/demo/curves.png
$ python -m scripts.plot out/mmpo out/dpo --out=compare.png
$ python -m scripts.plot --attention --out=assets/attention.png   # README's picture of a packed row

A run is a folder with metrics.jsonl, or such a file. Thin lines: training steps; dots: held-out
pairs.
"""
import argparse
import json
import os

PANELS = [   # title, metric
    ("loss", "loss"),
    ("chosen likelier, mean log-probs", "accuracy/mean"),
    ("chosen likelier, summed log-probs", "accuracy/sum"),
    ("weight of the chosen response, q_w", "weights/chosen"),
    ("implicit reward margin", "rewards/margins"),
    ("KL(reference || policy), nats a token", "kl"),
]


def read_run(path):
    """A run's folder or metrics.jsonl -> (name, records). Raises FileNotFoundError, ValueError."""
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise FileNotFoundError(f"{file}: no such file; give a folder that train.py wrote")
    with open(file, encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    if not records:
        raise ValueError(f"{file}: empty; has the run logged a step yet?")
    return os.path.basename(os.path.dirname(os.path.abspath(file))), records


def series(records, metric):
    """-> steps, values of a metric."""
    points = [(r["iter"], r[metric]) for r in records if metric in r]
    return [p[0] for p in points], [p[1] for p in points]


def plot(paths, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = [read_run(p) for p in paths]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (title, metric) in zip(axes.flat, PANELS):
        for i, (name, records) in enumerate(runs):
            axis.plot(*series(records, metric), color=f"C{i}", alpha=0.35, linewidth=1)
            axis.plot(*series(records, f"eval/{metric}"), "o-", color=f"C{i}", markersize=4,
                      label=name)
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
    """Which keys a query sees in a packed row of two pairs: data.collate under the tree rule."""
    import matplotlib
    import numpy as np
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import data
    import model as llama
    sizes = [(5, 4, 3), (3, 3, 5)]   # prompt, chosen, rejected
    pairs = data.Pairs.from_rows([[np.zeros(n) for n in row] for row in sizes])
    row = data.collate(pairs, [0, 1])
    tree, branch = row.tree.numpy(), row.branch.numpy()
    q, k = np.meshgrid(np.arange(len(tree)), np.arange(len(tree)), indexing="ij")
    seen = llama.tree_rule(tree, branch)(None, None, q, k)
    figure, axis = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    axis.imshow(np.where(seen, 1 + branch[k], 0), cmap=matplotlib.colors.ListedColormap(
        ["white", "#9aa5b1", "#3b7dd8", "#e07a5f"]))
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
    axis.set_title("what a token of a packed row sees", fontsize=10)
    figure.savefig(out, dpi=130)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--attention", action="store_true", help="draw the attention rule instead")
    parser.add_argument("--out", help="the PNG; default: curves.png in the first run")
    args = parser.parse_args()
    if args.attention:
        print(plot_attention(args.out or "attention.png"))
        return
    if not args.runs:
        parser.error("name a run: a folder that train.py wrote")
    first = args.runs[0] if os.path.isdir(args.runs[0]) else os.path.dirname(args.runs[0])
    print(plot(args.runs, args.out or os.path.join(first, "curves.png")))


if __name__ == "__main__":
    from configurator import one_line_errors
    one_line_errors()
    main()
