"""
What a run does and did, in words: the lines of its log, and its model card, out_dir/README.md.

$ python -m scripts.report out/mine      # the last lines and the card again, from what it recorded
"""
import argparse
import hashlib
import math
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/report.py`
from configurator import (
    HERE, beside_the_checkout, is_finished, one_line_errors, read_json, read_metrics,
    read_settings, reading, require, write_text)

# Beyond these a model has moved far from its start. The short recipe of assets/results.md reaches
# half that KL on whole sentences, and there the chosen response becomes likelier.
FAR_KL = 0.3       # nats a token
FAR_CHOSEN = 0.1   # fall of the chosen response's log-prob, as a share of what it was
CLIPPED = 10       # times grad_clip, from which a gradient's norm is worth a word

# read here, since train.py may be in the middle of an edit when the run ends
DEFAULTS = {k: s.value for k, s in read_settings(os.path.join(HERE, "train.py")).items()}
NOT_TOLD = "out_dir", "overwrite", "resume"   # where a run went, not what it was
TABLE = {   # metric of an evaluation: what it is called
    "eval/accuracy/mean": "chosen likelier than rejected, by mean log-probs",
    "eval/accuracy/sum": "the same by summed log-probs",
    "eval/accuracy/implicit": "chosen gained more than rejected (implicit reward accuracy)",
    "eval/logps/chosen": "log-prob of the chosen response, nats",
    "eval/logps/rejected": "log-prob of the rejected response, nats",
    "eval/kl": "KL(before \\|\\| after), nats a token",
}


def describe_example(pairs, tokenizer):
    """The first pair as text and as token ids, for a person to check before the run."""
    def shown(ids):
        return "| " + tokenizer.decode(ids.tolist()).replace("\n", "\n| ")

    prompt, *responses = pairs.ids(0)
    lines = [f"example: prompt of {len(prompt)} tokens, responses of {[len(r) for r in responses]}",
             shown(prompt[-200:])]
    names = ["chosen", *[f"response {j}" for j in range(2, len(responses))], "rejected"]
    for name, r in zip(names, responses):
        lines += [f"|-- {name}, starts at token {len(prompt)}: ids {prompt[-3:].tolist()} >>> "
                  f"{r[:6].tolist()} .. {r[-2:].tolist()}", shown(r[:60]) + " ..." * (len(r) > 60)]
    return "\n".join(lines)


def line(iter_num, metrics):
    """A line for a step or an evaluation, with its main metrics."""
    kind, speed = "eval", ""
    names = {"loss": "eval/loss", "accuracy": "eval/accuracy/mean", "KL": "eval/kl",
             "implicit": "eval/accuracy/implicit", "chosen": "eval/logps/chosen"}
    if "loss" in metrics:
        kind, names = "step", {"loss": "loss", "accuracy": "accuracy/mean", "q_w":
                               "weights/chosen", "norm": "grad_norm", "mfu": "mfu"}
        speed = (f" | lr {metrics['lr']:.1e} | {metrics['tokens_per_second']:,.0f} tok/s | "
                 f"{metrics['seconds_left'] / 60:.1f} min left")
    return f"{kind} {iter_num:5d}" + "".join(f" | {title} {metrics[name]:.3f}" for title, name in
                                             names.items() if name in metrics) + speed


def name_pairs(pairs, batch, logps, tokenizer):
    """What to say of a step that went wrong: how some chosen responses begin, of its pairs whose
    logps (B, n) are not finite, or of all its pairs (B,) where every log-prob is."""
    kind, found = "its pairs without log-probs", batch[~logps.isfinite().all(1).cpu().numpy()]
    if not len(found):
        kind, found = "its pairs", batch
    texts = (tokenizer.decode(pairs.ids(i)[1].tolist()[:16]) for i in found[:3])
    return (f"{kind}: {len(found)}, whose chosen responses begin "
            + ", ".join(f'"{" ".join(text.split()):.24}"' for text in texts)
            + ", .." * (len(found) > 3))


def read_run(out_dir):
    """-> settings, the first evaluation, the last one, the gradient norms of the logged steps."""
    settings = read_json(os.path.join(out_dir, "train_config.json"))
    path = os.path.join(out_dir, "metrics.jsonl")
    records = read_metrics(path)
    evals = [record for record in records if "eval/loss" in record]
    require(evals, f"{path}: no evaluation in it; has the run begun?")
    return settings, evals[0], evals[-1], [r["grad_norm"] for r in records if "grad_norm" in r]


def closing_lines(out_dir):
    """What a person should know when a run ends."""
    settings, first, last, norms = read_run(out_dir)
    n_pairs = settings.get("held_out", settings["eval_pairs"])   # runs of old lack the number
    before, after = first["eval/logps/chosen"], last["eval/logps/chosen"]
    kl, fell = last.get("eval/kl", 0), (before - after) / max(abs(before), 1e-9)
    moved = f"; KL from the start: {kl:.3f} nats a token" if "eval/kl" in last else ""
    if "eval/kl_error" in last:   # not for one sample, nor in runs of old
        moved += f" (standard error {last['eval/kl_error']:.3f})"
    lines = [f"log-prob of the chosen response: {before:.1f} before, {after:.1f} after{moved}"]
    learned, harmed = True, False   # as far as pairs can tell
    if "eval/accuracy/mean" in last:
        accuracy, start = last["eval/accuracy/mean"], first["eval/accuracy/mean"]
        implicit, error = last["eval/accuracy/implicit"], 0.5 / math.sqrt(n_pairs)   # of a share
        lines.insert(0, f"held-out preference accuracy: {start:.3f} before, {accuracy:.3f} after "
                        f"(mean log-probs); {implicit:.3f} by implicit rewards")
        gain, gain_error = accuracy - start, math.sqrt(2) * error
        learned = gain > gain_error or implicit - 0.5 > error
        harmed = not learned and (-gain > gain_error or 0.5 - implicit > error)
    objective, weight = settings["objective"], settings["pref_weight"]
    weight_is_low = objective == "mmpo" and weight < 10
    far = []
    if not kl <= FAR_KL:   # NaN is far too
        far.append(f"KL is {kl:.2f}")
    if not fell <= FAR_CHOSEN:
        far.append(f"the chosen response became {before - after:.1f} nats less likely")
    if far:
        lines.append(f"WARNING: the model has moved far from its start: {' and '.join(far)}. Its "
                     "accuracy then says little about its answers; read its sample. Gentler: a "
                     f"lower learning_rate (now {settings['learning_rate']:g})" +
                     f", or a lower pref_weight (now {weight:g})" * (   # assets/results.md
                         objective == "mmpo" and weight > 1 and fell > FAR_CHOSEN))
    if harmed:
        lines.append("WARNING: on the held-out pairs the rejected responses gained more than the "
                     "chosen ones. Are these pairs like those that were trained on, and is chosen "
                     "the better one in both?" + " MMPO makes both responses likelier; a higher "
                     "pref_weight sets them apart" * weight_is_low)
    elif not learned and not far and any(map(math.isfinite, norms)):
        lines.append(f"note: {n_pairs} held-out pairs show no preference learned beyond the "
                     f"standard error, {error:.2f} of implicit rewards and {gain_error:.2f} of the "
                     "accuracy's gain. More: a higher learning_rate, more steps" +
                     ", a higher pref_weight" * weight_is_low)
    if said := skipped(norms):
        lines.append(f"note: {said}")
    clip = settings["grad_clip"]
    clipped = sum(CLIPPED * clip < norm < math.inf for norm in norms)
    if clip and clipped > len(norms) / 2:
        lines.append(f"note: in {clipped} of {len(norms)} logged steps the gradient's norm was over"
                     f" {CLIPPED} times grad_clip ({clip:g}); learning_rate alone set their size")
    return "\n".join(lines)


def skipped(norms):
    """How many of the logged steps did nothing, in words. "" if all did something."""
    n = sum(not math.isfinite(norm) for norm in norms)
    return f"{n} of {len(norms)} logged steps changed nothing, as their gradient was not " \
           "finite" if n else ""


def hub_ids(sources):
    """owner/name of those of the comma-separated sources that are on the hub, not files here."""
    names = [re.split("[:@]", source.strip())[0] for source in sources.split(",")]
    return ["/".join(name.split("/")[:2]) for name in names
            if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)+", name)
            and not re.search(r"\.(jsonl?|ndjson|parquet|csv|tsv|gz|zst)$", name)
            and not os.path.exists(beside_the_checkout(name))]


def write_model_card(out_dir):
    """Write out_dir/README.md, with the hub's metadata -> what the run's last line calls it. One
    that a person wrote or changed stays: its last line is not the sha256 of the others."""
    path, signature = os.path.join(out_dir, "README.md"), "<!-- by nanoMMPO, sha256 %s -->\n"
    if os.path.lexists(path):
        content = Path(path).read_bytes() if os.path.isfile(path) else b""
        *lines, last = content.splitlines(True) or [b""]
        if last.decode(errors="replace") != signature % hashlib.sha256(b"".join(lines)).hexdigest():
            return "the README.md that was there, which a person may have changed,"
    settings, first, last, norms = read_run(out_dir)
    idle = skipped(norms)
    changed = {key: settings[key] for key, default in DEFAULTS.items()
               if settings.get(key, default) != default and key not in NOT_TOLD}
    base, objective = settings["init_from"], settings["objective"]
    adapter = os.path.join(os.path.expanduser(base), "adapter_config.json")
    root = os.path.exists(adapter) and read_json(adapter).get("base_model_name_or_path") or base
    header = [f"base_model: {name}" for name in hub_ids(str(root))]
    if datasets := hub_ids(settings["dataset"]):
        header += ["datasets:", *(f"- {name}" for name in datasets)]
    header += [f"library_name: {'peft' if settings['export_adapter'] else 'transformers'}",
               "pipeline_tag: text-generation", "tags:", "- nanommpo", f"- {objective}",
               *["- lora"] * bool(settings["lora_rank"])]
    rows = [f"| {title} | {first[key]:.3f} | {last[key]:.3f} |" for key, title in TABLE.items()
            if key in last]
    command = " \\\n    ".join(["python train.py", *(f"--{key}={shlex.quote(str(value))}"
                                                    for key, value in changed.items())])
    text = "\n".join([
        "---", *header, "---", "",
        f"# {os.path.basename(os.path.abspath(out_dir))}", "",
        f"{base}, trained with {objective.upper()} on {settings['dataset']} by nanoMMPO, in "
        f"{last['iter']:,} steps of {settings['batch_size']} pairs{idle and f'; {idle}'}.", "",
        "| on held-out pairs | before | after |", "|---|---|---|", *rows, "",
        "Settings that differ from nanoMMPO's defaults (all are in train_config.json):", "",
        "```", command, "```", ""])
    write_text(path, text + signature % hashlib.sha256(
        text.encode("utf-8", "backslashreplace")).hexdigest())
    return "its card"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", help="a finished run's out_dir")
    folder = parser.parse_args().folder
    with reading(folder, "a run of train.py"):
        require(is_finished(folder), f"{folder}: no run that is finished; its step lines and "
                "metrics.jsonl say how far it is")
        print(f"{folder}: {write_model_card(folder)}\n{closing_lines(folder)}")


if __name__ == "__main__":
    one_line_errors()
    main()
