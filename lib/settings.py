"""YAML in, run directory out: settings checked before anything is loaded, checkpoints that appear whole or not at all.

Every user error is a `UserError`: one line on stderr, exit code 2, no traceback. No torch in this file.
"""
import difflib
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import yaml

ROOT = Path(__file__).resolve().parent.parent
INF = float("inf")

# Dotted key -> what it accepts: a type, a tuple of choices, or (type, lowest, highest). A list or a dict holds
# one such entry for its items.
# "env" and "eval.variants" are checked by the environment class itself; "lora: null" tunes all parameters.
SCHEMA = {
    "env": dict,
    "model.path": str,
    "model.random_init": bool,
    "model.shape": str,
    "model.tokenizer": str,
    "model.prompt_tokens": (int, 1, 100_000),
    "model.answer_tokens": (int, 1, 100_000),
    "model.revision_tokens": (int, 1, 100_000),
    "model.device": ("cpu", "cuda", "auto"),
    "model.quantization": ("nf4", "none"),
    "model.keep_unquantized": [str],
    "model.dtype": ("float32", "bfloat16"),
    "model.tune": [("language", "projector", "vision")],
    "model.gradient_checkpointing": bool,
    "model.merge_for_sampling": bool,
    "model.sample_tokens": (int, 1, INF),
    "model.image_cache": (float, 0, INF),
    "model.memory": (float, 0, INF),
    "model.max_new_tokens": (int, 1, 100_000),
    "lora.r": (int, 1, 10_000),
    "lora.alpha": (float, 0, INF),
    "lora.target_modules": str,
    "sft.steps": (int, 1, INF),
    "sft.batch_size": (int, 1, INF),
    "sft.micro_tokens": (int, 1, INF),
    "sft.lr": (float, 0, 1),
    "sft.schedule": ("cosine", "constant"),
    "sft.warmup": (float, 0, 1),
    "sft.weight_decay": (float, 0, 1),
    "sft.max_grad_norm": (float, 0, INF),
    "sft.mistakes": (int, 0, 100),
    "sft.init_step": (int, 1, INF),
    "sft.save_every": (int, 1, INF),
    "ppo.init": str,
    "ppo.verify_iters": (int, 1, 100),
    "ppo.updates": (int, 1, INF),
    "ppo.envs": (int, 1, INF),
    "ppo.turns": (int, 1, INF),
    "ppo.temperature": (float, 0.01, 10),
    "ppo.epochs": (int, 1, 1000),
    "ppo.minibatch": (int, 1, INF),
    "ppo.micro_tokens": (int, 1, INF),
    "ppo.lr": (float, 0, 1),
    "ppo.value_lr": (float, 0, 1),
    "ppo.schedule": ("cosine", "constant"),
    "ppo.adam_eps": (float, 0, 1),
    "ppo.max_grad_norm": (float, 0, INF),
    "ppo.clip": (float, 0, 10),
    "ppo.ratio": ("turn", "token"),
    "ppo.prefix_weight": (float, 0, 1),
    "ppo.gamma": (float, 0, 1),
    "ppo.lam": (float, 0, 1),
    "ppo.normalize_advantages": bool,
    "ppo.reward_scale": (float, 0, INF),
    "ppo.value_coef": (float, 0, INF),
    "ppo.value_hidden": [(int, 1, 100_000)],
    "ppo.value_detach": bool,
    "ppo.entropy_coef": (float, 0, INF),
    "ppo.kl_coef": (float, 0, INF),
    "ppo.save_every": (int, 1, INF),
    "eval.verify_iters": (int, 1, 100),
    "eval.temperatures": [(float, 0, 10)],
    "eval.splits": {"split": (int, 1, INF)},
    "eval.variants": dict,
    "eval.batch_size": (int, 1, INF),
    "eval.curve_n": (int, 0, INF),
    "eval.seed": (int, 0, 2**31),
    "eval.runs": [str],
    "eval.save_merged": [str],
    "eval.transcripts": (int, 0, 1000),
    "run.dir": str,
    "run.seed": (int, 0, 10_000_000),
}
USES = {"sft": ("env", "model", "lora", "sft"), "rl": ("env", "model", "lora", "ppo")}  # what shapes each arm
# Keys that may change between stop and resume: where it runs, in what portions, what is kept. Never what is learnt from
# what, though numbers may round otherwise, FLOPs count images encoded again and, with the third line, other answers be drawn
# from the same distribution. (The first line matters to random weights and plan.py alone.)
ELSEWHERE = ("model.prompt_tokens", "model.answer_tokens", "model.revision_tokens",
             "model.memory", "model.image_cache", "model.gradient_checkpointing", "sft.micro_tokens", "ppo.micro_tokens",
             "model.device", "model.sample_tokens", "model.merge_for_sampling",
             "run.dir", "model.path", "sft.init_step", "sft.save_every", "ppo.save_every")  # Policy.load tells another model


class UserError(Exception):
    """Something the user can mend: the message says what and how, in one line."""


def nearest(name, names):
    """' (did you mean X?)' for the closest valid name, or ''."""
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def one_line(error):
    """An exception as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------- reading and checking
def _check(key, value, accepts):
    """The value in the type that its key wants; UserError otherwise."""
    if isinstance(accepts, dict):  # free names, one kind of value
        _check(key, value, dict)
        return {str(k): _check(f"{key}.{k}", v, *accepts.values()) for k, v in value.items()}
    if isinstance(accepts, list):
        if not isinstance(value, list):
            raise UserError(f"{key}: {value!r} is not a list")
        return [_check(key, item, accepts[0]) for item in value]
    if isinstance(accepts, tuple) and isinstance(accepts[0], str):
        if value not in accepts:
            raise UserError(f"{key}: {value!r} is none of {', '.join(accepts)}")
        return value
    kind, low, high = accepts if isinstance(accepts, tuple) else (accepts, -INF, INF)
    if kind is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-6 as text
        except (ValueError, OverflowError):
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        name = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}[kind]
        raise UserError(f"{key}: {value!r} is not {name}")
    if kind in (int, float) and not low <= value <= high:
        raise UserError(f"{key}: {value} is not between {low} and {high}")
    return value


def check(raw):
    """A complete, checked copy of the nested settings. Raises UserError for any key unknown, missing or wrong."""
    if not isinstance(raw, dict):
        raise UserError("the configuration is not a mapping of sections")
    sections = list(dict.fromkeys(key.split(".")[0] for key in SCHEMA))
    for section in raw:
        if section not in sections:
            raise UserError(f"unknown section {section!r}{nearest(str(section), sections)}")
    clean = {}
    for section in sections:
        if section not in raw:
            raise UserError(f"section {section} is missing")
        given = raw[section]
        if section == "env" or (section == "lora" and given is None):
            clean[section] = _check(section, given, dict) if section == "env" else None
            continue
        known = [key.split(".")[1] for key in SCHEMA if key.startswith(section + ".")]
        for key in _check(section, given, dict):
            if key not in known:
                raise UserError(f"unknown key {section}.{key}{nearest(str(key), known)}")
        for key in known:
            if key not in given:
                raise UserError(f"{section}.{key} is missing")
        clean[section] = {key: _check(f"{section}.{key}", given[key], SCHEMA[f"{section}.{key}"]) for key in known}
    if clean["lora"] is None and clean["model"]["quantization"] != "none":
        raise UserError("lora: null tunes all parameters, which needs model.quantization=none")
    if clean["lora"] is None and clean["model"]["dtype"] != "float32":
        raise UserError("lora: null tunes the weights themselves; 16 bits would round most steps away: model.dtype=float32")
    if clean["sft"]["init_step"] > clean["sft"]["steps"]:
        raise UserError("sft.init_step: Init is a step of the SFT run, so it cannot exceed sft.steps")
    for section, key in (("eval", "splits"), ("eval", "temperatures"), ("eval", "variants"), ("model", "tune")):
        if not clean[section][key]:
            raise UserError(f"{section}.{key} is empty")
    for name, changes in clean["eval"]["variants"].items():
        _check(f"eval.variants.{name}", changes, dict)
    return clean


def override(raw, argument):
    """Apply one `section.key=value` of the command line (the value is YAML)."""
    key, equals, text = argument.partition("=")
    if not equals:
        raise UserError(f"{argument!r} is not key=value")
    *path, last = key.split(".")
    place = raw
    for part in path:
        if not isinstance(place.get(part), dict):
            raise UserError(f"unknown key {key}{nearest(key, SCHEMA)}")
        place = place[part]
    free = path[:1] == ["env"] or path[:2] in (["eval", "variants"], ["eval", "splits"])
    if not free and key not in SCHEMA and not (key == "lora" and key in raw):
        raise UserError(f"unknown key {key}{nearest(key, SCHEMA)}")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: {text!r} is not YAML") from None


def load(arguments):
    """Settings from `CONFIG [key=value ...]`.

    Returns: (cfg with attribute access per section, the plain nested dict, the overrides).
    """
    usage = f"usage: python {Path(sys.argv[0]).name} CONFIG.yaml [section.key=value ...]"
    if not arguments or arguments[0].startswith("-"):
        raise UserError(usage)
    path = Path(arguments[0])
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {usage}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a mapping of sections")
    for argument in arguments[1:]:
        override(raw, argument)
    raw = check(raw)
    cfg = SimpleNamespace(**{k: SimpleNamespace(**v) if k not in ("env",) and v is not None else v
                             for k, v in raw.items()})
    return cfg, raw, arguments[1:]


def run_main(main):
    """Run a script's main(arguments): a UserError becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped; run the same command again to continue from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def out_of_memory(error):
    """Whether an exception says so; torch's differ by device and library, and a full card may fail to start cuBLAS."""
    return bool(re.search("MemoryError|out of memory|not enough memory|allocate memory|ALLOC_FAILED|ALLOCATION_FAILED"
                          "|CUBLAS_STATUS_NOT_INITIALIZED", f"{type(error).__name__} {error}"))


@contextmanager
def within_memory(doing, cfg, *keys):
    """Running out of memory inside, the GPU's or the machine's, becomes a UserError that says what to change.

    Args: doing: what is done inside; keys: those to lower ("ppo.micro_tokens") or to set ("model.quantization=nf4").
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError, that of its CPU allocator has no other name
        if not out_of_memory(error):
            raise
        ways = []
        for key, _, wanted in (key.partition("=") for key in keys):
            section, name = key.split(".")
            value = str(getattr(getattr(cfg, section), name)).lower()
            if value not in (wanted, "1"):  # one that is not as low as it goes
                ways.append(f"set {key}={wanted}" if wanted else f"lower {key} ({value})")
        raise UserError(f"out of memory while {doing}: {' or '.join(ways) or 'it needs a larger machine'}; `python plan.py "
                        "CONFIG` shows what takes how much (the last checkpoint is intact)") from None


def arm_name(script, overrides):
    """'sft' or 'rl', plus the command line's own settings of that arm: rl-ppo.verify_iters=1."""
    mine = [o for o in overrides if o.split(".")[0].split("=")[0] in USES[script] and o.split("=")[0] not in ELSEWHERE]
    return "-".join([script, *(re.sub(r"[^\w.=,+-]", "_", o) for o in sorted(mine))])


def find_model(path):
    """A local model folder (tried as given, then beside this file), or the name of a hub model unchanged."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_dir():
            return str(candidate)
    return path
