"""
The properties this project promises, each held by one test. CPU only, offline, about three minutes:

    pip install -r requirements.txt pytest transformers tokenizers
    python -m pytest -q test_mmpo.py

References are independent: transformers, tokenizers, or the formula in float64, never the code itself.
Real tokenizers and chat templates are looked for in $MMPO_SHARED (../shared); those tests skip without.
"""
import ast
import copy
import csv
import glob
import gzip
import json
import math
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import configurator
import data
import mmpo
import model as llama

ROOT = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(ROOT, os.environ.get("MMPO_SHARED", "../shared"))
SMOLLM2 = os.path.expanduser("~/.cache/nanommpo/SmolLM2-135M-Instruct")
V = 97   # vocabulary of the tiny models
torch.set_num_threads(1)

# -----------------------------------------------------------------------------
# helpers


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """No test reads or writes the user's cache, and none reaches for the network."""
    os.environ["NANOMMPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"


def needs(path):
    return pytest.mark.skipif(not os.path.exists(path), reason=f"{os.path.relpath(path, ROOT)} is not here")


def gap(got, want):
    """Largest difference, relative to the largest value of `want`."""
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in want:
        assert gap(got[name], want[name]) <= tolerance, name


def tiny_model(seed=0, **changes):
    """A small Llama with weights large enough for every part of it to matter."""
    shape = dict(vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=16, intermediate_size=48)
    torch.manual_seed(seed)
    model = llama.Llama(llama.LlamaConfig(**shape | changes))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model


def random_pairs(n_rows=6, n=2, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return data.Pairs.from_rows([[rng.integers(0, V, rng.integers(1, longest + 1)) for _ in range(n + 1)]
                                 for _ in range(n_rows)])


def one_by_one(model, pairs, indices):
    """Token log-probs of each response, scored alone behind its prompt, by float64 log-softmax."""
    scored = []
    for i in indices:
        prompt, *responses = pairs.ids(i)
        for ids in responses:
            tokens = torch.from_numpy(np.concatenate((prompt, ids))).long()
            logps = model.logits(tokens[None])[0].double().log_softmax(-1)
            scored += [logps[t - 1, tokens[t]] for t in range(len(prompt), len(tokens))]
    return torch.stack(scored)


def dense_mask(row):
    """The attention rule of a packed row, token by token, from the lengths of its trees alone."""
    tree, branch = [], []
    for t, lengths in enumerate(row.trees):
        for b, n in enumerate(lengths):
            tree += [t] * n
            branch += [b] * n
    T = len(tree)
    sees = [[tree[q] == tree[k] and k <= q and branch[k] in (0, branch[q]) for k in range(T)]
            for q in range(T)]
    return torch.tensor(sees)


def pretend_gpu(monkeypatch, row):
    """Make `row` take the GPU's path, flex attention with a BlockMask, on the CPU and uncompiled."""
    class Device:
        type = "cuda"

        def __str__(self):
            return "cpu"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(llama, "compiled", lambda function: function)
    return SimpleNamespace(**vars(row) | {"tokens": SimpleNamespace(device=Device())})


SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=2048, sliding_window=None)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)


def transformers_model(kind, **changes):
    """A tiny random model of transformers, norm weights and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | changes))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model.eval()


def transformers_logits(folder, tokens, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(tokens).logits


def tokens_of(*shape, seed=0, high=V):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def edit_json(path, **changes):
    with open(path) as f:
        content = json.load(f)
    with open(path, "w") as f:
        json.dump(content | changes, f)


# --- tokenizers: small byte-level BPEs with the pre-tokenizers of the model families

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eot_id|>"]
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3_FIRST = ("{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
                "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
                "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
                "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = ["The quick brown fox jumps over the lazy dog, and it doesn't stop: they're 12,345 times faster!",
         "  def f(x):\n    return x ** 2  # 3.14\n\n\tprint(f(10))\r\n", "Ça va très bien, où est l'été? Straße.",
         "Быстрая коричневая лиса прыгает через ленивую собаку.", "素早い茶色の狐がのろまな犬を飛び越える。",
         "الثعلب البني السريع", "निपुण लोमड़ी", "👩‍👩‍👧‍👦 🦙 ½ ４２ ②", "we'll I'VE you'd it'S ''s", "1 22 333 4444 55555"]
NASTY = ["", " ", "  ", "   \n", "\n\n\n", "\t", " \t\r\n x", "a  b   c    d", "x \n y", "0", "a1b22c333", "3 \n 4",
         "  5", "\r\r\n", "can't WE'LL I'm 'tis ''", "e\u0301 \u00e9 \u212b \ufb01", "\u0301\u0301", "🦙🏽👩‍💻", "\u00a0\u2003 x",
         "\u200b\u200d\ufeff", "½²٣४", "\x00\x01\x7f", "<|im_end|>", "a<|im_start|>b <|eot_id|>", "<|im_", "Ａ１ｶﾞ", "a" * 300]


def train_bpe(kind, vocab_size=500):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    split = {"llama3": LLAMA3_SPLIT, "qwen": LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")}.get(kind)
    tok = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tok.pre_tokenizer = {
        "gpt2": lambda: ByteLevel(add_prefix_space=False),
        "digits": lambda: Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    }.get(kind, lambda: Sequence([Split(Regex(split), "isolated"),
                                  ByteLevel(add_prefix_space=False, use_regex=False)]))()
    if kind == "qwen":
        tok.normalizer = normalizers.NFC()
    tok.decoder = decoders.ByteLevel()
    never = {c for c, b in data.byte_alphabet().items() if b in (0xC0, 0xC1) or b > 0xF4}   # not in UTF-8
    tok.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=sorted(set(ByteLevel.alphabet()) - never)))
    return tok


def save_tokenizer(tok, folder, **config):
    os.makedirs(folder, exist_ok=True)
    tok.save(os.path.join(folder, "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "chat_template": CHATML,
              "tokenizer_class": "PreTrainedTokenizerFast"} | config
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(config, f)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A chat model's folder as the hub has it: a tiny random Llama, a BPE tokenizer, a ChatML template."""
    folder = str(tmp_path_factory.mktemp("models") / "tiny")
    tok = train_bpe("digits")
    transformers_model("llama", vocab_size=tok.get_vocab_size(), bos_token_id=1, eos_token_id=2,
                       tie_word_embeddings=True).save_pretrained(folder)
    save_tokenizer(tok, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return data.Tokenizer(checkpoint)


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def word_rows(n, seed=0):
    """Pairs of random words: the chosen speaks of foxes, the rejected of dogs."""
    rng, words = random.Random(seed), " ".join(TEXTS[:1] + TEXTS[2:4]).split()

    def some(kind):
        return " ".join(rng.choices(words, k=rng.randint(1, 9)) + [kind])
    return [{"prompt": some("?"), "chosen": some("fox"), "rejected": some("dog")} for _ in range(n)]


def load(path, tokenizer, max_length=512, max_prompt_length=256, bad_rows="error"):
    return data.load_pairs(str(path), "train", tokenizer, max_length, max_prompt_length, bad_rows)


def counts(report):
    """'7 rows = 4 used + 3 dropped (2 empty, 1 malformed)' -> 7, 4, 3, {"empty": 2, "malformed": 1}."""
    seen, used, dropped = map(int, re.match(r"(\d+) rows = (\d+) used \+ (\d+) dropped", report).groups())
    reasons = re.search(r"dropped \((.*?)\)", report)
    parts = (part.split(" ", 1) for part in reasons[1].split(", ")) if reasons else ()
    return seen, used, dropped, {reason: int(n) for n, reason in parts}


# -----------------------------------------------------------------------------
# model: parity with transformers

GRID = {
    "llama-gqa": ("llama", {}),
    "llama-mha-tied": ("llama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-wide-heads": ("llama", dict(head_dim=24)),
    "llama-rope3": ("llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1)),
    "mistral": ("mistral", dict(head_dim=16)),
    "qwen2": ("qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-biases": ("qwen3", dict(head_dim=8, attention_bias=True)),
}


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize("name", GRID)
def test_logits_equal_transformers(name, style, tmp_path):
    """Logits equal transformers' for every supported architecture, with new and old config.json."""
    kind, changes = GRID[name]
    theirs = transformers_model(kind, **changes)
    theirs.save_pretrained(tmp_path)
    if style == "old":   # before transformers 5
        with open(tmp_path / "config.json") as f:
            config = json.load(f)
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype"),
                   "rope_scaling": rope if rope["rope_type"] == "llama3" else None}
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours, _ = llama.from_pretrained(str(tmp_path))
    for T in (16, 200, 1024):
        tokens = tokens_of(2, T)
        with torch.no_grad():
            assert gap(ours.logits(tokens), theirs(tokens).logits) <= 1e-4, T


# -----------------------------------------------------------------------------
# model: packed rows of trees


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_packed_row_equals_one_by_one(n, tied, monkeypatch):
    """A padded row of several trees gives the log-probs and gradients of each response scored alone."""
    monkeypatch.setattr(llama, "CHUNK_LOGITS", 10 * V)
    model, pairs = tiny_model(tie_word_embeddings=tied), random_pairs(6, n)
    row = data.collate(pairs, range(6), shapes=(64, 512))
    assert row.tokens.size(1) == 512
    got, want = model(row), one_by_one(model, pairs, range(6))
    assert gap(got, want) <= 1e-5
    d = torch.randn(len(want), generator=torch.Generator().manual_seed(0))
    (got * d).sum().backward()
    got = grads(model)
    model.zero_grad()
    (want * d).sum().backward()
    assert_same_grads(got, grads(model), 1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_attention_equals_a_dense_mask(n, monkeypatch):
    """The loop over trees, and flex attention with the GPU's BlockMask, equal SDPA under the T x T rule."""
    row = data.collate(random_pairs(7, n), range(7), shapes=(300,))
    T, real = 300, row.tree >= 0
    q, k, v = (torch.randn(1, heads, T, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    want = F.scaled_dot_product_attention(q, k, v, dense_mask(row), enable_gqa=True)[:, :, real]
    assert gap(llama.attend(q, k, v, llama.tree_layout(row))[:, :, real], want) <= 1e-5
    try:
        flex_layout = llama.tree_layout(pretend_gpu(monkeypatch, row))
        with torch.no_grad():
            got = llama.attend(q, k, v, flex_layout)
    except (NotImplementedError, RuntimeError) as e:
        pytest.skip(f"no flex attention on CPU in this torch: {e}")
    assert isinstance(flex_layout, llama.BlockMask) and got.isfinite().all()
    assert gap(got[:, :, real], want) <= 1e-5


@torch.no_grad()
def test_neighbours_do_not_matter():
    """Other tokens in one tree of a row leave the log-probs of the other trees bitwise as they were."""
    model, pairs = tiny_model(), random_pairs(5, seed=3)
    row = data.collate(pairs, range(5))
    other = copy.deepcopy(row)
    other.tokens[0, row.tree == 2] = tokens_of(int((row.tree == 2).sum()), seed=9)
    mine = row.response // 2 == 2
    before, after = model(row), model(other)
    assert before[~mine].equal(after[~mine]) and not before[mine].equal(after[mine])


@torch.no_grad()
def test_swapped_responses_swap_log_probs():
    """Which of the two is called chosen changes nothing but the order of the log-probs."""
    model, pairs = tiny_model(), random_pairs(5)
    swapped = data.Pairs.from_rows([[p, r, c] for p, c, r in map(pairs.ids, range(5))])
    rows = data.collate(pairs, range(5)), data.collate(swapped, range(5))
    a, b = (mmpo.sum_by_response(model(row), row.response, 10).view(5, 2) for row in rows)
    assert gap(a.flip(1), b) <= 1e-6


def test_attention_inputs_share_a_dtype(monkeypatch):
    """Under autocast q, k and v are all bf16 (flex attention wants one dtype; fp32 would be slow)."""
    seen, attend = [], llama.attend
    monkeypatch.setattr(llama, "attend", lambda q, k, v, layout: seen.extend(
        (q.dtype, k.dtype, v.dtype)) or attend(q, k, v, layout))
    for qk_norm in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            tiny_model(qk_norm=qk_norm).logits(tokens_of(1, 8))
    assert set(seen) == {torch.bfloat16}


# -----------------------------------------------------------------------------
# model: log-probs without the logits


def token_log_probs(dtype, C=24, N=50):
    """Inputs, and values and gradients of logps and entropies by float64 log_softmax."""
    g = torch.Generator().manual_seed(0)
    x, w, targets = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g) / 3, tokens_of(N)
    a, b = torch.randn(2, N, generator=g)
    leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
    logps64 = F.linear(*leaves).double().log_softmax(-1)
    values = logps64.gather(1, targets[:, None])[:, 0], -(logps64.exp() * logps64).sum(-1)
    return x, w, targets, a, b, values, leaves


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_token_log_probs(entropy, chunk, monkeypatch):
    """Chunked log-probs, entropies and their gradients equal float64's, whatever the chunk."""
    monkeypatch.setattr(llama, "CHUNK_LOGITS", chunk * V)
    x, w, targets, a, b, want, leaves = token_log_probs(torch.float64)
    x, w = x.requires_grad_(), w.requires_grad_()
    got = llama.TokenLogProbs.apply(x, w, targets, entropy)
    assert got[0].dtype == torch.float32 and gap(got[0], want[0]) <= 1e-6
    assert not entropy or gap(got[1], want[1]) <= 1e-6
    (a * got[0] + entropy * b * got[1].nan_to_num()).sum().backward()
    (a * want[0] + entropy * b * want[1]).sum().backward()
    assert gap(x.grad, leaves[0].grad) <= 1e-5 and gap(w.grad, leaves[1].grad) <= 1e-5


def test_token_log_probs_under_autocast(monkeypatch):
    """Under bf16 autocast only the matrix product is bf16: within 0.05 nat and 2% of the gradient."""
    monkeypatch.setattr(llama, "CHUNK_LOGITS", 16 * V)
    x, w, targets, a, b, want, leaves = token_log_probs(torch.float64)
    x, w = x.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = llama.TokenLogProbs.apply(x, w, targets, True)
    assert all(t.dtype == torch.float32 for t in got)
    assert (got[0] - want[0]).abs().max() <= 0.05 and (got[1] - want[1]).abs().max() <= 0.05
    (a * got[0] + b * got[1]).sum().backward()
    (a * want[0] + b * want[1]).sum().backward()
    assert gap(x.grad, leaves[0].grad) <= 0.02 and gap(w.grad, leaves[1].grad) <= 0.02


def test_summed_log_probs_are_unbiased():
    """Sums over 2,048 tokens are within 0.002 nat of float64's (fp32 log_softmax drifts by twice that)."""
    g = torch.Generator().manual_seed(0)
    for size, scale in ((64, 10.0), (16384, 1.0)):
        x, w = torch.randn(2048, 16, generator=g), torch.randn(size, 16, generator=g) * scale / 4
        logps = F.linear(x.double(), w.double()).log_softmax(-1)
        targets = torch.multinomial(logps.exp(), 1, generator=g)
        got, _ = llama.TokenLogProbs.apply(x, w, targets[:, 0], False)
        want = logps.gather(1, targets).sum().item()
        assert abs(got.double().sum().item() - want) <= 0.002
        if size == 64:   # about half a nat a token, as a chat model on its own answers
            total = mmpo.sum_by_response(got, torch.zeros(2048, dtype=torch.long), 1).item()
            assert abs(total - want) <= 0.002


# -----------------------------------------------------------------------------
# model: generation


def greedy(model, prompt, n):
    for _ in range(n):
        prompt = prompt + [model.logits(torch.tensor([prompt]))[0, -1].argmax().item()]
    return prompt[-n:]


@torch.no_grad()
def test_generate_equals_a_naive_loop():
    """Cached, left-padded generation equals argmax over full recomputation; a stop id ends an answer."""
    model = tiny_model(seed=4)
    prompts = [tokens_of(n, seed=n).tolist() for n in (3, 11, 1, 7)]
    want = [greedy(model, p, 12) for p in prompts]
    assert model.generate(prompts, 12, temperature=0) == want
    assert model.generate(prompts, 12, top_k=1) == want
    stop = want[0][3]
    cut = [w[:w.index(stop) + 1] if stop in w else w for w in want]
    assert len(cut[0]) < 12 and model.generate(prompts, 12, temperature=0, stop_ids={stop}) == cut


@torch.no_grad()
def test_generate_is_seeded():
    """One seed gives one answer, another seed another."""
    model, prompts = tiny_model(), [[1, 2, 3], [4]]
    first, again, other = (model.generate(prompts, 20, seed=s) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("knobs, kept", [
    ((1.0, 0, 1.0), [0.5, 0.3, 0.15, 0.05]), ((2.0, 0, 1.0), np.sqrt([0.5, 0.3, 0.15, 0.05])),
    ((1.0, 2, 1.0), [0.5, 0.3, 0, 0]), ((1.0, 0, 0.4), [0.5, 0, 0, 0]), ((1.0, 0, 0.7), [0.5, 0.3, 0, 0]),
    ((1.0, 0, 0.9), [0.5, 0.3, 0.15, 0])])
def test_sample(knobs, kept):
    """Temperature reshapes the distribution; top_k and top_p keep the smallest set, renormalized."""
    order = [2, 0, 3, 1]   # likeliest is not first
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[order].expand(20000, 4)
    drawn = llama.sample(logits, *knobs, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    want = torch.tensor(np.array(kept) / np.sum(kept))[order]
    assert (drawn - want).abs().max() <= 0.02 and (drawn[want == 0] == 0).all()


# -----------------------------------------------------------------------------
# model: weights on disk


def test_export_opens_in_transformers(checkpoint, tmp_path):
    """An fp32 export has transformers' logits equal to ours, bitwise equal weights and all side files."""
    model, config = llama.from_pretrained(checkpoint)
    model.compile_blocks()   # must leave no trace in the names
    out = str(tmp_path / "out")
    llama.save_pretrained(model, out, config | {"my_field": {"a": [1]}}, checkpoint, torch.float32)
    tokens = tokens_of(2, 30)
    with torch.no_grad():
        assert gap(transformers_logits(out, tokens), llama.from_pretrained(out)[0].logits(tokens)) <= 1e-6
    before, after = (load_file(f"{f}/model.safetensors") for f in (checkpoint, out))
    assert before.keys() == after.keys() and all(before[n].equal(after[n]) for n in before)
    with open(f"{out}/config.json") as f:
        saved = json.load(f)
    assert saved["my_field"] == {"a": [1]} and saved["dtype"] == "float32"
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        with open(f"{checkpoint}/{file}", "rb") as a, open(f"{out}/{file}", "rb") as b:
            assert a.read() == b.read()


def test_export_modes_and_shards(checkpoint, tmp_path):
    """bf16 and sharded exports reopen, files are readable as the umask says, no stale shard stays."""
    model, config = llama.from_pretrained(checkpoint)
    out, tokens = str(tmp_path), tokens_of(1, 20)
    old_umask = os.umask(0o022)
    try:
        for shard_bytes, n_files in ((20_000, None), (60_000, None), (10 ** 9, 1)):
            llama.save_pretrained(model, out, config, checkpoint, torch.bfloat16, shard_bytes)
            shards = glob.glob(f"{out}/*.safetensors")
            assert len(shards) == n_files or n_files is None and len(shards) > 1
            assert os.path.exists(f"{out}/model.safetensors.index.json") == (len(shards) > 1)
            names = [n for s in shards for n in load_file(s)]
            assert sorted(names) == sorted(n for n, _ in model.named_parameters())
            assert all(stat.S_IMODE(os.stat(f"{out}/{f}").st_mode) == 0o644 for f in os.listdir(out))
            reopened, _ = llama.from_pretrained(out)
            for (name, p), q in zip(model.named_parameters(), reopened.parameters()):
                assert p.bfloat16().float().equal(q), name
            with torch.no_grad():
                assert gap(transformers_logits(out, tokens), reopened.logits(tokens)) <= 1e-6
    finally:
        os.umask(old_umask)


def damage_header(change):
    """Rewrite a safetensors file's JSON header as text."""
    def damage(folder):
        with open(f"{folder}/model.safetensors", "rb") as f:
            raw = f.read()
        n = int.from_bytes(raw[:8], "little")
        header = change(raw[8:8 + n].decode().rstrip())
        with open(f"{folder}/model.safetensors", "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header.encode() + raw[8 + n:])
    return damage


def damage_tensors(change):
    def damage(folder):
        tensors = load_file(f"{folder}/model.safetensors")
        change(tensors)
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
    return damage


def damage_config(**changes):
    return lambda folder: edit_json(f"{folder}/config.json", **changes)


def damage_file(file, content):
    def damage(folder):
        with open(f"{folder}/{file}", "wb") as f:
            f.write(content)
    return damage


def index_of(shard):
    return damage_file("model.safetensors.index.json", json.dumps({"weight_map": {"a": shard}}).encode())


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    "missing": (damage_tensors(lambda t: t.pop(NORM)), ["missing tensor", NORM]),
    "extra": (damage_tensors(lambda t: t.update(extra=torch.ones(2))), ["unexpected tensor", "extra"]),
    "shape": (damage_tensors(lambda t: t.update({NORM: torch.ones(5)})), [".safetensors", NORM, "(5,)", "(32,)"]),
    "nan": (damage_tensors(lambda t: t[NORM].fill_(math.nan)), [".safetensors", NORM, "NaN"]),
    "untied": (damage_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
               ["lm_head.weight", "tie_word_embeddings"]),
    "truncated": (lambda f: os.truncate(f"{f}/model.safetensors", 9000), ["model.safetensors", "incomplete"]),
    "cut_header": (lambda f: os.truncate(f"{f}/model.safetensors", 100), ["model.safetensors", "incomplete"]),
    "empty": (damage_file("model.safetensors", b""), ["model.safetensors", "not a safetensors file"]),
    "lfs": (damage_file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            ["model.safetensors", "Git LFS pointer", "git lfs pull"]),
    "duplicate": (damage_header(lambda h: h[:-1] + f', "{NORM}": ' + json.dumps(json.loads(h)[NORM]) + "}"),
                  ["model.safetensors", "twice"]),
    "outside": (index_of("../x"), ["index.json", '"../x"', "outside"]),
    "absolute": (index_of("/etc/passwd"), ["index.json", "outside"]),
    "no_shard": (index_of("model-00001-of-00002.safetensors"), ["model-00001-of-00002", "missing"]),
    "odd_index": (index_of(None), ["index.json"]),
    "empty_index": (damage_file("model.safetensors.index.json", b"{}"), ["index.json", "weight_map"]),
    "no_weights": (lambda f: os.remove(f"{f}/model.safetensors"), ["no model.safetensors"]),
    "no_config": (lambda f: os.remove(f"{f}/config.json"), ["no config.json"]),
    "half_config": (damage_file("config.json", b'{"model_type": "lla'), ["config.json", "JSON"]),
    "list_config": (damage_file("config.json", b"[]"), ["config.json"]),
    "yarn": (damage_config(rope_parameters={"rope_type": "yarn", "factor": 2.0}), ["config.json", "yarn", "llama3"]),
    "old_linear": (damage_config(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
                   ["config.json", "linear"]),
    "gemma": (damage_config(model_type="gemma"), ["config.json", "gemma", "not supported"]),
    "gelu": (damage_config(hidden_act="gelu"), ["config.json", "gelu"]),
    "window": (damage_config(model_type="mistral", sliding_window=4096), ["config.json", "sliding"]),
    "window2": (damage_config(model_type="qwen2", sliding_window=64, use_sliding_window=True),
                ["config.json", "sliding"]),
    "quantized": (damage_config(quantization_config={"bits": 4}), ["config.json", "quantized"]),
    "no_size": (damage_config(vocab_size=None), ["config.json", "vocab_size"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_checkpoint(name, checkpoint, tmp_path):
    """A checkpoint that isn't what it says is refused, with the file and the problem in the message."""
    folder = str(tmp_path / "model")
    shutil.copytree(checkpoint, folder)
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        llama.from_pretrained(folder)
    assert folder in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


# -----------------------------------------------------------------------------
# model: LoRA, checkpointing, compilation

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_lora(checkpoint, tmp_path):
    """Adapters start as the base, train alone, switch off to exactly the base, and merge on export."""
    model, config = llama.from_pretrained(checkpoint)
    row = data.collate(random_pairs(), range(6))
    with torch.no_grad():
        base = model(row)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    llama.add_lora(model, 4, 8.0, 0.0, ALL_LINEAR)
    assert model(row).equal(base)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(row).sum().backward()
        assert set(grads(model)) == {n for n, _ in model.named_parameters() if "lora_" in n}
        optimizer.step()
    assert len(adapters) == 2 * 2 * len(ALL_LINEAR)
    assert all(p.equal(weights[n]) for n, p in model.named_parameters() if n in weights)
    with torch.no_grad():
        trained = model(row)
        with llama.adapters_off(model):
            assert model(row).equal(base)
        assert model(row).equal(trained) and gap(trained, base) > 1e-2
        llama.save_pretrained(model, str(tmp_path), config, checkpoint, torch.float32)
        merged, _ = llama.from_pretrained(str(tmp_path))
        assert gap(merged(row), trained) <= 1e-5
    with pytest.raises(ValueError, match="no layer named w_proj"):
        llama.add_lora(merged, 4, 8.0, 0.0, ["q_proj", "w_proj"])


def test_lora_dropout_is_for_training_only():
    """Dropout perturbs adapters in training, never in eval mode."""
    model, row = tiny_model(), data.collate(random_pairs(), range(6))
    llama.add_lora(model, 4, 8.0, 0.5, ["q_proj"])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert not model.train()(row).equal(model(row)) and model.eval()(row).equal(model(row))


@pytest.mark.parametrize("lora", [False, True])
def test_activation_checkpointing(lora):
    """Recomputing activations changes no gradient, LoRA's dropout included."""
    model, row, found = tiny_model(), data.collate(random_pairs(), range(6)), []
    if lora:
        llama.add_lora(model, 4, 8.0, 0.3, ALL_LINEAR)
        for name, p in model.named_parameters():
            torch.nn.init.normal_(p, std=0.3)
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        model(row).sum().backward()
        found.append(grads(model))
    assert_same_grads(found[1], found[0], 1e-6)


def rows_of_two_shapes():
    """Ten rows of ten lengths, padded to 64 or 192 tokens."""
    rows = [data.collate(random_pairs(5, seed=s, longest=4 if s % 2 else 14), range(5), (64, 192)) for s in range(10)]
    assert {row.tokens.size(1) for row in rows} == {64, 192}
    assert len({str(row.trees) for row in rows}) == 10
    return rows


@pytest.mark.parametrize("path", ["trees", "flex"])
def test_one_compilation_serves_all(path, monkeypatch):
    """Compiled blocks compile once a shape, whatever the lengths in a row and however many layers."""
    graphs, compile_with = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **knobs: compile_with(f, backend=backend, **knobs))
    rows, compiled_by_depth = rows_of_two_shapes(), []
    layouts = [llama.tree_layout(pretend_gpu(monkeypatch, r) if path == "flex" else r) for r in rows]
    for n_layer in (1, 3):
        torch._dynamo.reset()
        graphs.clear()
        model = tiny_model(n_layer=n_layer)
        model.compile_blocks()
        for i, (row, layout) in enumerate(zip(rows, layouts)):
            monkeypatch.setattr(llama, "tree_layout", lambda row, layout=layout: layout)
            with torch.no_grad():
                model(row)
            if i == 1:
                compiled_by_depth.append(len(graphs))
        assert 0 < len(graphs) == compiled_by_depth[-1]
    assert compiled_by_depth[0] == compiled_by_depth[1] <= 2 * 4   # shapes x pieces between graph breaks
    torch._dynamo.reset()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_equals_eager():
    """torch.compile's own code gives the log-probs and gradients of eager, to fp32 rounding."""
    row = rows_of_two_shapes()[1]
    results = []
    for compiled in (False, True):
        model = tiny_model(n_layer=1)
        if compiled:
            model.compile_blocks()
        logps = model(row)
        logps.sum().backward()
        results.append((logps, grads(model)))
    torch._dynamo.reset()
    assert gap(results[1][0], results[0][0]) <= 1e-5
    assert_same_grads(results[1][1], results[0][1], 1e-5)


