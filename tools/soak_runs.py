"""Faults that real use brings to runs, by the dozen: kills, rivals, full disks, damaged files.

    python tools/soak_runs.py [--kills 50 --rivals 20 --full 20 --damages 100 --seed 0]

Everything runs in processes of their own, on a tiny configuration. They are forked from this one,
which has imported the libraries already.

kills     sft.py and rl.py are killed (kill -9) at random moments and started again until they end
rivals    two processes train in one folder: one does, the other ends with one line and exit code 2
full      files cannot grow beyond a random size: one line and exit code 2; then without the limit
damages   half configurations, half checkpoints: each one line and exit code 2

After kills, rivals and full disks the run is the one that nobody disturbed: metrics (but for times
and memory), transcripts, checkpoints and, byte for byte, the last weights. Prints what failed and a
summary; exit code 1 if anything did.
"""
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that ours are found
import torch
import yaml
from safetensors.torch import load_file, save_file

import rl
import sft
from lib.errors import run_main
from lib.runs import checkpoints
from lib.settings import ROOT, SCHEMA, override

MAIN = {"sft": sft.main, "rl": rl.main}
TINY = ("sft.steps=12", "sft.warmup=0", "sft.init_step=2", "sft.save_every=3", "sft.batch_size=8",
        "ppo.init=sft/step_2", "ppo.updates=6", "ppo.save_every=2", "ppo.temperature=0.7",
        "ppo.envs=6", "ppo.turns=2", "ppo.minibatch=4", "ppo.epochs=2")
LONGER = {"sft": "sft.steps=13", "rl": "ppo.updates=7"}  # so that a finished run is loaded again
FILES = ("adapter_model.safetensors", "value_head.safetensors", "trainer.pt")  # of a checkpoint
INIT_FILES = ("adapter_model.safetensors", "trainer.pt")  # that PPO starts from
FAILURES = []


def expect(holds, what):
    """Note what failed, and go on."""
    if not holds:
        FAILURES.append(what)
        print(f"FAILED: {what}", flush=True)


# ---------------------------------------------------------------- processes
class Ended(NamedTuple):
    """A process that is over."""
    code: int  # -9: killed
    said: list  # lines on stderr

    def refused(self, word=""):
        """Whether it ended as a user error does: one line, beside the first."""
        errors = [line for line in self.said if line.startswith("error: ")]
        others = [line for line in self.said if line not in errors]
        announced = all(line.startswith(("sft.py: ", "rl.py: ")) for line in others)
        return self.code == 2 and len(errors) == 1 and announced and word in errors[0]


class Process:
    """A script under way."""

    def __init__(self, script, *arguments, file_size=None):
        self.log = tempfile.TemporaryFile()
        self.began = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(script, arguments, file_size)

    def _run(self, script, arguments, file_size):
        """In the child: the script as its command would run it; never returns."""
        code = 1
        try:
            os.dup2(self.log.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.argv = [f"{script}.py", *map(str, arguments)]
            if file_size is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError instead
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            run_main(MAIN[script])
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def kill_after(self, seconds):
        """kill -9 so many seconds after its start, if it still runs."""
        time.sleep(max(0, self.began + seconds - time.monotonic()))
        os.kill(self.pid, signal.SIGKILL)  # a child that ended stays until it is waited for

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines()
        return Ended(os.waitstatus_to_exitcode(status), lines)


# ---------------------------------------------------------------- runs
class Place:
    """Where the runs lie, and the one that nobody disturbs."""

    def __init__(self, folder):
        self.folder = folder
        settings = yaml.safe_load((ROOT / "configs" / "mini" / "gp_l.yaml").read_text())
        for argument in TINY:
            override(settings, argument)
        self.settings = settings
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(settings, sort_keys=False))
        self.whole = folder / "whole"
        self.seconds = {}  # that a run takes
        for script in MAIN:
            began = time.monotonic()
            ended = self.start(script, self.whole).wait()
            self.seconds[script] = time.monotonic() - began
            if ended.code != 0:
                raise SystemExit("\n".join(["the undisturbed run failed", *ended.said]))

    def start(self, script, run_dir, *more, **options):
        return Process(script, self.config, f"run.dir={run_dir}", *more, **options)

    def fresh(self, script, whole=False):
        """A run folder with what the script starts from, or with all of the undisturbed run."""
        run_dir = self.folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        if whole:
            shutil.copytree(self.whole, run_dir)
        elif script == "rl":
            shutil.copytree(self.whole / "sft", run_dir / "sft")
        return run_dir

    def expect_whole(self, script, run_dir, after):
        """The run is the undisturbed one."""
        one, two = run_dir / script, self.whole / script
        for name in ("metrics", "transcripts"):
            expect(logged(one, name) == logged(two, name), f"{after}: other {name}")
        steps = [number for number, _ in checkpoints(one)]
        expect(steps == [number for number, _ in checkpoints(two)], f"{after}: steps {steps}")
        for path in checkpoints(two)[-1][1].glob("*.safetensors"):
            same = path.read_bytes() == (checkpoints(one)[-1][1] / path.name).read_bytes()
            expect(same, f"{after}: other weights in {path.name}")


def logged(folder, name):
    """Records of a log, but for what depends on the machine's mood."""
    path = folder / f"{name}.jsonl"
    records = []
    if path.exists():
        records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    for record in records:
        record.pop("seconds", None)
        record.pop("peak_memory_gib", None)
    return records


# ---------------------------------------------------------------- the faults
def soak_kills(place, count, rng):
    """Kill `count` processes at random moments; each run goes on until it ends."""
    kills = runs = 0
    while kills < count:
        script = ("sft", "rl")[runs % 2]
        run_dir = place.fresh(script)
        runs += 1
        while True:
            process = place.start(script, run_dir)
            if kills < count:
                process.kill_after(rng.uniform(0, place.seconds[script]))
            ended = process.wait()
            kills += ended.code == -9
            if ended.code != -9:
                break
        after = f"{script}.py, killed until kill {kills}"
        expect(ended.code == 0, f"{after}: exit code {ended.code}, {ended.said[-1:]}")
        place.expect_whole(script, run_dir, after)
    return f"{kills} kills in {runs} runs"


def soak_rivals(place, count, rng):
    """Two processes, `count` times, the second a random moment after the first."""
    for number in range(count):
        script = ("sft", "rl")[number % 2]
        run_dir = place.fresh(script)
        first = place.start(script, run_dir)
        time.sleep(rng.uniform(0, place.seconds[script] / 3))
        second = place.start(script, run_dir)
        ends = sorted([first.wait(), second.wait()])
        after = f"{script}.py with a rival, number {number}"
        codes = [end.code for end in ends]
        refused = ends[1].refused("is in use by")
        expect(codes == [0, 2] and refused, f"{after}: {codes}, {ends[1].said}")
        place.expect_whole(script, run_dir, after)
    sweep = place.fresh("sft")
    arms = [place.start("sft", sweep, f"sft.weight_decay={share}") for share in (0.0, 0.1, 0.2)]
    codes = [arm.wait().code for arm in arms]
    expect(codes == [0, 0, 0], f"three arms at once: {codes}")
    return f"{count} pairs in one folder, a sweep of {len(arms)} side by side"


def soak_full(place, count, rng):
    """`count` times, files cannot grow beyond a random size: that of some file, or a bit less."""
    for number in range(count):
        script = ("sft", "rl")[number % 2]
        run_dir = place.fresh(script)
        files = [path for path in (place.whole / script).rglob("*") if path.is_file()]
        largest = max(path.stat().st_size for path in files)
        limit = max(1000, int(largest ** rng.uniform(0.3, 0.99)))  # what is said has room
        ended = place.start(script, run_dir, file_size=limit).wait()
        after = f"{script}.py with files up to {limit} bytes"
        expect(ended.refused("cannot write"), f"{after}: {ended}")
        place.start(script, run_dir).wait()
        place.expect_whole(script, run_dir, after)
    return f"{count} full disks"


# ---------------------------------------------------------------- damage
WRONG = ("[", "{", "*nowhere", "&a", "!!python/object/apply:os.system [ls]", "'", "\t- a", "- - :",
         ".nan", "-1e999", "{a: 1, a: 2}", "[[]]", "2001-99-99", '"\\0"', "? ")


def malformed(text, rng):
    """(what was done, a configuration as bytes that is surely wrong)."""
    lines = text.splitlines()
    keys = [name for name in SCHEMA if "." in name]
    section, key = rng.choice(keys).split(".")
    start = lines.index(f"{section}:")
    at = next(n for n in range(start, len(lines)) if lines[n].startswith(f"  {key}:"))
    value = rng.choice(WRONG)
    ways = {
        "cut off": text.encode()[:rng.randrange(len(text) - len("  seed: 0\n") - 1)],
        "bytes": text.encode() + bytes([rng.randrange(128, 256)]),
        f"no {section}": "\n".join(line for line in lines if line != f"{section}:").encode(),
        f"{section}.{key} twice": "\n".join(lines[:at] + lines[at:at + 1] + lines[at:]).encode(),
        f"{section}.{key}x": text.replace(lines[at], f"  {key}x: 1", 1).encode(),
        f"{section}.{key}: {value}": "\n".join(
            [*lines[:at], f"  {key}: {value}", *lines[at + 1:]]).encode(),
        "a tab": "\n".join([*lines[:at], "\t" + lines[at], *lines[at + 1:]]).encode(),
        "deep": (text + "\n" + "[" * 5000).encode(),
    }
    return rng.choice(list(ways.items()))


def damage(folder, names, rng):
    """Damage one of a checkpoint's files. Returns: what was done."""
    path = folder / rng.choice(names)
    data = path.read_bytes()
    ways = {
        "gone": None,
        "empty": b"",
        "cut off": data[:rng.randrange(1, len(data))],
        "garbled": rng.randbytes(64) + data[64:],
        "another file": (folder / "versions.txt").read_bytes(),
        "of another kind": other_kind(path, rng),
    }
    way, changed = rng.choice(list(ways.items()))
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    return f"{path.parent.parent.name}/{path.parent.name}/{path.name} {way}"


def other_kind(path, rng):
    """A whole file of the same format that does not fit, as bytes."""
    other = path.with_name("other")
    if path.name == "trainer.pt":
        torch.save(rng.choice([{"tokens": 5}, [1, 2], {}]), other)
    else:
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name][None].clone()  # (1, ...)
        save_file(tensors, other)
    data = other.read_bytes()
    other.unlink()
    return data


def soak_damages(place, count, rng):
    """Half malformed configurations, half damaged checkpoints that a run would go on from."""
    text = yaml.safe_dump(place.settings, sort_keys=False, width=10**6)
    broken = place.folder / "broken.yaml"
    for number in range(count):
        script = rng.choice(["sft", "rl"])
        if number % 2:
            what, data = malformed(text, rng)
            broken.write_bytes(data)
            process = Process(script, broken, f"run.dir={place.fresh(script)}")
        else:
            run_dir = place.fresh(script, whole=True)
            _, last = checkpoints(run_dir / script)[-1]
            places = {last: FILES}
            if script == "rl":
                places[run_dir / "sft" / "step_2"] = INIT_FILES
            folder, names = rng.choice(list(places.items()))
            what = damage(folder, names, rng)
            process = place.start(script, run_dir, LONGER[script])
        ended = process.wait()
        expect(ended.refused(), f"{script}.py with damage ({what}): {ended}")
    return f"{count} damages"


def main():
    """Disturb runs in every way above."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    soaks = {"kills": (soak_kills, 50), "rivals": (soak_rivals, 20), "full": (soak_full, 20),
             "damages": (soak_damages, 100)}
    for name, (_, count) in soaks.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # forked processes inherit no threads
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for name, (soak, _) in soaks.items():
            count = getattr(arguments, name)
            if count:
                began = time.monotonic()
                summary = soak(place, count, random.Random(f"{name} {arguments.seed}"))
                print(f"{summary}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(FAILURES)} failures")
    sys.exit(1 if FAILURES else 0)


if __name__ == "__main__":
    main()
