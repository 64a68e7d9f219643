"""The folder of a run: what is logged and kept, and how a run continues. No torch in this file.

    run.dir/sft/, run.dir/rl/       one folder per arm; rl-ppo.clip=0.3/ if set on the command line
        .lock                       held by the process that writes here
        config.yaml                 the settings that shape the arm; it continues with these alone
        metrics.jsonl               a JSON object per step or update: see sft.py and rl.py
        transcripts.jsonl           some answers of each update, a JSON object each (rl.py)
        step_N/                     the checkpoint after N steps or updates
            adapter_model.safetensors, adapter_config.json: LoRA in peft's own format;
            value_head.safetensors; versions.txt of the libraries (Policy.save)
            trainer.pt: optimizer, environments, counters (lib/training.py)
        stopped_N/                  the same, saved because of Ctrl-C or SIGTERM; goes with the next
        .tmp_new_step_N/            a checkpoint that is being written

A checkpoint appears whole or not at all. Lines logged after the last one are dropped when the run
continues, as those steps are done again.
"""
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import yaml

from lib.checks import INF
from lib.errors import Terminated, UserError, one_line, terminate
from lib.progress import announce, warn_of_split
from lib.settings import MAY_CHANGE, ROOT, with_defaults

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

ARM_SECTIONS = {  # what shapes each arm
    "sft": ("env", "model", "lora", "sft"),
    "rl": ("env", "model", "lora", "ppo"),
}
LENGTHS = {"sft": "sft.steps", "rl": "ppo.updates"}  # may grow, under a constant learning rate
TRAINED_AT = "# trained at "  # in a config.yaml: a commit of the code
LONGEST_NAME = 255  # bytes of a file's name, on the usual systems
NAMELESS = (*MAY_CHANGE, *LENGTHS.values())  # name no arm


# ---------------------------------------------------------------- names of arms, and their start
def arm_name(script, overrides, init=""):
    """'sft' or 'rl', plus the command line's own settings of that arm: rl-ppo.verify_iters=1.

    Args: init: ppo.init; where sft's settings decide it (see `find_init`), they shape an rl arm.
    """
    sections = ARM_SECTIONS[script]
    if script == "rl" and _follows_sft(init, overrides):
        sections = (*sections, "sft")
    parts = [script]
    for override in sorted(overrides):
        name = override.partition("=")[0]
        section = name.partition(".")[0]
        if section in sections and name not in NAMELESS:
            parts.append(re.sub(r"[^\w.=,+-]", "_", override))
    name = "-".join(parts)
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(f"the arm's folder would be named by {len(name)} letters, {name[:60]}...: "
                        "set some of these keys in a copy of the YAML with a run.dir of its own")
    return name


def _follows_sft(init, overrides):
    """Whether ppo.init is the YAML's word for a checkpoint of whichever sft arm is meant."""
    given = any(override.startswith("ppo.init=") for override in overrides)
    return init.startswith("sft/") and not given


def find_init(run_dir, init, overrides, key="ppo.init"):
    """The folder of the checkpoint that a key names, None if that is "none".

    Where ppo.init is an sft/step_N of the YAML, it is looked for in the arm that sft.py makes of
    the same overrides (sft-sft.lr=5e-4), then in the one of those of the section `sft` alone: env,
    model and lora may differ between an arm and its start.
    Raises: UserError that says which checkpoints there are.
    """
    run_dir = Path(run_dir)
    if init == "none":
        return None
    names = [init]
    if key == "ppo.init" and _follows_sft(init, overrides):
        step = init.removeprefix("sft/")
        of_sft = [override for override in overrides if override.startswith("sft.")]
        names = [f"{arm_name('sft', given)}/{step}" for given in (overrides, of_sft)]
    for name in names:
        found = run_dir / name
        if not run_dir.is_dir():  # which `..` would go through
            found = Path(os.path.normpath(found))
        if found.is_dir():
            return found
    ways = _ways_to_start(run_dir, init, key)
    raise UserError(f"{key}: no checkpoint {run_dir / names[0]}; {ways}")


def _ways_to_start(run_dir, init, key):
    """What to do where a checkpoint is not there, in words."""
    there = []
    for folder in sorted(run_dir.glob("sft*")):
        there += [f"{folder.name}/{path.name}" for _, path in checkpoints(folder)]
    if not there:
        return "run sft.py with this configuration first"
    step = init.rpartition("/")[2]
    same_step = [name for name in there if name.endswith(f"/{step}")]
    best = (same_step or there)[0]
    others = [name for name in there if name != best]
    listed = ", ".join([best, *others[:7]])
    if others[7:]:
        listed += f" and {len(others) - 7} more"
    return f"give the overrides that sft.py had, or {key}={best}; there are {listed}"


# ---------------------------------------------------------------- the folder of an arm
class Run:
    """One arm's folder, to start it or to continue it; nothing is written before `begin`.

    Args: script: "sft" or "rl"; raw: the nested settings; overrides: those of the command line.
    Attributes: step, last: number and folder of the last checkpoint, 0 and None if there is none;
        init: folder of the checkpoint that the arm starts from, or None; stopping: after Ctrl-C
        or SIGTERM, what is being finished ("update"), else None.
    Raises: UserError if the folder belongs to other settings or to another process, or if there is
        no such init.
    """

    def __init__(self, script, raw, overrides):
        run_dir, init = Path(raw["run"]["dir"]), raw["ppo"]["init"]
        self.dir = run_dir / arm_name(script, overrides, init)
        self.settings = {section: raw[section] for section in (*ARM_SECTIONS[script], "run")}
        if script == "sft":
            self.init = find_init(run_dir, raw["sft"]["init"], overrides, "sft.init")
        else:
            if _follows_sft(init, overrides):  # the arm may be another than the YAML says
                self.init = self._known_start(run_dir, init)
                self.init = self.init or find_init(run_dir, init, overrides)
                init = str(self.init.relative_to(run_dir))
            else:
                self.init = find_init(run_dir, init, overrides)
            self.settings["ppo"] = {**raw["ppo"], "init": init}
        self.length = LENGTHS[script]
        self.stopping = self.stop = self.lock = self.last = None
        self.step = 0
        if self.dir.is_dir():
            self._open()

    def _known_start(self, run_dir, init):
        """The checkpoint of an sft arm that the run which is here began from, if it is of the step
        that ppo.init says, else None. (An arm that was made later may fit the overrides better.)"""
        path = self.dir / "config.yaml"
        if not path.exists():
            return None
        arm, _, step = read_settings(path)["ppo"]["init"].rpartition("/")
        of_sft = arm.startswith("sft") and "/" not in arm and step == Path(init).name
        return run_dir / arm / step if of_sft and (run_dir / arm / step).is_dir() else None

    def _open(self):
        """See that it is a run of the same settings, keep others out and find where it stands."""
        path = self.dir / "config.yaml"
        if path.exists():
            self._compare(flat_settings(read_settings(path)), flat_settings(self.settings))
        self.lock = hold(self.dir / ".lock")
        saved = checkpoints(self.dir) + checkpoints(self.dir, "stopped")
        self.step, self.last = max(saved, default=(0, None))

    def _compare(self, old, new):
        old, new = with_defaults(old), with_defaults(new)  # a run may be older than a key
        schedule = new[self.length.partition(".")[0] + ".schedule"]
        for key in sorted(set(old) | set(new)):
            if old.get(key) == new.get(key) or key in MAY_CHANGE:
                continue
            why = ""
            if key == self.length:
                if schedule == "constant":
                    continue
                why = f" (under a {schedule} schedule every learning rate depends on it)"
            raise UserError(f"{self.dir} holds a run with {key} = {old.get(key)}, not "
                            f"{new.get(key)}{why}; choose another run.dir (nothing was changed)")

    def goes_on(self, script, cfg):
        """Say what is about to be done. Returns: False if nothing is left to do."""
        section, _, key = self.length.partition(".")
        length = self.settings[section][key]
        if self.step >= length:
            print(f"{self.dir}: {self.step} {key} are done; more {self.length} go on from there")
            return False
        start = f", from {self.last or self.init}" if self.last or self.init else ""
        announce(script, cfg, f"-> {self.dir}{start}")
        warn_of_split(script, cfg)
        return True

    def begin(self):
        """Make the folder and note its settings, or sweep up after the run that is continued."""
        with writing(self.dir):
            self.dir.mkdir(parents=True, exist_ok=True)
            if self.lock is None:
                self._open()
            note_settings(self.dir / "config.yaml", self.settings)  # of MAY_CHANGE may be new
            for leftover in self.dir.glob(".tmp_*"):
                shutil.rmtree(leftover)
            for name in ("metrics.jsonl", "transcripts.jsonl"):
                _drop_lines_after(self.step, self.dir / name)

    def log(self, name, record):
        """Append one JSON object to name.jsonl."""
        append_line(self.dir / f"{name}.jsonl", record)

    def stoppable(self, unit):
        """Context of the training loop: Ctrl-C or SIGTERM lets the `unit` under way ("update") be
        finished.

        It sets `stopping`: the loop saves, and `checkpoint` ends the run. A second stops at once.
        """
        def react(number):
            self.stopping = unit
            self.stop, again = KeyboardInterrupt, "Ctrl-C again"
            if number == signal.SIGTERM:
                self.stop, again = Terminated, "a second signal"
            line = f"finishing this {unit}, then saving; {again} stops at once\n"
            if sys.stderr.isatty():
                line = "\n" + line  # below the progress bar
            os.write(2, line.encode())  # print may not be called while a print is interrupted
        return on_first_signal(react)

    @contextmanager
    def checkpoint(self, step, regular=True):
        """A folder to write into that becomes step_N/ only when all of it is on disk.

        One that is not `regular`, there only because of Ctrl-C, is no point of a curve: it is
        called stopped_N/ and goes with the next checkpoint.
        Raises: KeyboardInterrupt when it is written, after Ctrl-C (Terminated, after SIGTERM).
        """
        kind = "step" if regular else "stopped"
        final = self.dir / f"{kind}_{step}"
        with written_whole(final) as folder:
            yield folder
        for _, old in checkpoints(self.dir, "stopped"):
            if old != final:
                shutil.rmtree(old)
        if self.stopping:
            raise self.stop(f"stopped after {self.stopping} {step}; "
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
def hold(path):
    """Lock a file until this process ends, in whatever way. Returns: the open file, to be kept.

    The lock is the process's own (POSIX): a notebook may open its run again.
    Raises: UserError if another process holds it.
    """
    with writing(path):
        file = open(path, "a+", encoding="utf-8")
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read() or "another process"
        file.close()
        raise UserError(f"{path.parent} is in use by {holder}; wait for it, or choose another "
                        "run.dir") from None
    except OSError:  # a file system that knows no locks
        return file
    with suppress(OSError):  # who holds it is not worth an error
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
    return file


def read_settings(path):
    """The nested settings of a config.yaml. Raises: UserError if it is none."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is unreadable; choose another run.dir")
    return settings


def note_settings(path, settings):
    """Write a training's config.yaml, with the commits that it was trained at as comments."""
    commits = trained_at(path)
    if commit() not in commits:
        commits.append(commit())
    text = "".join(f"{TRAINED_AT}{one}\n" for one in commits)
    write_atomic(path, text + yaml.safe_dump(settings, sort_keys=False))


def trained_at(path):
    """The commits that a config.yaml names, in order; [] if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line.removeprefix(TRAINED_AT) for line in lines if line.startswith(TRAINED_AT)]


@cache
def commit():
    """Of the code, as git tells it; "unknown" where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = ""
    with suppress(OSError):
        found = subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout.strip()
    return found or "unknown"


def flat_settings(settings, prefix=""):
    """{dotted key: value} of nested settings."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flat_settings(value, f"{prefix}{key}."))
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


# How safetensors and tokenizers (Rust), and torch.save, say that a file cannot be written
FAILED_WRITE = re.compile(r"os error \d+|inline_container|PytorchStreamWriter")


@contextmanager
def writing(path):
    """A failure to write inside (a full disk, above all) becomes a UserError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not FAILED_WRITE.search(str(error)):
            raise
        reason = getattr(error, "strerror", None) or f"is the disk full? ({one_line(error)})"
        raise UserError(f"cannot write {path}: {reason}; mend that and run the same command again "
                        "(the last checkpoint is intact)") from None


@contextmanager
def written_whole(folder):
    """A new folder to write into that becomes `folder`, or replaces it, when all is on disk.

    Raises: UserError if it cannot be written; `folder` is then as it was.
    """
    new = folder.with_name(f".tmp_new_{folder.name}")
    old = folder.with_name(f".tmp_old_{folder.name}")
    with writing(folder):
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
        except BaseException:  # give back what it took of a full disk
            shutil.rmtree(new, ignore_errors=True)
            raise
        with suppress(FileNotFoundError):
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)


def write_atomic(path, text):
    """Write a text file that is either the old or the new one, never half. Raises: UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def append_line(path, record):
    """Append one JSON object to a JSON Lines file. Raises: UserError if it cannot be written."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- Ctrl-C and SIGTERM
@contextmanager
def on_first_signal(react):
    """Inside, the first Ctrl-C or SIGTERM calls react(its number); the next does what it did.

    Not where Ctrl-C is ignored, as in the background, nor in a thread, where Python allows no
    handler.
    """
    previous = {}

    def handler(number, frame):
        restore()
        react(number)

    def restore():
        for number, before in previous.items():
            signal.signal(number, before)

    usual = {signal.SIGINT: (signal.default_int_handler,),
             signal.SIGTERM: (signal.SIG_DFL, terminate)}
    if threading.current_thread() is threading.main_thread():
        for number, handlers in usual.items():
            if signal.getsignal(number) in handlers:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        restore()
