"""
A Llama-family decoder in one file: the network, its weights on disk, text generation.

Names are Hugging Face's, parameter by parameter, and the rotary embedding is the split-half one, so
no weight is renamed or permuted on the way in or out.

References
1) Llama: Touvron et al. 2023, arXiv 2302.13971; Llama 3: Grattafiori et al. 2024, arXiv 2407.21783
2) RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467; SwiGLU: Shazeer 2020, arXiv 2002.05202
3) Rotary embedding: Su et al. 2021, arXiv 2104.09864
   Grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245
4) LoRA: Hu et al. 2021, arXiv 2106.09685
5) the reference implementation: transformers/models/llama/modeling_llama.py
"""
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_state_dict)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
    rope_scaling: dict | None = None    # None, or Llama 3's four numbers
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False               # Qwen3: an RMSNorm on every query and key head


LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_dict(hf, where="config.json"):
    """config.json as a dict -> LlamaConfig. ValueError names the field that this file can't honour.

    transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling: both work.
    """
    def refuse(what):
        raise ValueError(f"{where}: {what}")

    kind = hf.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        refuse(f'model_type "{kind}" is not supported (llama, mistral, qwen2, qwen3)')
    if hf.get("hidden_act", "silu") != "silu":
        refuse(f'hidden_act "{hf["hidden_act"]}" is not supported (silu)')
    if hf.get("quantization_config"):
        refuse("quantized weights are not supported; use the bf16 checkpoint")
    window = hf.get("use_sliding_window", kind == "mistral") and hf.get("sliding_window", 4096)
    if window or "sliding_attention" in (hf.get("layer_types") or ()):
        refuse("sliding-window attention is not supported; use a model with sliding_window null")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads")
    if missing := [k for k in needed if hf.get(k) is None]:
        refuse(f"no {', '.join(missing)}; is this a decoder's config?")
    for k in (*needed, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if hf.get(k) is not None and (type(hf[k]) is not int or hf[k] < 1):
            refuse(f"{k} must be a whole number above 0 (got {hf[k]!r})")

    def number(where, k, default=None):
        value = where.get(k, default)
        if type(value) not in (int, float) or value <= 0:
            refuse(f"{k} must be a number above 0 (got {value!r})")
        return value

    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        refuse(f"rope parameters must be an object (got {rope!r})")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        refuse(f'rope_type "{rope_type}" is not supported (default, llama3)')
    for k in LLAMA3_ROPE if rope_type == "llama3" else ():
        number(rope, k)
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        refuse("partial_rotary_factor is not supported")
    n_head, bias = hf["num_attention_heads"], hf.get("attention_bias", False)
    return LlamaConfig(
        vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], n_embd=hf["hidden_size"],
        n_head=n_head, n_kv_head=hf.get("num_key_value_heads") or n_head,
        head_dim=hf.get("head_dim") or (128 if kind == "qwen3" else hf["hidden_size"] // n_head),
        intermediate_size=hf["intermediate_size"], norm_eps=number(hf, "rms_norm_eps", 1e-6),
        rope_theta=number(rope if rope.get("rope_theta") else hf, "rope_theta", 10000.0),
        rope_scaling=rope if rope_type == "llama3" else None,
        max_position_embeddings=hf.get("max_position_embeddings") or 2048,
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        mlp_bias=hf.get("mlp_bias", False), qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2", qk_norm=kind == "qwen3")


# -----------------------------------------------------------------------------
# the network


def compute_dtype(x):
    """What matrix products of x are computed in: autocast's dtype if it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fast_bfloat16(device):
    """Whether matrix products in bf16 are faster than in fp32. On a CPU that knows neither AVX-512
    nor AMX they take ten times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or (torch.backends.mkldnn.is_available()
                                    and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 whatever the dtype of x; out in what the next product takes."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(compute_dtype(x))


def rotary(positions, config):
    """Positions (B, T) -> cos and sin (B, T, 1, head_dim), fp32, with Llama 3's frequency scaling.

    Llama 3 leaves short wavelengths alone, divides the frequency of long ones by `factor`, and
    blends the two where a wavelength fits 1 to 4 times into the original context.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    freq = 1 / config.rope_theta ** exponent   # to the last bit as transformers has it
    if config.rope_scaling:
        s = config.rope_scaling
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)   # 0: scaled, 1: as it is
        freq = blend * freq + (1 - blend) * freq / s["factor"]
    angle = positions[:, :, None, None].float() * freq       # (B, T, 1, head_dim / 2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each (i, i + head_dim/2) pair of x (B, T, heads, head_dim) by its position's angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


# Attention over packed trees. A preference row is a tree, [prompt | response 1 | .. | response n]:
# the prompt is computed once, every response continues it, no response sees another. A batch row is
# trees laid end to end. A query sees a key of its own tree, not after itself, that is in the prompt
# (branch 0) or in its own response. The way to compute that is chosen in tree_layout.


def tree_rule(tree, branch):
    """tree, branch (T,) -> the rule as a function of batch, head, query and key indices."""
    def rule(b, h, q, k):
        return (tree[q] == tree[k]) & (k <= q) & ((branch[k] == 0) | (branch[k] == branch[q]))
    return rule


def tree_layout(row):
    """What `attend` needs for a packed row: a BlockMask for flex attention, else the row itself."""
    device = row.tokens.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return row
    T = len(row.tree)
    return compiled(create_block_mask)(tree_rule(row.tree, row.branch), None, None, T, T,
                                       device=str(device))


@lru_cache
def compiled(function, dynamic=False):
    """The compiled version of a function that only pays when it is compiled; made on first use."""
    return torch.compile(function, dynamic=dynamic)


def attend(q, k, v, layout):
    """Softmax attention: q (B, n_head, T, hd), k and v (B, n_kv_head, S, hd) -> (B, n_head, T, hd).

    layout: a BlockMask (trees on a GPU: flex attention), a row (elsewhere: a loop over its trees),
    or, without trees, a boolean mask (B, 1, T, S), or None for causal.
    """
    if isinstance(layout, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        return flex(q, k, v, block_mask=layout, enable_gqa=True)
    if layout is not None and not isinstance(layout, torch.Tensor):
        return tree_attention(q, k, v, layout)
    if layout is not None and q.is_cuda:   # cuDNN would plan anew for each length while generating
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, layout)
    return F.scaled_dot_product_attention(q, k, v, layout, is_causal=layout is None,
                                          enable_gqa=True)


@torch.compiler.disable   # nor may a compiled block look into row.trees: it would compile for each
def tree_attention(q, k, v, row):
    """The tree rule without a T x T mask: in a tree prompt + response 1 is causal, and so is each
    further response behind the prompt. row.trees: [prompt, response 1, .., n] tokens each."""
    outputs = []
    by_tree = (x[0].split([sum(tree) for tree in row.trees], dim=1) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        for (prompt, first, *rest), *qkv in zip(row.trees, *by_tree):
            stem, *branches = zip(*(x.split([prompt + first, *rest], dim=1) for x in qkv))
            outputs.append(CausalAttention.apply(*stem))
            prompt_k, prompt_v = (x[:, :prompt] for x in stem[1:])
            for q_i, k_i, v_i in branches:
                outputs.append(CausalAttention.apply(q_i, torch.cat((prompt_k, k_i), dim=1),
                                                     torch.cat((prompt_v, v_i), dim=1)))
    return torch.cat(outputs, dim=1)[None]


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(hd)) v of the last T of S tokens, which see no later one:
    q (n_head, T, hd), k and v (n_kv_head, S, hd) -> (n_head, T, hd).

    In pieces of a few queries, whose weights backward computes again, with fp32 scores and products
    as large as they get: on a CPU faster than F.scaled_dot_product_attention and as lean.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)
        for at, seen, _, p in CausalAttention.pieces(q, k):
            y[:, at] = (p.to(v.dtype) @ v[:, :seen]).view_as(y[:, at])
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=wider(x)) for x in (k, v))
        for at, seen, rows, p in CausalAttention.pieces(q, k):
            dy_rows = dy[:, at].reshape(rows.shape)
            dp = (dy_rows @ v[:, :seen].mT).to(p.dtype)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).to(k.dtype)
            dq[:, at] = (ds @ k[:, :seen]).view_as(dq[:, at])
            dk[:, :seen] += ds.mT @ rows
            dv[:, :seen] += p.to(v.dtype).mT @ dy_rows
        scale = k.size(2) ** -0.5
        return dq.mul_(scale), dk.mul_(scale).to(k.dtype), dv.to(v.dtype)

    @staticmethod
    def pieces(q, k, n=96):
        """-> slice of up to n queries, number of keys the last one sees, the queries as rows
        (n_kv_head, G n, hd), their weights p (n_kv_head, G n, keys). A key head has G query heads.
        """
        keys, first = k.to(wider(k)).mT, k.size(1) - q.size(1)
        later = torch.full((n, n), -math.inf, dtype=keys.dtype, device=q.device).triu(1)
        for start in range(0, q.size(1), n):
            part = q[:, start:start + n]                                   # (n_head, n, hd)
            rows, size = part.reshape(len(k), -1, k.size(2)), part.size(1)
            seen = first + start + size
            scores = (rows.to(keys.dtype) * k.size(2) ** -0.5) @ keys[..., :seen]
            scores.view(*part.shape[:2], seen)[..., -size:] += later[:size, :size]
            yield slice(start, start + size), seen, rows, scores.softmax(-1)


def wider(x):
    """fp32, or x's dtype if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.n_embd, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope, layout, cache=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)                   # (B, T, n_kv_head, hd)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, *rope), rotate(k, *rope), v))
        if cache is not None:   # keys and values of earlier tokens, while generating
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
        x = x + self.self_attn(self.input_layernorm(x), rope, layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder. `forward` scores packed trees; `logits` and `generate` take plain sequences."""

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
        """(V, C); a tied head is the embedding."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def compile_blocks(self, dynamic=False):
        """torch.compile every block; they are alike, so one compilation serves all. `dynamic`: rows
        of any length."""
        torch._dynamo.config.optimize_ddp = False   # it would cut blocks; they are its buckets
        torch._dynamo.config.recompile_limit = 16   # each shape, with and without gradient, LoRA
        for block in self.model.layers:
            block.compile(dynamic=dynamic)

    def hidden(self, tokens, positions, layout, caches=None):
        """tokens, positions (B, T) -> final hidden states (B, T, C)."""
        x = self.model.embed_tokens(tokens)
        rope = rotary(positions, self.config)
        for i, block in enumerate(self.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, layout, use_reentrant=False)
            else:
                x = block(x, rope, layout, caches[i] if caches else None)
        return self.model.norm(x)

    def forward(self, row, entropy=False):
        """A packed row (data.Row) -> log pi of each response token, (R,) fp32.

        Only the R hidden states that predict a response token meet the vocabulary. With `entropy`
        also the entropy of each of those R next-token distributions, (R,) nats.
        """
        x = self.hidden(row.tokens, row.positions, tree_layout(row))
        per_token_logps, per_token_entropy = TokenLogProbs.apply(
            x[0, row.predict_from], self.head_weight, row.targets, entropy)
        return (per_token_logps, per_token_entropy) if entropy else per_token_logps

    def logits(self, tokens):
        """Plain causal sequences (B, T) -> logits (B, T, V)."""
        positions = torch.arange(tokens.size(1), device=tokens.device).expand(tokens.shape)
        return F.linear(self.hidden(tokens, positions, None), self.head_weight)

    @torch.compiler.set_stance("force_eager")   # lengths grow: nothing to compile for
    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
                 stop_ids=(), seed=None):
        """Continue each prompt (a list of token ids) -> list of lists of new ids, stop id included.

        temperature 0 takes the likeliest token; top_k 0 and top_p 1 keep the whole distribution.
        Prompts of different lengths are padded on the left and masked, so neighbours don't matter.
        """
        was_training = self.training
        self.eval()
        device = self.head_weight.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        longest = max(map(len, prompts))
        pad = torch.tensor([longest - len(p) for p in prompts], device=device)[:, None]
        tokens = [[0] * (longest - len(p)) + list(p) for p in prompts]
        tokens = torch.tensor(tokens, device=device)                                # (B, T)
        stop = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        going_on, n_new = torch.ones(len(prompts), dtype=torch.bool, device=device), 0
        caches, new = [[] for _ in self.model.layers], []
        slots = torch.arange(longest + max_new_tokens, device=device)
        first, last = 0, longest
        while True:
            q, k = slots[first:last, None], slots[None, :last]
            # a token sees what lies between the padding and itself; padding sees itself
            mask = (k == q) | ((k <= q) & (k >= pad[:, None]))                      # (B, T, S)
            positions = (slots[None, first:last] - pad).clamp(min=0)
            x = self.hidden(tokens, positions, mask[:, None], caches)[:, -1]
            logits = F.linear(x, self.head_weight).float()
            token = sample(logits, temperature, top_k, top_p, generator)            # (B,)
            new.append(token)
            n_new = n_new + going_on.long()                                         # (B,)
            going_on &= ~torch.isin(token, stop)
            if not going_on.any() or len(new) == max_new_tokens:
                break
            tokens, first, last = token[:, None], last, last + 1
        self.train(was_training)
        return [ids[:n] for ids, n in zip(torch.stack(new, dim=1).tolist(), n_new.tolist())]


def sample(logits, temperature, top_k, top_p, generator=None):
    """logits (B, V) -> token ids (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:   # the smallest set of likeliest tokens whose probability reaches top_p
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# -----------------------------------------------------------------------------
# log-probabilities without the logits

CHUNK_LOGITS = {"cpu": 2 ** 26, "cuda": 2 ** 29}   # held at a time, in the dtype of the products
CACHED_LOGITS = 2 ** 20                            # a CPU's, in fp32: more leave its cache


def chunk_logps(entropy, logits, targets):
    """logits (N, V) -> log softmax(logits)[targets], log-sum-exp, entropy: (N, 3) fp32.

    Gather minus logsumexp: log_softmax is biased by 1e-5 nat a token in fp32 on CPU.
    """
    logits = logits.float()
    lse = logits.logsumexp(-1)
    logps = logits.gather(-1, targets[:, None])[:, 0] - lse
    h = lse - ((logits - lse[:, None]).exp() * logits).sum(-1) if entropy else lse
    return torch.stack((logps, lse, h), dim=-1)


def chunk_grad(entropy, logits, targets, lse, h, d_logps, d_h):
    """d loss / d logits (N, V), written over the logits."""
    logps = logits.float() - lse[:, None]
    grad = logps.exp() * -d_logps[:, None]
    if entropy:   # dh / dlogits = -p (log p + h)
        grad -= d_h[:, None] * logps.exp() * (logps + h[:, None])
    if logits.is_cuda:   # a part of the same kernel; scatter would need the fp32 gradient in memory
        hit = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
        grad = torch.where(hit, grad + d_logps[:, None], grad)
    else:
        grad.scatter_add_(-1, targets[:, None], d_logps[:, None])
    logits.copy_(grad)


def fused(function, entropy, logits, *columns):
    """Memory traffic bounds these two. On a GPU: compiled, so logits are read twice, not ten times.
    On a CPU: a few tokens at a time, so that what is made of them stays in the cache."""
    if logits.is_cuda:
        return [compiled(function, dynamic=None)(entropy, logits, *columns)]   # V is not dynamic
    n = max(1, CACHED_LOGITS // logits.size(1))
    blocks = zip(logits.split(n), *(column.split(n) for column in columns))
    return [function(entropy, *block) for block in blocks]


class TokenLogProbs(torch.autograd.Function):
    """Log-probabilities of `targets` (R,) under hidden states x (R, C) and head weight (V, C).

    Works through the tokens in chunks of at most CHUNK_LOGITS logits. It keeps one number a token,
    the log-sum-exp, and the logits of the chunk it did last, with which backward starts; backward
    computes those of the others again. Returns logps and entropies, (R,) fp32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, entropy):
        dtype = compute_dtype(x)
        w, out, ctx.logits = weight.to(dtype), x.new_empty(len(x), 3, dtype=torch.float32), None
        with torch.autocast(x.device.type, enabled=False):
            for s in reversed(TokenLogProbs.chunks(x, weight)):
                ctx.logits = None   # before the next chunk's
                ctx.logits = F.linear(x[s].to(dtype), w)
                out[s] = torch.cat(fused(chunk_logps, entropy, ctx.logits, targets[s]))
        logps, lse, h = (column.clone() for column in out.T)
        ctx.save_for_backward(x, w, targets, lse, h)
        ctx.weight_dtype, ctx.entropy = weight.dtype, entropy
        return logps, h

    @staticmethod
    def backward(ctx, d_logps, d_h):
        x, w, targets, lse, h = ctx.saved_tensors
        dx, dw = torch.empty_like(x), None
        logits, ctx.logits = ctx.logits, None
        for s in TokenLogProbs.chunks(x, w):
            xs = x[s].to(w.dtype)
            logits = F.linear(xs, w) if logits is None else logits
            fused(chunk_grad, ctx.entropy, logits, targets[s], lse[s], h[s], d_logps[s], d_h[s])
            dx[s] = logits @ w
            if ctx.needs_input_grad[1]:   # summed over the chunks in fp32
                part = logits.T @ xs
                dw = part.float() if dw is None else dw.add_(part)
            logits = None
        if ctx.needs_input_grad[1]:
            dw = (torch.zeros_like(w) if dw is None else dw).to(ctx.weight_dtype)
        return dx, dw, None, None

    @staticmethod
    def chunks(x, weight):
        n = max(1, CHUNK_LOGITS.get(x.device.type, 2 ** 25) // weight.size(0))
        return [slice(i, i + n) for i in range(0, len(x), n)]


# -----------------------------------------------------------------------------
# LoRA


class LoRALinear(nn.Module):
    """A frozen linear layer plus (alpha / rank) B A x; A and B train in fp32.

    B starts at zero, so the layer starts as its base. With `enabled` off it is its base: the
    reference policy, for no memory.
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
        weight, A, B = (whole(p).cpu() for p in (self.weight, self.lora_A.weight,
                                                 self.lora_B.weight))   # no TF32 on a CPU
        return weight.float() + self.alpha / self.rank * (B @ A)


def add_lora(model, rank, alpha, dropout, targets):
    """Freeze the model and put adapters on the blocks' linear layers named in `targets`."""
    model.requires_grad_(False)
    layers = [(parent, name, child) for parent in model.model.layers.modules()
              for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    names = sorted({name for _, name, _ in layers})
    if not targets or set(targets) - set(names):
        raise ValueError(f"lora_targets: a block has {', '.join(names)} (got {', '.join(targets)})")
    for parent, name, child in layers:
        if name in targets:
            setattr(parent, name, LoRALinear(child, rank, alpha, dropout))


@contextlib.contextmanager
def adapters_off(model):
    """The model as it was before LoRA, inside the with block."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


# -----------------------------------------------------------------------------
# sharding


def shard(model, device_type, param_dtype=None):
    """FSDP2: every rank keeps its part of each weight, gradient and optimizer state; a block is
    gathered (in param_dtype) when it is its turn. Call it on all ranks, before loading.
    """
    from torch.distributed import fsdp
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32,
        cast_forward_inputs=False)   # it would copy the KV cache and round the rotary angles
    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
    fsdp.register_fsdp_forward_method(model, "generate")


def fill(parameter, tensor):
    """Copy a tensor that every rank has into a parameter; a sharded one takes its part."""
    if isinstance(parameter, DTensor):
        tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh,
                                   parameter.placements, src_data_rank=None)
    parameter.copy_(tensor)


def rank_of_ranks():
    """-> this process's rank and how many there are: 0 and 1 where it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def whole(tensor):
    """A tensor, put together on every rank if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# -----------------------------------------------------------------------------
# what a step costs


def step_flops(model, lengths):
    """Model FLOPs of a training step on trees of `lengths` (N, 1 + n): each real token once (no
    prompt twice, no padding), the head on response tokens only, nothing computed again. Per token
    2 a weight forward, 2 backward, 2 more where the weight is trained; attention by its mask.
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


# -----------------------------------------------------------------------------
# weights on disk

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
                   "chat_template.jinja")


def checkpoint_folder(name):
    """A folder as it is; a hub id downloaded (only the files needed) -> the folder.

    Raises FileNotFoundError where there is no such folder, OSError where the hub refuses.
    """
    if os.path.isdir(os.path.expanduser(name)):
        return os.path.expanduser(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name}: no such folder; give a model's folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    try:
        return snapshot_download(name, allow_patterns=[
            "config.json", "generation_config.json", "model*.safetensors",
            "model.safetensors.index.json", *TOKENIZER_FILES])
    except GatedRepoError:
        problem = (f"the model is gated; accept its licence at huggingface.co/{name}, then run "
                   "`hf auth login` or set HF_TOKEN")
    except RepositoryNotFoundError:
        problem = ("no such folder here, and no such model on the hub; check the spelling, or log "
                   "in if it is private")
    except Exception as e:
        problem = (f"no such folder here, and the hub can't be reached ({type(e).__name__}); give "
                   "a local folder")
    raise OSError(f"{name}: {problem}")


def weights_fingerprint(folder):
    """Changes when the model does: config.json; name, size and time of each safetensors file."""
    files = sorted(set(tensor_files(folder).values()))
    return [read_json(os.path.join(folder, "config.json")),
            *([os.path.realpath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files)]


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e}); download it again") from None


def tensor_files(folder):
    """{tensor name: safetensors file it is in} of a checkpoint; one file goes before an index of
    shards, as in transformers. ValueError for a damaged checkpoint."""
    index, shards = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
    if not os.path.exists(os.path.join(folder, shards[0])):
        if not os.path.exists(index):
            raise FileNotFoundError(
                f"{folder}: no model.safetensors and no index of shards; is this a Hugging Face "
                "checkpoint? (pytorch_model.bin: open it in transformers and save_pretrained)")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: no weight_map; download it again")
        shards = sorted(set(weight_map.values()), key=str)
    where = {}
    for shard in shards:
        if os.path.basename(str(shard)) != shard:
            raise ValueError(f'{index}: shard "{shard}" is outside the model folder; refusing')
        path = os.path.join(folder, shard)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: missing, but the index names it; download it again")
        for name in safetensors_names(path):
            if name in where:
                raise ValueError(f"{path}: tensor {name} appears twice, here and in {where[name]}")
            where[name] = path
    return where


def safetensors_names(path):
    """Tensor names in a safetensors header; the library would drop all but one of the same name."""
    with open(path, "rb") as f:
        head = f.read(8)
        if head == b"version ":
            raise ValueError(f"{path}: Git LFS pointer, not weights; run git lfs pull")
        size = int.from_bytes(head, "little")
        if not 0 < size < 100_000_000:
            raise ValueError(f"{path}: not a safetensors file; download it again")
        try:
            entries = json.loads(f.read(size), object_pairs_hook=list)
            return [name for name, _ in entries if name != "__metadata__"]
        except (ValueError, TypeError):
            raise ValueError(f"{path}: incomplete file; download it again") from None


def from_pretrained(name, device="cpu", dtype=torch.float32, prepare=None):
    """A Hugging Face folder or hub id -> (Llama on `device` in `dtype`, config.json as a dict).

    Strict: every tensor of the model exactly once, of the right shape, finite, and none besides.
    Each tensor goes from the file to its place; the weights are never in memory twice.
    `prepare(model)` may add adapters or shard the model while it has shapes but no memory;
    device "meta" leaves it there. Raises FileNotFoundError, OSError or ValueError that says what
    is wrong where.
    """
    folder = checkpoint_folder(name)
    config_path = os.path.join(folder, "config.json")
    if not os.path.exists(config_path):
        what = "no config.json; give a Hugging Face checkpoint folder"
        if os.path.exists(os.path.join(folder, "adapter_config.json")):
            what = "LoRA adapters alone; export them merged (export_adapter=False)"
        raise FileNotFoundError(f"{folder}: {what}")
    hf_config = read_json(config_path)
    if not isinstance(hf_config, dict):
        raise ValueError(f'{config_path}: not a JSON object; download it again')
    with torch.device("meta"):
        model = Llama(config_from_dict(hf_config, config_path)).to(dtype)
    if prepare:
        prepare(model)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        load_weights(model, folder)
        for layer in lora_layers(model).values():
            layer.init_adapter()
    return model, hf_config


@torch.no_grad()
def load_weights(model, folder):
    """Fill the parameters from safetensors, tensor by tensor; a sharded one takes its part."""
    expected = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    where = {name: path for name, path in tensor_files(folder).items()
             if not name.endswith("rotary_emb.inv_freq")}   # old Llamas saved it; it is computed
    tied = {"lm_head.weight"} & where.keys() if model.config.tie_word_embeddings else set()
    for what, names in (("missing", expected.keys() - where.keys()),
                        ("unexpected", where.keys() - expected.keys() - tied)):
        if names:
            raise ValueError(f"{folder}: {what} tensor {min(names)} ({len(names)} of "
                             f"{len(expected)}); wrong config.json?")
    order = sorted(where, key=lambda name: (name in tied, where[name]))   # by file, the tied last
    for path, names in itertools.groupby(order, where.get):
        try:
            with safe_open(path, framework="pt") as f:
                for name in names:
                    p, tensor = expected.get(name, model.head_weight), f.get_tensor(name)
                    if tensor.shape != p.shape:
                        raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, "
                                         f"config.json asks for {tuple(p.shape)}")
                    if not tensor.is_floating_point() or tensor.element_size() == 1:
                        raise ValueError(f"{path}: {name} is {tensor.dtype}; quantized weights are "
                                         "not supported, use the bf16 checkpoint")
                    if not all_finite(tensor):
                        raise ValueError(f"{path}: {name} holds NaN or infinite values; refusing")
                    if name in tied and not tensor.to(p.device, p.dtype).equal(whole(p)):
                        raise ValueError(
                            f"{folder}: lm_head.weight differs from embed_tokens.weight, but "
                            "config.json ties them; set tie_word_embeddings to false")
                    fill(p, tensor)
        except SafetensorError as e:
            raise ValueError(f"{path}: incomplete file ({e}); download it again") from None


def all_finite(tensor):
    return torch.stack(torch.aminmax(tensor)).isfinite().all()   # one fast pass


@torch.no_grad()
def save_pretrained(model, folder, hf_config, tokenizer_folder=None, dtype=torch.bfloat16,
                    max_shard_bytes=5 * 1000 ** 3, chat_template=None, stop_ids=()):
    """Write a folder that transformers, vLLM and llama.cpp's converter open.

    config.json is the start checkpoint's (`hf_config`) with the new dtype; tokenizer files and
    generation_config.json are copied from `tokenizer_folder`; `chat_template` is the text trained
    with, if it is not that folder's; stop_ids, what ends a turn, become generation_config.json's
    eos_token_id. LoRA adapters are merged into the weights. Shards of at most `max_shard_bytes`.
    Each file appears whole or not at all.
    Every rank calls it, the first writes; of a sharded model it gathers one tensor at a time.
    """
    os.makedirs(folder, exist_ok=True)
    write, layers = rank_of_ranks()[0] == 0, lora_layers(model)
    weights = {name: p for name, p in model.state_dict().items() if "lora_" not in name}
    split = split_state_dict_into_shards_factory(
        weights, get_storage_size=lambda p: p.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            layer = layers.get(name.removesuffix(".weight"))
            p = layer.merged_weight() if layer else whole(weights[name])
            if write:
                tensors[name] = p.to("cpu", dtype).contiguous()
                if not all_finite(tensors[name]):
                    raise ValueError(f"{folder}: {name} is not finite in {dtype}; resume from a "
                                     "checkpoint with --export_dtype=float32")
        if write:
            write_tensors(os.path.join(folder, file), tensors)
    if not write:
        return
    name = str(dtype).removeprefix("torch.")
    configs = {"config.json": hf_config | {"dtype": name, "torch_dtype": name}}
    if split.is_sharded:
        configs["model.safetensors.index.json"] = {"metadata": split.metadata,
                                                   "weight_map": split.tensor_to_filename}
    ids = {k: hf_config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")
           if hf_config.get(k) is not None}
    finish_export(folder, split.filename_to_tensors, configs, ids, tokenizer_folder, chat_template,
                  stop_ids)


@torch.no_grad()
def save_adapter(model, folder, base, tokenizer_folder=None, chat_template=None, stop_ids=()):
    """Write the LoRA adapters alone: a folder that peft.PeftModel.from_pretrained opens on `base`.

    Every rank calls it, as save_pretrained.
    """
    os.makedirs(folder, exist_ok=True)
    tensors = {f"base_model.model.{name}": whole(p).cpu().contiguous()
               for name, p in model.state_dict().items() if "lora_" in name}
    if rank_of_ranks()[0] != 0:
        return
    file = "adapter_model.safetensors"
    write_tensors(os.path.join(folder, file), tensors)
    layers = lora_layers(model)
    some, here = next(iter(layers.values())), os.path.abspath(os.path.expanduser(base))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM",
              "base_model_name_or_path": here if os.path.isdir(here) else base,
              "r": some.rank, "lora_alpha": some.alpha, "lora_dropout": some.dropout,
              "target_modules": sorted({name.split(".")[-1] for name in layers}), "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}
    finish_export(folder, [file], {"adapter_config.json": config}, {}, tokenizer_folder,
                  chat_template, stop_ids)


def finish_export(folder, weight_files, configs, generation_config, tokenizer_folder,
                  chat_template=None, stop_ids=()):
    """What goes with the weights: `configs`, tokenizer files as they are, generation config
    (tokenizer_folder's if it has one) with what ends a turn, another chat template. What an
    earlier export left, and would be opened with these files or instead of them, goes."""
    for file in os.listdir(folder):
        theirs = ".safetensors" in file or file in ("config.json", "adapter_config.json")
        if theirs and file not in (*weight_files, *configs):
            os.remove(os.path.join(folder, file))
    if tokenizer_folder and not os.path.samefile(tokenizer_folder, folder):
        for file in (*TOKENIZER_FILES, "generation_config.json"):
            source, target = os.path.join(tokenizer_folder, file), os.path.join(folder, file)
            if os.path.exists(source):
                write_atomically(target, lambda t: shutil.copyfile(source, t))
            elif os.path.exists(target):
                os.remove(target)
    path = os.path.join(folder, "generation_config.json")
    if os.path.exists(path):
        generation_config = read_json(path)
    if stop_ids:
        generation_config["eos_token_id"] = sorted(stop_ids) if len(stop_ids) > 1 else max(stop_ids)
    if chat_template is not None:
        write_text(os.path.join(folder, "chat_template.jinja"), chat_template)
    for file, content in (configs | {"generation_config.json": generation_config}).items():
        write_json(os.path.join(folder, file), content)


# checkpoints of a run: what is trained and AdamW's state; every rank writes and reads its part

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
FAILURES = (Exception, dcp.api.CheckpointException)   # the latter is no Exception
warnings.filterwarnings("ignore", "torch.distributed is disabled")   # in one process, rightly so


def training_state(model, optimizer):
    return dict(zip(("model", "optimizer"),
                    get_state_dict(model, optimizer, options=TRAINED_ONLY)))


def save_checkpoint(model, optimizer, folder, iter_num):
    """folder/checkpoint-0000400, to which every rank writes its part; the last checkpoint goes when
    this one is whole. OSError where it can't be written."""
    path = os.path.join(folder, f"checkpoint-{iter_num:07d}")
    temporary, (rank, ranks) = path + ".tmp", rank_of_ranks()
    if rank == 0:   # of a run that was killed here; the other ranks wait in dcp.save
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=temporary)
        mine = [file for file in os.listdir(temporary) if file.startswith(f"__{rank}_")]
        mine += [".metadata"] * (rank == 0)
        write_json(os.path.join(temporary, f"{rank}.sha256"),
                   {file: sha256(os.path.join(temporary, file)) for file in mine})
    except FAILURES as e:
        raise OSError(f"{path}: not written ({last_line(e)}); if the disk is full, free space; "
                      "an earlier checkpoint is intact") from None
    if ranks > 1:
        dist.barrier()
    if rank == 0:
        if len(glob.glob(os.path.join(glob.escape(temporary), "*.sha256"))) < ranks:
            raise OSError(f"{folder}: other machines' parts of a checkpoint are not here; all "
                          "machines must share out_dir")
        rename(temporary, path)
        remove_checkpoints(folder, but=path)


def load_checkpoint(model, optimizer, path):
    """The reverse, for any number of ranks. ValueError where a byte is not as it was written."""
    rank, ranks = rank_of_ranks()
    for manifest in sorted(glob.glob(os.path.join(glob.escape(path), "*.sha256")))[rank::ranks]:
        for file, digest in read_json(manifest).items():
            if sha256(os.path.join(path, file)) != digest:
                raise ValueError(f"{path}: {file} failed its sha256; delete the checkpoint")
    state = training_state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=path)
    except FAILURES as e:
        raise ValueError(f"{path}: can't be loaded ({last_line(e)}); of another version of this "
                         "code?") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"], options=TRAINED_ONLY)


def last_line(error):
    return (str(error).splitlines() or [type(error).__name__])[-1]


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(2 ** 24):
            digest.update(piece)
    return digest.hexdigest()


def checkpoints(folder, suffix=""):
    pattern = "checkpoint-" + "[0-9]" * 7 + suffix
    return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))


def last_checkpoint(folder):
    """-> (its step, its path), or (0, None)."""
    found = checkpoints(folder)
    return (int(found[-1][-7:]), found[-1]) if found else (0, None)


def remove_checkpoints(folder, but=None):
    for path in checkpoints(folder, "*"):   # half-written ones too
        if path != but:
            shutil.rmtree(path)


def write_tensors(path, tensors):
    try:
        write_atomically(path, lambda t: save_file(tensors, t, {"format": "pt"}))
    except SafetensorError as e:
        raise OSError(f"{path}: not written ({e}); if the disk is full, free space") from None


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path, text):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8", newline="") as f:
            f.write(text)
    write_atomically(path, write)


def write_atomically(path, write):
    """write(temporary path), then rename: at any moment the old file is there, or the new one."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)   # safetensors leaves 0600: unreadable by others
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        rename(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def rename(path, new_path):
    """Also after a power cut the folder has one or the other, where its file system can do that."""
    os.replace(path, new_path)
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(os.path.abspath(new_path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
