"""Evaluate every arm found under a run, in and out of distribution: a table, the paper's Figure 5, transcripts.

    python eval.py CONFIG.yaml [key=value ...]        eval.transcripts=3 also prints episodes
                                                      eval.runs=[runs/a,runs/b] pools the runs of several seeds

Arms: Init (the checkpoint ppo.init), every rl* folder (last checkpoint) and every sft* folder (the checkpoint whose
model FLOPs are nearest to the rl arm's: equal compute; the last one if there is no rl arm). All arms play the same
episodes, so differences are paired; a metric is right / all, summed over episodes, its interval a 95 % bootstrap
clustered by value multiset (or route). The environment says what is shown (env.reports) and which reference policies
(env.references) stand below the arms.

Written to run.dir: evaluations.jsonl (every cell, reused when run again), evaluation.json (the table),
evaluation.png and for the arms in eval.save_merged ARM/merged, a model folder for any program (of several seeds the
first's). Source: paper Sec. 5, C.3, with this project's protocol (README).
"""
import gc
import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from tqdm import tqdm

from lib.runs import checkpoints, write_atomic, written_whole
from lib.settings import MAY_CHANGE, UserError, load, run_main, within_memory
from lib.training import load_state
from policy import Policy
from rollout import evaluate, make_env, play_reference

RESAMPLES = 2000
CURVE_POINTS = 8  # checkpoints of an arm that its curve shows
HERE = [key.removeprefix("model.") for key in MAY_CHANGE if key.startswith("model.")]  # follow this machine, not the arm


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


def interval(pairs, weights, base=None):
    """The ratio of sums of n (right, of) pairs and its 95 % bootstrap interval, under cluster_weights.

    Args: base: n pairs of another arm on the same episodes, to take the difference of the two ratios.
    Returns: ratio (or difference), low, high; a resample in which `of` sums to 0 does not count.
    """
    weights = torch.cat([torch.ones(1, weights.shape[1]), weights])  # row 0: every episode once

    def ratios(pairs):
        right, of = torch.tensor(pairs, dtype=torch.float32).T  # (n,) each
        return (weights @ right).double() / (weights @ of)

    values = (ratios(pairs) - (0 if base is None else ratios(base))).float()  # (1 + resamples,)
    return values[0].item(), *torch.nanquantile(values[1:], torch.tensor([0.025, 0.975])).tolist()


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


def arm_settings(checkpoint, cfg):
    """Arguments of the Policy of a checkpoint's own arm; cfg has what follows this machine and keys newer than the arm."""
    arm, here = yaml.safe_load((checkpoint.parent / "config.yaml").read_text()), vars(cfg.model)
    model = {**here, **arm["model"], **{key: here[key] for key in HERE}}
    seed = arm["run"]["seed"] if model["random_init"] else 0  # what else the seed draws, the checkpoint replaces
    return {"model": SimpleNamespace(**model), "lora": arm["lora"] and SimpleNamespace(**arm["lora"]), "seed": seed}


class Loader:
    """The one policy in memory, whatever the runs and arms: made anew for another shape, its weights for another checkpoint."""

    def __init__(self, cfg):
        self.cfg, self.policy, self.shape, self.loaded = cfg, None, None, None

    def get(self, checkpoint):
        shape = arm_settings(checkpoint, self.cfg)
        with within_memory("loading the model", self.cfg):
            if self.shape != shape:
                self.policy = self.shape = self.loaded = None  # before the next one needs its memory
                gc.collect()  # a 4-bit weight and its layer refer to each other
                self.policy, self.shape = Policy(**shape), shape
            if self.loaded != checkpoint:
                self.policy.load(checkpoint, value_head=False)
                self.loaded = checkpoint
        return self.policy


class Cells:
    """Evaluated cells of one run: each (checkpoint, variant, split, temperature, n) is played once and kept.

    In place of a checkpoint's path there may be the name of a reference policy; it has no temperature (None).
    """

    def __init__(self, cfg, run_dir, loader):
        self.cfg, self.path, self.loader = cfg, Path(run_dir) / "evaluations.jsonl", loader
        self.known, self.shown = {}, set()
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        for line in lines:
            with suppress(ValueError, KeyError):  # a line that a kill cut off or an older version wrote: played again
                cell = json.loads(line)
                self.known[json.dumps(cell["key"])] = {name: cell[name] for name in ("key", "cluster", "counts")}
        if len(self.known) != len(lines):
            write_atomic(self.path, "".join(json.dumps(cell) + "\n" for cell in self.known.values()))

    def key(self, checkpoint, variant, split, temperature, n):
        e, arm = self.cfg.eval, [checkpoint, None]
        if temperature is not None:
            arm = [str(checkpoint.relative_to(self.path.parent)), int(checkpoint.stat().st_mtime)]
        return [*arm, {**self.cfg.env, **e.variants[variant]}, split, temperature, n, e.verify_iters, e.seed]

    def get(self, checkpoint, variant, split, temperature, n, bar):
        """{cluster: list, counts: {metric: list of (right, of)}} over n episodes; what does not occur is (0, 0)."""
        key = self.key(checkpoint, variant, split, temperature, n)
        name = json.dumps(key)
        if name not in self.known:
            records = self.play(checkpoint, variant, split, temperature, n, bar)
            metrics = dict.fromkeys(metric for r in records for metric in r["counts"])
            cell = {"key": key, "cluster": [r["cluster"] for r in records],
                    "counts": {m: [r["counts"].get(m, (0, 0)) for r in records] for m in metrics}}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            self.known[name] = cell
        elif name not in self.shown:
            bar.update(n)
        self.shown.add(name)
        return self.known[name]

    def play(self, checkpoint, variant, split, temperature, n, bar):
        """Episodes of a checkpoint, under the model and LoRA settings of its own arm. Returns: records of `evaluate`."""
        e, changes = self.cfg.eval, {"split": split, **self.cfg.eval.variants[variant]}
        if temperature is None:
            records = play_reference(self.cfg.env, checkpoint, n, e.seed, e.verify_iters, **changes)
            bar.update(n)
            return records
        policy = self.loader.get(checkpoint)
        with within_memory("sampling", self.cfg, "model.sample_tokens", "eval.batch_size", "model.merge_for_sampling=false"):
            return evaluate(policy, self.cfg.env, n, e.seed, e.verify_iters, temperature, e.batch_size, bar, **changes)


# ---------------------------------------------------------------- table
def temperature_name(t):
    return "greedy" if not t else f"T = {t:g}"


def summarize(cells_of, arms, references, e):
    """Rows {split, variant, arm, temperature, n, metrics: {name: [value, low, high] in %}} of the table.

    Args: references: {variant: names of reference policies}; theirs are rows of temperature None.
    """
    rows, weights = [], {}
    for split in e.splits:
        for variant in e.variants:
            for arm, t in [(a, t) for a in arms for t in e.temperatures] + [(r, None) for r in references[variant]]:
                cell, place = cells_of(arm, variant, split, t), (split, variant)
                if place not in weights:
                    weights[place] = cluster_weights(cell["cluster"])
                rows.append({"split": split, "variant": variant, "arm": arm, "temperature": t, "n": len(cell["cluster"]),
                             "metrics": {m: [100 * x for x in interval(pairs, weights[place])]
                                         for m, pairs in cell["counts"].items()}})
    return rows


def differences(cells_of, pairs, e):
    """Rows of paired differences arm - base in points, with intervals over the same resampled clusters."""
    rows = []
    for split in e.splits:
        for variant in e.variants:
            weights = None
            for t in e.temperatures:
                for arm, base in pairs:
                    a, b = (cells_of(x, variant, split, t) for x in (arm, base))
                    weights = cluster_weights(a["cluster"]) if weights is None else weights
                    metrics = {m: [100 * x for x in interval(a["counts"][m], weights, b["counts"][m])]
                               for m in a["counts"] if m in b["counts"]}
                    rows.append({"split": split, "variant": variant, "temperature": t, "arm": arm, "base": base,
                                 "metrics": metrics})
    return rows


def grouped(rows, *keys):
    """{values of the keys: {temperature: row}} in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), {})[row["temperature"]] = row
    return groups


def values_text(row, columns):
    """The row's values of the columns, the last one of an arm with half its interval; "-" where there is none."""
    found = [row["metrics"].get(name) for name in columns]
    text = " / ".join(f"{m[0]:5.1f}" if m else f"{'-':>5}" for m in found)
    if not found[-1] or row["temperature"] is None:
        return text + " " * 9
    return text + f" ±{(found[-1][2] - found[-1][1]) / 2:4.1f}   "


def print_table(rows, reports, gflops, e):
    """The table on screen, a block per split and report: for every variant the arms and below them the references.

    Args: rows: as of `summarize`; reports: list of (name, title, columns), as of the environment.
    """
    width = max(map(len, e.variants)) + 2, max(len(row["arm"]) for row in rows) + 2
    for split in e.splits:
        lines = grouped([row for row in rows if row["split"] == split], "variant", "arm")
        n = next(row["n"] for row in rows if row["split"] == split)
        for _, title, columns in reports:
            cell, last = max(24, 8 * len(columns) + 8), None
            print(f"\n{split}: {title}, ± half the 95 % interval, n = {n}")
            print(" " * sum(width) + "".join(f"{temperature_name(t):^{cell}}" for t in e.temperatures) + "   model GFLOPs")
            for (variant, arm), found in lines.items():
                texts = [f"{values_text(found[t], columns):>{cell}}" for t in (*e.temperatures, None) if t in found]
                compute = "" if None in found else f"{gflops[arm]:13,.0f}"
                print(f"{variant if variant != last else '':{width[0]}}{arm:{width[1]}}{''.join(texts)}{compute}".rstrip())
                last = variant


def print_differences(rows, reports, e):
    """The paired differences on screen, a block per report, of its last column."""
    width = max(map(len, e.variants)) + 2, 2 * max(len(row[k]) for row in rows for k in ("arm", "base")) + 5
    for name, _, columns in reports:
        print(f"\npaired differences of {name} in points [95 % interval]")
        print(" " * (8 + sum(width)) + "".join(f"{temperature_name(t):^24}" for t in e.temperatures))
        for (split, variant, arm, base), found in grouped(rows, "split", "variant", "arm", "base").items():
            same = [found[t]["metrics"].get(columns[-1]) for t in e.temperatures]
            print(f"{split:8}{variant:{width[0]}}{arm + ' - ' + base:{width[1]}}"
                  + "".join(f"{m[0]:+6.1f} [{m[1]:+5.1f}, {m[2]:+5.1f}]   " if m else f"{'-':>6}{'':18}" for m in same))


# ---------------------------------------------------------------- Figures 5, 7 and 8
def draw(curves, reports, e, path):
    """The leading report's last column against model GFLOPs, one panel per variant (ID on top), as in Figures 5 and 7.

    With a report on recognition a second column: the same against recognition, the fuller a point the more compute
    (Figure 8).
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    styles = {"Init": ("Init", "black", "*"), "sft": ("SFT", "#c4442a", "o-"), "rl": ("RL", "#2a6fb0", "o-")}
    seeing = any(name == "recognition" for name, *_ in reports)
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
                              alpha=[1 - 0.8 * (1 - compute / most) for compute in x] if arm != "Init" else 1, zorder=order)
        axis.set_ylabel(f"{variant}\n{reports[0][0]} % ({temperature_name(e.temperatures[0])})")
        for each in (axis, *others):
            each.grid(alpha=0.3)
    axes[0][0].legend(loc="lower right", fontsize=8)
    axes[-1][0].set_xlabel("model GFLOPs (6ND trained + 2ND sampled)")
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


def save_merged(checkpoint, cfg, folder):
    """Write a checkpoint as a normal model folder: LoRA merged into the base's 16-bit weights, on the CPU."""
    settings = arm_settings(checkpoint, cfg)
    vars(settings["model"]).update(quantization="none", dtype="bfloat16", device="cpu")
    with within_memory(f"merging {checkpoint}", cfg), written_whole(folder) as temporary:
        policy = Policy(**settings)
        policy.load(checkpoint, value_head=False)
        policy.save_merged(temporary)


class Pool:
    """The runs of one or several seeds, evaluated together: an arm's episodes are those of every run, joined."""

    def __init__(self, cfg, reports, references):
        self.cfg, self.lead, self.runs = cfg, reports[0][2][-1], []  # lead: the metric of the curves
        loader = Loader(cfg)
        for folder in cfg.eval.runs or [cfg.run.dir]:
            arms = find_arms(folder, cfg.ppo.init)
            gflops = {p: load_state(p)["gflops"] for paths in arms.values() for p in paths}
            budget = gflops[arms["rl"][-1]] if "rl" in arms else None
            table = {arm: [chosen(arm, paths, gflops, budget)] for arm, paths in arms.items()}
            self.runs.append({"cells": Cells(cfg, folder, loader), "arms": arms, "table": table, "gflops": gflops})
        self.arms = [a for a in self.runs[0]["table"] if all(a in run["table"] for run in self.runs)]
        for name in cfg.eval.save_merged:
            if name not in self.arms:
                raise UserError(f"eval.save_merged: {name!r} is none of {', '.join(self.arms)}")
        self.curves = {}  # arm -> places of the checkpoints that its curve shows
        if cfg.eval.curve_n:
            self.curves = {a: spread(min(len(run["arms"][a]) for run in self.runs)) for a in ("sft", "rl")
                           if a in self.arms}
        e = cfg.eval
        per_variant = (len(self.arms) * len(e.temperatures) * sum(e.splits.values())
                       + (1 + sum(map(len, self.curves.values()))) * e.curve_n)
        policies = sum(map(len, references.values()))
        self.bar = tqdm(total=len(self.runs) * (len(e.variants) * per_variant + policies * sum(e.splits.values())),
                        unit="episode", disable=None)

    def cell(self, arm, variant, split, temperature, n=None, which="table", place=0):
        """{cluster, counts} of an arm's checkpoint: the table's, or the place-th of its curve; or of a reference policy."""
        self.bar.set_description(f"{arm}, {variant}, {split}, {temperature_name(temperature)}")
        parts = [run["cells"].get(arm if temperature is None else run[which][arm][place], variant, split, temperature,
                                  n or self.cfg.eval.splits[split], self.bar) for run in self.runs]
        metrics = dict.fromkeys(m for part in parts for m in part["counts"])
        return {"cluster": [c for part in parts for c in part["cluster"]],
                "counts": {m: [pair for part in parts for pair in part["counts"].get(m, [(0, 0)] * len(part["cluster"]))]
                           for m in metrics}}

    def compute(self, arm, which="table", place=0):
        """Mean model GFLOPs of that checkpoint over the runs."""
        return sum(run["gflops"][run[which][arm][place]] for run in self.runs) / len(self.runs)

    def curve(self, variant):
        """{arm: [(gflops, lead, low, high, recognition)]} at the first temperature and split; rl starts at Init."""
        e, curves = self.cfg.eval, {}

        def point(arm, place):
            cell = self.cell(arm, variant, next(iter(e.splits)), e.temperatures[0], e.curve_n, "arms", place)
            values = interval(cell["counts"][self.lead], cluster_weights(cell["cluster"]))
            right, of = map(sum, zip(*cell["counts"]["recognized"]))
            return (self.compute(arm, "arms", place), *(100 * v for v in (*values, right / of)))

        if self.curves and "Init" in self.arms:
            curves["Init"] = [point("Init", 0)]
        for arm, places in self.curves.items():
            start = curves.get("Init", []) if arm == "rl" else []
            curves[arm] = start + [point(arm, place) for place in places]
        return curves


def main(arguments):
    cfg, _, _ = load(arguments)
    e = cfg.eval
    envs = {variant: make_env(cfg.env, e.verify_iters, **{"split": split, **changes})
            for split in e.splits for variant, changes in e.variants.items()}  # a bad one is named before playing
    references = {variant: env.references for variant, env in envs.items()}
    reports = [r for r in next(iter(envs.values())).reports  # those that every variant has
               if all(r[0] in (name for name, *_ in env.reports) for env in envs.values())]
    pool = Pool(cfg, reports, references)
    rows = summarize(pool.cell, pool.arms, references, e)
    pairs = [(a, "Init") for a in pool.arms if a != "Init" and "Init" in pool.arms]
    diffs = differences(pool.cell, pairs + [("rl", "sft")] * ("rl" in pool.arms and "sft" in pool.arms), e)
    gflops = {arm: pool.compute(arm) for arm in pool.arms}
    curves = {variant: pool.curve(variant) for variant in e.variants}
    pool.bar.close()
    print_table(rows, reports, gflops, e)
    if diffs:
        print_differences(diffs, reports, e)
    out = Path(cfg.run.dir)
    out.mkdir(parents=True, exist_ok=True)
    report = {"runs": [str(run["cells"].path.parent) for run in pool.runs], "gflops": gflops, "table": rows,
              "differences": diffs, "curves": curves}
    write_atomic(out / "evaluation.json", json.dumps(report, indent=1) + "\n")
    if pool.curves:
        draw(curves, reports, e, out / "evaluation.png")
        print(f"\nwritten: {out}/evaluation.json, {out}/evaluation.png")
    if e.transcripts:
        first = pool.runs[0]
        print_transcripts(first["cells"], {arm: first["table"][arm][0] for arm in pool.arms}, e)
    for arm in e.save_merged:
        save_merged(pool.runs[0]["table"][arm][0], cfg, out / arm / "merged")
        print(f"written: {out / arm / 'merged'}")


if __name__ == "__main__":
    run_main(main)
