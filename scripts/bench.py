"""
This trainer beside TRL's DPOTrainer: same model, pairs, batches and mathematics, in turn, in one run.

$ python -m scripts.bench --data=pairs.jsonl                  # the three parts, minutes on a CPU
$ python -m scripts.bench --data=pairs.jsonl --only=trl --pairs=32 --json=bench.json
$ python -m scripts.bench --only=ablation                     # needs no TRL

trl       TRL with its defaults, TRL at its best, this trainer
ablation  one idea of this trainer at a time, on its own model code
scaling   cost of a token by length, fill of packed rows, tokenizing, packing, two processes

DPO with beta 0.1, all weights, fp32 weights under bf16 autocast, fused AdamW, constant learning rate,
gradient clipped at norm 1, the reference pass timed apart. TRL gets this trainer's token ids. Every
run is a process of its own, so that its peak memory is its own, and all have the same malloc settings.
On a CPU: one thread and process CPU time, so that busy neighbours matter little. On a GPU: wall time.
"""
import argparse
import ast
import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch.nn import functional as F

import data
import mmpo
import model as llama
from configurator import one_line_errors

BETA, LEARNING_RATE = 0.1, 1e-5
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# freed memory stays in the process: a fresh page costs more than the sum done on it. glibc reads these
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2 ** 30), "MALLOC_TRIM_THRESHOLD_": str(2 ** 36)}
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
         "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
TRL = {"trl": "TRL, defaults", "trl best": "TRL, its best"}
PACKED = "+ packed rows, attention by tree"
COMPILED = "+ compiled"
OURS = COMPILED if CUDA else PACKED                     # what train.py does
ABLATION = ["padded pairs, all logits", "+ score response tokens only", "+ share the prompt",
            "+ packed rows, dense mask", PACKED, COMPILED]
LIVE = "the same with a live reference"


# -----------------------------------------------------------------------------
# measuring


def fresh(function, *args):
    """function(*args), run in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(in_child, function, *args).result()


def in_child(function, *args):
    torch.manual_seed(0)
    if CUDA:
        torch.set_float32_matmul_precision("high")      # as train.py does, for both sides
    else:
        torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):     # TRL prints its logs
        return function(*args)


def clock():
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_gb():
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16)


def batches(args):
    """The first batch is visited twice: once to warm up, once to see whether all learnt the same."""
    order = [np.arange(i, i + args.batch) for i in range(0, args.pairs, args.batch)]
    return [order[0], *order]


# -----------------------------------------------------------------------------
# TRL


def run_trl(name, args, pairs):
    """TRL's DPOTrainer over `pairs` -> what `run_ours` returns."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    best, seen, marks, losses = name == "trl best", {}, [], []
    if best and not CUDA:   # scores only completion tokens, which TRL does on GPUs alone
        utils._use_triton = lambda device: True

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):        # our token ids instead of its own
            return dataset

        def _get_train_sampler(self, *_):               # our batches in our order
            return np.concatenate(batches(args)).tolist()

        def _precompute_ref_logps(self, *a):
            start = clock()
            dataset = super()._precompute_ref_logps(*a)
            seen["reference"] = (clock() - start) / args.pairs
            return dataset

        def compute_loss(self, *a, **kw):
            loss = super().compute_loss(*a, **kw)
            losses.append(loss.detach())
            if "logps" not in seen:
                seen["logps"] = [self._metrics["train"][f"logps/{k}"][0]
                                 for k in ("chosen", "rejected")]
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(clock())

        def on_train_end(self, *_, **__):
            marks.append(clock())

    ids = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (x.tolist() for x in pairs.ids(i))))
           for i in range(len(pairs))]
    flash = best and CUDA and importlib.util.find_spec("flash_attn")
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, beta=BETA, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            per_device_train_batch_size=args.batch, num_train_epochs=1, max_length=None,
            gradient_checkpointing=not best, precompute_ref_log_probs=best, bf16=True,
            use_liger_kernel=bool(best and CUDA and importlib.util.find_spec("liger_kernel")),
            model_init_kwargs={"attn_implementation": "flash_attention_2" if flash else "sdpa"},
            use_cpu=not CUDA, dataloader_pin_memory=CUDA, save_strategy="no", report_to="none",
            disable_tqdm=True)
        trainer = Trainer(args.model, args=config, train_dataset=Dataset.from_list(ids),
                          processing_class=AutoTokenizer.from_pretrained(args.model),
                          callbacks=[Clock()])
        trainer.train()
    return seen | {"seconds": (marks[-1] - marks[1]) / args.pairs, "peak": peak_gb(),
                   "losses": [loss.item() for loss in losses]}


# -----------------------------------------------------------------------------
# this trainer, and its ideas one by one


def stack(rows, dense):
    """Rows of the stage -> tokens, positions (B, T), mask (B, 1, T, T) or None, and as in data.Row:
    predict_from, targets, response, for the rows laid end to end."""
    T = max(len(row.tree) for row in rows)

    def pad(x, value=0):
        return F.pad(x, (0, T - x.size(-1)), value=value)

    tokens = torch.cat([pad(row.tokens) for row in rows])
    positions = torch.cat([pad(row.positions) for row in rows])
    mask = None
    if dense:
        i = torch.arange(T, device=DEVICE)
        rules = [llama.tree_rule(pad(row.tree, -1), pad(row.branch)) for row in rows]
        mask = torch.stack([rule(None, None, i[:, None], i) for rule in rules])[:, None]
    predict_from = torch.cat([row.predict_from + n * T for n, row in enumerate(rows)])
    first = np.cumsum([0] + [row.n_responses for row in rows])
    response = torch.cat([row.response + int(n) for n, row in zip(first, rows)])
    return tokens, positions, mask, predict_from, torch.cat([r.targets for r in rows]), response


def summed_logps(stage, model, pairs, batch):
    """For each micro-batch of `batch`: which of its pairs, and their log-probs (m, 2)."""
    everyone = np.arange(len(batch))
    lengths = pairs.lengths[batch].sum(1)
    if stage in (PACKED, COMPILED, LIVE):
        for members in data.pack(lengths, ROW_TOKENS)[0]:
            row = data.collate(pairs, batch[members], SHAPES).to(DEVICE)
            with autocast():
                per_token = model(row)
            yield members, mmpo.sum_by_response(per_token, row.response, row.n_responses).view(-1, 2)
        return
    if stage in ABLATION[:2]:    # each response with a prompt of its own
        single = data.Pairs.from_rows([[prompt, r] for i in batch
                                       for prompt, *responses in [pairs.ids(i)] for r in responses])
        micro_batches = [(everyone, [data.collate(single, [i]) for i in range(len(single))])]
    elif stage == ABLATION[2]:   # a tree is a row
        micro_batches = [(everyone, [data.collate(pairs, [i]) for i in batch])]
    else:
        micro_batches = [(members, [data.collate(pairs, batch[members])])
                         for members in data.pack(lengths, ROW_TOKENS)[0]]
    for members, rows in micro_batches:
        tokens, positions, mask, predict_from, targets, response = stack(
            [row.to(DEVICE) for row in rows], dense=stage not in ABLATION[:2])
        with autocast():
            x = model.hidden(tokens, positions, mask).flatten(0, 1)
            if stage == ABLATION[0]:
                logits = F.linear(x, model.head_weight).float()
                per_token = logits[predict_from, targets] - logits.logsumexp(-1)[predict_from]
            else:
                per_token, _ = llama.TokenLogProbs.apply(
                    x[predict_from], model.head_weight, targets, False)
        yield members, mmpo.sum_by_response(per_token, response, 2 * len(members)).view(-1, 2)


def train_step(stage, model, optimizer, pairs, batch, ref_logps):
    """One step as train.py makes it -> its loss, the batch's log-probs (B, 2)."""
    logps, total_loss = torch.zeros(len(batch), 2, device=DEVICE), 0.0
    for members, micro_logps in summed_logps(stage, model, pairs, batch):
        loss = mmpo.dpo_loss(*micro_logps.T, *ref_logps[members].T, BETA).sum() / len(batch)
        loss.backward()
        total_loss += loss.detach()
        logps[members] = micro_logps.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total_loss.item(), logps


def load(args):
    model, _ = llama.from_pretrained(args.model, DEVICE)
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)


def run_ours(stage, args, pairs):
    """-> seconds a pair, reference seconds a pair, peak GB, losses, first batch's mean log-probs."""
    model, optimizer = load(args)
    if stage == COMPILED:
        model.compile_blocks()
    live = copy.deepcopy(model) if stage == LIVE else None

    @torch.no_grad()
    def score(model, batch):
        logps = torch.zeros(len(batch), 2, device=DEVICE)
        for members, micro_logps in summed_logps(stage, model, pairs, batch):
            logps[members] = micro_logps
        return logps

    start = clock()
    ref_logps = torch.cat([score(model, batch) for batch in batches(args)[1:]])
    ref_seconds = (clock() - start) / args.pairs
    marks, losses, logps = [], [], []
    for batch in batches(args):
        marks.append(clock())
        batch_ref = score(live, batch) if live else ref_logps[batch]
        loss, batch_logps = train_step(stage, model, optimizer, pairs, batch, batch_ref)
        losses.append(loss)
        logps.append(batch_logps)
    seconds = (clock() - marks[1]) / args.pairs
    return {"seconds": seconds, "reference": ref_seconds, "peak": peak_gb(), "losses": losses,
            "logps": logps[0].mean(0).tolist()}


# -----------------------------------------------------------------------------
# scaling


def run_lengths(args):
    """Seconds a token for trees of 128 to 2,048 tokens: half prompt, two responses."""
    model, optimizer = load(args)
    if OURS == COMPILED:
        model.compile_blocks()
    random = np.random.default_rng(0)
    tokens = ROW_TOKENS if CUDA else 2048
    cost = {n: [] for n in (128, 256, 512, 1024, 2048)}
    for repeat in range(args.repeats + 1):               # the first warms up
        for n in cost:
            ids = random.integers(0, model.config.vocab_size, (tokens // n, n))
            pairs = data.Pairs.from_rows([np.split(row, [n // 2, n * 3 // 4]) for row in ids])
            ref_logps = torch.zeros(len(pairs), 2, device=DEVICE)
            start = clock()
            train_step(OURS, model, optimizer, pairs, np.arange(len(pairs)), ref_logps)
            if repeat:
                cost[n].append((clock() - start) / tokens)
    return {n: min(seconds) for n, seconds in cost.items()}


def run_loader(args):
    """Fill of packed rows, seconds a token to pack and collate, seconds a pair to tokenize."""
    tokenizer = data.Tokenizer(args.model)
    start = time.process_time()
    pairs = data.tokenize([args.data], "", tokenizer, args.max_length, args.max_length, "drop")
    tokenizing = (time.process_time() - start) / len(pairs)
    batch_size = min(TRAIN["batch_size"], len(pairs))
    shapes, real, room = (ROW_TOKENS // 4, ROW_TOKENS), 0, 0
    start = time.process_time()
    for iter_num in range(min(20, len(pairs) // batch_size)):
        batch = data.batch_indices(len(pairs), batch_size, 0, iter_num)
        for members in data.pack(pairs.lengths[batch].sum(1), ROW_TOKENS)[0]:
            row = data.collate(pairs, batch[members], shapes)
            real += pairs.lengths[batch[members]].sum()
            room += row.tokens.numel()
    return {"tokenize": tokenizing, "loader": (time.process_time() - start) / real,
            "fill": real / room}


def run_ranks(args, ranks):
    """Wall-clock tokens/s of train.py itself on `ranks` processes, one core or GPU each."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *(launch if ranks > 1 else []), "train.py",
                   f"--out_dir={out}", f"--init_from={args.model}", f"--dataset={args.data}",
                   "--objective=dpo", "--max_iters=4", f"--batch_size={4 * args.batch}",
                   f"--max_length={args.max_length}", f"--max_prompt_length={args.max_length // 2}",
                   "--eval_pairs=1", "--kl_samples=0", "--sample_tokens=1", "--bad_rows=drop"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
        lines = [json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))]
    return statistics.median([m["tokens_per_second"] for m in lines if "lr" in m][1:])


# -----------------------------------------------------------------------------
# tables


def measure(names, args, pairs):
    """Every name once, and again, `repeats` times -> {name: [result, ..]}."""
    results = {name: [] for name in names}
    for repeat in range(args.repeats):
        for name in names:
            run = run_trl if name in TRL else run_ours
            try:
                results[name].append(fresh(run, name, args, pairs))
            except torch._inductor.exc.InductorError as e:   # no compiler on this machine
                print(f"{name}: {str(e).splitlines()[0]}")
                continue
            r = results[name][-1]
            print(f"{repeat + 1}/{args.repeats} {name}: {r['seconds']:.3f} s/pair, "
                  f"{r['peak']:.1f} GB", flush=True)
    return {name: runs for name, runs in results.items() if runs}


def spread(values, form):
    low, high = form.format(min(values)), form.format(max(values))
    middle = form.format(statistics.median(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(results, base, pairs):
    """Markdown rows; speeds are ratios within one round, so that a slow minute hits both sides."""
    tokens = pairs.lengths.sum() / len(pairs)
    form = "{:.2f}" if results[base][0]["seconds"] > 0.1 else "{:.5f}"
    lines = ["| | s/pair | tokens/s | speed | peak memory, GB | reference pass, s/pair |",
             "|---|---|---|---|---|---|"]
    for name, runs in results.items():
        seconds = [r["seconds"] for r in runs]
        speed = [b["seconds"] / r["seconds"] for b, r in zip(results[base], runs)]
        reference = [r["reference"] for r in runs if "reference" in r]
        reference = "live" if name in ("trl", LIVE) else spread(reference, form)
        lines.append(f"| {TRL.get(name, name)} | {spread(seconds, form)} | "
                     f"{tokens / statistics.median(seconds):,.0f} | {spread(speed, '{:.2f}x')} | "
                     f"{max(r['peak'] for r in runs):.1f} | {reference} |")
    return lines


def same_mathematics(results):
    """Log-probs of the first batch, its loss before and after a step: equal but for bf16 noise."""
    lines, first = [], None
    for name, runs in results.items():
        r = runs[0]
        numbers = [*r["logps"], *r["losses"][:2]]
        first = first or numbers
        lines.append(f"{TRL.get(name, name)}: log-probs {numbers[0]:.2f} chosen, {numbers[1]:.2f} "
                     f"rejected; loss {numbers[2]:.4f}, after one step on it {numbers[3]:.4f}")
        for a, b in zip(numbers, first):
            if abs(a - b) > 0.01 * abs(b) + 0.02:
                raise ValueError("not the same mathematics:\n" + "\n".join(lines))
    return lines


def scaling(args):
    cost = fresh(run_lengths, args)
    loader = fresh(run_loader, args)
    low, high = min(cost.values()), max(cost.values())
    cores = torch.cuda.device_count() if CUDA else os.cpu_count()
    gain = run_ranks(args, 2) / run_ranks(args, 1) if cores > 1 else None
    lines = ["| | measured | goal |", "|---|---|---|",
             f"| ms a token, pairs of {', '.join(map(str, cost))} tokens | " +
             ", ".join(f"{1000 * s:.3g}" for s in cost.values()) +
             f" (+{high / low - 1:.0%}) | within 10% |",
             f"| fill of rows of {ROW_TOKENS:,} tokens | {loader['fill']:.1%} | at least 95% |",
             f"| tokenizing 60k pairs, one core | {60_000 * loader['tokenize']:.0f} s | under 60 s |",
             f"| packing, share of a step | {loader['loader'] / cost[256]:.2%} | under 2% |"]
    if gain:
        lines.append(f"| two processes against one, wall time | {gain:.2f}x | at least 1.8x |")
    return lines, {"cost": cost, **loader, "two_processes": gain}


def hardware():
    name = torch.cuda.get_device_name() if CUDA else platform.processor()
    if not CUDA and os.path.exists("/proc/cpuinfo"):
        fields = dict(line.split(":", 1) for line in open("/proc/cpuinfo") if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get("model name", name) + (", AMX" if "amx_bf16" in str(fields) else "")
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "trl")
                if importlib.util.find_spec(p)]
    clock_kind = "wall time" if CUDA else "one thread, process CPU time"
    return f"{name}; {', '.join(versions)}; bf16 autocast; {clock_kind}"


def train_defaults():
    """The defaults block of train.py."""
    tree = ast.parse(open("train.py", encoding="utf-8").read())
    return {node.targets[0].id: node.value.value for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}


TRAIN = train_defaults()
ROW_TOKENS = TRAIN["row_tokens"]
SHAPES = (ROW_TOKENS // 4, ROW_TOKENS) if CUDA else ()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    cache = os.path.dirname(data.cache_path("", ""))
    smollm2 = os.path.join(cache, "SmolLM2-135M-Instruct")
    parser.add_argument("--model", default=smollm2 if os.path.isdir(smollm2) else "assets/demo",
                        help="folder or hub id; without it a cached SmolLM2, or assets/demo")
    parser.add_argument("--data", default="assets/demo/train.jsonl", help="pairs, as train.py reads")
    parser.add_argument("--pairs", type=int, default=512 if CUDA else 8)
    parser.add_argument("--batch", type=int, default=32 if CUDA else 4, help="pairs a step")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3 if CUDA else 2)
    parser.add_argument("--only", choices=["trl", "ablation", "scaling"])
    parser.add_argument("--json", metavar="FILE", help="every number, for a program")
    args = parser.parse_args()
    parts = [args.only] if args.only else ["trl", "ablation", "scaling"]
    if "trl" in parts and not importlib.util.find_spec("trl"):
        sys.exit("error: pip install trl (or --only=ablation, which needs none)")
    os.environ |= MALLOC | QUIET
    args.model = llama.checkpoint_folder(args.model)
    pairs = data.load_pairs(args.data, "train", data.Tokenizer(args.model), args.max_length,
                            args.max_length // 2)
    args.pairs = min(args.pairs, len(pairs)) // args.batch * args.batch
    if not args.pairs:
        sys.exit(f"error: {args.data}: {len(pairs)} pairs, --batch={args.batch}")
    pairs = pairs.subset(np.arange(args.pairs))

    prompt, chosen, rejected = pairs.lengths.mean(0)
    about = (f"{os.path.basename(args.model)}, {args.pairs} pairs of {os.path.basename(args.data)} "
             f"({prompt:.0f} prompt + {chosen:.0f} chosen + {rejected:.0f} rejected tokens), batches "
             f"of {args.batch}, {args.repeats} rounds: median (min to max)\n{hardware()}")
    print(about, flush=True)
    record, lines = {"about": about, "arguments": vars(args)}, []
    if "trl" in parts:
        record["trl"] = results = measure([*TRL, OURS], args, pairs)
        results["this trainer"] = results.pop(OURS)
        print("\n".join(same_mathematics(results)))
        lines += ["", *table(results, "trl", pairs)]
    if "ablation" in parts:
        record["ablation"] = results = measure([*ABLATION, LIVE], args, pairs)
        print("\n".join(same_mathematics(results)))
        lines += ["", *table(results, ABLATION[0], pairs)]
    if "scaling" in parts:
        rows, record["scaling"] = scaling(args)
        lines += ["", *rows]
    print(f"\n{about}\n" + "\n".join(lines))
    print(f"\n`python -m scripts.bench {' '.join(sys.argv[1:])}`")
    if args.json:
        llama.write_json(args.json, record)


if __name__ == "__main__":
    one_line_errors()
    main()
