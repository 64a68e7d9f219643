"""Blocks of README.md and docs/*.md that are generated from results/*.json. No torch.

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
of each seed), grades (of the answers), grid (arms against variants), figure (over compute),
frontier (a picture of sources: {title: file}, perhaps of some variants: alone, or over: kl, and
beside: {title: file}, another file with more trainings from the same Init), gaps (how far PPO lies
above SFT's curve), verdicts (of a findings.json). In table, seeds and figure `sft: FOLDER` names
the training that stands for SFT, if not `sft`, in headline and frontier `sft: {title: FOLDER}`; in
figure and gaps `without: [FOLDER]` leaves trainings out, in frontier `without: {title: [FOLDER]}`.
"""
import json
import os
import re

import yaml

from lib.errors import UserError
from lib.figures import Panel, draw_compute, draw_frontier
from lib.results import names_one, rate_of_init, read, temperature_name
from lib.runs import write_atomic
from lib.settings import ROOT
from lib.tables import (
    NAMES, gap_rows, grade_rows, mean, sign_text, signed_text, training_names)
from lib.verdict_table import HEAD, read_verdicts

PAIRS = (("sft", "Init"), ("rl", "Init"), ("rl", "sft"))
HEADLINE = {  # task and what is measured: the file, and where its rule OOD stands there
    "GP-L, success": ("gp_l_mini", ["all", "rule OOD", "solved"]),
    "GP-VL, success": ("gp_vl_mini", ["all", "rule OOD", "solved"]),
    "V-IRL-L, per step": ("virl_l_mini", ["unseen", "rule OOD", "per_step"]),
    "V-IRL-VL, per step": ("virl_vl_mini", ["unseen", "rule OOD", "per_step"]),
}


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


def value_text(results, place, arm, temperature):
    """An arm's value with half its interval."""
    estimate = arm_value(results, place, arm, temperature)
    return f"{estimate.value:.1f} ± {estimate.half_width:.1f}"


def arm_value(results, place, arm, temperature):
    """The Estimate of an arm."""
    return pick(results.table, place, arm=arm, temperature=temperature)["metrics"][place[-1]]


def gap(results, place, pair, temperature):
    """The row of a paired difference."""
    arm, base = pair
    return pick(results.differences, place, arm=arm, base=base, temperature=temperature)


def gap_text(results, place, pair, temperature):
    return signed_text(gap(results, place, pair, temperature)["metrics"][place[-1]])


def pair_name(pair):
    return " - ".join(NAMES[arm] for arm in pair)


def paper(name):
    """{arm: value} of a row of the paper's results."""
    return json.loads((ROOT / "results" / "paper.json").read_text(encoding="utf-8"))["rows"][name]


def shown_arms(sft="sft"):
    """{column: arm}, with the training that stands for SFT."""
    return {**{arm: arm for arm in NAMES}, "sft": sft}


def headline_block(fields, folder):
    """Rule OOD of the four tasks, their trained rule and the paper's figures beside it.

    fields: {sft: {task: training}}.
    """
    body = []
    for label, (name, place) in HEADLINE.items():
        results = read(ROOT / "results" / f"{name}.json")
        task = label.split(",")[0]
        split, _, metric = place
        ours, trained = [], []
        for arm in shown_arms((fields or {}).get("sft", {}).get(task, "sft")).values():
            ours.append(value_text(results, place, arm, results.temperatures[0]))
            found = arm_value(results, [split, "ID", metric], arm, results.temperatures[0])
            trained.append(f"{found.value:.0f}")
        theirs = map(str, paper(f"{task} rule OOD").values())
        body.append([label, *ours, " / ".join(trained), " / ".join(theirs)])
    return markdown(["rule OOD, %", *NAMES.values(), "ID: Init / SFT / RL",
                     "paper (11B), rule OOD: Init / SFT / RL"], body)


def table_block(fields, folder):
    """The arms and their paired differences, a row per (split, variant, metric) or of the paper.

    At the first temperature; more of them have a row each.
    """
    results = read(ROOT / fields["source"])
    arms = shown_arms(fields.get("sft", "sft"))
    body = []
    for label, place in fields["rows"].items():
        if isinstance(place, str):
            theirs = paper(place)
            values = [f"{theirs[arm]:.1f}" for arm in NAMES]
            gaps = [f"{theirs[arm] - theirs[base]:+.1f}" for arm, base in PAIRS]
            body.append([label, *values, *gaps])
            continue
        for temperature in results.temperatures:
            at = f"{label}, {temperature_name(temperature)}" if results.temperatures[1:] else label
            values = [value_text(results, place, arm, temperature) for arm in arms.values()]
            gaps = [gap_text(results, place, (arms[arm], arms[base]), temperature)
                    for arm, base in PAIRS]
            body.append([at, *values, *gaps])
    compute = [f"{results.gflops[arm]:,.0f}" for arm in arms.values()]
    body.append(["model GFLOPs", *compute, "", "", ""])
    if any(results.official_gflops.values()):
        official = [f"{results.official_gflops[arm]:,.0f}" for arm in arms.values()]
        body.append(["GFLOPs as the official code counts", *official, "", "", ""])
    others = set(results.gflops) - set(arms.values())
    names = names_of_arms(results)
    notes = [f"\nNote: {in_words(note, names)}." for note in results.notes
             if not names_one(note, others)]
    return markdown(["%", *NAMES.values(), *map(pair_name, PAIRS)], body) + notes


def names_of_arms(results):
    """{arm: how a figure names it}."""
    arms = dict.fromkeys(row["arm"] for row in results.table)
    return training_names(arms, rate_of_init(results))


def in_words(note, names):
    """A note on arms and their checkpoints (sft/step_640) with their names (SFT at step 640)."""
    arms = "|".join(re.escape(arm) for arm in sorted(names, key=len, reverse=True))
    note = re.sub(rf"(?<![\w.=/-])({arms})(?![\w.=-])", lambda found: names[found[0]], note)
    return re.sub(r"/step_(\d+)", r" at step \1", note)


def seeds_block(fields, folder):
    """Of each arm and paired difference: all seeds together, their mean, each; where an interval
    holds 0, how many seeds the sign would take, by the spread between these."""
    results = read(ROOT / fields["source"])
    arms = shown_arms(fields.get("sft", "sft"))
    wanted = {"temperature": results.temperatures[0]}
    body = []
    for label, place in fields["rows"].items():
        rows = {}
        for arm, name in NAMES.items():
            rows[name] = pick(results.table, place, arm=arms[arm], **wanted)
        for pair in PAIRS:
            rows[pair_name(pair)] = gap(results, place, [arms[arm] for arm in pair], **wanted)
        for name, row in rows.items():
            estimate, each = row["metrics"][place[-1]], row["per_seed"][place[-1]]
            interval = f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
            by_seed = ["-" if one is None else f"{one:.1f}" for one in each]
            wanted_for_sign = sign_text(estimate, each) if "base" in row else ""
            body.append([f"{label}: {name}", interval, f"{mean(each):.1f}", ", ".join(by_seed),
                         wanted_for_sign])
    seeds = "seeds " + ", ".join(map(str, results.seeds))
    head = ["% or points", "all together", "mean of seeds", seeds, "a sign would take"]
    return markdown(head, body)


def grades_block(fields, folder):
    """How the arms' answers were graded, of first attempts and of retries."""
    results = read(ROOT / fields["source"])
    names = names_of_arms(results)
    head, *body = grade_rows(results, fields["split"])
    for cells in body:
        cells[2] = names[cells[2]]
    return markdown(head, body)


def grid_block(fields, folder):
    """Arms against variants: the first metric with half its interval, the second in brackets."""
    results = read(ROOT / fields["source"])
    first, second = fields["metrics"]
    body = []
    for label, arm in fields["rows"].items():
        cells = [label]
        for variant in results.variants:
            place, temperature = [fields["split"], variant], results.temperatures[0]
            a = arm_value(results, [*place, first], arm, temperature)
            b = arm_value(results, [*place, second], arm, temperature)
            cells.append(f"{a.value:.0f} ± {a.half_width:.0f} ({b.value:.0f})")
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


def read_curves(source, left_out):
    """The results in a file, less the curves of trainings that a block leaves out."""
    results = read(ROOT / source)
    for arms in results.curves.values():
        for arm in left_out:
            arms.pop(arm, None)
    results.frontier = [row for row in results.frontier if row["base"] not in left_out]
    return results


def panels_of(fields):
    """The Panels of a frontier block."""
    panels = []
    for title, source in fields["sources"].items():
        results = read_curves(source, fields.get("without", {}).get(title, []))
        if title in fields.get("beside", {}):
            add_curves(results, read(ROOT / fields["beside"][title]))
        sft = fields.get("sft", {}).get(title, "sft")
        for variant in list(results.variants)[1:]:
            if variant in fields.get("variants", results.variants):
                over_kl = fields.get("over") == "kl"
                panels.append(Panel(title, results, variant, over_kl, sft))
    return panels


def add_curves(results, others):
    """Give results the curves of trainings that they lack and others, from the same Init, have."""
    for variant, curves in results.curves.items():
        for arm, points in others.curves[variant].items():
            curves.setdefault(arm, points)


def frontier_block(fields, folder):
    """A picture of variants against the trained one, and how many episodes are behind it."""
    link = os.path.relpath(ROOT / fields["image"], folder)
    sizes = []
    for title, source in fields["sources"].items():
        results = read(ROOT / source)
        sizes.append(f"{title}: {size_text(results)}")
        if title in fields.get("beside", {}):
            others = read(ROOT / fields["beside"][title])
            more = [name for arm, name in training_names(curves_of(others)).items()
                    if arm not in curves_of(results)]
            sizes[-1] += f" ({' and '.join(more)}: {size_text(others, short=True)})"
    caption = (f"*{fields['title']}. Checkpoints evenly spread over each training; thick: all "
               f"seeds, thin: each; the star is Init, the last is large. {'; '.join(sizes)}.*")
    return [f"![{fields['title']}]({link})", "", caption]


def size_text(results, short=False):
    """Seeds, and episodes behind a point of a curve beside those behind a cell of the table; short:
    where the same has just been said of others."""
    count, n = len(results.seeds), next(iter(results.splits.values()))
    text = f"{count} seed{'s' * (count > 1)}, {results.curve_n}"
    if results.curve_n < n:
        text += f" of {n}" if short else f" of the table's {n}"
    return text if short else f"{text} episodes a point"


def curves_of(results):
    """{training: Points} in the first variant."""
    return next(iter(results.curves.values()))


def gaps_block(fields, folder):
    """How far PPO lies above each SFT training's curve."""
    results = read_curves(fields["source"], fields.get("without", []))
    head, *body = gap_rows(results)
    return markdown(head, body)


def verdicts_block(fields, folder):
    """The verdicts on the findings, of a findings.json, and what must be read with them."""
    table = read_verdicts(ROOT / fields["source"])
    body = []
    for (name, *cells), *differences in table.findings:
        body += [[f"**{name}**", *cells], *differences]
    notes = [f"\nNote: {note}." for note in table.notes]
    return markdown(HEAD, body) + notes


BLOCKS = {"frontier": frontier_block, "gaps": gaps_block, "headline": headline_block,
          "table": table_block, "seeds": seeds_block, "grades": grades_block, "grid": grid_block,
          "figure": figure_block, "verdicts": verdicts_block}
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
                results = read_curves(fields["source"], fields.get("without", []))
                draw_compute(results, ROOT / fields["image"], fields.get("sft", "sft"))
            elif kind == "frontier":
                draw_frontier(panels_of(fields), ROOT / fields["image"])
            else:
                continue
            print(f"drawn: {fields['image']}")
