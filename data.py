"""
Preference data: rows of a file -> chat turns -> token ids -> packs for the model.

A *row* is a line of the data. A *pair* is a row tokenized: a prompt and n responses, mostly two. (A
conversation makes a pair for each of its answers.) A *pack* is what one forward pass takes: many
pairs, end to end.

Rows come from a hub dataset, a file or a folder (see READERS). The formats, one example each:

    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}        strings
    {"system": "Be brief.", "question": "Hi",                        Intel/orca_dpo_pairs
     "chosen": "Hello!", "rejected": "No."}
    {"instruction": "Translate.", "input": "Hi", "chosen": ..,       Alpaca: the prompt is history,
     "history": [["Hello", "Hello!"], ..]}                           instruction and input
    {"prompt": [{"role": "user", "content": "Hi"}],                  TRL, conversational
     "chosen": [{"role": "assistant", "content": "Hello!"}],
     "rejected": [...]}
    {"conversations": [{"from": "human", "value": "Hi"}],            ShareGPT
     "chosen": {"from": "gpt", "value": "Hello!"}, "rejected": ..}
    {"input": {"messages": [..], "tools": [..]},                     OpenAI
     "preferred_output": [..], "non_preferred_output": [..]}
    {"prompt": "Hi", "chosen": [all turns, the response last],       ultrafeedback_binarized, whose
     "rejected": [...], "score_chosen": 8, "score_rejected": 3}      scores --use_scores takes
    {"chosen": [all turns, the response last], "rejected": [...]}    TRL, implicit prompt
    {"chosen": "The sky is blue.", "rejected": "The sky is green."}  its prompt is "The sky is"
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",                 Anthropic/hh-rlhf
     "rejected": "\n\nHuman: ..."}
    {"prompt": "Hi", "responses": ["best", "middle", "worst"],       n responses, the best first, or
     "rewards": [3, 2, 0]}                                           in any order with rewards,
    {"prompt": "Hi", "responses": ["a", "b"], "best": 1}             or two and which is better
    {"messages": [..]} or {"prompt": "Hi", "completion": "Hello!"}   for --objective=sft: all turns
                                                                     of the assistant, unless they
                                                                     are masked (see is_masked)
    {"conversation": [{"human": "Hi", "assistant": "Hello!"}]}       Firefly, and so Capybara, LIMA
    {"question": "Hi", "thoughts": "Short.", "answer": "Hello!"}     its thoughts in another field
"""
import ast
import bisect
import codecs
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import regex   # comes with tiktoken
import tiktoken
import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import (
    UserError, cache_path, check_file, first_line, limited, load_cache, parse_json, rank_and_size,
    read_json, read_text, reading, require, save_cache, sha256)

MAX_CHARS = 400_000   # of a field; tiktoken panics at a piece of about a million characters
MAX_TURNS = 500   # of a field; to render each of so many, with all before it, takes 2 to 25 s
MAX_LINE, MAX_WHOLE = 10 ** 8, 2 ** 31   # bytes, since a small .gz may unpack without end

# -----------------------------------------------------------------------------
# tokenizer

BYTE_LEVEL = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 first cuts out every digit, then cuts what is left by BYTE_LEVEL, so that a run of spaces
# may end right before a digit. This one expression comes to the same, and is faster in tiktoken.
DIGITS_BYTE_LEVEL = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
SPACE = "\u2581"   # how SentencePiece writes a space
# Where a stretch of text stands. SentencePiece puts a space before some stretches.
NOWHERE, AT_START, AFTER_TOKEN, INSIDE = -1, 0, 1, 2


def byte_alphabet():
    """Byte-level tokenizers write every byte as a printable character: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def steps_of(step):
    """A normalizer, pre_tokenizer, .. (null, one step, or a Sequence) as a list of steps."""
    if not step or step["type"] != "Sequence":
        return [step] if step else []
    return next((value for value in step.values() if isinstance(value, list)), [])


def byte_level_cuts(steps, path):
    """The regular expressions by which byte-level BPE cuts text, one after the other: each finds
    the pieces that the next one gets. Raises UserError at a step of another kind."""
    patterns = []
    for step in steps[:-1]:
        pattern = step.get("pattern") or {}
        pattern = pattern.get("Regex") or re.escape(pattern.get("String", ""))
        if step["type"] == "Digits":
            pattern = r"\p{N}" if step["individual_digits"] else r"\p{N}+"
        # libraries differ in what these mean, and in what they do with an empty match
        outside_classes = re.sub(r"\[(\\.|[^\]\\])*\]|\\[$^]", "", pattern)
        strange = re.search(r"\\[wWbBhH]|(?<!\\)\[(\\.|[^\]\\])*(\[|&&)", pattern) \
            or re.search(r"[$^]", outside_classes)
        isolated = step["type"] == "Digits" or step.get("behavior") == "Isolated"
        require(not strange and not regex.match(pattern, "")
                and (isolated or step.get("behavior") == "Removed" and step.get("invert")),
                f"{path}: pre_tokenizer {str(step)[:150]} is not supported")
        if isolated:   # what lies between two matches is a piece too
            pattern += rf"|(?:(?!{pattern})[\s\S])+"
        patterns.append(pattern)
    last = steps[-1] if steps else {"type": None}
    require(last["type"] == "ByteLevel" and not last.get("add_prefix_space"),
            f"{path}: pre_tokenizer {str(last)[:99]} is not supported; byte-level BPE as in "
            "Llama 3 or Qwen is, and SentencePiece's BPE with byte_fallback")
    if last.get("use_regex", True):
        patterns.append(BYTE_LEVEL)
    if patterns == [r"\p{N}|(?:(?!\p{N})[\s\S])+", BYTE_LEVEL]:
        return [DIGITS_BYTE_LEVEL]
    return patterns or [r"[\s\S]+"]


def metaspace_cuts(steps, merged, path):
    """What SentencePiece's pre_tokenizer does, if there is one -> the last of the places (AT_START,
    ..) at which it puts a space before a stretch of text, and the regular expressions by which it
    cuts. merged: tokens of more than one character. Raises UserError at a step of another kind."""
    place, split = NOWHERE, False
    for step in steps:
        require(len(steps) == 1 and step["type"] == "Metaspace" and step["replacement"] == SPACE,
                f"{path}: pre_tokenizer {step['type']} of SentencePiece is not supported")
        schemes = {"never": NOWHERE, "first": AT_START, "always": AFTER_TOKEN}
        place, split = schemes[step.get("prepend_scheme", "always")], step.get("split", True)
    require(split or not any(re.search(f"[^{SPACE}]{SPACE}", token) for token in merged),
            f"{path}: some tokens go on after a space, which is not supported")
    return place, [f"{SPACE}[^{SPACE}]*|[^{SPACE}]+" if split else f"{SPACE}*[^{SPACE}]+|{SPACE}+"]


def character_table(vocab, path):
    """What tiktoken starts from in SentencePiece's BPE: {bytes: ids}.

    Bytes come first, then the beginnings of characters, then whole characters. So characters form
    before any merge, and a beginning that never becomes a character gets the ids of its bytes.
    """
    spelled = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
    require(None not in spelled, f"{path}: byte_fallback, but not all 256 byte tokens")
    alone = [token for token in vocab if len(token) == 1]
    parts = {c.encode()[:n] for c in alone for n in range(2, len(c.encode()))}
    table = {bytes([b]): (i,) for b, i in enumerate(spelled)}
    table |= {part: tuple(spelled[b] for b in part) for part in parts}
    return table | {c.encode(): (vocab[c],) for c in alone}


@functools.cache
def newer_characters(cut=""):
    """{character: one that means nothing} for the characters that `regex` knows, and the older
    Unicode of tiktoken and `tokenizers` doesn't. Those in a range of the cut, as a-z is one, are
    left out, since a range is the same in any Unicode."""
    if cut:
        ranges = re.findall(r"([^\\\[\]])-([^\\\[\]])", cut)
        return {c: none for c, none in newer_characters().items()
                if not any(a <= chr(c) <= b for a, b in ranges)}
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    known = tiktoken.Encoding("assigned", pat_str=r"\P{Cn}", special_tokens={},
                              mergeable_ranks={bytes([b]): b for b in range(256)})
    assigned = known.decode(known.encode_ordinary(everything))
    return dict.fromkeys(map(ord, {*regex.findall(r"\P{Cn}", everything)} - {*assigned}), "\uffff")


def find_pieces(cut, text):
    """The pieces of text that the regular expression `cut` finds in tiktoken and `tokenizers`."""
    found = regex.finditer(cut, text.translate(newer_characters(cut)), timeout=RENDER_SECONDS)
    return [text[m.start():m.end()] for m in found]


def mergeable(model, added, path):
    """The tokens of a BPE that merges make, in the order in which tiktoken is to merge.

    `tokenizers` merges the pairs that are listed. tiktoken merges any two neighbours that are a
    token together, and takes a piece that is a token as it is. Both come to the same if each token
    is what the listed merges make of its characters. If they make something else of a token's
    characters, no text is ever merged to that token, and it is left out. But with ignore_merges
    (Llama 3) a piece of text that equals it becomes it all the same. Then it is kept, and comes
    last: tiktoken doesn't merge to it either if the merges leave three parts of it or more.

    added: the tokens beside the BPE's own.
    """
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    odd = next((m for m in merges if not {*m, "".join(m)} <= model["vocab"].keys()), None)
    require(not odd, f"{path}: merges {odd!r:.99}, but the vocabulary lacks one of these or what "
            "they make; download it again")
    ranks = {pair: rank for rank, pair in enumerate(merges)}   # the last, of a pair listed twice
    made, pieces, last = {}, [], len(merges)   # made: {token: the rank of the merge that makes it}
    whole = dict.fromkeys(token for token in model["vocab"] if model.get("ignore_merges")
                          and len(token) > 1 and token not in added)
    for token in dict.fromkeys(a + b for a, b in merges) | whole:
        parts, rank = [*token], last
        while len(parts) > 1:
            found = [ranks.get(pair, last) for pair in zip(parts, parts[1:])]
            rank = min(found)
            if rank == last:
                break
            i = found.index(rank)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if parts == [token]:
            made[token] = rank
        elif token in whole:
            require(len(parts) != 2 and not model.get("byte_fallback"), f"{path}: ignore_merges "
                    f"with {token!r}, which merges do not make, is not supported")
            pieces.append(token)
    return sorted(made, key=made.get) + pieces


class Tokenizer:
    """A checkpoint's BPE (tokenizer.json, run by tiktoken) and its chat template.

    Two families: byte-level BPE (Llama 3, SmolLM2, Qwen), and SentencePiece's BPE over characters
    (Llama 1 and 2, Mistral), which spells characters that it doesn't know in bytes.

    It gives the ids that the `tokenizers` library gives, with one difference. A *marker* is a
    special token, or another token that the template writes around turns. Where the *data* spells
    a marker, it stays text. (And with NFC, about a hundred rare combining marks may come in another
    order: those of Unicode 10 and later, which Python knows and `tokenizers` doesn't.)
    Raises UserError for files that it can't honour exactly.
    """

    def __init__(self, folder, chat_template="", chat_template_kwargs=""):
        path, self.folder = os.path.join(folder, "tokenizer.json"), folder
        require(os.path.exists(path), f"{folder}: no tokenizer.json; for a model that has only "
                "tokenizer.model, AutoTokenizer.from_pretrained and save_pretrained write one")
        files = [os.path.join(folder, f"{name}.json") for name in (
            "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "config",
            "generation_config")]
        spec, config, special_map, added_tokens, model_config, generation_config = (
            read_json(file) if os.path.exists(file) else {} for file in files)
        if "added_tokens_decoder" in config:   # then transformers reads no older file
            special_map = added_tokens = {}
        with reading(f"{path}, or a file beside it", "a tokenizer's file"):
            added = find_added_tokens(path, spec, config, special_map, added_tokens)
            self.added = {content: token["id"] for content, token in added.items()}
            self.load_bpe(spec, added, path)
            # Some added tokens are looked for in the text as it is, others in the normalized text.
            self.added_pattern = pattern_of(c for c, t in added.items() if not t.get("normalized"))
            self.normalized = {self.normalize(c, AT_START): t["id"]
                               for c, t in added.items() if t.get("normalized")}
            self.normalized_pattern = pattern_of(self.normalized)
            if self.prepend:   # the space before such a token is a part of it
                self.bytes_of |= {i: c.replace(SPACE, " ").encode()
                                  for c, i in self.normalized.items()}
            self.before_stretch = tuple(c for c, t in added.items()
                                        if not (self.prepend and t.get("normalized")))
            self.named = {"bos_token": "", "eos_token": ""} | {
                name: content_of(token) for name, token in (config | special_map).items()
                if name.endswith("_token") and content_of(token)}
            named = {*self.named.values()}
            self.special = {c: t["id"] for c, t in added.items() if t.get("special") or c in named}
            self.eos_id = self.added.get(self.named["eos_token"])
            ends = (model_config | generation_config).get("eos_token_id")
            self.end_ids = {*(ends if isinstance(ends, list) else [ends])} - {None}
            require(all(type(i) is int and abs(i) < 2 ** 31 for i in self.end_ids),
                    f"{folder}: eos_token_id of config.json or generation_config.json should be "
                    f"whole numbers (got {ends!r:.50})")
            self.text_prefix = find_text_prefix(spec)
            self.template_text, for_tools = find_chat_template(folder, config, chat_template)
            self.template = compile_template(self.template_text, chat_template or folder)
            self.tool_template = compile_template(for_tools, chat_template or folder)
        for marker in re.findall(r"<\|\w+\|>", TEMPLATES.get(chat_template, "")):
            require(marker in self.added, f"chat_template: {chat_template} needs {marker}, which "
                    "this tokenizer lacks; give a .jinja file whose turns end in {{ eos_token }}")
        with reading("chat_template_kwargs", 'an object like {"enable_thinking": false}'):
            self.template_kwargs = dict(parse_json(chat_template_kwargs or "{}"))
        for name in self.template_kwargs if self.template_text else ():
            require(name in self.template_text + for_tools,
                    f"chat_template_kwargs: the template has no variable {name!r:.50}")
        self.find_markers()
        # The turns of a conversation come again in the prompt of each later turn.
        self.encode_plain = functools.lru_cache(256)(self.encode_plain)
        content = json.dumps([spec, config, special_map, added_tokens, self.template_text,
                              for_tools, self.template_kwargs])
        flag = re.search(r'"(?!content")(\w+)": "(true|false)"', content, re.IGNORECASE)
        require(not flag, f"{folder}: its tokenizer's files, or chat_template_kwargs, have "
                f"{flag and flag[0]}, a text; write true or false without quotes")
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def load_bpe(self, spec, added, path):
        """Make tiktoken's Encoding of the vocabulary, and find out what is done to a text first."""
        model, vocab = spec["model"], spec["model"]["vocab"]
        normalizers, steps = steps_of(spec.get("normalizer")), steps_of(spec.get("pre_tokenizer"))
        byte_level = any(step["type"] == "ByteLevel" for step in steps)
        characters = bool(model.get("byte_fallback")) and not byte_level   # SentencePiece's BPE
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            require(not model.get(name), f"{path}: {name} {model[name]!r:.50} is not supported")
        require(model.get("type", "BPE") == "BPE",
                f"{path}: model type {model.get('type')!r:.50}; only BPE is supported")
        put_first = {"type": "Prepend", "prepend": SPACE}
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        for step in normalizers:
            require(step in ([put_first, spaces] if characters else [{"type": "NFC"}])
                    and normalizers.count(step) == 1,
                    f"{path}: normalizer {step} is not supported")
        self.nfc, self.prepend = {"type": "NFC"} in normalizers, put_first in normalizers
        # whether spaces are written as SPACE
        self.spaces = spaces in normalizers or characters and bool(steps)
        require(self.spaces or not self.prepend, f"{path}: Prepend alone is not supported")
        merged = mergeable(model, added, path)
        if characters:
            self.metaspace, cuts = metaspace_cuts(steps, merged, path)
            table, to_bytes = character_table(vocab, path), str.encode
        else:
            cuts, alphabet = byte_level_cuts(steps, path), byte_alphabet()
            # a byte that the vocabulary lacks has no id, and is dropped
            table = {bytes([b]): (vocab[c],) if c in vocab else () for c, b in alphabet.items()}

            def to_bytes(token):
                return bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) \
                    else token.encode()
        self.dropped = {rank: key[0] for rank, (key, ids) in enumerate(table.items()) if not ids}
        instead = model.get("unk_token") or (model.get("byte_fallback") and "<0x00>" in vocab)
        require(not self.dropped or not instead,
                f"{path}: bytes that are missing, but have other tokens, are not supported")
        table |= {to_bytes(token): (vocab[token],) for token in merged
                  if not added.get(token, {}).get("special")}
        *self.cuts, self.pattern = cuts
        self.ids = [*table.values()]   # tiktoken's ranks are the order of the table
        self.bpe = tiktoken.Encoding("checkpoint", pat_str=self.pattern, special_tokens={},
                                     mergeable_ranks={key: n for n, key in enumerate(table)})
        everything = vocab | self.added
        token_of = {i: token for token, i in everything.items()}
        odd = next((t for t, i in everything.items() if type(i) is not int or token_of[i] != t
                    or not 0 <= i < 2 ** 31), None)
        require(odd is None, f"{path}: the id of {odd!r:.50} is no whole number, or also "
                "another token's; download it again")
        self.bytes_of = {i: to_bytes(token) for i, token in token_of.items()}
        if characters:   # spaces as in a text, and byte tokens as what they stand for
            self.bytes_of = {i: b.replace(SPACE.encode(), b" ") for i, b in self.bytes_of.items()}
            self.bytes_of |= {vocab[f"<0x{b:02X}>"]: bytes([b]) for b in range(256)}
        decoder = steps_of(spec.get("decoder"))
        # whether the space that SentencePiece puts before a text is taken off again
        self.strip = any(step["type"] == "Strip" and step["start"] or step["type"] == "Metaspace"
                         and step.get("prepend_scheme") != "never" for step in decoder)

    def encode(self, text, after=""):
        """Text -> ids. Added tokens become their ids, unless `shield` has hidden them. after: the
        text that this one follows, which decides whether a space is put between them."""
        place = AT_START if not after else \
            AFTER_TOKEN if after.endswith(self.before_stretch) else INSIDE
        ids = []
        for stretch, place, token in split_at(self.added_pattern, text, place):
            stretch = self.normalize(stretch, place)
            for part, part_place, found in split_at(self.normalized_pattern, stretch, place):
                ids += self.encode_plain(part, part_place)
                ids += [self.normalized[found]] if found else []
            ids += [self.added[token]] if token else []
        return ids

    def normalize(self, text, place):
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.prepend:
            text = (SPACE + text if text and place < INSIDE else text).replace(" ", SPACE)
        return text

    def encode_plain(self, text, place):
        """Text without added tokens -> ids."""
        text = PLACEHOLDER.sub(lambda m: self.hidden.get(m[0], m[0]), text)
        if self.spaces:
            text = text.replace(" ", SPACE)
            if place <= self.metaspace and text and not text.startswith(SPACE):
                text = SPACE + text
        pieces = [text]
        with reading("tokenizer.json: pre_tokenizer", "one that can cut every text"):
            for cut in self.cuts:
                pieces = [found for piece in pieces for found in find_pieces(cut, piece)]
            ranks = [rank for piece in pieces for rank in self.bpe.encode_ordinary(piece)]
        # A byte without an id is dropped before merging, so what is left of its piece may merge.
        if not self.dropped.keys().isdisjoint(ranks):
            ranks, dropped = [], bytes(self.dropped.values())
            for piece in (found for p in pieces for found in find_pieces(self.pattern, p)):
                kept = piece.encode().translate(None, dropped)
                ranks += self.bpe._encode_single_piece(kept) if kept else []
        return [i for rank in ranks for i in self.ids[rank]]

    def decode(self, ids):
        text = b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")
        return text[1:] if self.strip and text.startswith(" ") else text

    # --- chats

    def find_markers(self):
        """Find the markers: special tokens, and others that the template writes around turns. They
        stay text where data spells them, but for the tokens around thoughts, which data may use."""
        chat, talk = "", [turn(role, "a") for role in ("user", "assistant", "user")]
        for turns in (talk, talk[:2]) if self.template_text else ():
            with contextlib.suppress(Drop):   # the rows will show what the template refuses
                chat = chat or self.render(turns)
        markers = {*self.special, *re.findall(pattern_of(self.added), chat)}
        shielded = [*sorted(m for m in markers if not THINK.fullmatch(m)), SHIELD, HIDDEN]
        self.marker_pattern = pattern_of(shielded)
        self.placeholders = {m: f"{SHIELD}{n}{SHIELD_END}" for n, m in enumerate(shielded)}
        self.hidden = {placeholder: m for m, placeholder in self.placeholders.items()}

    def shield(self, value):
        """Hide markers in data behind placeholders, which `encode` turns back into text."""
        if isinstance(value, str):
            return self.marker_pattern.sub(lambda m: self.placeholders[m[0]], value)
        if isinstance(value, dict):
            return {k: self.shield(v) for k, v in value.items()}
        return [self.shield(v) for v in value] if isinstance(value, list) else value

    def render(self, turns, add_generation_prompt=False, tools=None, documents=None,
               chat_template_kwargs=None):
        """Chat turns -> text, by the chat template. It gets what transformers gives it.

        turns: [{"role", "content", and what else a message has}]. Raises Drop where the template
        refuses them, or fails at them.
        """
        self.require_template()
        variables = self.named | self.template_kwargs | (chat_template_kwargs or {}) | dict(
            tools=tools, documents=documents, add_generation_prompt=add_generation_prompt)
        template = self.tool_template if tools is not None else self.template
        turns = with_reasoning(turns)
        no_nulls = [{k: v for k, v in t.items() if v is not None} for t in turns]
        # Beside tool calls a template may want no content (as transformers gives it), null, or "".
        for messages in (no_nulls, turns, [{"content": ""} | t for t in no_nulls]):
            try:
                with limited(RENDER_SECONDS, "chat template: to render a row"):
                    text = template.render(variables, messages=messages)
                if len(text) > 2 * MAX_CHARS:
                    raise ValueError(f"it writes over {2 * MAX_CHARS:,} characters")
                parsed = with_arguments(turns, text)
                return text if parsed == turns else self.render(
                    parsed, add_generation_prompt, tools, documents, chat_template_kwargs)
            except UserError:
                raise
            except Exception as e:   # a template is a program, and may fail in any way
                error = e
        raise Drop(f"chat template: {type(error).__name__}: {first_line(error)}") from error

    def require_template(self):
        require(self.template_text, f"{self.folder}: no chat template (a base model?); give --chat_"
                f"template={' or '.join(TEMPLATES)} if it has their markers, or else a .jinja file "
                "whose turns end in {{ eos_token }}")

    def renders_to(self, text, *args, **template):
        """Whether a conversation is rendered to `text`, though the caller left something out."""
        with contextlib.suppress(Drop):
            return self.render(*args, **template) == text

    def encode_prompt(self, turns, **template):
        """Turns up to the response -> ids, with the assistant's header at the end."""
        return self.encode(self.render(self.shield(turns), True, **self.shield(template)))

    def encode_responses(self, turns, responses, **template):
        """-> prompt ids, [response ids, ..]. A response is text, or a list of turns that ends in
        one of the assistant's. template: what `render` gets beside the turns.

        The prompt is what the model is given at inference. A response is what the model should
        write then, up to the template's end-of-turn token, or eos where the template has none.
        Both are encoded apart, so that all responses share the prompt's ids exactly. Encoded
        together, a token could straddle the border.
        """
        with limited(RENDER_SECONDS, "chat template: to render a row"):
            prompt, texts = self.render_texts(self.shield(turns), responses, self.shield(template))
        encoded = []
        for text in texts:
            ends = [m.end() for m in self.marker_pattern.finditer(text)]
            if ends and not text[ends[-1]:].strip():   # the last marker ends the turn
                ids = self.encode(text[:ends[-1]], prompt)
                require(ids[-1] in self.added.values(), "tokenizer.json: the end-of-turn token in "
                        f"{text[:ends[-1]][-20:]!r} is one only after a space (normalized: true)")
            else:
                require(self.eos_id is not None,
                        "chat template: no end-of-turn token after a response, and no eos_token")
                ids = [*self.encode(text, prompt), self.eos_id]
            encoded.append(ids)
        return self.encode(prompt), encoded

    def render_texts(self, turns, responses, template):
        """What encode_responses encodes, as text: the prompt, [response, ..]."""
        prompt = self.render(turns, True, **template)
        self.check_turns(prompt, turns, True, template)
        # what the template writes before and after a plain answer: its header, the end of its turn
        before, found, after = self.render(
            [*turns, turn("assistant", ANSWER)], **template).rpartition(ANSWER)
        if not found:
            raise Drop("the chat template leaves the response out")
        end = next((m.end() for m in self.marker_pattern.finditer(after)), len(after))
        headless = before.startswith(prompt) and self.marker_pattern.match(before, len(prompt))
        require(not headless or prompt != self.render(turns, **template), "chat template: it "
                "ignores add_generation_prompt, so a prompt has no assistant header; give another "
                "with --chat_template")
        texts = []
        for response in responses:
            new = [turn("assistant", response)] if isinstance(response, str) else response
            full = self.render_response(prompt, turns, self.shield(with_reasoning(new)), template)
            texts.append(self.continuation(prompt, before, full.removesuffix(after[end:])))
        return prompt, texts

    def render_response(self, prompt, turns, new, template):
        """Render the conversation with a response's turns, so that all that they say is in it."""
        full = self.render([*turns, *new], **template)
        # Templates leave out the thoughts of earlier answers, and some those of the last one too.
        # The model should write them, so they go into the content. There HIDDEN stands for the <
        # of their tags, by which the template would find them.
        begun = OPEN_THOUGHT.sub("", prompt)
        if not full.startswith(begun):
            begun = os.path.commonprefix([full, begun])   # slow, and mostly not needed
        written, kept = squash(full[len(begun):]), []
        for t in new:
            thought, said = t.get("reasoning_content") or "", text_of(t)
            if squash(thought) not in written:
                said = f"<think>\n{thought.strip()}\n</think>\n\n{said}"
            if squash(said) not in written:
                t = t | {"content": THINK.sub(HIDDEN + r"\1", said)}
            kept.append(t)
        if kept != new:
            full = self.render([*turns, *kept], **template)
        # What can be taken away without a change of the text is not in it.
        mute = [t | {"content": text_of(t)} | dict.fromkeys(CALLS) if any(map(t.get, CALLS)) else t
                for t in [*turns, *kept]]
        alone = turns + [t | {"content": None} if t.get("tool_calls") and text_of(t).strip() else t
                         for t in kept]
        for less, what in ((mute, "tool calls"), (alone, "what is said beside tool calls")):
            if less != turns + kept and self.renders_to(full, less, **template):
                raise Drop(f"the chat template leaves {what} out")
        self.check_turns(full, turns + kept, False, template)
        written = squash(full)
        if not all(squash(text_of(t)) in written for t in kept
                   if t["role"] == "assistant"):   # check_turns is for the others
            raise Drop("the chat template leaves a part of the response out")
        return full.replace(HIDDEN, "<")

    def check_turns(self, text, turns, generation, template):
        """Raise Drop if the text lacks a turn of a role like a tool's, or a later system turn."""
        written = squash(text)
        for i, t in enumerate(turns):
            if i == 0 or t["role"] in ("user", "assistant"):
                continue
            # Llama 3.1's template writes a tool's answer as JSON.
            forms = text_of(t), json.dumps(text_of(t), ensure_ascii=False)
            if not any(squash(form) in written for form in forms) and self.renders_to(
                    text, turns[:i] + turns[i + 1:], generation, **template):
                raise Drop(f"the chat template leaves a turn of the role {t['role'][:20]} out")

    def continuation(self, prompt, before, full):
        """The text that the model should write after the prompt.

        full: the whole conversation, rendered. Mostly it begins with the prompt. But a template
        may put the system turn into the user's last turn, which may be another turn in the whole
        conversation, or begin a thought in the prompt only. before: what the template writes
        before a plain answer to the same turns.
        """
        begun = OPEN_THOUGHT.sub("", prompt)
        thought = prompt[len(begun):].strip()   # a tag that the prompt opens, or an empty thought
        start = next((s for s in (prompt, begun, before, before.rstrip()) if full.startswith(s)),
                     None)
        if start is None:
            raise Drop("the chat template writes the prompt otherwise when a response follows")
        text = full[len(start):]
        if "</" in thought:
            if repeated := re.match(r"\s*" + NO_THOUGHT, text):
                text = text[repeated.end():]
            if THINK.match(text.lstrip()):
                raise Drop("the response has a thought, and the prompt ends in an empty one")
            return text if start == prompt else text.lstrip()
        if start == prompt:
            return text
        if not thought:   # then keep the white space that the template puts before an answer
            gap = before[len(before.rstrip()):][len(prompt) - len(prompt.rstrip()):]
            header = "".join(prompt.split()[-1:])
            return gap * (start == before and before.rstrip().endswith(header)) + text
        text, closing = text.lstrip().removeprefix(thought), thought.replace("<", "</")
        gap = prompt[len(prompt.rstrip()):]   # behind the tag, which the prompt has already
        text = text[len(os.path.commonprefix([text, gap])):]
        if closing in self.marker_pattern.split(text)[0]:
            return text
        return f"\n{closing}\n\n{text}"   # as Qwen3 writes an answer without a thought

    def end_of_turn(self):
        """The id that ends a response in training."""
        _, [response] = self.encode_responses([turn("user", "a")], ["b"])
        return response[-1]

    def stop_ids(self):
        """The ids that end a response: eos, the config files' own, the template's end of turn."""
        return (self.end_ids | {self.end_of_turn(), self.eos_id}) - {None}


def pattern_of(tokens):
    """Finds any of the tokens, the longest that there is."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def split_at(pattern, text, place):
    """Cut text at tokens. Yields (the text before a token, its place, the token), and at last (the
    text that is left, its place, None). place: where the text stands (AT_START, ..)."""
    at = 0
    for match in pattern.finditer(text):
        yield text[at:match.start()], place, match[0]
        at, place = match.end(), AFTER_TOKEN
    yield text[at:], place, None


def with_reasoning(turns):
    """The turns, with an answer's thoughts under both names that templates read."""
    found = [next((t[name] for name in THOUGHTS if t.get(name) is not None), None) for t in turns]
    return [t if said is None else {"thinking": said, **t, "reasoning_content": said}
            for t, said in zip(turns, found)]


def with_arguments(turns, text):
    """The turns, with a tool call's arguments as an object where the data has them as JSON and the
    template quoted this JSON in `text`. (vLLM always gives objects. Some templates want JSON.)"""
    def parsed(call):
        if not isinstance(call, dict):
            return call
        found = {"function": parsed(call["function"])} if "function" in call else {}
        said = call.get("arguments")
        if isinstance(said, str) and json.dumps(said, ensure_ascii=False) in text:
            with contextlib.suppress(ValueError):   # what is no JSON stays text
                found["arguments"] = parse_json(said)
        return call | found
    return [t | {"tool_calls": [*map(parsed, t["tool_calls"])]}
            if isinstance(t.get("tool_calls"), list) else t for t in turns]


def squash(text):
    return "".join(text.split())


def find_added_tokens(path, spec, config, special_map, added_tokens):
    """The tokens beside the BPE's own: {content: {"id", "special", ..}}.

    tokenizer.json has them all, except in some older checkpoints. There transformers also reads
    tokenizer_config.json, or special_tokens_map.json and added_tokens.json, and so does this.
    What isn't in the vocabulary gets the next free id there, whatever these files say.
    """
    vocab, named = spec["model"]["vocab"], config | special_map
    special = {content_of(token) for value in special_map.values()
               for token in (value if isinstance(value, list) else [value])}
    others = [t | {"id": int(i)} for i, t in (config.get("added_tokens_decoder") or {}).items()]
    others += [{"content": c, "id": i, "special": c in special} for c, i in added_tokens.items()]
    others.sort(key=lambda t: t["id"])
    others += [{"content": content_of(named[name]), "id": vocab.get(content_of(named[name])),
                "special": True} for name in ("bos_token", "eos_token") if named.get(name)]
    added = {}
    for token in [*(spec.get("added_tokens") or []), *others]:
        content, i = token["content"], token["id"]
        if content not in added:
            free = max([len(vocab), *(t["id"] + 1 for t in added.values())])
            right = vocab.get(content, free)
            require(content and i == right, f"{path}: added token {content!r} has id {i!r:.20} "
                    f"here or in another file there, but would get {right}; mend it in this one")
            require(not (token.get("lstrip") or token.get("rstrip") or token.get("single_word")),
                    f"{path}: added token {content!r} strips its surroundings, which is not "
                    "supported")
            added[content] = token
    return added


def find_text_prefix(spec):
    """The ids that `tokenizers` puts before a text that is no chat, such as Llama 3's bos."""
    for step in steps_of(spec.get("post_processor")):
        if step["type"] == "TemplateProcessing":
            names = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
            names = names[:names.index(None)]   # None is the text itself
            return [i for name in names for i in step["special_tokens"][name]["ids"]]
    return []


def content_of(token):
    """A token in a config file is its text, or an object that has it as "content"."""
    return token.get("content") if isinstance(token, dict) else token


# -----------------------------------------------------------------------------
# chat templates

RENDER_SECONDS = 2   # of CPU time, for what takes a millisecond
DATE = datetime(2024, 7, 26)   # today for every template, so that no two runs differ by their day
SHIELD, SHIELD_END, ANSWER, HIDDEN = "\ufdd0\ufdd1\ufdd2\ufdd3"   # no valid text has these
THOUGHT = r"\w{,30}(?:think|thought|reason)\w{,30}"   # the name of a tag around thoughts
THINK = re.compile(rf"<(/?{THOUGHT}>)")
ONLY_THOUGHT = re.compile(rf"\s*<({THOUGHT})>.*</\1>\s*", re.DOTALL)
NO_THOUGHT = rf"<({THOUGHT})>\s*</\1>\s*"
# a thought that the end of a prompt opens, or an empty one there
OPEN_THOUGHT = re.compile(rf"<{THOUGHT}>\s*$|{NO_THOUGHT}$")
PLACEHOLDER = re.compile(f"{SHIELD}[0-9]+{SHIELD_END}")

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
              "{{ m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}"
              "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
              "{{ m.content | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}"
              "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}


def find_chat_template(folder, config, override):
    """-> the text of the chat template ("" if there is none), and of the one for rows with tools,
    mostly the same. override: one of TEMPLATES, a .jinja file, or "" for the checkpoint's own."""
    path = os.path.expanduser(override) or os.path.join(folder, "chat_template.jinja")
    require(override in ("", *TEMPLATES) or os.path.exists(path),
            f"chat_template: no file {path} (or one of {', '.join(TEMPLATES)})")
    if override in TEMPLATES:
        template = TEMPLATES[override]
    elif os.path.exists(path):
        template = read_text(path, "a chat template")
    else:
        template = config.get("chat_template") or ""
    if isinstance(template, list):   # several, by name
        named = {t["name"]: t["template"] for t in template}
        template = named.get("default", "")
        return template, named.get("tool_use", template)
    for_tools = os.path.join(folder, "additional_chat_templates", "tool_use.jinja")
    if not override and os.path.exists(for_tools):
        return template, read_text(for_tools, "a chat template")
    return template, template


@functools.cache   # mostly the template for tools is the other one
def compile_template(text, where):
    """Compile a chat template as transformers does, in a sandbox, since strangers write them."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):   # {% generation %} only marks the assistant's text for trainers
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise Drop(f"the chat template refuses: {first_line(message or 'no reason')}")

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = {"**", "*"}   # may take hours; a time limit ends one late, if at all

        def call_binop(self, context, operator, left, right):
            times = [b for a, b in ((left, right), (right, left)) if isinstance(a, (str, list))]
            whole = [abs(x) for x in (left, right) if isinstance(x, int)]
            require(operator == "*" and not (times and times[0] > 1000)
                    and max(whole, default=0) < 2 ** 63,
                    f"{where}: chat template: {operator} of such values is not supported")
            return super().call_binop(context, operator, left, right)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False,
                  extensions=["jinja2.ext.loopcontrols", Generation])
    env.filters["tojson"] = (lambda x, ensure_ascii=False, **how:
                             json.dumps(x, ensure_ascii=ensure_ascii, **how))
    env.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    with limited(RENDER_SECONDS, f"{where}: chat template: to compile it"), \
            reading(f"{where}: chat template", "one that jinja2 can compile"):
        return env.from_string(text)


# -----------------------------------------------------------------------------
# rows: whatever layout -> turns and responses

# The fields, and what data sets call each: of several names that a row has, the first one counts. A
# new name goes in here. A layout that differs by more than names is a few lines in `translate`.
NAMES = {name: names.split() for name, names in {
    "system": "system system_prompt system_message system_instruction systemInstruction",
    "messages": "messages conversations conversation trajectory",
    "prompt": "prompt instruction question query problem",
    "input": "input context",   # what an instruction or question is about, or the prompt itself
    "chosen": "chosen chosen_response response_chosen chosen_conversations chosen_messages "
              "preferred_output response_j",
    "rejected": "rejected rejected_response response_rejected rejected_conversations "
                "rejected_messages non_preferred_output response_k reject",
    "completion": "completion response output solution answer generation",
    "thoughts": "thoughts reasoning_content thinking",   # before a completion that is text
    "responses": "responses generations",
    "rewards": "rewards ratings",
    "best": "best_from_1 best",   # of two responses: 0 or 1, a or b, model_a or model_b
    "best_from_1": "best_from_1",   # the same, where the data says 1 or 2
    "score_chosen": "score_chosen chosen_score chosen_rating rating_chosen chosen-rating "
                    "chosen_reward",
    "score_rejected": "score_rejected rejected_score rejected_rating rating_rejected "
                      "rejected-rating rejected_reward reject_reward",
    "label": "label kto_tag",
    "history": "history", "tools": "tools", "documents": "documents",
    "chat_template_kwargs": "chat_template_kwargs",
}.items()}
ROLES = {name: role for role, names in {   # what data sets call the roles
    "system": "system developer", "user": "user human prompter",
    "assistant": "assistant gpt bot chatbot chatgpt ai model",
    "tool": "tool observation tool_response function_response function",
}.items() for name in names.split()}
WHO = {name: who for who, names in {   # who says what a field of this name holds
    "system": NAMES["system"], "user": ["user", "human", *NAMES["prompt"], *NAMES["input"]],
    "assistant": ["assistant", "gpt", "bot", *NAMES["completion"]]}.items() for name in names}
# Messages kept as text, as in a CSV, have a role somewhere (a developer's may be a job), and those
# of AS_TEXT one at the beginning.
NAMES_ROLE = r"(['\"])(role|from)\1\s*:\s*(['\"])(%s)\3"
ROLE = re.compile(NAMES_ROLE % "|".join(ROLES.keys() - {"developer"}), re.IGNORECASE)
AS_TEXT = re.compile(r"\s*(?:\[\s*)?\{[^{}\[\]]*" + NAMES_ROLE % "system|user|human|assistant|gpt",
                     re.IGNORECASE)

MESSAGE = {"role", "content"}, {"from", "value"}   # the fields of a message, and no others

# how a text spells two speakers, as in BELLE ("Human: ..") and HelpSteer2 ("<extra_id_1>User")
SPEAKERS = [re.compile(rf"^(?:.{{0,4}}\b(?:{who})\s?[:\uff1a]|<extra_id_1>(?:{who})$)",
                       re.IGNORECASE | re.MULTILINE)
            for who in ("human|user|prompter", "assistant|ai|bot")]
# what chat templates write around turns, as in mlabonne/chatml_dpo_pairs, and Alpaca's and Vicuna's
RENDERED = re.compile(r"<\|(im_start|im_end|start_header_id|eot_id|user|assistant)\|>|\[/INST\]|"
                      r"<start_of_turn>|^### ?(Human|Instruction|User):|ASSISTANT:\s*\Z|"
                      r"(</s>|<\|endoftext\|>|<\|end_of_text\|>)\s*\Z",
                      re.MULTILINE)

THOUGHTS = "reasoning_content", "thinking", "reasoning"   # the names of an answer's thoughts
CALLS = "tool_calls", "function_calls"   # the latter as text, in OLMo 3
SAID = *CALLS, "tool_call_id", *THOUGHTS   # what a message says beside its content
RATINGS = "score", "rating", "rank", "reward", "label", "is_correct"   # of a message; none is used
# what says whether a message is trained on; of a weight that is something else the report tells
MASKS = "weight", "loss", "train", "training", "loss_mask", "loss_weight", "loss_scale"
OFF, ON = ("0", "0.0", "false"), ("1", "1.0", "true")

# names of fields that nobody knows, but that sound like a prompt, or like ratings of responses
PROMPT = re.compile("(prompt|question|instruction|query|input)s?$", re.IGNORECASE)
RATING = re.compile("rank|rating|score|reward|label|correct", re.IGNORECASE)


class Drop(UserError):
    """A row that is well formed but can't be used, and the reason that it is counted under."""


class BadRow(UserError):
    """A malformed row: the reason, by which --bad_rows=drop counts it, and what this row held."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class Fields(dict):
    """A row's fields, by the words of NAMES. `used` has the row's own names of those taken."""

    def __init__(self, row):
        super().__init__(row)
        self.used = set()

    def name(self, *words):
        """What the row calls a field: the first of its names that holds something, else the first
        that is there, else None."""
        there = [name for word in words for name in NAMES[word] if name in self]
        return next((name for name in there if self[name] not in (None, "")), (there or [None])[0])

    def value(self, *words):
        return self.get(self.name(*words))

    def has(self, *words):
        return self.value(*words) is not None

    def took(self, word):
        return self.name(word) in self.used

    def take(self, *words):
        """-> a field's name in the row and its value. Raises BadRow if the row lacks it."""
        name = self.name(*words)
        if name is None:
            raise self.missing(words[0])
        self.used.add(name)
        return name, parse_messages(name, self[name])

    def missing(self, word):
        if self.name(word):
            return BadRow(f'"{self.name(word)}" must not be null or empty')
        return BadRow(f'no field "{word}"', f"got {', '.join(map(str, self)) or 'none'}; fields are"
                      " named by --columns=prompt:question_text,chosen:good,rejected:bad, or a "
                      "list's by responses:answers.*.text")


@dataclass
class Row:
    """The normal form of a row: a prompt and n ways to go on."""
    turns: list             # of the prompt: {"role", "content", and what else the row has there}
    responses: list         # n of them, each a list of turns, the best first
    rewards: list           # r of each response (mmpo.py), or None where the row has none
    template: dict          # what the chat template gets beside the turns
    ranked: str             # what ranks a list of responses without rewards: "best", "order", or ""


def parse_row(row, columns={}, use_scores=False):
    """A row of any layout -> [Row, ..] and the names of the fields that were not used.

    row: an object, or the bytes of its line of JSON. A preference becomes one Row: each response
    becomes a whole dialogue, and the prompt is what these share. A conversation or a completion
    becomes a Row for each turn of the assistant in it. Raises Drop, BadRow, or UserError where to
    drop this row would leave others wrong (`first_is_best`).
    """
    given = parse_line(row)
    row = translate(rename(given, columns))
    answers = take_answers(row, columns)
    answers, rewards, ranked = best_first(row, answers, columns, use_scores)
    template = take_template(row)
    new, dialogues = make_dialogues(row, answers)
    unused = not_used(row, given, columns, new, dialogues)
    if len(dialogues) > 1:
        n = shared_turns(dialogues, new)
        return [Row(dialogues[0][:n], [d[n:] for d in dialogues], rewards, template,
                    ranked)], unused
    [turns], [new] = dialogues, new
    rows = [Row(turns[:i], [turns[i:i + 1]], rewards, template, ranked)
            for i in range(first_new(turns, new), len(turns))
            if turns[i]["role"] == "assistant" and not is_masked(turns[i])]
    if not rows:
        raise Drop("no response turn" + (
            f" (not used: {', '.join(unused):.60})" if unused and not any(
                t["role"] == "assistant" for t in turns) else ""))
    return rows, unused


def take_answers(row, columns):
    """What is trained on: [(a field's name, its value), ..]. Of several layouts in one row, chosen
    and rejected count first, then a list of responses, a completion, and a conversation, unless
    --columns names one of the later ones."""
    if row.has("chosen") or row.has("rejected") or row.has("completion") and row.name("rejected"):
        name = "chosen" if row.name("chosen") or not row.has("completion") else "completion"
        answers = [row.take(name), row.take("rejected")]
    elif row.has("responses") and not {"messages", "completion"} & columns.keys() and not (
            in_no_order(row) and is_answered(row)):
        name, values = row.take("responses")
        values = listed(name, values)
        if not values or isinstance(values, dict):
            raise BadRow(f'"{name}" must be a list of responses', f"got {values}")
        answers = [(name, value) for value in values]
    elif row.has("completion") and "messages" not in columns and (
            "completion" in columns or not is_answered(row)):
        name, value = row.take("completion")
        if isinstance(value, str) and isinstance(row.value("thoughts"), str):
            value = turn("assistant", value) | {"reasoning_content": row.take("thoughts")[1]}
        answers = [(name, value)]
    elif row.has("messages"):
        name, value = row.take("messages")
        answers = [(name, listed(name, value))]
    else:
        raise row.missing("chosen")
    texts = [row.value("prompt"), *(value for _, value in answers)]
    if len(texts) > (1 if columns else 2) and all(isinstance(text, str) and re.fullmatch(
            r'\s*\[("|null).*("|null)\]\s*', text, re.DOTALL) for text in texts):   # Arena 55k
        raise BadRow("prompt and responses are lists kept as text; make them texts or turns")
    return answers


def best_first(row, answers, columns, use_scores):
    """-> the answers, the best first; their rewards, or None; and what ranks them (Row.ranked)."""
    pair = row.took("rejected")
    rewards = take_rewards(row, pair, len(answers), use_scores)
    if rewards:   # ties stay in order
        order = sorted(range(len(answers)), key=lambda i: -rewards[i])
        if pair and order != [0, 1]:
            raise BadRow("the rejected response has the higher reward", f"got {rewards}")
        return [answers[i] for i in order], [rewards[i] for i in order], ""
    if not row.took("responses"):
        return answers, None, ""
    if {"best", "best_from_1"} & columns.keys() or row.name("best"):
        return (answers if first_is_best(row, answers) else answers[::-1]), None, "best"
    if in_no_order(row) and len(answers) > 1:
        raise BadRow('"generations" without "ratings" are in no order', "if the best is the first: "
                     "--columns=responses:generations")
    if "responses" not in columns and (rating := rating_of(row, len(answers))):
        raise BadRow(f'"{rating}" may rate the responses', f"then --columns=rewards:{rating}, or "
                     f"rewards:-{rating} of ranks; if the best is the first: --columns=responses:"
                     + row.name("responses"))
    return answers, None, "order"


def rating_of(row, n):
    """The name of a field that has a number for each of n responses and sounds like a rating."""
    for name in row.keys() - row.used:
        with contextlib.suppress(BadRow):
            if RATING.search(str(name)):
                values = listed(name, row[name])   # also where a CSV has it as text
                if len(values) == n > 1 and {*map(type, values)} <= {int, float, bool}:
                    return name
    return None


def take_template(row):
    """What the chat template gets beside the turns."""
    template = {name: value for name in ("tools", "documents", "chat_template_kwargs")
                if row.value(name) not in (None, "", "null", "None")
                and (value := listed(*row.take(name)))}
    if "tools" in template:
        template["tools"] = tools_of(template["tools"])
    if not isinstance(template.get("chat_template_kwargs", {}), dict):
        raise BadRow('"chat_template_kwargs" must be an object')
    return template


def not_used(row, given, columns, new, dialogues):
    """The names of fields that hold something, and paths of --columns, which made no difference."""
    said = {text_of(t).strip() for turns in dialogues for t in turns}
    paths = {part for path in columns.values() for part in (
        [path] if path in given else summands(path))}
    roots = {*map(root_of, paths)}
    unused = [name for name, value in row.items() if value not in (None, "", [], {})
              and name not in row.used | roots
              and not (isinstance(value, str) and (value.strip() in said or hh_turns(value)))]
    unused += [path for path in paths if at(given, path) is None]
    return unused + [*{key for turns in new for t in turns for key in t if key in RATINGS
                       or key in MASKS and str(t[key]).lower() not in (*OFF, *ON)}]


def parse_line(row):
    if isinstance(row, bytes):
        try:
            row = parse_json(row.decode())
        except UnicodeDecodeError as e:
            raise BadRow("not UTF-8", f"got {row[e.start]:#x} at byte {e.start + 1}") from None
        except ValueError as e:
            raise BadRow("invalid JSON", f"{first_line(e)}; is the line cut off, or a row, or a "
                         "list of all rows, on several lines? Then name it .json") from None
    if isinstance(row, list) and row and all(isinstance(m, dict) and "role" in m for m in row):
        row = {"messages": row}   # XTuner
    if not isinstance(row, dict):
        raise BadRow("a row must be an object with fields", f"got {kind_of(row)}"
                     + "; a list of rows is a .json file" * isinstance(row, list))
    row = {name: None if isinstance(value, float) and value != value else value   # pandas' NaN
           for name, value in row.items()}
    if None in row:   # csv puts cells without a column there, and read_csv marks too few cells so
        raise BadRow("not as many cells as columns; quote text that has commas or lines in it")
    return row


def in_no_order(row):
    """Whether the responses are generations, as of distilabel or Open-R1, that nothing rates."""
    return row.name("responses") == "generations" and not row.has("rewards") \
        and not row.has("best")


def is_answered(row):
    """Whether the row has a conversation that ends in an answer. Then a completion repeats it."""
    value = row.value("messages")
    with contextlib.suppress(BadRow):
        value = parse_messages("messages", value)
    turns = turns_of("messages", value, "") if isinstance(value, list) else []
    return turns != [] and turns[-1]["role"] == "assistant"


def tools_of(tools):
    """A row's tools as templates want them. OpenAI's old functions and LLaMA-Factory's tools are
    the function alone. Others are a list of JSON texts, or lie in an object."""
    if isinstance(tools, dict):
        tools = listed("tools", tools.get("tools"))
    return [{"type": "function", "function": tool} if "name" in tool and "type" not in tool
            else tool for tool in (listed("tools", tool) for tool in tools)]


def rename(row, columns):
    """A row -> its Fields, among which `columns` names what is found on its paths."""
    found = {name: at(row, path) for name, path in columns.items() if at(row, path) is not None}
    for name in [n for n in found if columns[n] not in row and len(summands(columns[n])) > 1]:
        values = found.pop(name)   # of a sum
        if name in ("prompt", "input", "system", "completion", "thoughts") and all(
                isinstance(text, (str, type(None))) for text in values):
            found[name] = "\n\n".join(filter(None, values))   # some rows may lack some of them
        elif None not in values:
            found[name] = values
    replaced = {*columns.values()} | ({"chosen", "rejected"} if "responses" in found else set())
    root = columns.get("prompt", "").split(".")[0]
    if root in NAMES["input"] and isinstance(row.get(root), list):   # else it would come twice
        replaced.add(root)
    fields = Fields({name: value for name, value in row.items() if name not in replaced} | found)
    for name in columns.keys() & {"prompt", "chosen", "rejected", "completion", "responses",
                                  "messages", "rewards", "best", "best_from_1"}:
        path = columns[name]
        if fields.name(name) != name and row.keys() & {path, *map(root_of, summands(path))}:
            raise BadRow(f'"{path}" must not be null or empty',
                         f"got the fields {', '.join(map(str, row))}")
    return fields


def translate(row):
    """Fields of any layout -> the same by the names of NAMES, where a layout differs in more."""
    lists = {"rating", "scores", "functions", "contents", "history"}
    for name in (lists | {"input"} if "preferred_output" in row else lists) & row.keys():
        with contextlib.suppress(BadRow):   # a CSV keeps them as text; other text stays
            row[name] = listed(name, row[name])
    if isinstance(row.get("rating"), list) and not row.has("rewards"):   # older distilabel
        row["rewards"] = row.pop("rating")
    if isinstance(row.get("scores"), list) and row.has("responses") and not row.has("rewards"):
        row["rewards"] = row.pop("scores")   # beside chosen and rejected they may rate anything
    if isinstance(row.get("functions"), list) and not row.has("tools"):   # older OpenAI
        row["tools"] = row.pop("functions")
    if isinstance(row.get("contents"), list) and not row.has("messages") and all(
            isinstance(m, dict) and "parts" in m for m in row["contents"]):   # Gemini
        row["messages"] = row.pop("contents")
    if isinstance(row.get("input"), dict):   # OpenAI's format of preferences
        row |= row.pop("input")
    if row.has("rejected") and not row.name("chosen") and str(row.get("accepted")).lower() not in (
            "none", "", "true", "false", "yes", "no", "0", "1"):
        row["chosen"] = row.pop("accepted")   # Vezora
    if row.get("initial_reason_steps") and row.has("chosen") and row.has("rejected"):
        begun = row.pop("initial_reason_steps")   # Step-DPO's beginning of both answers
        row |= {row.name(word): f"{begun}{row.value(word)}" for word in ("chosen", "rejected")}
    if row.has("messages") and row.get("rejected_message") and not row.has("rejected"):
        row["rejected"] = row.pop("rejected_message")   # OpenPipe
    if row.has("rejected") and row.has("messages") and not row.has("chosen", "completion"):
        name = row.name("messages")   # ms-swift, where the last turn is the chosen one
        *before, chosen = turns_of(name, row.pop(name), "user") or [None]
        whole = row.name("rejected") == "rejected_messages"
        row |= {"chosen": [*before, chosen]} if whole else {name: before, "chosen": chosen}
    good = row.value("label")
    says = str(good).lower() in ("true", "false", "0", "1") and row.has("completion")
    if (isinstance(good, bool) or says) and not row.has("rejected", "responses"):
        raise BadRow('unpaired: "label" says whether one response is good, and here responses are '
                     'compared; to train on the good ones, keep those alone, without "label", with '
                     "--objective=sft")
    return row


def at(row, path):
    """What a path of --columns leads to in a row, or None. The path a.0 is row["a"][0], and a.*.b
    a list of the b of everything in a. A sum, a+b, is a list of both fields, with None for one
    that is not there. A minus before a path changes the sign of its numbers."""
    if isinstance(row, dict) and path in row:
        return row[path]
    if len(summands(path)) > 1:
        found = [at(row, part) for part in summands(path)]
        return found if any(part is not None for part in found) else None
    if path.startswith("-"):
        return negative(path, at(row, path[1:]))
    head, star, rest = path.partition(".*.")
    if star:
        items = at(row, head)
        found = [at(item, rest) for item in items] if isinstance(items, list) else [None]
        return found if None not in found else None
    with contextlib.suppress(LookupError, TypeError, ValueError):
        for key in path.split("."):
            row = row[int(key)] if isinstance(row, list) else row[key]
        return row


def summands(path):
    """The paths in a sum of paths, as a and b in a+b. (In a.*.b+c the sum is below the star.)"""
    return [path] if ".*." in path else path.split("+")


def root_of(path):
    """The row's field that a path begins with."""
    return path.lstrip("-").split(".")[0]


def negative(path, value):
    """A number, or those in a list, with the other sign, also where kept as text. Keeps None."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = listed(path, value)
    if isinstance(value, list):
        return [negative(path, x) for x in value]
    try:
        return None if value is None else -float(value)
    except (TypeError, ValueError):
        raise BadRow(f"columns: {path} must be numbers", f"got {str(value)[:50]}") from None


def take_rewards(row, pair, n, use_scores):
    """r of each of the n responses, or None. pair: whether they are chosen and rejected."""
    if pair and use_scores and (row.has("responses") or not row.has("rewards")):
        (name, a), (_, b) = row.take("score_chosen"), row.take("score_rejected")
        rewards = [a, b]
    elif row.has("rewards") and not (pair and row.has("responses")):   # else they rate responses
        name, rewards = row.take("rewards")
        rewards = listed(name, rewards)
        if isinstance(rewards, dict):
            raise BadRow(f'"{name}" must be one number a response', "got object")
    else:
        return None
    with contextlib.suppress(ValueError, TypeError):   # CSV files have text, Arrow decimals
        rewards = [r if isinstance(r, (int, float)) else float(r) for r in rewards]
    if len(rewards) != n or not all(isinstance(r, (int, float)) and abs(r) < 1e30 for r in rewards):
        raise BadRow(f'"{name}" must be one number a response', f"got {str(rewards)[:50]}")
    return rewards


def first_is_best(row, answers):
    """Whether the field `best` names the first of two answers. Raises Drop at a tie."""
    name, value = row.take("best")
    said = str(value).strip().lower().removesuffix(".0")
    if re.match(r"tie|both|neither", said):
        raise Drop("no response is the better one")
    first, second = ("1", "2") if name == "best_from_1" else ("0", "1")
    places = {first: 0, second: 1, "a": 0, "b": 1, "model_a": 0, "model_b": 1}
    if said not in places or len(answers) != 2:
        # This is no BadRow: where a row counts from 1, rows that say 1 are wrong as well.
        raise UserError(f'"{name}" must say which of two responses is the better one: {first} or '
                        f"{second}, a or b, model_a or model_b; with 1 or 2 it is best_from_1 (got "
                        f"{str(value)[:30]}, {len(answers)} responses)")
    return places[said] == 0


def make_dialogues(row, answers):
    """-> the turns that each answer brings, and the dialogues that they make with the prompt."""
    asked = row.value("prompt", "input")
    new = [turns_of(name, value, "assistant", asked if isinstance(asked, str) else "")
           for name, value in answers]
    whole = all(next((t["role"] for t in turns if t["role"] != "system"), "") == "user"
                for turns in new)
    prompt = take_prompt(row, whole)
    if prompt and isinstance(row.get("history"), list):
        prompt = join(turns_of(*row.take("history"), "user"), prompt)
    if not prompt and not whole and any(len(turns) == 1 for turns in new):
        # TRL's implicit prompt, in text: as many whole words as the responses share
        texts = [value for _, value in answers if isinstance(value, str)]
        shared = re.match(r"(.*\S)\s+\S*$", os.path.commonprefix(texts), re.DOTALL)
        other = any(PROMPT.search(str(name)) and isinstance(value, str) and value.strip()
                    for name, value in row.items() if name not in row.used)
        if len(texts) < max(2, len(answers)) or not shared or row.name("prompt") or other:
            raise row.missing("prompt")
        prompt = [turn("user", shared[1])]
        new = [[turn("assistant", text[len(shared[1]):])] for text in texts]
    if row.value("system"):
        prompt = join(turns_of(*row.take("system"), "system"), prompt)
    return new, [join(prompt, turns) for turns in new]


def take_prompt(row, whole):
    """The turns before the responses. whole: each response is a whole dialogue. These repeat a
    prompt that is text, so it is not taken, and `join` takes away what they repeat of messages."""
    # A field that is called prompt is all of it, unless its text goes on from turns of the input.
    alone = row.name("prompt") == "prompt" and not (
        isinstance(row["prompt"], str) and isinstance(row.value("input"), list))
    words = ["prompt"] if whole or alone else ["prompt", "input"]
    if not whole and not row.has("prompt") and not row.took("messages"):
        words.append("messages")
    found = [row.take(word) for word in words if row.has(word)]
    texts = [value for _, value in found if isinstance(value, str)]
    if whole and texts:
        row.used.discard(row.name("prompt"))
        return []
    # turns of the input come before those of the prompt, and these before a text
    turns = [t for name, value in sorted(found, key=lambda field: field[0] not in NAMES["input"])
             if not isinstance(value, str) for t in turns_of(name, value, "user")]
    if texts:
        turns += turns_of("prompt", "\n\n".join(filter(None, texts)), "user")
    return turns


def join(prompt, turns):
    """The prompt's turns and those of an answer, without repeating what both have."""
    system, own = ([t for t in x[:1] if t["role"] == "system"] for x in (prompt, turns))
    prompt, turns = prompt[len(system):], turns[len(own):]
    n = next((n for n in range(min(len(prompt), len(turns)), 0, -1)
              if same(prompt[-n:], turns[:n])), 0)
    if system and own and not text_of(own[0]).strip():   # an empty one beside a field of its own
        own = []
    if system and own and not same(system, own):
        raise BadRow("two different system turns")
    if not n and prompt and turns and prompt[-1]["role"] == turns[0]["role"] == "assistant":
        raise BadRow("the prompt ends in a turn of the assistant", "an answer should be whole; to "
                     "train on a conversation in messages alone: --columns=messages:messages")
    return (own or system) + prompt[:len(prompt) - n] + turns


def first_new(turns, new):
    """Where in a dialogue, `turns`, the turns begin that an answer brings, `new`."""
    moved = new != [] and new[0]["role"] == "system"   # to the top of the dialogue
    return max(1, len(turns) - len(new) + moved)


def shared_turns(dialogues, new):
    """How many turns are the prompt: as many as all dialogues have in common, where an answer is
    next. No turn before those that an answer brings, `new`, is a part of a response."""
    if any(not turns or turns[-1]["role"] != "assistant" for turns in new):
        raise Drop("no response turn")
    least = max(map(first_new, dialogues, new))
    for n in range(min(map(len, dialogues)) - 1, least - 1, -1):
        if all(turns[n]["role"] == "assistant" and same(turns[:n], dialogues[0][:n])
               for turns in dialogues):
            return n
    raise Drop("prompts differ")


# --- fields and turns


def parse_messages(name, value):
    """A field's value, with messages as a list also where they are kept as text, as in a CSV, or as
    an object of lists, as `datasets` has a Sequence of objects."""
    if isinstance(value, dict) and any(names <= value.keys() for names in MESSAGE) and all(
            isinstance(x, list) for x in value.values()) and len({*map(len, value.values())}) == 1:
        return [dict(zip(value, message)) for message in zip(*value.values())]
    if isinstance(value, str) and re.fullmatch(r"\s*[\[{].*[\]}]\s*", value, re.DOTALL):
        if AS_TEXT.match(value):
            found = listed(name, value)
            if isinstance(found, list) or {"content", "value", "tool_calls"} & found.keys():
                return found
        if ROLE.search(value):
            with contextlib.suppress(BadRow):   # what can't be parsed is text that spells a role
                found = listed(name, value)
                if isinstance(found, dict):
                    return found if found.keys() in MESSAGE else value
                if all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in found):
                    return found
    return value


def turn(role, content):
    return {"role": role, "content": content}


def turns_of(name, value, role, prompt=""):
    """A field's value -> turns. It holds messages, one message, a text of this role, or an hh-rlhf
    dialogue. (A text that looks like such a dialogue, but does not repeat the prompt, is text.)"""
    if isinstance(value, str):
        if hh_turns(prompt, "user"):   # Dahoas/full-hh-rlhf, yitingxie/rlhf-reward-datasets
            value = re.sub(r"^\s*Assistant:", "", value).strip()
        hh = " ".join(prompt.split()) in " ".join(value.split()) and hh_turns(value, role)
        return hh or [turn(role, value)]
    if not isinstance(value, (list, dict)):
        raise BadRow(f'"{name}" must be a string or messages', f"got {kind_of(value)}")
    messages = value if isinstance(value, list) else [value]
    if len(messages) > MAX_TURNS:
        raise Drop(f"over {MAX_TURNS} turns")
    if name in (*NAMES["messages"], "history") and all(isinstance(m, str) for m in messages):
        messages = [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(messages)]
    turns = []
    for message in messages:
        several = exchange(message) if isinstance(value, list) else []
        for t in several or [check_message(name, message, message is value)]:
            if t["role"] in ("function_call", "tool_call"):
                t = with_calls(name, t, turns)
            elif turns and t["role"] == turns[-1]["role"] == "assistant" and ONLY_THOUGHT.fullmatch(
                    text_of(turns[-1])) and is_masked(turns[-1]) == is_masked(t):
                t["content"] = text_of(turns.pop()) + text_of(t)   # as ms-swift has a thought
            turns.append(t)
    return turns


def with_calls(name, t, turns):
    """A turn that is a call, as ShareGPT and ms-swift have it, as one of the assistant with
    tool_calls. If the last of the turns before it is the assistant's, the calls go to that one."""
    calls = listed(name, t["content"])
    calls = [{"type": "function", "function": call}
             for call in (calls if isinstance(calls, list) else [calls])]
    goes_on = turns and turns[-1]["role"] == "assistant" and not {*THOUGHTS} & t.keys() \
        and is_masked(turns[-1]) == is_masked(t)
    t = turns.pop() if goes_on else t | turn("assistant", None)
    return t | {"tool_calls": [*t.get("tool_calls", ()), *calls]}


def exchange(value):
    """The turns of what a list may have in place of a message: {"input": .., "output": ..} as in
    Capybara, {"human": .., "assistant": ..} as in Firefly, [asked, answered] as in a history, or
    [role, text] as in FastChat. [] for anything else."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value):
        if role := ROLES.get(value[0].lower()):
            return [turn(role, value[1])]
        value = dict(zip(("user", "assistant"), value))
    if not isinstance(value, dict) or not all(
            WHO.get(name) and isinstance(text, str) for name, text in value.items()):
        return []
    texts = {who: [text for name, text in value.items() if WHO[name] == who and text]
             for who in ("system", "user", "assistant")}
    if len(texts["assistant"]) > 1:
        return []
    return [turn(who, "\n\n".join(said)) for who, said in texts.items() if said]


def check_message(name, message, alone=False):
    """A message -> {"role", "content", and what else it has}, without nulls, which Arrow writes for
    what isn't there. alone: whether it is all that the field holds."""
    rest = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    role = rest.pop("role", rest.pop("from", "system" if name in NAMES["system"] else None))
    parts = next((rest.pop(key) for key in ("content", "value", "text", "parts") if key in rest),
                 None)
    if isinstance(parts, list):
        parts = take_asides(parts, rest)
    content = joined(name, parts)
    if call := rest.pop("function_call", None):   # older OpenAI
        call = listed("function_call", call)
        rest["tool_calls"] = [{"type": "function", "function": call}]
    if isinstance(rest.get("tool_calls"), str):   # as JSON
        rest["tool_calls"] = listed("tool_calls", rest["tool_calls"] or "[]")
    if not isinstance(role, str) or not (isinstance(content, str)
                                         or content is None and {*CALLS} & rest.keys()):
        raise no_message(name, message, role, content, alone)
    for key in {*THOUGHTS} & rest.keys():
        rest[key] = joined(name, rest[key] or "")
        if not isinstance(rest[key], str):
            raise BadRow(f'"{name}" has {key} that is no text', f"got {kind_of(rest[key])}")
    role = role.strip().lower().replace("-", "_")
    role = ROLES.get(role, role)
    spans = parts if isinstance(parts, list) else rest.get("train_detail") or []
    if role == "assistant" and any(map(is_masked, spans)):
        raise BadRow(f'"{name}" has turns with parts that are not to be trained on')
    # An empty list of calls goes, since templates would write its frame, or refuse it.
    return turn(role, content) | {k: v for k, v in rest.items() if v or k not in CALLS}


def take_asides(parts, rest):
    """Content's parts without thoughts and tool calls, of which a message, whose other fields are
    `rest`, has fields of their own. (LLaMA-Factory's newer format has them as parts.)"""
    kept = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "reasoning" and isinstance(part.get("value"), str):
            rest["reasoning_content"] = rest.get("reasoning_content", "") + part["value"]
        elif kind == "tool_call":
            call = {"type": "function", "function": listed("tool_call", part.get("value"))}
            rest["tool_calls"] = [*rest.get("tool_calls", ()), call]
        else:
            kept.append(part)
    return kept


def no_message(name, message, role, content, alone):
    """The BadRow about what a field has in place of a message, with the path that may help."""
    field, more = next((word for word, names in NAMES.items() if name in names), name), ""
    if alone and role is None and field in ("chosen", "rejected", "responses"):
        more = (f" with {', '.join(map(str, message))}, of which a path takes one: --columns="
                f"{field}:{name}{'.*' * (field == 'responses')}.NAME")
    elif isinstance(message, dict):
        more = f", {kind_of(role)} and {kind_of(content)}"
    elif field in ("chosen", "rejected", "completion"):
        more = (f"; of a list of texts --columns={field}:{name}.0 takes the first, and "
                f"responses:{name} all, the best first")
    return BadRow(f'"{name}" must hold messages with role and content',
                  f"got {kind_of(message)}{more}")


def joined(name, value):
    """Content that is a list of parts, as one text. Other content stays as it is."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
        kind = "text" if kind in ("input_text", "output_text") else kind   # OpenAI's Responses API
        text = next((part[key] for key in ("text", "value", "content") if key in part), None) \
            if kind == "text" else None
        if not isinstance(text, str):
            got = f"of type {kind}" if kind != "text" else f"with the fields {', '.join(part)}"
            raise BadRow(f'"{name}" has content that is no text', f"got a part {got}")
        texts.append(text)
    return "".join(texts)


def is_masked(part):
    """Whether OpenAI, ms-swift, axolotl or LLaMA-Factory would not train on this."""
    return any(str(part.get(key, 1)).lower() in OFF for key in MASKS)


def hh_turns(dialogue, role="assistant"):
    """hh-rlhf's "\n\nHuman: ...\n\nAssistant: ..." -> its turns, or [] for other text. With role
    "user" it is a prompt, which ends in a turn of the user or an empty one of the assistant."""
    first, *pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + dialogue.lstrip())
    turns = [turn(ROLES[who.lower()], what.strip())
             for who, what in zip(pieces[::2], pieces[1::2])]
    if first.strip() or not turns or turns[0]["role"] == "assistant":
        return []
    if role == "assistant" or turns[-1]["role"] == "user" and dialogue.startswith("\n\n"):
        return turns
    return turns[:-1] if turns[-1] == turn("assistant", "") else []


def text_of(turn):
    return turn["content"] or ""   # a turn of tool calls may have none


def same(a, b):
    """Whether turns say the same, but for white space and what else messages have (ids, times)."""
    a, b = ([(t["role"], text_of(t).split(), *(t.get(key) or None for key in SAID)) for t in turns]
            for turns in (a, b))
    return a == b


# how numpy prints a list of texts, which Python reads as one text, and a list of objects
WITHOUT_COMMAS = re.compile(
    r"""\s*\[(\s*('(\\.|[^'\\])*'|"(\\.|[^"\\])*")){2,}\s*\]\s*""", re.DOTALL)
OBJECTS_WITHOUT_COMMAS = re.compile(r"\} *\n *\{")


def listed(name, value):
    """A field's list or object, also where it is kept as text. Raises BadRow for anything else."""
    if isinstance(text := value, str):
        for parse in (parse_json, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = parse(text)
                break
        texts = WITHOUT_COMMAS.fullmatch(text)
        objects = value is text and text.strip()[:2] == "[{" and OBJECTS_WITHOUT_COMMAS.search(text)
        if texts or objects:
            raise BadRow(f'"{name}" is a list without commas, kept as text, as to_csv writes it',
                         f"got {' '.join(text[:50].split())}; write the data with to_json")
    if not isinstance(value, (list, dict)):
        raise BadRow(f'"{name}" must be a list', f"got {kind_of(value)}")
    return value


def kind_of(value):
    names = {type(None): "null", dict: "object", str: "string", bool: "boolean", int: "number",
             float: "number"}
    return names.get(type(value), type(value).__name__)


# -----------------------------------------------------------------------------
# reading files and hub datasets


def read_rows(source, split):
    """Yields (where, row) of a local file or folder, or of a hub dataset's split.

    source: a path, or owner/name[/data_dir][:config][@revision] of the hub. A row is an object or a
    line of JSON.
    """
    stem, packing = re.fullmatch(r"(.*?)(\.gz|\.zst)?", source, re.DOTALL).groups()
    kind = os.path.splitext(stem)[1]
    if not os.path.exists(source):
        with reading(source, "a hub dataset whose rows can be read"):
            yield from numbered(f"{source}:{split}", open_hub(source, split))
    elif os.path.isdir(source):
        with reading(source, "a folder of parquet files, or one that Dataset.save_to_disk made"):
            yield from read_folder(source, split)
    else:
        require(kind in READERS, f"{source}: unknown kind of file; use {', '.join(READERS)}, any "
                "of them also as .gz or .zst")
        what = f"a {kind[1:]} file" + {".gz": " in gzip", ".zst": " in zstd"}.get(packing, "")
        with opened(source, packing) as f, reading(source, what):
            yield from READERS[kind](source, f)


def read_objects(source):
    """Yields (where, dict) for each row of a file, of preferences or anything. Raises UserError."""
    for where, row in read_rows(source, ""):
        try:
            yield where, parse_line(row)
        except BadRow as e:
            raise UserError(f"{where}: {e}") from e


def opened(source, packing):
    check_file(source)
    if packing == ".zst":   # by pyarrow, since zstandard's reader takes half a file for a whole one
        import pyarrow
        return io.BufferedReader(pyarrow.input_stream(source))
    return (gzip.open if packing else open)(source, "rb")


def read_lines(source, f):
    for n, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
        require(len(line) <= MAX_LINE, f"{source}:{n}: a line of over {MAX_LINE:,} bytes; is it "
                "damaged?")
        line = line.removeprefix(codecs.BOM_UTF8) if n == 1 else line
        if line.strip():
            yield f"{source}:{n}", line


def read_whole(source, f):
    content = f.read(MAX_WHOLE + 1)
    require(len(content) <= MAX_WHOLE, f"{source}: over {MAX_WHOLE:,} bytes, unpacked, that are "
            "read at once; use .jsonl or .parquet")
    return content


def read_json_rows(source, f):
    content, row = read_whole(source, f), None
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        with reading(source, "valid JSON"):
            rows = parse_json(decoded(source, content))
        yield from ((f"{source}: row {i}", row) for i, row in enumerate(rows, 1))
        return
    with contextlib.suppress(ValueError):   # a file of one row, which may take several lines
        row = parse_json(content.decode("utf-8-sig"))
    if isinstance(row, dict):
        require(len(row) < 2 or not all(
            isinstance(x, dict) and "0" in x or isinstance(x, list) and not isinstance(x[0], dict)
            for x in row.values() if x), f"{source}: an object of columns; rows are a list of "
            'objects, or one a line, as to_json(orient="records", lines=True) of pandas')
        yield f"{source}:1", row
    else:   # a row a line
        yield from read_lines(source, io.BytesIO(content))


def read_csv(source, f):
    csv.field_size_limit(2 ** 31 - 1)
    separator = "\t" if re.search(r"\.tsv(\.gz|\.zst)?$", source) else ","
    content = read_whole(source, f)
    decoded(source, content)   # whose error names the line

    def lines():   # StringIO would take four bytes a character
        return io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")

    rows = csv.DictReader(lines(), delimiter=separator, strict=True)
    names = next(csv.reader(lines(), delimiter=separator), None) or [""]
    for other, name in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
        require(other not in names[0] or len(names) > 1, f"{source}: its cells are separated by "
                f"{name}; a .csv file has commas, a .tsv file tabs")
    check_columns(source, names)
    try:
        yield from ((f"{source}:{rows.line_num}", {None: ""} if None in row.values() else row)
                    for row in rows)
    except csv.Error as e:
        line = rows.reader.line_num   # rows.line_num is still that of the row before
        raise UserError(f"{source}:{line}: not CSV ({e}); is a quote missing?") from e


def read_parquet(source, f):
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(f if f.seekable() else io.BytesIO(read_whole(source, f)))
    check_columns(source, file.schema_arrow.names)
    rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
    if "arrow.json" in str(file.schema_arrow):   # columns of JSON, which Arrow gives as text
        from datasets import Features
        rows = map(Features.from_arrow_schema(file.schema_arrow).decode_example, rows)
    yield from numbered(source, rows)


def numbered(where, rows):
    """Yields (where, row) of Arrow's rows, without the nulls inside a field that stand for what
    only other rows have there."""
    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [*map(clean, value)] if isinstance(value, list) else value
    for i, row in enumerate(rows, 1):
        yield f"{where}: row {i}", {name: clean(value) for name, value in row.items()}


READERS = {".jsonl": read_lines, ".ndjson": read_lines, ".json": read_json_rows, ".csv": read_csv,
           ".tsv": read_csv, ".parquet": read_parquet}


def check_columns(source, names):
    twice = [name for name, n in Counter(names).items() if n > 1]
    require(not twice, f"{source}: columns with the same name, {twice!r:.80}; rename them")


def decoded(source, content):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise UserError(f"{source}:{line}: not UTF-8 (got {e.object[e.start]:#x}); save the file "
                        "as UTF-8") from None


def read_folder(source, split):
    """Yields (where, row) of a folder that `Dataset.save_to_disk` made, of one whose README says
    which files its splits have, as the hub's do, or of parquet files."""
    from datasets import load_dataset, load_from_disk
    from datasets.data_files import DataFilesDict, get_data_patterns
    require("[" not in split, f"{source}: {split}: of a folder a split can't be cut")
    card = os.path.join(source, "README.md")
    if {"state.json", "dataset_dict.json"} & {*os.listdir(source)}:
        found = load_from_disk(source)
    elif os.path.isfile(card) and re.search("^configs:", read_text(card, "text"), re.MULTILINE):
        try:   # it says what files its splits have; streamed, for the cache would not know a file
            # that has changed under the same time
            found = load_dataset(source, streaming=True)
        except ValueError as e:
            raise UserError(f"{source}: {' '.join(str(e).split()):.160}; give one of its folders "
                            "or files") from e
    else:   # splits by the files' names
        here = glob.escape(source)
        files = glob.glob(f"{here}/**", recursive=True)
        require(any(file.lower().endswith(".parquet") for file in files),
                f"{source}: no parquet files in this folder; of others give the names, as *.jsonl")
        found = load_dataset("parquet", streaming=True, data_files=DataFilesDict.from_patterns(
            get_data_patterns(here), here, allowed_extensions=[".parquet", ".PARQUET"]))
    splits = found if isinstance(found, dict) else {split: found}
    # one that is alone is taken in place of train.py's defaults, and where none is asked for
    require(split in splits or len(splits) == 1 and split in ("train_prefs", "test_prefs", ""),
            f"{source}: no split {split}; it has {', '.join(splits)}; give --train_split (or "
            "--eval_split)")
    yield from numbered(source, splits.get(split, next(iter(splits.values()))))


def open_hub(source, split):
    """A split of a hub dataset, as `datasets` has it on the disk. Raises UserError."""
    from datasets import load_dataset
    require(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)+(:[\w.-]+)?(@[\w./-]+)?", source)
            and os.path.splitext(source)[1] not in (*READERS, ".gz", ".zst"),
            f"{source}: no such file; give a local file or a hub dataset (owner/name)")
    path, _, revision = source.partition("@")
    path, _, config = path.partition(":")
    owner, name, *data_dir = path.split("/")
    try:
        dataset = load_dataset(f"{owner}/{name}", config or None, split=split,
                               data_dir="/".join(data_dir) or None, revision=revision or None)
    except Exception as e:
        raise UserError(f"{source}: no such file here, and split {split} of that hub dataset can't "
                        f"be had ({' '.join(str(e).split()):.160}); check the name, give owner/name"
                        ":config, --train_split (or --eval_split), or a local file") from e
    check_revision(source, f"{owner}/{name}", revision, dataset)
    return dataset


def commits_of(dataset):
    """The hub's commits that a dataset's files are of, by which their folders are named."""
    files = getattr(dataset, "cache_files", [])
    return {os.path.basename(os.path.dirname(file["filename"])) for file in files}


def check_revision(source, name, revision, dataset):
    """Raise UserError if a hub dataset is of another revision than was asked for. Where `datasets`
    can't reach the hub, it gives the revision that it downloaded last, whichever that is."""
    from huggingface_hub import constants, dataset_info
    ref = os.path.join(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs",
                       revision or "main")
    commit = read_text(ref, "a revision") if os.path.isfile(ref) else revision
    if commit and not all(found.startswith(commit) for found in commits_of(dataset)):
        try:
            dataset_info(name, revision=revision or None)   # then the hub was reached
        except Exception as e:
            raise UserError(f"{source}: the hub can't be reached ({type(e).__name__}), and what "
                            "was downloaded before is of another revision") from e


# -----------------------------------------------------------------------------
# tokenized pairs, cached on disk


@dataclass
class Pairs:
    """N tokenized pairs. `tokens` has them end to end, each its prompt, then responses 1 to n."""
    tokens: np.ndarray      # (sum of all lengths,) int32
    lengths: np.ndarray     # (N, 1 + n) int64: tokens of the prompt and of each response
    rewards: np.ndarray     # (N, n) float32, or (0, n) where the data has none
    report: str = ""        # what was read, dropped and cut, for people

    @staticmethod
    def from_ids(pairs, rewards=(), report=""):
        """pairs: a list of [prompt ids, response 1 ids, ..]. report: see Pairs."""
        lengths = np.array([[len(ids) for ids in pair] for pair in pairs], dtype=np.int64)
        rewards = np.array(rewards, dtype=np.float32).reshape(-1, lengths.shape[1] - 1)
        tokens = np.concatenate([ids for pair in pairs for ids in pair]).astype(np.int32)
        return Pairs(tokens, lengths, rewards, report)

    def __post_init__(self):
        self.starts = np.concatenate(([0], self.lengths.sum(1).cumsum()))

    def __len__(self):
        return len(self.lengths)

    @property
    def n_responses(self):
        return self.lengths.shape[1] - 1

    def ids(self, i):
        """Pair i -> [prompt ids, response 1 ids, ..]."""
        tokens = self.tokens[self.starts[i]:self.starts[i + 1]]
        return np.split(tokens, self.lengths[i].cumsum()[:-1])

    def fingerprint(self):
        digest = hashlib.sha256()
        for array in (self.tokens, self.lengths, self.rewards):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def subset(self, indices):
        tokens = [self.tokens[self.starts[i]:self.starts[i + 1]] for i in indices]
        return Pairs(np.concatenate(tokens), self.lengths[indices],
                     self.rewards[indices] if len(self.rewards) else self.rewards, self.report)


def hold_out(pairs, n, seed):
    """Split pairs -> those to train on, n random ones that are held out."""
    require(n < len(pairs), f"eval_pairs: {n} of {len(pairs)} pairs held out leaves none to train "
            "on; lower it, or give eval_dataset")
    order = np.random.default_rng(seed).permutation(len(pairs))
    return pairs.subset(np.sort(order[n:])), pairs.subset(order[:n])


def n_leaked(pairs, held_out):
    """How many held-out pairs have a prompt that is trained on too, or one that begins or continues
    such a prompt, as the pairs of one conversation do."""
    def prompts(some):
        return [some.tokens[start:start + n].tobytes()
                for start, n in zip(some.starts, some.lengths[:, 0])]

    trained = sorted({*prompts(pairs)})
    known, sizes = {*trained}, {len(prompt) for prompt in trained}

    def leaked(prompt):
        after = bisect.bisect_left(trained, prompt)
        return any(prompt[:n] in known for n in sizes if n <= len(prompt)) \
            or after < len(trained) and trained[after].startswith(prompt)
    return sum(map(leaked, prompts(held_out)))


def load_pairs(sources, split, tokenizer, max_length, max_prompt_length, bad_rows="error",
               columns="", use_scores=False, held_out=False):
    """Read, tokenize and truncate every row of comma-separated sources -> Pairs, cached on disk.

    split: of hub datasets, one for all or one for each source, separated by commas.
    Truncation keeps the prompt's last max_prompt_length tokens, then cuts the response's end at
    max_length minus the prompt. bad_rows "drop" counts malformed rows instead of ending the run.
    columns: "prompt:question_text,chosen:good" says what rows have in place of prompt and chosen.
    use_scores: score_chosen and score_rejected are the rewards. held_out: columns were given for
    the training data, and none of them may be there. Raises UserError that names the source and
    line.
    """
    found, columns = find_sources(sources, split), parse_columns(columns)
    args = (max_length, max_prompt_length, bad_rows, columns, use_scores, held_out)
    contents = content(found)
    path = cache_path("pairs", [tokenizer.fingerprint, *args, contents], code=["data.py"])
    if z := load_cache(path):
        return Pairs(z["tokens"], z["lengths"], z["rewards"], str(z["report"]))
    pairs = tokenize(found, tokenizer, *args)
    require(content(found) == contents, f"{sources}: changed while it was read; start again")
    save_cache(path, tokens=pairs.tokens, lengths=pairs.lengths, rewards=pairs.rewards,
               report=pairs.report)
    return pairs


def content(sources):
    """What identifies the content of [(source, split), ..]: sums of files, or a hub's commits."""
    contents = []
    for source, split in sources:
        files = [source, *sorted(glob.glob(f"{glob.escape(source)}/**", recursive=True))]
        # in a folder also their names, which say to what split a parquet file belongs
        sums = [[file[len(source):], sha256(file)] for file in files if os.path.isfile(file)]
        if not os.path.exists(source):   # a hub dataset is known by its commit
            sums = [source, *sorted(commits_of(open_hub(source, split)))]
        contents.append([split, *sums])
    return contents


def find_sources(sources, split):
    """-> [(a path or a hub dataset's name, its split), ..], a glob replaced by what it finds."""
    names, splits = [s.strip() for s in sources.split(",") if s.strip()], split.split(",")
    require(names, f'no dataset in "{sources}"; give files, folders or hub ids')
    require(len(splits) in (1, len(names)), f"{split}: {len(splits)} splits for {len(names)} "
            "datasets; give one for all, or one for each")
    found = []
    for name, split in zip(names, splits * len(names)):
        name = os.path.expanduser(name)
        files = [] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if "**" in name:   # this finds folders, and what is in them once more
            files = [*filter(os.path.isfile, files)] or files
        found += [(file, split.strip()) for file in files or [name]]
    return found


def parse_columns(text):
    """"prompt:question_text,chosen:good" -> {"prompt": "question_text", "chosen": "good"}."""
    columns = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, path = part.partition(":")
        require(path and name in NAMES and name not in columns, f'columns: "{part}" should be '
                "NAME:FIELD, with a field of the data and one of these names, each once: "
                f"{', '.join(NAMES)}")
        require(name != "rewards" or not re.search(r"^ranks?$|^[^-].*\.rank$", path), "columns: a "
                f"rank is lower for the better response; rewards:-{path} takes the negative")
        columns[name] = path
    return columns


def tokenize(sources, tokenizer, max_length, max_prompt_length, bad_rows, columns, use_scores,
             held_out):
    """load_pairs without the cache. Each row is used, or dropped and counted by the reason."""
    tokenizer.require_template()
    pairs, rewards, ranked, seen, used = [], [], set(), 0, 0
    # for the report: how many rows or turns there are of each reason, remark or field
    dropped, left_out, cut, told, unused, ignored = (Counter() for _ in range(6))
    every = (found for source in sources for found in read_rows(*source))
    for where, line in tqdm(every, "rows", disable=None):   # None: only on a terminal
        seen += 1
        try:
            with reading(where, "a row of a known layout"):
                rows, names = parse_row(line, columns, use_scores)
            made, good, reasons, shortened = [], [], [], Counter()
            for row in rows:   # one, or the turns of a conversation
                try:
                    made.append(tokenize_row(row, tokenizer, max_length, max_prompt_length,
                                             shortened))
                    good.append(row)
                except Drop as reason:
                    reasons.append(str(reason))
            if not made:
                raise Drop(reasons[0])
            row = good[-1]   # which has the turns of all
            check_alike(row, pairs, rewards, ranked)
            ignored.update(ignored_fields(tokenizer, row))
        except Drop as reason:
            dropped[str(reason)] += 1
            continue
        except BadRow as e:
            require(bad_rows == "drop", f"{where}: {e}; fix or delete the row, or --bad_rows=drop")
            dropped[e.reason] += 1
            continue
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        used += 1
        cut.update(shortened)
        told.update(remarks(row, tokenizer.marker_pattern))
        unused.update(names)
        left_out.update(reasons)
        ranked.add(row.ranked)
        pairs += made
        rewards += [row.rewards for row in good if row.rewards is not None]

    why, files = f" ({counted(dropped)})" * bool(dropped), ", ".join(name for name, _ in sources)
    require(pairs, f"{files}: 0 usable pairs of {seen:,}{why}; check "
            "the data" + (", or raise max_length" if dropped["no room for a response"] else ""))
    paths = {name: [*dict.fromkeys([path, *summands(path)])] for name, path in columns.items()}
    lacking = [[path for path in some if unused[path] == used] for some in paths.values()]
    require(not any(lacking) or held_out and all(lacking),   # then it is of another layout
            f"columns: no row of {files} has a field {', '.join(sum(lacking, []))}")
    for name, path in columns.items():
        require(unused[name] < used or all(lacking), f"columns: {name}:{path} is not used, since "
                "the rows have other fields that count before it")
    of_columns = sum(paths.values(), [])
    lacked = Counter({path: unused[path] for path in of_columns if unused[path] < used})
    idle = [str(name) or '""' for name in unused + ignored if name not in of_columns]
    return Pairs.from_ids(pairs, rewards, "; ".join(filter(None, [
        f"{seen:,} rows = {used:,} used + {sum(dropped.values()):,} dropped{why}",
        len(pairs) != used and f"{len(pairs):,} pairs, one for each turn of the assistant",
        left_out and f"turns left out: {counted(left_out)}",
        *(f"{n:,} {remark}" for remark, n in told.items()),
        counted(lacked) and f"rows that lack a field of --columns: {counted(lacked)}",
        counted(cut) and f"cut to length: {counted(cut)}",
        idle and f"fields not used: {', '.join(idle)}"])))


def remarks(row, markers):
    """What a person should know of a row that is trained on. The report writes it after the number
    of such rows. markers: the pattern of what the tokenizer keeps as text in the data."""
    response_turns = [t for turns in row.responses for t in turns]
    texts, prompt = [text_of(t) for t in row.turns + response_turns], text_of(row.turns[-1])
    if any(t["role"] != "assistant" for t in response_turns):
        yield "with turns of others in a response, a user's or a tool's, which are trained on too"
    if any(all(who.search(text_of(t)) for who in SPEAKERS) for t in row.turns
           if t["role"] == "user"):
        yield ("with what looks like a dialogue in one turn of the user, which it stays; messages, "
               "or turns at \\n\\nHuman: and \\n\\nAssistant:, are turns of their own")
    if any(map(has_null, [row.template, *(t[key] for t in row.turns + response_turns
                                          for key in CALLS if key in t)])):
        yield ("with null inside of tools, calls or template variables, which the template gets; "
               "if to_json wrote it for what other rows have there, give the data as parquet")
    if any(RENDERED.search(text) or markers.search(text) for text in texts):
        yield ("in which the data spells special tokens, or markers of a chat template, which are "
               "text there; was it rendered before?")
    # as in python_code_instructions_18k_alpaca, whose prompt holds all of the row
    if any(len(said) > 20 and prompt.rstrip().endswith(said)
           for said in (text_of(turns[-1]).strip() for turns in row.responses)):
        yield "whose prompt ends in a response; does its field hold both?"
    if len(prompt) > 20 and any(text_of(turns[0]).strip().startswith(prompt.strip())
                                for turns in row.responses):
        yield "with a response that begins with the prompt; does its field hold both?"
    if row.ranked == "order" and len(row.responses) > 1:
        yield "whose first response counts as the best, and so on, as nothing ranks them"
    if row.rewards and len({*row.rewards}) == 1 < len(row.rewards):
        yield "with equal rewards, whose first response counts as the best"


def has_null(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(has_null, inside))


def counted(reasons):
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common() if n)


def check_alike(row, pairs, rewards, ranked):
    """Raise BadRow unless a row can be trained on together with the rows before it, of which these
    are the pairs, the rewards, and what ranked them (Row.ranked)."""
    n = len(row.responses)
    if pairs and n != (first := len(pairs[0]) - 1):
        raise BadRow(f"{n} responses where the first row has {first}", "to take the first and the "
                     "last of each, where they go from the best to the worst: --columns=chosen:"
                     "responses.0,rejected:responses.-1" if row.ranked == "order" else
                     "keep as many of each row, as its best and its worst" * bool(row.rewards))
    if pairs and (row.rewards is None) != (not rewards):
        raise BadRow('some rows have "rewards" and some have not')
    if {"best", "order"} <= ranked | {row.ranked}:
        raise BadRow('some rows have "best" and some have not')


def ignored_fields(tokenizer, row):
    """The names in row.template that the chat template does not use: it writes the same without."""
    prompt = tokenizer.render(row.turns, True, **row.template) if row.template else ""
    return [name for name in row.template if tokenizer.renders_to(
        prompt, row.turns, True, **{k: v for k, v in row.template.items() if k != name})]


def tokenize_row(row, tokenizer, max_length, max_prompt_length, cut):
    """-> [prompt ids, response ids, ..]. Counts what it truncates in `cut`. Raises Drop, BadRow."""
    parts = [row.turns, *row.responses]
    # the last turn of each part must say something, which may be tool calls
    if not all(text_of(turns[-1]).strip() or any(map(turns[-1].get, SAID)) for turns in parts):
        raise Drop("empty")
    values = [value for turns in parts for t in turns for value in t.values()]
    if max(len(str(value)) for value in [*values, *row.template.values()]) > MAX_CHARS:
        raise Drop(f"over {MAX_CHARS:,} characters")
    try:
        prompt, encoded = tokenizer.encode_responses(row.turns, row.responses, **row.template)
    except RecursionError:
        raise BadRow("nested too deeply") from None
    room = max_length - min(len(prompt), max_prompt_length)
    if room < 1:
        raise Drop("no room for a response")
    if len(encoded) > 1 and encoded[0][:room] == encoded[-1][:room]:
        raise Drop("identical")
    cut["prompts"] += len(prompt) > max_prompt_length
    cut["responses"] += sum(len(r) > room for r in encoded)
    return [np.array(ids, dtype=np.int32)
            for ids in (prompt[-max_prompt_length:], *(r[:room] for r in encoded))]


# -----------------------------------------------------------------------------
# batches: which pairs meet in a step, on which rank, in which pack


@functools.lru_cache(1)   # an epoch has many steps
def epoch_order(n_pairs, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n_pairs)


def batch_indices(n_pairs, batch_size, seed, iter_num):
    """The pairs of step iter_num. An epoch visits all, shuffled. Its last batch may be smaller."""
    steps = -(-n_pairs // batch_size)
    epoch, step = divmod(iter_num, steps)
    return epoch_order(n_pairs, seed, epoch)[step * batch_size:][:batch_size]


def plan_packs(lengths, pack_tokens, world_size=1, equal_counts=False):
    """Pairs of `lengths` (N,) tokens -> for each rank its packs, each an array of positions.

    Ranks get about equal numbers of tokens, and fit their pairs into packs of at most pack_tokens.
    A rank without a pair gets one empty pack, since all ranks take part in a step. With
    equal_counts (for FSDP, whose ranks run forward together) empty packs fill the shorter lists.
    """
    ranks, load = [[] for _ in range(world_size)], [0] * world_size
    for i in np.argsort(-lengths, kind="stable"):   # the longest first
        r = load.index(min(load))
        ranks[r].append(i)
        load[r] += lengths[i]
    packs = [best_fit(members, lengths, pack_tokens) for members in ranks]
    count = max(1, *map(len, packs)) if equal_counts else 1
    return [[np.array(pack, dtype=np.int64) for pack in mine + [[]] * (count - len(mine))]
            for mine in packs]


def best_fit(members, lengths, pack_tokens):
    """Spread `members` over packs of at most pack_tokens, each into the fullest one with room."""
    packs, room = [], []   # room: (free tokens, which pack), sorted
    for i in members:
        at = bisect.bisect_left(room, (lengths[i],))
        free, pack = room.pop(at) if at < len(room) else (pack_tokens, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(i)
        bisect.insort(room, (free - lengths[i], pack))
    return packs


@dataclass
class Pack:
    """What one forward pass takes: pairs end to end, T tokens, R of them in responses.

    A pair is a tree here, [prompt | response 1 | .. | response n]: the prompt stands there once,
    every response continues it, and none sees another (model.py, tree_rule).
    """
    tokens: torch.Tensor         # (1, T)
    positions: torch.Tensor      # (1, T) every response starts again where its prompt ended
    tree: torch.Tensor           # (T,) which tree a token belongs to, -1 for padding
    branch: torch.Tensor         # (T,) 0 in a prompt, i in response i
    predict_from: torch.Tensor   # (R,) index of the token whose state predicts a response token
    targets: torch.Tensor        # (R,) the id of that response token
    response: torch.Tensor       # (R,) which response of the pack it belongs to, tree by tree
    members: torch.Tensor        # (pairs,) the positions of these pairs in their batch
    trees: list                  # [prompt, response 1, .., response n] tokens of each tree
    n_responses: int             # of each pair

    def to(self, device):
        """A copy on the device. The CPU goes on before it is there."""
        def moved(x):
            x = x.pin_memory() if device.type == "cuda" else x
            return x.to(device, non_blocking=True)
        return Pack(**{name: moved(x) if isinstance(x, torch.Tensor) else x
                       for name, x in vars(self).items()})

    def sum_by_response(self, per_token):
        """Sum of per_token (R,) over each response -> (pairs, n) fp32."""
        sums = per_token.new_zeros(len(self.members) * self.n_responses)
        return sums.index_add(0, self.response, per_token).view(-1, self.n_responses)


def pad_multiple(device):
    """A pack's tokens are padded to a multiple of this. On a GPU flex attention takes 128 at a
    time, and packs of one such block would be compiled apart from the others."""
    return 256 if device.type == "cuda" else 1


def collate(pairs, batch, members, pad_to=1):
    """The pairs at positions `members` of `batch` (indices into pairs) -> one Pack, padded to a
    multiple of pad_to tokens."""
    columns, start, indices = [], 0, batch[members]   # start: tokens so far
    for t, i in enumerate(indices):
        lengths, tokens = pairs.lengths[i], pairs.tokens[pairs.starts[i]:pairs.starts[i + 1]]
        prompt, index = lengths[0], np.arange(len(tokens))
        branch = np.repeat(np.arange(len(lengths)), lengths)
        within = index - np.repeat(lengths.cumsum() - lengths, lengths)   # place in its branch
        # the prompt's last token predicts a response's first, then each predicts the next
        before = start + np.where(within == 0, prompt - 1, index - 1)
        scored = branch > 0
        columns.append((tokens, within + prompt * scored, np.full_like(index, t), branch,
                        before[scored], tokens[scored],
                        pairs.n_responses * t + branch[scored] - 1))
        start += len(tokens)
    trees = pairs.lengths[indices].tolist()
    if padding := max(1, -(-start // pad_to)) * pad_to - start:   # an empty pack is all padding
        index, none = np.arange(padding), np.zeros(0)
        # each token of padding is a branch, so that it sees itself only
        columns.append((0 * index, 0 * index, 0 * index - 1, 1 + index, none, none, none))
        trees.append([padding, 0])
    tokens, positions, *rest = (torch.from_numpy(np.concatenate(parts).astype(np.int64))
                                for parts in zip(*columns))
    return Pack(tokens[None], positions[None], *rest, torch.from_numpy(members), trees,
                pairs.n_responses)


@torch.no_grad()
def score(model, pairs, indices, pack_tokens, title=None, also=None):
    """The summed log-probs of each response of the pairs at `indices` -> (len(indices), n) fp32.
    also: what else the model is to give of each token; its sums come second, (2, len(indices), n).

    Every rank calls this, computes a share, and gets all. title: of a progress bar, if any.
    """
    device = model.head_weight.device
    rank, ranks = rank_and_size()
    sums = torch.zeros(2 if also else 1, len(indices), pairs.n_responses, device=device)
    packs = plan_packs(pairs.lengths[indices].sum(1), pack_tokens, ranks, equal_counts=True)[rank]
    was_training = model.training
    model.eval()
    for members in tqdm(packs, title, disable=None if title and rank == 0 else True):
        pack = collate(pairs, indices, members, pad_multiple(device)).to(device)
        for some, per_token in zip(sums, model(pack, also)):
            some[pack.members] = pack.sum_by_response(per_token)
    model.train(was_training)
    if ranks > 1:
        dist.all_reduce(sums)
    return sums.cpu() if also else sums[0].cpu()
