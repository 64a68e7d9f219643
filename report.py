"""Show what eval.py found: reads evaluation.json alone, no model.

    python report.py CONFIG.yaml | RUN_FOLDER | FILE.json    prints tables and differences, draws
                                                             evaluation.png (Figures 5, 7, 8)
    python report.py RUN_FOLDER --publish results/X.json     keeps the numbers for the documents
    python report.py --documents                             rewrites the blocks of README.md and
                                                             docs/*.md, redraws their figures

A generated block stands between two comments. The first names the block and, as YAML, its fields:

    <!-- table
    source: results/gp_l_mini.json
    rows:
      rule OOD: [all, rule OOD, solved]         # label: [split, variant, metric]
      rule OOD, paper: GP-L rule OOD            # label: row of results/paper.json
    -->
    ... (written here) ...
    <!-- end -->

Blocks: headline (rule OOD of all four tasks), table (arms and paired differences), trainings
(differences by seed, and those of an earlier training), grid (arms against variants), figure.
"""
import argparse
import json
import os
import re
from pathlib import Path

import yaml

from lib.results import Estimate, Point, Report, temperature_name
from lib.runs import write_atomic
from lib.settings import ROOT, UserError, load, run_main

ARMS = ("Init", "sft", "rl")
PAIRS = (("sft", "Init"), ("rl", "Init"), ("rl", "sft"))
NAMES = {"Init": "Init", "sft": "SFT", "rl": "RL"}
HEADLINE = {  # task and what is measured: the file, and where its rule OOD stands there
    "GP-L, success": ("gp_l_mini", ["all", "rule OOD", "solved"]),
    "GP-VL, success": ("gp_vl_mini", ["all", "rule OOD", "solved"]),
    "V-IRL-L, per step": ("virl_l_mini", ["unseen", "rule OOD", "per_step"]),
    "V-IRL-VL, per step": ("virl_vl_mini", ["unseen", "rule OOD", "per_step"]),
}
KINDS = "headline|table|trainings|grid|figure"
BLOCK = re.compile(rf"<!-- ({KINDS})\b(.*?)-->\n(.*?)<!-- end -->", re.DOTALL)


class Results:
    """What an evaluation.json holds, its lists turned into the classes of lib/results.py.

    Args: earlier: instead of it, the earlier training of the same seeds that is stored beside it.
    Raises: UserError if there is no such file, or one of an older version.
    """

    def __init__(self, path, earlier=False):
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"cannot read {path}: run eval.py first") from None
        if "reports" not in stored:
            raise UserError(f"{path} is of an older version: run eval.py again")
        self.seeds, self.episodes = stored["seeds"], stored["splits"]
        self.splits, self.variants = list(stored["splits"]), list(stored["variants"])
        self.temperatures, self.curve_n = stored["temperatures"], stored["curve_n"]
        self.reports = [Report(**report) for report in stored["reports"]]
        self.transcripts = stored.get("transcripts", [])
        self.curves = {}  # variant -> {arm: Points}
        for variant, arms in stored["curves"].items():
            self.curves[variant] = {arm: points(found) for arm, found in arms.items()}
        figures = stored.get("earlier") if earlier else stored
        self.gflops = figures.get("gflops")
        self.table, self.differences = rows(figures["table"]), rows(figures["differences"])
        self.per_run = [rows(found) for found in figures.get("per_run", {}).values()]

    def has_curves(self):
        return any(found for arms in self.curves.values() for found in arms.values())


def rows(stored):
    """Rows of a table, their metrics as Estimates."""
    for row in stored:
        row["metrics"] = {name: Estimate(*numbers) for name, numbers in row["metrics"].items()}
    return stored


def points(stored):
    return [Point(*numbers) for numbers in stored]


# ---------------------------------------------------------------- tables on screen
def grouped(found, *keys):
    """{values of the keys: {temperature: row}} in the order of the rows."""
    groups = {}
    for row in found:
        place = tuple(row[key] for key in keys)
        groups.setdefault(place, {})[row["temperature"]] = row
    return groups


def cell_text(row, metrics):
    """The row's metrics, "-" where there is none; the last of an arm with half its interval."""
    values = []
    for name in metrics:
        estimate = row["metrics"].get(name)
        values.append(f"{estimate.value:5.1f}" if estimate else f"{'-':>5}")
    text = " / ".join(values)
    last = row["metrics"].get(metrics[-1])
    if last is None or row["temperature"] is None:
        return text + " " * 9
    return f"{text} ±{(last.high - last.low) / 2:4.1f}   "


def difference_text(estimate):
    if estimate is None:
        return f"{'-':>6}{'':18}"
    return f"{estimate.value:+6.1f} [{estimate.low:+5.1f}, {estimate.high:+5.1f}]   "


def table_lines(results):
    """The table, a block per split and report: of every variant the arms, then the references."""
    variant_width = max(map(len, results.variants)) + 2
    arm_width = max(len(row["arm"]) for row in results.table) + 2
    lines = []
    for split in results.splits:
        found = [row for row in results.table if row["split"] == split]
        for report in results.reports:
            width = max(24, 8 * len(report.metrics) + 8)
            heads = "".join(f"{temperature_name(t):^{width}}" for t in results.temperatures)
            title = f"{split}: {report.title}, ± half the 95 % interval, n = {found[0]['n']}"
            lines += ["", title, " " * (variant_width + arm_width) + heads + "   model GFLOPs"]
            before = None
            for (variant, arm), by_temperature in grouped(found, "variant", "arm").items():
                shown = "" if variant == before else variant
                line = f"{shown:{variant_width}}{arm:{arm_width}}"
                for temperature in (*results.temperatures, None):
                    if temperature in by_temperature:
                        line += f"{cell_text(by_temperature[temperature], report.metrics):>{width}}"
                if None not in by_temperature:
                    line += f"{results.gflops[arm]:13,.0f}"
                lines.append(line.rstrip())
                before = variant
    return lines


def difference_lines(results):
    """The paired differences, a block per report, of its leading metric."""
    variant_width = max(map(len, results.variants)) + 2
    names = [row[key] for row in results.differences for key in ("arm", "base")]
    pair_width = 2 * max(map(len, names), default=0) + 5
    heads = "".join(f"{temperature_name(t):^24}" for t in results.temperatures)
    lines = []
    for report in results.reports:
        lines += ["", f"paired differences of {report.name} in points [95 % interval]",
                  " " * (8 + variant_width + pair_width) + heads]
        found = grouped(results.differences, "split", "variant", "arm", "base")
        for (split, variant, arm, base), by_temperature in found.items():
            line = f"{split:8}{variant:{variant_width}}{arm + ' - ' + base:{pair_width}}"
            for temperature in results.temperatures:
                line += difference_text(by_temperature[temperature]["metrics"].get(report.lead))
            lines.append(line)
    return lines


def transcript_lines(results):
    """A few whole episodes of each arm: every answer, its reward, what the verifier said."""
    lines = []
    for found in results.transcripts:
        temperature = temperature_name(results.temperatures[0])
        lines += ["", f"--- {found['arm']}, {found['variant']}, {temperature}"]
        for episode in found["episodes"]:
            for turn in episode:
                feedback = turn["feedback"] or "correct"
                lines += [f"  {turn['text']}", f"    -> {turn['reward']:+g} {feedback}"]
            lines.append("")
    return lines


# ---------------------------------------------------------------- Figures 5, 7 and 8
COLORS = {"Init": "black", "sft": "#c4442a", "rl": "#2a6fb0"}


def draw(results, path):
    """The leading metric against model GFLOPs, one panel per variant (ID on top): Figures 5 and 7.

    With a report on recognition, a second column: the same against recognition (Figure 8).
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    variants, lead = results.variants, results.reports[0]
    temperature = temperature_name(results.temperatures[0])
    columns = 2 if "recognition" in [report.name for report in results.reports] else 1
    figure, axes = plt.subplots(len(variants), columns, sharex="col", squeeze=False,
                                figsize=(5 * columns, 2.7 * len(variants)))
    for row, variant in zip(axes, variants):
        draw_compute(row[0], results.curves[variant])
        row[0].set_ylabel(f"{variant}\n{lead.name} % ({temperature})")
        if columns == 2:
            draw_recognition(row[1], results.curves[variant], most_compute(results))
        for axis in row:
            axis.grid(alpha=0.3)
    size = f"{results.curve_n} episodes per seed and point, seeds: {len(results.seeds)}"
    axes[0][0].set_title(size, fontsize=8)
    axes[0][0].legend(loc="lower right", fontsize=8)
    axes[-1][0].set_xlabel("model GFLOPs (6ND trained + 2ND sampled)")
    if columns == 2:
        axes[-1][1].set_xlabel("recognition % (paler: less compute)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def most_compute(results):
    return max(found[-1].gflops for arms in results.curves.values() for found in arms.values())


def draw_compute(axis, arms):
    """A curve per arm with its 95 % band; Init is a star."""
    for arm, found in arms.items():
        gflops, value, low, high, _ = zip(*found)
        style = {"color": COLORS[arm], "label": NAMES[arm]}
        if arm == "Init":
            axis.plot(gflops, value, "*", markersize=12, zorder=5, **style)
        else:
            axis.plot(gflops, value, "o-", markersize=3, zorder=2, **style)
            axis.fill_between(gflops, low, high, color=COLORS[arm], alpha=0.15, linewidth=0)


def draw_recognition(axis, arms, most):
    """A dot per checkpoint, the fuller the more of `most` GFLOPs were spent; Init is a star."""
    for arm, found in arms.items():
        gflops, value, _, _, recognition = zip(*found)
        if arm == "Init":
            axis.scatter(recognition, value, color=COLORS[arm], marker="*", s=144, zorder=5)
        else:
            alpha = [1 - 0.8 * (1 - compute / most) for compute in gflops]
            axis.scatter(recognition, value, color=COLORS[arm], s=30, alpha=alpha, zorder=2)


# ---------------------------------------------------------------- blocks of the documents
def pick(found, place, temperature, arm, base=None):
    """The Estimate at a place [split, variant, metric] of an arm, or of its difference to a base.

    Raises: UserError if there is none.
    """
    split, variant, metric = place
    wanted = (split, variant, temperature, arm, base)
    for row in found:
        here = (row["split"], row["variant"], row["temperature"], row["arm"], row.get("base"))
        if here == wanted and metric in row["metrics"]:
            return row["metrics"][metric]
    raise UserError(f"no {metric} of {wanted}")


def markdown(head, body):
    """A Markdown table of lists of texts."""
    ruler = ["---"] * len(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ruler, *body)]


def value_text(results, place, arm, greedy=True):
    """An arm's value with half its interval, and the greedy one in brackets if that was played."""
    first, *others = results.temperatures
    estimate = pick(results.table, place, first, arm)
    text = f"{estimate.value:.1f} ± {(estimate.high - estimate.low) / 2:.1f}"
    if greedy and 0 in others:
        text += f" ({pick(results.table, place, 0, arm).value:.1f})"
    return text


def gap_text(results, place, pair):
    """A paired difference with its interval, at the first temperature."""
    estimate = pick(results.differences, place, results.temperatures[0], *pair)
    return f"{estimate.value:+.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def gaps_by_seed(results, place, pair):
    """The same difference within each run; an earlier training may not have kept them."""
    gaps = [pick(found, place, results.temperatures[0], *pair) for found in results.per_run]
    return ", ".join(f"{gap.value:+.1f}" for gap in gaps) or "not kept"


def pair_name(pair):
    arm, base = pair
    return f"{NAMES[arm]} - {NAMES[base]}"


def paper(name):
    """{arm: value} of a row of the paper's results."""
    return json.loads((ROOT / "results" / "paper.json").read_text(encoding="utf-8"))["rows"][name]


def headline_block(fields, folder):
    """Rule OOD of the four tasks, the paper's beside ours."""
    head = ["rule OOD, %", *(NAMES[arm] for arm in ARMS), "paper (11B): Init / SFT / RL"]
    body = []
    for label, (name, place) in HEADLINE.items():
        results = Results(ROOT / "results" / f"{name}.json")
        ours = [value_text(results, place, arm, greedy=False) for arm in ARMS]
        task = label.split(",")[0]
        theirs = paper(f"{task} rule OOD")
        body.append([label, *ours, " / ".join(str(theirs[arm]) for arm in ARMS)])
    return markdown(head, body)


def table_block(fields, folder):
    """The arms and their paired differences, a row per (split, variant, metric) or of the paper."""
    results = Results(ROOT / fields["source"])
    head = ["%", *(NAMES[arm] for arm in ARMS), *map(pair_name, PAIRS)]
    body = []
    for label, place in fields["rows"].items():
        if isinstance(place, str):
            theirs = paper(place)
            values = [f"{theirs[arm]:.1f}" for arm in ARMS]
            gaps = [f"{theirs[arm] - theirs[base]:+.1f}" for arm, base in PAIRS]
        else:
            values = [value_text(results, place, arm) for arm in ARMS]
            gaps = [gap_text(results, place, pair) for pair in PAIRS]
        body.append([label, *values, *gaps])
    compute = [f"{results.gflops[arm]:,.0f}" for arm in ARMS]
    body.append(["model GFLOPs", *compute, "", "", ""])
    return markdown(head, body)


def trainings_block(fields, folder):
    """How far trainings differ: differences by seed, then those of the earlier training."""
    now = Results(ROOT / fields["source"])
    before = Results(ROOT / fields["source"], earlier=True)
    seeds = ", ".join(map(str, now.seeds))
    head = ["points", "this training", f"seeds {seeds}", "earlier training", f"seeds {seeds}"]
    body = []
    for label, place in fields["rows"].items():
        for pair in PAIRS[:2]:
            cells = [f"{label}: {pair_name(pair)}"]
            for training in (now, before):
                cells.append(gap_text(training, place, pair))
                cells.append(gaps_by_seed(training, place, pair))
            body.append(cells)
    return markdown(head, body)


def grid_block(fields, folder):
    """Arms against variants: the first metric, the second in brackets."""
    results = Results(ROOT / fields["source"])
    body = []
    for label, arm in fields["rows"].items():
        cells = [label]
        for variant in results.variants:
            first, second = [pick(results.table, [fields["split"], variant, metric],
                                  results.temperatures[0], arm) for metric in fields["metrics"]]
            cells.append(f"{first.value:.0f} ({second.value:.0f})")
        body.append(cells)
    return markdown([fields["head"], *results.variants], body)


def figure_block(fields, folder):
    """A picture of the curves and how many episodes are behind it."""
    results = Results(ROOT / fields["source"])
    link = os.path.relpath(ROOT / fields["image"], folder)
    unit, n = fields["unit"], next(iter(results.episodes.values()))
    caption = (f"{fields['title']}, {len(results.seeds)} seeds. In the picture each seed and "
               f"point has {results.curve_n} {unit} (bands: 95 %), in the tables {n}.")
    return [f"![{fields['title']}]({link})", "", f"*{caption}*"]


BLOCKS = {"headline": headline_block, "table": table_block, "trainings": trainings_block,
          "grid": grid_block, "figure": figure_block}


def regenerate(text, folder):
    """A document's text with its generated blocks written anew; `folder` is where it lies."""
    def write(block):
        kind, written, _ = block.groups()
        fields = yaml.safe_load(written) or {}
        lines = BLOCKS[kind](fields, folder)
        return "\n".join([f"<!-- {kind}{written}-->", "", *lines, "", "<!-- end -->"])

    return BLOCK.sub(write, text)


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def write_documents():
    """Rewrite the blocks of all documents and redraw the figures they show."""
    for document in documents():
        old = document.read_text(encoding="utf-8")
        new = regenerate(old, document.parent)
        if new != old:
            write_atomic(document, new)
            print(f"written: {document.relative_to(ROOT)}")
        for kind, written, _ in BLOCK.findall(new):
            if kind == "figure":
                fields = yaml.safe_load(written)
                draw(Results(ROOT / fields["source"]), ROOT / fields["image"])
                print(f"drawn: {fields['image']}")


# ---------------------------------------------------------------- the command
def find(arguments):
    """The evaluation.json that the command line names: by configuration, run folder or itself."""
    path = Path(arguments[0])
    if path.is_dir():
        return path / "evaluation.json"
    if path.suffix == ".json":
        return path
    cfg, _, _ = load(arguments)
    return Path(cfg.run.dir) / "evaluation.json"


def publish(path, target):
    """Write an evaluation.json, rounded and without transcripts, where the documents find it.

    What only a person writes there stays: what it is, and the earlier training.
    """
    def three_decimals(text):
        return round(float(text), 3)

    figures = json.loads(path.read_text(encoding="utf-8"), parse_float=three_decimals)
    figures.pop("transcripts", None)
    kept = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    kept.update(figures)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items()]
    write_atomic(target, "{\n" + ",\n".join(lines) + "\n}\n")
    print(f"written: {target}")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="CONFIG.yaml, run folder or FILE.json")
    parser.add_argument("--publish", type=Path, metavar="FILE.json", help="keep the numbers there")
    parser.add_argument("--documents", action="store_true", help="rewrite their tables and figures")
    options = parser.parse_args(arguments)
    if options.documents:
        write_documents()
        return
    if not options.what:
        parser.error("name a CONFIG.yaml, a run's folder or --documents")
    path = find(options.what)
    results = Results(path)
    lines = table_lines(results)
    if results.differences:
        lines += difference_lines(results)
    print("\n".join(lines))
    if results.has_curves() and path.name == "evaluation.json":
        figure = path.with_suffix(".png")
        draw(results, figure)
        print(f"\nwritten: {figure}")
    if results.transcripts:
        print("\n".join(transcript_lines(results)))
    if options.publish:
        publish(path, options.publish)


if __name__ == "__main__":
    run_main(main)
