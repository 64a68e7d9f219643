"""The tables of an evaluation, as texts: report.py prints them, lib/page.py shows the same in HTML.

Their argument `results` is what report.read returns: an evaluation.json, see lib/results.py.
"""
import re
from itertools import chain, product
from typing import NamedTuple

from lib.results import rate_of_init, temperature_name
from lib.student import seeds_for_sign

NAMES = {"Init": "Init", "sft": "SFT", "rl": "RL"}
GRADES = {"first": "first attempts", "retries": "retries"}
FRONTIER = ("equal FLOPs", "equal ID")  # where PPO is compared with the curve of SFT, ...
WITH_KL = (*FRONTIER, "equal KL", "equal KL, first attempt")  # ... with eval.kl


class Table(NamedTuple):
    """Rows of cells, each a text padded to its column's width; the first row is the head."""
    title: str
    rows: list

    def lines(self):
        """As printed, after an empty line."""
        return ["", self.title, *["".join(row).rstrip() for row in self.rows]]


def all_tables(results):
    """Every Table that there is something for, in the order of reading."""
    tables = arm_tables(results)
    if results.differences:
        tables += difference_tables(results)
    if len(results.seeds) > 1:
        tables += seed_tables(results)
    tables += grade_tables(results)
    if results.frontier:
        tables.append(gap_table(results))
    return tables


def aligned(rows, left):
    """Rows of texts, padded: the first `left` cells of each flush left, the others flush right."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    padded = []
    for cells in rows:
        flush_left = map(str.ljust, cells[:left], widths)
        flush_right = map(str.rjust, cells[left:], widths[left:])
        padded.append([*flush_left, *flush_right])
    return padded


# ---------------------------------------------------------------- arms, and their differences
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
        last = row["metrics"].get(name)
        values.append(f"{last.value:5.1f}" if last else f"{'-':>5}")
    text = " / ".join(values)
    if last is None or row["temperature"] is None:
        return text + " " * 9
    return f"{text} ±{last.half_width:4.1f}   "


def arm_tables(results):
    """A Table per split and report: of every variant the arms, then the reference policies."""
    tables = []
    for split, report in product(results.splits, results.reports):
        found = [row for row in results.table if row["split"] == split]
        title = f"{split}: {report.title}, ± half the 95 % interval, n = {found[0]['n']}"
        tables.append(Table(title, arm_rows(results, found, report.metrics)))
    return tables


def arm_rows(results, found, metrics):
    """Rows of cells of the rows `found` of results.table, a head first."""
    variant_width = max(map(len, results.variants)) + 2
    arm_width = max(len(row["arm"]) for row in results.table) + 2
    cell_width = max(24, 8 * len(metrics) + 8)
    head = [" " * variant_width, " " * arm_width]
    head += [f"{temperature_name(one):^{cell_width}}" for one in results.temperatures]
    head.append("   model GFLOPs")
    if any(results.official_gflops.values()):
        head.append("  as official")
    rows = [head]
    before = None
    for (variant, arm), by_temperature in grouped(found, "variant", "arm").items():
        shown = "" if variant == before else variant
        cells = [f"{shown:{variant_width}}", f"{arm:{arm_width}}"]
        for row in by_temperature.values():
            cells.append(f"{cell_text(row, metrics):>{cell_width}}")
        for counted in (results.gflops, results.official_gflops):
            if counted.get(arm) is not None:
                cells.append(f"{counted[arm]:13,.0f}")
        rows.append(cells)
        before = variant
    return rows


def difference_tables(results):
    """The paired differences, a Table per report, of its leading metric."""
    widths = [
        max(8, *[len(split) + 2 for split in results.splits]),
        max(map(len, results.variants)) + 2,
        max(len(row["arm"] + row["base"]) + 6 for row in results.differences),
    ]
    names = [f"{temperature_name(one):^24}" for one in results.temperatures]
    tables = []
    for report in results.reports:
        title = f"paired differences of {report.name} in points [95 % interval]"
        rows = [[*[" " * width for width in widths], *names]]
        found = grouped(results.differences, "split", "variant", "arm", "base")
        for (split, variant, arm, base), by_temperature in found.items():
            labels = (split, variant, f"{arm} - {base}")
            cells = list(map(str.ljust, labels, widths))
            for row in by_temperature.values():
                cells.append(difference_text(row["metrics"].get(report.lead)))
            rows.append(cells)
        tables.append(Table(title, rows))
    return tables


def difference_text(gap):
    """An Estimate, or None, padded."""
    if gap is None:
        return f"{'-':>6}{'':18}"
    return f"{gap.value:+6.1f} [{gap.low:+5.1f}, {gap.high:+5.1f}]   "


# ---------------------------------------------------------------- by seed
def seed_tables(results):
    """Leading metrics of the arms and of their differences: together, and of each seed."""
    temperature = results.temperatures[0]
    seeds = [f"seed {seed}" for seed in results.seeds]
    tables = []
    for report in results.reports:
        body = [["", "", "", "together", "mean of seeds", *seeds]]
        for row in results.table + results.differences:
            each = row["per_seed"].get(report.lead)
            if each and row["temperature"] == temperature:
                numbers = [row["metrics"][report.lead].value, mean(each), *each]
                body.append([row["split"], row["variant"], who(row), *map(number_text, numbers)])
        title = f"{report.name} by seed, {temperature_name(temperature)}"
        tables.append(Table(title, aligned(body, left=3)))
    return tables


def number_text(number):
    return "-" if number is None else f"{number:.1f}"


def who(row):
    return f"{row['arm']} - {row['base']}" if "base" in row else row["arm"]


def mean(per_seed):
    """Of the seeds in which there was something to measure."""
    known = [one for one in per_seed if one is not None]
    return sum(known) / len(known)


# ---------------------------------------------------------------- grades of the answers
def grade_rows(results, split):
    """How the arms' answers were graded at the first temperature: rows of texts, a head first."""
    rows = []
    for row in results.table:
        if row["split"] == split and row["temperature"] == results.temperatures[0]:
            rows.append(row)
    categories = {}  # in the order of appearance
    for kind, row in product(GRADES, rows):
        categories.update(row["grades"][kind])
    body = [["answers, %", "", "", *categories, "repeated"]]
    for kind, row in product(GRADES, rows):
        shares = row["grades"][kind]
        numbers = [f"{shares.get(name, 0):.1f}" for name in categories]
        repeated = f"{row['grades']['repeated']:.1f}" if kind == "retries" else ""
        body.append([GRADES[kind], row["variant"], row["arm"], *numbers, repeated])
    return body


def grade_tables(results):
    """`grade_rows` of every split, where they were counted."""
    tables = []
    known = "grades" in results.table[0]
    for split in results.splits if known else ():
        title = f"{split}: grades of the answers, {temperature_name(results.temperatures[0])}"
        tables.append(Table(title, aligned(grade_rows(results, split), left=3)))
    return tables


# ---------------------------------------------------------------- how far above SFT's curve
def gap_rows(results):
    """How far PPO lies above each SFT training's curve: rows of texts, a head first."""
    known = set(chain(*[row["metrics"] for row in results.frontier]))
    places = WITH_KL if known - set(FRONTIER) else FRONTIER
    rows = [["points", "", *[f"at {at}" for at in places]]]
    arms = chain(*[(row["arm"], row["base"]) for row in results.frontier])
    names = training_names(arms, rate_of_init(results))
    for row in results.frontier:
        pair = f"{names[row['arm']]} - {names[row['base']]}"
        cells = [gap_text(row, at) for at in places]
        rows.append([row["variant"], pair, *cells])
    return rows


def gap_text(row, at):
    """A gap with its interval, in how many seeds the curve comes so far, if not in all, and what
    an open sign would take."""
    estimate, each = row["metrics"].get(at), row["per_seed"].get(at, [])
    text, known = signed_text(estimate), [one for one in each if one is not None]
    if len(known) < len(each):
        text += f" ({len(known)} of {len(each)} seeds)"
    wanted = sign_text(estimate, each)
    return f"{text}, sign: {wanted}" if wanted else text


def gap_table(results):
    title = f"RL above the curve of SFT, {results.reports[0].name} [95 % interval]"
    temperature = temperature_name(results.temperatures[0])
    size = f"{temperature}, {results.curve_n} episodes per seed and point"
    return Table(f"{title}, {size}", aligned(gap_rows(results), left=2))


def sign_text(estimate, each):
    """What it would take to tell the sign of an open difference, by its values `each` of the seeds;
    "" if it is not open or not known. More episodes, where as many seeds would do as there are."""
    known = [one for one in each if one is not None]
    if estimate is None or estimate.low > 0 or estimate.high < 0 or len(known) < 2:
        return ""
    seeds = seeds_for_sign(known)
    if seeds is None:
        return "over 1,000 seeds"
    return f"{seeds} seeds" if seeds > len(known) else "more episodes"


def signed_text(estimate):
    """A difference with its interval."""
    if estimate is None:
        return "-"
    return f"{estimate.value:+.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def training_name(arm):
    """SFT, lr=2.0e-4 of sft-sft.lr=2.0e-4; SFT (early) of sft-early."""
    folder, *settings = re.split(r"-(?:env|model|lora|sft|ppo)\.", arm)
    copied = re.fullmatch(r"(sft|rl)-(\w+)", folder)  # a copy that was given a name of its own
    name = f"{NAMES[copied[1]]} ({copied[2]})" if copied else NAMES.get(folder, folder)
    return ", ".join([name, *settings])


def training_names(arms, rate=""):
    """{arm: how a figure names it}: `training_name`, less where it went on from if that is not all
    that it differs in. Beside SFT at other rates the plain one has Init's, of which it is the same
    run: `rate`, if that is known."""
    names = {arm: training_name(arm) for arm in arms}
    short = {arm: re.sub(r", init=sft_step_\d+(?=,)", "", name) for arm, name in names.items()}
    if len(set(short.values())) == len(short):
        names = short
    if "sft" in names and any(name.startswith("SFT, lr=") for name in names.values()):
        names["sft"] = f"SFT, lr={rate}" if rate else "SFT, lr of Init"
    return names
