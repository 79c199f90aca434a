"""
Draw runs into a PNG (pip install matplotlib). A run is a folder that train.py writes.

$ python -m scripts.plot out/demo                                 # -> out/demo/curves.png
$ python -m scripts.plot --tradeoff out/*/ --out=tradeoff.png     # accuracy, and what it cost
$ python -m scripts.plot --beta out/*/ --out=beta.png             # both, against beta
$ python -m scripts.plot --attention --out=assets/attention.png   # README's picture of a pack
"""
import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/plot.py`
import data
import model as llama
from configurator import (
    one_line_errors, printable, read_json, read_metrics, read_settings, reading, require,
    run_sum, writing)

PANELS = {"loss": "loss", "accuracy/mean": "chosen likelier, mean log-probs",   # metric: title
          "accuracy/sum": "chosen likelier, summed log-probs",
          "weights/chosen": "weight of the chosen response, q_w",
          "accuracy/implicit": "implicit reward accuracy",
          "kl": "KL(reference || policy), nats a token"}
CURVES = "kl", "accuracy/mean"   # what a run without an evaluation is drawn by
IMPLICIT = "accuracy/implicit"   # as scripts/evaluate.py calls it
ACCURACY = {True: "implicit reward accuracy", False: "held-out accuracy, mean log-probs"}
KL_TICKS = [0, 0.002, 0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
SILENT = "I/O", "logging", "distributed", "system"   # groups of settings that labels leave out,
TOLD = "init_from", "dtype"                          # but for these two
COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #000000 #56B4E9 #D55E00".split()   # Okabe and Ito's
LINES, MARKERS = ["-", "--", "-.", ":", (0, (7, 2, 1, 2, 1, 2))], "os^DvPX<>"
STYLES = [{"color": COLOURS[i % 7], "linestyle": LINES[i % 5], "marker": MARKERS[i % 9],
           "fillstyle": ["full", "none"][i // 7 % 2]} for i in range(315)]   # no two alike


def read_run(path):
    """A run's folder, or its metrics.jsonl -> its name, {metric: (steps, values)}."""
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    require(os.path.exists(file), f"{file}: no such file; give a folder that train.py wrote")
    curves = {}
    for record in read_metrics(file):
        for metric, value in record.items():
            steps, values = curves.setdefault(metric, ([], []))
            steps.append(record["iter"])
            values.append(value)
    require(curves, f"{file}: no metrics in it; has the run logged a step yet?")
    return os.path.basename(os.path.dirname(os.path.abspath(file))), curves


def read_methods(paths):
    """Runs' folders -> {label: [run, ..]} by beta, all betas, and whether scripts/evaluate.py was
    run on all of them, beside a reference. A run has its beta, its curves and what evaluate.py
    wrote, or {}. A label is the objective, those of its settings that aren't the defaults, and the
    others in which the runs differ, but for those of SILENT groups."""
    known = read_settings(Path(__file__).parents[1] / "train.py")
    settings = [read_json(os.path.join(path, "train_config.json")) for path in paths]
    differ = [name for name, setting in known.items()
              if (name in TOLD or setting.group not in (*SILENT, "objective"))
              and len({told.get(name, setting.value) for told in settings}) > 1]
    methods, lacking, evaluated, asked = {}, [], True, set()
    for path, told in zip(paths, settings):
        _, curves = read_run(path)
        if not {f"eval/{metric}" for metric in CURVES} <= curves.keys():
            lacking.append(path)
        file = os.path.abspath(path) + ".evaluation.json"
        found = read_json(file) if os.path.exists(file) else {}
        now = run_sum(path)   # older files don't say of which run they are
        require(found.get("run", now) == now, f"{file}: of another run than the "
                "one that is there now; run scripts.evaluate again")
        evaluated = evaluated and {IMPLICIT, "kl"} <= found.get("metrics", {}).keys()
        # what was asked: of which pairs (None: those that the run held out), and which tasks
        pairs = found.get("settings", {}).get("pairs")
        asked.add(str([found.get("files", {}).get(pairs, pairs), sorted(
            name for name in found.get("metrics", {}) if name.startswith("choices/"))]))
        with reading(path, "a run's settings"):
            names = [name for name, setting in known.items() if name in differ
                     or setting.group == "objective" and name not in ("objective", "beta")
                     and told.get(name, setting.value) != setting.value]
            values = [told.get(n, known[n].value) for n in names]   # 64.0 is shown as 64
            label = [told["objective"], *(f"{n} {x}".removesuffix(".0" * isinstance(x, float))
                                          for n, x in zip(names, values))]
            run = {metric: curves.get(f"eval/{metric}", ([], []))[1] for metric in CURVES}
            methods.setdefault(plain(", ".join(label)), []).append(
                run | {"beta": told["beta"], "evaluation": found})
    require(evaluated or not lacking, f"{', '.join(lacking)}: without KL, or without accuracy, "
            "which pairs of one response don't have; run scripts.evaluate on all runs, with "
            "--reference and --pairs, or train with kl_samples above 0")
    require(not evaluated or len(asked) == 1, "the runs were evaluated on other --pairs or "
            "--choices than each other; run scripts.evaluate again on all of them")
    methods = {label: sorted(runs, key=lambda run: run["beta"]) for label, runs in methods.items()}
    return methods, sorted({told["beta"] for told in settings}), evaluated


def plain(label):
    """As matplotlib shows it as it is: it reads $..$ as mathematics, and leaves out _.. ."""
    return re.sub("^_", " _", label.replace("$", r"\$"))


def finish(axes, out):
    """Write the PNG, with a legend below the panels, where it covers nothing."""
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    legend = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels())}
    axis.figure.legend(legend.values(), legend.keys(), loc="upper left", bbox_to_anchor=(0, 0),
                       ncols=max(1, min(4, 170 // (10 + len(max(legend, key=len))))),
                       fontsize=8, frameon=False, handlelength=4)
    with writing(out):
        axis.figure.savefig(out, dpi=130, bbox_inches="tight")
    return out


def plot(paths, out):
    runs = [read_run(path) for path in paths]
    names = [name for name, _ in runs]   # or paths, where two have the same
    names = names if len({*names}) == len(names) else [os.path.normpath(path) for path in paths]
    rows = -(-len(PANELS) // 3)
    axes = Figure(figsize=(12, 3 * rows), layout="constrained").subplots(rows, 3).ravel()
    for axis, (metric, title) in zip(axes, PANELS.items()):
        for i, (name, (_, curves)) in enumerate(zip(names, runs)):
            training, held_out = (curves.get(m, ([], [])) for m in (metric, f"eval/{metric}"))
            axis.plot(*training, color=COLOURS[i % 7], alpha=0.35, linewidth=1,
                      marker="." * (len(training[0]) == 1))   # a line of one step is none
            axis.plot(*held_out, **STYLES[i % 315], markersize=4, label=plain(name))
        axis.set(title=title, xlabel="step")
        axis.locator_params("x", integer=True, min_n_ticks=1)
        if metric.startswith(("accuracy", "weights")):
            axis.set_ylim(-0.03, 1.03)
            axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes[0].plot([], [], color="grey", alpha=0.5, linewidth=1, label="training steps")
    return finish(axes, out)


def tradeoff(paths, out):
    """Accuracy against KL, over a run's evaluations. Where scripts/evaluate.py was run on all runs,
    the accuracy of implicit rewards at their ends instead, and that against multiple choice."""
    methods, betas, evaluated = read_methods(paths)
    references = {run["evaluation"].get("reference") for runs in methods.values() for run in runs}
    left, right = Figure(figsize=(11, 4.5), layout="constrained").subplots(1, 2, sharey=True)
    left.set_xscale("symlog", linthresh=0.01)
    left.set(xticks=KL_TICKS, xticklabels=KL_TICKS, xlabel=PANELS["kl"], ylabel=ACCURACY[evaluated])
    star = {"color": "black", "marker": "*", "ms": 12, "lw": 1,
            "label": "the reference" if len(references) == 1 else "each run's own reference"}
    for i, (label, runs) in enumerate(methods.items()):
        for run in runs:
            beta, evaluation = run["beta"], run["evaluation"]
            look = STYLES[i % 315] | {"marker": MARKERS[betas.index(beta) % 9], "linewidth": 1,
                                      "markersize": 6 + 3 * (betas.index(beta) // 9),
                                      "label": label + f", beta {beta:g}" * (len(betas) > 1)}
            if not evaluated:
                left.plot(*(run[metric] for metric in CURVES), **look, markevery=[-1])
                continue
            for metrics, look in (evaluation["metrics"], look), (evaluation["before"], star):
                y = metrics.get(IMPLICIT, [0.5] * 3)   # the reference gains nothing
                bars(left, metrics.get("kl", [0] * 3), y, look)
                tasks = np.array([value for name, value in metrics.items()
                                  if name.startswith("choices/") and name.endswith("/acc")])
                if len(tasks):   # (N, 3), of independent errors
                    errors = np.linalg.norm(tasks - tasks[:, :1], axis=0) / len(tasks)
                    bars(right, tasks[:, 0].mean() + errors * [0, -1, 1], y, look)
    right.set(xlabel="multiple-choice accuracy, mean of tasks; bars: 95%", visible=right.has_data())
    return finish([left, right], out)


def bars(axis, x, y, look):
    """A point with its intervals, x and y (3,): the value, and both ends in any order."""
    x, y = np.sort(x), np.sort(y)
    axis.plot(x[[1, 1, 1]], y, **look | {"marker": ""})
    axis.plot(x, y[[1, 1, 1]], **look, markevery=[1])


def by_beta(paths, out):
    """Accuracy and KL at the end against beta; a bar spans the runs that differ in seed only."""
    methods, betas, evaluated = read_methods(paths)
    axes = Figure(figsize=(11, 4.5), layout="constrained").subplots(1, 2)
    axes[1].set_yscale("symlog", linthresh=0.01)
    axes[1].set_yticks(KL_TICKS, KL_TICKS)
    axes[1].axhline(0, color="grey", linewidth=0.8, linestyle=":")   # the reference
    for axis, curve, metric, title in ((axes[0], "accuracy/mean", IMPLICIT, ACCURACY[evaluated]),
                                       (axes[1], "kl", "kl", PANELS["kl"])):
        for i, (label, runs) in enumerate(methods.items()):
            ends = {}   # beta: the last value of each of its runs
            for run in runs:
                last = run["evaluation"]["metrics"][metric][0] if evaluated else run[curve][-1]
                ends.setdefault(run["beta"], []).append(last)
            axis.plot([*ends], [*map(np.mean, ends.values())], **STYLES[i % 315], label=label)
            axis.vlines([*ends], [*map(min, ends.values())], [*map(max, ends.values())],
                        COLOURS[i % 7], lw=1)
        axis.set_xscale("symlog", linthresh=min(filter(None, betas), default=1))
        axis.set_xticks(betas, [f"{beta:g}" for beta in betas], rotation=90)
        axis.set(xlabel="beta (a bar spans the seeds)", ylabel=title)
    return finish(axes, out)


def plot_attention(_, out):
    """Which keys a query sees in a pack of two pairs: data.collate under model.tree_rule."""
    sizes = [(5, 4, 3), (3, 3, 5)]   # tokens of prompt, chosen and rejected
    pairs = data.Pairs.from_ids([[np.zeros(n) for n in pair] for pair in sizes])
    pack = data.collate(pairs, np.arange(2), np.arange(2))
    tree, branch = pack.tree.numpy(), pack.branch.numpy()
    seen = llama.tree_rule(tree, branch)(None, None, *np.indices(2 * tree.shape))
    axis = Figure(figsize=(5.2, 4.6), layout="constrained").subplots()
    axis.imshow(np.where(seen, 1 + branch, 0),   # of each query and key: 0, or the key's branch
                cmap=ListedColormap(["white", "#9aa5b1", "#3b7dd8", "#e07a5f"]))
    ends = np.cumsum(sizes) - 0.5
    names = [f"{part} {t + 1}" for t in range(2) for part in ("prompt", "chosen", "rejected")]
    axis.set_xticks(ends - np.ravel(sizes) / 2, names, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(ends - np.ravel(sizes) / 2, names, fontsize=8)
    axis.tick_params(length=0)
    axis.hlines(ends[:-1], *axis.get_xlim(), color="black", linewidth=0.5)
    axis.vlines(ends[:-1], *axis.get_ylim(), color="black", linewidth=0.5)
    axis.set(xlabel="key", ylabel="query", title="what a token of a pack sees")
    axis.figure.savefig(out, dpi=130)
    return out


def main():
    pictures = {"curves": plot, "tradeoff": tradeoff, "beta": by_beta, "attention": plot_attention}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    for n in pictures:
        parser.add_argument("--" + n, dest="name", action="store_const", const=n, default="curves")
    parser.add_argument("--out", type=os.path.expanduser,
                        help="the PNG; default: in the folder of one run, here of several")
    args = parser.parse_args()
    require(args.runs or args.name == "attention", "name a run: a folder that train.py wrote")
    require(not args.out or re.search(r"\.(png|pdf|svg)$", args.out),
            f"--out: a .png, .pdf or .svg file (got {args.out})")
    folder = args.runs[0] if len(args.runs) == 1 else ""
    folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
    with reading(", ".join(args.runs), "runs of train.py and their evaluations"):
        out = args.out or os.path.join(folder, f"{args.name}.png")
        print(printable(pictures[args.name](args.runs, out)))


if __name__ == "__main__":
    one_line_errors()
    main()
