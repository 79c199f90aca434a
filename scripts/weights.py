"""
Is there a preference signal? What MMPO's weights q_w are on your pairs, before any training.

$ python -m scripts.weights HuggingFaceTB/SmolLM2-135M-Instruct pairs.jsonl [more.jsonl ..]

For each data set, with summed and with mean log-probs: the share of pairs whose chosen response is
up-weighted (q_w > 1/n; with two responses 1/2), the share that is saturated (q_w < 0.01 or > 0.99),
the mean q_w, and the median |D|, D = s_w - s_l. R is taken as it is, as with --reward_norm=False;
what a run begins with otherwise is in the first lines of its metrics.jsonl.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/weights.py`
import data
import mmpo
import model as llama
from configurator import check_numbers, one_line_errors, require


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder or a hub id")
    parser.add_argument("data", nargs="+", help="files or hub datasets")
    parser.add_argument("--split", default="train_prefs", help="of a hub dataset")
    parser.add_argument("--columns", default="", help="other names of fields, as in train.py")
    parser.add_argument("--chat_template", default="", help="as in train.py, for a base model")
    parser.add_argument("--pairs", type=int, default=210, help="random pairs of each")
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--max_length", type=int, default=1300)
    parser.add_argument("--max_prompt_length", type=int, default=700)
    args = parser.parse_args()
    check_numbers(args, pairs=1, beta=0, max_length=1, max_prompt_length=1)

    folder = llama.checkpoint_folder(args.model)
    model, _ = llama.from_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = data.Tokenizer(folder, args.chat_template)
    print("| pairs | log-probs | up-weighted | saturated | mean q_w | median abs(D) |")
    print("|---" * 6 + "|")
    for source in args.data:
        pairs = data.load_pairs(source, args.split, tokenizer, args.max_length,
                                args.max_prompt_length, columns=args.columns)
        n = pairs.n_responses
        require(n > 1, f"{source}: one response a row; q compares at least two")
        pairs = pairs.subset(np.random.default_rng(0).permutation(len(pairs))[:args.pairs])
        r = torch.from_numpy(pairs.rewards) if len(pairs.rewards) else torch.linspace(0.9, 0.1, n)
        sums = data.score(model, pairs, np.arange(len(pairs)), pack_tokens=4096, title=source)
        means = sums / torch.from_numpy(pairs.lengths[:, 1:])
        for name, logps in (("sum", sums), ("mean (`length_norm`)", means)):
            R = mmpo.rewards(r, logps, args.beta)   # before training the policy is the reference
            s, q_w = logps + R, mmpo.posterior(logps, R)[:, 0]
            saturated = ((q_w < 0.01) | (q_w > 0.99)).float().mean()
            print(f"| {source} | {name} | {(q_w > 1 / n).float().mean():.2f} | {saturated:.2f} | "
                  f"{q_w.mean():.2f} | {(s[:, 0] - s[:, -1]).abs().quantile(0.5):.2f} |")


if __name__ == "__main__":
    one_line_errors()
    main()
