"""The curves of trainings so far, from their metrics.jsonl, as lines of an SVG picture.

What is logged is said in rl.py and sft.py. A training may be under way: its last line may be torn.
No torch in this file.
"""
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PANELS = {  # training: {key of the log: title}
    "PPO": {"reward": "reward per answer, points", "success": "success, share",
            "first_attempt": "first attempts right, share", "kl_start": "KL to the start, nats",
            "entropy": "entropy, nats per token", "clip_fraction": "ratios clipped, share",
            "value_loss": "value loss", "rate": "tokens per second"},
    "SFT": {"loss": "loss, nats per token", "grad_norm": "gradient norm",
            "rate": "tokens per second"},
}
WIDTH, HEIGHT = 300, 120  # of a panel's plot, in units of the picture


class Curve(NamedTuple):
    """One training in one panel."""
    training: str
    color: int  # the number of its colour
    last: float
    path: str  # of an SVG polyline, "x,y x,y .."
    end: tuple  # (x, y) of the last point


class CurvePanel(NamedTuple):
    """One figure of the log over steps, or updates, of one or several trainings."""
    title: str
    low: float  # of the values drawn
    high: float
    first: int  # step
    last: int
    curves: list


def logs_of(folder):
    """{training: its records} of a run's folder, or of a training's own.

    What cannot be read is left out: a line that is being written, a step without a number.
    """
    folder = Path(folder)
    logs = {}
    for path in [folder / "metrics.jsonl", *sorted(folder.glob("*/metrics.jsonl"))]:
        records = records_of(path)
        if records:
            logs[path.parent.name] = records
    return logs


def records_of(path):
    """The records of a metrics.jsonl, with `rate`: tokens per second since the record before.

    The first has none: the tokens before it are those of Init, too.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    records, before = [], None
    for line in text.split("\n"):
        with suppress(ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
            record = json.loads(line)
            tokens = sum(record["tokens"].values())
            if before is not None:
                record["rate"] = (tokens - before) / record["seconds"]
            before = tokens
            records.append(record)
    return records


def panels_of(logs):
    """{"PPO" or "SFT": CurvePanels} of trainings {name: records}, as far as there are any."""
    found = {}
    for kind, titles in PANELS.items():
        trainings = {}
        for name, records in logs.items():
            if ("reward" in records[0]) == (kind == "PPO"):
                trainings[name] = records
        panels = [panel_of(title, key, trainings) for key, title in titles.items()]
        panels = [panel for panel in panels if panel is not None]
        if panels:
            found[kind] = panels
    return found


def panel_of(title, key, trainings):
    """The CurvePanel of one key of the log, None if no training has it."""
    points = {}
    for name, records in trainings.items():
        for record in records:
            if is_number(record.get(key)) and is_number(record.get("step")):
                points.setdefault(name, []).append((record["step"], record[key]))
    if not points:
        return None
    steps, values = zip(*[point for known in points.values() for point in known])
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    curves = []
    for color, name in enumerate(trainings):
        if name in points:
            scaled = []
            for step, value in points[name]:
                x = WIDTH * share(step, first, last)
                y = HEIGHT * (1 - share(value, low, high))
                scaled.append((round(x, 1), round(y, 1)))
            path = " ".join(f"{x},{y}" for x, y in scaled)
            curves.append(Curve(name, color, points[name][-1][1], path, scaled[-1]))
    return CurvePanel(title, low, high, first, last, curves)


def share(value, low, high):
    """How far along from low to high, 0 to 1; the middle where they are the same."""
    return (value - low) / (high - low) if high > low else 0.5


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)
