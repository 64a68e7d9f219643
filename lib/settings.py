"""The settings of a run: read from YAML, overridden on the command line, checked.

All is checked before anything is loaded. No torch in this file.
"""
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml

from lib.checks import (INF, check_settings, checked, choice, either, fields, flag, list_of,
                        mapping, mapping_of, nearest, number, text, whole)
from lib.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MAX_SEED = 10_000_000  # keeps the seeds of training below rollout.EVAL_SEEDS


def start(value):
    """The name of a checkpoint, or "none"."""
    if value is None or str(value).lower() in ("null", "~", "") or value == "None":
        raise ValueError(f'{value!r} is no checkpoint; for the bare base model write "none"')
    return text(value)


# Of the evaluation: a temperature, 0 for greedy, or one with truncation.
sampling = either(number(0, 10), fields({"T": number(0.01, 10), "top_p": number(0.01, 1)}))


# What each setting accepts. What it means is said beside it in configs/*.yaml. The environment's
# class checks the settings in "env" and in each of "eval.variants".
SCHEMA = {
    "env": mapping,
    "model.path": text,
    "model.random_init": flag,
    "model.shape": text,
    "model.tokenizer": text,
    "model.prompt_tokens": whole(1, 100_000),
    "model.answer_tokens": whole(1, 100_000),
    "model.revision_tokens": whole(1, 100_000),
    "model.device": choice("cpu", "cuda", "auto"),
    "model.quantization": choice("nf4", "none"),
    "model.keep_unquantized": list_of(text),
    "model.dtype": choice("float32", "bfloat16", "float16"),
    "model.tune": list_of(choice("language", "projector", "vision")),
    "model.gradient_checkpointing": flag,
    "model.merge_for_sampling": flag,
    "model.sample_tokens": whole(1),
    "model.image_cache": number(0),
    "model.memory": number(0),
    "model.max_new_tokens": whole(1, 100_000),
    "model.thinking": flag,
    "lora.r": whole(1, 10_000),
    "lora.alpha": number(0),
    "lora.target_modules": text,
    "sft.init": start,
    "sft.loss": choice("nll", "dft"),
    "sft.steps": whole(1),
    "sft.batch_size": whole(1),
    "sft.micro_tokens": whole(1),
    "sft.lr": number(0, 1),
    "sft.schedule": choice("cosine", "constant"),
    "sft.warmup": whole(0),
    "sft.weight_decay": number(0, 1),
    "sft.max_grad_norm": number(0),
    "sft.mistakes": whole(0, 99),
    "sft.init_step": whole(1),
    "sft.save_every": whole(1),
    "ppo.init": start,
    "ppo.verify_iters": whole(1, 100),
    "ppo.updates": whole(1),
    "ppo.envs": whole(1),
    "ppo.turns": whole(1),
    "ppo.temperature": number(0.01, 10),
    "ppo.epochs": whole(1, 1000),
    "ppo.minibatch": whole(1),
    "ppo.micro_tokens": whole(1),
    "ppo.lr": number(0, 1),
    "ppo.value_lr": number(0, 1),
    "ppo.value_warmup": whole(0),
    "ppo.schedule": choice("cosine", "constant"),
    "ppo.adam_eps": number(1e-30, 1),  # at 0 a weight without gradient becomes NaN
    "ppo.max_grad_norm": number(0),
    "ppo.clip": number(0, 10),
    "ppo.max_ratio": number(1),
    "ppo.target_kl": number(0),
    "ppo.ratio": choice("turn", "token"),
    "ppo.prefix_weight": number(0, 1),
    "ppo.gamma": number(0, 1),
    "ppo.lam": number(0, 1),
    "ppo.normalize_advantages": flag,
    "ppo.min_spread": number(0),
    "ppo.reward_scale": number(0),
    "ppo.value_coef": number(0),
    "ppo.value_hidden": list_of(whole(1, 100_000)),
    "ppo.value_detach": flag,
    "ppo.entropy_coef": number(0),
    "ppo.kl_coef": number(0),
    "ppo.save_every": whole(1),
    "eval.verify_iters": whole(1, 100),
    "eval.temperatures": list_of(sampling),
    "eval.splits": mapping_of(whole(1)),
    "eval.variants": mapping_of(mapping),
    "eval.batch_size": whole(1),
    "eval.curve_n": whole(0),
    "eval.curve_points": whole(0),
    "eval.kl": flag,
    "eval.seed": whole(0, 2**31),
    "eval.runs": list_of(text),
    "eval.arms": list_of(text),
    "eval.save_merged": list_of(text),
    "eval.conversations": whole(0, 1000),
    "eval.transcripts": whole(0, 1000),
    "run.dir": text,
    "run.seed": whole(0, MAX_SEED),
}
# Keys that came after the first runs, each with the value that means "as before": a YAML may leave
# them out, and a run that was begun without them continues under these.
DEFAULTS = {"sft.init": "none", "sft.loss": "nll", "ppo.min_spread": 0.0, "ppo.max_ratio": INF,
            "ppo.target_kl": INF, "model.thinking": False, "ppo.value_warmup": 0,
            "eval.curve_points": 8, "eval.kl": False, "eval.arms": [], "eval.conversations": 0}
SECTIONS = tuple(dict.fromkeys(name.partition(".")[0] for name in SCHEMA))  # in the same order
FREE = ("env.", "eval.variants.", "eval.splits.")  # names below these are not in the schema
NOT_EMPTY = ("eval.splits", "eval.temperatures", "eval.variants", "model.tune")

# Keys that may differ when a run is continued, perhaps on another machine. They name no arm
# (lib/runs.py), and those of the model follow the machine that evaluates (eval.py).
SAME_TO_THE_LAST_DIGIT = (  # where things lie, what is kept, and lengths that only plan.py reads
    "run.dir", "model.path", "sft.init_step", "sft.save_every", "ppo.save_every",
    "model.prompt_tokens", "model.answer_tokens", "model.revision_tokens")
SAME_TO_ROUNDING = (  # in what portions is computed (images encoded again count as FLOPs again)
    "model.memory", "model.image_cache", "model.gradient_checkpointing",
    "sft.micro_tokens", "ppo.micro_tokens")
SAME_IN_DISTRIBUTION = (  # other answers may be drawn
    "model.device", "model.sample_tokens", "model.merge_for_sampling")
MAY_CHANGE = SAME_TO_THE_LAST_DIGIT + SAME_TO_ROUNDING + SAME_IN_DISTRIBUTION


# ---------------------------------------------------------------- reading and checking
def load(arguments):
    """Settings from `CONFIG [key=value ...]`.

    Returns: (cfg with attribute access per section, the plain nested dict, the overrides: of a key
        that is given twice, the last one counts).
    Raises: UserError if the file cannot be read or a setting is unknown, missing or wrong.
    """
    usage = f"usage: python {Path(sys.argv[0]).name} CONFIG.yaml [section.key=value ...]"
    if not arguments or arguments[0].startswith("-"):
        raise UserError(usage)
    path, *overrides = arguments
    raw = read_yaml(Path(path), usage)
    effective = {}  # key: its last argument
    for argument in map(_readable, overrides):
        override(raw, argument)
        effective[argument.partition("=")[0]] = argument
    raw = check(raw)
    cfg = SimpleNamespace()
    for section, values in raw.items():
        plain = section == "env" or values is None  # env: keyword arguments of the environment
        setattr(cfg, section, values if plain else SimpleNamespace(**values))
    return cfg, raw, list(effective.values())


def _readable(argument):
    """An argument that was decoded in an ASCII locale, read as the UTF-8 that it is."""
    if argument.isprintable():
        return argument
    return os.fsencode(argument).decode(errors="surrogateescape")


def read_yaml(path, usage):
    """The mapping in a YAML file. Raises: UserError, with the usage where there is no such file."""
    try:
        raw = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; {usage}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise UserError(f"{path}{where} is not YAML: {problem}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a mapping of sections")
    return raw


def _parse(text):
    """What a YAML text says. Raises: YAMLError; ValueError if a mapping has a key twice."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _refuse_doubled(node, "", set())
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_doubled(node, name, seen):
    """Raises: ValueError that names the key and both lines; `seen`: nodes looked at (aliases)."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubled(item, name, seen)
        return
    lines = {}  # key -> the line it stands in
    for key, value in node.value:
        written = str(key.value)
        full_name = f"{name}.{written}".removeprefix(".")
        line = key.start_mark.line + 1
        if written in lines and written != "<<":  # the merge key
            raise ValueError(f"{full_name} is given twice, in lines {lines[written]} and {line}")
        lines[written] = line
        _refuse_doubled(value, full_name, seen)


def override(raw, argument):
    """Apply one `section.key=value` of the command line (the value is YAML) to the nested settings.

    Raises: UserError if there is no such key or the value is not YAML.
    """
    name, equals, value = argument.partition("=")
    if not equals:
        raise UserError(f"{argument!r} is not key=value")
    unknown = UserError(f"unknown key {name}{nearest(name, SCHEMA)}")
    sets_lora = name == "lora" and "lora" in raw  # lora=null
    if name not in SCHEMA and not name.startswith(FREE) and not sets_lora:
        raise unknown
    *path, key = name.split(".")
    place = raw
    for part in path:
        place = place.get(part)
        if place is None and name in SCHEMA:
            raise UserError(f"{name}: {part} is null here")
        if not isinstance(place, dict):
            raise unknown
    try:
        place[key] = _parse(value)
    except yaml.YAMLError:
        raise UserError(f"{name}: {value!r} is not YAML") from None
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def check(raw):
    """A complete, checked copy of the nested settings.

    Raises: UserError for any key that is unknown, missing or wrong, and for keys at odds.
    """
    if not isinstance(raw, dict):
        raise UserError("the configuration is not a mapping of sections")
    for section in raw:
        if section not in SECTIONS:
            raise UserError(f"unknown section {section!r}{nearest(section, SECTIONS)}")
    clean = {}
    for section in SECTIONS:
        if section not in raw:
            raise UserError(f"section {section} is missing")
        try:
            clean[section] = _check_section(section, raw[section])
        except ValueError as error:
            raise UserError(str(error)) from None
    _check_together(clean)
    return clean


def _check_section(section, given):
    """A checked copy of one section. Raises: ValueError."""
    if section in SCHEMA:
        return checked(section, given, SCHEMA[section])
    if section == "lora" and given is None:
        return None
    prefix = section + "."
    schema = {name.removeprefix(prefix): accepts for name, accepts in SCHEMA.items()
              if name.startswith(prefix)}
    complete = with_defaults(checked(section, given, mapping), prefix)
    clean = check_settings(complete, schema, prefix)
    for key in schema:
        if key not in complete:
            raise ValueError(f"{section}.{key} is missing")
    return clean


def with_defaults(settings, prefix=""):
    """Settings of a YAML or a run, plus those keys of DEFAULTS under the prefix ("ppo.") that they
    lack: they may be older than the key."""
    newer = {name.removeprefix(prefix): value for name, value in DEFAULTS.items()
             if name.startswith(prefix)}
    return {**newer, **settings}


def _check_together(clean):
    """Raises: UserError for settings of which each is right, but not with the others."""
    model = clean["model"]
    if clean["lora"] is None and model["quantization"] != "none":
        raise UserError("lora: null tunes all parameters, which needs model.quantization=none")
    if clean["lora"] is None and model["dtype"] != "float32":
        raise UserError("lora: null tunes the weights themselves; 16 bits would round most steps "
                        "away: model.dtype=float32")
    if clean["sft"]["init_step"] > clean["sft"]["steps"]:
        raise UserError("sft.init_step: Init is a step of the SFT run, "
                        "so it cannot exceed sft.steps")
    temperatures = list(map(str, clean["eval"]["temperatures"]))
    if len(set(temperatures)) < len(temperatures):
        raise UserError("eval.temperatures: one of them stands there twice")
    for name in NOT_EMPTY:
        section, key = name.split(".")
        if not clean[section][key]:
            raise UserError(f"{name} is empty")


def find_model(path):
    """A local model folder (tried as given, then in the repository), or a hub name unchanged."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_dir():
            return str(candidate)
    return path
