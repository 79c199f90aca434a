"""
Kill runs at random, let them go on, and compare their end with that of a run that nobody killed.

$ python -m scripts.soak --kills 60               # one process
$ python -m scripts.soak --kills 60 --ranks 2     # one of two ranks is killed, or torchrun itself

The run is a short one of config/demo.py that saves every other step. Half of the kills are aimed at
a save or at the export, the others come at any moment. Most are SIGKILL, some SIGTERM, which leaves
the run time to save. A run is killed four times at most, then it ends undisturbed, and its files,
weights and metrics must be those of the undisturbed run, bit for bit. The folder of one where they
are not stays, with the log that says when it was killed.
"""
import argparse
import contextlib
import glob
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/soak.py`
from configurator import (
    HERE, check_numbers, one_line_errors, read_metrics, require, sha256)

SETTINGS = ["config/demo.py", "--max_iters=12", "--save_interval=2", "--eval_interval=5",
            "--batch_size=16", "--kl_samples=4", "--kl_tokens=8", "--sample_tokens=8",
            "--lora_rank=8", "--lora_dropout=0.1", "--export_dtype=float32", "--device=cpu",
            "--resume"]
TIMES = "seconds_left", "tokens_per_second", "tflops", "mfu"   # in metrics.jsonl: they differ
PATIENCE = 600   # seconds that a process may take, alone or after a kill


def start(out, ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with open(f"{out}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, *launcher * (ranks > 1), "train.py", *SETTINGS,
                                 f"--out_dir={out}"], cwd=HERE, stdout=log, stderr=log)


def end_of(out):
    """What must be equal: the files, the weights' sha256, and all metrics but the times."""
    weights, metrics = f"{out}/model.safetensors", f"{out}/metrics.jsonl"
    records = read_metrics(metrics) if os.path.exists(metrics) else []
    return {"files": sorted(os.listdir(out)),
            "weights": sha256(weights) if os.path.exists(weights) else None,
            "metrics": [{key: value for key, value in record.items() if key not in TIMES}
                        for record in records]}


def ranks_of(pid):
    """The processes that torchrun has started."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as f:
        return [int(child) for child in f.read().split()]


def under_way(out):
    """What a run is doing, as its folder shows it."""
    if glob.glob(f"{out}/export.tmp") or glob.glob(f"{out}/model.safetensors"):
        return "export or after it"
    if glob.glob(f"{out}/checkpoint-*.tmp"):
        return "save"
    return "steps" if glob.glob(f"{out}/metrics.jsonl") else "start"


def kill_one(out, ranks, seconds, counts):
    """Start the run, kill it once, and wait until all of it is gone -> how long that took."""
    process, aim = start(out, ranks), random.choice(["save", "export or after it", "any", "any"])
    moment = time.time() + random.uniform(0, seconds)
    while process.poll() is None and (time.time() < moment if aim == "any"
                                      else under_way(out) != aim):
        time.sleep(0.01 if aim == "any" else 0.0005)
    time.sleep(random.choice([0, random.uniform(0, 0.02)]))
    if process.poll() is not None:
        return 0   # it was faster
    number, place = random.choice([signal.SIGKILL] * 3 + [signal.SIGTERM]), under_way(out)
    victims = ranks_of(process.pid) if ranks > 1 else []
    pid = random.choice([process.pid, *victims])
    with contextlib.suppress(ProcessLookupError):   # it has just ended
        os.kill(pid, number)
    kill = f"{signal.Signals(number).name} in {place}"
    with open(f"{out}.log", "a", encoding="utf-8") as log:
        log.write(f"--- {kill}\n")
    counts[kill] += 1
    killed = time.time()
    for victim in [process.pid, *victims]:   # the others must end by themselves
        while victim == process.pid and process.poll() is None or os.path.exists(f"/proc/{victim}"):
            require(time.time() < killed + PATIENCE, f"{out}: process {victim} still runs")
            time.sleep(0.01)
    return time.time() - killed


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_numbers(args, kills=1, ranks=1, seed=0)
    random.seed(args.seed)
    counts, runs, lost, slowest = Counter(), 0, 0, 0
    folder = tempfile.mkdtemp(prefix="soak-")
    os.environ |= {"NANOMMPO_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
    whole = f"{folder}/whole"
    for _ in range(2):   # the second one, with the cache, takes as long as those to come
        shutil.rmtree(whole, ignore_errors=True)
        began = time.time()
        require(start(whole, args.ranks).wait(PATIENCE) == 0, f"the undisturbed run fails, see "
                f"{whole}.log")
    seconds, right = time.time() - began, end_of(whole)
    while sum(counts.values()) < args.kills:
        runs += 1
        out = f"{folder}/{runs}"
        for _ in range(4):
            slowest = max(slowest, kill_one(out, args.ranks, seconds, counts))
        code, end = start(out, args.ranks).wait(PATIENCE), end_of(out)
        wrong = [key for key in right if end[key] != right[key]] + ["exit code"] * (code != 0)
        if wrong:
            lost += 1
            print(f"{out}: LOST: another {', '.join(wrong)} ({code}); see {out}.log", flush=True)
        else:
            shutil.rmtree(out)
        print(f"{runs} runs, {args.ranks} process(es) each: {lost} lost or different; "
              f"{sum(counts.values())} kills, all gone {slowest:.1f} s after, or sooner: "
              + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())), flush=True)
    if lost:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    one_line_errors()
    main()
