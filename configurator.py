"""
What stands between a user and the code: errors in one line, files, settings, processes.

Settings work the nanoGPT way: flat names with defaults at the top of a script, Python files that
override some of them, and `--key=value`, which overrides both.

    python train.py config/demo.py --beta=0.1 --max_iters=1e3 --compile=false --resume

A setting is a top-level `name = value` above the script's call of `configure`, where the value is a
number, text, True or False. Its trailing comment is its help. A comment that begins with words
separated by bars lists the values that are allowed:

    bad_rows = "error"     # error | drop: what a malformed row does

Three things differ from nanoGPT. An unknown name is an error wherever it is set, a value has the
default's type or is an error, and a config file runs in a namespace of its own. It may import
modules, define functions, and use names that begin with an underscore: those are not settings.
"""
import ast
import contextlib
import difflib
import errno
import hashlib
import io
import json
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
import tokenize
import traceback
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType

import numpy as np
import torch.distributed as dist

HERE = os.path.dirname(os.path.abspath(__file__))

# -----------------------------------------------------------------------------
# errors


BEHIND = {}   # {a link that this program made: the path that a message names instead}


class UserError(Exception):
    """A mistake that the user can mend: `where: what (got); how to mend it`, in one line."""

    def __str__(self):
        text = super().__str__()
        for link, behind in BEHIND.items():
            text = text.replace(link, behind)
        return text


def require(condition, message):
    if not condition:
        raise UserError(message)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)   # errors that may come without a file name
LONGEST = 300   # characters of an error


class Unbreakable(io.FileIO):
    """A standard stream. Where nobody reads it any more, or its disk is full, the run goes on."""

    def write(self, content):
        with contextlib.suppress(OSError):
            return super().write(content)
        return len(content)


def open_streams():
    """Make stdout and stderr safe to write to: closed ones lead nowhere, and characters that they
    can't encode are escaped."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:   # it gets the lowest free number
        pass
    os.close(opened)
    for number, name in ((1, "stdout"), (2, "stderr")):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        setattr(sys, name, io.TextIOWrapper(
            io.BufferedWriter(Unbreakable(number, "w", closefd=False)), encoding,
            "backslashreplace", line_buffering=True))


def printable(text):
    """Text of data, with those characters escaped that would move a terminal's cursor or more."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]",
                  lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line_errors():
    """From here on a UserError, the system's error about a file, Ctrl-C, and too little memory end
    the program in one line. Everything else is a bug and keeps its traceback. Output that can't be
    written ends nothing."""
    open_streams()

    def hook(kind, error, trace):
        if issubclass(kind, UserError):
            message = f"error: {error}"
        elif issubclass(kind, OSError) and (error.filename or error.errno in DISK_FULL):
            where = f"{error.filename}: " if error.filename else ""
            message = f"error: {where}{error.strerror}"
        elif issubclass(kind, KeyboardInterrupt):
            message = "interrupted"
        elif issubclass(kind, RuntimeError) and dist.is_initialized() and re.search(
                "by peer|remote process|Broken pipe", str(error)):
            message = f"error: another rank ended ({first_line(error):.99}); its error says why"
        elif issubclass(kind, MemoryError) or re.search("out of|allocate", str(error)) and \
                "memory" in str(error):   # torch's, of a GPU and of a CPU
            message = (f"error: not enough memory ({first_line(error)}); see Troubleshooting in "
                       "README, and for train.py --dry_run")
        else:
            return sys.__excepthook__(kind, error, trace)
        message = printable(message).replace("\n", "\\n")
        if len(message) > LONGEST:   # the end is how to mend it
            message = f"{message[:LONGEST - 104]} .. {message[-100:]}"
        print(message, file=sys.stderr, flush=True)
        # objects that are torn down badly after this must not print below that line
        sys.unraisablehook = lambda _: None

    sys.excepthook = hook


# -----------------------------------------------------------------------------
# files


@contextlib.contextmanager
def reading(path, what):
    """Whatever goes wrong while a file is taken apart becomes one line that names the file.

    A file that isn't what it claims to be fails in endless ways: a missing key, a list where an
    object should be, nesting that is too deep, a panic of a library written in Rust (which is a
    BaseException). Checks one by one never end, so this is the boundary. In train.py --debug shows
    the traceback.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:
        if isinstance(e, OSError) and e.errno:   # the system's own words: no such file, disk full
            raise
        short = isinstance(e, MemoryError) or "memory" in str(e)   # torch's is a RuntimeError
        raise UserError(f"{path}: not {what} ({type(e).__name__}: {first_line(e)}); is it damaged"
                        + ", or larger than the memory" * short + "?") from e


@contextlib.contextmanager
def limited(seconds, what):
    """UserError about `what` unless what is inside is done in so many seconds of CPU time, and
    MemoryError where it takes over a gigabyte more (on Linux). It can't stop one long call of a
    library, works in the main thread only, not on Windows, and does nothing inside another."""
    def stop(*_):
        raise UserError(f"{what} takes over {seconds} s of CPU time; does it end?")

    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "SIGPROF") or signal.getitimer(signal.ITIMER_PROF)[0]:
        yield
        return
    before = signal.signal(signal.SIGPROF, stop)
    limit = None
    with contextlib.suppress(ImportError, OSError):
        import resource
        with open("/proc/self/statm", encoding="utf-8") as f:
            most = int(f.read().split()[0]) * resource.getpagesize() + 2 ** 30
        limit = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if limit and (limit[0] < 0 or limit[0] > most):   # a negative one means no limit
            resource.setrlimit(resource.RLIMIT_AS, (most, limit[1]))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def writing(path):
    """The system's error about a write names no file. This gives it the path."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or path
        raise


def first_line(error):
    """The first line of an error's message, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def parse_json(text):
    """json.loads, but a key that appears twice in one object is an error. Raises ValueError."""
    def no_duplicates(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice in one object")
        return dict(pairs)
    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_file(path):
    """UserError if reading this file would never end, as of a pipe that nobody writes to, or if it
    is what git leaves in place of a large file."""
    require(stat.S_ISREG(os.stat(path).st_mode), f"{path}: not a file, but a pipe, device or "
            "folder; give a file")
    with open(path, "rb") as f:
        require(f.read(23) != b"version https://git-lfs",
                f"{path}: a Git LFS pointer, not the file itself; run git lfs pull")


def read_text(path, what, encoding="utf-8"):
    check_file(path)
    with open(path, encoding=encoding) as f, reading(path, what):
        return f.read()


def read_json(path):
    """The object in a JSON file. Raises UserError unless the file holds one JSON object."""
    with reading(path, "valid JSON"):
        value = parse_json(read_text(path, "valid JSON"))
    require(isinstance(value, dict), f"{path}: not a JSON object; is it damaged?")
    return value


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path, text):
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with writing(path):
            # half a character, as in a file's name that is not UTF-8, is escaped: \ud800
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as f:
                f.write(text)
            publish(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


UMASK = os.umask(0)   # it can only be read by setting it
os.umask(UMASK)


def publish(temporary, path):
    """Give a finished file or folder its name. At any moment, also in a power cut, there is the old
    one or the new one, whole, as far as the file system can promise that."""
    if os.path.isfile(temporary):
        settle(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):        # some file systems can't sync a folder
        sync(os.path.dirname(os.path.abspath(path)))


def settle(file):
    """Let others read a finished file, as the umask says, and return when the disk has it."""
    os.chmod(file, 0o666 & ~UMASK)   # safetensors leaves 0600
    sync(file)


def sync(path):
    """Return when the disk has what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDWR if os.path.isfile(path) else os.O_RDONLY)   # for Windows
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(2 ** 24):
            digest.update(piece)
    return digest.hexdigest()


# Caches depend on the code that made them. These are its sums as this program runs it, taken at the
# start, since a file may be edited meanwhile.
CODE = {file: sha256(os.path.join(HERE, file)) for file in (
    "train.py", "model.py", "mmpo.py", "data.py", "scripts/evaluate.py")
    if os.path.exists(os.path.join(HERE, file))}


def code_sum():
    """What tells the code that trains from other code: a sha256 of it, without the scripts."""
    sums = [found for file, found in CODE.items() if not file.startswith("scripts/")]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def cache_path(kind, key, code):
    """Where something computed from `key` (anything that json can write) is kept.

    code: the files of CODE that compute it. Once they are edited, it is computed again.
    """
    digest = hashlib.sha256(json.dumps([key, *(CODE[file] for file in code)]).encode())
    folder = os.path.expanduser(os.environ.get("NANOMMPO_CACHE") or "~/.cache/nanommpo")
    require(folder[0] != "~", f"NANOMMPO_CACHE: no home for {folder}; give a folder for the cache")
    return os.path.join(folder, f"{kind}-{digest.hexdigest()[:24]}.npz")


def cache_sum(path, arrays):
    """A sha256 over {name: array}, shapes and dtypes included, and the name of the cache's file."""
    digest = hashlib.sha256(os.path.basename(path).encode())
    for name, array in sorted(arrays.items()):
        array = np.asarray(array)
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def load_cache(path):
    """{name: array} as save_cache was given it, or None where there is no such file. A damaged one
    counts as none, and a note says so."""
    if not os.path.isfile(path):
        return None
    try:
        with np.load(path) as z:   # which unpickles nothing
            arrays = dict(z)
        require(arrays.pop("sha256") == cache_sum(path, arrays), "other content than was written")
        return arrays
    except Exception as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"note: {path} is damaged, or can't be read ({first_line(e):.80}); this is "
                  "computed again")
        return None


def save_cache(path, **arrays):
    """np.savez, whole or not at all. A cache that can't be written costs time, not the run."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.tmp{os.getpid()}", "wb") as f:
            np.savez(f, **arrays, sha256=cache_sum(path, arrays))
        publish(f.name, path)
    except OSError as e:
        with contextlib.suppress(OSError):   # on a full disk half a cache is in the way
            os.remove(f"{path}.tmp{os.getpid()}")
        print(f"note: {path} not written ({e.strerror}); this will be computed again next time")


def read_metrics(path):
    """The records of a metrics.jsonl, without a last line that a run has not finished writing."""
    with reading(path, "a run's metrics"):
        lines = read_text(path, "a run's metrics").splitlines(True)
        records = [parse_json(line) for line in lines if line.endswith("\n")]
        for n, record in enumerate(records, 1):
            require(type(record["iter"]) is int and {*map(type, record.values())} <= {int, float},
                    f"{path}:{n}: a step and its numbers should be here; delete the line")
    return records


def read_run_settings(folder):
    """The settings of the run that train.py started in this folder, {} where there is none."""
    path = os.path.join(folder, "train_config.json")
    found = read_json(path) if os.path.exists(path) else {}
    if not isinstance(found.get("init_from"), str):   # then it is another program's file
        return {}
    require(isinstance(found.get("finished", 0), int),   # True in older runs
            f"{path}: finished should be a step; bring the run's own file back")
    return found


def run_sum(folder):
    """What tells the run in a folder from any other: the sum of its metrics.jsonl, where the speed
    of each step differs from run to run. None where there is no run."""
    path = os.path.join(folder, "metrics.jsonl")
    return sha256(path) if os.path.exists(path) else None


def is_finished(folder):
    """The step at which the run of this folder ended, or False."""
    return read_run_settings(folder).get("finished", False)


# -----------------------------------------------------------------------------
# settings


@dataclass
class Setting:
    value: int | float | bool | str    # the default
    comment: str                       # its help
    group: str                         # the heading it stands under


def read_settings(source):
    """{name: Setting} of a script: its top-level assignments above the call of `configure`.

    Raises UserError that names the line of an assignment that is no setting, rather than lose it.
    """
    with open(source, encoding="utf-8") as f:
        text = f.read()
    comments = {token.start[0]: token for token in
                tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT}
    settings = {}
    for node in ast.parse(text, source).body:
        if any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "configure"
               for n in ast.walk(node)):
            break
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        name = " = ".join(map(ast.unparse, targets))
        if all(n.id.startswith("_") for t in targets for n in ast.walk(t)
               if isinstance(n, ast.Name)):
            continue
        try:
            value = ast.literal_eval(node.value)
        except Exception:
            value = None
        require(type(value) in (int, float, bool, str) and name.isidentifier()
                and not isinstance(node, ast.AugAssign),
                f"{source}:{node.lineno}: {name} can't be a setting; above `configure` a value is "
                "a number, text, True or False, written out (begin the name with _ if it is "
                "something else)")
        require(name not in settings, f"{source}:{node.lineno}: {name} has a default already")
        above = [comments[line].string for line in range(node.lineno, 0, -1)
                 if line in comments and comments[line].start[1] == 0]
        group = next((c for c in above if not c.startswith("# ---")), "#")
        trailing = comments.get(node.end_lineno)
        settings[name] = Setting(value, trailing.string.lstrip("# ") if trailing else "",
                                 group.lstrip("# "))
    return settings


# what a number may be, the test of it, and the settings that it is for
BOUNDS = (("above 0, and below 2 ** 31", lambda x: 0 < x < 2 ** 31, """
              log_interval eval_interval sample_tokens kl_tokens eval_pairs max_length
              max_prompt_length lora_alpha batch_size epochs pack_tokens keep_checkpoints"""),
          ("0 or more", lambda x: x >= 0, """
              save_interval kl_samples beta reward_norm_group pref_weight entropy_coef
              gamma_beta_ratio orpo_lambda lora_rank learning_rate weight_decay grad_clip
              max_iters min_lr seed skip_nonfinite"""),
          ("from 0 to 1", lambda x: 0 <= x <= 1, "warmup"),
          ("from 0 to below 1", lambda x: 0 <= x < 1, "lora_dropout beta1 beta2"))


def configure(namespace, argv, source, choices={}):
    """Override the defaults in `namespace` (a script's globals()) by argv -> (settings, overrides).

    argv: config files, applied in order, and --key=value, which win wherever they stand.
    source: the script's path. choices: {name: allowed words} where the comment doesn't list them.
    `--help` prints every setting and exits; `--debug` keeps tracebacks.
    Raises UserError that says where the mistake is.
    """
    known = read_settings(source)
    defaults = {name: setting.value for name, setting in known.items()}
    if "--help" in argv or "-h" in argv:
        print(help_text(known, source))
        sys.exit(0)
    overrides = {}
    for arg in sorted(argv, key=lambda arg: arg.startswith("--")):   # the files first
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            found, where = {key: value if equals else BARE}, f"--{key}"
        else:
            found, where = run_config_file(arg, defaults | overrides), arg
        for key, value in found.items():
            check_known(key, known, where)
            words = choices.get(key) or (words_of(known[key].comment)
                                         if isinstance(known[key].value, str) else [])
            value = coerce(key, value, known[key].value, words, where)
            for bound, holds, names in BOUNDS:
                require(key not in names.split() or holds(value),
                        f"{where}: {key} must be {bound} (got {value})")
            overrides[key] = value
    given = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
    if "epochs" in given and "max_iters" not in given and overrides.get("max_iters"):
        overrides["max_iters"] = 0   # it is a config file's, and --epochs must win over files
    namespace.update(overrides)
    if overrides.get("debug"):
        sys.excepthook = sys.__excepthook__
    return defaults | overrides, overrides


PATHS = ("init_from", "dataset", "eval_dataset", "chat_template")   # settings that name files


def run_config_file(path, known):
    """The settings that a config file makes. It sees the current ones, so it can compute with them.

    The file, and the paths that it sets, are looked for below the checkout's folder if they are not
    found from here. So config/demo.py runs from any folder.
    """
    path = beside_the_checkout(path)
    require(os.path.exists(path),
            f"{path}: no such config file; settings are written --key=value")
    require(path.endswith(".py"), f"{path}: config files end in .py; "
            "settings, data files too, are written --key=value")
    scope = known | {"__name__": "__main__", "__file__": path}
    text = read_text(path, "a config file", "utf-8-sig")
    try:
        tree = ast.parse(text, path)
        exec(compile(tree, path, "exec"), scope)
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno or 1}: {e.msg}; a config file is Python") from e
    except (Exception, SystemExit) as e:   # sys.exit() in one would look like a run that ended well
        line = [1, *(frame.lineno for frame in traceback.extract_tb(e.__traceback__)
                     if frame.filename == path)][-1]
        raise UserError(f"{path}:{line}: {type(e).__name__}: {first_line(e)}") from e
    for node in tree.body:   # `beta: 0.1`, as in YAML, is Python's way to annotate a name
        require(not isinstance(node, ast.AnnAssign) or node.value,
                f"{path}:{node.lineno}: {ast.unparse(node)} sets nothing; write name = value")
    assigned = {node.id for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found = {key: value for key, value in scope.items()
             if (key not in known or key in assigned or value is not known[key])
             and not key.startswith("_")
             and (key in known or not isinstance(value, ModuleType) and not callable(value))}
    for key in found.keys() & PATHS:
        if isinstance(found[key], str):
            found[key] = all_beside_the_checkout(found[key])
    return found


def beside_the_checkout(path):
    """This path, or the one below the checkout's folder if only that exists."""
    there = os.path.join(HERE, path)
    return there if path and not os.path.exists(path) and os.path.exists(there) else path


def all_beside_the_checkout(paths):
    return ",".join(beside_the_checkout(path.strip()) for path in paths.split(","))


# what TRL or nanoGPT call a setting: what it is called here
BATCH = ("batch_size, the global batch in pairs, on however many GPUs; pack_tokens bounds the "
         "memory, so nothing is accumulated by hand")
ELSEWHERE = {
    "lr": "learning_rate", "bf16": "dtype=bfloat16", "fp16": "dtype=bfloat16",
    "torch_dtype": "dtype", "per_device_train_batch_size": BATCH, "micro_batch_size": BATCH,
    "gradient_accumulation_steps": BATCH, "num_train_epochs": "epochs",
    "max_steps": "max_iters", "warmup_ratio": "warmup",
    "warmup_steps": "warmup, a share of the steps", "warmup_iters": "warmup, a share of the steps",
    "output_dir": "out_dir", "model": "init_from", "model_name_or_path": "init_from",
    "dataset_name": "dataset", "logging_steps": "log_interval", "eval_steps": "eval_interval",
    "eval_iters": "eval_pairs", "save_steps": "save_interval", "max_grad_norm": "grad_clip",
    "loss_type": "objective", "gradient_checkpointing": "activation_checkpointing",
    "use_peft": "lora_rank", "lora_r": "lora_rank", "lora_target_modules": "lora_targets",
    "optim": "optimizer_state", "report_to": "wandb_log", "fsdp": "parallel=fsdp",
    "deepspeed": "parallel=fsdp", "resume_from_checkpoint": "resume",
    "simpo_gamma": "gamma_beta_ratio, which is gamma / beta", "max_seq_length": "max_length",
    "pref_beta": "beta", "orpo_beta": "orpo_lambda", "val_set_size": "eval_pairs, not a share",
    "max_completion_length": "max_length, of the prompt and one response"}


def check_known(key, known, where):
    if key in known:
        return
    hint = "--help lists the settings"
    if re.split(r"\W", ELSEWHERE.get(key, ""))[0] in known:
        hint = f"here it is {ELSEWHERE[key]}"
    elif near := difflib.get_close_matches(key, known, n=1):
        hint = f'did you mean "{near[0]}"?'
    elif not where.startswith("--"):
        hint += "; a name that is no setting begins with _"
    raise UserError(f'{where}: unknown setting "{key}"; {hint}')


BARE = object()   # the value of a --key without =, which means True
KINDS = {bool: "true or false", int: "a whole number below 2 ** 63", float: "a number below 1e30",
         str: "text"}
LARGEST = {int: 2 ** 63, float: 1e30}   # numbers are below it; fp32 ends at 3e38


def words_of(comment):
    """The allowed values that a comment lists, as `mmpo | dpo | sft: ..`, or [] without a list."""
    found = re.match(r"([\w.-]+(?: \| [\w.-]+)+)(?::|$)", comment)
    return found[1].split(" | ") if found else []


def coerce(key, value, default, words, where):
    """A value (a command line's text, BARE, or anything from a config file) in the default's type,
    or as one of `words` if there are any."""
    want = type(default)
    if value is BARE:
        require(want is bool or "true" in words,
                f"{where}: settings are written --key=value (--help lists them)")
        value = True
    if words:
        value = next((word for word in words if word.lower() == str(value).lower()), str(value))
        near = difflib.get_close_matches(value, words, n=1)
        require(value in words, f'{where}: {key} must be one of {", ".join(words)} (got "{value}")'
                + (f'; did you mean "{near[0]}"?' if near else ""))
    found = None
    if want is bool:
        found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    elif want is str:
        found = value if isinstance(value, str) and "\0" not in value else None
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value)
            if want is int and re.fullmatch(r"[+-]?\d+", str(value).strip()):
                number = int(value)   # a float loses digits from 2 ** 53 on
            if abs(number) < LARGEST[want] and number == want(number):   # neither NaN, nor 1.5
                found = want(number)
    require(found is not None, f"{where}: {key} must be {KINDS[want]} (got {shown(value)})")
    return found


def shown(value):
    try:
        return f"{value!r:.99}"
    except Exception as e:   # as of a number of over 4300 digits
        return f"what can't be shown: {first_line(e)}"


def help_text(known, source):
    lines = [f"usage: python {os.path.basename(source)} [config/file.py ..] [--key=value ..]"]
    group = None
    for name, setting in known.items():
        if setting.group != group:
            group = setting.group
            lines += ["", group]
        value = f'"{setting.value}"' if isinstance(setting.value, str) else setting.value
        lines.append(f"  --{name + '=' + str(value):<40} {setting.comment}")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# processes


def check_numbers(args, **least):
    """Raise UserError unless each of a script's arguments is None, or in [its least, 2 ** 31)."""
    for name, lowest in least.items():
        value = getattr(args, name)
        require(value is None or lowest <= value < 2 ** 31,
                f"--{name} must be {lowest} or more, and below 2 ** 31 (got {value})")


def torchrun_ranks():
    """-> whether torchrun or the like started this process, its rank, its rank on this machine, the
    number of processes. Raises UserError if only a part of what a launcher sets is there."""
    if "RANK" not in os.environ:
        size = os.environ.get("WORLD_SIZE", "1")
        require(size in ("", "1"), f'WORLD_SIZE is "{size}", but RANK is not set; start with '
                "torchrun, or unset WORLD_SIZE")
        tasks = [os.environ.get(name, "1") for name in (   # of mpirun and srun
            "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")]
        require(tasks == ["1", "1"], f"started as one of {max(tasks)} tasks, each of which would be"
                " a run of its own; start one torchrun on each machine")
        return False, 0, 0, 1
    told = {"LOCAL_RANK": "0"} | os.environ
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        value = told.get(name, "")
        require(value and (name == "MASTER_ADDR"
                           or value.isdecimal() and int(value[:9]) < 65536),
                f'RANK is set, but {name} is "{value}"; start with torchrun, or unset RANK')
    rank, local_rank, size = (int(told[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    require(rank < size, f"RANK is {rank}, but WORLD_SIZE {size}; ranks count from 0")
    return True, rank, local_rank, size


def join_ranks(backend, device_id=None):
    """Meet the other ranks, which have five minutes to come. After that a rank waits two hours for
    another, which may be tokenizing."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _, rank, _, ranks = torchrun_ranks()
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = timedelta(minutes=5)
    try:
        if by_torchrun:   # it listens there, unless it was killed; torch would wait a minute for it
            socket.create_connection((host, port), 20).close()
        elif rank == 0:   # torch would wait for minutes for a name to come
            socket.getaddrinfo(host, port)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), dist.TCPStore(
            host, port, is_master=rank == 0 and not by_torchrun, wait_for_workers=False,
            timeout=timedelta(seconds=20 if by_torchrun else 120)))   # torch tries twice
        here, deadline = store.add("here", 1), time.monotonic() + patience.total_seconds()
        while here < ranks:   # in Python, since torch's own waiting doesn't hear signals
            require(time.monotonic() < deadline, f"MASTER_ADDR: {here} of {ranks} ranks came to "
                    f"{host}:{port} within 5 minutes; were all machines started?")
            time.sleep(0.1)
            here = store.add("here", 0)
        store.set_timeout(patience)
        # If another rank dies during this call, torchrun's SIGTERM must end this rank.
        heard = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks,
                                timeout=timedelta(hours=2), device_id=device_id)
        signal.signal(signal.SIGTERM, heard)
        store.set_timeout(timedelta(hours=2))
    except (OSError, dist.DistError) as e:
        raise UserError(f"MASTER_ADDR: the ranks did not meet at {host}:{port} "
                        f"({first_line(e)[:90]}); is the first machine up, and are all started?"
                        ) from e


def rank_and_size():
    """This process's rank and how many there are: 0 and 1 where it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_on_each_node(function, *args):
    """function(*args), which downloads or tokenizes. Local rank 0 of each machine calls it first.
    Then the other ranks find the result in the cache."""
    first = not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"
    for my_turn in (first, not first):
        if my_turn:
            result = function(*args)
        if dist.is_initialized():
            dist.barrier()
    return result


def same_on_all_ranks(settings):
    """Raise UserError unless all ranks have the same settings. Only paths may differ."""
    if not dist.is_initialized():
        return
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, settings)
    for name, value in settings.items():
        other = next((found[name] for found in everywhere if found[name] != value), value)
        require(name in PATHS or other == value, f"{name}: {value!r:.60} on rank {dist.get_rank()} "
                f"and {other!r:.60} on another; start all ranks with the same")
