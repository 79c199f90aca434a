"""
What keeps a run from being lost, or mixed up with another: its lock, signals, and checkpoints.

$ python -m scripts.checkpoints out/mine      # what is in a run's folder, and whether it is whole

train.py imports this; only `main` is a program.
"""
import argparse
import atexit
import contextlib
import glob
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))   # for `python scripts/checkpoints.py`
from configurator import (
    PATHS, UserError, first_line, is_finished, one_line_errors, publish, rank_and_size,
    read_metrics, read_run_settings, reading, require, settle, sha256, sync, write_text,
    writing)
from scripts.report import DEFAULTS

# -----------------------------------------------------------------------------
# one run in one folder

lock = None   # the open file by which this process holds its run's folder


def hold(folder):
    """Keep other runs out of a folder until this process ends, and delete what killed ones left.

    The lock is the kernel's, so that of a killed run is gone with it. Its file says who holds it.
    Raises UserError with that if another run does.
    """
    global lock
    made = not os.path.exists(folder)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ".lock")
    foreign = f"{path}: not the file that a run makes there; move it"
    require(not os.path.lexists(path) or os.path.isfile(path) and not os.path.islink(path), foreign)
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            import fcntl   # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if same_file(file, path):   # else its last holder has just deleted it
                break
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder}: another run is in this folder ({file.read()}); wait for "
                            "its end, or give another out_dir") from None
        except (OSError, ImportError) as e:
            print(f"note: {folder}: no locks on this file system ({first_line(e)}); take care that "
                  "no second run writes there")
            break
    file.seek(0)
    require(re.match("host |$", file.read(99)), foreign)
    with writing(path):
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}, started {time.ctime()}")
        file.flush()
    lock = file
    atexit.register(let_go, folder, made)
    remove_leftovers(folder)


def check_held():
    """UserError if this run's folder was deleted, and another run holds one of the same name."""
    require(not lock or same_file(lock, lock.name) or not os.path.exists(lock.name),
            f"{lock and lock.name}: the folder was deleted, and another run is there now; this one "
            "ends, and leaves it alone")


def same_file(file, path):
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def let_go(folder, made):
    """The reverse of hold. A folder that it made (`made`) and that is empty goes too. If a signal
    ended the run, say what there is of it."""
    leave_time_to_save()
    if asked:
        _, found = last_checkpoint(folder)
        if is_finished(folder):
            state = f"the run in {folder} is finished"
        elif found:
            state = f"{found} is saved; the same command with --resume=True goes on from there"
        else:
            state = "no checkpoint was saved; the same command starts again"
        print(f"ended by {signal.Signals(asked[0]).name}: {state}", file=sys.stderr)
    with contextlib.suppress(OSError):
        if same_file(lock, lock.name):
            os.remove(lock.name)
        if made:
            os.rmdir(folder)
    lock.close()


def remove_leftovers(folder):
    """Delete the temporary files of killed runs. Their names are this program's alone."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and re.fullmatch(
                r"(train_config|exported_files|metrics|README)\.(jsonl?|md)\.tmp\d+", name):
            os.remove(path)
        elif re.fullmatch(r"checkpoint-\d{7}\.tmp", name) and not os.path.isfile(path):
            remove_checkpoint(path)
    if read_run_settings(folder):   # before an export there is a run
        shutil.rmtree(os.path.join(folder, "export.tmp"), ignore_errors=True)


# -----------------------------------------------------------------------------
# resuming a run: its checkpoints, and what may change when it goes on
#
# A checkpoint is a folder, checkpoint-0000400: for each rank a safetensors file with its rows of
# what is trained and of the optimizer's state, and that file's sha256. The file's header has the
# step, the number of ranks and the run's settings. Nothing in it is ever executed, and any number
# of ranks can read it.


def trained_parameters(model):
    """{name: parameter}. FSDP leaves some gathered after a forward, until state_dict is called."""
    return {n: p for n, p in model.state_dict(keep_vars=True).items() if p.requires_grad}


def training_tensors(model, optimizer):
    """{name: tensor} of all that a checkpoint keeps."""
    found = {}
    for name, p in trained_parameters(model).items():
        found[f"model/{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            found[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
    return found


def first_row(tensor):
    """The row of the whole tensor with which this rank's part begins, 0 where it isn't sharded.
    torch cuts it into parts of equal size, of which the last ones may be smaller or empty."""
    rank, ranks = rank_and_size()
    return min(rank * -(-len(tensor) // ranks), len(tensor)) if isinstance(tensor, DTensor) else 0


saving = None   # the save under way
LATE = 90       # seconds in which NFS surely shows a file that another machine wrote


def save_checkpoint(model, optimizer, folder, iter_num, settings, log, must=True):
    """Write folder/checkpoint-<iter_num>. The run waits while its tensors are copied to the host's
    memory. A thread of each rank writes its part; when all parts are there, the first rank's gives
    the folder its name, deletes all checkpoints but the last few, and logs it.

    Raises UserError where the save before this one could not be written, unless `must` is False.
    """
    global saving
    finish_saving(must)
    path, (rank, ranks) = os.path.join(folder, f"checkpoint-{iter_num:07d}"), rank_and_size()
    mine = {name: tensor for name, tensor in training_tensors(model, optimizer).items()
            if rank == 0 or isinstance(tensor, DTensor)}   # others are the same on every rank
    about = {"step": iter_num, "ranks": ranks, "settings": settings,
             "first_rows": {name: first_row(tensor) for name, tensor in mine.items()}}
    for name, tensor in mine.items():
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        mine[name] = tensor.to("cpu", copy=True).contiguous()
    saving = SimpleNamespace(path=path, error=None, written=Event(), all_written=Event())
    saving.thread = Thread(target=write_part, daemon=True,
                           args=(saving, mine, about, rank, settings["keep_checkpoints"], log))
    saving.thread.start()


def write_part(save, mine, about, rank, keep, log):
    """What the thread of a save does. An error is kept for finish_saving."""
    t0, temporary = time.monotonic(), save.path + ".tmp"
    file = os.path.join(temporary, f"{rank}.safetensors")
    try:
        os.makedirs(temporary, exist_ok=True)
        save_file(mine, file, {"checkpoint": json.dumps(about)})
        settle(file)   # before the folder gets its name, and older ones go
        write_text(os.path.join(temporary, f"{rank}.sha256"), sha256(file))
        save.written.set()
        if rank > 0:
            return
        sums, late = {f"{i}.sha256" for i in range(about["ranks"])}, 0
        while not sums <= {*os.listdir(temporary)}:
            require(late < LATE, f"{save.path}: parts of other ranks are not here; if those don't "
                    "say why, all machines must share out_dir")
            if save.all_written.wait(0.05):   # the others are done, so only the disk can be late
                time.sleep(1)
                late += 1
        size = sum(map(os.path.getsize, parts_of(temporary)))
        metrics = os.path.join(os.path.dirname(save.path), "metrics.jsonl")
        if os.path.exists(metrics):
            sync(metrics)   # the steps before this one, which no run will make again
        publish(temporary, save.path)
        remove_checkpoints(os.path.dirname(save.path), keep)
        log(f"{save.path}: {size / 1e6:,.1f} MB in {time.monotonic() - t0:.1f} s")
    except (OSError, SafetensorError) as e:
        save.error = UserError(f"{save.path}: not written ({first_line(e)}); if the disk is full, "
                               "free space; what was saved before is intact")
    except Exception as e:
        save.error = e
    finally:
        save.written.set()


def finish_saving(must=True):
    """Wait for the save under way, on all ranks. Raises UserError where it could not be written. If
    `must` is False, a warning says so instead, and what was written of it is deleted. Raises
    UserError too where the folder is another run's now (`check_held`)."""
    global saving
    check_held()
    if saving is None:
        return
    (rank, ranks), save = rank_and_size(), saving
    save.written.wait()
    if ranks > 1:
        dist.barrier()
    save.all_written.set()   # no other part will come
    save.thread.join()
    if ranks > 1:            # else a rank that ends now could end the first one while it writes
        dist.barrier()
    saving = None
    if save.error and (must or not isinstance(save.error, UserError)):
        raise save.error
    if save.error:
        print(f"warning: {save.error}")   # on each rank, whose reasons may differ
        if rank == 0:
            with contextlib.suppress(OSError):
                remove_checkpoint(save.path + ".tmp")


def leave_time_to_save():
    """Called when the program ends, by an error too, so that the save under way may still become
    whole. The parts of other ranks get less time, since those may be dead."""
    if saving:
        saving.written.wait(60)
        saving.thread.join(5)


atexit.register(leave_time_to_save)


def parts_of(path):
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))


def about_part(part):
    """What an open part of a checkpoint says of itself."""
    return json.loads(part.metadata()["checkpoint"])


def check_checkpoint(path):
    """-> the settings of the run that wrote it. Raises UserError unless every part is there, and
    every byte as it was written. Each rank checks the bytes of its share of the parts."""
    require(os.path.isdir(path), f"{path}: no folder; if it is a link, is its disk there?")
    files, (rank, ranks), settings = parts_of(path), rank_and_size(), None
    expected = {f"{i}.safetensors" for i in range(len(files) or 1)}
    require({os.path.basename(file) for file in files} == expected,
            f"{path}: a rank's part is missing; delete the checkpoint")
    for file in files:
        name = os.path.basename(file)
        with reading(file, "a part of a checkpoint"):
            if file in files[rank::ranks]:
                digest = file.removesuffix("safetensors") + "sha256"
                require(os.path.exists(digest), f"{digest}: missing, so nobody knows whether "
                        f"{name} is as it was written; bring it back, or delete the checkpoint")
                require(Path(digest).read_text(encoding="utf-8") == sha256(file),
                        f"{path}: {name} failed its sha256; delete the checkpoint")
            with safe_open(file, framework="pt") as part:
                about = about_part(part)
            settings = settings or dict(about["settings"])
            require(about["ranks"] == len(files),
                    f"{path}: a rank's part is missing; delete the checkpoint")
            require(all(settings.get(key) == value for key, value in about["settings"].items()
                        if key not in PATHS),   # machines may have the same files elsewhere
                    f"{path}: {name} is of another run; delete the checkpoint")
            require(about["step"] == int(path[-7:]),
                    f"{path}: made at another step; was it renamed?")
    return settings


@torch.no_grad()
def load_checkpoint(model, optimizer, path):
    """The reverse of save_checkpoint, on any number of ranks. The optimizer must be new."""
    found, params = {}, trained_parameters(model)
    with contextlib.ExitStack() as stack, reading(path, "a checkpoint of this model"):
        for file in parts_of(path):
            part = stack.enter_context(safe_open(file, framework="pt"))
            for name, row in about_part(part)["first_rows"].items():
                found.setdefault(name, []).append((row, part.get_slice(name)))
        names = {name.removeprefix("model/") for name in found if name.startswith("model/")}
        require(names == params.keys(), f"{path}: holds the training of other weights")
        for label, pieces in found.items():   # model/NAME or optimizer/NAME/KEY
            kind, name, *key = label.split("/")
            p, value = params[name], read_state(params[name], pieces)
            if kind == "optimizer":
                optimizer.state[p][key[0]] = value
            else:
                require(value.shape == p.shape, f"{path}: {name} has another shape there")
                p.copy_(value)
        for name, p in params.items():   # what AdamW takes for granted
            state = optimizer.state[p] if isinstance(optimizer, torch.optim.AdamW) else None
            require(not state or state["step"] >= 0 and all(
                (x.shape, x.dtype) == (p.shape, p.dtype)
                for x in (state["exp_avg"], state["exp_avg_sq"])),
                f"{path}: holds not the optimizer's state of {name}; delete the checkpoint")


def read_state(p, pieces):
    """The weights of parameter p, or a tensor of its optimizer's state. Where p is sharded, so are
    its weights and the states of its shape, of which this rank's rows are read."""
    shape = pieces[0][1].get_shape()
    if not isinstance(p, DTensor) or not shape or shape[1:] != [*p.shape[1:]]:
        value = read_rows(pieces, 0, None)
        return value.item() if value.dtype == torch.int64 else value.to(p.device)
    found, start = torch.zeros_like(p), first_row(p)
    local = found.to_local()
    local.copy_(read_rows(pieces, start, start + len(local)).view_as(local))   # none is repeated
    return found


def read_rows(pieces, start, stop):
    """Rows start to stop (None: the end) of a tensor, from its parts, [(first row, slice), ..]."""
    if not pieces[0][1].get_shape():
        return pieces[0][1][...]
    return torch.cat([piece[max(start - row, 0):None if stop is None else max(stop - row, 0)]
                      for row, piece in sorted(pieces, key=lambda piece: piece[0])])


def checkpoints(folder):
    found = glob.glob(os.path.join(glob.escape(folder), "checkpoint-" + "[0-9]" * 7))
    return sorted(path for path in found if not os.path.isfile(path))


def last_checkpoint(folder):
    """-> (its step, its path), or (0, None)."""
    found = checkpoints(folder)
    return (int(found[-1][-7:]), found[-1]) if found else (0, None)


def remove_checkpoints(folder, keep=0):
    """Delete all but the last `keep` ones."""
    for path in checkpoints(folder)[:-keep or None]:
        remove_checkpoint(path)


def remove_checkpoint(path):
    """Delete a checkpoint. It is renamed first, so that a kill leaves no half of it by its name.
    Only files that save_checkpoint writes go. `path` may be a link to where it was moved."""
    temporary = path.removesuffix(".tmp") + ".tmp"
    if path != temporary:
        os.rename(path, temporary)
    with contextlib.suppress(FileNotFoundError):   # a link may lead to nothing
        for name in os.listdir(temporary):
            # safetensors writes .tmp and six letters, and renames that
            if re.fullmatch(r"\d+\.(safetensors|sha256)(\.tmp\d+)?|\.tmp\w{6}", name):
                os.remove(os.path.join(temporary, name))
    with contextlib.suppress(OSError):             # a folder with files that aren't ours stays
        os.rmdir(os.path.realpath(temporary))
    if os.path.islink(temporary):
        os.remove(temporary)


def past_metrics(path, start_iter):
    """The records that metrics.jsonl keeps: none for a new run (start_iter 0); for one that goes
    on those of the steps before start_iter, since it makes the later ones again."""
    past = read_metrics(path) if start_iter and os.path.exists(path) else []
    require(not start_iter or any(record["iter"] == 0 and "eval/loss" in record for record in past),
            f"{path}: without the first evaluation, which the end of a run is compared with; bring "
            "the file back, or start anew in another out_dir")
    return [record for record in past if record["iter"] < start_iter]


def open_metrics(path, past):
    """metrics.jsonl with these records, opened to add lines."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in past))
    return open(path, "a", buffering=1, encoding="utf-8")


# What may change when a run resumes: where and how it is computed, how far it goes, what it writes.
RESUME_MAY_CHANGE = """
    out_dir resume overwrite dry_run debug max_iters epochs export_dtype export_adapter wandb_log
    wandb_project sample_prompt sample_tokens log_interval eval_interval save_interval
    keep_checkpoints skip_nonfinite device parallel compile pack_tokens activation_checkpointing
    """.split()


def check_same_run(settings, before, log):
    """UserError unless a run resumes with the settings it had `before`, but for RESUME_MAY_CHANGE
    and for PATHS, whose content counts: it is in the .._sha256. Changed code only gets a note."""
    for key, value in settings.items():
        had = before.get(key, DEFAULTS.get(key, value))   # it may be older than a setting
        if had == value or key in (*PATHS, *RESUME_MAY_CHANGE, "code_sha256"):
            continue
        wrong = f"the run has {key}={had!r}, not {value!r}; give that"
        if key.endswith("_sha256"):
            wrong = (f"{key.removesuffix('_sha256')} has changed" + ", or the chat_template" *
                     ("dataset" in key) + "; bring the old one back")
        raise UserError(f"resume: {wrong}, or start anew in another out_dir")
    if before.get("code_sha256") != settings.get("code_sha256"):
        log("note: train.py, model.py, mmpo.py or data.py have changed since the run began")


# -----------------------------------------------------------------------------
# signals

# What asks a run to end: a scheduler (SLURM's --signal=USR1@60), Ctrl-C, a closed terminal.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
           if hasattr(signal, name)]
PARENT = os.getppid()
asked = []         # the first of these signals that came, and when
may_leave = True   # whether such a signal ends the program at once, or waits for interrupted()


def end_on_signals():
    """From here on each of SIGNALS ends the program in an orderly way, but for what nohup and the
    like ignore. A second one ends it at once."""
    def come(number, _):
        # torchrun passes on a Ctrl-C that the terminal has sent to its ranks already
        if asked and (not dist.is_initialized() or time.monotonic() > asked[1] + 1):
            os._exit(128 + number)
        if not asked:
            asked[:] = number, time.monotonic()
            if may_leave:
                sys.exit(128 + number)
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):   # nobody may read it
                    os.write(2, b"\nending after what is under way; a second signal ends at once\n")
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, come)


def interrupted(device):
    """The signal that asked this run to end, or 0. The same on all ranks, so that they end at the
    same step. A rank whose torchrun is gone asks all of them to end."""
    global may_leave
    may_leave = False
    number = asked[0] if asked else 0
    if dist.is_initialized():
        alone = dist.is_torchelastic_launched() and os.getppid() != PARENT
        number = number or (signal.SIGTERM if alone else 0)
        number = torch.tensor(float(number), device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        number = int(number)
        if number:
            asked[:] = number, time.monotonic()
            for other in SIGNALS:   # torchrun sends one to all when the first of them has ended
                signal.signal(other, signal.SIG_IGN)
    return number


def until_interrupted(device, function, *args):
    """function(*args), which a signal cuts short. Where there are several ranks it is finished,
    since one that leaves would keep the others waiting."""
    global may_leave
    if interrupted(device):
        return
    try:
        may_leave = not dist.is_initialized()
        function(*args)
        may_leave = False
    except SystemExit:   # by the first signal; from now on only a second one does anything
        if not asked:
            raise


# -----------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", help="a run's out_dir")
    folder = os.path.expanduser(parser.parse_args().folder)
    records = read_metrics(os.path.join(folder, "metrics.jsonl"))
    print(f"{folder}: {'finished' if is_finished(folder) else 'not finished'}, at step "
          f"{records[-1]['iter'] if records else 0}")
    for path in checkpoints(folder):
        try:
            size = sum(os.path.getsize(part) for part in parts_of(path))
            check_checkpoint(path)
            state = "whole"
        except (UserError, FileNotFoundError) as e:
            if not os.path.lexists(path):   # a run that is going on has just replaced it
                continue
            state = f"damaged: {e}"
        print(f"{path}: {size / 1e6:,.1f} MB, {state}")


if __name__ == "__main__":
    one_line_errors()
    main()
