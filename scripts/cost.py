"""
What a run costs: the memory and time that `python train.py config/x.py --dry_run=True` predicts,
and a step's operations, from which metrics.jsonl has its speed.

Memory is an estimate for a GPU from shapes alone, so the model may be on the meta device, and
sharded. A test holds the activations to within 10% of what torch.compile keeps of a block. Where
the run would use a CPU, a few packs are computed there too, and its time and memory told from them.
"""
import contextlib
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import data
import mmpo
import model as llama
from configurator import rank_and_size

TIMED_WORK = 1e11   # parameters times tokens of a pack that is timed: 740 tokens of a 135M model


def layer_bytes(model, item, stream):
    """Bytes a token that a compiled block keeps for backward: its input, what attention adds to it,
    queries, keys, values, the attention's output, gate, up, and the inputs of layers whose weights
    train. Under LoRA's dropout each adapter keeps an input of its own, and its mask.

    item, stream: bytes of a number in products, and of one in what a block passes on.
    """
    c, inputs = model.config, {}   # inputs: bytes of each that is kept
    shares = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}   # have one input
    for path, layer in model.model.layers[0].named_modules():
        name = path.split(".")[-1]
        if isinstance(layer, llama.LoRALinear):
            dropped = layer.dropout > 0
            inputs[name if dropped else shares.get(name, name)] = (
                layer.lora_A.in_features * (item + dropped))
        elif isinstance(layer, nn.Linear) and layer.weight.requires_grad and "lora_" not in path:
            inputs[shares.get(name, name)] = layer.in_features * item
    attention = 2 * (c.n_head + c.n_kv_head) * c.head_dim
    return ((stream + item) * c.n_embd + (attention + 2 * c.intermediate_size) * item
            + sum(inputs.values()))


def memory_parts(model, pack_tokens, dtype, optimizer_bytes):
    """Bytes that one rank needs at its peak, by part: an estimate, for a meta-device model too."""
    c, item = model.config, dtype.itemsize
    mine = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    trained = sum(p.numel() for p in mine if p.requires_grad)
    sharded = isinstance(model.head_weight, DTensor)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    # autocast casts trained weights once a pack; FSDP gathers a block, the next one, the embedding
    # and the head
    casts = (2 * block + 2 * model.head_weight.numel() if sharded else trained * (item < 4)) * item
    stream = item if sharded or not model.model.norm.weight.requires_grad else 4
    layer = layer_bytes(model, item, stream)
    kept = c.n_layer * layer
    if model.activation_checkpointing:   # a block's input, and one block computed again
        kept = c.n_layer * stream * c.n_embd + layer
    logits = min(llama.CHUNK_LOGITS["cuda"], pack_tokens * c.vocab_size)
    head_grad = 4 * model.head_weight.numel() if model.head_weight.requires_grad else 0
    return {"weights": sum(p.nbytes for p in mine), "copies of weights": casts,
            "gradients": 4 * trained, "optimizer": optimizer_bytes * trained,
            "activations": kept * pack_tokens,
            "logits, in chunks": logits * item + head_grad}


def report(model, pairs, held_out, settings, ranks, device, dtype):
    """A run's size and memory, for people, and its time if it would use a CPU. pairs, held_out:
    data.Pairs; settings: train.py's, with a GPU's dtype; dtype: what the user asked for, or auto.
    """
    batch_size, pack_tokens = settings["batch_size"], settings["pack_tokens"]
    parts = memory_parts(model, pack_tokens, getattr(torch, settings["dtype"]),
                         8 if settings["optimizer_state"] == "fp32" else 2)
    parts["in all"] = sum(parts.values())
    unit, name = (2 ** 30, "GiB") if parts["in all"] >= 2 ** 30 else (2 ** 20, "MiB")
    step_tokens = pairs.lengths.sum() / len(pairs) * min(batch_size, len(pairs))
    on_cpu = device.type == "cpu"
    lines = [f"a step: {step_tokens:,.0f} tokens, which fill "
             f"{step_tokens / pack_tokens / ranks:.1f} packs of {pack_tokens:,} tokens on each of "
             f"{ranks} ranks (processes); {settings['max_iters']:,} steps",
             f"memory of a rank{' on a GPU' if on_cpu else ''}, {name} (estimate):"]
    lines += [f"{size / unit:9.2f} {part}" for part, size in parts.items()]
    if on_cpu:
        lines.append(cpu_report(model, pairs, held_out, settings, ranks, dtype))
    return "\n".join(lines)


def cpu_report(model, pairs, held_out, settings, ranks, dtype):
    """What the run would take on this CPU, in words, told from three packs that each rank computes
    here."""
    bf16 = dtype == "bfloat16" or dtype == "auto" and llama.fast_bfloat16(torch.device("cpu"))
    title = f"on this CPU, in {'bfloat16' if bf16 else 'float32'}"
    if isinstance(model.head_weight, DTensor):
        return f"{title}: not timed, since the model is sharded"
    model = model if bf16 else model.float()   # weights that LoRA froze are bf16 up to here

    # the fullest pack of the run, or of its first 100 steps, and three packs that are no fuller
    batch_size, max_iters = settings["batch_size"], settings["max_iters"]
    tokens = pairs.lengths.sum(1)
    batches = [data.batch_indices(len(pairs), batch_size, settings["seed"], i) for i in range(100)]
    fullest = max(tokens[batch[pack]].sum() for batch in batches[:max_iters] for pack in
                  data.plan_packs(tokens[batch], settings["pack_tokens"], ranks)[0])
    room = min(fullest, TIMED_WORK / sum(p.numel() for p in model.parameters()))
    counts = [max(1, (tokens[batch].cumsum() <= room).sum()) for batch in batches[:3]]
    packs = [data.collate(pairs, batch, np.arange(n)) for batch, n in zip(batches, counts)]
    packs.sort(key=lambda pack: len(pack.tree))   # as in a run, the fullest then needs new memory
    largest = len(packs[-1].tree)

    parts, free = memory_parts(model, largest, torch.float32, 8), free_memory()
    # blocks that are not compiled keep two to three times the activations
    need = ranks * (sum(parts.values()) + 2 * parts["activations"])
    if need > free:
        return (f"{title}: not timed, since that may take {need / 2 ** 30:.1f} GiB of memory, and "
                f"{free / 2 ** 30:.1f} GiB are known to be free")
    fixed = peak_memory() + parts["weights"] + parts["optimizer"]
    per_token, per_update = time_packs(model, packs, bf16)
    peak = peak_memory()
    peak += (peak - fixed) * max(0, fullest / largest - 1)   # activations grow with the pack
    trained = tokens.sum() * max_iters / math.ceil(len(pairs) / batch_size)
    scored = held_out.lengths.sum() * (1 + math.ceil(max_iters / settings["eval_interval"]))
    if mmpo.OBJECTIVES[settings["objective"]]:   # its loss reads the reference
        scored += tokens.mean() * min(len(pairs), max_iters * batch_size)
    # forward is about a third of forward and backward
    seconds = per_token * (trained + scored / 3) / ranks + per_update * max_iters
    return (f"{title}: about {seconds / 60:,.1f} minutes, and {peak / 2 ** 30:.2f} GiB of memory a "
            f"rank ({free / 2 ** 30:.1f} GiB are free)\n    two packs were timed, at "
            f"{ranks / per_token:,.0f} tokens/s; counted are the steps, the reference pass and "
            "the\n    evaluations, without loading and generation")


def time_packs(model, packs, bf16):
    """Give a meta-device model random weights on the CPU, and train it on packs. Returns the
    seconds of a token, forward and backward, and of an update. The first pack warms up."""
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)   # so small that nothing overflows
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, seconds = torch.optim.AdamW(trained, fused=True), []
    for pack in packs:
        t0 = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            per_token_logps, _ = model(pack)
        (-per_token_logps.mean()).backward()
        t1 = time.monotonic()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append((t1 - t0, time.monotonic() - t1))
    passes, updates = np.sum(seconds[1:], axis=0)
    return passes / sum(len(pack.tree) for pack in packs[1:]), updates / len(packs[1:])


def free_memory():
    """Bytes of memory that this process can get now; 0 where that can't be known."""
    try:
        held = peak_memory()
        with open("/proc/meminfo") as f:
            free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", f.read())[1])
        return max(0, min(free, memory_limit() - held))
    except (OSError, TypeError):   # not on Linux
        return 0


def memory_limit(mine="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Bytes of memory that a container or a scheduler lets this process have, on Linux; inf where
    nothing limits it."""
    try:
        paths = [Path(path) for path in re.findall(":(?:memory)?:(/.*)", Path(mine).read_text())]
    except OSError:   # not on Linux
        return math.inf
    groups, limits = [group for path in paths for group in (path, *path.parents)], [math.inf]
    for file in [f"{root}{group}/memory.max" for group in groups] + [
            f"{root}/memory{group}/memory.limit_in_bytes" for group in groups]:   # older kernels
        with contextlib.suppress(OSError, ValueError):   # "max" is no number
            limits.append(int(Path(file).read_text()))
    return min(limits)


def peak_memory():
    """Bytes of memory that this process has held at most, on Linux. (Its ru_maxrss may be that of
    the program that started it.)"""
    with open("/proc/self/status") as f:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", f.read())[1])


def fitting_dtype(folder, device):
    """fp32 to read a model in, or bf16 where fp32 weights would fill over 0.6 of the memory of
    `device`, "cuda" or "cpu"."""
    numbers = sum(math.prod(shape) for *_, shape in llama.find_tensors(folder).values())
    memory = math.inf   # Windows doesn't tell it
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    elif hasattr(os, "sysconf"):
        memory = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), memory_limit())
    return torch.bfloat16 if 4 * numbers > 0.6 * memory else torch.float32


def step_flops(model, lengths):
    """Model FLOPs of a training step on trees of `lengths` (N, 1 + n).

    Each real token counts once (no prompt twice, no padding), the head for response tokens only,
    and nothing that is computed again. A token takes 2 FLOPs a weight forward, 2 backward, and 2
    more where the weight is trained. Attention counts the keys that the tree rule lets a query see.
    """
    c = model.config
    prompt, responses = lengths[:, 0], lengths[:, 1:].sum(1)
    weights = {True: 0, False: 0}    # of the blocks, by whether they are trained
    for p in model.model.layers.parameters():
        weights[p.requires_grad] += p.numel() if p.dim() == 2 else 0
    head = model.head_weight.numel() * (6 if model.head_weight.requires_grad else 4)
    keys = prompt ** 2 / 2 + (prompt[:, None] * lengths[:, 1:] + lengths[:, 1:] ** 2 / 2).sum(1)
    attention = 12 * c.n_layer * c.n_head * c.head_dim * keys.sum()
    return ((6 * weights[True] + 4 * weights[False]) * (prompt + responses).sum()
            + head * responses.sum() + attention)


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU's data sheet; 0 where it isn't listed here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
             "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
    return next((peak for key, peak in peaks.items() if key in name), 0)


def throughput(model, lengths, packs, pad_to, seconds):
    """Speed of a step that took `seconds` over trees of `lengths` (N, 1 + n), on all ranks; how
    full this rank's packs were; on a GPU the peak of its memory, and the share of its peak rate."""
    device = model.head_weight.device
    tflops = step_flops(model, lengths) / seconds / 1e12
    tokens = [lengths[members].sum() for members in packs]
    found = {"tokens_per_second": lengths.sum() / seconds, "tflops": tflops,
             "fill": sum(tokens) / sum(max(1, math.ceil(n / pad_to)) * pad_to for n in tokens)}
    if peak := peak_flops(device):
        _, ranks = rank_and_size()
        found["mfu"] = tflops * 1e12 / (peak * ranks)
    if device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    return found
