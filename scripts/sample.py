"""
Ask a model: one question, a chat, or a file of instructions.

$ python -m scripts.sample out/demo --prompt="What does a cow say?"
$ python -m scripts.sample out/demo                                   # chat; an empty line ends it
$ python -m scripts.sample out/x --instructions=alpaca_eval.json --out=outputs.json

The last form reads [{"instruction": ..}, ..], also as .jsonl, and writes what AlpacaEval takes,
[{"instruction": .., "output": .., "generator": ..}, ..].
"""
import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/sample.py`
import data
import model as llama
from configurator import (
    check_numbers, one_line_errors, printable, read_run_settings, require, write_json)
from scripts import cost


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder (train.py's out_dir) or a hub id")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", help="one question")
    asked.add_argument("--instructions", metavar="FILE", help="many questions")
    parser.add_argument("--out", default="outputs.json", help="the file of their answers")
    parser.add_argument("--chat_template", default="", help="as in train.py, for a base model")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--batch_size", type=int, default=16, help="instructions at a time")
    args = parser.parse_args()
    check_numbers(args, max_new_tokens=1, batch_size=1, temperature=0, top_k=0, seed=0)
    for name in ("prompt", "instructions"):
        require(getattr(args, name) is None or getattr(args, name).strip(), f"--{name}: empty")
    require(not args.instructions or not os.path.lexists(args.out) and os.path.basename(args.out),
            f"--out: {args.out} exists already, or is a folder; give another file")
    require(0 < args.top_p <= 1, f"--top_p must be above 0 and at most 1 (got {args.top_p})")

    questions = []
    if args.instructions:
        for where, row in data.read_objects(args.instructions):
            question = row.get("instruction")
            require(isinstance(question, str) and question.strip(),
                    f'{where}: "instruction" must be text (got {question!r:.50})')
            questions.append((where, question))
        require(questions, f"{args.instructions}: no instructions")
    folder = llama.checkpoint_folder(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else cost.fitting_dtype(folder, device)
    run = read_run_settings(folder)   # whose template it goes on with
    tokenizer = data.Tokenizer(folder, args.chat_template, "" if args.chat_template else
                               run.get("chat_template_kwargs", ""))
    model, _ = llama.from_pretrained(folder, device, dtype)
    stop_ids = tokenizer.stop_ids()
    if args.seed is not None:
        torch.manual_seed(args.seed)   # once, so that batches and turns differ

    def encode(turns, where="the prompt"):
        ids, context = tokenizer.encode_prompt(turns), model.config.max_position_embeddings
        require(len(ids) < context, f"{where}: {len(ids)} tokens, and the model's context has "
                f"{context}; shorten it")
        return ids

    def answer(prompts):
        return model.generate(prompts, args.max_new_tokens, args.temperature, args.top_k,
                              args.top_p, stop_ids)

    def text_of(ids):
        return tokenizer.decode([t for t in ids if t not in stop_ids])

    if questions:
        answers, prompts = [], [encode([data.turn("user", question)], where)
                                for where, question in questions]
        os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
        open(args.out, "x").close()   # after the answers it would be too late for an error
        try:
            for i in tqdm(range(0, len(questions), args.batch_size), "batches", disable=None):
                answers += answer(prompts[i:i + args.batch_size])
        except BaseException:
            os.remove(args.out)
            raise
        name = os.path.basename(os.path.abspath(args.model))
        write_json(args.out, [{"instruction": question, "output": text_of(ids), "generator": name}
                              for (_, question), ids in zip(questions, answers)])
        if n_cut := sum(ids[-1] not in stop_ids for ids in answers):
            print(f"note: {n_cut} of {len(answers)} answers were cut at --max_new_tokens")
    elif args.prompt:
        [ids] = answer([encode([data.turn("user", args.prompt)])])
        print(printable(text_of(ids)))
    else:
        require(sys.stdin, "--prompt: stdin is closed, so give a question")
        turns = []
        with contextlib.suppress(EOFError):          # Ctrl-D ends it, as an empty line does
            while question := input("> ").strip():
                turns.append(data.turn("user", question))
                [ids] = answer([encode(turns)])
                turns.append(data.turn("assistant", text_of(ids)))
                print(printable(turns[-1]["content"]))


if __name__ == "__main__":
    one_line_errors()
    main()
