"""
Run a grid of settings, evaluate every run, and end in a table and pictures.

$ pip install matplotlib
$ python -m scripts.compare config/smollm2_135m.py --jobs=2 --evaluate="--choices sciq.jsonl.gz" \
      --grid objective=mmpo,dpo beta=0.05,0.5 seed=1,2 --grid config=config/authors.py seed=1,2 \
      -- --epochs=2 --eval_dataset=HuggingFaceH4/ultrafeedback_binarized

A --grid is all combinations of its values; several are put together. Its keys are settings of
train.py, and `config`: a file that is applied after CONFIG, as for a value with a comma in it. What
follows `--` is for every run. Without an eval_dataset each seed holds out other pairs, and runs on
other pairs are not tested against each other.

Called again, the same command goes on where it was stopped: a finished run is not repeated, an
interrupted one goes on from its last checkpoint. A folder that holds another run, or one on data
that have changed since, is refused; a note names runs that other code trained. Each run writes its
folder in --out, beside it a .log and what scripts/evaluate.py writes. Tokens and reference
log-probs are computed once, by the first run that needs them.
"""
import argparse
import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Lock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/compare.py`
import mmpo
from configurator import (
    HERE, PATHS, UserError, all_beside_the_checkout, code_sum, configure, one_line_errors,
    read_json, read_run_settings, read_settings, reading, require, run_sum, sha256)
from scripts import evaluate, plot
from scripts.report import DEFAULTS

TRAIN, EVALUATE = os.path.join(HERE, "train.py"), evaluate.__file__
# the columns of the table are the metrics that begin so
COLUMNS = "accuracy", "logps", "choices", "text", "kl", "answers"
# settings that train.py may record with another value than it was given
RECORDED = ("out_dir", "overwrite", "resume", "dtype")
# settings that a grid may not vary
NO_AXES = ("out_dir", "overwrite", "resume", "dry_run", "debug")


def plan(configs, grids, more):
    """-> {name: (arguments of train.py, all its settings)}. Runs of equal settings are one run."""
    runs = {}
    for grid in grids or [[]]:
        axes = [[(key, value) for value in values.split(",")]
                for key, _, values in (axis.partition("=") for axis in grid)]
        keys = [axis[0][0] for axis in axes]
        require(len({*keys}) == len(keys) and not {*keys} & {*NO_AXES},
                f"--grid: a key twice, or one of {', '.join(NO_AXES)}, in {' '.join(grid)}")
        for point in itertools.product(*axes):
            files = [*configs, *(value for key, value in point if key == "config")]
            name = "_".join(Path(value).stem if key == "config" else f"{key}={value}"
                            for key, value in point) or Path(configs[-1]).stem
            name = name.replace("/", "-")   # it will be a folder's
            arguments = [*files, *more, *(f"--{key}={value}" for key, value in point
                                          if key != "config")]
            settings, _ = configure({}, arguments, TRAIN, {"objective": mmpo.OBJECTIVES})
            require(not settings["dry_run"], "--dry_run: of one run, with train.py")
            settings["out_dir"] = ""
            if settings not in (known for _, known in runs.values()):
                require(name not in runs, f"--grid: two runs would be called {name}; rename a file")
                runs[name] = arguments, settings
    return runs


def check_folder(folder, settings):
    """-> whether the run in this folder is finished. Raises UserError if it is another run's."""
    found = read_run_settings(folder)
    for key, value in settings.items():
        other = found.get(key, DEFAULTS[key]) if found else value   # it may be older than a setting
        require(key in RECORDED or other == value or key in PATHS and same_files(other, value),
                f"{folder}: a run with {key}={other!r}, not {value!r}; give another --out")
    return found.get("finished", False)


def same_files(one, other):
    """Whether two lists of paths name the same files, from here or from beside the checkout."""
    one, other = ([os.path.realpath(os.path.expanduser(path)) for path in
                   all_beside_the_checkout(paths).split(",")] for paths in (one, other))
    return one == other


def run(folder, arguments, settings, evaluation, devices, references, first_evaluation):
    """Train and evaluate one run -> the seconds it took, 0 if it was there before. (train.py leaves
    a finished run as it is, once it knows that its data and base are still the same.) While a
    training or an evaluation computes what all need of the reference, the two locks keep the others
    waiting, which then find it in the cache."""
    device = devices.get()
    started, metrics = time.time(), os.path.join(folder, "metrics.jsonl")
    try:
        with open(f"{folder}.log", "a", encoding="utf-8") as log:
            start = partial(subprocess.Popen, stdout=log, stderr=log, env=os.environ | device)
            finished = check_folder(folder, settings)
            # until the first evaluation, which comes after those log-probs
            with contextlib.nullcontext() if finished else references:
                training = start([sys.executable, TRAIN, *arguments, f"--out_dir={folder}",
                                  "--resume=True"])
                while training.poll() is None and not (
                        os.path.exists(metrics) and os.path.getmtime(metrics) > started
                        and os.path.getsize(metrics)):
                    time.sleep(1)
            require(training.wait() == 0, f"{folder}: failed ({last_line(log.name)})")
            result, asked = f"{folder}.evaluation.json", [folder, *shlex.split(evaluation)]
            evaluated = is_evaluated(result, folder, asked)
            if not evaluated:
                with first_evaluation:   # the others wait for it, then find the reference's
                    process = start([sys.executable, EVALUATE, *asked])
                    if not any(Path(folder).parent.glob("*.evaluation.json")):
                        process.wait()
                require(process.wait() == 0, f"{folder}: not evaluated ({last_line(log.name)})")
        return 0 if finished and evaluated else time.time() - started
    finally:
        devices.put(device)


def is_evaluated(result, folder, asked):
    """Whether the file `result` is of the run that is in the folder now, and of these arguments."""
    found = read_json(result) if os.path.exists(result) else {}
    told, settings = vars(evaluate.arguments(asked)), found.get("settings") or {}
    same = told | {"models": None} == settings | {"models": None}   # a folder has several spellings
    return same and found.get("run") == run_sum(folder) and all(
        os.path.exists(file) and sha256(file) == known
        for file, known in found.get("files", {}).items())


def last_line(log):
    lines = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{log}: {lines[-1] if lines else 'empty'}"


def run_all(runs, out, evaluation, jobs):
    """Run what isn't done, `jobs` at a time, with a line for each that ends -> {the name of a run
    that failed: the error}."""
    for name, (_, settings) in runs.items():
        check_folder(os.path.join(out, name), settings)   # before any of them starts
    os.makedirs(out, exist_ok=True)
    devices, locks = Queue(), (Lock(), Lock())
    n_gpus = torch.cuda.device_count()   # of those that a person has left visible
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    for job in range(jobs):
        devices.put({"CUDA_VISIBLE_DEVICES": gpus.split(",")[job % n_gpus]} if n_gpus else {})
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    failed, seconds = {}, []   # seconds: of the runs that were not done when this began
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(run, os.path.join(out, name), *r, evaluation, devices, *locks):
                   name for name, r in runs.items()}
        for done, future in enumerate(as_completed(futures), 1):
            error, line = future.exception(), f"{done} of {len(runs)} runs done"
            if error:
                failed[futures[future]] = str(error)
            elif future.result() > 0:
                seconds.append(future.result())
            if seconds:
                left = (len(runs) - done) * np.mean(seconds) / jobs
                line += f", about {left / 60:.0f} min left"
            print(f"{line}: {futures[future]}" + f" FAILED: {error}" * bool(error), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)   # after Ctrl-C no other run starts
    return failed


def table(runs, out, beside):
    """A row for each run, over its seeds: the mean of each metric, ± half of its 95% interval, and
    the seeds' range; in the last column how much its implicit reward accuracy is above that
    of `beside`."""
    groups, metrics = {}, {}   # groups: name without its seed: the evaluations
    for name in runs:
        found = read_json(os.path.join(out, f"{name}.evaluation.json"))
        groups.setdefault(without_seed(name), []).append(found)
        metrics |= found["metrics"]   # one run may lack what another has
    columns = [metric for metric in metrics if metric.startswith(COLUMNS)]
    rows = [["run", *columns, f"accuracy/implicit less that of {beside}"],
            ["---"] * (len(columns) + 2),
            [f"before ({beside})", *(cell([(e["before"] or {}).get(metric) for e in groups[beside]])
                                   for metric in columns), ""]]
    for name, found in groups.items():
        rows.append([name, *(cell([e["metrics"].get(metric) for e in found]) for metric in columns),
                     difference(found, groups[beside]) if name != beside else ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def check_data(runs, out):
    """UserError where runs with the same settings of data and base trained on different ones, or
    where runs were evaluated on different files of one name. A note where they are of other code
    than today's."""
    groups, files, known, older = {}, {}, read_settings(TRAIN), []
    for name, (_, settings) in runs.items():
        told = {key: value for key, value in settings.items()
                if key in ("seed", "init_from") or known[key].group == "data"}
        recorded = read_json(os.path.join(out, name, "train_config.json"))
        older += [name] * (recorded.get("code_sha256") != code_sum())
        sums = [recorded.get(f"{key}_sha256") for key in ("dataset", "eval_dataset", "init_from")]
        other, same = groups.setdefault(str(told), (name, sums))
        require(sums == same, f"{out}: {name} and {other} trained on other data or another base, "
                "of the same name; delete the older one, or give another --out")
        for path, content in read_json(os.path.join(out, f"{name}.evaluation.json")).get(
                "files", {}).items():   # runs of old lack these
            require(files.setdefault(path, content) == content, f"{out}: {name} and others were "
                    f"evaluated on another {path}; delete the older .evaluation.json files")
    if older:
        print(f"note: {', '.join(older):.150}: train.py, model.py, mmpo.py or data.py were others "
              "then; to train these again, delete their folders")


def without_seed(name):
    return re.sub("_?seed=[^_]*", "", name).strip("_") or "run"


def cell(values):
    """[[value, low, high], ..] of the seeds -> the text of a cell, "" where one has no value."""
    if None in values:
        return ""
    mean, low, high = np.mean(values, axis=0)
    text = f"{mean:.3g}" + (f" ± {(high - low) / 2:.2g}" if high > low else "")
    seeds = np.sort([value for value, *_ in values])   # NaN last
    return text + (f" (seeds {seeds[0]:.3g} to {seeds[-1]:.3g})" if seeds[0] < seeds[-1] else "")


def difference(group, base):
    """How much the implicit reward accuracy of a group of runs is above that of the group `base`,
    with its 95% interval. "" where the evaluations had no pairs, and a word where they had
    different ones. The order of the pairs may differ, since a run's seed draws it."""
    if not all(e.get("pairs") and "implicit" in e["margins"] for e in [*base, *group]):
        return ""
    found = []   # of each evaluation, its pairs in one order: what they are, their prompts, margins
    for e in [*base, *group]:
        order = np.argsort(e["pairs"])
        found.append([np.array(x)[order] for x in (e["pairs"], e["prompts"],
                                                   e["margins"]["implicit"])])
    pairs, prompts, margins = zip(*found)
    if not all(np.array_equal(some, pairs[0]) for some in pairs):
        return "other pairs"
    gained = mmpo.wins(np.array(margins))
    a, b = gained[:len(base)].mean(0), gained[len(base):].mean(0)
    value, low, high = evaluate.ratio(b - a, groups=prompts[0], unseen=[[1, -1], [1, 1]])
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="config files of every run")
    parser.add_argument("--grid", nargs="+", action="append", metavar="KEY=VALUE,..")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core or GPU each")
    parser.add_argument("--out", default="out/compare", type=os.path.expanduser,
                        help="a folder for all runs")
    parser.add_argument("--evaluate", default="", help="arguments of scripts/evaluate.py, quoted")
    parser.add_argument("--beside", help="the run (without its seed) that others are tested\n"
                                         "against; default: the first")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args, more = parser.parse_args(given[:end]), given[end + 1:]
    require(args.jobs > 0, "--jobs: at least 1")

    with reading("--evaluate", "arguments of scripts/evaluate.py"):
        evaluate.arguments([args.out, *shlex.split(args.evaluate)])
    runs = plan(args.configs, args.grid, more)
    labels = [*map(without_seed, runs)]
    beside = args.beside or labels[0]
    require(beside in labels, f"--beside: one of {', '.join(dict.fromkeys(labels))}")
    print(f"{len(runs)} runs in {args.out}, {args.jobs} at a time")
    failed = run_all(runs, args.out, args.evaluate, args.jobs)
    runs = {name: planned for name, planned in runs.items() if name not in failed}
    errors = "; ".join(failed.values())
    require(runs, errors)
    if beside not in map(without_seed, runs):
        beside = without_seed(next(iter(runs)))
    check_data(runs, args.out)
    print("\n" + table(runs, args.out, beside))
    folders = [os.path.join(args.out, name) for name in runs]
    for draw, name in ((plot.plot, "curves"), (plot.tradeoff, "tradeoff"), (plot.by_beta, "beta")):
        try:
            print(draw(folders, os.path.join(args.out, f"{name}.png")))
        except UserError as e:
            print(f"no {name}.png: {e}")
    require(not failed, errors)


if __name__ == "__main__":
    one_line_errors()
    main()
