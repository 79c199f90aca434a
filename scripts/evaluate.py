"""
What a model learned, what it forgot and how it talks: a table, and a JSON file beside each folder.

$ python -m scripts.evaluate out/mine                # on what its run (the first one's) held out
$ python -m scripts.evaluate out/mine --pairs= --choices arc_easy.jsonl.gz      # on these alone
$ python -m scripts.evaluate out/mmpo out/dpo --reference=HuggingFaceTB/SmolLM2-135M-Instruct \
      --pairs=test.jsonl --choices arc_easy.jsonl.gz lambada.jsonl.gz --text=book.txt

- *Learned:* how often the chosen response of a pair is likelier than the rejected one, by mean and
  by summed log-probs, and how often it gained more than that since the reference, the model before
  training (implicit). Beside these the accuracy of "the longer one", and the accuracies on pairs
  whose chosen response is the shorter one.
- *Forgotten:* multiple-choice files (a line {"pairs": [[context, continuation], ..], "gold":
  index}), the perplexity of a text, KL(reference || policy) on the reference's own answers.
- *Talks:* its answers to held-out prompts: tokens, the share that ends by itself, the share of
  4-grams that were in the same answer before. Three answers are shown in full.

All but the answers are log-probs of continuations of a context. Continuations that share a context
are one tree of a pack (data.Pack), where the context is computed once. Multiple-choice numbers are
those of lm-evaluation-harness: acc by summed log-probs, acc_norm by log-probs a character; an item
with one choice (LAMBADA) is right where the likeliest tokens spell it, and has a perplexity.

Intervals are 95%, from a bootstrap that draws prompts with all their pairs, or multiple-choice
items, or windows of the text. Weights are fp32 (products TF32 on a GPU), but bf16 where fp32 would
fill more than 0.6 of the memory.
"""
import argparse
import hashlib
import json
import os
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/evaluate.py`
import data
import mmpo
import model as llama
from configurator import (
    UserError, all_beside_the_checkout, beside_the_checkout, cache_path, check_numbers, load_cache,
    one_line_errors, printable, read_run_settings, read_text, reading, require, run_sum, save_cache,
    sha256, write_json)
from scripts import cost
from scripts.report import DEFAULTS

BRANCHES = 16   # continuations of a tree, at most

# -----------------------------------------------------------------------------
# log-probs, and intervals


def score(model, requests, title=None, greedy=False, pack_tokens=0):
    """[(context, continuation), ..], tuples of ids -> log pi(continuation|context) of each (N,), in
    nats. With `greedy` also whether the likeliest tokens are the continuation -> (2, N)."""
    continuations = {}   # by context, each once
    for context, continuation in dict.fromkeys(requests):
        continuations.setdefault(context, []).append(continuation)
    trees = [(context, some[i:i + BRANCHES]) for context, some in continuations.items()
             for i in range(0, len(some), BRANCHES)]
    n = max(len(some) for _, some in trees)
    pairs = data.Pairs.from_ids([[context, *some, *[()] * (n - len(some))]
                                 for context, some in trees])   # () is a response of no tokens
    # more on a GPU, since even a short pack takes a while to launch
    pack_tokens = pack_tokens or (32768 if model.head_weight.is_cuda else 4096)
    sums = data.score(model, pairs, np.arange(len(trees)), pack_tokens, title,
                      llama.token_misses if greedy else None).double().numpy()
    at = {(context, ids): (i, j) for i, (context, some) in enumerate(trees)
          for j, ids in enumerate(some)}
    i, j = np.array([at[request] for request in requests]).T
    return np.stack([sums[0, i, j], sums[1, i, j] == 0]) if greedy else sums[i, j]


def ratio(top, bottom=None, groups=None, of=lambda x: x, draws=1000, unseen=None):
    """of(sum of top / sum of bottom), and its 95% interval -> [value, low, high]. None where bottom
    is all 0.

    top, bottom (N,): without a bottom it is the mean of top. Items of one group (N,) are drawn
    together. unseen (2, M): tops and bottoms of M more items, which are drawn too but are not in
    the value. Without them a few items that are all alike would have an interval of no width.
    """
    top = np.asarray(top, dtype=float)
    bottom = np.ones(len(top)) if bottom is None else np.asarray(bottom, dtype=float)
    if not bottom.any():
        return None
    groups = np.arange(len(top)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(groups, x) for x in (top, bottom)])                 # (2, groups)
    if unseen:   # each a group of its own
        sums = np.hstack([sums, unseen])
    n = sums.shape[1]
    rng = np.random.default_rng(0)
    drawn = np.stack([sums @ rng.multinomial(n, np.full(n, 1 / n)) for _ in range(draws)])
    with np.errstate(all="ignore"):   # a draw without such pairs is left out
        value, drawn = of(top.sum() / bottom.sum()), of(drawn[:, 0] / drawn[:, 1])
        return [float(value), *(float(x) for x in np.nanpercentile(drawn, [2.5, 97.5]))]


share = partial(ratio, unseen=[[1, 0], [1, 1]])   # one success and one failure

# -----------------------------------------------------------------------------
# The questions. Each is a function of a model and of the reference's results (None for the
# reference itself, or where there is none). It returns {"metrics": {name: [value, low, high] or
# None}, ..}, and what else it has to say.


def preference(pairs, model, base):
    """Which response of data.Pairs is likelier. Also returns the log-probs (N, 2), the number of
    each pair's prompt, a hash of each pair, and for paired tests the margins, {how: (N,)} in nats
    (those of means in nats a token)."""
    ids = [[tuple(part.tolist()) for part in pairs.ids(i)] for i in range(len(pairs))]
    requests = [(pair[0], pair[j]) for pair in ids for j in (1, -1)]   # chosen, rejected
    logps, lengths = score(model, requests, "pairs").reshape(-1, 2), pairs.lengths[:, [1, -1]]
    numbers = {}   # by prompt
    prompts = [numbers.setdefault(prompt, len(numbers)) for prompt, *_ in ids]
    longer, shorter = lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]
    scores = {"mean": logps / lengths, "sum": logps}
    if base:
        scores["implicit"] = logps - base["logps"]
    margins = {how: x[:, 0] - x[:, 1] for how, x in scores.items() if pairs.n_responses > 1}
    metrics = {"logps/chosen": ratio(logps[:, 0], groups=prompts)}
    if margins:   # pairs of SFT have one response, and nothing to compare
        metrics["accuracy/longer"] = share(longer + 0.5 * ~(longer | shorter), groups=prompts)
    for how, margin in margins.items():
        right = mmpo.wins(margin)
        metrics |= {f"accuracy/{how}": share(right, groups=prompts),
                    f"accuracy/{how}/chosen_shorter": share(right * shorter, shorter, prompts),
                    f"margin/{how}": ratio(margin, groups=prompts)}
    return {"metrics": metrics, "logps": logps.tolist(), "prompts": prompts,
            "pairs": [hashlib.sha256(str(pair).encode()).hexdigest()[:16] for pair in ids],
            "margins": {how: margin.tolist() for how, margin in margins.items()}}


def encode(tokenizer, context, continuation):
    """Ids of both as lm-evaluation-harness makes them. The text of both together is tokenized, and
    the continuation is what follows the tokens of the context, which are counted without spaces at
    its end. An empty context is the bos token, or eos where there is no bos."""
    prefix = tokenizer.text_prefix

    def ids(text):
        found = tokenizer.encode(text)
        return found if found[:len(prefix)] == prefix else prefix + found

    alone, both = ids(context.rstrip()), ids(context + continuation)
    if not alone:
        first = tokenizer.added.get(tokenizer.named["bos_token"], tokenizer.eos_id)
        return () if first is None else (first,), tuple(both)
    return tuple(alone), tuple(both[len(alone):])


def read_items(file, tokenizer, limit, room):
    """A file of multiple-choice items -> its name, [[(context, continuation), ..] of each], [gold],
    [characters of each choice]. A context is cut on the left where it and the continuation are over
    room + 1 tokens. (The model need not read the last one.)"""
    items, gold, characters = [], [], []
    for where, row in islice(data.read_objects(file), limit or None):
        with reading(where, "a multiple-choice item"):
            texts = [text.removeprefix(" ") for _, text in row["pairs"]]
            require(all(map(str.strip, texts)) and type(row["gold"]) is int
                    and row["gold"] in range(len(texts)),
                    f"{where}: gold must be the index of a choice, and no choice may be empty")
            choices = [encode(tokenizer, *pair) for pair in row["pairs"]]
            require(all(context and 0 < len(ids) <= room for context, ids in choices),
                    f"{where}: a choice has no tokens to stand behind, or not 1 to {room} itself")
            items.append([(context[max(0, len(context) + len(ids) - room - 1):], ids)
                          for context, ids in choices])
            gold.append(row["gold"])
            characters.append([len(text) for text in texts])
    require(items, f"{file}: no items")
    require(len({len(item) == 1 for item in items}) == 1, f"{file}: some items have one choice and "
            "others several; these are two tasks, so give two files")
    return os.path.basename(file).split(".")[0], items, gold, characters


def multiple_choice(task, items, gold, characters, model, _):
    single = len(items[0]) == 1
    logps = score(model, [choice for item in items for choice in item], task, single)
    if single:
        logps, greedy = logps
        found = {"acc": share(greedy), "perplexity": ratio(-logps, of=np.exp)}
    else:
        logps = np.split(logps, np.cumsum([len(item) for item in items])[:-1])
        per_character = [x / n for x, n in zip(logps, characters)]
        found = {name: share([x.argmax() == g for x, g in zip(scores, gold)])
                 for name, scores in (("acc", logps), ("acc_norm", per_character))}
    return {"metrics": {f"choices/{task}/{name}": value for name, value in found.items()}}


def text_windows(ids, size=1024):
    """A text's ids -> requests that score half a window each, and every token but the first once.
    The context is the half window of text before, or as much as there is."""
    half = size // 2
    return [(tuple(ids[max(0, i - half):i]), tuple(ids[i:i + half]))
            for i in range(1, len(ids), half)]


def perplexity(windows, model, _):
    logps, tokens = score(model, windows, "text"), [len(ids) for _, ids in windows]
    return {"metrics": {"text/perplexity": ratio(-logps, tokens, of=np.exp)}}


def talk(prompts, tokenizer, args, compared, model, base):
    """The model's answers. Where models are compared with a reference also KL, on answers that are
    sampled from the reference at temperature 1."""
    stop_ids = tokenizer.stop_ids()

    def ask(title, temperature, top_p):
        answers = []
        for i in tqdm(range(0, len(prompts), 16), title, disable=None):
            answers += model.generate(prompts[i:i + 16], args.max_new_tokens, temperature, 0,
                                      top_p, stop_ids, args.seed + i)
        return answers

    found, metrics = {}, {}
    if compared:
        samples = base["samples"] if base else ask("samples", 1.0, 1.0)
        logps = score(model, [*zip(prompts, map(tuple, samples))])
        found = {"samples": samples, "sample_logps": logps.tolist()}
        if base:
            metrics["kl"] = ratio(base["sample_logps"] - logps, [*map(len, samples)])
    answers = ask("answers", args.temperature, 0.95)
    return found | {"metrics": metrics | describe(answers, stop_ids), "answers": [
        {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(ids)}
        for prompt, ids in zip(prompts, answers)]}


def describe(answers, stop_ids):
    """Metrics of answers, lists of ids."""
    grams = [[*zip(ids, ids[1:], ids[2:], ids[3:])] for ids in answers]
    return {"answers/tokens": ratio([len(ids) for ids in answers]),
            "answers/ended": share([ids[-1] in stop_ids for ids in answers]),
            "answers/repeated": ratio([len(g) - len(set(g)) for g in grams], [*map(len, grams)])}


# -----------------------------------------------------------------------------
# the answers to them


def held_out(args, run, tokenizer):
    """The pairs to evaluate: those of --pairs, or those that the run held out."""
    if args.pairs:
        source, split = args.pairs, args.split
    elif run.get("eval_dataset"):
        source, split = run["eval_dataset"], run["eval_split"]
    else:
        source, split = run["dataset"], run["train_split"]
    # whether the pairs may have other fields than those that the run was told of
    other = args.columns is None and bool(args.pairs or run.get("eval_dataset"))
    source = all_beside_the_checkout(source)   # as a config file names it
    settings = DEFAULTS | run
    if args.pairs:
        settings["use_scores"] = False
    if args.columns is not None:
        settings["columns"] = args.columns
    pairs = data.load_pairs(source, split, tokenizer, args.max_length or settings["max_length"],
                            args.max_prompt_length or settings["max_prompt_length"],
                            settings["bad_rows"], settings["columns"], settings["use_scores"],
                            other)
    if args.pairs:
        print(f"{source}: {pairs.report}")
        return pairs
    for seed in (42, run["seed"]):   # as train.py draws them, of an eval_dataset and of dataset
        order = np.random.default_rng(seed).permutation(len(pairs))
        found = pairs.subset(order[:run["eval_pairs"]])
        if found.fingerprint() == run["eval_dataset_sha256"]:
            return found
    raise UserError(f"{source}: not what the run held out; give --pairs (and --max_length)")


def sign_test(before, after):
    """Of pairs that are right or not (N,), before and after: those that turned right, those that
    turned wrong, and the two-sided p of so uneven a split, were pairs independent."""
    better, worse = int((after & ~before).sum()), int((before & ~after).sum())
    n = better + worse
    ways = tail = 1   # to choose i of n, and to choose at most i
    for i in range(min(better, worse)):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return better, worse, min(1.0, 2 * tail / 2 ** n)


def print_table(results):
    """Metrics as rows, models as columns; which pairs turned since the first; three answers."""
    def cell(value, low, high):
        return f"{value:.4g}" + (f" ({low:.4g} to {high:.4g})" if low < high else "")

    print(f"\n| | {' | '.join(results)} |\n" + "|---" * (len(results) + 1) + "|")
    *_, last = results.values()   # the first may be the reference, which has fewer metrics
    for metric in last["metrics"]:
        found = (result["metrics"].get(metric) for result in results.values())
        print(f"| {metric} | {' | '.join(cell(*x) if x else '' for x in found)} |")
    (first, base), *others = results.items()
    for name, result in others:
        for how in ("mean", "sum") if result.get("margins") else ():
            better, worse, p = sign_test(*(np.array(r["margins"][how]) > 0 for r in (base, result)))
            print(f"{name} beside {first}, by {how}: {better} pairs turned right, {worse} wrong, "
                  f"p = {p:.2g} (sign test)")
    for name, result in results.items():
        for i, shown in enumerate(result.get("answers", [])[:3], 1):
            text = (shown["prompt"] + shown["answer"]).replace("\n", "\n| ")
            print(f"\n{name}, answer {i}:\n| {printable(text)}")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER", help="or a hub id")
    parser.add_argument("--reference", help="the model before training; default: the run's own;\n"
                                            "--reference= takes none")
    parser.add_argument("--pairs", help="preference pairs, as train.py's dataset; default: what\n"
                                        "the run held out; --pairs= takes none")
    parser.add_argument("--split", default="test_prefs", help="of a hub dataset")
    parser.add_argument("--columns", help="of --pairs, as in train.py; default: the run's")
    parser.add_argument("--chat_template", default="", help="as in train.py, for a base model")
    parser.add_argument("--choices", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--limit", type=int, default=0, help="items of each such file; 0: all")
    parser.add_argument("--text", metavar="FILE", help="a text whose perplexity to measure")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts to answer")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the answers")
    parser.add_argument("--max_length", type=int, help="as in train.py; default: the run's")
    parser.add_argument("--max_prompt_length", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the answers")
    args = parser.parse_args(argv)
    check_numbers(args, limit=0, prompts=0, temperature=0, seed=0, max_new_tokens=1, max_length=1,
                  max_prompt_length=1)
    return args


def check_runs(args, run):
    """UserError unless the held-out pairs of the first model's run are the other runs' too."""
    for name in args.models:
        theirs = read_run_settings(os.path.expanduser(name))
        require(theirs in ({}, run) or any(run.get(key) and run[key] == theirs.get(key) for key in (
            "eval_dataset", "eval_dataset_sha256")), f"{name}: its run held out other pairs than "
            f"that of {args.models[0]}, and may have trained on these; give --pairs")


def find_models(args, run):
    """-> the name of the reference or None, and of it and all models {name: (folder, when its files
    were written, its weights' fingerprint, run_sum of its run)}."""
    reference = args.reference
    if reference is None:
        reference = beside_the_checkout(run.get("init_from", ""))
    names = dict.fromkeys([*filter(None, [reference]), *args.models])
    folders = {name: llama.checkpoint_folder(name) for name in names}
    models = {name: (folder, llama.last_written(folder), llama.weights_fingerprint(folder),
                     run_sum(os.path.expanduser(name)))   # of an adapter not that of its base
              for name, folder in folders.items()}
    weights = models[reference][2] if reference else ""
    require(args.reference is not None or run.get("init_from_sha256", weights) == weights,
            f"{reference}: has changed since the run in {args.models[0]} started from it; give "
            "that one as --reference, or this one, if you mean it")
    return reference or None, models


def questions_of(args, run, tokenizer, config, compared):
    """-> the questions, as above, and what they ask about, by which a cache is known. config: the
    first model's LlamaConfig. compared: whether there is a reference."""
    pairs, windows, questions, room = None, None, [], config.max_position_embeddings
    if args.pairs or run and args.pairs is None:
        with reading(args.pairs or f"{args.models[0]}/train_config.json",
                     "pairs, or a run that has some"):
            pairs = held_out(args, run, tokenizer)
        questions.append(partial(preference, pairs))
    tasks = [read_items(file, tokenizer, args.limit, room) for file in args.choices]
    require(len({task for task, *_ in tasks}) == len(tasks),
            "--choices: two files of one name; rename one, since their metrics go by it")
    questions += [partial(multiple_choice, *task) for task in tasks]
    if args.text:
        windows = text_windows(tokenizer.encode(read_text(args.text, "a text")), min(room, 1024))
        require(windows, f"{args.text}: too short, as its first token is not scored")
        questions.append(partial(perplexity, windows))
    if pairs and args.prompts:
        prompts = [*dict.fromkeys(tuple(pairs.ids(i)[0].tolist()) for i in range(len(pairs)))]
        prompts = prompts[:args.prompts]
        config.check_length(max(map(len, prompts)) + args.max_new_tokens)
        questions.append(partial(talk, prompts, tokenizer, args, compared))
    return questions, [pairs and pairs.fingerprint(), tasks, windows]


def write_result(name, run, result, before, reference, args, dtype):
    """Write the JSON file beside a model's folder. run: run_sum of the model's run. before: the
    reference's metrics."""
    here = os.path.expanduser(name)   # of an adapter its own folder, not the one on its base
    beside = os.path.abspath(here) if os.path.isdir(here) else name.replace("/", "_")
    files = {path: sha256(path) for path in (*args.choices, args.text, args.pairs)
             if path and os.path.isfile(path)}
    try:
        write_json(f"{beside}.evaluation.json", {
            "model": name, "run": run, "reference": reference, "settings": vars(args),
            "files": files, "dtype": dtype, "before": before, **{key: result.get(key) for key in (
                "metrics", "pairs", "prompts", "margins", "answers")}})
    except OSError as e:
        print(f"note: {beside}.evaluation.json not written ({e.strerror})")


def main():
    args = arguments()
    first = args.models[0]
    run = read_run_settings(os.path.expanduser(first))
    of_its_run = run and args.pairs is None   # the pairs are those that the run held out
    require(of_its_run or args.pairs or args.choices or args.text,
            f"{first}: say what to evaluate, --pairs, --choices or --text" + " (a run's held-out "
            "pairs need none of these, but there is no run's train_config.json there)" * (not run))
    if of_its_run:
        check_runs(args, run)
    reference, models = find_models(args, run)
    folder, *_ = models[first]
    kwargs = "" if args.chat_template else (   # those of its run, also of a hub's
        read_run_settings(folder).get("chat_template_kwargs", ""))
    tokenizer = data.Tokenizer(folder, args.chat_template, kwargs)
    config = llama.config_from_dict(llama.read_config(folder))
    questions, asked = questions_of(args, run, tokenizer, config, bool(reference))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")   # TF32
    # fp32 if there is room, as in bf16 a margin is off by a third of a nat, which gentle runs gain
    dtype = cost.fitting_dtype(folder, device)
    asked += [tokenizer.fingerprint, sorted(tokenizer.end_ids), device, str(dtype),
              vars(args) | {"models": None}]

    results = {}
    for name, (folder, written, weights, its_run) in models.items():
        base = results.get(reference)
        path = cache_path("evaluation", [weights, *asked],
                          ["data.py", "model.py", "scripts/evaluate.py"])
        if not base and (cached := load_cache(path)):   # as the reference of an earlier call
            results[name] = json.loads(str(cached["result"]))
        else:
            require(data.Tokenizer(folder, args.chat_template).bytes_of == tokenizer.bytes_of,
                    f"{name}: another vocabulary than that of {first}; evaluate it by itself")
            model, _ = llama.from_pretrained(folder, device, dtype)
            require(llama.last_written(folder) == written,
                    f"{name}: changed while it was read; start again")
            result, metrics = {}, {}
            for question in questions:
                result |= question(model, base)
                metrics |= {metric: x for metric, x in result["metrics"].items() if x}
            results[name] = result | {"metrics": metrics}
            del model   # before the next one is read
            if name == reference:
                save_cache(path, result=json.dumps(results[name]))
        if name in args.models:
            write_result(name, its_run, results[name], reference and results[reference]["metrics"],
                         reference, args, str(dtype))
    print(f"\nreference: {reference or 'none'}")
    print_table(results)


if __name__ == "__main__":
    one_line_errors()
    main()
