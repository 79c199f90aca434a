"""
Preference data: rows -> chat turns -> token ids -> packed batch rows.

Row formats, one example each (a hub dataset, or .jsonl, .jsonl.gz, .json, .parquet, .csv):

    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}        strings
    {"system": "Be brief.", "question": "Hi",                        Intel/orca_dpo_pairs
     "chosen": "Hello!", "rejected": "No."}
    {"prompt": [{"role": "user", "content": "Hi"}],                  TRL, conversational
     "chosen": [{"role": "assistant", "content": "Hello!"}],
     "rejected": [...]}
    {"prompt": "Hi", "chosen": [all turns, the response last],       ultrafeedback_binarized
     "rejected": [...]}
    {"chosen": [all turns, the response last], "rejected": [...]}    TRL, implicit prompt
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",                 Anthropic/hh-rlhf
     "rejected": "\n\nHuman: ..."}
    {"prompt": "Hi", "responses": ["best", "middle", "worst"],       n responses, best first;
     "rewards": [3, 2, 0]}                                           rewards: optional, in any row

A row becomes a prompt and n responses as token ids, each response ending in its end-of-turn token.
"""
import bisect
import csv
import gzip
import hashlib
import io
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

MAX_CHARS = 400_000   # of a field; a piece of about a million makes tiktoken panic

# -----------------------------------------------------------------------------
# tokenizer

BYTE_LEVEL = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# digits one by one are cut out first, so what follows a space run may be a digit: (?![^\s\p{N}])
DIGITS_BYTE_LEVEL = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def byte_alphabet():
    """GPT-2's printable stand-in for each byte -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(pre_tokenizer, path):
    """The regular expression that cuts text into pieces, from tokenizer.json's pre_tokenizer."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [(step or {}).get("type") for step in steps]
    if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        use_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and use_regex:
            return BYTE_LEVEL
        if kinds == ["Digits", "ByteLevel"] and use_regex and steps[0].get("individual_digits"):
            return DIGITS_BYTE_LEVEL
        if (kinds == ["Split", "ByteLevel"] and not use_regex
                and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
                and "Regex" in steps[0].get("pattern", {})):
            return steps[0]["pattern"]["Regex"]
    raise ValueError(f"{path}: this tokenizer is not byte-level BPE as Llama-3, SmolLM2 or Qwen "
                     "have it (SentencePiece, as in Llama-2 and TinyLlama, is not supported)")


class Tokenizer:
    """A checkpoint's byte-level BPE (tokenizer.json, run by tiktoken) and chat template (jinja2).

    Token for token equal to `tokenizers`, with one difference: a special token that *data* spells
    stays text; only the template's own markers become special tokens.
    Raises FileNotFoundError or ValueError for files it can't honour exactly.
    """

    def __init__(self, folder, chat_template=""):
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{folder}: no tokenizer.json; byte-level BPE checkpoints have "
                                    "one (Llama-3, SmolLM2, Qwen)")
        spec, config, special_map, added_tokens, model_config, generation = (
            read_object(folder, f"{name}.json") for name in (
                "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "config",
                "generation_config"))
        if not isinstance(spec.get("model"), dict):
            raise ValueError(f"{path}: not a tokenizer's file; download it again")

        pattern = split_pattern(spec.get("pre_tokenizer"), path)
        normalizer = spec.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}) or spec["model"].get("type") != "BPE":
            raise ValueError(f"{path}: normalizer {normalizer} with model "
                             f"{spec['model'].get('type')} is not supported")
        self.nfc = normalizer is not None

        # tokenizer.json has all added tokens, but in some checkpoints: what transformers reads then
        if "added_tokens_decoder" not in config:
            config = config | special_map
            special = token_names(list(special_map.values()))
            config["added_tokens_decoder"] = {
                i: {"content": c, "special": c in special} for c, i in added_tokens.items()}
        try:
            added = {t["content"]: t | {"id": int(i)}
                     for i, t in (config["added_tokens_decoder"] or {}).items()}
            added |= {t["content"]: t for t in spec.get("added_tokens") or []}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{folder}: a file of the tokenizer has added tokens that are none; "
                             "download it again") from None
        if odd := [c for c, t in added.items()
                   if t.get("lstrip") or t.get("rstrip") or t.get("single_word")]:
            raise ValueError(f"{path}: added token {odd[0]!r} strips its surroundings, "
                             "which is not supported")
        alphabet = byte_alphabet()
        try:
            ranks = {bytes(alphabet[c] for c in token): i
                     for token, i in spec["model"]["vocab"].items() if token not in added}
        except KeyError as e:
            raise ValueError(f"{path}: token with character {e} outside the byte "
                             "alphabet") from None
        self.check_merges(spec["model"], path)
        self.bytes_of = ({i: b for b, i in ranks.items()}
                         | {t["id"]: c.encode() for c, t in added.items()})
        self.n_vocab = max(self.bytes_of) + 1
        # tiktoken needs all 256 bytes; we drop the ids that stand in for those the vocabulary lacks
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        ranks |= {b: self.n_vocab + i for i, b in enumerate(missing)}
        self.unknown = {self.n_vocab + i for i in range(len(missing))}
        self.bpe = tiktoken.Encoding("checkpoint", pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens={})

        self.added = {c: t["id"] for c, t in added.items()}
        self.special = {c: t["id"] for c, t in added.items() if t.get("special")}
        self.special_ids = set(self.special.values())
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.special_names = [*sorted(self.special, key=len, reverse=True), "\ufdd0"]
        self.special_pattern = re.compile("|".join(map(re.escape, self.special_names)))
        named = {k: config.get(k) for k in ("bos_token", "eos_token")}
        named = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
        self.bos_token, self.eos_token = named["bos_token"], named["eos_token"]
        self.eos_id = self.added.get(self.eos_token)
        ends = (model_config | generation).get("eos_token_id")
        self.end_ids = {i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int}
        self.template_text = find_chat_template(folder, config, chat_template)
        markers = re.findall(r"<\|\w+\|>", TEMPLATES.get(chat_template, ""))
        if lacking := [m for m in markers if m not in self.special]:
            raise ValueError(f"chat_template: {chat_template} needs {lacking[0]}, which this "
                             "tokenizer lacks; give another template")
        self.template = compile_template(self.template_text, folder)
        content = json.dumps([spec, config, special_map, added_tokens, self.template_text])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @staticmethod
    def check_merges(model, path):
        """tiktoken merges by token id: the ids must be in the order of the merges."""
        merges = (m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or [])
        ids = np.array([model["vocab"].get(a + b, -1) for a, b in merges])
        if (ids < 0).any() or (np.diff(ids) < 0).any():
            raise ValueError(f"{path}: merges and token ids are in different orders, "
                             "which is not supported")

    def encode(self, text):
        """Text -> ids. Added tokens spelled in the text become their ids, but for shielded ones."""
        ids, at = [], 0
        for match in self.added_pattern.finditer(text):
            ids += self.encode_plain(text[at:match.start()])
            ids.append(self.added[match[0]])
            at = match.end()
        return ids + self.encode_plain(text[at:])

    def encode_plain(self, text):
        if not text:
            return []
        if "\ufdd0" in text:
            text = SHIELDED.sub(lambda m: self.special_names[int(m[1])], text)
        ids = self.bpe.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)
        return [i for i in ids if i not in self.unknown] if self.unknown else ids

    def shield(self, text):
        """Special tokens in data -> placeholders that `encode` turns back into plain text."""
        return self.special_pattern.sub(
            lambda m: f"\ufdd0{self.special_names.index(m[0])}\ufdd1", text)

    def decode(self, ids):
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def render(self, turns, add_generation_prompt=False):
        """Chat turns [{"role", "content"}] -> text, by the chat template."""
        import jinja2
        try:
            return self.template.render(
                messages=turns, add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "", eos_token=self.eos_token or "",
                date_string="26 Jul 2024")   # fixed: not the day of the run
        except Refused as e:
            reason = (str(e).splitlines() or ["no reason"])[0]
            raise ValueError(f"the chat template refuses this row: {reason}") from None
        except Exception as e:   # a template is a program
            kind = "" if isinstance(e, jinja2.TemplateError) else f"{type(e).__name__}: "
            raise ValueError(f"chat template: {kind}{e}".splitlines()[0]) from None

    def encode_prompt(self, turns):
        """Turns up to the response -> ids, the assistant's header last."""
        return self.encode(self.render(self.shield_turns(turns), add_generation_prompt=True))

    def encode_responses(self, turns, responses):
        """-> prompt ids, [response ids]. Prompt and responses are encoded apart, so that all
        responses share exactly the prompt's ids; each ends with the template's end-of-turn token,
        or eos."""
        turns = self.shield_turns(turns)
        prompt = self.render(turns, add_generation_prompt=True)
        encoded = []
        for response in responses:
            full = self.render(turns + [{"role": "assistant", "content": self.shield(response)}])
            if not full.startswith(prompt):
                raise ValueError("chat template: a conversation does not start with its own "
                                 "prompt; give another with --chat_template=FILE.jinja")
            ids = self.encode(full[len(prompt):])
            end = next((i for i, t in enumerate(ids) if t in self.special_ids), None)
            if end == 0:
                raise ValueError("chat template: it ignores add_generation_prompt, so a prompt has "
                                 "no assistant header; give another with --chat_template")
            if end is None and self.eos_id is None:
                raise ValueError("chat template: no end-of-turn token after a response and no "
                                 "eos_token")
            encoded.append(ids + [self.eos_id] if end is None else ids[:end + 1])
        return self.encode(prompt), encoded

    def shield_turns(self, turns):
        return [{"role": t["role"], "content": self.shield(t["content"])} for t in turns]

    def stop_ids(self):
        """Ids that end a response: eos, what the configs say, the template's end of turn."""
        _, [response] = self.encode_responses([{"role": "user", "content": "a"}], ["b"])
        return self.end_ids | {response[-1]} | ({self.eos_id} - {None})


def token_names(value):
    """The tokens that special_tokens_map.json names: strings, objects with "content", or lists."""
    if isinstance(value, list):
        return {name for v in value for name in token_names(v)}
    return {value.get("content") if isinstance(value, dict) else value}


def read_object(folder, name):
    """A JSON object in a checkpoint's folder; {} where there is no such file."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; download it again")
    return value


class Refused(Exception):
    """What a template raises for a conversation it can't render."""


SHIELDED = re.compile("\ufdd0(\\d+)\ufdd1")   # noncharacters: never in valid text

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
    """A named template or a .jinja file if given, else the checkpoint's own."""
    if override in TEMPLATES:
        return TEMPLATES[override]
    if override:
        override = os.path.expanduser(override)
        if not os.path.exists(override):
            raise FileNotFoundError(f"chat_template: no file {override} "
                                    f"(or one of {', '.join(TEMPLATES)})")
        return open(override, encoding="utf-8").read()
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        return open(path, encoding="utf-8").read()
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not template:
        raise ValueError(f"{folder}: no chat template (a base model?); give --chat_template="
                         f"{' or '.join(TEMPLATES)} or a .jinja file")
    return template


def compile_template(text, where):
    """A chat template as transformers compiles it, in a sandbox: it comes with the weights."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):   # {% generation %}: marks assistant tokens, changes no text
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise Refused(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols", Generation])
    env.filters["tojson"] = (lambda x, indent=None, **_:
                             json.dumps(x, ensure_ascii=False, indent=indent))
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: "26 Jul 2024"}
    try:
        return env.from_string(text)
    except jinja2.TemplateError as e:
        raise ValueError(f"{where}: chat template: {e}") from None


# -----------------------------------------------------------------------------
# rows: whatever format -> turns and responses


class Drop(Exception):
    """This row can't be used; the message is the reason it is counted under."""


def parse_row(row):
    """A row of any format above -> (turns, responses, rewards or None), preferred response first.

    Raises Drop(reason) for content that can't be used, ValueError for a row that is malformed.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with fields (got {kind_of(row)})")
    turns, responses = parse_responses(row)
    rewards = row.get("rewards")
    if rewards is not None and (not isinstance(rewards, list) or len(rewards) != len(responses)
                                or not all(type(r) in (int, float) and abs(r) < 1e30
                                           for r in rewards)):
        raise ValueError('"rewards" must be one number a response')
    if rewards and sorted(rewards, reverse=True) != rewards:
        raise ValueError('"rewards" must not rise: responses are in order, the best first')
    return turns, responses, rewards


def parse_responses(row):
    """-> (turns, responses), preferred response first."""
    if "responses" in row:
        responses = row["responses"]
        if not isinstance(responses, list) or not responses:
            raise ValueError(f'"responses" must be a list of strings (got {kind_of(responses)})')
        return prompt_turns(row), [text({"responses": r}, "responses") for r in responses]
    for field in ("chosen", "rejected"):
        if field not in row:
            raise ValueError(f'no field "{field}" (got {", ".join(map(str, row)) or "none"})')
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = check_turns(chosen, "chosen"), check_turns(rejected, "rejected")
        if [t["role"] for t in chosen[-1:] + rejected[-1:]] != ["assistant", "assistant"]:
            raise Drop("no response turn")
        if chosen[:-1] != rejected[:-1]:
            raise Drop("prompts differ")
        turns = chosen[:-1]
        if isinstance(row.get("prompt"), list):   # which the lists repeat, or go on from
            prompt = check_turns(row["prompt"], "prompt")
            turns = turns if turns[:len(prompt)] == prompt else prompt + turns
        turns = with_system(row, turns) if turns else prompt_turns(row)
        return turns, [chosen[-1]["content"], rejected[-1]["content"]]
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if "prompt" in row or "question" in row:
        return prompt_turns(row), [chosen, rejected]
    if not chosen.lstrip().startswith("Human:"):
        raise ValueError('no field "prompt", and "chosen" is not in hh-rlhf form; '
                         'add a prompt column')
    if not rejected.lstrip().startswith("Human:"):
        raise ValueError('"chosen" is in hh-rlhf form but "rejected" is not')
    chosen, rejected = hh_turns(chosen), hh_turns(rejected)
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Drop("no response turn")
    if chosen[:-1] != rejected[:-1]:
        raise Drop("prompts differ")
    return chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]]


def prompt_turns(row):
    """The turns before the response, from prompt (or question) and system."""
    if isinstance(row.get("prompt"), list):
        return with_system(row, check_turns(row["prompt"], "prompt"))
    prompt = text(row, "question" if "question" in row and "prompt" not in row else "prompt")
    if re.match(r"\s*Human:.*\n\nAssistant:\s*$", prompt, re.DOTALL):
        turns = hh_turns(prompt)[:-1]
    else:
        turns = [{"role": "user", "content": prompt}]
    return with_system(row, turns)


def with_system(row, turns):
    """The row's system prompt, if it has one and turns don't start with one, and turns."""
    if not row.get("system") or [t["role"] for t in turns[:1]] == ["system"]:
        return turns
    return [{"role": "system", "content": text(row, "system")}] + turns


def hh_turns(dialogue):
    """hh-rlhf's "\n\nHuman: ...\n\nAssistant: ..." -> turns, split at the markers."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", "\n\n" + dialogue.lstrip())
    role = {"Human": "user", "Assistant": "assistant"}
    return [{"role": role[who], "content": what.strip()}
            for who, what in zip(pieces[1::2], pieces[2::2])]


def check_turns(turns, field):
    """A list of messages with nothing but role and content."""
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f'"{field}" must hold messages with role and content '
                             f'(got {kind_of(turn)})')
        text(turn, "content")
    return [{"role": t["role"], "content": t["content"]} for t in turns]


def text(row, field):
    if field not in row:
        raise ValueError(f'no field "{field}" (got {", ".join(map(str, row)) or "none"})')
    if not isinstance(row[field], str):
        raise ValueError(f'"{field}" must be a string (got {kind_of(row[field])})')
    return row[field]


def kind_of(value):
    names = {type(None): "null", dict: "object", str: "string", bool: "boolean", int: "number",
             float: "number"}
    return names.get(type(value), type(value).__name__)


# -----------------------------------------------------------------------------
# reading files and hub datasets


def read_rows(source, split):
    """(where, row) of a local file or a hub dataset (owner/name, or owner/name:config).

    split: hub only.
    """
    if not os.path.exists(source):
        if (source.startswith((".", "/"))
                or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source)
                or source.endswith((".jsonl", ".gz", ".json", ".parquet", ".csv"))):
            raise FileNotFoundError(f"{source}: no such file; give a local file or a hub dataset "
                                    "(owner/name)")
        yield from read_hub(source, split)
    elif source.endswith((".jsonl", ".jsonl.gz")):
        yield from read_jsonl(source)
    elif source.endswith(".json"):
        rows = parse_json(open(source, encoding="utf-8-sig", errors="replace").read())
        if isinstance(rows, ValueError):
            raise ValueError(f"{source}: {rows}")
        if not isinstance(rows, list):
            raise ValueError(f"{source}: must be a list of rows (got {kind_of(rows)}); "
                             "one row a line is .jsonl")
        yield from ((f"{source}: row {i}", row) for i, row in enumerate(rows, 1))
    elif source.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet
        try:
            batches = pyarrow.parquet.ParquetFile(source).iter_batches()
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{source}: row {i}", row) for i, row in enumerate(rows, 1))
        except pyarrow.ArrowException as e:
            raise ValueError(f"{source}: not a parquet file ({str(e).splitlines()[0]})") from None
    elif source.endswith(".csv"):
        csv.field_size_limit(2 ** 31 - 1)
        with open(source, encoding="utf-8-sig", errors="replace", newline="") as f:
            for row in (reader := csv.DictReader(f)):
                if None in row:   # what is left over is under None
                    row = ValueError("more cells than columns; quote text that has commas in it")
                yield f"{source}:{reader.line_num}", row
    else:
        raise ValueError(f"{source}: unknown kind of file; "
                         "use .jsonl, .jsonl.gz, .json, .parquet or .csv")


def read_jsonl(source):
    try:
        with gzip.open(source) if source.endswith(".gz") else open(source, "rb") as f:
            lines = io.TextIOWrapper(f, encoding="utf-8-sig", errors="replace")
            for n, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{source}:{n}", parse_json(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{source}: damaged gzip file ({e})") from None


def parse_json(string):
    """The value, or a ValueError (not raised: it is the row's) that says what is wrong."""
    def no_duplicates(pairs):
        keys = [k for k, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError("a key appears twice in one object")
        return dict(pairs)
    try:
        return json.loads(string, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as e:
        return ValueError(f"invalid JSON at column {e.colno}; is the line cut off?")
    except RecursionError:
        return ValueError("JSON nested too deeply")
    except ValueError as e:
        return ValueError(f"invalid JSON: {e}")


def read_hub(source, split):
    from datasets import load_dataset
    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except Exception as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise OSError(f"{source}: no such file here, and split {split} of that hub dataset can't "
                      f"be had ({reason}); check the name and the split, or give a local "
                      "file") from None
    yield from ((f"{source}:{split}: row {i}", row) for i, row in enumerate(dataset, 1))


# -----------------------------------------------------------------------------
# tokenized pairs, cached on disk


@dataclass
class Pairs:
    """N tokenized rows; `tokens` has them end to end, each prompt, response 1, .., response n."""
    tokens: np.ndarray      # (sum of all lengths,) int32
    lengths: np.ndarray     # (N, 1 + n) int64: tokens of the prompt and of each response
    rewards: np.ndarray     # (N, n) float32, or (0, n) where the data has none
    report: str = ""        # what was read, dropped and cut, for people

    @staticmethod
    def from_rows(rows, rewards=(), report=""):
        """rows: [prompt ids, response 1 ids, ..] each."""
        lengths = np.array([[len(ids) for ids in row] for row in rows], dtype=np.int64)
        rewards = np.array(rewards, dtype=np.float32).reshape(-1, lengths.shape[1] - 1)
        tokens = np.concatenate([ids for row in rows for ids in row]).astype(np.int32)
        return Pairs(tokens, lengths, rewards, report)

    def __post_init__(self):
        self.starts = np.concatenate(([0], self.lengths.sum(1).cumsum()))

    def __len__(self):
        return len(self.lengths)

    def ids(self, i):
        """Row i -> [prompt ids, response 1 ids, ..]."""
        row = self.tokens[self.starts[i]:self.starts[i + 1]]
        return np.split(row, self.lengths[i].cumsum()[:-1])

    def fingerprint(self):
        arrays = self.tokens, self.lengths, self.rewards
        return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()

    def subset(self, indices):
        rows = [self.tokens[self.starts[i]:self.starts[i + 1]] for i in indices]
        return Pairs(np.concatenate(rows) if rows else self.tokens[:0], self.lengths[indices],
                     self.rewards[indices] if len(self.rewards) else self.rewards, self.report)


def hold_out(pairs, n, seed):
    """-> the other pairs, n random ones."""
    if n >= len(pairs):
        raise ValueError(f"eval_pairs: {n} of {len(pairs)} pairs held out leaves none to train on; "
                         "lower it, or give eval_dataset")
    order = np.random.default_rng(seed).permutation(len(pairs))
    return pairs.subset(np.sort(order[n:])), pairs.subset(order[:n])


def cache_path(kind, key):
    """Where something computed from `key` (anything json can write) is kept.

    Whoever edits the code that computes it gets it computed again.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    files = ("data.py", "model.py") if kind == "reference" else ("data.py",)
    code = [open(os.path.join(here, file), "rb").read() for file in files]
    folder = os.environ.get("NANOMMPO_CACHE") or os.path.expanduser("~/.cache/nanommpo")
    digest = hashlib.sha256(json.dumps(key).encode() + b"".join(code)).hexdigest()
    return os.path.join(folder, f"{kind}-{digest[:24]}.npz")


def load_pairs(sources, split, tokenizer, max_length, max_prompt_length, bad_rows="error"):
    """Read, tokenize and truncate every row of comma-separated sources -> Pairs, cached on disk.

    Truncation: the prompt's last max_prompt_length tokens, then the response's end at max_length
    minus the prompt. bad_rows "drop" counts malformed rows by reason instead of ending the run.
    Raises ValueError or OSError that names the source and line.
    """
    sources = [os.path.expanduser(s.strip()) for s in sources.split(",") if s.strip()]
    path = cache_path("pairs", [tokenizer.fingerprint, max_length, max_prompt_length,
                                bad_rows, [source_fingerprint(s, split) for s in sources]])
    if os.path.exists(path):
        with np.load(path) as z:
            return Pairs(z["tokens"], z["lengths"], z["rewards"], str(z["report"]))
    pairs = tokenize(sources, split, tokenizer, max_length, max_prompt_length, bad_rows)
    save_cache(path, tokens=pairs.tokens, lengths=pairs.lengths, rewards=pairs.rewards,
               report=pairs.report)
    return pairs


def save_cache(path, **arrays):
    """np.savez, whole or not at all; a cache that can't be written costs time, not the run."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.tmp{os.getpid()}"
        with open(temporary, "wb") as f:
            np.savez(f, **arrays)
        os.replace(temporary, path)
    except OSError as e:
        print(f"note: {path} not written ({e.strerror}); this will be computed again next time")


def source_fingerprint(source, split):
    """Changes when a file's bytes do. A hub dataset counts by name: its own library caches it."""
    if not os.path.exists(source):
        return [source, split]
    with open(source, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def tokenize(sources, split, tokenizer, max_length, max_prompt_length, bad_rows):
    rows, rewards = [], []
    seen, dropped, cut = 0, Counter(), Counter()
    for source in sources:
        for where, row in read_rows(source, split):
            seen += 1
            try:
                if isinstance(row, ValueError):
                    raise row
                ids, row_rewards = tokenize_row(row, tokenizer, max_length, max_prompt_length, cut)
                if rows and len(ids) != len(rows[0]):
                    raise ValueError(f"{len(ids) - 1} responses where the first row has "
                                     f"{len(rows[0]) - 1}")
                if rows and (row_rewards is None) != (not rewards):
                    raise ValueError('some rows have "rewards" and some have not')
            except Drop as reason:
                dropped[str(reason)] += 1
                continue
            except ValueError as e:
                if str(e).startswith("chat template") or bad_rows == "error":
                    raise ValueError(f"{where}: {e}" + (
                        "" if str(e).startswith("chat template") else
                        "; fix or delete the row, or --bad_rows=drop")) from None
                reason = re.split(r" \(got| at column", str(e))[0]   # less this row's details
                dropped[reason] += 1
                continue
            rows.append([np.array(x, dtype=np.int32) for x in ids])
            if row_rewards is not None:
                rewards.append(row_rewards)
    report = f"{seen:,} rows = {len(rows):,} used + {sum(dropped.values()):,} dropped"
    if dropped:
        report += f" ({', '.join(f'{n:,} {reason}' for reason, n in dropped.most_common())})"
    if any(cut.values()):
        report += f"; cut to length: {', '.join(f'{n:,} {what}' for what, n in cut.items())}"
    if not rows:
        why = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
        why = f" ({why})" if dropped else ""
        raise ValueError(f"{', '.join(sources)}: 0 usable pairs of {seen:,}{why}; check the data"
                         + (", or raise max_length" if dropped["no room for a response"] else ""))
    return Pairs.from_rows(rows, rewards, report)


def tokenize_row(row, tokenizer, max_length, max_prompt_length, cut):
    """-> [prompt ids, response ids, ..], rewards or None; counts truncations in `cut`."""
    turns, responses, rewards = parse_row(row)
    texts = [t["content"] for t in turns] + responses
    if not all(s.strip() for s in responses) or not turns or not turns[-1]["content"].strip():
        raise Drop("empty")
    if max(map(len, texts)) > MAX_CHARS:
        raise Drop(f"over {MAX_CHARS:,} characters")
    prompt, encoded = tokenizer.encode_responses(turns, responses)
    room = max_length - min(len(prompt), max_prompt_length)
    if room < 1:
        raise Drop("no room for a response")
    cut["prompts"] += len(prompt) > max_prompt_length
    cut["responses"] += sum(len(r) > room for r in encoded)
    encoded = [r[:room] for r in encoded]
    if len(encoded) > 1 and encoded[0] == encoded[-1]:
        raise Drop("identical")
    return [prompt[-max_prompt_length:], *encoded], rewards


def describe_example(pairs, tokenizer, i=0):
    """Row i as text and as token ids, for a person to check before the run."""
    prompt, *responses = pairs.ids(i)
    lines = [f"example: prompt of {len(prompt)} tokens, responses of {[len(r) for r in responses]}",
             "| " + tokenizer.decode(prompt[-200:].tolist()).replace("\n", "\n| ")]
    names = ["chosen", *[f"response {j}" for j in range(2, len(responses))], "rejected"]
    for name, r in zip(names, responses):
        lines.append(f"|-- {name}, starts at token {len(prompt)}: ids "
                     f"{prompt[-3:].tolist()} >>> {r[:6].tolist()} .. {r[-2:].tolist()}")
        lines.append("| " + tokenizer.decode(r[:60].tolist()).replace("\n", "\n| ")
                     + (" ..." if len(r) > 60 else ""))
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# batches: which rows meet in a step, on which rank, in which packed row


def batch_indices(n_rows, batch_size, seed, iter_num):
    """Rows of step iter_num. Each epoch is a permutation; its last batch may be smaller."""
    steps = -(-n_rows // batch_size)
    epoch, step = divmod(iter_num, steps)
    return np.random.default_rng([seed, epoch]).permutation(n_rows)[step * batch_size:][:batch_size]


def pack(lengths, row_tokens, world_size=1, shapes=(), equal_rows=False):
    """Trees of `lengths` (N,) tokens -> for each rank its packed rows, each an array of indices.

    Ranks get about equal tokens (longest first, each to the emptiest rank); a rank packs its trees
    best-fit into rows of at most row_tokens. Where collate pads to fixed shapes, a row that fewer
    tokens of smaller shapes would hold is cut into such rows. A rank without a tree gets one
    empty row: all ranks must take part in a step. Ranks may get different numbers of rows, unless
    equal_rows (FSDP) asks for empty ones where there are fewer.
    """
    ranks = [[] for _ in range(world_size)]
    load = [0] * world_size
    for i in np.argsort(-lengths, kind="stable"):
        r = load.index(min(load))
        ranks[r].append(i)
        load[r] += lengths[i]
    packed = []
    for members in ranks:
        rows = best_fit(members, lengths, row_tokens)
        if shapes and not equal_rows:
            rows = [part for row in rows for part in short_rows(row, lengths, shapes)]
        packed.append(rows)
    most = max(map(len, packed)) if equal_rows else 1
    return [[np.array(row, dtype=np.int64) for row in rows + [[]] * (most - len(rows))]
            for rows in packed]


def best_fit(members, lengths, row_tokens):
    """Indices `members` into lists of at most row_tokens, each to the fullest that has room."""
    rows, room = [], []   # room: (free tokens, which row), sorted
    for i in members:
        at = bisect.bisect_left(room, (lengths[i],))
        free, row = room.pop(at) if at < len(room) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (free - lengths[i], row))
    return rows


def short_rows(row, lengths, shapes):
    """[row], or rows of the smaller shapes that hold its trees in fewer tokens with padding."""
    *smaller, size = sorted(shapes)
    if not smaller or lengths[row].max() > smaller[-1]:
        return [row]
    parts = [short for part in best_fit(row, lengths, smaller[-1])
             for short in short_rows(part, lengths, smaller)]
    padded = sum(min(n for n in smaller if n >= lengths[part].sum()) for part in parts)
    return parts if padded < size else [row]


@dataclass
class Row:
    """A batch row: trees end to end (see model.tree_layout). T tokens, R of them in responses."""
    tokens: torch.Tensor         # (1, T)
    positions: torch.Tensor      # (1, T) every response of a tree restarts where its prompt ended
    tree: torch.Tensor           # (T,) which tree a token is of, -1 for padding
    branch: torch.Tensor         # (T,) 0 in a prompt, i in response i
    predict_from: torch.Tensor   # (R,) index of the token whose state predicts a response token
    targets: torch.Tensor        # (R,) that response token's id
    response: torch.Tensor       # (R,) which of the row's responses it is of, tree by tree
    trees: list                  # [prompt, response 1, .., response n] tokens of each tree
    n_responses: int

    def to(self, device):
        return Row(**{name: to_device(x, device) if isinstance(x, torch.Tensor) else x
                      for name, x in vars(self).items()})


def to_device(tensor, device):
    """A copy to the GPU that nobody waits for."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def collate(pairs, indices, shapes=()):
    """Rows `indices` of pairs -> one Row, padded to the smallest of `shapes` that holds it."""
    tokens, positions, tree, branch, predict_from, targets, response = ([] for _ in range(7))
    start = n_responses = 0
    for t, i in enumerate(indices):
        prompt, *responses = pairs.ids(i)
        tokens.append(prompt)
        positions.append(np.arange(len(prompt)))
        stem, start = start + len(prompt) - 1, start + len(prompt)
        for ids in responses:
            tokens.append(ids)
            positions.append(len(prompt) + np.arange(len(ids)))
            # the prompt's last token predicts a response's first, then each predicts the next
            predict_from.append(np.concatenate(([stem], np.arange(start, start + len(ids) - 1))))
            targets.append(ids)
            response.append(np.full(len(ids), n_responses))
            start += len(ids)
            n_responses += 1
        tree.append(np.full(pairs.lengths[i].sum(), t))
        branch.append(np.repeat(np.arange(len(responses) + 1), pairs.lengths[i]))
    trees = [pairs.lengths[i].tolist() for i in indices]
    size = next((n for n in sorted(shapes) if n >= start), start)
    padding = max(size, 1) - start   # an empty row is one token of padding
    if padding:
        tokens.append(np.zeros(padding))
        positions.append(np.arange(padding))
        tree.append(np.full(padding, -1))
        branch.append(np.arange(1, padding + 1))     # each sees itself only
        trees.append([padding, 0])

    def tensor(parts):
        if not parts:
            return torch.zeros(0).long()
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return Row(tensor(tokens)[None], tensor(positions)[None], tensor(tree), tensor(branch),
               tensor(predict_from), tensor(targets), tensor(response), trees, n_responses)
