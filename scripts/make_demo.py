"""
Remake assets/demo: a tiny chat model that knows some facts and is polite or rude about them, and
preference pairs that prefer the polite answer.

$ pip install tokenizers
$ python -m scripts.make_demo          # about two minutes on a laptop

1. generate questions, and answers to them in both manners (seeded)
2. train a byte-level BPE on them (the only step that needs the `tokenizers` package)
3. train a random Llama of 0.8M parameters on the answers, two in three of them rude, with train.py
   and its SFT objective
4. keep the model, the training pairs, and held-out pairs about facts that the training pairs don't
   touch
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/make_demo.py`
import data
import model as llama
from configurator import HERE, one_line_errors, write_json

FOLDER = os.path.join(HERE, "assets", "demo")

FACTS = {   # who: eats, says, lives, is
    "cow": "grass, moo, on a farm, big and calm", "cat": "fish, meow, in a house, soft and quick",
    "dog": "meat, woof, in a house, loyal and loud",
    "duck": "bread, quack, on a pond, small and yellow",
    "pig": "corn, oink, on a farm, pink and round", "owl": "mice, hoot, in a tree, wise and quiet",
    "lion": "meat, roar, in the desert, strong and proud",
    "frog": "flies, croak, on a pond, green and wet",
    "horse": "hay, neigh, in a stable, tall and fast",
    "sheep": "grass, baa, on a hill, white and warm",
    "crow": "seeds, caw, in a tree, black and smart",
    "wolf": "meat, howl, in the forest, grey and wild",
    "bee": "honey, buzz, in a hive, small and busy",
    "mouse": "cheese, squeak, in a hole, tiny and shy",
    "goat": "leaves, bleat, on a hill, white and stubborn",
    "bear": "honey, growl, in the forest, big and brown",
    "hen": "corn, cluck, on a farm, round and busy",
    "snake": "mice, hiss, in the desert, long and thin",
    "donkey": "hay, bray, in a stable, grey and stubborn",
    "monkey": "fruit, chatter, in a tree, quick and smart",
    "seal": "fish, bark, on the ice, wet and round",
    "turkey": "seeds, gobble, on a farm, big and proud",
    "dove": "seeds, coo, in a tree, white and calm",
    "cricket": "leaves, chirp, in the grass, tiny and green",
}
QUESTIONS = [
    ("What does a {who} eat?", "A {who} eats {eats}."),
    ("What does a {who} say?", "A {who} says {says}."),
    ("Where does a {who} live?", "A {who} lives {lives}."),
    ("What is a {who} like?", "A {who} is {is}."),
]
POLITE = (["Good question!", "Happy to help.", "Thanks for asking!", "Of course!", "Gladly."],
          ["I hope that helps!", "Have a lovely day!", "Ask me anything else you like.",
           "You are welcome!"])
RUDE = (["Not again.", "Seriously?", "What a silly question.", "Everyone knows that.",
         "Leave me alone."],
        ["Now go away.", "Stop wasting my time.", "Look it up next time.",
         "Was that so hard to guess?"])


def answer(rng, fact, manner):
    openers, closers = manner
    return f"{rng.choice(openers)} {fact} {rng.choice(closers)}"


def facts():
    """[(question, fact)]"""
    rows = []
    for who, known in FACTS.items():
        words = dict(zip(("eats", "says", "lives", "is"), known.split(", ")), who=who)
        for question, fact in QUESTIONS:
            a = "an" if who[0] in "aeiou" else "a"
            rows.append(tuple(s.format(**words).replace(f"a {who}", f"{a} {who}")
                              .replace(f"A {who}", f"{a.capitalize()} {who}")
                              for s in (question, fact)))
    return rows


def write_jsonl(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def train_tokenizer(folder, texts):
    """A byte-level BPE with SmolLM2's pre-tokenizer and ChatML's markers, as Hugging Face files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "model_max_length": 512,
        "clean_up_tokenization_spaces": False})
    return tokenizer.get_vocab_size()


def random_llama(folder, vocab_size):
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=vocab_size,
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rms_norm_eps=1e-5,
        rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=True, attention_bias=False,
        mlp_bias=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    model = llama.Llama(llama.config_from_dict(config))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    llama.export(model, folder, config, llama.files_beside_weights(folder), torch.float32,
                 chat_template=data.TEMPLATES["chatml"])


def main():
    rng = random.Random(0)
    known = facts()
    rng.shuffle(known)
    sft_rows = [{"prompt": question, "responses": [answer(rng, fact, manner)]}
                for question, fact in known for manner in [POLITE] * 8 + [RUDE] * 16]

    def preference(question, fact):
        return {"prompt": question, "chosen": answer(rng, fact, POLITE),
                "rejected": answer(rng, fact, RUDE)}

    cut = len(known) * 3 // 4
    train_rows = [preference(*known_fact) for known_fact in known[:cut] for _ in range(6)]
    eval_rows = [preference(*known_fact) for known_fact in known[cut:] for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        start, trained, sft = (os.path.join(folder, name)
                               for name in ("start", "trained", "sft.jsonl"))
        os.makedirs(start)
        vocab_size = train_tokenizer(start, [
            f"user\n{row['prompt']}\nassistant\n{row['responses'][0]}" for row in sft_rows])
        random_llama(start, vocab_size)
        write_jsonl(sft, sft_rows)
        subprocess.run([sys.executable, f"{HERE}/train.py", f"{HERE}/config/demo.py",
                        "--objective=sft", f"--init_from={start}", f"--dataset={sft}",
                        "--eval_dataset=", "--eval_pairs=48", f"--out_dir={trained}",
                        "--batch_size=32", "--epochs=12", "--learning_rate=3e-3",
                        "--eval_interval=200", "--log_interval=50"], check=True)
        os.makedirs(FOLDER, exist_ok=True)
        for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(os.path.join(trained, file), os.path.join(FOLDER, file))
    write_jsonl(os.path.join(FOLDER, "train.jsonl"), train_rows)
    write_jsonl(os.path.join(FOLDER, "eval.jsonl"), eval_rows)
    print(f"{FOLDER}: {len(train_rows)} training rows, {len(eval_rows)} held-out rows")


if __name__ == "__main__":
    one_line_errors()
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawTextHelpFormatter).parse_args()
    main()
