"""Evaluate every arm found under a run, in and out of distribution: a table, the paper's Figure 5, transcripts.

    python eval.py CONFIG.yaml [key=value ...]        eval.transcripts=3 also prints episodes
                                                      eval.runs=[runs/a,runs/b] pools the runs of several seeds

Arms: Init (the checkpoint ppo.init), every rl* folder (last checkpoint) and every sft* folder (the checkpoint whose
model FLOPs are nearest to the rl arm's: equal compute; the last one if there is no rl arm). All arms play the same
hands, so differences are paired; intervals are 95 % bootstraps clustered by value multiset (or route). Where there are
pictures, recognition is shown beside success.

Written to run.dir: evaluations.jsonl (every cell, reused when run again), evaluation.json (the table) and
evaluation.png. Source: paper Sec. 5, C.3, with this project's protocol (README).
"""
import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from tqdm import tqdm

from config import UserError, checkpoints, load, run_main, write_atomic
from rollout import evaluate, make_env
from vlm import Policy, load_state

RESAMPLES = 2000
CURVE_POINTS = 8  # checkpoints of an arm that its curve shows


# ---------------------------------------------------------------- statistics, pure
def cluster_weights(clusters, resamples=RESAMPLES, seed=0):
    """Bootstrap weights of n observations: whole clusters are drawn with replacement.

    Args: clusters: n hashable labels.
    Returns: (resamples, n) float, how often each observation occurs in each resample.
    """
    labels = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    index = torch.tensor([labels[c] for c in clusters])
    drawn = torch.randint(len(labels), (resamples, len(labels)), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, len(labels)).scatter_add_(1, drawn, torch.ones(resamples, len(labels)))
    return counts[:, index]


def interval(values, weights):
    """Mean of n values and its 95 % bootstrap interval (low, high), under cluster_weights."""
    values = torch.as_tensor(values, dtype=torch.float32)
    means = (weights @ values) / weights.sum(1).clamp(min=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return values.mean().item(), low, high


# ---------------------------------------------------------------- arms and their cells
def find_arms(run_dir, init):
    """{arm name: [(gflops, checkpoint path)] in order}, Init first; Init's own folder is also an sft arm."""
    run_dir, arms = Path(run_dir), {}
    start = run_dir / init
    if init != "none":
        if not start.is_dir():
            raise UserError(f"no checkpoint {start}; run sft.py first, or set ppo.init")
        arms["Init"] = [start]
    for folder in sorted(run_dir.glob("sft*")) + sorted(run_dir.glob("rl*")):
        found = [path for _, path in checkpoints(folder)]
        if found:
            arms[folder.name] = found
    if not arms:
        raise UserError(f"nothing to evaluate under {run_dir}: run sft.py and rl.py first")
    return arms


def chosen(name, paths, compute, budget):
    """The checkpoint of an arm that the table shows: the last; for sft, the one nearest in FLOPs to the budget."""
    if name.startswith("sft") and budget:
        return min(paths, key=lambda p: abs(compute[p] - budget))
    return paths[-1]


def spread(count, most=CURVE_POINTS):
    """At most `most` of the places 0..count-1, evenly spread, first and last included."""
    return sorted({round(i * (count - 1) / max(1, min(count, most) - 1)) for i in range(min(count, most))})


class Cells:
    """Evaluated cells of one run: each (checkpoint, variant, split, temperature, n) is played once and kept."""

    def __init__(self, cfg, run_dir):
        self.cfg, self.path = cfg, Path(run_dir) / "evaluations.jsonl"
        self.policy, self.shape, self.loaded = None, None, None
        self.known, self.shown = {}, set()
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        for line in lines:
            with suppress(ValueError):  # a line that a kill cut off is played again
                cell = json.loads(line)
                self.known[json.dumps(cell["key"])] = cell
        if len(self.known) != len(lines):
            write_atomic(self.path, "".join(json.dumps(cell) + "\n" for cell in self.known.values()))

    def key(self, checkpoint, variant, split, temperature, n):
        e = self.cfg.eval
        return [str(checkpoint.relative_to(self.path.parent)), int(checkpoint.stat().st_mtime),
                {**self.cfg.env, **e.variants[variant]}, split, temperature, n, e.verify_iters, e.seed]

    def get(self, checkpoint, variant, split, temperature, n, bar):
        """{first, solved, recognized: lists of 0/1, cluster: list} over n episodes."""
        key = self.key(checkpoint, variant, split, temperature, n)
        name = json.dumps(key)
        if name not in self.known:
            records = self.play(checkpoint, variant, split, temperature, n, bar)
            cell = {"key": key, "first": [int(r["first"]) for r in records],
                    "solved": [int(r["solved"]) for r in records], "cluster": [r["cluster"] for r in records],
                    "recognized": [int(r["recognized"]) for r in records]}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            self.known[name] = cell
        elif name not in self.shown:
            bar.update(n)
        self.shown.add(name)
        return self.known[name]

    def play(self, checkpoint, variant, split, temperature, n, bar):
        """Episodes of a checkpoint, under the model and LoRA settings of its own arm. Returns: records of `evaluate`."""
        e, arm = self.cfg.eval, yaml.safe_load((checkpoint.parent / "config.yaml").read_text())
        shape = {**arm["model"], "device": self.cfg.model.device}, arm["lora"]
        if self.shape != shape:
            self.policy = Policy(SimpleNamespace(**shape[0]), shape[1] and SimpleNamespace(**shape[1]))
            self.shape, self.loaded = shape, None
        if self.loaded != checkpoint:
            self.policy.load(checkpoint, value_head=False)
            self.loaded = checkpoint
        return evaluate(self.policy, self.cfg.env, n, e.seed, e.verify_iters, temperature, e.batch_size, bar,
                        **{"split": split, **e.variants[variant]})


# ---------------------------------------------------------------- table
def temperature_name(t):
    return "greedy" if t == 0 else f"T = {t:g}"


def summarize(cells_of, arms, e):
    """Rows {split, variant, arm, temperature, first, solved, recognized: [mean, low, high] in %, n} of the table."""
    rows, weights = [], {}
    for split in e.splits:
        for variant in e.variants:
            for arm in arms:
                for t in e.temperatures:
                    cell = cells_of(arm, variant, split, t)
                    place = (split, variant)
                    if place not in weights:
                        weights[place] = cluster_weights(cell["cluster"])
                    row = {"split": split, "variant": variant, "arm": arm, "temperature": t, "n": len(cell["solved"])}
                    for name in ("first", "solved", "recognized"):
                        row[name] = [100 * x for x in interval(cell[name], weights[place])]
                    rows.append(row)
    return rows


def differences(cells_of, pairs, e):
    """Rows of paired differences arm - base in points, with intervals over the same resampled clusters."""
    rows = []
    for split in e.splits:
        for variant in e.variants:
            for t in e.temperatures:
                weights = None
                for arm, base in pairs:
                    a, b = (cells_of(x, variant, split, t) for x in (arm, base))
                    weights = cluster_weights(a["cluster"]) if weights is None else weights
                    row = {"split": split, "variant": variant, "temperature": t, "arm": arm, "base": base}
                    for name in ("first", "solved", "recognized"):
                        row[name] = [100 * x for x in interval([x - y for x, y in zip(a[name], b[name])], weights)]
                    rows.append(row)
    return rows


def print_table(rows, diffs, gflops, guess, e):
    """The tables on screen: per split and variant, every arm at every temperature, and the differences.

    Args: guess: per variant the recognition % of one who does not look (env.guess), None where nothing is to be seen.
    """
    temperatures = "".join(f"{temperature_name(t):^24}" for t in e.temperatures)
    width = max(map(len, e.variants)) + 2, max(map(len, gflops)) + 2

    def block(split, columns):
        print(f"{'':{sum(width)}}{temperatures}   model GFLOPs")
        for variant in e.variants:
            for place, arm in enumerate(gflops):
                found = [next(r for r in rows if (r["split"], r["variant"], r["arm"], r["temperature"])
                              == (split, variant, arm, t)) for t in e.temperatures]
                print(f"{variant if not place else '':{width[0]}}{arm:{width[1]}}" + "".join(map(columns, found))
                      + f"{gflops[arm]:13,.0f}")

    def success(row):
        (first, *_), (solved, low, high) = row["first"], row["solved"]
        return f"{first:7.1f} / {solved:5.1f} ±{(high - low) / 2:4.1f}   "

    def recognition(row):
        mean, low, high = row["recognized"]
        return f"{mean:15.1f} ±{(high - low) / 2:4.1f}   "

    kinds = [("success", "solved", f"within {e.verify_iters} attempts")]
    for split in e.splits:
        n = next(r["n"] for r in rows if r["split"] == split)
        print(f"\n{split}: success % on the first attempt / within {e.verify_iters}, ± half the 95 % interval, n = {n}")
        block(split, success)
        if None not in guess.values():
            print(f"\n{split}: recognition %, all cards read right in the first answer; without looking, by the likeliest "
                  "cards: " + ", ".join(f"{variant} {share:.1f}" for variant, share in guess.items()))
            block(split, recognition)
    if None not in guess.values():
        kinds.append(("recognition", "recognized", "first answer"))
    for title, name, where in kinds if diffs else ():
        print(f"\npaired differences of {title} in points, {where} [95 % interval]")
        print(f"{'':{8 + width[0] + 2 * width[1] + 1}}{temperatures}")
        for row in (d for d in diffs if d["temperature"] == e.temperatures[0]):
            same = [next(d[name] for d in diffs if all(d[k] == row[k] for k in ("split", "variant", "arm", "base"))
                         and d["temperature"] == t) for t in e.temperatures]
            print(f"{row['split']:8}{row['variant']:{width[0]}}{row['arm'] + ' - ' + row['base']:{2 * width[1] + 1}}"
                  + "".join(f"{mean:+6.1f} [{low:+5.1f}, {high:+5.1f}]   " for mean, low, high in same))


# ---------------------------------------------------------------- Figures 5, 7 and 8
def draw(curves, seeing, e, path):
    """Success against model GFLOPs, one panel per variant (ID on top), as in the paper's Figures 5 and 7.

    With `seeing` a second column: success against recognition, the fuller a point the more compute (Figure 8).
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    styles = {"Init": ("Init", "black", "*"), "sft": ("SFT", "#c4442a", "o-"), "rl": ("RL", "#2a6fb0", "o-")}
    columns = 1 + seeing
    figure, axes = plt.subplots(len(e.variants), columns, figsize=(5 * columns, 2.7 * len(e.variants)), sharex="col",
                                squeeze=False)
    most = max(point[0] for arms in curves.values() for points in arms.values() for point in points)
    for (axis, *others), variant in zip(axes, e.variants):
        for arm, points in curves[variant].items():
            x, mean, low, high, recognized = zip(*points)
            label, color, style = styles[arm]
            size, order = (12, 5) if arm == "Init" else (3, 2)
            axis.plot(x, mean, style, color=color, label=label, markersize=size, zorder=order)
            if arm != "Init":
                axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            for other in others:
                other.scatter(recognized, mean, color=color, marker=style[0], s=size ** 2 if arm == "Init" else 30,
                              alpha=[0.2 + 0.8 * compute / most for compute in x] if arm != "Init" else 1, zorder=order)
        axis.set_ylabel(f"{variant}\nsuccess % ({temperature_name(e.temperatures[0])})")
        for each in (axis, *others):
            each.grid(alpha=0.3)
    axes[0][0].legend(loc="lower right", fontsize=8)
    axes[-1][0].set_xlabel("model GFLOPs of post-training (6ND trained + 2ND sampled)")
    if seeing:
        axes[-1][1].set_xlabel("recognition % (paler: less compute)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_transcripts(cells, arms, e):
    """A few whole episodes per arm and variant, at the first temperature."""
    for arm, path in arms.items():
        for variant in e.variants:
            print(f"\n--- {arm}, {variant}, {temperature_name(e.temperatures[0])}")
            for record in cells.play(path, variant, next(iter(e.splits)), e.temperatures[0], e.transcripts, None):
                for turn in record["turns"]:
                    print(f"  {turn.text}\n    -> {turn.reward:+g} {turn.info['feedback'] or 'correct'}")
                print()


class Pool:
    """The runs of one or several seeds, evaluated together: an arm's episodes are those of every run, joined."""

    def __init__(self, cfg):
        self.cfg, self.runs = cfg, []
        for folder in cfg.eval.runs or [cfg.run.dir]:
            arms = find_arms(folder, cfg.ppo.init)
            gflops = {p: load_state(p)["gflops"] for paths in arms.values() for p in paths}
            budget = gflops[arms["rl"][-1]] if "rl" in arms else None
            table = {arm: [chosen(arm, paths, gflops, budget)] for arm, paths in arms.items()}
            self.runs.append({"cells": Cells(cfg, folder), "arms": arms, "table": table, "gflops": gflops})
        self.arms = [a for a in self.runs[0]["table"] if all(a in run["table"] for run in self.runs)]
        self.curves = {}  # arm -> places of the checkpoints that its curve shows
        if cfg.eval.curve_n:
            self.curves = {a: spread(min(len(run["arms"][a]) for run in self.runs)) for a in ("sft", "rl")
                           if a in self.arms}
        e = cfg.eval
        per_variant = (len(self.arms) * len(e.temperatures) * sum(e.splits.values())
                       + (1 + sum(map(len, self.curves.values()))) * e.curve_n)
        self.bar = tqdm(total=len(self.runs) * len(e.variants) * per_variant, unit="hand", disable=None)

    def cell(self, arm, variant, split, temperature, n=None, which="table", place=0):
        """{first, solved, recognized, cluster} of an arm's checkpoint: the table's, or the place-th of its curve."""
        self.bar.set_description(f"{arm}, {variant}, {split}, {temperature_name(temperature)}")
        parts = [run["cells"].get(run[which][arm][place], variant, split, temperature, n or self.cfg.eval.splits[split],
                                  self.bar)
                 for run in self.runs]
        return {k: [x for part in parts for x in part[k]] for k in ("first", "solved", "recognized", "cluster")}

    def compute(self, arm, which="table", place=0):
        """Mean model GFLOPs of that checkpoint over the runs."""
        return sum(run["gflops"][run[which][arm][place]] for run in self.runs) / len(self.runs)

    def curve(self, variant):
        """{arm: [(gflops, success mean, low, high, recognition)]} at the first temperature and split; rl starts at Init."""
        e, curves = self.cfg.eval, {}

        def point(arm, place):
            cell = self.cell(arm, variant, next(iter(e.splits)), e.temperatures[0], e.curve_n, "arms", place)
            values = interval(cell["solved"], cluster_weights(cell["cluster"]))
            seen = sum(cell["recognized"]) / len(cell["recognized"])
            return (self.compute(arm, "arms", place), *(100 * v for v in (*values, seen)))

        if self.curves and "Init" in self.arms:
            curves["Init"] = [point("Init", 0)]
        for arm, places in self.curves.items():
            start = curves.get("Init", []) if arm == "rl" else []
            curves[arm] = start + [point(arm, place) for place in places]
        return curves


def main(arguments):
    cfg, _, _ = load(arguments)
    e = cfg.eval
    guess = {}  # recognition % without looking
    for variant, changes in e.variants.items():
        for split in reversed(e.splits):  # the first one leads; a bad variant is named before playing
            env = make_env(cfg.env, e.verify_iters, **{"split": split, **changes})
        guess[variant] = None if env.guess is None else 100 * env.guess
    pool = Pool(cfg)
    rows = summarize(pool.cell, pool.arms, e)
    pairs = [(a, "Init") for a in pool.arms if a != "Init" and "Init" in pool.arms]
    diffs = differences(pool.cell, pairs + [("rl", "sft")] * ("rl" in pool.arms and "sft" in pool.arms), e)
    gflops = {arm: pool.compute(arm) for arm in pool.arms}
    curves = {variant: pool.curve(variant) for variant in e.variants}
    pool.bar.close()
    print_table(rows, diffs, gflops, guess, e)
    out = Path(cfg.run.dir)
    out.mkdir(parents=True, exist_ok=True)
    report = {"runs": [str(run["cells"].path.parent) for run in pool.runs], "gflops": gflops, "table": rows,
              "differences": diffs, "curves": curves, "recognition_without_looking": guess}
    write_atomic(out / "evaluation.json", json.dumps(report, indent=1) + "\n")
    if pool.curves:
        draw(curves, None not in guess.values(), e, out / "evaluation.png")
        print(f"\nwritten: {out}/evaluation.json, {out}/evaluation.png")
    if e.transcripts:
        first = pool.runs[0]
        print_transcripts(first["cells"], {arm: first["table"][arm][0] for arm in pool.arms}, e)


if __name__ == "__main__":
    run_main(main)
