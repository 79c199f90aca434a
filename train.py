"""
Align a Llama-family language model on preference pairs with MMPO, or with a baseline.

One GPU, or a CPU:
$ python train.py config/smollm2_135m.py --beta=0.1
Four GPUs on one machine:
$ torchrun --nproc_per_node=4 train.py config/smollm2_135m.py
Two machines of eight (on the second, --node_rank=1):
$ torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 train.py config/x.py

`python train.py --help` lists every setting below.
"""
import json
import math
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import mmpo
import model as llama
from configurator import check_same_run, configure, one_line_errors

# -----------------------------------------------------------------------------
# defaults: SmolLM2-135M on one GPU; a comment's first words (`> 0`, `a | b`, `0 to 1`) are checked
# I/O
out_dir = "out"                   # the aligned model, in Hugging Face layout, and metrics.jsonl
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"   # the model to align: a folder or a hub id
export_dtype = "bfloat16"         # bfloat16 | float16 | float32: of the exported weights
export_adapter = False            # with LoRA: write the adapters alone (peft), not merged weights
save_interval = 0                 # >= 0, steps between checkpoints to resume from; 0: none
resume = False                    # go on from the last checkpoint in out_dir
dry_run = False                   # print what a run takes, memory by part, and stop
# logging
log_interval = 1                  # > 0, steps between log lines
eval_interval = 50                # > 0, steps between evaluations; always before and after too
sample_prompt = ""                # answered before and after; "": the first held-out prompt
sample_tokens = 96                # > 0, tokens of that answer at most
kl_samples = 16                   # >= 0, answers of the reference that KL is estimated on
kl_tokens = 64                    # > 0, tokens of each at most
wandb_log = False                 # log to Weights & Biases too
wandb_project = "nanommpo"        # its project
# data
dataset = "HuggingFaceH4/ultrafeedback_binarized,HuggingFaceH4/orca_dpo_pairs"   # files, hub ids
train_split = "train_prefs"       # of a hub dataset
eval_dataset = ""                 # the same for held-out pairs; "": eval_pairs of dataset
eval_split = "test_prefs"         # of a hub eval_dataset
eval_pairs = 256                  # > 0, held-out pairs used
max_length = 2312                 # > 1, tokens of prompt + response at most
max_prompt_length = 1800          # > 0, tokens of the prompt at most; its end is kept
chat_template = ""                # "": the model's own; chatml, llama3 or a .jinja file
bad_rows = "error"                # error | drop: what a malformed row does; drops are counted
# objective
objective = "mmpo"                # mmpo | dpo | simpo | ipo | orpo | sft
beta = 0.05                       # >= 0, weight of the reference in R; scale of DPO, IPO, SimPO
reward_chosen = 0.9               # r of the chosen response
reward_rejected = 0.1             # r of the rejected response
length_norm = True                # mean instead of summed log-probs (MMPO, SFT)
reward_norm = True                # min-max R over a group, into [0, 1]
reward_norm_group = 0             # >= 0, pairs in such a group; 0: the global batch
pref_weight = 0.0                 # >= 0, pairwise term: 0 MMPO, 1 likelihood of the chosen only
entropy_coef = 0.0                # >= 0, the entropy ablation
gamma_beta_ratio = 1.6            # >= 0, SimPO's margin over beta
orpo_lambda = 0.1                 # >= 0, weight of ORPO's odds ratio
# model
lora_rank = 0                     # >= 0, 0 trains all weights
lora_alpha = 64.0                 # > 0, LoRA's scale is alpha / rank
lora_dropout = 0.01               # 0 to 0.99, on the adapters' input
lora_targets = "q_proj,k_proj,v_proj,o_proj"   # linear layers with adapters
# optimizer
batch_size = 128                  # > 0, pairs per step, over all ranks
learning_rate = 5e-4              # >= 0, at its peak
optimizer_state = "fp32"          # fp32 | 8bit: the latter takes pip install bitsandbytes
weight_decay = 0.0                # >= 0, on matrices
beta1 = 0.9                       # 0 to 0.99999, AdamW
beta2 = 0.999                     # 0 to 0.99999, AdamW
grad_clip = 1.0                   # >= 0, norm of the gradient at most; 0: never clip
# schedule
epochs = 5.0                      # > 0, passes over the pairs
max_iters = 0                     # >= 0, steps; 0: as many as epochs takes
warmup = 0.1                      # 0 to 1, share of the steps with a rising learning rate
min_lr = 0.0                      # >= 0, where the cosine ends
# distributed
parallel = "ddp"                  # ddp | fsdp: every rank has the model, or its share (FSDP2)
# system
row_tokens = 16384                # > 0, tokens of a packed row: the unit of memory
activation_checkpointing = False  # compute activations again in backward: less memory, more time
device = "auto"                   # auto | cuda | cpu | mps
dtype = "auto"                    # auto | bfloat16 | float32: of products; what trains is fp32
compile = True                    # torch.compile; on a CPU (g++, half a minute) only if set
seed = 42                         # >= 0, of the order of pairs, dropout and samples
# -----------------------------------------------------------------------------
one_line_errors()   # a user's mistake ends in one line
settings, overrides = configure(globals(), sys.argv[1:], __file__)

# --- setup: one process, or one of torchrun's
ddp = "RANK" in os.environ
ddp_rank, ddp_local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
ddp_world_size = int(os.environ.get("WORLD_SIZE", 1))
fsdp = ddp and parallel == "fsdp"
master_process = ddp_rank == 0
progress_bar = master_process and sys.stderr.isatty()
usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
if device == "auto":   # the first there is
    device = next(name for name in usable if usable[name])
if not usable[device]:
    raise ValueError(f"device: no {device} on this machine; try --device=auto")
device = torch.device(device, ddp_local_rank if device == "cuda" else None)
if device.type == "cuda":
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")   # TF32 for what stays in fp32
if dtype == "auto":   # a dry run predicts a GPU
    dtype = "bfloat16" if dry_run or llama.fast_bfloat16(device) else "float32"
settings["dtype"] = dtype   # a resume with another is refused
if parallel == "fsdp" and not ddp:
    raise ValueError("parallel: fsdp shards over several processes; start it with torchrun")
if optimizer_state == "8bit" and (fsdp or not find_spec("bitsandbytes")):
    raise ValueError("optimizer_state: 8bit takes pip install bitsandbytes, and parallel=ddp")
if wandb_log and not find_spec("wandb"):
    raise ValueError("wandb_log: it takes pip install wandb")
if objective == "ipo" and beta == 0:
    raise ValueError("beta: IPO divides by it; give a value above 0")
if min_lr > learning_rate:
    raise ValueError(f"min_lr: {min_lr} is above learning_rate, {learning_rate}; lower it")
if export_adapter and not lora_rank:
    raise ValueError("export_adapter: there is none without LoRA; give lora_rank")
out_dir = os.path.expanduser(out_dir)
start_iter, checkpoint = llama.last_checkpoint(out_dir)
if resume and not checkpoint:
    raise ValueError(f"resume: no checkpoint in {out_dir}; start without --resume")
if checkpoint and not (resume or dry_run):
    raise ValueError(f"{checkpoint}: an unfinished run; go on with --resume=True, or delete it")
if ddp:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=2),   # while rank 0 tokenizes
                            device_id=device if device.type == "cuda" else None)
torch.manual_seed(seed)   # all ranks start with the same adapters
autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def log(text):
    if master_process:
        tqdm.write(text)


def first_on_each_node(function, *args):
    """Local rank 0 downloads or tokenizes; the other ranks then find the result in the cache."""
    if ddp and ddp_local_rank != 0:
        dist.barrier()
    result = function(*args)
    if ddp and ddp_local_rank == 0:
        dist.barrier()
    return result


log(f"nanoMMPO: {objective} on {ddp_world_size} x {device.type}, {dtype}; set: " +
    (", ".join(f"{k}={v!r}" for k, v in overrides.items()) or "nothing"))

# --- data: tokenized once, then read from the cache
folder = first_on_each_node(llama.checkpoint_folder, init_from)
if os.path.realpath(folder) == os.path.realpath(out_dir):
    raise ValueError(f"out_dir: {out_dir} is init_from, and would be overwritten; give another")
tokenizer = data.Tokenizer(folder, chat_template)
tokenization = (tokenizer, max_length, max_prompt_length, bad_rows)
train_pairs = first_on_each_node(data.load_pairs, dataset, train_split, *tokenization)
log(f"{dataset}: {train_pairs.report}")
if eval_dataset:
    held_out = first_on_each_node(data.load_pairs, eval_dataset, eval_split, *tokenization)
    log(f"{eval_dataset}: {held_out.report}")
    held_out = held_out.subset(np.random.default_rng(seed).permutation(len(held_out))[:eval_pairs])
else:
    train_pairs, held_out = data.hold_out(train_pairs, eval_pairs, seed)
log(data.describe_example(train_pairs, tokenizer))
settings |= {"dataset_sha256": train_pairs.fingerprint(), "eval_sha256": held_out.fingerprint()}
if resume:
    check_same_run(settings, llama.read_json(os.path.join(out_dir, "train_config.json")))
longest = max(train_pairs.lengths.sum(1).max(), held_out.lengths.sum(1).max())
if longest > row_tokens:
    raise ValueError(f"row_tokens: {row_tokens} is less than the longest pair ({longest} tokens); "
                     "raise it, or lower max_length")
for source, pairs in ((dataset, train_pairs), (eval_dataset, held_out)):
    if pairs.lengths.shape[1] == 2 and objective != "sft":   # a prompt and one response
        raise ValueError(f"{source}: one response a row, and {objective} compares at least two; "
                         "train on it with --objective=sft")
iters_per_epoch = math.ceil(len(train_pairs) / batch_size)
max_iters = max_iters or math.ceil(epochs * iters_per_epoch)
if start_iter > max_iters and resume:
    raise ValueError(f"max_iters: {max_iters}, and {checkpoint} is past that; raise it")
eval_tokens = 2 * row_tokens           # rows without gradients take far less memory
fixed_shapes = device.type == "cuda"   # few shapes, few compilations; a CPU takes any length
compile = compile and (fixed_shapes or "compile" in overrides)
train_shapes = (row_tokens // 8, row_tokens // 4, row_tokens) if fixed_shapes else ()
eval_shapes = (eval_tokens,) if fixed_shapes else ()
log(f"{len(train_pairs):,} pairs, {len(held_out):,} held out; {max_iters} steps of {batch_size} "
    f"pairs, {iters_per_epoch} an epoch")

# --- model: trained weights are fp32; under LoRA the frozen ones have the products' dtype
def prepare(model):
    """Adapters and shards, while the model has shapes but no memory."""
    if lora_rank:
        targets = lora_targets.replace(",", " ").split()
        llama.add_lora(model, lora_rank, lora_alpha, lora_dropout, targets)
    if fsdp:
        llama.shard(model, device.type, torch.bfloat16 if dtype == "bfloat16" else None)


frozen_dtype = torch.bfloat16 if lora_rank and dtype == "bfloat16" else torch.float32
raw_model, hf_config = llama.from_pretrained(folder, "meta" if dry_run else device, frozen_dtype,
                                             prepare)
if tokenizer.n_vocab > raw_model.config.vocab_size:
    raise ValueError(f"{folder}: tokenizer.json has {tokenizer.n_vocab} ids, config.json "
                     f"{raw_model.config.vocab_size}; do they belong together?")
raw_model.activation_checkpointing = activation_checkpointing
if compile:
    raw_model.compile_blocks(dynamic=not fixed_shapes)
trained = [p for p in raw_model.parameters() if p.requires_grad]
if max_length > raw_model.config.max_position_embeddings:
    log(f"note: max_length {max_length} is beyond the model's context of "
        f"{raw_model.config.max_position_embeddings} tokens")
log(f"{init_from}: {sum(p.numel() for p in raw_model.parameters()):,} parameters, "
    f"{sum(p.numel() for p in trained):,} trained")
stop_ids = tokenizer.stop_ids()
if dry_run:
    from scripts.memory import report
    step_tokens = train_pairs.lengths.sum() / len(train_pairs) * min(batch_size, len(train_pairs))
    log(report(raw_model, step_tokens, max_iters, row_tokens, ddp_world_size, llama.DTYPES[dtype],
               optimizer_bytes=8 if optimizer_state == "fp32" else 2))
    sys.exit()


@torch.no_grad()
def score(pairs, indices, title=None):
    """Summed log-probs of rows `indices`, (len(indices), n), on every rank; each does a share."""
    raw_model.eval()
    logps = torch.zeros(len(indices), pairs.lengths.shape[1] - 1, device=device)
    rows = data.pack(pairs.lengths[indices].sum(1), eval_tokens, ddp_world_size, eval_shapes,
                     equal_rows=fsdp)[ddp_rank]
    for members in tqdm(rows, title, disable=not (title and progress_bar)):
        row = data.collate(pairs, indices[members], eval_shapes).to(device)
        with autocast:
            per_token_logps = raw_model(row)
        sums = mmpo.sum_by_response(per_token_logps, row.response, row.n_responses)
        index = data.to_device(torch.from_numpy(members), device)
        logps.index_copy_(0, index, sums.view(-1, logps.size(1)))
    if ddp:
        dist.all_reduce(logps)
    raw_model.train()
    return logps.cpu()


def answer(title):
    """One greedy answer, for a person to see what training does."""
    turns = [{"role": "user", "content": sample_prompt}]
    prompt = tokenizer.encode_prompt(turns) if sample_prompt else held_out.ids(0)[0].tolist()
    with autocast:
        [ids] = raw_model.generate([prompt], sample_tokens, temperature=0, stop_ids=stop_ids)
    log(f"{title}:\n| " + tokenizer.decode(prompt + ids).replace("\n", "\n| "))


# --- the run's records; nothing of an earlier run was touched so far
first_eval = None
if master_process:
    os.makedirs(out_dir, exist_ok=True)
    llama.write_json(os.path.join(out_dir, "train_config.json"), settings)
    metrics_path, past = os.path.join(out_dir, "metrics.jsonl"), []
    if resume:   # keep what was before the checkpoint; the steps after it are made again
        past = [line for line in open(metrics_path)
                if line.endswith("\n") and json.loads(line)["iter"] < start_iter]
        first_eval = json.loads(past[0]) if past else None
    llama.write_text(metrics_path, "".join(past))
    metrics_file = open(metrics_path, "a", buffering=1)
    if wandb_log:
        import wandb
        wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=settings)


def record(metrics):
    if master_process:
        metrics_file.write(json.dumps(metrics, default=float) + "\n")
        if wandb_log:
            wandb.log(metrics, step=metrics["iter"])


# --- reference log-probs, and so all rewards: constants, computed once, before the policy moves.
# From here on there is no reference model, only a table: R = r + beta log pi_ref.
def reference_logps(pairs, indices):
    """score(pairs, indices) of the untrained model, from the cache if every rank finds it there."""
    path = data.cache_path("reference", [
        llama.weights_fingerprint(folder), dtype, str(frozen_dtype), fsdp, device.type, compile,
        pairs.fingerprint(), indices.tolist()])
    found = torch.tensor(float(os.path.exists(path)), device=device)
    if ddp:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    if found:
        return torch.from_numpy(np.load(path)["logps"])
    with llama.adapters_off(raw_model):
        logps = score(pairs, indices, "reference log-probs")
    if ddp_local_rank == 0:
        data.save_cache(path, logps=logps.numpy())
    return logps


def reward_of(pairs, lengths, ref_logps):
    """R(y, z) of every response before normalization, (N, n)."""
    r = torch.from_numpy(pairs.rewards) if len(pairs.rewards) else \
        torch.linspace(reward_chosen, reward_rejected, ref_logps.size(1))
    return mmpo.rewards(r, ref_logps / lengths if length_norm else ref_logps, beta)


def normalized(R, group):
    return mmpo.normalize(R, reward_norm_group or group) if reward_norm else R


uses_reference = objective in mmpo.USES_REFERENCE
lengths = torch.from_numpy(train_pairs.lengths[:, 1:])            # (N, n) tokens of each response
# the pairs that max_iters steps reach, as one batch of that size: a part of the first epoch, or all
visited = np.sort(data.batch_indices(len(train_pairs), max_iters * batch_size, seed, 0))
ref_logps = torch.zeros(lengths.shape)
if uses_reference:
    t0 = time.time()
    ref_logps[visited] = reference_logps(train_pairs, visited)
    log(f"reference log-probs of {len(visited):,} pairs: {time.time() - t0:.0f} s")
R = reward_of(train_pairs, lengths, ref_logps)

# held-out: the same constants, and samples of the reference that the KL estimate is taken over
everything = np.arange(len(held_out))
eval_lengths = torch.from_numpy(held_out.lengths[:, 1:])
eval_ref_logps = reference_logps(held_out, everything)
# rounding moves this by less than 1%, another model by more
if first_eval and abs(eval_ref_logps[:, 0].mean() / first_eval["eval/logps/chosen"] - 1) > 0.01:
    raise ValueError(f"resume: {init_from} isn't the model that the run began with; bring it back, "
                     "or start anew in another out_dir")
eval_R = normalized(reward_of(held_out, eval_lengths, eval_ref_logps), batch_size)
kl_prompts = [held_out.ids(i)[0].tolist() for i in everything[:kl_samples]]
if kl_prompts:
    answers = []
    for i in range(0, len(kl_prompts), 8):        # their keys and values take memory
        with autocast:
            answers += raw_model.generate(kl_prompts[i:i + 8], kl_tokens, stop_ids=stop_ids,
                                          seed=seed + i)
    if ddp:
        dist.broadcast_object_list(answers)       # the same samples on every rank
    kl_pairs = data.Pairs.from_rows([[p, a] for p, a in zip(kl_prompts, answers)])
    kl_ref_logps = score(kl_pairs, np.arange(len(kl_pairs)))

metric_knobs = dict(beta=beta, length_norm=length_norm)
loss_knobs = dict(metric_knobs, pref_weight=pref_weight, gamma_beta_ratio=gamma_beta_ratio,
                  orpo_lambda=orpo_lambda)


def evaluate(iter_num):
    """Loss and metrics over the held-out pairs, and KL(reference || policy) in nats a token,
    estimated on the reference's own samples."""
    logps = score(held_out, everything) if iter_num else eval_ref_logps   # at first they are equal
    ref = eval_ref_logps if uses_reference else None                      # as in training
    rows = logps, eval_lengths, ref, eval_R
    metrics = {"loss": mmpo.preference_loss(objective, *rows, **loss_knobs).mean().item(),
               **mmpo.preference_metrics(*rows, **metric_knobs)}
    if kl_prompts:
        kl = kl_ref_logps - score(kl_pairs, np.arange(len(kl_pairs)))
        metrics["kl"] = (kl.sum() / kl_pairs.lengths[:, 1:].sum()).item()
    return {f"eval/{name}": value for name, value in metrics.items()}


# --- optimizer
matrices = [p for p in trained if p.dim() >= 2]
vectors = [p for p in trained if p.dim() < 2]
groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
if optimizer_state == "fp32":
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)
else:
    from bitsandbytes.optim import AdamW8bit
    optimizer = AdamW8bit(groups, lr=learning_rate, betas=(beta1, beta2))
model = DDP(raw_model, gradient_as_bucket_view=True) if ddp and not fsdp else raw_model


def get_lr(iter_num):
    """Linear warm-up, then a cosine down to min_lr."""
    warmup_iters = warmup * max_iters
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    progress = (iter_num - warmup_iters) / max(1, max_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def check_finite(iter_num):
    """An error if a step was skipped. Reading `skipped` waits for the GPU, as a log line does."""
    if skipped:
        raise ValueError(f"step {iter_num}, or since the last log line: the gradient is not "
                         "finite; weights not updated; lower learning_rate, or try --dtype=float32")


def step_line(iter_num, m):
    names = {"accuracy": "accuracy/mean", "q_w": "weights/chosen", "norm": "grad_norm",
             "mfu": "mfu"}
    some = "".join(f" | {short} {m[name]:.3f}" for short, name in names.items() if name in m)
    return (f"step {iter_num:5d} | loss {m['loss']:.4f}{some} | lr {m['lr']:.1e} | "
            f"{m['tokens_per_second']:,.0f} tok/s | {m['seconds_left'] / 60:.1f} min left")


# --- training loop
answer("sample before")
if resume:
    llama.load_checkpoint(raw_model, optimizer, checkpoint)
    log(f"going on from {checkpoint}")
training_time = 0.0
since_log = Counter()                         # tokens, FLOPs, seconds; this rank's slots and tokens
skipped = torch.zeros((), device=device)      # steps without an update
peak_flops = llama.peak_flops(device) * ddp_world_size
for iter_num in tqdm(range(start_iter, max_iters + 1), "steps", disable=not progress_bar):

    if iter_num % eval_interval == 0 or iter_num == max_iters:
        check_finite(iter_num)
        metrics = evaluate(iter_num)
        first_eval = first_eval or metrics
        record({"iter": iter_num} | metrics)
        log(f"eval {iter_num:5d} | " +
            " | ".join(f"{k.removeprefix('eval/')} {v:.4f}" for k, v in metrics.items()))
    if iter_num == max_iters:
        break
    t0 = time.time()
    torch.manual_seed(seed + ddp_rank + iter_num * ddp_world_size)   # dropout, another on each rank

    # the pairs of this step, their rewards, and the packed rows that fall to this rank
    batch = data.batch_indices(len(train_pairs), batch_size, seed, iter_num)
    batch_lengths, batch_ref_logps = lengths[batch], ref_logps[batch]
    batch_R = normalized(R[batch], len(batch))
    on_device = [data.to_device(x, device) for x in (batch_lengths, batch_ref_logps, batch_R)]
    rows = data.pack(train_pairs.lengths[batch].sum(1), row_tokens, ddp_world_size, train_shapes,
                     equal_rows=fsdp)[ddp_rank]
    batch_logps = torch.zeros(batch_lengths.shape, device=device)
    total_loss = torch.zeros((), device=device)

    for micro_step, members in enumerate(rows):
        row = data.collate(train_pairs, batch[members], train_shapes).to(device)
        index = data.to_device(torch.from_numpy(members), device)
        row_lengths, row_ref_logps, row_R = (x[index] for x in on_device)
        since_log["row"] += row.tokens.numel()
        since_log["filled"] += train_pairs.lengths[batch[members]].sum()
        if ddp and not fsdp:   # gradients meet in the last micro-step only
            model.require_backward_grad_sync = micro_step == len(rows) - 1
        with autocast:
            scored = model(row, entropy=entropy_coef > 0)
        per_token_logps = scored[0] if entropy_coef > 0 else scored
        logps = mmpo.sum_by_response(per_token_logps, row.response, row.n_responses)
        logps = logps.view(-1, lengths.size(1))
        losses = mmpo.preference_loss(objective, logps, row_lengths, row_ref_logps, row_R,
                                      **loss_knobs)
        total_loss += losses.detach().sum() / len(batch)   # without the entropy term, as evaluated
        if entropy_coef > 0:
            losses = losses - entropy_coef * mmpo.entropy_bonus(
                *scored, row.response, row_lengths, length_norm)
        loss = losses.sum() / len(batch)          # the step's mean, whichever rank computes a pair
        (loss * ddp_world_size).backward()        # DDP and FSDP average over ranks
        batch_logps.index_copy_(0, index, logps.detach())

    lr = get_lr(iter_num)
    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm = llama.whole(torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf))
    # a gradient that is not finite changes no weight: fused AdamW reads found_inf (as GradScaler
    # sets it) and skips the step, so nobody waits here
    optimizer.found_inf = 1 - grad_norm.isfinite().float()
    skipped += optimizer.found_inf
    if optimizer_state == "8bit":   # which does not skip
        check_finite(iter_num)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    since_log["tokens"] += train_pairs.lengths[batch].sum()
    since_log["flops"] += llama.step_flops(raw_model, train_pairs.lengths[batch])
    if iter_num % log_interval == 0:
        check_finite(iter_num)
        if ddp:
            dist.all_reduce(batch_logps)
            dist.all_reduce(total_loss)
        metrics = {"loss": total_loss.item(), **mmpo.preference_metrics(
            batch_logps.cpu(), batch_lengths, batch_ref_logps if uses_reference else None,
            batch_R if objective == "mmpo" else None, **metric_knobs)}
    seconds = time.time() - t0   # of a step with a log line: after .item(), which waits for the GPU
    since_log["seconds"] += seconds
    training_time += seconds
    if iter_num % log_interval == 0:
        metrics |= {"grad_norm": grad_norm.item(), "lr": lr,
                    "tokens_per_second": since_log["tokens"] / since_log["seconds"],
                    "tflops": since_log["flops"] / since_log["seconds"] / 1e12,
                    "fill": since_log["filled"] / since_log["row"],
                    "seconds_left": training_time / (iter_num + 1 - start_iter)
                    * (max_iters - iter_num - 1)}
        if peak_flops:
            metrics["mfu"] = metrics["tflops"] * 1e12 / peak_flops
        if device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        since_log.clear()
        record({"iter": iter_num} | metrics)
        log(step_line(iter_num, metrics))
    if save_interval and (iter_num + 1) % save_interval == 0 and iter_num + 1 < max_iters:
        llama.save_checkpoint(raw_model, optimizer, out_dir, iter_num + 1)

# --- the aligned model, in Hugging Face layout
answer("sample after")
extras = dict(tokenizer_folder=folder, stop_ids=stop_ids,
              chat_template=tokenizer.template_text if chat_template else None)
if export_adapter:
    llama.save_adapter(raw_model, out_dir, init_from, **extras)
else:
    llama.save_pretrained(raw_model, out_dir, hf_config, dtype=llama.DTYPES[export_dtype], **extras)
if master_process:
    llama.remove_checkpoints(out_dir)   # the run is complete
    if "eval/accuracy/mean" in metrics:
        log(f"held-out preference accuracy: {first_eval['eval/accuracy/mean']:.3f} before, "
            f"{metrics['eval/accuracy/mean']:.3f} after (mean log-probs)")
    log(f"aligned model and metrics.jsonl: {out_dir}")
if ddp:
    dist.barrier()
    del model   # a DDP wrapper that outlives the process group can hang
    dist.destroy_process_group()
    time.sleep(0.5)   # gloo's threads let go of FSDP's last tensors; after Python's end that aborts
