"""Pack runs without their weights: what eval.py needs to make its tables of them again.

    python tools/pack_runs.py results/episodes runs/s1 runs/s2    results/episodes/s1.tar.xz, ...
    tar xf results/episodes/s1.tar.xz -C runs                     the folder again, without weights

Of each training its settings, its log (numbers to four digits) and, of every checkpoint, what it
had spent; of the run every episode that eval.py has played (evaluations.jsonl). So tables and
intervals can be computed again, other runs pooled with these (eval.runs), or another measure of
uncertainty tried. What was not played cannot be: there is nothing to play it with.
"""
import argparse
import io
import json
import sys
import tarfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.errors import UserError, run_main
from lib.runs import checkpoints, writing
from lib.training import load_state

SPENT = ("tokens", "gflops", "official_extra", "official_gflops")


def short(log):
    """Lines of JSON with their floats to four digits."""
    lines = []
    for line in log.splitlines():
        record = json.loads(line, parse_float=lambda number: float(f"{float(number):.4g}"))
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)


def spent(checkpoint):
    """The bytes of a trainer.pt that says what was spent and that no weights are here."""
    state, file = load_state(checkpoint), io.BytesIO()
    torch.save({"optimizer": None, **{name: state[name] for name in SPENT}}, file)
    return file.getvalue()


class Packing:
    """A tar file that is being written; names and times are those of the run's own files."""

    def __init__(self, tar, run):
        self.tar, self.run = tar, run

    def add(self, path, content=None):
        """A folder, or a file with its own content or another one (bytes)."""
        entry = self.tar.gettarinfo(path, str(path.relative_to(self.run.parent)))
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        if path.is_dir():
            self.tar.addfile(entry)
            return
        content = path.read_bytes() if content is None else content
        entry.size = len(content)
        self.tar.addfile(entry, io.BytesIO(content))

    def add_training(self, folder):
        self.add(folder / "config.yaml")
        log = folder / "metrics.jsonl"
        self.add(log, short(log.read_text(encoding="utf-8")).encode())
        for _, checkpoint in checkpoints(folder):
            self.add(checkpoint)  # with its time, by which its episodes are found
            self.add(checkpoint / "trainer.pt", spent(checkpoint))


def pack(run, out):
    """Write out/NAME.tar.xz of a run's folder. Raises: UserError if nothing was evaluated there."""
    played = run / "evaluations.jsonl"
    if not played.exists():
        raise UserError(f"{run} has no evaluations.jsonl: run eval.py first")
    target = out / f"{run.name}.tar.xz"
    with writing(target):
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w:xz") as tar:
            packing = Packing(tar, run)
            packing.add(played)
            for config in sorted(run.glob("*/config.yaml")):
                packing.add_training(config.parent)
    print(f"written: {target}, {target.stat().st_size / 2**10:.0f} KiB")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the packed runs")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs that eval.py has met")
    options = parser.parse_args(arguments)
    for run in options.runs:
        pack(run, options.out)


if __name__ == "__main__":
    run_main(main)
