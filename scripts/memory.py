"""
What a run will take on a GPU, by part: what `python train.py config/x.py --dry_run=True` prints.

An estimate from shapes alone, for a model that may be on the meta device and sharded. A test holds
the activations to within 10% of what torch.compile keeps of a block.
"""
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


def memory_parts(model, row_tokens, dtype, optimizer_bytes):
    """Bytes that one rank needs at its peak, by part: an estimate, for a meta-device model too."""
    c, item = model.config, dtype.itemsize
    mine = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    trained = sum(p.numel() for p in mine if p.requires_grad)
    sharded = isinstance(model.head_weight, DTensor)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    # autocast casts trained weights once a row; FSDP gathers a block, the next one, and the head
    casts = (2 * block + 2 * model.head_weight.numel() if sharded else trained * (item < 4)) * item
    stream = item if sharded or not model.model.norm.weight.requires_grad else 4
    layer = layer_bytes(model, item, stream)
    kept = c.n_layer * layer
    if model.activation_checkpointing:   # a block's input, and one block computed again
        kept = c.n_layer * stream * c.n_embd + layer
    logits = min(llama.CHUNK_LOGITS["cuda"], row_tokens * c.vocab_size)
    head_grad = 4 * model.head_weight.numel() if model.head_weight.requires_grad else 0
    return {"weights": sum(p.nbytes for p in mine), "cast weights": casts,
            "gradients": 4 * trained, "optimizer": optimizer_bytes * trained,
            "activations": kept * row_tokens,
            "logits, in chunks": logits * item + head_grad}


def report(model, step_tokens, max_iters, row_tokens, ranks, dtype, optimizer_bytes):
    """A run's size and memory, for people. dtype: of the computation."""
    parts = memory_parts(model, row_tokens, dtype, optimizer_bytes)
    parts["in all"] = sum(parts.values())
    unit, name = (2 ** 30, "GiB") if parts["in all"] >= 2 ** 30 else (2 ** 20, "MiB")
    return (f"a step: {step_tokens:,.0f} tokens, about {step_tokens / row_tokens / ranks:.1f} rows "
            f"of {row_tokens:,} tokens on each of {ranks} ranks; {max_iters:,} steps\n"
            f"memory of a rank, {name} (estimate):\n" + "\n".join(
                f"{size / unit:9.2f} {part}" for part, size in parts.items()))
