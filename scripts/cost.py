"""
What a run costs: the memory that `python train.py config/x.py --dry_run=True` predicts, and the
operations and speed of a step, which are in metrics.jsonl.

Memory is an estimate for a GPU from shapes alone, so the model may be on the meta device, and
sharded. A test holds the activations to within 10% of what torch.compile keeps of a block.
"""
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import model as llama


def layer_bytes(model, item, stream):
    """Bytes a token that a compiled block keeps for backward: its input, what attention adds to it,
    queries, keys, values, the attention's output, gate, up, and the inputs of trained weights;
    under LoRA's dropout one for each adapter, and its mask.
    """
    c, inputs = model.config, {}
    shares = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
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
    # autocast casts trained weights once a pack; FSDP gathers a block, the next one, the embedding and the head
    casts = (2 * block + 2 * model.head_weight.numel() if sharded else trained * (item < 4)) * item
    stream = item if sharded or not model.model.norm.weight.requires_grad else 4
    layer = layer_bytes(model, item, stream)
    kept = c.n_layer * layer
    if model.activation_checkpointing:   # a block's input, and one block computed again
        kept = c.n_layer * stream * c.n_embd + layer
    logits = min(llama.CHUNK_LOGITS["cuda"], pack_tokens * c.vocab_size)
    head_grad = 4 * model.head_weight.numel() if model.head_weight.requires_grad else 0
    return {"weights": sum(p.nbytes for p in mine), "cast weights": casts,
            "gradients": 4 * trained, "optimizer": optimizer_bytes * trained,
            "activations": kept * pack_tokens,
            "logits, in chunks": logits * item + head_grad}


def report(model, lengths, batch_size, max_iters, pack_tokens, ranks, dtype, optimizer_bytes):
    """A run's size and memory, for people. lengths (N, 1 + n): tokens of its pairs; dtype: of
    matrix products; optimizer_bytes: for each trained weight."""
    parts = memory_parts(model, pack_tokens, dtype, optimizer_bytes)
    parts["in all"] = sum(parts.values())
    unit, name = (2 ** 30, "GiB") if parts["in all"] >= 2 ** 30 else (2 ** 20, "MiB")
    step_tokens = lengths.sum() / len(lengths) * min(batch_size, len(lengths))
    return (f"a step: {step_tokens:,.0f} tokens, about {step_tokens / pack_tokens / ranks:.1f} "
            f"packs of {pack_tokens:,} tokens on each of {ranks} ranks; {max_iters:,} steps\n"
            f"memory of a rank, {name} (estimate):\n" + "\n".join(
                f"{size / unit:9.2f} {part}" for part, size in parts.items()))


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
    peaks = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
    return next((peak for key, peak in peaks.items() if key in name), 0)


def throughput(model, lengths, packs, pad_to, seconds):
    """Speed of a step that took `seconds` over trees of `lengths` (N, 1 + n), on all ranks; how
    full this rank's packs were; on a GPU the peak of its memory, and the share of its peak rate."""
    device = model.head_weight.device
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    tflops = step_flops(model, lengths) / seconds / 1e12
    tokens = [lengths[members].sum() for members in packs]
    found = {"tokens_per_second": lengths.sum() / seconds, "tflops": tflops,
             "fill": sum(tokens) / sum(max(1, math.ceil(n / pad_to)) * pad_to for n in tokens)}
    if peak := peak_flops(device):
        found["mfu"] = tflops * 1e12 / (peak * ranks)
    if device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    return found
