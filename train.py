"""
Align a Llama-family language model on preference pairs, with MMPO or with a baseline.

$ python train.py config/smollm2_135m.py --beta=0.1              # on one GPU, or on a CPU
$ torchrun --nproc_per_node=4 train.py config/smollm2_135m.py    # on four GPUs of one machine
$ torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 train.py CONFIG
                         # on two machines of eight GPUs; on the second one with --node_rank=1

`python train.py --help` lists every setting below.
"""
import json
import math
import os
import signal
import sys
import time
from importlib.util import find_spec

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C in the imports below: no traceback

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import mmpo
import model as llama
from configurator import (
    UserError, cache_path, code_sum, configure, first_line, first_on_each_node, is_finished,
    join_ranks, load_cache, one_line_errors, printable, read_run_settings, require,
    same_on_all_ranks, save_cache, torchrun_ranks, write_json, writing)
from scripts import cost, report
from scripts.checkpoints import (
    check_checkpoint, check_same_run, end_on_signals, finish_saving, hold, interrupted,
    last_checkpoint, load_checkpoint, open_metrics, past_metrics, remove_checkpoints,
    save_checkpoint, until_interrupted)

# -----------------------------------------------------------------------------
# Default settings: MMPO on SmolLM2-135M, all weights, one GPU. Config files and --key=value on the
# command line override them. Words between bars at the start of a comment are the allowed values.
# I/O
out_dir = "out"                   # the aligned model, in Hugging Face layout, and metrics.jsonl
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"   # the model: hub id[@revision], folder, adapter
export_dtype = "bfloat16"         # bfloat16 | float16 | float32: of exported weights, not adapters
export_adapter = False            # with LoRA: write the adapters alone (peft), not merged weights
save_interval = 0                 # steps between checkpoints to resume from; 0 writes none
keep_checkpoints = 1              # how many of the newest are kept; of a finished run, one
overwrite = False                 # replace the finished model that is in out_dir
resume = False                    # go on from the last checkpoint in out_dir, if there is one
dry_run = False                   # print what a run would take, memory by part, and stop
debug = False                     # show the traceback of errors that otherwise are one line
# logging
log_interval = 1                  # steps between log lines
eval_interval = 50                # steps between evaluations; there is one before and after, too
sample_prompt = ""                # answered before and after training; "" takes a held-out one
sample_tokens = 96                # at most so many tokens of that answer
kl_samples = 16                   # answers of the reference that KL is estimated on
kl_tokens = 64                    # at most so many tokens of each
wandb_log = False                 # log to Weights & Biases too
wandb_project = "nanommpo"        # name of the Weights & Biases project
# data
dataset = "HuggingFaceH4/ultrafeedback_binarized,HuggingFaceH4/orca_dpo_pairs"   # files, hub ids
train_split = "train_prefs"       # of a hub or saved dataset; one for each if they differ: a,b
eval_dataset = ""                 # held-out pairs; "" takes eval_pairs pairs out of dataset
eval_split = "test_prefs"         # of a hub or saved eval_dataset
eval_pairs = 256                  # at most so many held-out pairs
max_length = 2312                 # tokens of the prompt and one response, at most
max_prompt_length = 1800          # tokens of the prompt, at most; its end is kept
chat_template = ""                # chatml, llama3 or a .jinja file; "" takes the model's own
chat_template_kwargs = ""         # variables for the template: '{"enable_thinking": false}'
bad_rows = "error"                # error | drop: a malformed row ends the run, or is dropped
columns = ""                      # other names of fields: prompt:question_text,chosen:good
use_scores = False                # score_chosen and score_rejected of a row are its rewards
# objective
objective = "mmpo"                # the loss, one of OBJECTIVES in mmpo.py: dpo, simpo, sft, ..
beta = 0.05                       # weight of log pi_ref in MMPO's R; the beta of DPO, IPO and SimPO
reward_chosen = 0.9               # r of the chosen response
reward_rejected = 0.1             # r of the rejected response
length_norm = True                # mean log-probs over a response's tokens, not sums (MMPO, SFT)
reward_norm = True                # scale R into [0, 1] over a group of pairs
reward_norm_group = 0             # pairs in such a group; 0 takes the whole batch
pref_weight = 0.0                 # weight of the pairwise term: 0 is MMPO, 1 trains on chosen alone
entropy_coef = 0.0                # weight of the entropy bonus, an ablation of the paper
gamma_beta_ratio = 1.6            # SimPO's gamma / beta; gamma is its margin
orpo_lambda = 0.1                 # weight of ORPO's odds ratio
# model
lora_rank = 0                     # rank of the adapters; 0 trains all weights instead
lora_alpha = 64.0                 # LoRA's scale is alpha / rank
lora_dropout = 0.01               # on the input of the adapters
lora_targets = "q_proj,k_proj,v_proj,o_proj"   # the linear layers that get adapters
# optimizer
batch_size = 128                  # pairs a step, over all GPUs; pack_tokens bounds the memory
learning_rate = 2e-5              # at its peak; the higher, the further from the start
optimizer_state = "fp32"          # fp32 | 8bit: AdamW's; 8bit takes pip install bitsandbytes
weight_decay = 0.0                # AdamW's, of matrices; vectors (norms, biases) have none
beta1 = 0.9                       # AdamW's
beta2 = 0.999                     # AdamW's
grad_clip = 1.0                   # largest norm of the gradient; 0 never clips
skip_nonfinite = 0                # steps with a NaN or infinite gradient to skip before an error
# schedule
epochs = 5.0                      # passes over the pairs; --epochs overrides a config's max_iters
max_iters = 0                     # steps; 0 takes as many as epochs needs
warmup = 0.1                      # share of the steps in which the learning rate rises
min_lr = 0.0                      # the learning rate at the end of the cosine
# distributed
parallel = "ddp"                  # ddp | fsdp: each GPU has the whole model, or its part (FSDP2)
# system
pack_tokens = 16384               # tokens a GPU takes in one forward and backward, at most
activation_checkpointing = False  # compute activations again in backward: slower, far less memory
device = "auto"                   # auto | cuda | cpu: auto takes a GPU where there is one
dtype = "auto"                    # auto | bfloat16 | float32: of products and weights LoRA freezes
compile = "auto"                  # auto | true | false: torch.compile; auto does on a GPU only
seed = 42                         # of the held-out split, pairs' order, adapters, dropout, samples
# -----------------------------------------------------------------------------
one_line_errors()   # a user's mistake ends in one line, a bug in a traceback
settings, overrides = configure(globals(), sys.argv[1:], __file__,
                                choices={"objective": mmpo.OBJECTIVES})   # sets the names above

# one process, or one of those that torchrun started
ddp, ddp_rank, ddp_local_rank, ddp_world_size = torchrun_ranks()
fsdp = ddp and parallel == "fsdp"
master_process = ddp_rank == 0
device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
out_dir = os.path.expanduser(out_dir)

# --- settings that can't work, alone or together, refused before anything is loaded
# lexists is asked before isdir, since rank 0 may make the folder in between.
require(out_dir and (not os.path.lexists(out_dir) or os.path.isdir(out_dir))
        and out_dir == out_dir.encode("utf-8", "replace").decode(),
        f'out_dir: "{out_dir}" is no folder, or no UTF-8; give another')
require(dataset, "dataset: empty; give files, folders or hub ids, separated by commas")
require(device == "cpu" or torch.cuda.is_available(), "device: no cuda here; try --device=auto")
require(device != "cuda" or ddp_local_rank < torch.cuda.device_count(),
        f"torchrun: this machine has {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
require(ddp or parallel == "ddp", "parallel: fsdp shards over processes; start it with torchrun")
require(optimizer_state != "8bit" or not fsdp and find_spec("bitsandbytes"),
        "optimizer_state: 8bit takes pip install bitsandbytes, and parallel=ddp")
require(not wandb_log or getattr(find_spec("wandb"), "origin", None),   # not its folder ./wandb
        "wandb_log: it takes pip install wandb")
require(objective not in ("dpo", "ipo", "simpo") or beta > 0,
        f"beta: with 0 {objective} learns nothing; give a value above 0")
require(min_lr <= learning_rate, f"min_lr: {min_lr} is above learning_rate, {learning_rate}")
require(lora_rank or not export_adapter, "export_adapter: no adapters without LoRA; set lora_rank")

# --- setup
end_on_signals()     # during setup at once, in the loop between two steps
if master_process and not dry_run:
    hold(out_dir)    # one run in one folder; the other ranks wait in join_ranks
device = torch.device(device, ddp_local_rank if device == "cuda" else None)
on_gpu = device.type == "cuda"
if on_gpu:
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")   # TF32 for the products that stay in fp32
if ddp:
    join_ranks("nccl" if on_gpu else "gloo", device if on_gpu else None)
start_iter, checkpoint = last_checkpoint(out_dir)
require(resume or dry_run or not checkpoint or is_finished(out_dir),
        f"{checkpoint}: an unfinished run; go on with --resume=True, or delete it")
if not resume:
    start_iter, checkpoint = 0, None
if dtype == "auto":   # a dry run predicts what a GPU would need, so it assumes bf16
    dtype = "bfloat16" if dry_run or llama.fast_bfloat16(device) else "float32"
bf16 = dtype == "bfloat16"
settings["dtype"] = dtype   # recorded, since a run must resume in the same dtype
same_on_all_ranks(settings | {"resume (machines must share out_dir), from step":
                              resume and max(start_iter, is_finished(out_dir))})
compile = on_gpu if compile == "auto" else compile == "true"
autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
# Pairs that are already learned have tiny gradients. A CPU is 40 times slower with numbers
# below 1e-38, so those are rounded to 0.
torch.set_flush_denormal(True)
torch.manual_seed(seed)     # on all ranks alike, for they must start with the same adapters


def log(text):
    if master_process:
        tqdm.write(printable(text))


finished = resume and is_finished(out_dir)
if resume and not checkpoint and not finished:
    log(f"resume: no checkpoint in {out_dir}, so the run starts")
before = {}   # the settings of the run that this one resumes
if checkpoint:
    before = check_checkpoint(checkpoint)
elif finished:
    before = read_run_settings(out_dir)
log(f"nanoMMPO: {objective} on {ddp_world_size} x {device.type}, {dtype}; set: " +
    (", ".join(f"{k}={v!r}" for k, v in overrides.items()) or "nothing"))
for name, needed in {"lora_alpha": "lora_rank", "lora_dropout": "lora_rank",
                     "lora_targets": "lora_rank", "eval_split": "eval_dataset"}.items():
    if name in overrides and not settings[needed]:
        log(f"note: {name} has no effect without {needed}")
for name in overrides:
    by_entropy = name == "length_norm" and entropy_coef   # the entropy bonus reads it always
    if name in mmpo.UNREAD.get(objective, ()) and not by_entropy:
        log(f"note: {name} has no effect on {objective}")

# --- data: rows become token ids once, and are read from the cache after that
folder = first_on_each_node(llama.checkpoint_folder, init_from, not dry_run)
llama.check_target(out_dir, folder, export_adapter, overwrite or dry_run or bool(before))
tokenizer = data.Tokenizer(folder, chat_template, chat_template_kwargs)
tokenizing = (tokenizer, max_length, max_prompt_length, bad_rows, columns, use_scores)
train_pairs = first_on_each_node(data.load_pairs, dataset, train_split, *tokenizing)
log(f"{dataset}: {train_pairs.report}")
if eval_dataset:
    held_out = first_on_each_node(data.load_pairs, eval_dataset, eval_split, *tokenizing, True)
    log(f"{eval_dataset}: {held_out.report}")
    # the same pairs for every seed, so that runs can be compared
    held_out = held_out.subset(np.random.default_rng(42).permutation(len(held_out))[:eval_pairs])
else:
    train_pairs, held_out = data.hold_out(train_pairs, eval_pairs, seed)
    if len(train_pairs) < batch_size:
        log(f"warning: eval_pairs {eval_pairs} leaves {len(train_pairs)} pairs to train on, less "
            f"than a batch of {batch_size}; lower it, or give eval_dataset")
if leaked := data.n_leaked(train_pairs, held_out):
    log(f"warning: {leaked} of {len(held_out)} held-out pairs have a prompt that is trained on "
        "too, or begins so, and their numbers flatter; give an eval_dataset of other prompts")
log(report.describe_example(train_pairs, tokenizer))
longest = max(train_pairs.lengths.sum(1).max(), held_out.lengths.sum(1).max())
require(longest <= pack_tokens, f"pack_tokens: {pack_tokens} is less than the longest pair "
        f"({longest} tokens); raise it, or lower max_length")
for source, pairs in ((dataset, train_pairs), (eval_dataset, held_out)):
    require(pairs.n_responses > 1 or objective == "sft", f"{source}: one response a row, and "
            f"{objective} compares at least two; train on it with --objective=sft")
iters_per_epoch = math.ceil(len(train_pairs) / batch_size)
max_iters = max_iters or math.ceil(epochs * iters_per_epoch)
log(f"{len(train_pairs):,} pairs, {len(held_out):,} held out; {max_iters} steps of {batch_size} "
    f"pairs, {iters_per_epoch} an epoch")
settings |= {"dataset_sha256": train_pairs.fingerprint(), "held_out": len(held_out),
             "eval_dataset_sha256": held_out.fingerprint()}
same_on_all_ranks(settings)

# --- model: shapes first, then adapters and shards, then memory and weights.
# Trained weights are always fp32. Those that LoRA freezes have the dtype of the matrix products.
frozen_dtype = torch.bfloat16 if lora_rank and bf16 else torch.float32
raw_model, hf_config = llama.build(folder, frozen_dtype)
files = llama.files_beside_weights(folder)   # for the export, as they are now
# The pairs' ids are checked, since some tokenizers have a padding token that the model lacks.
last_id = max(pairs.tokens.max() for pairs in (train_pairs, held_out))
require(last_id < raw_model.config.vocab_size, f"{folder}: the pairs have the id {last_id}, but "
        f"config.json {raw_model.config.vocab_size} ids; does tokenizer.json belong to it?")
if lora_rank:
    llama.add_lora(raw_model, lora_rank, lora_alpha, lora_dropout,
                   lora_targets.replace(",", " ").split())
if fsdp:
    llama.shard(raw_model, device.type, torch.bfloat16 if bf16 else None)
log(f"{init_from}: {sum(p.numel() for p in raw_model.parameters()):,} parameters, "
    f"{sum(p.numel() for p in raw_model.parameters() if p.requires_grad):,} trained")
for pairs in (train_pairs, held_out):
    raw_model.config.check_length((pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(1)).max())
if max_length > raw_model.config.max_position_embeddings:
    log(f"note: max_length {max_length} is beyond the model's context of "
        f"{raw_model.config.max_position_embeddings} tokens")
raw_model.activation_checkpointing = activation_checkpointing
if dry_run:
    log(cost.report(raw_model, train_pairs, held_out, settings | {"max_iters": max_iters},
                    ddp_world_size, device, overrides.get("dtype", "auto")))
    sys.exit()
# A resumed run must be the same run: the same settings, pairs and base weights, by their content.
written = llama.last_written(folder)
settings |= {"init_from_sha256": llama.weights_fingerprint(folder), "code_sha256": code_sum()}
same_on_all_ranks(settings)
if before:
    check_same_run(settings, before, log)
    settings["code_sha256"] = before.get("code_sha256")   # of the code that began it
if finished and (not checkpoint or max(start_iter, finished) >= max_iters):
    log(f"resume: the run in {out_dir} is finished, and stays as it is; " + (
        "with more max_iters or epochs it would go on" if checkpoint else
        "for more max_iters or epochs it has no checkpoint (save_interval)"))
    sys.exit()
if checkpoint:
    require(start_iter <= max_iters, f"max_iters: {max_iters}, and {checkpoint} is past that")
llama.load_weights(raw_model, folder, device, in_bf16=bf16)
require(llama.last_written(folder) == written, f"{folder}: changed while it was read; start again")
trained = [p for p in raw_model.parameters() if p.requires_grad]
if compile:
    raw_model.compile_blocks()
pad_to = data.pad_multiple(device)


def score(pairs, indices, title=None):
    """Summed log-probs of every response of pairs[indices], (len(indices), n), on every rank."""
    with autocast:   # without gradients a pack takes far less memory, so it may be larger
        return data.score(raw_model, pairs, indices, 2 * pack_tokens, title)


stop_ids = tokenizer.stop_ids()
if lora_rank and llama.looks_untrained(raw_model, tokenizer.end_of_turn(),
                                       tokenizer.special.values()):
    log("warning: the base was not trained on the token that ends a turn, and LoRA leaves its "
        "embedding as it is, so answers may not end; train all weights, or give a chat_template "
        "whose turns end in {{ eos_token }}")


def answer(title):
    """One greedy answer, for a person to see what training does."""
    turns = [{"role": "user", "content": sample_prompt}]
    prompt = tokenizer.encode_prompt(turns) if sample_prompt else held_out.ids(0)[0].tolist()
    with autocast:
        [ids] = raw_model.generate([prompt], sample_tokens, temperature=0, stop_ids=stop_ids)
    log(f"{title}:\n| " + tokenizer.decode(prompt + ids).replace("\n", "\n| "))


# --- reference log-probs, and so all rewards: constants, computed once, before the policy moves.
# Once training begins there is no reference model, only a table: R = r + beta log pi_ref.
def reference_logps(pairs, indices):
    """score(pairs, indices) of the untrained model, from the cache if every rank finds it there."""
    card = torch.cuda.get_device_name() if on_gpu else device.type
    key = [settings["init_from_sha256"], dtype, str(frozen_dtype), fsdp, card, compile,
           torch.__version__, pairs.fingerprint(), indices.tolist()]
    path = cache_path("reference", key, code=["data.py", "model.py"])
    cached = load_cache(path)
    found = torch.tensor(float(cached is not None), device=device)
    if ddp:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    if found:
        return torch.from_numpy(cached["logps"])
    with llama.adapters_off(raw_model):
        logps = score(pairs, indices, "reference log-probs")
    if ddp_local_rank == 0:
        save_cache(path, logps=logps.numpy())
    return logps


def constants_of(pairs, ref_logps):
    """What is known of each pair before training, (N, n) each: lengths, ref_logps, R."""
    lengths = torch.from_numpy(pairs.lengths[:, 1:])   # tokens of each response
    r = torch.from_numpy(pairs.rewards) if len(pairs.rewards) else \
        torch.linspace(reward_chosen, reward_rejected, pairs.n_responses)
    scored = ref_logps / lengths if length_norm else ref_logps
    return lengths, ref_logps, mmpo.rewards(r, scored, beta)


# NaN stands for what is not known, so that a loss which reads it ends the run
train_ref_logps = torch.full((len(train_pairs), train_pairs.n_responses), math.nan)
if mmpo.OBJECTIVES[objective]:   # its loss reads the reference
    # the pairs the run will visit, as one batch: fewer than all if it ends in its first epoch
    visited = np.sort(data.batch_indices(len(train_pairs), max_iters * batch_size, seed, 0))
    t0 = time.monotonic()
    train_ref_logps[visited] = reference_logps(train_pairs, visited)
    log(f"reference log-probs of {len(visited):,} pairs: {time.monotonic() - t0:.0f} s")
train_constants = constants_of(train_pairs, train_ref_logps)

# --- evaluation: held-out pairs, and samples of the reference for the KL estimate
everything = np.arange(len(held_out))
eval_lengths, eval_ref_logps, eval_R = constants_of(held_out, reference_logps(held_out, everything))
if reward_norm:   # over groups as large as in training
    eval_R = mmpo.normalize(eval_R, reward_norm_group or batch_size)
kl_prompts = [held_out.ids(i)[0].tolist() for i in range(min(kl_samples, len(held_out)))]
if kl_prompts:
    answers = []
    for i in range(0, len(kl_prompts), 8):    # a few at a time: their keys and values take memory
        with autocast:
            answers += raw_model.generate(kl_prompts[i:i + 8], kl_tokens, stop_ids=stop_ids,
                                          seed=seed + i)
    if ddp:
        dist.broadcast_object_list(answers)   # every rank has the same samples
    kl_pairs = data.Pairs.from_ids([[p, a] for p, a in zip(kl_prompts, answers)])
    kl_ref_logps = score(kl_pairs, np.arange(len(kl_pairs)))

loss_knobs = dict(beta=beta, length_norm=length_norm, pref_weight=pref_weight,
                  gamma_beta_ratio=gamma_beta_ratio, orpo_lambda=orpo_lambda)


def evaluate(iter_num):
    """Loss and metrics of the held-out pairs, and KL(reference || policy) in nats a token,
    estimated on the reference's own samples."""
    # before the first step the policy is the reference
    logps = score(held_out, everything) if iter_num else eval_ref_logps
    metrics = mmpo.measure(objective, logps, eval_lengths, eval_ref_logps, eval_R, **loss_knobs)
    if held_out.n_responses > 1:   # of every objective, whether or not it reads the reference
        gains = logps - eval_ref_logps
        metrics["accuracy/implicit"] = mmpo.wins(gains[:, 0] - gains[:, -1]).mean().item()
    if kl_prompts:
        gaps = kl_ref_logps - score(kl_pairs, np.arange(len(kl_pairs)))
        metrics |= mmpo.kl_estimate(gaps, torch.from_numpy(kl_pairs.lengths[:, 1:]))
    record(iter_num, {f"eval/{name}": value for name, value in metrics.items()})


# --- optimizer
groups = [dict(params=[p for p in trained if p.dim() >= 2], weight_decay=weight_decay),
          dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0)]
if optimizer_state == "fp32":
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)
else:
    from bitsandbytes.optim import AdamW8bit
    optimizer = AdamW8bit(groups, lr=learning_rate, betas=(beta1, beta2))
model = DDP(raw_model, gradient_as_bucket_view=True) if ddp and not fsdp else raw_model


def set_lr(iter_num):
    """Linear warm-up, then a cosine down to min_lr. Returns the learning rate."""
    warmup_iters = warmup * max_iters
    progress = (iter_num - warmup_iters) / max(1, max_iters - warmup_iters)
    lr = min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
    if iter_num < warmup_iters:
        lr = learning_rate * (iter_num + 1) / (warmup_iters + 1)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# --- where the policy starts
answer("sample before")
if checkpoint:
    load_checkpoint(raw_model, optimizer, checkpoint)
    log(f"going on from {checkpoint}")

# --- the run's records; nothing of an earlier run has been touched so far
if master_process:
    os.makedirs(out_dir, exist_ok=True)
    if wandb_log:
        try:
            import wandb
            wandb_run = wandb.init(
                project=wandb_project, name=os.path.basename(os.path.abspath(out_dir)),
                config=settings, id=before.get("wandb_id"), resume="allow")
            settings["wandb_id"] = wandb_run.id   # by which a resumed run goes on there
        except Exception as e:
            raise UserError(f"wandb_log: {first_line(e)}") from e
    path = os.path.join(out_dir, "metrics.jsonl")
    past = past_metrics(path, start_iter)   # the last check that may fail
    if not checkpoint:
        remove_checkpoints(out_dir)         # of a finished run that this one replaces
    write_json(os.path.join(out_dir, "train_config.json"), settings)
    metrics_file = open_metrics(path, past)


def record(iter_num, metrics):
    """Keep all metrics of a step or an evaluation, and show the main ones on a line."""
    global wandb_log
    if not master_process:
        return
    metrics = {name: float(value) for name, value in metrics.items()}
    with writing(metrics_file.name):
        metrics_file.write(json.dumps({"iter": iter_num} | metrics) + "\n")
    log(report.line(iter_num, metrics))
    if wandb_log:
        try:
            wandb.log(metrics, step=iter_num)
        except Exception as e:   # the run goes on without it
            wandb_log = False
            log(f"note: wandb_log: no more of it ({first_line(e)}); metrics.jsonl has everything")


# --- training loop: max_iters steps, then one turn more, which only evaluates and saves
started, skipped = time.monotonic(), before.get("skipped", 0)
for iter_num in tqdm(range(start_iter, max_iters + 1), "steps", max_iters, initial=start_iter,
                     disable=None if master_process else True):   # None: only on a terminal

    # evaluate before the first step, now and then, and after the last
    done = iter_num == max_iters
    if done and not save_interval:
        evaluate(iter_num)   # whatever signal comes, since only the export will keep the model
    elif done or iter_num % eval_interval == 0:
        until_interrupted(device, evaluate, iter_num)
    # save now and then, at the end for more epochs, and when a signal asks the run to end
    signal_number = interrupted(device)
    must = not done or signal_number   # after the last step a failed save only warns
    if save_interval and iter_num > start_iter and (
            done or signal_number or iter_num % save_interval == 0):
        save_checkpoint(raw_model, optimizer, out_dir, iter_num, settings | {"skipped": skipped},
                        log, must)
    if done or signal_number:
        finish_saving(must)
        break
    t0 = time.monotonic()
    torch.manual_seed(seed + ddp_rank + iter_num * ddp_world_size)   # dropout differs on each rank
    lr = set_lr(iter_num)

    # the pairs of this step, and what is constant about them
    batch = data.batch_indices(len(train_pairs), batch_size, seed, iter_num)
    lengths, ref_logps, R = (x[batch] for x in train_constants)            # (B, n)
    if reward_norm:   # over the batch, or groups of it, however GPUs and packs split it
        R = mmpo.normalize(R, reward_norm_group)
    lengths, ref_logps, R = (x.to(device) for x in (lengths, ref_logps, R))
    batch_logps = torch.zeros(R.shape, device=device)

    # forward and backward, as many pairs at a time as a pack holds
    tree_lengths = train_pairs.lengths[batch]   # (B, 1 + n) tokens of the prompt and each response
    packs = data.plan_packs(tree_lengths.sum(1), pack_tokens, ddp_world_size, fsdp)[ddp_rank]
    for micro_step, members in enumerate(packs):
        pack = data.collate(train_pairs, batch, members, pad_to).to(device)
        i = pack.members   # the places of its pairs in the batch
        if ddp:            # DDP averages gradients over the ranks once, in the last micro-step
            model.require_backward_grad_sync = micro_step == len(packs) - 1
        with autocast:
            per_token_logps, per_token_entropy = model(
                pack, also=llama.token_entropy if entropy_coef > 0 else None)
        logps = pack.sum_by_response(per_token_logps)                      # (pairs, n)
        losses = mmpo.preference_loss(objective, logps, lengths[i], ref_logps[i], R[i],
                                      **loss_knobs)
        if entropy_coef > 0:
            losses = losses - entropy_coef * mmpo.entropy_bonus(
                per_token_logps, per_token_entropy, pack.response, lengths[i], length_norm)
        # the mean over the batch, times the ranks, since DDP and FSDP average over those
        (losses.sum() / len(batch) * ddp_world_size).backward()
        batch_logps[i] = logps.detach()

    # The update. The CPU waits for the GPU here, since a gradient that is NaN or infinite must not
    # reach the weights.
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
    grad_norm = llama.whole(grad_norm).item()   # with FSDP it comes in parts
    finite = math.isfinite(grad_norm)
    if ddp and (not finite or iter_num % log_interval == 0):
        dist.all_reduce(batch_logps)   # every rank filled in the pairs that it computed
    if finite:
        optimizer.step()
    else:
        skipped += 1
        wrong = (f"step {iter_num}: the gradient is not finite, and the weights are not updated; "
                 + report.name_pairs(train_pairs, batch, batch_logps, tokenizer))
        lower = "learning_rate"
        if skipped > iter_num:   # no step was taken yet, so it isn't the learning rate
            lower = "beta, pref_weight or what else scales the loss"
        require(skipped <= skip_nonfinite, f"{wrong}; lower {lower}"
                + ", or --dtype=float32" * bf16)
        log(f"warning: {wrong}")
    optimizer.zero_grad(set_to_none=True)

    if iter_num % log_interval == 0:
        metrics = mmpo.measure(objective, batch_logps, lengths, ref_logps, R, **loss_knobs)
        seconds = (time.monotonic() - started) / max(1, iter_num - start_iter)   # a step
        left = seconds * (max_iters - iter_num - 1)
        metrics |= {"grad_norm": grad_norm, "lr": lr, "seconds_left": left}
        metrics |= cost.throughput(raw_model, tree_lengths, packs, pad_to, time.monotonic() - t0)
        record(iter_num, metrics)
    if iter_num == start_iter:
        started = time.monotonic()   # the first step may compile, and says nothing of the others

# --- the aligned model, in Hugging Face layout, and what to know about it
if signal_number and (save_interval or not done):
    sys.exit(128 + signal_number)   # an interrupted run exports nothing
llama.export(raw_model, out_dir, hf_config, files, getattr(torch, export_dtype),
             adapter_of=init_from if export_adapter else None, stop_ids=stop_ids,
             chat_template=tokenizer.template_text, in_bf16=bf16)
answer("sample after")
if master_process:
    card = report.write_model_card(out_dir)
    write_json(os.path.join(out_dir, "train_config.json"), settings | {"finished": max_iters})
    remove_checkpoints(out_dir, keep=1)   # from which it goes on if there are more epochs
    metrics_file.close()
    log(report.closing_lines(out_dir))
    log(f"aligned model, {card} and metrics.jsonl: {out_dir}" +
        ("; its checkpoint is there for more epochs, so delete it if there won't be any"
         if last_checkpoint(out_dir)[1] else ""))
if ddp:
    dist.barrier()
    del model   # a DDP wrapper that outlives the process group can hang
    dist.destroy_process_group()
    time.sleep(0.5)   # time for gloo's threads to free FSDP's tensors: else the process may abort
