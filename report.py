"""Show what eval.py found, intervals included: reads its JSON, no model.

    python report.py CONFIG.yaml | RUN_FOLDER | FILE.json    prints tables and differences, draws
                                                             the figures (lib/figures.py), writes
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
"""
import argparse
import json
from pathlib import Path

from environments import make_env, observations
from lib.conversations import bare_answers, conversation, read_conversations, seeds_of
from lib.curves import logs_of, panels_of
from lib.documents import write_documents
from lib.errors import UserError, run_main
from lib.figures import (
    Panel, draw_bars, draw_compute, draw_frontier, draw_growth, draw_updates, knows_kl,
    ppo_curves)
from lib.page import Page, changed_settings, findings_beside, settings_files, write_page
from lib.results import read, temperature_name
from lib.runs import write_atomic
from lib.settings import load
from lib.tables import all_tables, training_name
from lib.verdict_table import read_verdicts


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


# ---------------------------------------------------------------- report.html
def draw_all(results, path):
    """Draw the figures of an evaluation.json beside it. Returns: {title: path}."""
    lead, folder = results.reports[0].name, path.parent
    others = list(results.variants)[1:]
    figures = {}
    if any(results.curves.values()):
        figures[f"{lead} against model GFLOPs"] = path.with_suffix(".png")
        draw_compute(results, path.with_suffix(".png"))
        if others:
            figures["Other variants against the trained one"] = folder / "frontier.png"
            panels = [Panel("", results, variant) for variant in others]
            draw_frontier(panels, folder / "frontier.png")
        if others and knows_kl(results):
            figures["Other variants against KL from Init"] = folder / "frontier_kl.png"
            panels = [panel._replace(over_kl=True) for panel in panels]
            draw_frontier(panels, folder / "frontier_kl.png")
        if len(ppo_curves(results, next(iter(results.variants)))) > 1:
            figures[f"{lead} against updates of PPO"] = folder / "updates.png"
            draw_updates(results, folder / "updates.png")
    figures[f"{lead} of the arms"] = folder / "bars.png"
    draw_bars(results, folder / "bars.png")
    if others and results.differences:
        figures["Gained in other variants against the trained one"] = folder / "growth.png"
        draw_growth(results, folder / "growth.png")
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
        trainings=panels_of(logs), settings=changed, shipped=shipped,
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
        trainings=panels_of(logs), settings=changed, shipped=shipped))


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
    page.facts = joined(page.facts)
    save_page(folder, page)


def joined(facts):
    """{names of evaluations: what they were measured with}, those with the same together."""
    names = {}
    for name, fact in facts.items():
        names.setdefault(fact, []).append(name)
    return {", ".join(same): fact for fact, same in names.items()}


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
    for kind, panels in panels_of(logs_of(run)).items():
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
    """Write an evaluation.json or findings.json, rounded and without transcripts, where the
    documents find it; an evaluation with how its settings and its trainings' differ from those
    shipped. What only a person writes there stays: what it is.
    """
    kept = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    text = path.read_text(encoding="utf-8")
    kept.update(json.loads(text, parse_float=lambda number: round(float(number), 3)))
    kept.pop("transcripts", None)
    if "runs" in kept:
        shipped, changed = changed_settings(settings_files(path.parent, kept["runs"]))
        kept["settings"] = {"shipped": shipped, "changed": changed}
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
        if options.publish:
            publish(path, options.publish)
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
