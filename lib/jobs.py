"""Jobs side by side: each a process of its own, started when what it needs is there. No torch.

    SUITE/logs/NAME.log    what a job printed, since it was last started
    SUITE/jobs.jsonl       a line per job that ended: {job, seconds, ended: "" or what went wrong}

A job that fails takes those that need it with it, no others. Ctrl-C or SIGTERM reaches the children
as SIGTERM, once: they finish the step under way and save it. A second one ends them at once.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lib.errors import Terminated
from lib.progress import EVERY
from lib.runs import append_line, on_first_signal, writing

PAUSE = 0.2  # seconds between two looks at the children
PATIENCE = 60  # seconds for a child that was told twice to end
RESUMED = 20  # seconds: a job that is over sooner was done before, and says nothing of the pace


def cores():
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Child:
    """The process of a Job; told: to end. Raises: UserError if its log cannot be written."""

    def __init__(self, job, folder):
        self.job, self.started, self.told = job, time.monotonic(), False
        self.log = folder / "logs" / (re.sub(r"\W+", "_", job.name) + ".log")
        with writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "wb") as output:
                self.process = subprocess.Popen(
                    job.words(sys.executable), stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True)  # a terminal's Ctrl-C is passed on, not doubled

    def seconds(self):
        return time.monotonic() - self.started

    def last_line(self):
        """The last line of the log that says anything."""
        with open(self.log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def failure(self):
        """What went wrong, "" if nothing did."""
        code = self.process.returncode
        if code == 0:
            return ""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        last = self.last_line()
        return last if last.startswith("error: ") else f"exit code {code}, see {self.log}"


class Crew:
    """Runs jobs, as many at a time as there are `places`, in their order as far as they can.

    Args: jobs: lib/suite.py's Jobs; folder: of the suite; board: says how far it is.
    Attributes: over: {Job: "" or what went wrong}.
    """

    def __init__(self, jobs, folder, places, board):
        self.folder, self.places, self.board = Path(folder), places, board
        self.waiting, self.running, self.over = list(jobs), [], {}
        self.stop = None  # the exception that a signal asks for
        self.planned = self.spent = 0.0  # minutes of the jobs that ended, for the clock

    def run(self):
        """Until nothing is left that can run.

        Raises: KeyboardInterrupt (Terminated) when all children have ended after a signal;
            UserError if nothing can be written. No child is left running in any case.
        """
        def react(number):
            self.stop = Terminated if number == signal.SIGTERM else KeyboardInterrupt

        try:
            with on_first_signal(react):
                while self.running or self.waiting and not self.stop:
                    self._start()
                    self.board.show(self._lines())
                    time.sleep(PAUSE)
                    self._collect()
        finally:
            self._end()
        if self.stop:
            raise self.stop("stopped; run the same command again to continue")

    def _start(self):
        """What can be started; after a signal, tell the children instead."""
        if self.stop:
            for child in self.running:
                if not child.told:
                    child.told = True
                    child.process.terminate()
            return
        for job in list(self.waiting):
            if any(self.over.get(other) for other in job.needs):
                self._drop(job)
            elif len(self.running) < self.places and self._ready(job):
                self.waiting.remove(job)
                self.running.append(Child(job, self.folder))

    def _ready(self, job):
        there = all(self.over.get(other) == "" for other in job.needs)
        return there and all(other in self.over for other in job.waits)

    def _drop(self, job):
        """A job that needs a failed one."""
        self.waiting.remove(job)
        failed = [other.name for other in job.needs if self.over.get(other)]
        self.over[job] = f"needs {failed[0]}"

    def _collect(self):
        """Note the children that have ended."""
        for child in list(self.running):
            if child.process.poll() is None:
                continue
            self.running.remove(child)
            ended = child.failure()
            if self.stop and ended:
                ended = "stopped"
            self.over[child.job] = ended
            append_line(self.folder / "jobs.jsonl", {
                "job": child.job.name, "seconds": round(child.seconds(), 1), "ended": ended})
            if child.seconds() > RESUMED:
                self.planned += child.job.minutes
                self.spent += child.seconds() / 60
            took = f"{child.seconds() / 60:.1f} min"
            self.board.say(f"{child.job.name}: {ended or 'done'} ({took})")

    def _end(self):
        """End the children that are still there."""
        for child in self.running:
            child.process.terminate()
        for child in self.running:
            try:
                child.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    # ------------------------------------------------------------ how far it is
    def _lines(self):
        """One per running job, and the clock."""
        lines = [f"{child.job.name}: {child.last_line()}" for child in self.running]
        done = sum(ended == "" for ended in self.over.values())
        jobs = len(self.over) + len(self.running) + len(self.waiting)
        return [*lines, f"{done} of {jobs} jobs done, about {self.minutes_left():.0f} min left"]

    def minutes_left(self):
        """By the minutes planned and the pace so far, if all places are busy to the end."""
        left = sum(job.minutes for job in self.waiting)
        for child in self.running:
            left += max(0, child.job.minutes - child.seconds() / 60)
        pace = self.spent / self.planned if self.planned else 1
        return left * pace / self.places


class Board:
    """Lines on stderr: in place on a terminal, else now and then."""

    def __init__(self):
        self.shown, self.said_at = 0, time.monotonic()

    def show(self, lines):
        """Lines that take the place of those shown before."""
        if sys.stderr.isatty():
            self._clear()
            width = shutil.get_terminal_size().columns - 1
            for line in lines:
                print(line[:width], file=sys.stderr)
            self.shown = len(lines)
        elif time.monotonic() - self.said_at >= EVERY:
            self.said_at = time.monotonic()
            print(*lines, sep="\n", file=sys.stderr)

    def say(self, line):
        """A line that stays."""
        self._clear()
        print(line, file=sys.stderr)

    def _clear(self):
        if self.shown:
            print(f"\x1b[{self.shown}F\x1b[J", end="", file=sys.stderr)
        self.shown = 0


def minutes_by_job(folder):
    """{job: minutes in all its sessions}, from jobs.jsonl."""
    path, found = Path(folder) / "jobs.jsonl", {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            found[record["job"]] = found.get(record["job"], 0) + record["seconds"] / 60
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a full disk
    return found
