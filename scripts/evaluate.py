"""
What a model learned, what it forgot and how it talks: a table, and a JSON file beside each folder.

$ python -m scripts.evaluate out/mine                # on the held-out pairs of its run
$ python -m scripts.evaluate out/mmpo out/dpo --reference=HuggingFaceTB/SmolLM2-135M-Instruct \
      --pairs=test.jsonl --choices arc_easy.jsonl.gz lambada.jsonl.gz --text=book.txt

Three questions, asked of the reference (the model before training) too:
- *Learned:* how often the chosen response of a pair is likelier than the rejected one, by mean and
  by summed log-probs, and how often it gained more than that since the reference (implicit). Beside
  these stand the accuracy of "the longer one" and that on pairs whose chosen response is shorter.
- *Forgotten:* multiple-choice files (a line {"task": .., "pairs": [[context, continuation], ..],
  "gold": index}), the perplexity of a text, and KL(reference || policy) on the reference's answers.
- *Talks:* its answers to held-out prompts: tokens, the share that ends by itself, the share of
  4-grams that were in the same answer before. Three answers are shown in full.

All but the answers are log-probs of continuations behind a context. Those that share a context are
one tree of a pack (data.Pack), where it is computed once. Multiple-choice numbers are those of
lm-evaluation-harness: acc by summed log-probs, acc_norm by log-probs a character; an item with one
choice (LAMBADA) counts where the likeliest tokens spell it, and has a perplexity.

Intervals are 95%, from a bootstrap that draws prompts with all their pairs.
"""
import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/evaluate.py`
import data
import model as llama
from configurator import (
    cache_path, one_line_errors, parse_json, read_json, reading, require, save_cache, sha256,
    write_json)

BRANCHES = 16   # continuations of a tree, at most


@torch.no_grad()
def score(model, requests, title=None, greedy=False, pack_tokens=4096):
    """[(context, continuation), ..], tuples of ids -> log pi(continuation|context) of each (N,), in
    nats, and with `greedy` whether the likeliest tokens are the continuation (N,)."""
    behind = {}   # context: its continuations, each once
    for context, continuation in dict.fromkeys(requests):
        behind.setdefault(context, []).append(continuation)
    trees = [(context, some[i:i + BRANCHES]) for context, some in behind.items()
             for i in range(0, len(some), BRANCHES)]
    n = max(len(some) for _, some in trees)
    pairs = data.Pairs.from_ids([[context, *some, *[()] * (n - len(some))]
                                 for context, some in trees])   # () is a response of no tokens
    device, everything = model.head_weight.device, np.arange(len(trees))
    logps, misses = torch.zeros(2, len(trees), n, device=device)
    for members in tqdm(data.plan_packs(pairs.lengths.sum(1), pack_tokens)[0], title, disable=None):
        pack = data.collate(pairs, everything, members, pack_tokens if device.type == "cuda" else 1)
        pack = pack.to(device)
        x = model.hidden(pack.tokens, pack.positions, llama.tree_layout(pack))[0, pack.predict_from]
        logps[pack.members] = pack.sum_by_response(
            llama.TokenLogProbs.apply(x, model.head_weight, pack.targets))
        if greedy:
            likeliest = torch.cat([linear(x[s], model.head_weight).argmax(-1)
                                   for s in llama.chunks(x, model.head_weight)])
            misses[pack.members] = pack.sum_by_response((likeliest != pack.targets).float())
    at = {(context, ids): (i, j) for i, (context, some) in enumerate(trees)
          for j, ids in enumerate(some)}
    places = tuple(np.array([at[request] for request in requests]).T)
    return logps.double().cpu().numpy()[places], misses.cpu().numpy()[places] == 0


def ratio(top, bottom=None, groups=None, of=lambda x: x, draws=1000):
    """of(sum of top / sum of bottom), and its 95% interval -> [value, low, high].

    top, bottom (N,); no bottom is the mean of top. Items of one group (N,) are drawn together.
    """
    top = np.asarray(top, dtype=float)
    bottom = np.ones(len(top)) if bottom is None else np.asarray(bottom, dtype=float)
    groups = np.arange(len(top)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(groups, x) for x in (top, bottom)])                 # (2, groups)
    n = sums.shape[1]
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws) @ sums.T
    with np.errstate(invalid="ignore", divide="ignore"):   # a draw without such pairs counts not
        value, drawn = of(top.sum() / bottom.sum()), of(drawn[:, 0] / drawn[:, 1])
        return [float(value), *(float(x) for x in np.nanpercentile(drawn, [2.5, 97.5]))]


def preference(logps, ref_logps, lengths, prompts):
    """Of N pairs: log-probs (N, 2), the reference's or None, tokens (N, 2), the number of its
    prompt (N,) -> metrics, {how: margins} in nats, from which paired tests are made."""
    margins = {"mean": logps / lengths, "sum": logps}
    if ref_logps is not None:
        margins["implicit"] = logps - ref_logps
    margins = {how: x[:, 0] - x[:, 1] for how, x in margins.items()}
    longer, shorter = lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]
    metrics = {"accuracy/longer": ratio(longer + 0.5 * ~(longer | shorter), groups=prompts)}
    for how, margin in margins.items():
        right = margin > 0
        metrics |= {f"accuracy/{how}": ratio(right, groups=prompts),
                    f"accuracy/{how}/chosen_shorter": ratio(right & shorter, shorter, prompts),
                    f"margin/{how}": ratio(margin, groups=prompts)}
    metrics["logps/chosen"] = ratio(logps[:, 0], groups=prompts)
    return metrics, {how: margin.round(5).tolist() for how, margin in margins.items()}


def encode(tokenizer, context, continuation):
    """Ids of both as lm-evaluation-harness makes them: spaces that end the context go to the
    continuation, whose ids are what both together have more than the context."""
    alone, both = (tokenizer.text_prefix + tokenizer.encode(text)
                   for text in (context.rstrip(), context + continuation))
    return tuple(alone), tuple(both[len(alone):])


def read_items(file, tokenizer, limit, room):
    """A file of multiple-choice items -> its name, [[(context, continuation), ..] of each], [gold],
    [characters of each choice]. A context is cut on the left where an item has over `room` tokens.
    """
    items, gold, characters = [], [], []
    for where, line in data.read_rows(file, ""):
        with reading(where, "a multiple-choice item"):
            row = parse_json(line) if isinstance(line, bytes) else line
            choices = [encode(tokenizer, *pair) for pair in row["pairs"]]
            require(row["gold"] in range(len(choices)) and all(c and ids for c, ids in choices),
                    f"{where}: gold must be the index of a choice, and no text may be empty")
            longest = max(len(ids) for _, ids in choices)
            items.append([(context[-(room - longest):], ids) for context, ids in choices])
            gold.append(row["gold"])
            characters.append([len(text.lstrip()) for _, text in row["pairs"]])
        if len(items) == limit:
            break
    require(items, f"{file}: no items")
    return os.path.basename(file).split(".")[0], items, gold, characters


def multiple_choice(model, task, items, gold, characters):
    single = all(len(item) == 1 for item in items)
    logps, greedy = score(model, [choice for item in items for choice in item], task, single)
    if single:
        return {f"choices/{task}/acc": ratio(greedy),
                f"choices/{task}/perplexity": ratio(-logps, of=np.exp)}
    by_item = np.split(logps, np.cumsum([len(item) for item in items])[:-1])
    return {f"choices/{task}/acc": ratio([x.argmax() == g for x, g in zip(by_item, gold)]),
            f"choices/{task}/acc_norm": ratio([(x / c).argmax() == g for x, c, g in
                                               zip(by_item, characters, gold)])}


def text_windows(ids, size=1024):
    """A text's ids -> requests that score each token but the first once, behind up to half a window
    of the text before it."""
    half = size // 2
    return [(tuple(ids[max(0, i - half):i]), tuple(ids[i:i + half]))
            for i in range(1, len(ids), half)]


def generate(model, prompts, max_new_tokens, stop_ids, seed, temperature, top_p, title):
    found = []
    for i in tqdm(range(0, len(prompts), 16), title, disable=None):
        found += model.generate(prompts[i:i + 16], max_new_tokens, temperature, 0, top_p, stop_ids,
                                seed + i)
    return found


def talk(answers, stop_ids):
    """Metrics of answers, lists of ids."""
    grams = [[tuple(ids[i:i + 4]) for i in range(len(ids) - 3)] for ids in answers]
    return {"answers/tokens": ratio([len(ids) for ids in answers]),
            "answers/ended": ratio([ids[-1] in stop_ids for ids in answers]),
            "answers/repeated": ratio([len(g) - len(set(g)) for g in grams], [*map(len, grams)])}


def evaluate(folder, device, args, tokenizer, pairs, tasks, windows, base):
    """All results of one model. base: those of the reference, or None for the reference itself."""
    require(data.Tokenizer(folder).bytes_of == tokenizer.bytes_of,
            f"{folder}: another vocabulary than the first model's; evaluate it by itself")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, _ = llama.from_pretrained(folder, device, dtype)
    metrics, result = {}, {}
    if pairs:
        ids = [[tuple(x.tolist()) for x in pairs.ids(i)] for i in range(len(pairs))]
        logps = score(model, [(x[0], x[j]) for x in ids for j in (1, -1)], "pairs")[0]
        logps = logps.reshape(-1, 2)
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(x[0] for x in ids))}
        prompts = [number[x[0]] for x in ids]
        metrics, margins = preference(logps, np.array(base["logps"]) if base else None,
                                      pairs.lengths[:, [1, -1]], prompts)
        result = {"logps": logps.tolist(), "prompts": prompts, "margins": margins}
    for task in tasks:
        metrics |= multiple_choice(model, *task)
    if windows:
        metrics["text/perplexity"] = ratio(-score(model, windows, "text")[0],
                                           [len(ids) for _, ids in windows], of=np.exp)
    if pairs and args.prompts:
        asked, stop_ids = [*number][:args.prompts], tokenizer.stop_ids()
        ask = partial(generate, model, asked, args.max_new_tokens, stop_ids, args.seed)
        samples = base["samples"] if base else ask(1.0, 1.0, "samples")   # the reference's
        logps = score(model, [*zip(asked, map(tuple, samples))])[0]
        if base:
            metrics["kl"] = ratio(base["sample_logps"] - logps, [*map(len, samples)])
        answers = ask(args.temperature, 0.95, "answers")
        metrics |= talk(answers, stop_ids)
        result |= {"samples": samples, "sample_logps": logps.tolist(), "answers": [
            {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(ids)}
            for prompt, ids in zip(asked, answers)]}
    return {"metrics": metrics, **result}


def held_out(args, run, tokenizer):
    """The pairs to evaluate: those of --pairs, or those that the run held out."""
    source, split = (args.pairs, args.split) if args.pairs else \
        (run["eval_dataset"], run["eval_split"]) if run["eval_dataset"] else \
        (run["dataset"], run["train_split"])
    pairs = data.load_pairs(source, split, tokenizer, args.max_length or run["max_length"],
                            args.max_prompt_length or run["max_prompt_length"],
                            run.get("bad_rows", "error"))
    if not args.pairs:   # as train.py draws them
        order = np.random.default_rng(run["seed"]).permutation(len(pairs))
        pairs = pairs.subset(order[:run["eval_pairs"]])
        require(pairs.fingerprint() == run["eval_dataset_sha256"],
                f"{source}: not what the run held out; give --pairs, and its lengths")
    require(pairs.n_responses > 1, f"{source}: one response a row, and accuracy compares two")
    return pairs


def sign_test(before, after):
    """Of pairs that are right or not (N,), before and after: those that turned right, those that
    turned wrong, and the two-sided p of so uneven a split, were pairs independent."""
    better, worse = int((after & ~before).sum()), int((before & ~after).sum())
    tail = sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1))
    return better, worse, min(1.0, 2 * tail / 2 ** (better + worse))


def print_table(results):
    """Metrics as rows, models as columns; which pairs turned since the first; three answers."""
    print(f"\n| | {' | '.join(results)} |\n" + "|---" * (len(results) + 1) + "|")
    *_, last = results.values()
    for metric in last["metrics"]:
        cells = ("{:.4g} ({:.4g} to {:.4g})".format(*result["metrics"][metric])
                 if metric in result["metrics"] else "" for result in results.values())
        print(f"| {metric} | {' | '.join(cells)} |")
    (first, base), *others = results.items()
    for name, result in others:
        for how in ("mean", "sum") if "margins" in result else ():
            better, worse, p = sign_test(*(np.array(r["margins"][how]) > 0 for r in (base, result)))
            print(f"{name} beside {first}, by {how}: {better} pairs turned right, {worse} wrong, "
                  f"p = {p:.2g} (sign test)")
    for name, result in results.items():
        for i, shown in enumerate(result.get("answers", [])[:3], 1):
            text = (shown["prompt"] + shown["answer"]).replace("\n", "\n| ")
            print(f"\n{name}, answer {i}:\n| {text}")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER", help="or a hub id")
    parser.add_argument("--reference", help="the model before training; default: the run's own")
    parser.add_argument("--pairs", help="preference pairs, as train.py's dataset")
    parser.add_argument("--split", default="test_prefs", help="of a hub dataset")
    parser.add_argument("--choices", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--limit", type=int, default=0, help="items of each such file; 0: all")
    parser.add_argument("--text", metavar="FILE", help="a text whose perplexity to measure")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts to answer")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the answers")
    parser.add_argument("--max_length", type=int, help="as in train.py; default: the run's")
    parser.add_argument("--max_prompt_length", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the answers")
    return parser.parse_args(argv)


def main():
    args = arguments()
    folders = {name: llama.checkpoint_folder(name) for name in args.models}
    first, config = args.models[0], os.path.join(folders[args.models[0]], "train_config.json")
    run = read_json(config) if os.path.exists(config) else {}
    require(args.pairs or args.choices or args.text or run, f"{first}: no train_config.json there, "
            "so say what to evaluate, with --pairs, --choices or --text")
    reference = args.reference or run.get("init_from")
    if reference:   # first, since the others are compared with it
        folders = {reference: llama.checkpoint_folder(reference)} | folders
    tokenizer = data.Tokenizer(folders[first],
                               chat_template_kwargs=run.get("chat_template_kwargs", ""))
    run = {"max_length": 2312, "max_prompt_length": 1800} | run   # train.py's defaults
    pairs = held_out(args, run, tokenizer) if args.pairs or "dataset" in run else None
    room = llama.config_from_dict(llama.read_config(folders[first])).max_position_embeddings
    tasks, windows = [read_items(f, tokenizer, args.limit, room) for f in args.choices], []
    if args.text:
        with open(args.text, encoding="utf-8") as f, reading(args.text, "a text"):
            windows = text_windows(tokenizer.encode(f.read()), min(room, 1024))

    device, results = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name, folder in folders.items():
        work = device, args, tokenizer, pairs, tasks, windows
        if name == reference:   # once, for all runs that start from it
            key = [llama.weights_fingerprint(folder), tokenizer.fingerprint, device,
                   pairs and pairs.fingerprint(), [sha256(f) for f in args.choices],
                   [windows, {k: v for k, v in vars(args).items() if k != "models"}]]
            path = cache_path("evaluation", key, ["data.py", "model.py", "scripts/evaluate.py"])
            if not os.path.exists(path):
                save_cache(path, json=json.dumps(evaluate(folder, *work, None)))
            results[name] = json.loads(str(np.load(path)["json"]))
        else:
            results[name] = evaluate(folder, *work, results.get(reference))
        if name in args.models:
            kept = {k: results[name].get(k) for k in ("metrics", "prompts", "margins", "answers")}
            beside = folder.rstrip("/") if os.path.isdir(name) else name.replace("/", "_")
            write_json(f"{beside}.evaluation.json", {
                "model": name, "reference": reference, "settings": vars(args),
                "before": results[reference]["metrics"] if reference else None, **kept})
    print_table(results)


if __name__ == "__main__":
    one_line_errors()
    main()
