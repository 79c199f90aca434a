"""
The nanoGPT way of configuring a run: flat names with defaults at the top of a script, a Python file
that overrides some of them, `--key=value` that overrides both.

    python train.py config/demo.py --beta=0.1 --max_iters=1e3 --compile=false

A default's trailing comment documents it and, where it starts with one of these, bounds it:

    objective = "mmpo"     # mmpo | dpo | sft: the loss        one of these words
    beta = 0.05            # >= 0, weight of ...               a bound: > >= < <= and a number
    dropout = 0.0          # 0 to 1, LoRA's dropout            both ends included

Differences from nanoGPT: an unknown key is an error wherever it is set, a value has the default's
type or is an error, and a config file runs in its own namespace.
"""
import ast
import difflib
import errno
import io
import os
import re
import sys
import tokenize
import traceback


def configure(namespace, argv, source):
    """Override the defaults in `namespace` (a script's globals()) by argv -> (settings, overrides).

    argv: config files, applied in order, and --key=value, which win wherever they stand. source:
    the script's path, whose comments hold the bounds. Raises ValueError or FileNotFoundError with a
    message for the user. `--help` prints every key with its default and comment, and exits.
    """
    comments = setting_comments(source)
    defaults = {key: namespace[key] for key in comments}
    if "--help" in argv or "-h" in argv:
        print(help_text(defaults, comments, source))
        sys.exit(0)
    overrides = {}
    for arg in sorted(argv, key=lambda arg: arg.startswith("--")):
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals:
                raise ValueError(f"{arg}: settings are written --key=value (--help lists them)")
            found, where = {key: value}, f"--{key}"
        else:
            found, where = run_config_file(arg, defaults | overrides), arg
        for key, value in found.items():
            check_known(key, defaults, where)
            overrides[key] = coerce(key, value, defaults[key], comments[key], where)
    namespace.update(overrides)
    return defaults | overrides, overrides


def setting_comments(source):
    """{key: trailing comment} of the script's top-level `name = literal  # comment` lines.

    Reading stops at the first line that is neither such an assignment, an import nor a comment
    after the defaults began: the defaults are one block.
    """
    comments = {}
    for line in open(source, encoding="utf-8"):
        setting = re.match(r"([a-z][a-z0-9_]*) = (?=[-\d\"'TF])", line)
        if setting:
            found = [t.string for t in tokenize.generate_tokens(io.StringIO(line).readline)
                     if t.type == tokenize.COMMENT]
            comments[setting[1]] = found[0].lstrip("# ").rstrip() if found else ""
        elif comments and not line.startswith("#") and line.strip():
            break
    return comments


def run_config_file(path, known):
    """The names a config file sets. It sees the current settings, so it can compute with them."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such config file; settings are written --key=value")
    scope = dict(known)
    try:
        tree = ast.parse(open(path, encoding="utf-8").read(), path)
        exec(compile(tree, path, "exec"), scope)
    except SyntaxError as e:
        raise ValueError(f"{path}:{e.lineno}: {e.msg}; "
                         "a config file is lines of key = value") from None
    except Exception as e:
        line = traceback.extract_tb(e.__traceback__)[-1].lineno
        raise ValueError(f"{path}:{line}: {type(e).__name__}: {e}") from None
    scope.pop("__builtins__", None)
    assigned = {node.id for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {k: v for k, v in scope.items() if k not in known or k in assigned}


def check_known(key, defaults, where):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1)
        hint = f'did you mean "{near[0]}"?' if near else "--help lists the settings"
        raise ValueError(f'{where}: unknown setting "{key}"; {hint}')


def coerce(key, value, default, comment, where):
    """value (a command line's string, or anything from a config file) as the default's type."""
    want = type(default)
    problem = ValueError(f"{where}: {key} must be {KINDS[want]} (got {value!r})")
    if want is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
        if value is None:
            raise problem
    elif want in (int, float):
        if isinstance(value, bool):
            raise problem
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise problem from None
        if number != number or abs(number) == float("inf") or want is int and number != int(number):
            raise problem
        value = want(number)
    elif not isinstance(value, str):
        raise problem
    check_bounds(key, value, comment, where)
    return value


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
CHOICE = re.compile(r"([\w.-]+(?: \| [\w.-]+)+)")
NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"


def check_bounds(key, value, comment, where):
    """ValueError if value breaks what the comment starts with: choices, a bound or a range."""
    if choices := CHOICE.match(comment):
        words = choices[1].split(" | ")
        if value not in words:
            near = difflib.get_close_matches(str(value), words, n=1)
            raise ValueError(f'{where}: {key} must be one of {", ".join(words)} (got "{value}")'
                             + (f'; did you mean "{near[0]}"?' if near else ""))
    elif bound := re.match(rf"(>=|<=|>|<) {NUMBER}", comment):
        sign, limit = bound[1], float(bound[2])
        if not {">": value > limit, ">=": value >= limit,
                "<": value < limit, "<=": value <= limit}[sign]:
            raise ValueError(f"{where}: {key} must be {sign} {bound[2]} (got {value})")
    elif span := re.match(rf"{NUMBER} to {NUMBER}", comment):
        if not float(span[1]) <= value <= float(span[2]):
            raise ValueError(f"{where}: {key} must be from {span[1]} to {span[2]} (got {value})")


RESUME_MAY_CHANGE = (   # where and how a run is computed, how far it goes, what it writes
    "out_dir", "resume", "dry_run", "max_iters", "epochs", "export_", "wandb_", "sample_", "log_",
    "eval_interval", "save_", "device", "parallel", "compile", "row_tokens", "activation_")


def check_same_run(settings, before):
    """ValueError unless a run resumes with the settings it had `before`, but for RESUME_MAY_CHANGE
    (beginnings of names)."""
    for key, value in settings.items():
        if before.get(key, value) == value or key.startswith(RESUME_MAY_CHANGE):
            continue
        wrong = f"the run has {key}={before[key]!r}, not {value!r}; give that"
        if key.endswith("_sha256"):
            wrong = f"{key.removesuffix('_sha256')} rows have changed; bring the old ones back"
        raise ValueError(f"resume: {wrong}, or start anew in another out_dir")


def help_text(defaults, comments, source):
    name = os.path.basename(source)
    lines = [f"usage: python {name} [config/file.py ...] [--key=value ...]", ""]
    for key, value in defaults.items():
        shown = f'"{value}"' if isinstance(value, str) else value
        lines.append(f"  --{key + '=' + str(shown):<40} {comments[key]}")
    return "\n".join(lines)


DISK_FULL = ("ENOSPC", "EDQUOT", "EFBIG")   # such errors name no file


def one_line_errors():
    """From here on a mistake of the user's ends in one line, a bug keeps its traceback.

    What tells them apart: a ValueError or OSError that a `raise` statement of this project threw is
    a message written for the user, and so is what the system says about a file.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    project = (here, os.path.join(here, "scripts"))

    def hook(kind, error, trace):
        last = traceback.extract_tb(trace)[-1] if trace else None
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        elif issubclass(kind, OSError) and error.strerror and (
                error.filename or errno.errorcode.get(error.errno) in DISK_FULL):
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror}", file=sys.stderr, flush=True)
        elif (issubclass(kind, (ValueError, OSError)) and last and last.line.startswith("raise ")
                and os.path.dirname(os.path.abspath(last.filename)) in project):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            return sys.__excepthook__(kind, error, trace)
        sys.unraisablehook = lambda _: None   # that line is the last, whatever objects end badly

    sys.excepthook = hook
