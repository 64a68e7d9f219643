"""A run's folder: what is logged, and checkpoints that appear whole or not at all. No torch in this file."""
import json
import os
import shutil
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from lib.settings import ELSEWHERE, INF, USES, UserError, arm_name


class Run:
    """One arm's folder: config.yaml, metrics.jsonl, transcripts.jsonl and step_N/ checkpoints; after Ctrl-C a stopped_N/.

    Opening it again continues it: lines logged after the last whole checkpoint are dropped.
    Raises: UserError if the folder belongs to other settings.
    """

    def __init__(self, script, raw, overrides):
        self.dir = Path(raw["run"]["dir"]) / arm_name(script, overrides)
        sections = {s: raw[s] for s in (*USES[script], "run")}
        stored = self.dir / "config.yaml"
        if stored.exists():
            self._compare(stored, sections)
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: cannot make {self.dir}: {error.strerror}") from None
        for leftover in self.dir.glob(".tmp_*"):
            shutil.rmtree(leftover)
        if not stored.exists():
            write_atomic(stored, yaml.safe_dump(sections, sort_keys=False))
        self.step, self.last = max(checkpoints(self.dir) + checkpoints(self.dir, "stopped"), default=(0, None))
        self.stopping = None  # after Ctrl-C: what is being finished
        for name in ("metrics.jsonl", "transcripts.jsonl"):
            path = self.dir / name
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            lines = text.split("\n")  # not splitlines: answers may hold other line separators
            kept = [line for line in lines if _step_of(line) <= self.step]
            if len(kept) != len(lines) - 1:
                write_atomic(path, "".join(line + "\n" for line in kept))

    def _compare(self, stored, sections):
        try:
            old = _flat(yaml.safe_load(stored.read_text()))
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError):
            raise UserError(f"{stored} is unreadable; choose another run.dir") from None
        new = _flat(sections)
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key) and key not in ELSEWHERE:
                raise UserError(f"{self.dir} holds a run with {key} = {old.get(key)}, not {new.get(key)}; "
                                "choose another run.dir (nothing was changed)")

    def log(self, name, record):
        """Append one JSON object to name.jsonl."""
        with open(self.dir / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    @contextmanager
    def stoppable(self, unit):
        """Around the training loop: the first Ctrl-C sets `stopping`, so that the `unit` under way is finished and saved
        before `checkpoint` stops the run; a second one stops at once."""
        def finish(*_):
            signal.signal(signal.SIGINT, previous)
            self.stopping = unit
            line = "\n" * sys.stderr.isatty() + f"finishing this {unit}, then saving; Ctrl-C again stops at once\n"
            os.write(2, line.encode())  # print may not be called while another print is interrupted

        previous = signal.getsignal(signal.SIGINT)
        ours = previous is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        if ours:  # not where Ctrl-C is ignored, as by nohup
            signal.signal(signal.SIGINT, finish)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGINT, previous)

    @contextmanager
    def checkpoint(self, step, regular=True):
        """A folder to write into that becomes step_N/ only when all of it is on disk.

        One that is there only because of Ctrl-C, not `regular`, is no point of a curve: stopped_N/, until the next one.
        Raises: KeyboardInterrupt when it is written, after Ctrl-C.
        """
        final = self.dir / f"{'step' if regular else 'stopped'}_{step}"
        with written_whole(final) as folder:
            yield folder
        for _, old in checkpoints(self.dir, "stopped"):
            if old != final:
                shutil.rmtree(old)
        if self.stopping:
            raise KeyboardInterrupt(f"stopped after {self.stopping} {step}; run the same command again to continue")


def _flat(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return INF  # a line cut off in the middle


def checkpoints(folder, kind="step"):
    """[(N, path)] of the step_N (or stopped_N) folders, in order of N."""
    found = [(p.name[len(kind) + 1:], p) for p in Path(folder).glob(f"{kind}_*")]
    return sorted((int(n), p) for n, p in found if n.isdigit())


@contextmanager
def written_whole(folder):
    """A temporary folder to write into that becomes `folder`, or replaces it, only when all of it is on disk."""
    new, old = (folder.with_name(f".tmp_{age}_{folder.name}") for age in ("new", "old"))
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
