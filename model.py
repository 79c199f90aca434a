"""
A Llama-family decoder in one file: the network, then LoRA and sharding, then weights on disk.

The parameters have Hugging Face's names and the rotary embedding is the split-half one, so that no
weight is renamed or permuted on its way in or out.

References
1) Llama: Touvron et al. 2023, arXiv 2302.13971; Llama 3: Grattafiori et al. 2024, arXiv 2407.21783
2) RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467; SwiGLU: Shazeer 2020, arXiv 2002.05202
3) rotary embedding: Su et al. 2021, arXiv 2104.09864
   grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245
4) LoRA: Hu et al. 2021, arXiv 2106.09685; 5) transformers/models/llama/modeling_llama.py
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from configurator import (
    BEHIND, UserError, check_file, first_line, is_finished, publish, rank_and_size, read_json,
    read_run_settings, reading, require, write_json, write_text, writing)

# -----------------------------------------------------------------------------
# configuration


@dataclass
class LlamaConfig:
    vocab_size: int = 32000
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12
    n_embd: int = 768
    head_dim: int = 64
    intermediate_size: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # None, or a rope_type and its numbers, as in ROPE
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False               # Qwen3: an RMSNorm on every query and key head
    unrotated: tuple = ()               # SmolLM3: which layers have no rotary embedding
    limits: tuple = ()   # (field of config.json, the longest sequence that is exact under it), ..

    def check_length(self, n):
        """UserError unless a sequence of n tokens is computed exactly."""
        for field, limit in self.limits:
            require(n <= limit, f"a sequence of {n} tokens is longer than the model's {field}, "
                    f"{limit}, beyond which this code isn't exact; shorten it (max_length, "
                    "max_new_tokens)")


ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "smollm3": "SmolLM3ForCausalLM"}   # by model_type
ROPE = {   # rope_type: its numbers
    "default": (), "dynamic": (), "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor",
               "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
             "attention_factor")}
# Fields of config.json that change what the network computes: the values that this file honours,
# of which None stands for a field that is missing, and what an error about another value says.
HONOURED = {
    "model_type": (tuple(ARCHITECTURES), ", ".join(ARCHITECTURES)),
    "hidden_act": (("silu", "swish", None), "silu"),
    "rope_type": (tuple(ROPE), ", ".join(ROPE)),
    "partial_rotary_factor": ((1.0, None), "1.0"), "is_causal": ((True, None), "true"),
    "mscale": ((None,), "yarn without it"),
    "truncate": ((True, None), "yarn with true"),
    "layer_types": ((None,), "full_attention, or sliding_attention with a sliding_window"),
    "quantization_config": ((None, {}), "use the bf16 checkpoint, not quantized weights; of "
                            "an adapter, as its base_model_name_or_path"),
} | dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
                  ((True, False, None), "true or false"))
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")   # every config.json must have them
ROPE_NUMBERS = dict.fromkeys(field for fields in ROPE.values() for field in fields)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
WHOLE, NUMBER = (int,), (int, float)
# The type of each number, and the least and the largest value with which a network can be built
# and computes something.
RANGES = dict.fromkeys((*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings",
                        "sliding_window", "no_rope_layer_interval"), (WHOLE, 1, 2 ** 30)) | (
    dict.fromkeys(ROPE_NUMBERS, (NUMBER, 1e-12, 1e12))) | {
        "rms_norm_eps": (NUMBER, 1e-12, 1), "rope_theta": (NUMBER, 2, 1e12),
        "num_hidden_layers": (WHOLE, 1, 1000)}


def config_from_dict(hf, where="config.json"):
    """config.json as a dict -> LlamaConfig. UserError names the field that this file can't honour.

    transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling. Where there
    are both, rope_scaling counts, as in transformers 5.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    require(isinstance(rope, dict) and dict not in map(type, rope.values()),
            f"{where}: rope parameters must be one object of numbers and words (got {rope!r:.60})")
    rope = {field: value for field, value in rope.items() if value is not None}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    model_type, window = hf.get("model_type"), None
    # Every Mistral has a window, of 4,096 where its config doesn't say; Qwen's is switched on by
    # use_sliding_window. Sequences that fit into the window are exact without it.
    if model_type == "mistral" or hf.get("use_sliding_window"):
        window = hf.get("sliding_window", 4096)
    layers = set(re.findall(r"\w+", str(hf.get("layer_types") or "")))
    odd = layers - {"full_attention", "sliding_attention" if window else None}
    found = hf | rope | {"rope_type": rope_type, "layer_types": min(odd, default=None)}
    for field, (values, hint) in HONOURED.items():
        require(found.get(field) in values,
                f'{where}: {field} {json.dumps(found.get(field)):.60} is not supported ({hint})')

    # The numbers that the network takes. Some have defaults; those of other rope_types don't count.
    context, factor = hf.get("max_position_embeddings"), rope.get("factor")
    original = "original_max_position_embeddings"
    given = {original: context, "beta_fast": 32, "beta_slow": 1} | rope
    given[original] = hf.get(original) or given[original]
    if type(factor) in NUMBER:   # YaRN makes attention sharper the more it stretches the context
        given.setdefault("attention_factor", 1 + 0.1 * math.log(max(1, factor)))
    scaling = {field: given.get(field) for field in ROPE[rope_type]}
    default_theta = 2e6 if model_type == "smollm3" else 1e4
    needed = {field: hf.get(field) for field in SIZES} | scaling | {
        "rope_theta": rope.get("rope_theta", hf.get("rope_theta", default_theta)),
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6)}
    numbers = hf | dict.fromkeys(ROPE_NUMBERS) | {"sliding_window": window} | needed
    for field, (kinds, least, most) in RANGES.items():
        value, name = numbers.get(field), "whole number" if kinds is WHOLE else "number"
        require(type(value) in kinds and least <= value <= most
                or value is None and field not in needed,
                f"{where}: {field} must be a {name} from {least} to {most} (got {value!r:.60})")
    for field in TOKEN_IDS:
        ids = hf.get(field)
        for i in ids if isinstance(ids, list) else [ids]:
            require(i is None or type(i) is int,
                    f"{where}: {field} must be a token's id, a number (got {i!r:.60})")

    # A 0 marks a layer without rotary embedding. Only SmolLM3 has such layers, by default each
    # fourth one.
    n_layer, every = hf["num_hidden_layers"], hf.get("no_rope_layer_interval") or 4
    marks = hf.get("no_rope_layers") if model_type == "smollm3" else [1] * n_layer
    if marks is None:
        marks = [i % every for i in range(1, n_layer + 1)]
    marked = isinstance(marks, list) and {*map(type, marks)} == {int} and len(marks) >= n_layer
    n_head, width, bias = hf["num_attention_heads"], hf["hidden_size"], hf.get("attention_bias")
    n_kv_head = hf.get("num_key_value_heads") or n_head
    head_dim = hf.get("head_dim") or (128 if model_type == "qwen3" else width // n_head)
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
    for wrong, why in ((n_head % n_kv_head, f"{n_head} heads can't share {n_kv_head} key heads"),
                       (head_dim % 2 or not head_dim, f"head_dim {head_dim} is no even number"),
                       (not marked, f"no_rope_layers {marks!r:.50} has no 0 or 1 for each layer"),
                       (low >= high, "high_freq_factor must be above low_freq_factor")):
        require(not wrong, f"{where}: {why}; is it this model's config?")
    limits = {"sliding_window": None if layers == {"full_attention"} else window,
              "max_position_embeddings": (context or 2048) if rope_type == "dynamic" else None}
    return LlamaConfig(
        vocab_size=hf["vocab_size"], n_layer=n_layer, n_embd=width, n_head=n_head,
        n_kv_head=n_kv_head, head_dim=head_dim, intermediate_size=hf["intermediate_size"],
        norm_eps=needed["rms_norm_eps"], rope_theta=needed["rope_theta"],
        rope_scaling={"rope_type": rope_type} | scaling if scaling else None,
        max_position_embeddings=context or 2048,
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", model_type == "smollm3")),
        unrotated=tuple(i for i in range(n_layer) if not marks[i]),
        limits=tuple((field, n) for field, n in limits.items() if n),
        mlp_bias=bool(hf.get("mlp_bias")), qkv_bias=bool(bias) or model_type == "qwen2",
        o_bias=bool(bias) and model_type != "qwen2", qk_norm=model_type == "qwen3")


# -----------------------------------------------------------------------------
# the network


def compute_dtype(x):
    """The dtype that a matrix product of x runs in: autocast's if it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fast_bfloat16(device):
    """Whether matrix products are faster in bf16 than in fp32. On a CPU that computes bf16 neither
    in AVX-512 nor in AMX they take five to ten times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32. Returns the dtype in which the next matrix product
    runs, which saves a cast."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = x.float()   # squares in bf16 would lose too much
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(compute_dtype(x))


def frequencies(config, device):
    """-> (head_dim / 2,) fp32, the angle by which each pair of a head turns from token to token,
    and a factor on cos and sin, which is 1 but for YaRN.

    Where a model's context was stretched, angles are divided by `factor`. Linear scaling divides
    all. Llama 3 and YaRN leave those alone that turn often within the original context, divide
    those that turn seldom, and blend between: Llama 3 by the number of turns, YaRN by the place in
    the head, from where it turns beta_fast times to where it turns beta_slow times.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    freq = 1 / config.rope_theta ** exponent   # in this order, which gives transformers' bits
    scaling = config.rope_scaling or {"factor": 1}
    context = scaling.get("original_max_position_embeddings")
    alone = 0.0   # (head_dim / 2,) or one for all: 1 leaves an angle alone, 0 divides it
    if scaling.get("rope_type") == "llama3":
        turns = context * freq / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        alone = ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling.get("rope_type") == "yarn":
        start, end = (config.head_dim / 2 * math.log(
            context / (2 * math.pi * turns), config.rope_theta)
            for turns in (scaling["beta_fast"], scaling["beta_slow"]))
        start, end = max(math.floor(start), 0), min(math.ceil(end), config.head_dim - 1)
        place = torch.arange(len(freq), device=device)
        alone = 1 - ((place - start) / (end - start or 0.001)).clamp(0, 1)
    freq = alone * freq + (1 - alone) * freq / scaling["factor"]
    return freq, scaling.get("attention_factor", 1.0)


def rotary(positions, config):
    """Positions (B, T) -> cos and sin (B, T, 1, head_dim), fp32."""
    freq, size = frequencies(config, positions.device)
    angle = positions[:, :, None, None].float() * freq       # (B, T, 1, head_dim / 2)
    angle = torch.cat((angle, angle), dim=-1)                # both halves turn by the same angles
    return angle.cos() * size, angle.sin() * size


def rotate(x, cos, sin):
    """Turn each (i, i + head_dim/2) pair of x (B, T, heads, head_dim) by its position's angle."""
    x1, x2 = x.chunk(2, dim=-1)   # (B, T, heads, head_dim / 2) each
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


# Attention over packed trees. A preference pair is a tree, [prompt | response 1 | .. | response n]:
# the prompt is computed once, and every response continues it without seeing the others. A pack is
# such trees laid end to end (data.Pack). A token sees an earlier token of its own tree if that one
# is in the prompt (branch 0) or in its own response. README has the picture.


def tree_rule(tree, branch):
    """That rule as a function of batch, head, query and key index. tree, branch: (T,)."""
    def rule(b, h, q, k):
        return (tree[q] == tree[k]) & (k <= q) & ((branch[k] == 0) | (branch[k] == branch[q]))
    return rule


def tree_layout(pack):
    """What `attend` needs to know of a pack: a BlockMask for flex attention where the GPU can run
    that, elsewhere the pack itself."""
    device = pack.tokens.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return pack
    return block_mask(pack.tree, pack.branch)


def block_mask(tree, branch, size=128):
    """tree_rule as a BlockMask: which `size` queries see all, and which some, of `size` keys.

    The trees of a pack follow each other, and so do the branches of a tree, so the first and the
    last token of a block tell what lies between. create_block_mask would try all T x T pairs, and
    compiled, as its documentation advises, it takes minutes to compile (pytorch issue 182060).
    """
    T = len(tree)
    first = torch.arange(0, T, size, device=tree.device)                       # (blocks,)
    last = (first + size - 1).clamp(max=T - 1)
    first_tree, last_tree = tree[first], tree[last]
    first_branch, last_branch = branch[first], branch[last]
    # Now (blocks of queries, blocks of keys): [:, None] is of the queries.
    earlier, same = first < first[:, None], first == first[:, None]
    # A block of queries sees some of a block of keys if it begins in the tree in which they end,
    # and they have some of that tree's prompt, or end in the branch in which it begins.
    has_prompt = (first_tree != last_tree) | (first_branch == 0)
    some = earlier & (first_tree[:, None] == last_tree) & (
        has_prompt | (first_branch[:, None] == last_branch)) | same
    # It sees all of them if both are in one tree, and the keys are of its prompt, or the queries
    # end in branch 1 or before, or in the branch in which the keys begin.
    every = earlier & (last_tree[:, None] == first_tree) & (
        (last_branch == 0) | (last_branch[:, None] <= 1) | (last_branch[:, None] == first_branch))

    def ordered(blocks):   # -> how many blocks of keys a block of queries has, and these first
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(*ordered(some & ~every), *ordered(every), BLOCK_SIZE=size,
                                    mask_mod=tree_rule(tree, branch), seq_lengths=(T, T))


@lru_cache
def compiled(function, dynamic=None):
    """The compiled version of a function that only pays when compiled, made on first use."""
    return torch.compile(function, dynamic=dynamic)


# The queries and keys that a thread block of flex attention takes at a time, for heads of 64
# numbers in bf16. With its own choice for an H100, 128 x 128 in forward, a thread needs 1 kB of
# registers more than there are (assets/results.md, On a GPU).
TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64,
         "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "num_warps": 4}


def attend(q, k, v, layout):
    """Softmax attention: q (B, n_head, T, hd), k and v (B, n_kv_head, S, hd) -> (B, n_head, T, hd).

    layout says which keys a query sees, and with that how to compute it:
        a BlockMask    packed trees on a GPU; flex attention skips the blocks that nobody sees
        a Pack         packed trees elsewhere; a loop over the trees
        a bool tensor  a mask (B, 1, T, S) or (T, S), for generation and the branches of a tree
        None           a plain causal sequence
    """
    if isinstance(layout, BlockMask):
        flex = (flex_attention if torch.compiler.is_compiling() else
                compiled(flex_attention, dynamic=True))
        tiles = TILES if q.size(-1) == 64 and q.dtype == torch.bfloat16 else None
        return flex(q, k, v, block_mask=layout, enable_gqa=True, kernel_options=tiles)
    if layout is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if not isinstance(layout, torch.Tensor):
        return tree_attention(q, k, v, layout)
    if q.is_cuda:
        # cuDNN would make a new plan for every length, and lengths grow with every token
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, layout)
    return F.scaled_dot_product_attention(q, k, v, layout, enable_gqa=True)


@torch.compiler.disable   # every pack has other tree lengths, so each would trigger a recompilation
def tree_attention(q, k, v, pack):
    """The tree rule without a T x T mask, for a Pack of trees.

    Within a tree, prompt + response 1 is a causal sequence. So is every further response behind the
    prompt, whose queries need not be computed again.
    """
    outputs, trees = [], pack.trees   # [prompt, response 1, .., response n] tokens of each
    by_tree = (x.split([sum(tree) for tree in trees], dim=2) for x in (q, k, v))
    for (prompt, first, *rest), *qkv in zip(trees, *by_tree):
        # stem: q, k and v of the prompt and response 1; branches: of each further response
        stem, *branches = zip(*(x.split([prompt + first, *rest], dim=2) for x in qkv))
        outputs.append(attend(*stem, None))
        prompt_k, prompt_v = (x[:, :, :prompt] for x in stem[1:])
        for q_i, k_i, v_i in branches:
            T = q_i.size(2)
            seen = torch.ones(T, prompt + T, dtype=torch.bool, device=q.device).tril(prompt)
            outputs.append(attend(q_i, torch.cat((prompt_k, k_i), dim=2),
                                  torch.cat((prompt_v, v_i), dim=2), seen))
    return torch.cat(outputs, dim=2)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config):
        super().__init__()
        q_dim, kv_dim = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.n_embd, bias=config.o_bias)
        head_norm = RMSNorm if config.qk_norm else nn.Identity   # which ignores its arguments
        self.q_norm = head_norm(config.head_dim, config.norm_eps)
        self.k_norm = head_norm(config.head_dim, config.norm_eps)

    def forward(self, x, rope, layout, cache=None):
        B, T, C = x.shape
        hd = rope[0].size(-1)   # head_dim
        q = self.q_norm(self.q_proj(x).view(B, T, -1, hd))                 # (B, T, n_head, hd)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, hd))                 # (B, T, n_kv_head, hd)
        v = self.v_proj(x).view(B, T, -1, hd)
        # rotated before the transpose: on a GPU that takes two kernels fewer in backward
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, *rope), rotate(k, *rope), v))
        if cache is not None:   # generation keeps the keys and values of earlier tokens
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        y = attend(q, k, v, layout)                                        # (B, n_head, T, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, layout, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, layout, cache)   # mixes tokens
        return x + self.mlp(self.post_attention_layernorm(x))                  # one at a time


class Llama(nn.Module):
    """The decoder. `forward` scores a pack; `logits` and `generate` take plain sequences."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm=RMSNorm(config.n_embd, config.norm_eps)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        """(V, C). With tied embeddings the head is the embedding."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def compile_blocks(self):
        """torch.compile every block. They are alike, so one compilation serves all of them, and
        packs of any length: two in all, with a gradient and without one. Adapters and dropout take
        some more."""
        torch._dynamo.config.optimize_ddp = False   # it would split blocks at DDP's buckets
        torch._dynamo.config.recompile_limit = 16
        for block in self.model.layers:
            block.compile(dynamic=True)

    def hidden(self, tokens, positions, layout, caches=None):
        """tokens, positions (B, T) -> final hidden states (B, T, C)."""
        if self.config.limits:                     # few have one, and here the CPU waits for a GPU
            self.config.check_length(int(positions.max()) + 1)
        turned = rotary(positions, self.config)    # the same in all blocks, but for SmolLM3
        still = ()                                 # what turns nothing
        if self.config.unrotated:
            still = torch.ones_like(turned[0]), torch.zeros_like(turned[1])
        for x in (*turned, *still):   # else compiled blocks treat head_dim as a size that changes
            torch._dynamo.mark_static(x, 3)
        x = self.model.embed_tokens(tokens)        # (B, T, C)
        for i, block in enumerate(self.model.layers):
            rope = still if i in self.config.unrotated else turned
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, layout, use_reentrant=False)
            else:
                x = block(x, rope, layout, caches[i] if caches else None)
        return self.model.norm(x)

    def forward(self, pack, also=None):
        """A data.Pack -> log pi of each response token, and what `also` makes of its hidden state,
        the head and that token (token_entropy, token_misses), or None: (R,) fp32 each.

        Only the R hidden states that predict a response token meet the vocabulary.
        """
        x = self.hidden(pack.tokens, pack.positions, tree_layout(pack))
        x = x[0, pack.predict_from]                                        # (R, C)
        per_token_logps = TokenLogProbs.apply(x, self.head_weight, pack.targets)
        return per_token_logps, also(x, self.head_weight, pack.targets) if also else None

    def logits(self, tokens):
        """Plain causal sequences (B, T) -> logits (B, T, V)."""
        positions = torch.arange(tokens.size(1), device=tokens.device).expand(tokens.shape)
        return F.linear(self.hidden(tokens, positions, None), self.head_weight)   # None: causal

    @torch.compiler.set_stance("force_eager")   # the length changes with every token
    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
                 stop_ids=(), seed=None):
        """Continue each prompt (a list of token ids) -> list of lists of new ids, stop id included.

        temperature 0 takes the likeliest token; top_k 0 and top_p 1 keep the whole distribution.
        Prompts of different lengths are padded on the left and masked, so that a prompt's
        likeliest answer does not depend on its neighbours. Raises UserError beyond the context.
        """
        longest = max(map(len, prompts))
        self.config.check_length(longest + max_new_tokens)
        was_training = self.training
        self.eval()
        device = self.head_weight.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        pad = torch.tensor([longest - len(p) for p in prompts], device=device)[:, None]
        tokens = [[0] * (longest - len(p)) + list(p) for p in prompts]
        tokens = torch.tensor(tokens, device=device)                                # (B, T)
        stop = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        caches, new = [[] for _ in self.model.layers], []      # keys and values; tokens so far
        slots = torch.arange(longest + max_new_tokens, device=device)
        first, last = 0, longest   # the slots that this pass computes: the prompt, then one token
        while True:
            q, k = slots[first:last, None], slots[None, :last]
            # a token sees what lies between the padding and itself; padding sees only itself
            mask = (k == q) | ((k <= q) & (k >= pad[:, None]))                      # (B, T, S)
            positions = (slots[None, first:last] - pad).clamp(min=0)
            x = self.hidden(tokens, positions, mask[:, None], caches)[:, -1]
            logits = F.linear(x, self.head_weight).float()
            token = sample(logits, temperature, top_k, top_p, generator)            # (B,)
            new.append(token)
            done |= torch.isin(token, stop)
            if done.all() or len(new) == max_new_tokens:   # the longest answer decides
                break
            tokens, first, last = token[:, None], last, last + 1
        self.train(was_training)
        answers = torch.stack(new, dim=1).tolist()
        ends = [next((n for n, i in enumerate(ids, 1) if i in stop_ids), None) for ids in answers]
        return [ids[:end] for ids, end in zip(answers, ends)]


def sample(logits, temperature, top_k, top_p, generator=None):
    """logits (B, V) -> token ids (B,)."""
    if temperature < 1e-6:   # greedy
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:   # the smallest set of likeliest tokens whose probability reaches top_p
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        outside[:, 0] = False   # also where top_p is so small that it is 0 in fp32
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# -----------------------------------------------------------------------------
# log-probabilities without the logits
#
# The logits of all response tokens at once would be the largest tensor of a step. So tokens meet
# the vocabulary in chunks, and backward computes the logits of a chunk again.

CHUNK_LOGITS = {"cpu": 2 ** 26, "cuda": 2 ** 29}   # logits of a chunk, in the products' dtype
CACHED_LOGITS = 2 ** 20                            # so many fp32 logits stay in a CPU's cache


def chunks(x, weight):
    """Slices of x (R, C) whose logits with weight (V, C) are few enough to be held."""
    n = max(1, CHUNK_LOGITS.get(x.device.type, 2 ** 25) // weight.size(0))
    return [slice(i, i + n) for i in range(0, len(x), n)]


def chunk_logps(logits, targets):
    """logits (N, V) -> (N, 2) fp32: log softmax(logits)[targets], and the log-sum-exp.

    As gather minus log-sum-exp, because log_softmax in fp32 on a CPU is off by up to 1e-5 nats a
    token, always in one direction.
    """
    logits = logits.float()
    lse = logits.logsumexp(-1)                                 # (N,)
    return torch.stack((logits.gather(-1, targets[:, None])[:, 0] - lse, lse), dim=-1)


def chunk_grad(logits, targets, lse, d_logps):
    """Overwrites logits with d loss / d logits = d_logps (onehot(targets) - softmax(logits))."""
    grad = (logits.float() - lse[:, None]).exp() * -d_logps[:, None]
    if logits.is_cuda:   # one kernel; scatter_add_ would need the fp32 gradient in memory
        hit = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
        grad = torch.where(hit, grad + d_logps[:, None], grad)
    else:
        grad.scatter_add_(-1, targets[:, None], d_logps[:, None])
    logits.copy_(grad)


def memory_bound(function, logits, *columns):
    """function(logits, *columns), whose speed is bound by memory, not arithmetic. A GPU runs it
    compiled, so that the logits are read twice and not ten times. A CPU takes a few tokens at a
    time, so that the intermediate results stay in its cache."""
    if logits.is_cuda:
        return compiled(function)(logits, *columns)
    n = max(1, CACHED_LOGITS // logits.size(1))
    parts = zip(logits.split(n), *(column.split(n) for column in columns))
    found = [function(*part) for part in parts]
    return None if found[0] is None else torch.cat(found)


class TokenLogProbs(torch.autograd.Function):
    """Log-probs (R,) fp32 of `targets` (R,) under hidden states x (R, C) and head weight (V, C).

    Forward keeps one number a token, the log-sum-exp, and the logits of the last chunk, with which
    backward begins. In a small step that is the only chunk, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        dtype = compute_dtype(x)
        w, found, logits = weight.to(dtype), x.new_empty(len(x), 2, dtype=torch.float32), None
        with torch.autocast(x.device.type, enabled=False):
            for s in chunks(x, weight):
                logits = None   # frees the last chunk's before this one's are computed
                logits = F.linear(x[s].to(dtype), w)
                found[s] = memory_bound(chunk_logps, logits, targets[s])
        logps, lse = (column.clone() for column in found.T)
        ctx.save_for_backward(x, w, targets, lse)
        ctx.last_logits, ctx.weight_dtype = logits, weight.dtype
        return logps

    @staticmethod
    def backward(ctx, d_logps):
        x, w, targets, lse = ctx.saved_tensors
        dx, dw = torch.zeros_like(x), None   # dw stays None where the head is frozen
        logits, ctx.last_logits = ctx.last_logits, None
        for s in reversed(chunks(x, w)):
            xs = x[s].to(w.dtype)
            logits = F.linear(xs, w) if logits is None else logits
            memory_bound(chunk_grad, logits, targets[s], lse[s], d_logps[s])
            dx[s] = logits @ w            # logits hold their own gradient now
            if ctx.needs_input_grad[1]:   # summed over the chunks in fp32
                part = logits.T @ xs
                dw = part.float() if dw is None else dw.add_(part)
            logits = None
        if ctx.needs_input_grad[1]:
            dw = (torch.zeros_like(w) if dw is None else dw).to(ctx.weight_dtype)
        return dx, dw, None


def token_entropy(x, weight, targets=None):
    """Entropy in nats (R,) fp32 of the next-token distributions of hidden states x (R, C), whatever
    the targets."""
    def chunk_entropy(xs):
        logps = F.linear(xs, weight).float().log_softmax(-1)
        return -(logps.exp() * logps).sum(-1)
    found = [checkpoint(chunk_entropy, x[s], use_reentrant=False) for s in chunks(x, weight)]
    return torch.cat([x.new_zeros(0, dtype=torch.float32), *found])


def token_misses(x, weight, targets):
    """1 where the likeliest token is not the target (R,), else 0, of hidden states x (R, C)."""
    found = [F.linear(x[s], weight).argmax(-1) != targets[s] for s in chunks(x, weight)]
    return torch.cat([targets[:0], *found]).float()


# -----------------------------------------------------------------------------
# LoRA


class LoRALinear(nn.Module):
    """A frozen linear layer plus (alpha / rank) B A x, where A and B train in fp32.

    B starts at zero, so that the layer starts as its base. With `enabled` off it is its base again:
    that is the reference policy, which costs no memory this way.
    """
    enabled = True

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        self.init_adapter()

    @torch.no_grad()
    def init_adapter(self):
        A = torch.empty(self.lora_A.weight.shape, device=self.lora_A.weight.device)
        fill(self.lora_A.weight, nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.enabled:
            A, B = self.lora_A.weight.to(y.dtype), self.lora_B.weight.to(y.dtype)
            low = F.linear(F.dropout(x, self.dropout, self.training), A)
            y = y + F.linear(low * (self.alpha / self.rank), B)
        return y

    def merged_weight(self):
        weight, A, B = (whole(layer.weight).cpu()   # a GPU might use TF32
                        for layer in (self, self.lora_A, self.lora_B))
        return weight.float() + self.alpha / self.rank * (B @ A)


def add_lora(model, rank, alpha, dropout, targets):
    """Freeze the model, and put adapters on those linear layers of its blocks."""
    model.requires_grad_(False)
    layers = [(parent, name, child) for parent in model.model.layers.modules()
              for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    names = sorted({name for _, name, _ in layers})
    require(targets and set(targets) <= set(names),
            f"lora_targets: a block has {', '.join(names)} (got {', '.join(targets)})")
    width = model.config.n_embd
    require(rank <= width, f"lora_rank: {rank} is more than the model's width, {width}; lower it")
    for parent, name, child in layers:
        if name in targets:
            setattr(parent, name, LoRALinear(child, rank, alpha, dropout))


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def adapters_off(model):
    """Inside the with block the model is what it was before LoRA."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


# -----------------------------------------------------------------------------
# sharding


def shard(model, device_type, param_dtype=None):
    """FSDP2: every rank keeps its part of each weight, gradient and optimizer state, and a block is
    gathered (in param_dtype) when it is its turn. All ranks call it, before load_weights."""
    from torch.distributed import fsdp
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32,
        cast_forward_inputs=False)   # casting would copy the KV cache and round rotary angles
    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
    fsdp.register_fsdp_forward_method(model, "generate")


def fill(parameter, tensor):
    """Copy a tensor that every rank has into a parameter. A sharded one takes its part."""
    if isinstance(parameter, DTensor):
        tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh,
                                   parameter.placements, src_data_rank=None)
    parameter.copy_(tensor)


def whole(tensor):
    """The tensor, put together on every rank if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# -----------------------------------------------------------------------------
# weights on disk: reading

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"   # where transformers 5 keeps it
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
                   "chat_template.jinja", TOOL_TEMPLATE)
CONFIGS = "config.json", "adapter_config.json"   # by which a folder is opened
MODEL_FILES = (*CONFIGS, "generation_config.json", *TOKENIZER_FILES)
WEIGHT_FILES = [f"{stem}{end}" for stem in ("model", "adapter_model") for end in (
    ".safetensors", ".safetensors.index.json", "-*-of-*.safetensors", "_*-of-*.safetensors",
    ".safetensors-*-of-*.safetensors")]   # as the hub has them
ON_A_BASE = {}   # the folders that on_its_base made; each goes when the program ends


def model_files(folder):
    """Names of a folder's files that a program may read when it opens a model there."""
    found = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if os.path.lexists(os.path.join(folder, TOOL_TEMPLATE)):
        found.append(TOOL_TEMPLATE)
    return [file for file in found if file in MODEL_FILES
            or file.endswith((".safetensors", ".safetensors.index.json"))]


def checkpoint_folder(name, weights=True, base_of=""):
    """A folder or hub id -> the folder to read the model from. Of a hub id, owner/name or
    owner/name@revision, the needed files are downloaded. Of a LoRA adapter it is what `on_its_base`
    makes of it.

    weights: whether the weights are needed too. base_of: the adapter_config.json that names it.
    """
    folder, where = os.path.expanduser(name), f"{base_of}: base model " if base_of else ""
    if folder in ON_A_BASE:
        return folder
    if not os.path.isdir(folder):
        require(re.fullmatch(r"\w[\w.-]*/[\w.-]+(@.+)?", name),
                f"{where}{name:.80}: no such folder; give a model's folder or a hub id")
        repo, _, revision = name.partition("@")
        from huggingface_hub import snapshot_download
        try:
            folder = snapshot_download(
                repo, revision=revision or None, allow_patterns=[
                    *MODEL_FILES, "train_config.json", *(WEIGHT_FILES if weights else [])])
        except Exception as e:
            named = f", which {base_of} names as its base" if base_of else ""
            raise UserError(f"{name}: no such folder here{named}, and the hub can't be reached or "
                            f"refuses ({type(e).__name__}: {first_line(e)}); is the name right? A "
                            "gated model asks you to accept its licence at huggingface.co/"
                            f"{repo}, then to run `hf auth login`") from e
    check_files(folder)
    begun = read_run_settings(folder)
    require(not begun or begun.get("finished"), f"{where}{name}: a run that isn't finished, so its "
            "model isn't there yet, at most that of an earlier run; its command with --resume=True "
            "goes on")
    has = {*CONFIGS} & {*model_files(folder)}
    require(has, f"{where}{name}: no config.json; give the folder of a model in Hugging Face's "
            "layout, in which it lies beside the weights")
    adapter = "adapter_config.json" in has
    require(not (adapter and base_of), f"{base_of}: its base is an adapter too; merge that one")
    return on_its_base(folder, weights) if adapter else folder


def check_files(folder):
    """UserError unless the model's files are files, and lie in the folder. A link that leaves it
    could bring a private file into an export. The hub's cache may have its links, from
    snapshots/REVISION/x to blobs/y."""
    here = os.path.realpath(folder)
    cache, parent = os.path.split(os.path.dirname(here))
    blobs = os.path.join(cache, "blobs") if parent == "snapshots" else here
    for file in model_files(folder):
        path = os.path.join(folder, file)
        require(os.path.isfile(path), f"{path}: not a file; put the model's there")
        there = os.path.dirname(os.path.realpath(path))
        require(there == blobs or os.path.commonpath([here, there]) == here, f"{path}: a link to "
                "another folder, which may be private; copy the file, or link the whole folder")


# Fields of adapter_config.json with which an adapter is (alpha / rank) B A, or tensors that replace
# the base's. With any other field that is set it may be more.
LORA_FIELDS = """auto_mapping base_model_name_or_path bias eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save
    peft_version qalora_group_size r rank_pattern revision runtime_config target_modules
    task_type""".split()
LORA_VALUES = {"peft_type": ("LORA",), "use_rslora": (True, False, None), "init_lora_weights":
               (True, False, None, "gaussian", "eva", "orthogonal")}   # others change the base


def on_its_base(adapter, weights):
    """The folder of a LoRA adapter, as peft writes it -> a folder of links to it, to its base's
    files and to its own tokenizer's. `load_weights` merges the adapter there."""
    path = os.path.join(adapter, "adapter_config.json")
    config = read_json(path)
    for field, value in config.items():
        supported = not value or field in LORA_FIELDS
        if field in LORA_VALUES:
            supported = value in LORA_VALUES[field]
        require(supported,
                f"{path}: {field} {value!r:.60} is not supported; merge the adapter in peft")
    alpha, revision = config.get("lora_alpha"), config.get("revision")
    require(type(alpha) in NUMBER and 0 < alpha < 1e12,
            f"{path}: lora_alpha must be a number above 0 (got {alpha!r:.60})")
    name = str(config.get("base_model_name_or_path"))
    at = f"@{revision}" if revision and not os.path.isdir(name) else ""
    base = checkpoint_folder(name + at, weights, base_of=path)
    # A tokenizer's files belong together, so an adapter's replace those of the base. But some
    # adapters have them without tokenizer.json, or a template alone.
    own = model_files(adapter)
    brings_tokenizer = {*own} & ({*TOKENIZER_FILES} - {"chat_template.jinja"})
    sources = {file: base for file in model_files(base) if not brings_tokenizer
               or file == "tokenizer.json" or file not in TOKENIZER_FILES}
    sources |= {file: adapter for file in own
                if file in TOKENIZER_FILES or file.startswith("adapter_")}
    if begun := read_run_settings(adapter):   # the run that made it
        sources["train_config.json"] = adapter
        require(not weights or begun.get("init_from_sha256") in (None, weights_fingerprint(base)),
                f"{adapter}: its base, {base}, has changed since the run started from it; bring "
                "that one back")
    with writing("TMPDIR, a folder for temporary files"):   # where the system's error names none
        made = tempfile.TemporaryDirectory(prefix=f"{os.path.basename(os.path.abspath(adapter))}-")
    for file, source in sources.items():
        link, there = os.path.join(made.name, file), os.path.join(source, file)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(os.path.abspath(there), link)
        BEHIND[link] = there
    ON_A_BASE[made.name], BEHIND[made.name] = made, adapter   # the folder last: it begins all links
    return made.name


def files_beside_weights(folder):
    """{name: content} of a model's tokenizer and generation_config.json."""
    return {file: Path(folder, file).read_bytes() for file in model_files(folder)
            if file in (*TOKENIZER_FILES, "generation_config.json")}


def read_config(folder):
    return read_json(os.path.join(folder, "config.json"))


def find_adapter(folder):
    """`find_tensors` and adapter_config.json of a folder's adapter; {} and {} if it has none."""
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(path):
        return {}, {}
    return find_tensors(folder, "adapter_model"), read_json(path)


def merge(weight, name, adapter, config):
    """A weight of the base as the adapter changes it. The tensors that did so are removed from
    `adapter`, where in the end none may be left."""
    parts, layer = [adapter.pop(name, weight)], name.removesuffix(".weight")
    if f"{layer}.lora_A.weight" in adapter:
        A, B = (adapter.pop(f"{layer}.lora_{x}.weight").float() for x in "AB")
        if not config.get("rank_pattern") and len(A) != config.get("r", len(A)):
            raise ValueError(f"rank {len(A)}, but adapter_config.json has r = {config['r']!r:.20}")
        rank = math.sqrt(len(A)) if config.get("use_rslora") else len(A)
        parts.append(config["lora_alpha"] / rank * (B @ A))   # fp32, as the sum will be
        if not all_finite(parts[1]):
            raise ValueError("NaN or infinite")
    for part in parts:   # else addition would broadcast some that don't fit
        if part.shape != weight.shape:
            raise ValueError(f"shape {tuple(part.shape)}, not {tuple(weight.shape)}, as of a "
                             "vocabulary that was resized: merge it in peft")
    return parts[0] + parts[1] if len(parts) > 1 else parts[0]


def find_tensors(folder, stem="model"):
    """{tensor name: (its safetensors file, its dtype there, its shape)}.

    Headers are read here because the library keeps one of two tensors of a name without a word.
    Where there is one file and an index of shards beside it, the one file counts, as everywhere.
    """
    shards = [f"{stem}.safetensors"]
    index = os.path.join(folder, f"{stem}.safetensors.index.json")
    if not os.path.exists(os.path.join(folder, shards[0])):
        require(os.path.exists(index),
                f"{folder}: no {stem}.safetensors and no index of shards; is this a Hugging Face "
                "checkpoint? (A dry run downloads none. Of .bin files: open it in transformers or "
                "peft, and save_pretrained)")
        with reading(index, "an index of shards"):
            shards = sorted(map(os.fspath, set(read_json(index)["weight_map"].values())))
    found = {}
    for shard in shards:
        path = os.path.join(folder, shard)
        require(os.path.basename(shard) == shard and shard.endswith(".safetensors"),
                f"{index}: shard {json.dumps(shard):.60} is outside the model folder; refusing")
        require(os.path.exists(path), f"{path}: missing, but the index names it; download it")
        check_file(path)
        with open(path, "rb") as f, reading(path, "a complete safetensors file"):
            head = f.read(8)
            size = int.from_bytes(head, "little")
            require(0 < size < 100_000_000, f"{path}: not a safetensors file; download it again")
            for name, fields in json.loads(f.read(size), object_pairs_hook=list):
                if name == "__metadata__":
                    continue
                require(name not in found, f"{path}: tensor {name!r:.80} appears twice")
                entry = dict(fields)
                found[name] = path, entry["dtype"], tuple(entry["shape"])
                require(entry["dtype"] in ("F64", "F32", "F16", "BF16"),
                        f"{path}: {name!r:.80} is {entry['dtype']!r:.60}; quantized weights are "
                        "not supported, use the bf16 checkpoint")
    return found


def read_tensor(path, name):
    with reading(path, "a complete safetensors file"), safe_open(path, framework="pt") as f:
        return f.get_tensor(name)


def weights_fingerprint(folder):
    """A sha256 of all that makes the model, wherever it lies: config.json and every byte of every
    tensor, with its name, dtype and shape; an adapter's too. It takes about a second a GB."""
    adapter, settings = find_adapter(folder)
    about = [read_config(folder), settings.get("lora_alpha"), settings.get("use_rslora")]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, (path, *kind) in sorted((find_tensors(folder) | adapter).items()):
        digest.update(f"{name} {kind}".encode("utf-8", "replace"))
        digest.update(read_tensor(path, name).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def last_written(folder):
    """When each of a model's files was written, which tells whether they change meanwhile."""
    return [(file, os.stat(os.path.join(folder, file)).st_mtime_ns) for file in model_files(folder)]


def build(folder, dtype):
    """The network of a checkpoint in `dtype`, on the meta device (shapes, but no memory yet), and
    its config.json as a dict."""
    hf_config, path = read_config(folder), os.path.join(folder, "config.json")
    config = config_from_dict(hf_config, path)
    with torch.device("meta"), reading(path, "the config of a model that can be built"):
        return Llama(config).to(dtype), hf_config


@torch.no_grad()
def load_weights(model, folder, device, in_bf16=False):
    """Give a model that `build` made its memory on `device` and fill it from safetensors, with the
    folder's adapter merged in if it has one.

    Strict: every tensor of the model exactly once, of the right shape, finite, and none besides;
    else UserError says what is wrong where. The weights are never in memory twice. in_bf16: whether
    products will be in bf16. They would round fp32 weights to the nearest, so these are `rounded`
    here.
    """
    found = {name: entry for name, entry in find_tensors(folder).items()
             if not name.endswith("rotary_emb.inv_freq")}   # old Llamas saved it; it is computed
    tied = model.config.tie_word_embeddings
    second_head = found.pop("lm_head.weight", None) if tied else None   # a copy of embed_tokens
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "lora_" not in n}
    for what, names in (("missing", shapes.keys() - found.keys()),
                        ("unexpected", found.keys() - shapes.keys())):
        require(not names, f"{folder}: {what} tensor {min(names, default='')!r:.80} ({len(names)} "
                f"of {len(shapes)}); wrong config.json?")
    for name, (path, _, shape) in found.items():
        require(shape == shapes[name], f"{path}: {name} has shape {shape!s:.80}, config.json asks "
                f"for {shapes[name]}")
    model.to_empty(device=device)   # not before it is known to be as large as the files say
    parameters = dict(model.named_parameters())
    dtype = torch.bfloat16 if in_bf16 else model.head_weight.dtype
    adapter, settings = find_adapter(folder)
    adapter = {name.removeprefix("base_model.model.").replace(".base_layer.", "."):   # peft's
               read_tensor(path, name) for name, (path, *_) in adapter.items()}
    for name, (path, *_) in found.items():
        p, tensor = parameters[name], read_tensor(path, name)
        if not (tied and p is model.head_weight):   # an adapter of that is refused below
            with reading(f"{folder}: the adapter's part of {name}", "one for this base"):
                tensor = merge(tensor, name, adapter, settings)
        cast = rounded(tensor, dtype, name)
        require(all_finite(tensor) and (cast is tensor or all_finite(cast)),
                f"{path}: {name} holds NaN or infinite values in {dtype}; refusing")
        fill(p, cast)
    if second_head:
        p, tensor = model.head_weight, read_tensor(second_head[0], "lm_head.weight")
        cast = rounded(tensor, dtype, "model.embed_tokens.weight").to(p.device, p.dtype)
        require(cast.equal(whole(p)), f"{folder}: lm_head.weight differs from embed_tokens.weight, "
                "but config.json ties them; set tie_word_embeddings to false")
    require(not adapter, f"{folder}: the adapter's {min(adapter, default='')!r:.80} fits no weight "
            "of its base, or one that is tied; merge the adapter in peft")
    for layer in lora_layers(model).values():
        layer.init_adapter()


def all_finite(tensor):
    # several times as fast as tensor.isfinite().all(), which makes large tensors on its way
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


@torch.no_grad()
def looks_untrained(model, token, others):
    """Whether the head's row of a token is that of one of these other tokens, within 1%, as in base
    models that have special tokens which nothing was trained on. Every rank calls it."""
    head = whole(model.head_weight)
    row, rows = (head[i].float() for i in (
        token, [i for i in others if i != token and i < len(head)]))
    return bool(((rows - row).norm(dim=-1) <= 0.01 * row.norm()).any())


def from_pretrained(name, device="cpu", dtype=torch.float32):
    """A folder or hub id -> (Llama on `device` in `dtype`, config.json as a dict)."""
    folder = checkpoint_folder(name)
    model, hf_config = build(folder, dtype)
    load_weights(model, folder, device)
    return model, hf_config


# -----------------------------------------------------------------------------
# weights on disk: the result of a run

EXPORTED = "exported_files.json"   # in an export's folder, the names of its files


@torch.no_grad()
def export(model, folder, hf_config, files={}, dtype=torch.bfloat16, adapter_of=None,
           chat_template=None, stop_ids=(), in_bf16=False, max_shard_bytes=5 * 1000 ** 3):
    """Write a folder that transformers and llama.cpp's converter open, with LoRA merged.

    hf_config, files: the start checkpoint's config.json, and its `files_beside_weights`.
    adapter_of: the base model's name; the LoRA adapters are then written alone, for
    peft.PeftModel.from_pretrained. chat_template: the text trained with. stop_ids: what ends a
    turn, for generation_config.json and config.json. in_bf16: whether products were in bf16. They
    saw weights rounded to the nearest bf16 number, so all are written as such, norms and embeddings
    too, whatever dtype is. A matrix that an adapter is merged into is not, since products saw the
    two apart.

    Every rank calls it, since a sharded tensor is put together by all; the first rank writes. Files
    are written into a folder of their own, then moved, so that each is whole or not there.
    """
    layers, state = lora_layers(model), model.state_dict()
    ends = sorted(stop_ids) if len(stop_ids) > 1 else max(stop_ids, default=None)
    kind = "adapter_" if adapter_of else ""
    if adapter_of:
        dtype, config = torch.float32, adapter_config(layers, adapter_of)
        tensors = {f"base_model.model.{n}": p for n, p in state.items() if "lora_" in n}
    else:
        name = str(dtype).removeprefix("torch.")
        config = hf_config | {"dtype": name, "torch_dtype": name, "architectures":
                              [ARCHITECTURES[hf_config["model_type"]]]}
        config.pop("auto_map", None)   # it names files of code, which an export leaves out
        rope = hf_config.get("rope_parameters")
        if rope and not hf_config.get("rope_scaling"):   # older readers look for these two
            config |= {"rope_theta": model.config.rope_theta, "rope_scaling": None}
            if rope.get("rope_type", "default") != "default":
                config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if stop_ids:
            config["eos_token_id"] = ends
        tensors = {n: p for n, p in state.items() if "lora_" not in n}
    shards = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda p: p.numel() * dtype.itemsize,
        filename_pattern=kind + "model{suffix}.safetensors", max_shard_size=max_shard_bytes)
    write, temporary = rank_and_size()[0] == 0, os.path.join(folder, "export.tmp")
    if write:
        shutil.rmtree(temporary, ignore_errors=True)   # of an export that was killed
        os.makedirs(temporary)
    for file, names in shards.filename_to_tensors.items():
        shard = {}
        for name in names:
            layer = layers.get(name.removesuffix(".weight"))
            tensor = layer.merged_weight() if layer else whole(tensors[name])
            if write:
                tensor = tensor.bfloat16() if in_bf16 and not layer else tensor
                shard[name] = rounded(tensor.cpu(), dtype, name)
                require(all_finite(shard[name]), f"{folder}: {name} is not finite in {dtype}; use "
                        "--export_dtype=float32, from a checkpoint if there is one")
        if write:
            try:
                save_file(shard, os.path.join(temporary, file), {"format": "pt"})
            except SafetensorError as e:
                shutil.rmtree(temporary)
                raise UserError(f"{os.path.join(folder, file)}: not written ({first_line(e)}); "
                                "if the disk is full, free space") from e
    if not write:
        return
    write_json(os.path.join(temporary, f"{kind}config.json"), config)
    if shards.is_sharded:
        write_json(os.path.join(temporary, f"{kind}model.safetensors.index.json"),
                   {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    for file, content in files.items():
        with writing(os.path.join(folder, file)):
            Path(temporary, file).parent.mkdir(exist_ok=True)
            Path(temporary, file).write_bytes(content)
    path, generation = os.path.join(temporary, "generation_config.json"), {}
    if os.path.exists(path):   # it was one of `files`
        generation = read_json(path)
    elif not adapter_of:
        generation = {k: hf_config[k] for k in TOKEN_IDS if hf_config.get(k) is not None}
    if stop_ids:
        generation["eos_token_id"] = ends
    write_json(path, generation)
    if chat_template is not None:
        write_template(temporary, chat_template)
    keep_ids(temporary)
    replace_export(folder, temporary)


def write_template(folder, chat_template):
    """Make this the template of a folder, and the only one, but for one for tools that the folder
    has beside it. transformers reads chat_template.jinja, llama.cpp the one in
    tokenizer_config.json, which may also list several by name."""
    jinja = os.path.join(folder, "chat_template.jinja")
    path = os.path.join(folder, "tokenizer_config.json")
    config = read_json(path) if os.path.exists(path) else {}
    had, for_tools = config.get("chat_template"), Path(folder, TOOL_TEMPLATE)
    if for_tools.exists():   # this and a chat_template.jinja that is unchanged become a list
        if os.path.exists(jinja) and Path(jinja).read_text("utf-8") == chat_template:
            had = [{"name": "default", "template": chat_template},
                   {"name": "tool_use", "template": for_tools.read_text("utf-8")}]
            write_json(path, config | {"chat_template": had})
            os.remove(jinja)
        shutil.rmtree(for_tools.parent)
    same = had == chat_template
    if isinstance(had, list):
        same = {"name": "default", "template": chat_template} in had
    if not same or os.path.exists(jinja):
        write_text(jinja, chat_template)
    if had and not same:
        write_json(path, config | {"chat_template": chat_template})


def keep_ids(folder):
    """Have transformers take all of tokenizer.json, as this project does. Most tokenizer classes of
    transformers 5 take the vocabulary alone: GPT2Tokenizer, which SmolLM2 names, would no longer
    cut digits apart, and LlamaTokenizer puts SentencePiece's spaces where a flag, `legacy`, says.
    What else such a class does stays. (TokenizersBackend does what is wanted, but transformers 4
    doesn't know it.)"""
    path = os.path.join(folder, "tokenizer_config.json")
    tokenizer = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path) and os.path.exists(tokenizer):
        config, spec = read_json(path), read_json(tokenizer)
        if isinstance(config.get("extra_special_tokens"), list):   # which is new in 5, too
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
            write_json(path, config)
        name = str(config.get("tokenizer_class") or "Llama")
        steps = f"{spec.get('normalizer')} {spec.get('pre_tokenizer')}"
        differs = not re.match("PreTrained|Qwen2", name)
        if "Llama" in name:   # this class takes all of a byte-level tokenizer.json
            differs = re.search("Prepend|Metaspace", steps)
        if differs:
            write_json(path, {"padding_side": "left" if "Llama" in name else "right",
                              "model_input_names": ["input_ids", "attention_mask"]} | config | {
                                  "tokenizer_class": "PreTrainedTokenizerFast"})


def replace_export(folder, temporary):
    """Move the files of an export to where they belong. Those of an earlier export go, and no
    others. While they change places there is no config.json, so that the folder never opens with a
    part of each."""
    record, old, new = os.path.join(folder, EXPORTED), exported_files(folder), os.listdir(temporary)
    write_json(record, {"files": sorted(old.union(new))})
    for file in sorted(old, key=lambda file: file not in CONFIGS):
        os.remove(os.path.join(folder, file))
    for file in sorted(new, key=lambda file: file in CONFIGS):
        publish(os.path.join(temporary, file), os.path.join(folder, file))
    write_json(record, {"files": sorted(new)})
    os.rmdir(temporary)


def exported_files(folder):
    """The names of the files in a folder that an export wrote there."""
    path = os.path.join(folder, EXPORTED)
    if not os.path.exists(path):
        return set()
    with reading(path, "an export's list of files"):
        return {file for file in {*read_json(path)["files"]} & {*model_files(folder)}
                if os.path.isfile(os.path.join(folder, file))}


def rounded(tensor, dtype, name):
    """The tensor in dtype. Where that is bf16, a number goes up or down at random, more often to
    the nearer one, so that the mean is kept. What training adds to a weight is mostly less than
    half the gap between two bf16 numbers, so rounding to the nearest would take it away again
    (assets/results.md). This is done where weights are written, and where they are read: of an fp32
    file, or the sum of a base and its adapter. The tensor's name is the seed."""
    if dtype != torch.bfloat16 or tensor.dtype == dtype:
        return tensor.to(dtype).contiguous()
    noise = torch.randint(2 ** 16, tensor.shape, dtype=torch.int32,
                          generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    bits = tensor.float().contiguous().view(torch.int32) + noise   # a bf16 number is the upper 16
    return (bits & -2 ** 16).view(torch.float32).to(dtype)


def adapter_config(layers, base):
    """adapter_config.json as peft reads it. base: a folder or hub id."""
    some, folder = next(iter(layers.values())), os.path.abspath(os.path.expanduser(base))
    name, _, revision = (folder, "", "") if os.path.isdir(folder) else base.partition("@")
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM",
            "base_model_name_or_path": name, "revision": revision or None,
            "r": some.rank, "lora_alpha": some.alpha, "lora_dropout": some.dropout,
            "target_modules": sorted({name.split(".")[-1] for name in layers}), "bias": "none",
            "fan_in_fan_out": False, "inference_mode": True}


def check_target(out_dir, folder, adapter_alone, overwrite=False):
    """UserError where the export of a run that starts from `folder` would be an adapter on an
    adapter, or overwrite what it started from, a person's file or, unless told to, a model."""
    adapter, base = (os.path.realpath(os.path.join(folder, file))
                     for file in ("adapter_config.json", "config.json"))
    sources = folder, os.path.dirname(adapter), os.path.dirname(base)
    require(not os.path.exists(out_dir) or not any(   # also where a disk is mounted twice
        os.path.samefile(out_dir, source) for source in sources if os.path.exists(source)),
            f"out_dir: {out_dir} is init_from or its base, and would be overwritten; give another")
    require(not adapter_alone or not os.path.exists(adapter), "export_adapter: init_from is an "
            "adapter, and peft puts none on another; export them merged")
    known = exported_files(out_dir)
    for file in model_files(out_dir):
        require(file in known, f"{os.path.join(out_dir, file)}: no export of this project wrote "
                "it, and it would be overwritten, or opened with the model; move it, or give "
                "another out_dir")
    begun = read_run_settings(out_dir)
    ours = begun or os.path.exists(os.path.join(out_dir, EXPORTED))
    for file in ("train_config.json", "metrics.jsonl", "export.tmp"):
        path = os.path.join(out_dir, file)
        require(ours or not os.path.lexists(path), f"{path}: not of a run of this project, which "
                "would overwrite it; move it, or give another out_dir")
    require(overwrite or not known or begun and not is_finished(out_dir),
            f"out_dir: {out_dir} holds a finished model; --overwrite=True replaces it")
