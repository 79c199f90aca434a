"""
Is the preference signal alive? What MMPO's weights q_w are on your pairs, before any training.

$ python -m scripts.weights HuggingFaceTB/SmolLM2-135M-Instruct pairs.jsonl [more.jsonl ..]

Per data set and for summed and mean log-probs: the share of pairs with q_w > 1/2, the share that is
saturated (q_w < 0.01 or > 0.99), the mean q_w and the median |D| = |s_w - s_l|.
"""
import argparse

import numpy as np
import torch

import data
import mmpo
import model as llama
from configurator import one_line_errors


@torch.no_grad()
def summed_logps(model, pairs, row_tokens=4096):
    """Summed log-probs of every response, (N, n)."""
    logps = torch.zeros(len(pairs), pairs.lengths.shape[1] - 1)
    for members in data.pack(pairs.lengths.sum(1), row_tokens)[0]:
        device = model.head_weight.device
        row = data.collate(pairs, members, (row_tokens,) if device.type == "cuda" else ())
        row = row.to(device)
        sums = mmpo.sum_by_response(model(row), row.response, row.n_responses)
        logps[members] = sums.view(len(members), -1).cpu()
    return logps


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder or a hub id")
    parser.add_argument("data", nargs="+", help="files or hub datasets")
    parser.add_argument("--split", default="train_prefs", help="of a hub dataset")
    parser.add_argument("--pairs", type=int, default=210, help="random pairs of each")
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--max_length", type=int, default=1300)
    parser.add_argument("--max_prompt_length", type=int, default=700)
    args = parser.parse_args()

    folder = llama.checkpoint_folder(args.model)
    model, _ = llama.from_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = data.Tokenizer(folder)
    print("| pairs | log-probs | up-weighted | saturated | mean q_w | median abs(D) |")
    print("|---" * 6 + "|")
    for source in args.data:
        pairs = data.load_pairs(source, args.split, tokenizer, args.max_length,
                                args.max_prompt_length)
        n = pairs.lengths.shape[1] - 1
        if n == 1:
            raise ValueError(f"{source}: one response a row; q compares at least two")
        pairs = pairs.subset(np.random.default_rng(0).permutation(len(pairs))[:args.pairs])
        r = torch.from_numpy(pairs.rewards) if len(pairs.rewards) else torch.linspace(0.9, 0.1, n)
        logps = summed_logps(model, pairs)
        means = logps / torch.from_numpy(pairs.lengths[:, 1:])
        for name, x in (("sum", logps), ("mean (`length_norm`)", means)):
            s = x + mmpo.rewards(r, x, args.beta)   # policy = reference
            q_w, D = mmpo.posterior(x, s - x)[:, 0], s[:, 0] - s[:, -1]
            saturated = ((q_w < 0.01) | (q_w > 0.99)).float().mean()
            print(f"| {source} | {name} | {(q_w > 0.5).float().mean():.2f} | {saturated:.2f} | "
                  f"{q_w.mean():.2f} | {D.abs().median():.2f} |")


if __name__ == "__main__":
    one_line_errors()
    main()
