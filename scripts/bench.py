"""
This trainer beside TRL's DPOTrainer: the same model, pairs, batches and mathematics, in one run.

$ python -m scripts.bench --data=pairs.jsonl                  # all three parts, minutes on a CPU
$ python -m scripts.bench --data=pairs.jsonl --only=trl --pairs=32 --json=bench.json
$ python -m scripts.bench --data=pairs.jsonl --only=ablation  # needs no TRL

trl       TRL with its defaults, TRL at its best, and this trainer
ablation  this trainer's ideas, added one at a time to a trainer that pads
profile   where the time of a step goes, and the least that it could take

Both sides train all weights with DPO (beta 0.1) on our token ids: fp32 weights, products in bf16
(in fp32 on a CPU whose bf16 is slow), fused AdamW, the gradient clipped at norm 1. A run is a
process of its own and goes over the pairs twice, because in the first pass memory grows and a GPU
compiles. The second pass is timed: wall time on a GPU, on a CPU the process time of one thread. The
reference pass is timed apart.
"""
import argparse
import importlib.metadata
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/bench.py`
import data
import mmpo
import model as llama
from configurator import (
    HERE, check_numbers, one_line_errors, read_settings, require, write_json)
from scripts import cost

BETA, LEARNING_RATE = 0.1, 1e-5
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16 = llama.fast_bfloat16(DEVICE)
AUTOCAST = torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16)
PACK_TOKENS = read_settings(os.path.join(HERE, "train.py"))["pack_tokens"].value if CUDA else 4096
PAD_TO = data.pad_multiple(DEVICE)

PARTS = "trl", "ablation", "profile"
TRL, TRL_BEST, TRL_COMPILED = "TRL, defaults", "TRL, its best", "TRL, its best, compiled"
OURS, OURS_COMPILED = "this trainer", "this trainer, compiled"
PADDED, SCORED, SHARED, DENSE, BY_TREE, COMPILED = IDEAS = (
    "padded pairs, all logits", "+ response tokens only meet the vocabulary", "+ shared prompt",
    "+ packs, dense mask", "+ attention by tree", "+ compiled")

# -----------------------------------------------------------------------------
# measuring


def fresh(function, *args):
    """function(*args), in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=start_child) as pool:
        return pool.submit(function, *args).result()


def start_child():
    sys.stdout = sys.stderr = open(os.devnull, "w")     # TRL and its libraries print a lot
    torch.manual_seed(0)
    if CUDA:
        torch.set_float32_matmul_precision("high")      # as train.py does, here for both sides
    else:
        torch.set_num_threads(1)


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


# -----------------------------------------------------------------------------
# TRL


def run_trl(side, args, pairs):
    """TRL's DPOTrainer over `pairs` -> what `run_ours` returns."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    best, found, marks, losses = side != TRL, {"reference": 0}, [], []
    if best and not CUDA:   # score completion tokens only, which TRL does on GPUs alone
        utils._use_triton = lambda device: True

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):        # our token ids
            return dataset

        def _get_train_sampler(self, *_):               # our batches, in our order
            return [*range(args.pairs)] * 2

        def _precompute_ref_logps(self, *a):
            start = clock()
            dataset = super()._precompute_ref_logps(*a)
            found["reference"] = (clock() - start) / args.pairs
            return dataset

        def training_step(self, *a, **kw):
            marks.append(clock())
            return super().training_step(*a, **kw)

        def compute_loss(self, *a, **kw):
            losses.append(super().compute_loss(*a, **kw))
            return losses[-1]

    fields = "prompt_ids", "chosen_ids", "rejected_ids"
    rows = [{field: ids.tolist() for field, ids in zip(fields, pairs.ids(i))}
            for i in range(len(pairs))]
    flash = best and CUDA and find_spec("flash_attn")
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            folder, beta=BETA, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            per_device_train_batch_size=args.batch, num_train_epochs=1, max_length=None,
            gradient_checkpointing=not best, precompute_ref_log_probs=best, bf16=BF16,
            use_liger_kernel=bool(best and CUDA and find_spec("liger_kernel")),
            model_init_kwargs={"attn_implementation": "flash_attention_2" if flash else "sdpa"},
            torch_compile=side == TRL_COMPILED, use_cpu=not CUDA, dataloader_pin_memory=CUDA,
            logging_first_step=True, save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = Trainer(args.model, args=config, train_dataset=Dataset.from_list(rows),
                          processing_class=AutoTokenizer.from_pretrained(args.model))
        trainer.train()
    seconds = clock() - marks[args.pairs // args.batch]   # of the second pass
    logged = trainer.state.log_history[0]
    return found | {"seconds": seconds / args.pairs, "peak": peak_gb(), "first_batch": [
        logged["logps/chosen"], logged["logps/rejected"], logged["grad_norm"], losses[0].item()]}


# -----------------------------------------------------------------------------
# this trainer, and its ideas one by one


def packs_of(idea, pairs, batch):
    """The packs of a step, one for each forward."""
    everything = np.arange(len(batch))
    if idea in (PADDED, SCORED):   # every response has a prompt of its own
        copies = [[prompt, response] for prompt, *responses in map(pairs.ids, batch)
                  for response in responses]
        pairs, batch = data.Pairs.from_ids(copies), np.arange(len(copies))
    lengths = pairs.lengths[batch].sum(1)
    if idea in (PADDED, SCORED, SHARED):
        rows = [data.collate(pairs, batch, np.array([i]), pad_to=lengths.max())
                for i in range(len(batch))]
        return [stack(rows, everything)]
    [plan] = data.plan_packs(lengths, PACK_TOKENS)
    packs = [data.collate(pairs, batch, members, PAD_TO) for members in plan]
    return [stack([pack], pack.members) for pack in packs] if idea == DENSE else packs


def stack(rows, members):
    """Packs of T tokens each -> one Pack of (rows, T) tokens. members: its pairs in the batch."""
    def all_of(name, shift=0):
        return torch.cat([getattr(row, name) + i * shift for i, row in enumerate(rows)])

    T = rows[0].tokens.size(1)
    return data.Pack(
        all_of("tokens"), all_of("positions"), all_of("tree").view(-1, T),
        all_of("branch").view(-1, T), all_of("predict_from", shift=T), all_of("targets"),
        all_of("response", shift=rows[0].n_responses), torch.as_tensor(members), [], n_responses=2)


def per_token_logps(idea, model, pack):
    """log pi of each response token, (R,)."""
    if idea in (BY_TREE, COMPILED):
        return model(pack)[0]
    mask = None   # a plain causal sequence; its padding comes last, so nothing sees it
    if idea in (SHARED, DENSE):
        i = torch.arange(pack.tokens.size(1), device=DEVICE)
        mask = torch.stack([llama.tree_rule(tree, branch)(None, None, i[:, None], i)
                            for tree, branch in zip(pack.tree, pack.branch)])[:, None]
    x = model.hidden(pack.tokens, pack.positions, mask).flatten(0, 1)
    if idea == PADDED:
        logits = F.linear(x, model.head_weight).float()
        return logits[pack.predict_from, pack.targets] - logits.logsumexp(-1)[pack.predict_from]
    return llama.TokenLogProbs.apply(x[pack.predict_from], model.head_weight, pack.targets)


def forwards(idea, model, pairs, batch):
    """For each forward (positions of its m pairs in the batch, their summed log-probs (m, 2))."""
    for pack in packs_of(idea, pairs, batch):
        pack = pack.to(DEVICE)
        with AUTOCAST:
            logps = pack.sum_by_response(per_token_logps(idea, model, pack))
        yield pack.members, logps


@torch.no_grad()
def reference_logps(idea, model, pairs, batch):
    """Summed log-probs (B, 2) of a model that is not trained yet, and so is the reference."""
    if idea in (BY_TREE, COMPILED):
        with AUTOCAST:
            return data.score(model, pairs, batch, PACK_TOKENS).to(DEVICE)
    logps = torch.zeros(len(batch), 2, device=DEVICE)
    for members, found in forwards(idea, model, pairs, batch):
        logps[members] = found
    return logps


def train_step(idea, model, optimizer, pairs, batch, ref_logps):
    """A step, as train.py makes it -> its loss, the gradient's norm, the log-probs (B, 2)."""
    logps, total_loss = torch.zeros_like(ref_logps), 0
    for members, found in forwards(idea, model, pairs, batch):
        loss = mmpo.dpo_loss(*found.T, *ref_logps[members].T, BETA).sum() / len(batch)
        loss.backward()
        total_loss += loss.detach()
        logps[members] = found.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total_loss.item(), norm, logps


def load(idea, args):
    model, _ = llama.from_pretrained(args.model, DEVICE)
    if idea == COMPILED:
        model.compile_blocks()
    return model, torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0, fused=True)


def run_ours(idea, args, pairs):
    """-> seconds a pair, of the reference pass and of the steps; the peak of memory in GB; of the
    first batch the mean log-probs (chosen, rejected), the gradient's norm and the loss."""
    model, optimizer = load(idea, args)
    batches = np.split(np.arange(args.pairs), args.pairs // args.batch)
    for _ in range(2):
        start = clock()
        references = [reference_logps(idea, model, pairs, batch) for batch in batches]
    reference = (clock() - start) / args.pairs   # of the second pass
    steps = []
    for _ in range(2):
        start = clock()
        for batch, ref_logps in zip(batches, references):
            steps.append(train_step(idea, model, optimizer, pairs, batch, ref_logps))
    seconds = (clock() - start) / args.pairs
    loss, norm, logps = steps[0]
    return {"seconds": seconds, "reference": reference, "peak": peak_gb(),
            "first_batch": [*logps.mean(0).tolist(), norm.item(), loss]}


# -----------------------------------------------------------------------------
# where the time of a step goes

KINDS = {"attention": "::bmm$|softmax|scaled_dot_product|flex_attention|flash|fmha",
         "matrix products": "::mm$|::addmm$|gemm|nvjet|cutlass",
         "AdamW and clipping": "adam|vector_norm|::mul_$|multi_tensor",
         "copies, casts, zeros":
             "::copy_$|::fill_$|::cat$|::empty|Memcpy|Memset|CatArray|triton_poi_fused__to_copy"}


def run_profile(args, pairs):
    """-> the share of each kind of operation in a step, seconds and FLOPs a pair, and the FLOP/s of
    a product of the MLP's size."""
    idea, batch = COMPILED if args.compile else BY_TREE, np.arange(args.batch)
    model, optimizer = load(idea, args)
    step = idea, model, optimizer, pairs, batch, reference_logps(idea, model, pairs, batch)
    for _ in range(2):   # the first time warms up
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

    weight = model.model.layers[0].mlp.gate_proj.weight.detach()
    weight = weight.to(torch.bfloat16 if BF16 else torch.float32)
    x = torch.randn(pairs.lengths[batch].sum(), weight.size(1), device=DEVICE, dtype=weight.dtype)
    for _ in range(2):
        start = clock()
        for _ in range(100):
            F.linear(x, weight)
    rate = 100 * 2 * len(x) * weight.numel() / (clock() - start)
    flops = float(cost.step_flops(model, pairs.lengths[batch])) / args.batch
    return {"share": {kind: t / total for kind, t in share.items()}, "seconds": seconds,
            "flops": flops, "rate": rate}


def profile_report(found):
    floor = found["flops"] / found["rate"]
    return ["| where the time of a step goes | share |", "|---|---|",
            *(f"| {kind} | {share:.0%} |" for kind, share in found["share"].items()), "",
            f"A pair takes {found['seconds']:.3g} s. The floor is {floor:.3g} s, "
            f"{floor / found['seconds']:.0%} of that: {found['flops'] / 1e9:,.3g} GFLOP (each "
            f"token once, nothing computed again) at {found['rate'] / 1e9:,.0f} GFLOP/s, the rate "
            "of a product of the MLP's size."]


# -----------------------------------------------------------------------------
# tables


def measure(sides, args, pairs):
    """Every side in turn, args.repeats times -> {side: [what its runs returned]}.

    What the first batch gives must be equal but for bf16's noise. Later batches may differ: Adam's
    first steps follow the gradient's signs, and noise decides those of small entries.
    """
    results, first = {side: [] for side in sides}, None
    for side in tqdm([*sides] * args.repeats, "measurements", disable=None):
        idea = {OURS: BY_TREE, OURS_COMPILED: COMPILED}.get(side, side)
        run = fresh(run_ours if idea in IDEAS else run_trl, idea, args, pairs)
        results[side].append(run)
        chosen, rejected, norm, loss = run["first_batch"]
        tqdm.write(f"{side}: {run['seconds']:.4f} s/pair, {run['peak']:.1f} GB; of the first "
                   f"batch: log-probs {chosen:.4f} and {rejected:.4f}, gradient {norm:.4f}, "
                   f"loss {loss:.4f}")
        first = first or run["first_batch"]
        if not np.allclose(run["first_batch"], first, rtol=0.01, atol=0.02):
            raise RuntimeError(f"{side} does not compute what {sides[0]} computes")
    return results


def table(results, rivals):
    """Medians of the rounds. rivals: the sides that the others' speed is compared with."""
    medians = {side: {key: statistics.median(run[key] for run in runs)
                      for key in ("seconds", "peak", "reference")}
               for side, runs in results.items()}
    lines = ["| | s/pair | " + "".join(f"speed against {rival} | " for rival in rivals)
             + "peak memory, GB | reference pass, s/pair |", "|---" * (4 + len(rivals)) + "|"]
    for side, m in medians.items():
        speeds = [f"{medians[rival]['seconds'] / m['seconds']:.2f}x" for rival in rivals]
        reference = "in every step" if side == TRL else f"{m['reference']:.3g}"
        lines.append(f"| {side} | {m['seconds']:.3g} | {' | '.join(speeds)} | {m['peak']:.1f} | "
                     f"{reference} |")
    return lines


def about(args, pairs):
    """The model, the pairs, the machine and the versions, in words."""
    lengths, (prompt, chosen, rejected) = pairs.lengths, pairs.lengths.mean(0)
    rows = (lengths[:, 0] + lengths[:, 1:].max(1)).reshape(-1, args.batch)
    padded = 2 * args.batch * rows.max(1).sum() / lengths.sum()
    machine = (f"{torch.cuda.get_device_name()}, wall time" if CUDA else
               f"CPU with {torch.backends.cpu.get_cpu_capability()}, process time of one thread")
    versions = [f"{package} {importlib.metadata.version(package)}"
                for package in filter(find_spec, ("torch", "transformers", "trl"))]
    return (f"{os.path.basename(args.model)}, {args.pairs} pairs of {args.data} (on average "
            f"{prompt:.0f} + {chosen:.0f} + {rejected:.0f} tokens), batches of {args.batch}: "
            f"{padded:.2f} times the tokens if padded, a prompt with each response\n{machine}; "
            f"{', '.join(versions)}; products in {'bf16' if BF16 else 'fp32'}; medians of "
            f"{args.repeats} round(s)")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    demo = os.path.join(HERE, "assets", "demo")
    smollm2 = os.path.expanduser("~/.cache/nanommpo/SmolLM2-135M-Instruct")
    parser.add_argument("--model", default=smollm2 if os.path.isdir(smollm2) else demo,
                        help="folder or hub id; default: SmolLM2 in the cache, or assets/demo")
    parser.add_argument("--data", default=os.path.join(demo, "train.jsonl"),
                        help="as train.py's dataset")
    parser.add_argument("--pairs", type=int, default=512 if CUDA else 4)
    parser.add_argument("--batch", type=int, default=32 if CUDA else 4, help="pairs a step")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3 if CUDA else 1, help="rounds")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=CUDA,
                        help="also this trainer and TRL's best with torch.compile")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--json", metavar="FILE", help="all numbers, for a program")
    args = parser.parse_args()
    check_numbers(args, pairs=1, batch=1, max_length=8, repeats=1)
    parts = [args.only] if args.only else PARTS
    require("trl" not in parts or find_spec("trl"),
            "bench: pip install trl, or give --only=ablation, which needs none")
    # malloc keeps freed memory in the process, since fresh pages cost more than arithmetic
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2 ** 30), "MALLOC_TRIM_THRESHOLD_": str(2 ** 36)}
    args.model = llama.checkpoint_folder(args.model)
    pairs = data.load_pairs(args.data, "train", data.Tokenizer(args.model), args.max_length,
                            max_prompt_length=args.max_length * 3 // 4)
    require(pairs.n_responses == 2, f"{args.data}: bench takes two responses a row")
    args.pairs = min(max(args.pairs, args.batch), len(pairs)) // args.batch * args.batch
    require(args.pairs, f"{args.data}: {len(pairs)} pairs, less than a batch of {args.batch}")
    pairs = pairs.subset(np.random.default_rng(42).permutation(len(pairs))[:args.pairs])

    lines = [about(args, pairs)]
    print(lines[0], flush=True)
    record = {"about": lines[0], "arguments": vars(args)}
    compiled = [TRL_COMPILED, OURS_COMPILED] if args.compile else []
    if "trl" in parts:
        record["trl"] = results = measure([TRL, TRL_BEST, OURS, *compiled], args, pairs)
        lines += ["", *table(results, [TRL, TRL_BEST, *compiled[:1]])]
    if "ablation" in parts:
        record["ablation"] = results = measure(IDEAS, args, pairs)
        lines += ["", *table(results, [PADDED])]
    if "profile" in parts:
        record["profile"] = found = fresh(run_profile, args, pairs)
        lines += ["", *profile_report(found)]
    print("\n".join(["", *lines, "", f"`python -m scripts.bench {' '.join(sys.argv[1:])}`"]))
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    one_line_errors()
    main()
