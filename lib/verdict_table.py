"""The verdicts on the findings as one table: findings.py prints it, lib/page.py shows it in HTML.

Made of findings.json, whose format is said in findings.py. No torch.
"""
import json
from typing import NamedTuple

from lib.errors import UserError
from lib.verdicts import is_number

HEAD = ("finding", "points", "paper", "ours [95 %]", "verdict", "seeds", "minutes")
ONE_SEED = "hands or routes alone"
SEEDS = "seeds, and hands or routes"


class VerdictTable(NamedTuple):
    """Rows of texts under HEAD, and what must be read with them."""
    findings: list  # per finding its rows: itself, then its differences
    notes: list  # lines: what the intervals count, what is unfinished, notes of the evaluations
    evaluations: list  # names of those that the verdicts are read from

    def lines(self):
        """As printed, differences indented."""
        printed = [HEAD]
        for finding, *differences in self.findings:
            printed.append(finding)
            printed += [(f"   {cells[0]}", *cells[1:]) for cells in differences]
        widths = [max(map(len, column)) for column in zip(*printed)]
        lines = []
        for row in printed:
            cells = [cell.ljust(width) for cell, width in zip(row, widths)]
            lines.append("  ".join(cells).rstrip())
        return lines + self.notes


def read_verdicts(path):
    """The VerdictTable of a findings.json. Raises: UserError if it cannot be read."""
    try:
        return verdict_table(json.loads(path.read_text(encoding="utf-8"))["findings"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or another's
        raise UserError(f"cannot read {path}: run findings.py first") from None


def verdict_table(findings):
    """The VerdictTable of {number: finding}, as findings.json holds them."""
    evaluations = {}
    for result in findings.values():
        evaluations.update(result["evaluations"])
    rows = [rows_of_finding(number, result) for number, result in findings.items()]
    return VerdictTable(rows, notes_on_findings(findings), list(evaluations))


def rows_of_finding(number, result):
    seeds = str(result["seeds"]) if result["seeds"] > 1 else f"1 ({ONE_SEED})"
    verdict = result["verdict"].upper()
    minutes = f"{result['minutes']:.0f}" if result["minutes"] else "-"  # -: run elsewhere
    rows = [(f"{number}. {result['name']}", "", "", "", verdict, seeds, minutes)]
    if "provided" in result:
        rows.append(provided_row(result["provided"]))
    rows += [difference_row(line, line["verdict"]) for line in result["decides"]]
    rows += [difference_row(line, "") for line in result["beside"]]
    return rows


def difference_row(line, verdict):
    """Cells of a difference; what decides nothing has no verdict."""
    arm, _, base = line["says"].split()
    base = f"{base} %" if is_number(base) else base  # a threshold, or another arm
    place = ", ".join(line["at"][2:])
    paper = f"{line['paper']:+.1f}" if "paper" in line else ""
    ours = "-"
    if line["estimate"]:
        value, low, high = line["estimate"]
        ours = f"{value:+.1f} [{low:.1f}, {high:.1f}]"
    return f"{line['at'][0]}: {place}", f"{arm} - {base}", paper, ours, verdict, "", ""


def provided_row(condition):
    values = ["-" if value is None else f"{value:.1f}" for value in condition["values"]]
    share = f"start / Init <= {condition['at_most']:g}"
    says = "holds" if condition["holds"] else "does not hold"
    if None in condition["values"]:
        says = "not measured"
    return f"{condition['at'][0]}: provided", share, "", " / ".join(values), says, "", ""


def notes_on_findings(findings):
    lines = []
    for number, result in findings.items():
        about = [f"unfinished, {job}" for job in result["unfinished"]] + result["notes"]
        lines += [f"{number}: {line}" for line in about]
    if any(result["seeds"] == 1 for result in findings.values()):
        lines.insert(0, f"one seed: intervals count {ONE_SEED}; another training may fall outside")
    return lines
