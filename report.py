"""Show what eval.py found, intervals included: reads its JSON, no model.

    python report.py CONFIG.yaml | RUN_FOLDER | FILE.json    prints tables and differences, draws
                                                             evaluation.png (Figures 5, 7, 8) and
                                                             frontier.png (OOD against ID), writes
                                                             report.html: all of it, with the
                                                             trainings' curves and conversations
    python report.py RUN_FOLDER                              before an evaluation, or during a
                                                             training: report.html of its curves
    python report.py SUITE_FOLDER                            prints the verdicts of findings.py,
                                                             writes report.html: these and all of
                                                             the evaluations below
    python report.py RUN_FOLDER --publish results/X.json     keeps the numbers for the documents
    python report.py --documents                             rewrites blocks and figures of
                                                             README.md and docs/*.md

A generated block stands between two comments. The first names the block and, as YAML, its fields:

    <!-- table
    source: results/gp_l_mini.json
    rows:
      rule OOD: [all, rule OOD, solved]         # label: [split, variant, metric]
      rule OOD, paper: GP-L rule OOD            # label: row of results/paper.json
    -->
    ... (written here) ...
    <!-- end -->

Blocks: headline (rule OOD of all four tasks), table (arms and paired differences), seeds (the same
of each seed), trainings (differences by seed, and those of an earlier training), grades (of the
answers), grid (arms against variants), figure (over compute), frontier (a picture of sources:
{title: file}, perhaps of some variants: alone), gaps (how far PPO lies above SFT's curve). In
headline, table and seeds, `sft: FOLDER` names the training that stands for SFT, if not `sft`; in
figure, frontier and gaps, `without: [FOLDER]` leaves trainings out.
"""
import argparse
import json
import os
import re
from itertools import chain, cycle, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import yaml

from environments import make_env, observations
from lib.conversations import bare_answers, conversation, read_conversations, seeds_of
from lib.curves import logs_of, panels_of as panels_of_training
from lib.page import Page, changed_settings, findings_beside, settings_files, write_page
from lib.results import read, temperature_name
from lib.runs import write_atomic
from lib.settings import ROOT, UserError, load, run_main
from lib.tables import NAMES, all_tables, gap_rows, grade_rows, mean, signed_text, training_name
from lib.verdict_table import read_verdicts

PAIRS = (("sft", "Init"), ("rl", "Init"), ("rl", "sft"))
COLORS = {"Init": "black", "sft": "#c4442a", "rl": "#2a6fb0"}
OTHER_COLORS = ("tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive",
                "tab:cyan", "tab:gray")
STYLES = {  # of the trainings on a frontier: colours that the colour-blind tell apart, and markers
    "Init": [{"color": "black", "marker": "*", "markersize": 7, "linestyle": "none", "zorder": 4}],
    "sft": [{"color": "#c4442a", "marker": "o"}, {"color": "#e69f00", "marker": "s"},
            {"color": "#cc79a7", "marker": "D"}, {"color": "#7f3c00", "marker": "P"}],
    "rl": [{"color": "#2a6fb0", "marker": "^"}, {"color": "#56b4e9", "marker": "v"},
           {"color": "#009e73", "marker": "<"}, {"color": "#332288", "marker": ">"}],
}
HEADLINE = {  # task and what is measured: the file, and where its rule OOD stands there
    "GP-L, success": ("gp_l_mini", ["all", "rule OOD", "solved"]),
    "GP-VL, success": ("gp_vl_mini", ["all", "rule OOD", "solved"]),
    "V-IRL-L, per step": ("virl_l_mini", ["unseen", "rule OOD", "per_step"]),
    "V-IRL-VL, per step": ("virl_vl_mini", ["unseen", "rule OOD", "per_step"]),
}


# ---------------------------------------------------------------- on screen
def print_transcripts(results):
    """A few whole episodes of each arm: every answer, its reward, what the verifier said."""
    temperature = temperature_name(results.temperatures[0])
    for found in results.transcripts:
        print(f"\n--- {found['arm']}, {found['variant']}, {temperature}")
        for episode in found["episodes"]:
            for turn in episode:
                print(f"  {turn['answer']}")
                print(f"    -> {turn['reward']:+g} {turn['verifier'] or 'correct'}")
            print()


# ---------------------------------------------------------------- Figures 5, 7 and 8
def draw(results, path):
    """The leading metric against model GFLOPs, one panel per variant (ID on top): Figures 5 and 7.

    Arms beside Init, sft and rl have colours of their own and are named above the panels.

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
    everywhere = chain(*[chain(*arms.values()) for arms in results.curves.values()])
    most_gflops = max(point.gflops for point in everywhere)
    others = cycle(OTHER_COLORS)
    colors = {arm: COLORS.get(arm) or next(others) for arm in results.curves[next(iter(variants))]}
    for panels, variant in zip(axes, variants):
        panels[0].set_ylabel(f"{variant}\n{lead.name} % ({temperature})")
        for arm, points in results.curves[variant].items():
            draw_arm(panels, arm, points, colors[arm], most_gflops)
        for panel in panels:
            panel.grid(alpha=0.3)
    size = f"{results.curve_n} episodes per seed and point, seeds: {len(results.seeds)}"
    axes[0][0].set_title(size, fontsize=8)
    if set(colors) <= set(COLORS):
        axes[0][0].legend(loc="lower right", fontsize=8)
    else:
        figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8,
                      loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)
    axes[-1][0].set_xlabel("model GFLOPs (6ND trained + 2ND sampled)")
    if columns == 2:
        axes[-1][1].set_xlabel("recognition % (paler: less compute)")
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight" if figure.legends else None)
    plt.close(figure)


def draw_arm(panels, arm, points, color, most_gflops):
    """An arm's Points: a curve with its 95 % band over compute, then dots over recognition.

    The dots are the fuller the more compute was spent. Init is a star. Each seed has small dots.
    """
    gflops, value, low, high, recognition, _ = zip(*points)
    name = training_name(arm)
    compute, *others = panels
    if arm.startswith("Init"):
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


# ---------------------------------------------------------------- the frontier
class Panel(NamedTuple):
    """One variant's leading metric against that of the first variant, which is the trained one."""
    title: str
    results: SimpleNamespace
    variant: str


def draw_frontier(panels, path):
    """A line per training through its checkpoints, from Init, a star: thick for all seeds together,
    thin for each. The last checkpoint is the largest."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), squeeze=False,
                                figsize=(4.5 * len(panels), 4.2))
    for axis, panel in zip(axes[0], panels):
        trained = next(iter(panel.results.variants))
        looks = {kind: cycle(styles) for kind, styles in STYLES.items()}
        for arm, points in panel.results.curves[trained].items():
            kind = re.match(r"[^-@ ]*", arm)[0]
            thick = {"markersize": 4, "linewidth": 2, "zorder": 3, **next(looks[kind])}
            thin = {**thick, "markersize": 1.5, "linewidth": 0.5, "zorder": 2, "alpha": 0.4}
            others = panel.results.curves[panel.variant][arm]
            x, y = [[point.value for point in path] for path in (points, others)]
            draw_path(axis, x, y, **thick, label=training_name(arm))
            for x, y in zip(paths_of_seeds(points), paths_of_seeds(others)):
                draw_path(axis, x, y, **thin)
        axis.set_title(panel.title)
        axis.set_xlabel(f"{trained}: {panel.results.reports[0].name} %")
        axis.set_ylabel(f"{panel.variant}: {panel.results.reports[0].name} %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_path(axis, x, y, **look):
    (line,) = axis.plot(x, y, **look)
    look.update(markersize=2 * line.get_markersize(), label=None)
    axis.plot(x[-1:], y[-1:], **look)


def paths_of_seeds(points):
    """Per seed the values of the metric at each of the Points."""
    per_point = [[value for value, _ in point.per_seed] for point in points]
    return zip(*per_point)


# ---------------------------------------------------------------- blocks of the documents
def pick(rows, place, **wanted):
    """The row at a place [split, variant, metric] that has what is wanted.

    Raises: UserError if there is none.
    """
    split, variant, metric = place
    wanted.update(split=split, variant=variant)
    for row in rows:
        if wanted.items() <= row.items() and metric in row["metrics"]:
            return row
    raise UserError(f"no {metric} of {wanted}")


def markdown(head, body):
    """A Markdown table of lists of texts."""
    ruler = ["---"] * len(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ruler, *body)]


def value_text(results, place, arm, greedy=True):
    """An arm's value with half its interval, and the greedy one in brackets if that was played."""
    estimate = arm_value(results, place, arm, results.temperatures[0])
    text = f"{estimate.value:.1f} ± {estimate.half_width:.1f}"
    if greedy and 0 in results.temperatures[1:]:
        text += f" ({arm_value(results, place, arm, 0).value:.1f})"
    return text


def arm_value(results, place, arm, temperature):
    """The Estimate of an arm."""
    return pick(results.table, place, arm=arm, temperature=temperature)["metrics"][place[-1]]


def gap(results, place, pair):
    """The row of a paired difference, at the first temperature."""
    arm, base = pair
    wanted = {"arm": arm, "base": base, "temperature": results.temperatures[0]}
    return pick(results.differences, place, **wanted)


def gap_text(results, place, pair):
    return signed_text(gap(results, place, pair)["metrics"][place[-1]])


def pair_name(pair):
    return " - ".join(NAMES[arm] for arm in pair)


def paper(name):
    """{arm: value} of a row of the paper's results."""
    return json.loads((ROOT / "results" / "paper.json").read_text(encoding="utf-8"))["rows"][name]


def shown_arms(sft="sft"):
    """{column: arm}, with the training that stands for SFT."""
    return {**{arm: arm for arm in NAMES}, "sft": sft}


def headline_block(fields, folder):
    """Rule OOD of the four tasks, the paper's beside ours. fields: {sft: {task: training}}."""
    body = []
    for label, (name, place) in HEADLINE.items():
        results = read(ROOT / "results" / f"{name}.json")
        task = label.split(",")[0]
        theirs = map(str, paper(f"{task} rule OOD").values())
        arms = shown_arms((fields or {}).get("sft", {}).get(task, "sft"))
        ours = [value_text(results, place, arm, greedy=False) for arm in arms.values()]
        body.append([label, *ours, " / ".join(theirs)])
    return markdown(["rule OOD, %", *NAMES.values(), "paper (11B): Init / SFT / RL"], body)


def table_block(fields, folder):
    """The arms and their paired differences, a row per (split, variant, metric) or of the paper."""
    results = read(ROOT / fields["source"])
    arms = shown_arms(fields.get("sft", "sft"))
    body = []
    for label, place in fields["rows"].items():
        cells = [label]
        if isinstance(place, str):
            theirs = paper(place)
            cells += [f"{theirs[arm]:.1f}" for arm in NAMES]
            cells += [f"{theirs[arm] - theirs[base]:+.1f}" for arm, base in PAIRS]
        else:
            cells += [value_text(results, place, arm) for arm in arms.values()]
            cells += [gap_text(results, place, (arms[arm], arms[base])) for arm, base in PAIRS]
        body.append(cells)
    compute = [f"{results.gflops[arm]:,.0f}" for arm in arms.values()]
    body.append(["model GFLOPs", *compute, "", "", ""])
    if any(results.official_gflops.values()):
        official = [f"{results.official_gflops[arm]:,.0f}" for arm in arms.values()]
        body.append(["GFLOPs as the official code counts", *official, "", "", ""])
    others = set(results.gflops) - set(arms.values())
    notes = [f"\nNote: {note}." for note in results.notes if not names_one(note, others)]
    return markdown(["%", *NAMES.values(), *map(pair_name, PAIRS)], body) + notes


def names_one(note, arms):
    """Whether a note speaks of one of some arms."""
    words = re.findall(r"[\w=.-]+", note)
    return not arms.isdisjoint(words)


def trainings_block(fields, folder):
    """How far trainings differ: differences by seed, then those of the earlier training."""
    now = read(ROOT / fields["source"])
    before = SimpleNamespace(**{**vars(now), **now.earlier})
    body = []
    for (label, place), pair in product(fields["rows"].items(), PAIRS[:2]):
        cells = [f"{label}: {pair_name(pair)}"]
        for training in (now, before):
            each = gap(training, place, pair)["per_seed"][place[-1]]
            by_seed = ", ".join(f"{value:+.1f}" for value in each)
            cells += [gap_text(training, place, pair), by_seed or "not kept"]
        body.append(cells)
    seeds = "seeds " + ", ".join(map(str, now.seeds))
    return markdown(["points", "this training", seeds, "earlier training", seeds], body)


def seeds_block(fields, folder):
    """Of each arm and paired difference: all seeds together, their mean, each."""
    results = read(ROOT / fields["source"])
    arms = shown_arms(fields.get("sft", "sft"))
    wanted = {"temperature": results.temperatures[0]}
    body = []
    for label, place in fields["rows"].items():
        rows = {}
        for arm, name in NAMES.items():
            rows[name] = pick(results.table, place, arm=arms[arm], **wanted)
        for pair in PAIRS:
            rows[pair_name(pair)] = gap(results, place, [arms[arm] for arm in pair])
        for name, row in rows.items():
            estimate, each = row["metrics"][place[-1]], row["per_seed"][place[-1]]
            interval = f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
            by_seed = ["-" if one is None else f"{one:.1f}" for one in each]
            body.append([f"{label}: {name}", interval, f"{mean(each):.1f}", ", ".join(by_seed)])
    seeds = "seeds " + ", ".join(map(str, results.seeds))
    return markdown(["% or points", "all together", "mean of seeds", seeds], body)


def grades_block(fields, folder):
    """How the arms' answers were graded, of first attempts and of retries."""
    head, *body = grade_rows(read(ROOT / fields["source"]), fields["split"])
    return markdown(head, body)


def grid_block(fields, folder):
    """Arms against variants: the first metric, the second in brackets."""
    results = read(ROOT / fields["source"])
    first, second = fields["metrics"]
    body = []
    for label, arm in fields["rows"].items():
        cells = [label]
        for variant in results.variants:
            place, temperature = [fields["split"], variant], results.temperatures[0]
            a = arm_value(results, [*place, first], arm, temperature)
            b = arm_value(results, [*place, second], arm, temperature)
            cells.append(f"{a.value:.0f} ({b.value:.0f})")
        body.append(cells)
    return markdown([fields["head"], *results.variants], body)


def figure_block(fields, folder):
    """A picture of the curves and how many episodes are behind it."""
    results = read(ROOT / fields["source"])
    link = os.path.relpath(ROOT / fields["image"], folder)
    unit, n = fields["unit"], next(iter(results.splits.values()))
    caption = (f"{fields['title']}, {len(results.seeds)} seeds. In the picture each seed and "
               f"point has {results.curve_n} {unit} (bands: 95 %), in the tables {n}.")
    return [f"![{fields['title']}]({link})", "", f"*{caption}*"]


def read_curves(source, fields):
    """The results in a file, less the curves of trainings that a block leaves out."""
    results = read(ROOT / source)
    left_out = fields.get("without", [])
    for arms in results.curves.values():
        for arm in left_out:
            arms.pop(arm, None)
    results.frontier = [row for row in results.frontier if row["base"] not in left_out]
    return results


def panels_of(fields):
    """The Panels of a frontier block."""
    panels = []
    for title, source in fields["sources"].items():
        results = read_curves(source, fields)
        for variant in list(results.variants)[1:]:
            if variant in fields.get("variants", results.variants):
                panels.append(Panel(title, results, variant))
    return panels


def frontier_block(fields, folder):
    """A picture of variants against the trained one, and how many episodes are behind it."""
    link = os.path.relpath(ROOT / fields["image"], folder)
    behind = {panel.title: panel.results for panel in panels_of(fields)}
    sizes = [f"{title}: {len(results.seeds)} seeds, {results.curve_n} episodes per seed and point"
             for title, results in behind.items()]
    caption = (f"*{fields['title']}. Thick: all seeds, thin: each of them; the star is Init, the "
               f"last checkpoint is large. {'; '.join(sizes)}.*")
    return [f"![{fields['title']}]({link})", "", caption]


def gaps_block(fields, folder):
    """How far PPO lies above each SFT training's curve."""
    head, *body = gap_rows(read_curves(fields["source"], fields))
    return markdown(head, body)


BLOCKS = {"frontier": frontier_block, "gaps": gaps_block, "headline": headline_block,
          "table": table_block, "trainings": trainings_block, "seeds": seeds_block,
          "grades": grades_block, "grid": grid_block, "figure": figure_block}
BLOCK = re.compile(rf"<!-- ({'|'.join(BLOCKS)})\b(.*?)-->\n(.*?)<!-- end -->", re.DOTALL)


def regenerate(text, folder):
    """A document's text with its generated blocks written anew; `folder` is where it lies."""
    def write(block):
        kind, written, _ = block.groups()
        lines = BLOCKS[kind](yaml.safe_load(written), folder)
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
            fields = yaml.safe_load(written)
            if kind == "figure":
                draw(read_curves(fields["source"], fields), ROOT / fields["image"])
            elif kind == "frontier":
                draw_frontier(panels_of(fields), ROOT / fields["image"])
            else:
                continue
            print(f"drawn: {fields['image']}")


# ---------------------------------------------------------------- report.html
def draw_all(results, path):
    """Draw the figures of an evaluation.json beside it. Returns: {title: path}."""
    if not any(results.curves.values()):
        return {}
    lead = results.reports[0].name
    figures = {f"{lead} against model GFLOPs": path.with_suffix(".png")}
    draw(results, path.with_suffix(".png"))
    panels = [Panel("", results, variant) for variant in list(results.variants)[1:]]
    if panels:
        figures["Other variants against the trained one"] = path.with_name("frontier.png")
        draw_frontier(panels, path.with_name("frontier.png"))
    for drawn in figures.values():
        print(f"written: {drawn}")
    return figures


def write_evaluation_page(results, folder, figures):
    """Write the report.html of an evaluation. Args: folder: where it lies; figures: of draw_all."""
    logs = {}
    for run in results.runs:
        for training, records in logs_of(run).items():
            logs[training if len(results.runs) == 1 else f"{run}: {training}"] = records
    conversations, problems = conversations_in(folder)
    minutes = [f"{training_name(arm)} {spent:g}" for arm, spent in results.minutes.items()]
    facts = {"runs": ", ".join(results.runs), "seeds": ", ".join(map(str, results.seeds)),
             "commit": results.commit, "machine": results.machine, "versions": results.versions,
             "minutes": ", ".join(minutes)}
    shipped, changed = changed_settings(settings_files(folder, results.runs))
    save_page(folder, Page(
        title=f"Evaluation of {folder}", facts=facts, notes=results.notes + problems,
        findings=findings_beside(folder), tables=all_tables(results), figures=figures,
        trainings=panels_of_training(logs), settings=changed, shipped=shipped,
        conversations=conversations))


def write_training_page(folder):
    """Write the report.html of trainings that no evaluation has met yet: their curves so far."""
    logs = logs_of(folder)
    shipped, changed = changed_settings(settings_files(folder, [folder]))
    facts = {}
    for training, records in logs.items():
        facts[training_name(training)] = f"{records[-1]['step']} steps so far"
        print(f"{training}: {records[-1]['step']} steps so far")
    save_page(folder, Page(
        title=f"Training in {folder}", facts=facts, findings=findings_beside(folder),
        trainings=panels_of_training(logs), settings=changed, shipped=shipped))


def write_suite_page(path):
    """Print the verdicts of a findings.json and write report.html beside it: all evaluations."""
    folder, verdicts = path.parent, read_verdicts(path)
    print(*verdicts.lines(), "", sep="\n")
    page = Page(title=f"Findings in {folder}", findings=verdicts)
    for name in verdicts.evaluations:
        try:
            add_evaluation(page, name, folder / name / "evaluation.json")
        except UserError as error:
            page.notes.append(f"{name}: {error}")
    save_page(folder, page)


def add_evaluation(page, name, path):
    """Add an evaluation.json and what lies beside it to a suite's Page, under its name; curves of
    its first run alone, as of all they would be too many. Raises: UserError if it cannot be read.
    """
    results = read(path)
    page.facts[name] = f"{results.commit}, {results.machine}, {results.versions}"
    page.tables += [table._replace(title=f"{name}: {table.title}") for table in all_tables(results)]
    for title, drawn in draw_all(results, path).items():
        page.figures[f"{name}: {title}"] = drawn
    run = results.runs[0]
    for kind, panels in panels_of_training(logs_of(run)).items():
        page.trainings[f"{run}: {kind}"] = panels  # evaluations share runs
    for training, turns in bare_answers(run).items():
        page.bare[f"{run}: {training}"] = turns
    conversations, problems = conversations_in(path.parent)
    page.conversations += [one._replace(variant=f"{name}: {one.variant}") for one in conversations]
    page.notes += [f"{name}: {problem}" for problem in problems]


def save_page(folder, page):
    write_page(folder / "report.html", page)
    print(f"written: {folder / 'report.html'}")


def conversations_in(folder):
    """The Conversations of an evaluation's folder, each with what was to be seen.

    Returns: list of them; list of lines on what could not be shown.
    """
    found, problems = [], []
    for variant, lines in read_conversations(folder / "conversations.jsonl").items():
        try:
            env = make_env(lines[0]["env"], lines[0]["verify_iters"])
        except UserError as error:
            env = None
            problems.append(f"{variant}: pictures and prompts are not shown ({error})")
        for nth, seed in enumerate(seeds_of(lines)):
            seen = observations(env, seed) if env else []
            found.append(conversation(lines, nth, seen, env.answer_key if env else ""))
    return found, problems


# ---------------------------------------------------------------- the command
def find(arguments):
    """The evaluation.json that the command line names: by configuration, run folder or itself;
    findings.json of a suite's folder."""
    path = Path(arguments[0])
    if path.suffix == ".json":
        return path
    if not path.is_dir():
        cfg, _, _ = load(arguments)
        path = Path(cfg.run.dir)
    suite, evaluation = path / "findings.json", path / "evaluation.json"
    return suite if suite.exists() and not evaluation.exists() else evaluation


def publish(path, target):
    """Write an evaluation.json, rounded and without transcripts, where the documents find it.

    What only a person writes there stays: what it is, and the earlier training.
    """
    kept = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    text = path.read_text(encoding="utf-8")
    kept.update(json.loads(text, parse_float=lambda number: round(float(number), 3)))
    kept.pop("transcripts", None)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items()]
    write_atomic(target, "{\n" + ",\n".join(lines) + "\n}\n")
    print(f"written: {target}")


def main(arguments):
    """Show or publish an evaluation. arguments: of the command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="CONFIG.yaml, FILE.json, folder of a run or suite")
    parser.add_argument("--publish", type=Path, metavar="FILE.json", help="keep the numbers there")
    parser.add_argument("--documents", action="store_true", help="rewrite their tables and figures")
    options = parser.parse_args(arguments)
    if options.documents:
        write_documents()
        return
    if not options.what:
        parser.error("name a CONFIG.yaml, a run's folder or --documents")
    path = find(options.what)
    if path.name == "findings.json":
        write_suite_page(path)
        return
    if not path.exists() and logs_of(path.parent):
        write_training_page(path.parent)
        return
    results = read(path)
    for table in all_tables(results):
        print(*table.lines(), sep="\n")
    for note in results.notes:
        print(f"\nnote: {note}")
    if path.name == "evaluation.json":
        print()
        figures = draw_all(results, path)
        write_evaluation_page(results, path.parent, figures)
    print_transcripts(results)
    if options.publish:
        publish(path, options.publish)


if __name__ == "__main__":
    run_main(main)
