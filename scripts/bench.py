"""
This trainer beside TRL's DPOTrainer: same model, pairs, batches and mathematics, in one run.

$ python -m scripts.bench --data=pairs.jsonl                  # the first three, minutes on a CPU
$ python -m scripts.bench --data=pairs.jsonl --only=trl --pairs=32 --json=bench.json
$ python -m scripts.bench --data=pairs.jsonl --only=ablation  # needs no TRL

trl       TRL with its defaults, TRL at its best, this trainer
ablation  one idea of this trainer at a time, on its own model code
profile   where the time of a step goes, and the floor: its operations at a matmul's rate
scaling   by --only=scaling: cost of a token by length, fill of packed rows, tokenizing, packing, two
          processes

DPO with beta 0.1, all weights, fp32 weights under bf16 autocast (fp32 where a CPU's bf16 is slow),
fused AdamW, constant learning rate, gradient clipped at norm 1; the reference pass is timed apart.
TRL is given our token ids.
Every run is a process of its own, so its peak memory is its own; all have the same malloc settings.
CPU: one thread, process CPU time, so that busy neighbours matter little. GPU: wall time.
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
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

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
BF16 = llama.fast_bfloat16(DEVICE)   # on both sides
ENVIRONMENT = {   # malloc: freed memory stays in the process, as fresh pages cost more than sums
    "MALLOC_MMAP_THRESHOLD_": str(2 ** 30), "MALLOC_TRIM_THRESHOLD_": str(2 ** 36),
    "TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
PARTS = "trl", "ablation", "profile", "scaling"
TRL, TRL_BEST, TRL_COMPILED = "TRL, defaults", "TRL, its best", "TRL, its best, compiled"
PADDED, SCORED, SHARED, DENSE, PACKED, LIVE, COMPILED = STAGES = (
    "padded pairs, all logits", "+ response tokens only meet the vocabulary", "+ shared prompt",
    "+ packed rows, dense mask", "+ attention by tree", "the same, reference not precomputed",
    "+ compiled")


def train_defaults():
    """The defaults block of train.py."""
    tree = ast.parse(open("train.py", encoding="utf-8").read())
    return {node.targets[0].id: node.value.value for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}


GPU_ROW, STEP_PAIRS = (train_defaults()[name] for name in ("row_tokens", "batch_size"))
GPU_SHAPES = GPU_ROW // 8, GPU_ROW // 4, GPU_ROW
ROW_TOKENS, SHAPES = (GPU_ROW, GPU_SHAPES) if CUDA else (4096, ())   # memory

# -----------------------------------------------------------------------------
# measuring


def fresh(function, *args):
    """function(*args), run in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(in_child, function, *args).result()


def in_child(function, *args):
    torch.manual_seed(0)
    if CUDA:
        torch.set_float32_matmul_precision("high")      # as train.py does, here for both sides
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


def steps(args):
    """-> the batches of a run, twice, and how many only warm up (a GPU compiles, memory grows)."""
    batches = [np.arange(i, i + args.batch) for i in range(0, args.pairs, args.batch)]
    return batches * 2, len(batches)


# -----------------------------------------------------------------------------
# TRL


def run_trl(name, args, pairs):
    """TRL's DPOTrainer over `pairs` -> what `run_ours` returns."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    best, seen, marks, losses = name != TRL, {}, [], []
    batches, n_warm = steps(args)
    if best and not CUDA:   # score completion tokens only, which TRL does on GPUs alone
        utils._use_triton = lambda device: True

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):        # our token ids
            return dataset

        def _get_train_sampler(self, *_):               # our batches, in our order
            return np.concatenate(batches).tolist()

        def _precompute_ref_logps(self, *a):
            start = clock()
            dataset = super()._precompute_ref_logps(*a)
            seen["reference"] = (clock() - start) / args.pairs
            return dataset

        def training_step(self, *a, **kw):
            marks.append(clock())
            return super().training_step(*a, **kw)

        def compute_loss(self, *a, **kw):
            losses.append(super().compute_loss(*a, **kw))
            logged = self._metrics["train"]
            seen.setdefault("logps", [logged[f"logps/{k}"][0] for k in ("chosen", "rejected")])
            return losses[-1]

    fields = "prompt_ids", "chosen_ids", "rejected_ids"
    rows = [{field: ids.tolist() for field, ids in zip(fields, pairs.ids(i))}
            for i in range(len(pairs))]
    flash = best and CUDA and importlib.util.find_spec("flash_attn")
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            folder, beta=BETA, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            per_device_train_batch_size=args.batch, num_train_epochs=1, max_length=None,
            gradient_checkpointing=not best, precompute_ref_log_probs=best, bf16=BF16,
            use_liger_kernel=bool(best and CUDA and importlib.util.find_spec("liger_kernel")),
            model_init_kwargs={"attn_implementation": "flash_attention_2" if flash else "sdpa"},
            torch_compile=name == TRL_COMPILED, use_cpu=not CUDA, dataloader_pin_memory=CUDA,
            logging_first_step=True, save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = Trainer(args.model, args=config, train_dataset=Dataset.from_list(rows),
                          processing_class=AutoTokenizer.from_pretrained(args.model))
        trainer.train()
    return seen | {"seconds": (clock() - marks[n_warm]) / args.pairs, "peak": peak_gb(),
                   "grad_norm": trainer.state.log_history[0]["grad_norm"],
                   "losses": [loss.item() for loss in losses]}


# -----------------------------------------------------------------------------
# this trainer, and its ideas one by one


def micro_batches(stage, pairs, batch):
    """-> (which of the batch's pairs, their rows) for each forward of a step."""
    if stage in (PADDED, SCORED):   # a response is a row, with a prompt of its own
        copies = [[prompt, r] for i in batch for prompt, *rs in [pairs.ids(i)] for r in rs]
        single = data.Pairs.from_rows(copies)
        return [(np.arange(len(batch)), [data.collate(single, [i]) for i in range(len(single))])]
    if stage == SHARED:             # a tree is a row
        return [(np.arange(len(batch)), [data.collate(pairs, [i]) for i in batch])]
    shapes = () if stage == DENSE else SHAPES
    return [(members, [data.collate(pairs, batch[members], shapes)])
            for members in data.pack(pairs.lengths[batch].sum(1), ROW_TOKENS, shapes=SHAPES)[0]]


def padded_logps(model, rows, masked, all_logits):
    """What `model(row)` returns, and `row.response`, for rows padded to the longest, end to end."""
    T = max(len(row.tree) for row in rows)

    def pad(x, value=0):
        return F.pad(x, (0, T - x.size(-1)), value=value)

    mask = None                     # causal: padding comes last, nothing sees it
    if masked:
        i = torch.arange(T, device=DEVICE)
        mask = torch.stack([llama.tree_rule(pad(row.tree, -1), pad(row.branch))(0, 0, i[:, None], i)
                            for row in rows])[:, None]
    x = model.hidden(torch.cat([pad(row.tokens) for row in rows]),
                     torch.cat([pad(row.positions) for row in rows]), mask).flatten(0, 1)
    index = torch.cat([row.predict_from + n * T for n, row in enumerate(rows)])
    targets = torch.cat([row.targets for row in rows])
    response = torch.cat([row.response + n * rows[0].n_responses for n, row in enumerate(rows)])
    if all_logits:
        logits = F.linear(x, model.head_weight).float()
        return logits[index, targets] - logits.logsumexp(-1)[index], response
    return llama.TokenLogProbs.apply(x[index], model.head_weight, targets, False)[0], response


def score(stage, model, pairs, batch):
    """-> (which of the batch's pairs, their summed log-probs (m, 2)) for each forward."""
    for members, rows in micro_batches(stage, pairs, batch):
        rows = [row.to(DEVICE) for row in rows]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16):
            if stage in (PACKED, COMPILED, LIVE):
                logps, response = model(rows[0]), rows[0].response
            else:
                logps, response = padded_logps(model, rows, masked=stage in (SHARED, DENSE),
                                               all_logits=stage == PADDED)
        yield members, mmpo.sum_by_response(logps, response, 2 * len(members)).view(-1, 2)


@torch.no_grad()
def score_all(stage, model, pairs, batch):
    logps = torch.zeros(len(batch), 2, device=DEVICE)
    for members, micro_logps in score(stage, model, pairs, batch):
        logps.index_copy_(0, data.to_device(torch.from_numpy(members), DEVICE), micro_logps)
    return logps


def train_step(stage, model, optimizer, pairs, batch, ref_logps):
    """A step as train.py makes it -> its loss, the gradient's norm, the log-probs (B, 2)."""
    logps, total_loss = torch.zeros(len(batch), 2, device=DEVICE), 0
    for members, micro_logps in score(stage, model, pairs, batch):
        index = data.to_device(torch.from_numpy(members), DEVICE)
        losses = mmpo.dpo_loss(*micro_logps.T, *ref_logps[index].T, BETA)
        loss = losses.sum() / len(batch)
        loss.backward()
        total_loss += loss.detach()
        logps.index_copy_(0, index, micro_logps.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total_loss.item(), norm, logps


def load(args, stage, config=None):
    model = (llama.Llama(config).to(DEVICE) if config else
             llama.from_pretrained(args.model, DEVICE)[0])
    if stage == COMPILED:
        model.compile_blocks(dynamic=not CUDA)           # a CPU's rows have any length
    return model, torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0, fused=True)


def run_ours(stage, args, pairs):
    """-> s/pair of a step, of the reference pass; peak GB; losses; of the first batch the mean
    log-probs and the gradient's norm."""
    model, optimizer = load(args, stage)
    batches, n_warm = steps(args)
    live = copy.deepcopy(model) if stage == LIVE else None
    for batch in batches[:n_warm]:
        score_all(stage, model, pairs, batch)
    start = clock()
    ref_logps = torch.cat([score_all(stage, model, pairs, batch) for batch in batches[n_warm:]])
    reference = (clock() - start) / args.pairs
    marks, done = [], []
    for batch in batches:
        marks.append(clock())
        batch_ref = score_all(stage, live, pairs, batch) if live else ref_logps[batch]
        done.append(train_step(stage, model, optimizer, pairs, batch, batch_ref))
    seconds, (losses, norms, logps) = (clock() - marks[n_warm]) / args.pairs, zip(*done)
    return {"seconds": seconds, "reference": reference, "peak": peak_gb(), "losses": losses,
            "grad_norm": norms[0].item(), "logps": logps[0].mean(0).tolist()}


# -----------------------------------------------------------------------------
# where the time of a step goes

KINDS = {"attention": "::bmm$|softmax|scaled_dot_product|flex_attention|flash|fmha",
         "matrix products": "::mm$|::addmm$|gemm|nvjet|cutlass",
         "AdamW and clipping": "adam|vector_norm|::mul_$|multi_tensor",
         "copies, casts, zeros":
             "::copy_$|::fill_$|::cat$|::empty|Memcpy|Memset|CatArray|triton_poi_fused__to_copy"}


def run_profile(args, pairs):
    """-> {kind of operation: its share of a step}, seconds a pair, model FLOPs a pair, FLOP/s."""
    stage = COMPILED if args.compile else PACKED
    model, optimizer = load(args, stage)
    batch = np.arange(args.batch)
    step = stage, model, optimizer, pairs, batch, score_all(stage, model, pairs, batch)
    for _ in range(3):
        train_step(*step)
    start = clock()
    for _ in range(3):
        train_step(*step)
    seconds = (clock() - start) / 3 / args.batch
    with torch.profiler.profile() as profile:
        train_step(*step)
    share = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in profile.key_averages():
        if CUDA and (event.device_type != torch.autograd.DeviceType.CUDA or
                     getattr(event, "is_user_annotation", False)):
            continue   # on a GPU: kernels alone, not also the operations that launched them
        kind = next((k for k, names in KINDS.items() if re.search(names, event.key)), None)
        share[kind or "everything else"] += (event.self_device_time_total if CUDA else
                                             event.self_cpu_time_total)
    total = sum(share.values())

    mlp = model.model.layers[0].mlp.gate_proj.weight.detach()
    mlp = mlp.to(torch.bfloat16 if BF16 else torch.float32)
    x = torch.randn(pairs.lengths[batch].sum(), mlp.size(1), device=DEVICE, dtype=mlp.dtype)
    rates = []
    for _ in range(20):
        start = clock()
        for _ in range(10):
            F.linear(x, mlp)
        rates.append(10 * 2 * len(x) * mlp.numel() / (clock() - start))
    flops = llama.step_flops(model, pairs.lengths[batch]) / args.batch
    return {"share": {kind: t / total for kind, t in share.items()}, "seconds": seconds,
            "flops": float(flops), "rate": statistics.median(rates)}


def profile(args, pairs):
    """-> the table, the numbers."""
    found = fresh(run_profile, args, pairs)
    floor = found["flops"] / found["rate"]
    lines = ["| where the time of a step goes | share |", "|---|---|",
             *(f"| {kind} | {share:.0%} |" for kind, share in found["share"].items()), "",
             f"A pair takes {found['seconds']:.3g} s. The floor is {floor:.3g} s, "
             f"{floor / found['seconds']:.0%} of that: {found['flops'] / 1e9:,.0f} GFLOP (each "
             "token once, nothing computed again) at "
             f"{found['rate'] / 1e9:,.0f} GFLOP/s, the rate of a product of the MLP's size."]
    return lines, found


# -----------------------------------------------------------------------------
# scaling

LENGTHS = 128, 256, 512, 1024, 2048
BLOCK_8B = llama.LlamaConfig(vocab_size=4096, n_layer=1, n_head=32, n_kv_head=8, n_embd=4096,
                             head_dim=128, intermediate_size=14336)   # one of Llama-3-8B's


def run_lengths(args, config=None):
    """-> seconds and model FLOPs a token for trees of LENGTHS tokens: half prompt, two responses.

    Of args.model, or of random weights of `config`.
    """
    stage = COMPILED if args.compile else PACKED
    model, optimizer = load(args, stage, config)
    random = np.random.default_rng(0)
    tokens = ROW_TOKENS if CUDA else 2048
    cost, flops = {n: [] for n in LENGTHS}, {}
    warm_up = LENGTHS if CUDA else (2048, 128)   # a GPU compiles, AdamW's state and memory appear
    for i, n in enumerate([*warm_up, *LENGTHS * (3 if CUDA else 1)]):
        ids = random.integers(0, model.config.vocab_size, (tokens // n, n))
        pairs = data.Pairs.from_rows([np.split(row, [n // 2, n * 3 // 4]) for row in ids])
        batch = np.arange(len(pairs))
        ref_logps = score_all(stage, model, pairs, batch)
        start = clock()
        train_step(stage, model, optimizer, pairs, batch, ref_logps)
        cost[n] += [(clock() - start) / tokens] * (i >= len(warm_up))
        flops[n] = float(llama.step_flops(model, pairs.lengths)) / tokens
    return {n: statistics.median(seconds) for n, seconds in cost.items()}, flops


def run_loader(args):
    """-> s/pair to tokenize, s/token to pack and collate, fill of rows of a GPU's shapes."""
    tokenizer = data.Tokenizer(args.model)
    start = time.process_time()
    pairs = data.tokenize([args.data], "train", tokenizer, args.max_length,
                          args.max_prompt_length, "drop")
    tokenizing = (time.process_time() - start) / len(pairs)
    real = room = 0
    start = time.process_time()
    for iter_num in range(min(20, len(pairs) // STEP_PAIRS)):
        batch = data.batch_indices(len(pairs), STEP_PAIRS, 0, iter_num)
        for members in data.pack(pairs.lengths[batch].sum(1), GPU_ROW, shapes=GPU_SHAPES)[0]:
            room += data.collate(pairs, batch[members], GPU_SHAPES).tokens.numel()
            real += pairs.lengths[batch[members]].sum()
    return {"tokenize": tokenizing, "loader": (time.process_time() - start) / real,
            "fill": real / room}


def run_ranks(args, ranks):
    """Wall-clock tokens/s of train.py on `ranks` processes, a core or GPU each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *(torchrun if ranks > 1 else []), "train.py",
                   f"--out_dir={out}", f"--init_from={args.model}", f"--dataset={args.data}",
                   "--objective=dpo", "--max_iters=2", f"--batch_size={8 * args.batch}",
                   f"--max_length={args.max_length}",
                   f"--max_prompt_length={args.max_prompt_length}",
                   f"--row_tokens={GPU_ROW if CUDA else 2 * args.max_length}",
                   "--eval_pairs=2", "--kl_samples=0", "--sample_tokens=1", "--bad_rows=drop"]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        lines = [json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))]
    return statistics.median([m["tokens_per_second"] for m in lines if "lr" in m][1:])


def scaling(args):
    """-> the table, the numbers."""
    (cost, flops), loader = fresh(run_lengths, args), fresh(run_loader, args)
    block_cost, block_flops = fresh(run_lengths, args, BLOCK_8B)
    share = loader["loader"] / cost[256]
    several = (torch.cuda.device_count() if CUDA else os.cpu_count()) > 1
    gain = ceiling = float("nan")
    if several:
        alone = run_ranks(args, 1)
        gain = run_ranks(args, 2) / alone
    if several and not CUDA:   # cores share caches and memory
        with ThreadPoolExecutor(2) as pool:
            ceiling = sum(pool.map(run_ranks, [args] * 2, [1] * 2)) / alone
    lines = ["| | measured | goal |", "|---|---|---|",
             by_length("ms a token", cost, flops),
             by_length("the same, one block of Llama-3-8B", block_cost, block_flops),
             f"| fill of rows of {GPU_ROW:,} tokens | {loader['fill']:.1%} | 95% or more |",
             f"| tokenizing 60k pairs | {6e4 * loader['tokenize']:.0f} s | under 60 s a core |",
             f"| packing and collating, share of a step | {share:.2%} | under 2% |",
             f"| two processes against one, wall time | {gain:.2f}x (two runs that share nothing: "
             f"{ceiling:.2f}x) | 1.8x or more |"]
    return lines, {"seconds_a_token": cost, "flops_a_token": flops, "seconds_block_8b": block_cost,
                   "flops_block_8b": block_flops, **loader, "two_processes": gain,
                   "two_runs": ceiling}


def by_length(what, cost, flops):
    return (f"| {what}, pairs of {', '.join(map(str, cost))} tokens | "
            f"{', '.join(f'{1000 * s:.3g}' for s in cost.values())}: "
            f"+{max(cost.values()) / min(cost.values()) - 1:.0%} (FLOPs: "
            f"+{max(flops.values()) / min(flops.values()) - 1:.0%}) | within 10% |")


# -----------------------------------------------------------------------------
# tables


def measure(stages, args, pairs, rounds):
    """stages {name: stage}, each in turn, `rounds` times -> {name: [result, ..]}."""
    results = {name: [] for name in stages}
    for i in range(rounds):
        for name, stage in stages.items():
            r = fresh(run_ours if stage in STAGES else run_trl, stage, args, pairs)
            results[name].append(r)
            print(f"round {i + 1} of {rounds} | {name}: {r['seconds']:.4f} s/pair, "
                  f"{r['peak']:.1f} GB", flush=True)
    return results


def check_same_mathematics(results):
    """What the first batch gives must be equal but for bf16's noise. Later losses are not: Adam's
    first steps follow the gradient's signs, and noise decides those of small entries."""
    lines = ["of the first batch: log-probs (chosen, rejected), norm of the gradient, loss:"]
    rows = [(name, [*runs[0]["logps"], runs[0]["grad_norm"], runs[0]["losses"][0]])
            for name, runs in results.items()]
    lines += [f"  {name}: " + ", ".join(f"{x:.4f}" for x in row) for name, row in rows]
    print("\n".join(lines), flush=True)
    for name, row in rows:
        if any(abs(a - b) > 0.01 * abs(b) + 0.02 for a, b in zip(row[:3], rows[0][1])):
            raise ValueError(f"{name} and {rows[0][0]} do not compute the same (numbers above)")


def spread(values, form):
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def speedup(slow, fast):
    """Ratios within a round, so that a slow minute hits both sides."""
    return spread([a["seconds"] / b["seconds"] for a, b in zip(slow, fast)], "{:.2f}x")


def table(results, pairs):
    tokens, base = pairs.lengths.sum() / len(pairs), next(iter(results.values()))
    form = "{:.2f}" if base[0]["seconds"] > 0.2 else "{:.5f}"
    lines = ["| | s/pair | tokens/s | speed | peak memory, GB | reference pass, s/pair |",
             "|---|---|---|---|---|---|"]
    for name, runs in results.items():
        seconds = [r["seconds"] for r in runs]
        reference = ("in every step" if name in (TRL, LIVE) else
                     spread([r["reference"] for r in runs], form))
        lines.append(f"| {name} | {spread(seconds, form)} | "
                     f"{tokens / statistics.median(seconds):,.0f} | {speedup(base, runs)} | "
                     f"{max(r['peak'] for r in runs):.1f} | {reference} |")
    return lines


def hardware():
    name, clock_used = platform.processor(), "one thread, process CPU time"
    if CUDA:
        name, clock_used = torch.cuda.get_device_name(), "wall time"
    elif os.path.exists("/proc/cpuinfo"):
        lines = [line for line in open("/proc/cpuinfo") if line.startswith(("model name", "flags"))]
        name = lines[0].split(":")[1].strip() + (" with AMX" if "amx_bf16" in lines[1] else "")
    packages = filter(importlib.util.find_spec, ("torch", "transformers", "trl"))
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    precision = "bf16 autocast" if BF16 else "fp32"
    return f"{name}; {', '.join(versions)}; {precision}; {clock_used}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    smollm2 = os.path.join(os.path.dirname(data.cache_path("", "")), "SmolLM2-135M-Instruct")
    parser.add_argument("--model", default=smollm2 if os.path.isdir(smollm2) else "assets/demo",
                        help="folder or hub id; default: SmolLM2 in the cache, or assets/demo")
    parser.add_argument("--data", default="assets/demo/train.jsonl", help="as train.py's dataset")
    parser.add_argument("--pairs", type=int, default=512 if CUDA else 4)
    parser.add_argument("--batch", type=int, default=32 if CUDA else 4, help="pairs a step")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--repeats", type=int,
                        help="rounds; default: 3 on a GPU, on a CPU 2 of TRL, 1 of the ablation")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=CUDA,
                        help="also this trainer and TRL's best with torch.compile")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--json", metavar="FILE", help="all numbers, for a program")
    args = parser.parse_args()
    parts = [args.only] if args.only else PARTS[:-1]
    if "trl" in parts and not importlib.util.find_spec("trl"):
        sys.exit("error: pip install trl, or --only=ablation, which needs none")
    os.environ |= ENVIRONMENT
    args.model = llama.checkpoint_folder(args.model)
    args.max_prompt_length = args.max_length * 3 // 4
    pairs = data.load_pairs(args.data, "train", data.Tokenizer(args.model), args.max_length,
                            args.max_prompt_length)
    args.pairs = min(max(args.pairs, args.batch), len(pairs)) // args.batch * args.batch
    if not args.pairs:
        sys.exit(f"error: {args.data}: {len(pairs)} pairs, less than a batch of {args.batch}")
    pairs = pairs.subset(np.random.default_rng(42).permutation(len(pairs))[:args.pairs])

    prompt, chosen, rejected = pairs.lengths.mean(0)
    batches, n = steps(args)
    padded = sum(2 * len(b) * (pairs.lengths[b, 0] + pairs.lengths[b, 1:].max(1)).max()
                 for b in batches[:n]) / pairs.lengths.sum()
    about = (f"{os.path.basename(args.model)}, {args.pairs} pairs of {args.data} (on average "
             f"{prompt:.0f} + {chosen:.0f} + {rejected:.0f} tokens), batches of {args.batch}: "
             f"{padded:.2f} times the tokens if padded, a prompt with each response; median (min "
             f"to max) of the rounds\n{hardware()}")
    print(about, flush=True)
    record, report = {"about": about, "arguments": vars(args)}, []
    sides = {TRL: TRL, TRL_BEST: TRL_BEST, "this trainer": PACKED}
    if args.compile:
        sides |= {TRL_COMPILED: TRL_COMPILED, "this trainer, compiled": COMPILED}
    for part, stages in (("trl", sides), ("ablation", dict(zip(STAGES, STAGES)))):
        if part in parts:
            rounds = args.repeats or (3 if CUDA else 2 if part == "trl" else 1)
            record[part] = results = measure(stages, args, pairs, rounds)
            check_same_mathematics(results)
            report += ["", *table(results, pairs)]
            if part == "trl":
                report += ["", *(f"{ours} against {theirs}: " +
                                 speedup(results[theirs], results[ours])
                                 for ours in sides if sides[ours] in STAGES
                                 for theirs in sides if theirs in (TRL_BEST, TRL_COMPILED))]
    if "profile" in parts:
        lines, record["profile"] = profile(args, pairs)
        report += ["", *lines]
    if "scaling" in parts:
        lines, record["scaling"] = scaling(args)
        report += ["", *lines]
    command = "python -m scripts.bench " + " ".join(sys.argv[1:])
    print("\n".join(["", about, *report, "", f"`{command}`"]))
    if args.json:
        llama.write_json(args.json, record)


if __name__ == "__main__":
    one_line_errors()
    main()
