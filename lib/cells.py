"""What eval.py has played, kept in a run's evaluations.jsonl.

A line is a cell: {key: what was played, made_by: with what, episodes: [{cluster, counts, grades},
..]}. It is used again if both are the same as now. Of the code, comments and layout do not count.
"""
import ast
import hashlib
import json
import os
import platform
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path

from tqdm import tqdm

from lib.runs import append_line, write_atomic
from lib.settings import ROOT, find_model
from lib.weights import model_folder

PLAYERS = ("rollout", "policy")  # the modules that, with all they import, decide what is played
KL = (*PLAYERS, "lib.divergence")  # and those that decide how far it is from Init
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "Pillow")
LARGE = 2**26  # bytes: larger files are known by size and time, smaller ones by what they hold


class Cells:
    """The cells of one evaluations.jsonl. Of those in it, only lines that can be read are kept."""

    def __init__(self, path):
        self.path = path
        self.known = {}  # key as JSON -> [(made_by, episodes)], the latest last
        self.said = set()  # whose cells were told to be played again
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        kept = []
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # cut off by a kill
                cell = json.loads(line)
                self._remember(cell["key"], cell.get("made_by", {}), cell["episodes"])
                kept.append(line + "\n")
        if "".join(kept) != text:
            write_atomic(path, "".join(kept))

    def _remember(self, key, made_by, episodes):
        self.known.setdefault(json.dumps(key), []).append((made_by, episodes))

    def find(self, key, made_by):
        """The episodes played for a key by the same means, the latest ones, None if they must be
        played.

        A means that is None is not known here, so it may be any.
        """
        known = self.known.get(json.dumps(key), [])
        for before, episodes in reversed(known):
            if not changes(before, made_by):
                return episodes
        if known:
            latest, _ = known[-1]
            others = " and ".join(changes(latest, made_by))
            self._say(f"other {others}" if latest else "an older version")
        return None

    def _say(self, maker):
        if maker not in self.said:
            self.said.add(maker)
            tqdm.write(f"{self.path}: what {maker} made is played again", file=sys.stderr)

    def add(self, key, made_by, episodes):
        self._remember(key, made_by, episodes)
        append_line(self.path, {"key": key, "made_by": made_by, "episodes": episodes})


def changes(before, made_by):
    """The means that are known and others than before."""
    return [part for part, now in made_by.items() if now is not None and before.get(part) != now]


# ---------------------------------------------------------------- with what a cell was made
def made_by(env, model=None, modules=PLAYERS):
    """What decides a cell beside its key.

    Args: env: settings of the environment; model: cfg.model as for the Policy, None without one;
        modules: whose code decides it.
    Returns: {what: text}, None for a model whose files are not here.
    """
    means = {"code": code_digest(ROOT, modules), "libraries": versions(), "data": data_digest(env)}
    if model is not None:
        means["model"] = model_digest(model)
    return means


@cache
def code_digest(root, modules=PLAYERS):
    """Of the modules in a folder and of all that they import there."""
    finder = ModuleFinder(path=[str(root)])
    for name in modules:
        finder.import_hook(name)
    digest = hashlib.sha256()
    for name, module in sorted(finder.modules.items()):
        if module.__file__:
            tree = ast.parse(Path(module.__file__).read_bytes())
            digest.update(f"{name} {ast.dump(tree)}".encode())
    return digest.hexdigest()[:16]


@cache
def versions():
    """Of Python and the libraries."""
    major, minor, _ = platform.python_version_tuple()
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {major}.{minor}", *packages])


def data_digest(env):
    """Of the files and folders that an environment's settings name, "" if there are none."""
    texts = [value for key, value in env.items() if key != "name" and isinstance(value, str)]
    paths = [text for text in texts if os.path.exists(text)]
    return files_digest(*paths) if paths else ""


def model_digest(model):
    names = [model.shape, model.tokenizer] if model.random_init else [model.path]
    folders = [model_folder(find_model(name)) for name in names]
    return None if None in folders else files_digest(*folders)


@cache
def files_digest(*paths):
    """Of files, or of the files that lie directly in folders."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and file.suffix != ".md":
                digest.update(f"{file.name} {_state(file)} ".encode())
    return digest.hexdigest()[:16]


def _state(file):
    found = file.stat()
    if found.st_size > LARGE:
        return f"{found.st_size} {found.st_mtime_ns}"
    return hashlib.sha256(file.read_bytes()).hexdigest()
