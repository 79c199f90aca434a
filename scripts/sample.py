"""
Ask a model: one question, a chat, or a file of instructions.

$ python -m scripts.sample out/demo --prompt="What does a cow say?"
$ python -m scripts.sample out/demo                                   # chat; an empty line ends it
$ python -m scripts.sample out/x --instructions=alpaca_eval.json --out=outputs.json

The last form reads [{"instruction": ..}, ..] and writes AlpacaEval's [{"instruction", "output",
"generator"}, ..].
"""
import argparse
import contextlib
import os

import torch

import data
import model as llama
from configurator import one_line_errors


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder (train.py's out_dir) or a hub id")
    parser.add_argument("--prompt")
    parser.add_argument("--instructions", metavar="FILE")
    parser.add_argument("--out", default="outputs.json")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    folder = llama.checkpoint_folder(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = data.Tokenizer(folder)
    model, _ = llama.from_pretrained(folder, device, dtype)
    stop_ids = tokenizer.stop_ids()

    def answer(chats):
        new = model.generate([tokenizer.encode_prompt(turns) for turns in chats],
                             args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                             stop_ids, args.seed)
        return [tokenizer.decode([t for t in ids if t not in stop_ids]) for ids in new]

    if args.instructions:
        if not os.path.exists(args.instructions):
            raise FileNotFoundError(f"{args.instructions}: no such file; "
                                    "it holds [{\"instruction\": ..}, ..]")
        rows = llama.read_json(args.instructions)
        if not all(isinstance(row, dict) and "instruction" in row for row in rows):
            raise ValueError(f"{args.instructions}: it must hold [{{\"instruction\": ..}}, ..]")
        os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
        asked = [row["instruction"] for row in rows]
        outputs = []
        for i in range(0, len(asked), args.batch_size):
            outputs += answer([[{"role": "user", "content": q}]
                               for q in asked[i:i + args.batch_size]])
            print(f"{len(outputs)} of {len(asked)}")
        name = os.path.basename(os.path.abspath(args.model))
        llama.write_json(args.out, [{"instruction": q, "output": a, "generator": name}
                                    for q, a in zip(asked, outputs)])
    elif args.prompt:
        print(answer([[{"role": "user", "content": args.prompt}]])[0])
    else:
        turns = []
        with contextlib.suppress(EOFError):          # Ctrl-D ends it, as an empty line does
            while question := input("> ").strip():
                turns.append({"role": "user", "content": question})
                turns.append({"role": "assistant", "content": answer([turns])[0]})
                print(turns[-1]["content"])


if __name__ == "__main__":
    one_line_errors()
    main()
