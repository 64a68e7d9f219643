"""The folder of a run: what is logged and kept, and how a run continues. No torch in this file.

    run.dir/sft/, run.dir/rl/       one folder per arm; rl-ppo.clip=0.3/ if set on the command line
        config.yaml                 the settings that shape the arm; it continues with these alone
        metrics.jsonl               a JSON object per step or update: see sft.py and rl.py
        transcripts.jsonl           some answers of each update, a JSON object each (rl.py)
        step_N/                     the checkpoint after N steps or updates
            adapter_model.safetensors, adapter_config.json: LoRA in peft's own format;
            value_head.safetensors; versions.txt of the libraries (Policy.save)
            trainer.pt: optimizer, environments, counters (lib/training.py)
        stopped_N/                  the same, saved because of Ctrl-C; goes with the next checkpoint
        .tmp_new_step_N/            a checkpoint that is being written

A checkpoint appears whole or not at all. Lines logged after the last one are dropped when the run
continues, as those steps are done again.
"""
import json
import os
import re
import shutil
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from lib.checks import INF
from lib.settings import MAY_CHANGE, UserError, with_defaults

ARM_SECTIONS = {  # what shapes each arm
    "sft": ("env", "model", "lora", "sft"),
    "rl": ("env", "model", "lora", "ppo"),
}


def arm_name(script, overrides):
    """'sft' or 'rl', plus the command line's own settings of that arm: rl-ppo.verify_iters=1."""
    parts = [script]
    for override in sorted(overrides):
        name = override.partition("=")[0]
        section = name.partition(".")[0]
        if section in ARM_SECTIONS[script] and name not in MAY_CHANGE:
            parts.append(re.sub(r"[^\w.=,+-]", "_", override))
    return "-".join(parts)


class Run:
    """One arm's folder, opened to start it or to continue it.

    Args: script: "sft" or "rl"; raw: the nested settings; overrides: those of the command line.
    Attributes: step, last: number and folder of the last checkpoint, 0 and None if there is none;
        stopping: after Ctrl-C, what is being finished ("update"), else None.
    Raises: UserError if the folder belongs to other settings or cannot be made.
    """

    def __init__(self, script, raw, overrides):
        self.dir = Path(raw["run"]["dir"]) / arm_name(script, overrides)
        self._claim({section: raw[section] for section in (*ARM_SECTIONS[script], "run")})
        for leftover in self.dir.glob(".tmp_*"):
            shutil.rmtree(leftover)
        saved = checkpoints(self.dir) + checkpoints(self.dir, "stopped")
        self.step, self.last = max(saved, default=(0, None))
        self.stopping = None
        for name in ("metrics.jsonl", "transcripts.jsonl"):
            _drop_lines_after(self.step, self.dir / name)

    def _claim(self, settings):
        """Make the folder and note its settings, or see that it is a run of the same ones."""
        path = self.dir / "config.yaml"
        if path.exists():
            self._compare(_read_settings(path), _flat(settings))
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: cannot make {self.dir}: {error.strerror}") from None
        write_atomic(path, yaml.safe_dump(settings, sort_keys=False))

    def _compare(self, old, new):
        old, new = with_defaults(old), with_defaults(new)  # a run may be older than a key
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key) and key not in MAY_CHANGE:
                raise UserError(f"{self.dir} holds a run with {key} = {old.get(key)}, not "
                                f"{new.get(key)}; choose another run.dir (nothing was changed)")

    def log(self, name, record):
        """Append one JSON object to name.jsonl."""
        with open(self.dir / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def stoppable(self, unit):
        """Context of the training loop: Ctrl-C lets the `unit` under way ("update") be finished.

        It sets `stopping`: the loop saves, and `checkpoint` ends the run. A second stops at once.
        """
        def react():
            self.stopping = unit
            line = f"finishing this {unit}, then saving; Ctrl-C again stops at once\n"
            if sys.stderr.isatty():
                line = "\n" + line  # below the progress bar
            os.write(2, line.encode())  # print may not be called while a print is interrupted
        return on_first_ctrl_c(react)

    @contextmanager
    def checkpoint(self, step, regular=True):
        """A folder to write into that becomes step_N/ only when all of it is on disk.

        One that is not `regular`, there only because of Ctrl-C, is no point of a curve: it is
        called stopped_N/ and goes with the next checkpoint.
        Raises: KeyboardInterrupt when it is written, after Ctrl-C.
        """
        kind = "step" if regular else "stopped"
        final = self.dir / f"{kind}_{step}"
        with written_whole(final) as folder:
            yield folder
        for _, old in checkpoints(self.dir, "stopped"):
            if old != final:
                shutil.rmtree(old)
        if self.stopping:
            raise KeyboardInterrupt(f"stopped after {self.stopping} {step}; "
                                    "run the same command again to continue")


def checkpoints(folder, kind="step"):
    """[(N, path)] of the step_N (or stopped_N) folders, in order of N."""
    found = []
    for path in Path(folder).glob(f"{kind}_*"):
        number = path.name.removeprefix(f"{kind}_")
        if number.isdigit():
            found.append((int(number), path))
    return sorted(found)


# ---------------------------------------------------------------- what is on disk
def _read_settings(path):
    """{dotted key: value} of a config.yaml. Raises: UserError if it is none."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is unreadable; choose another run.dir")
    return _flat(settings)


def _flat(settings, prefix=""):
    """{dotted key: value} of nested settings."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _drop_lines_after(step, path):
    """Keep the lines of a log up to that step; the last line may be cut off, by a kill."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")  # not splitlines: answers may hold other line separators
    kept = "".join(line + "\n" for line in lines if _step_of(line) <= step)
    if kept != text:
        write_atomic(path, kept)


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return INF  # cut off in the middle, or empty


@contextmanager
def written_whole(folder):
    """A new folder to write into that becomes `folder`, or replaces it, when all is on disk."""
    new = folder.with_name(f".tmp_new_{folder.name}")
    old = folder.with_name(f".tmp_old_{folder.name}")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    with suppress(FileNotFoundError):
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_atomic(path, text):
    """Write a text file that is either the old or the new one, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------- Ctrl-C
@contextmanager
def on_first_ctrl_c(react):
    """Inside, the first Ctrl-C calls react(); the next one raises KeyboardInterrupt as usual.

    Not where Ctrl-C is ignored, as by nohup, nor in a thread, where Python allows no handler.
    """
    previous = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if previous is not signal.default_int_handler or not in_main_thread:
        yield
        return

    def handler(number, frame):
        signal.signal(signal.SIGINT, previous)
        react()

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
