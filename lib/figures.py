"""The figures of an evaluation, as PNG: report.py and lib/documents.py draw them. No torch.

    draw_compute     the leading metric over model GFLOPs, and over recognition (Figures 5, 7, 8)
    draw_updates     the same of several PPO trainings over their updates (Figure 19)
    draw_bars        the arms of the table side by side (Figures 6 and 16)
    draw_growth      what each training gained out of distribution against in it (Figure 10)
    draw_frontier    checkpoints along each training, out of distribution against in it

`results` is what lib/results.py's read returns. Figures are of the paper.
"""
import re
from itertools import chain, cycle
from types import SimpleNamespace
from typing import NamedTuple

from matplotlib.figure import Figure

from lib.results import rate_of_init, temperature_name
from lib.tables import training_names

STYLES = {  # of trainings, by kind: colours that the colour-blind tell apart, markers of a frontier
    "Init": [{"color": "black", "marker": "*", "markersize": 7, "linestyle": "none", "zorder": 4}],
    "sft": [{"color": "#c4442a", "marker": "o"}, {"color": "#e69f00", "marker": "s"},
            {"color": "#cc79a7", "marker": "D"}, {"color": "#7f3c00", "marker": "P"}],
    "rl": [{"color": "#2a6fb0", "marker": "^"}, {"color": "#56b4e9", "marker": "v"},
           {"color": "#009e73", "marker": "<"}, {"color": "#332288", "marker": ">"}],
}
SPARE_COLORS = ("tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray")


def styles_of(arms, sft="sft"):
    """{arm: its style, in every figure}: Init, rl and the training that stands for SFT have the
    first of their kind, others the next ones, or a spare colour where these are used up."""
    usual = next((arm for arm in arms if arm.startswith("Init @ sft/")), "Init")  # of several
    leads = {"Init", usual, "rl", sft if sft in arms else "sft"}
    others = {kind: iter(styles[1:]) for kind, styles in STYLES.items()}
    spare, styles = cycle(SPARE_COLORS), {}
    for arm in arms:
        kind = re.match(r"[^-@ ]*", arm)[0]
        first = STYLES[kind][0]
        styles[arm] = first
        if arm not in leads:
            styles[arm] = next(others[kind], None) or {**first, "color": next(spare)}
    return styles


def colors_of(arms, sft="sft"):
    return {arm: style["color"] for arm, style in styles_of(arms, sft).items()}


def metric_label(results):
    """The leading metric and what it was sampled at."""
    return f"{results.reports[0].name} % ({temperature_name(results.temperatures[0])})"


# ---------------------------------------------------------------- Figures 5, 7 and 8
def draw_compute(results, path, sft="sft"):
    """The leading metric over model GFLOPs, a panel per variant (ID on top): Figures 5 and 7.
    sft: the training that stands for SFT.

    Where there is a report on recognition, a second column: the same over recognition (Figure 8).
    """
    variants = list(results.variants)
    columns = 2 if "recognition" in [report.name for report in results.reports] else 1
    figure = Figure(figsize=(5 * columns, 2.7 * len(variants)))
    axes = figure.subplots(len(variants), columns, sharex="col", squeeze=False)
    everywhere = chain(*[chain(*arms.values()) for arms in results.curves.values()])
    most_gflops = max(point.gflops for point in everywhere)
    colors = colors_of(results.curves[variants[0]], sft)
    names = training_names(colors, rate_of_init(results))
    for panels, variant in zip(axes, variants):
        panels[0].set_ylabel(f"{variant}\n{metric_label(results)}")
        for arm, points in results.curves[variant].items():
            draw_arm(panels, names[arm], points, colors[arm], most_gflops)
        for panel in panels:
            panel.grid(alpha=0.3)
    size = f"{results.curve_n} episodes per seed and point, seeds: {len(results.seeds)}"
    axes[0][0].set_title(size, fontsize=8)
    axes[-1][0].set_xlabel("model GFLOPs (6ND trained + 2ND sampled)")
    if columns == 2:
        axes[-1][1].set_xlabel("recognition % (paler: less compute)")
    add_legend(figure, axes[0][0], colors)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight" if figure.legends else None)


def ppo_curves(results, variant):
    """{training: its Points} of PPO, where their updates are known."""
    curves = results.curves.get(variant, {})
    return {arm: points for arm, points in curves.items()
            if arm.startswith("rl") and None not in [point.step for point in points]}


def draw_updates(results, path):
    """The leading metric of PPO trainings over their updates, from where each began, a panel per
    variant: Figure 19."""
    variants = list(results.variants)
    figure = Figure(figsize=(5, 2.7 * len(variants)))
    panels = figure.subplots(len(variants), 1, sharex=True, squeeze=False)[:, 0]
    colors = colors_of(ppo_curves(results, variants[0]))
    names = training_names(colors)
    for panel, variant in zip(panels, variants):
        for arm, points in ppo_curves(results, variant).items():
            steps = [point.step for point in points]
            panel.plot(steps, [point.value for point in points], "o-", color=colors[arm],
                       label=names[arm], markersize=3)
            panel.fill_between(steps, [point.low for point in points],
                               [point.high for point in points], color=colors[arm], alpha=0.15,
                               linewidth=0)
        panel.set_ylabel(f"{variant}\n{metric_label(results)}")
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("updates of PPO")
    add_legend(figure, panels[0], colors)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight" if figure.legends else None)


def add_legend(figure, axis, arms):
    """Names of the arms: inside the axis, or above all if there are more than the usual ones."""
    if set(arms) <= set(STYLES):
        axis.legend(loc="lower right", fontsize=8)
        return
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="lower center",
                  bbox_to_anchor=(0.5, 1), ncols=2 if figure.get_figwidth() > 6 else 1)


def draw_arm(panels, name, points, color, most_gflops):
    """An arm's Points: a curve with its 95 % band over compute, then dots over recognition.

    The dots are the fuller the more compute was spent. Init is a star. Each seed has small dots.
    """
    gflops, value, low, high, recognition, *_ = zip(*points)
    compute, *others = panels
    if name.startswith("Init"):
        compute.plot(gflops, value, "*", color=color, label=name, markersize=12, zorder=5)
        dots = {"marker": "*", "s": 144, "zorder": 5}
    else:
        compute.plot(gflops, value, "o-", color=color, label=name, markersize=3, zorder=2)
        compute.fill_between(gflops, low, high, color=color, alpha=0.15, linewidth=0)
        opacity = [1 - 0.8 * (1 - spent / most_gflops) for spent in gflops]
        dots = {"s": 30, "alpha": opacity, "zorder": 2}
    for panel in others:
        panel.scatter(recognition, value, color=color, **dots)
    for point in points:
        for seed_value, seed_recognition in point.per_seed:
            for panel, x in zip(panels, (point.gflops, seed_recognition)):
                panel.plot(x, seed_value, ".", color=color, markersize=2, alpha=0.6)


# ---------------------------------------------------------------- Figures 6, 10 and 16
def draw_bars(results, path):
    """The arms of the table side by side, a panel per variant: Figures 6 and 16.

    At the first split and temperature, with 95 % intervals and a dot per seed.
    """
    rows = leading_rows(results, results.table)
    colors = colors_of(dict.fromkeys(row["arm"] for row in rows))
    heights = {arm: place for place, arm in enumerate(reversed(colors))}
    figure = Figure(figsize=(4 * len(results.variants) + 1, 0.8 + 0.4 * len(colors)))
    panels = figure.subplots(1, len(results.variants), sharey=True, squeeze=False)[0]
    for panel, variant in zip(panels, results.variants):
        for row in rows:
            if row["variant"] == variant:
                draw_bar(panel, heights[row["arm"]], *leading(results, row), colors[row["arm"]])
        panel.set_title(variant)
        panel.set_xlabel(metric_label(results))
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(list(heights.values()), training_names(heights).values())
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_bar(panel, height, estimate, per_seed, color):
    """An Estimate, lying at some height, and its seeds."""
    panel.barh(height, estimate.value, color=color, alpha=0.6, height=0.7)
    panel.plot([estimate.low, estimate.high], [height, height], color="black", linewidth=1)
    draw_seeds(panel, per_seed, [height] * len(per_seed))


def draw_growth(results, path):
    """What each training gained over its start: every other variant against the trained one.

    At the first split and temperature, with 95 % intervals and a dot per seed: Figure 10.
    """
    trained, *others = results.variants
    gains = {}  # {(arm, variant): Estimate and values per seed}
    for row in leading_rows(results, results.differences):
        if row["base"].startswith("Init"):
            gains[row["arm"], row["variant"]] = leading(results, row)
    colors = colors_of(dict.fromkeys(arm for arm, _ in gains))
    names = training_names(colors)
    figure = Figure(figsize=(4.5 * len(others), 4.2))
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    for panel, variant in zip(panels, others):
        for arm, color in colors.items():
            draw_gain(panel, gains[arm, trained], gains[arm, variant], color, names[arm])
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_xlabel(f"{trained}: {results.reports[0].name}, points above Init")
        panel.set_ylabel(f"{variant}: points above Init")
        panel.grid(alpha=0.3)
    add_legend(figure, panels[0], colors)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight" if figure.legends else None)


def draw_gain(panel, across, upwards, color, name):
    """A cross: gains (Estimate, values per seed) in the trained variant and in another one."""
    (x, x_seeds), (y, y_seeds) = across, upwards
    panel.plot([x.low, x.high], [y.value, y.value], color=color, linewidth=1)
    panel.plot([x.value, x.value], [y.low, y.high], color=color, linewidth=1)
    panel.plot(x.value, y.value, "o", color=color, label=name)
    draw_seeds(panel, x_seeds, y_seeds, color)


def draw_seeds(panel, x, y, color="black"):
    """Small dots, where there is more than one seed."""
    if len(x) > 1:
        panel.plot(x, y, ".", color=color, markersize=3, alpha=0.6)


def leading_rows(results, rows):
    """Those at the first temperature and, of each variant, at the first split."""
    first = {}
    for row in results.table:
        first.setdefault(row["variant"], row["split"])
    return [row for row in rows if row["split"] == first[row["variant"]]
            and row["temperature"] == results.temperatures[0]]


def leading(results, row):
    """The leading metric of a row: its Estimate and the values of its seeds."""
    metric = results.reports[0].lead
    return row["metrics"][metric], row["per_seed"][metric]


# ---------------------------------------------------------------- the frontier
class Panel(NamedTuple):
    """One variant's leading metric against that of the first variant, which is the trained one, or
    against how far the model has gone from Init."""
    title: str
    results: SimpleNamespace
    variant: str
    over_kl: bool = False
    sft: str = "sft"  # the training that stands for SFT


def knows_kl(results):
    """Whether points tell how far they have gone (eval.kl)."""
    trained = next(iter(results.variants))
    points = chain(*results.curves[trained].values())
    return any(point.kl is not None for point in points)


def draw_frontier(panels, path):
    """A line per training through its checkpoints, from Init, a star: thick for all seeds together,
    thin for each. The last checkpoint is the largest. Panels of one measure share their height."""
    figure = Figure(figsize=(4.5 * len(panels), 4.2))
    titles = [panel.title for panel in panels]
    heights = {(panel.variant, panel.results.reports[0].name) for panel in panels}
    axes = figure.subplots(1, len(panels), sharey=len(heights) == 1, squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        draw_panel(axis, panel)
        alone = titles.count(panel.title) == 1
        axis.set_title(panel.title if alone else f"{panel.title}: {panel.variant}".strip(": "))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_panel(axis, panel):
    """The lines of one Panel, its labels and its legend."""
    trained, measure = next(iter(panel.results.variants)), panel.results.reports[0].name
    styles = styles_of(panel.results.curves[trained], panel.sft)
    names = training_names(styles, rate_of_init(panel.results))
    for arm, points in panel.results.curves[trained].items():
        if panel.over_kl and points[0].kl is None:  # it is not known where it began
            continue
        thick = {"markersize": 4, "linewidth": 2, "zorder": 3, **styles[arm]}
        thin = {**thick, "markersize": 1.5, "linewidth": 0.5, "zorder": 2, "alpha": 0.4}
        others = panel.results.curves[panel.variant][arm]
        x, y = across(points, panel), [point.value for point in others]
        draw_path(axis, x, y, **thick, label=names[arm])
        if not arm.startswith("Init"):  # seen where no Init lies above it
            axis.scatter(x[:1], y[:1], marker="*", s=144, color=thick["color"], zorder=3)
        for x, y in zip(across_of_seeds(points, panel), paths_of_seeds(others)):
            draw_path(axis, x, y, **thin)
    over = "KL(Init || checkpoint), nats per first answer" if panel.over_kl else f"{measure} %"
    axis.set_xlabel(f"{trained}: {over}")
    axis.set_ylabel(f"{panel.variant}: {measure} %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def draw_path(axis, x, y, **look):
    (line,) = axis.plot(x, y, **look)
    look.update(markersize=2 * line.get_markersize(), label=None)
    axis.plot(x[-1:], y[-1:], **look)


def across(points, panel):
    """What a Panel draws Points over."""
    if panel.over_kl:
        return [point.kl[0].value for point in points]
    return [point.value for point in points]


def across_of_seeds(points, panel):
    """The same of each seed."""
    if panel.over_kl:
        return zip(*[point.kl[1] for point in points])
    return paths_of_seeds(points)


def paths_of_seeds(points):
    """Per seed the values of the metric at each of the Points."""
    per_point = []
    for point in points:
        per_point.append([value for value, _ in point.per_seed])
    return zip(*per_point)
