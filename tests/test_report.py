"""Tables, figures and documents of an evaluation.json written by hand, and of results/*.json."""

import copy
import json
import re
from itertools import product
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

import report
from lib import documents
from lib.errors import UserError
from lib.figures import colors_of
from lib.results import Estimate, rate_of_init
from lib.settings import load
from lib.student import seeds_for_sign
from lib.tables import sign_text, training_names

VARIANTS = ("ID", "rule OOD")
# per variant, arm and temperature: first attempt, success, recognition, each with its interval
VALUES = {"Init": [60, 50, 70], "sft": [80, 70, 90], "rl": [65, 60, 71]}


def arm_row(variant, arm, temperature):
    """A row of the table; recognition is not known of seed 1."""
    value, low, high = VALUES[arm]
    metrics = {
        "first": [value - 10, low - 10, high - 10],
        "solved": [value, low, high],
        "recognized": [value + 10, low, high + 10],
    }
    grades = {
        "first": {"correct": value - 10, "wrong_value": 110 - value},
        "retries": {"illegal": 75, "correct": 25},
        "repeated": 33.3,
    }
    row = {"split": "all", "variant": variant, "arm": arm, "temperature": temperature, "n": 40}
    per_seed = {"solved": [value - 5, value + 4], "recognized": [None, 1]}
    return {**row, "metrics": metrics, "per_seed": per_seed, "grades": grades}


def policy_row(variant):
    """A row of a reference policy, of which recognition is not known."""
    row = {"split": "all", "variant": variant, "arm": "guess", "temperature": None, "n": 40}
    return {**row, "metrics": {"first": [1, 1, 1], "solved": [2.04, 2, 3]}}


def gap_row(variant, arm, base, temperature):
    """A row of paired differences."""
    gap = VALUES[arm][0] - VALUES[base][0]
    row = {"split": "all", "variant": variant, "temperature": temperature, "arm": arm, "base": base}
    metrics = {"solved": [gap, gap - 3, gap + 4.5]}
    return {**row, "metrics": metrics, "per_seed": {"solved": [gap - 1, gap + 2]}}


def evaluation(**changes):
    """Two variants at two temperatures."""
    table, differences = [], []
    for variant in VARIANTS:
        for arm, temperature in product(VALUES, (0.2, 0)):
            table.append(arm_row(variant, arm, temperature))
        table.append(policy_row(variant))
        pairs = (("sft", "Init"), ("rl", "Init"), ("rl", "sft"))
        for (arm, base), temperature in product(pairs, (0.2, 0)):
            differences.append(gap_row(variant, arm, base, temperature))
    curve = {
        "Init": [[10, 60, 50, 70, 90, [[55, 89], [64, 91]]]],
        "sft": [[10, 60, 50, 70, 90], [40, 80, 70, 90, 60]],
        "rl": [[10, 60, 50, 70, 90], [50, 65, 60, 71, 95]],
    }
    found = {
        "runs": ["runs/a", "runs/b"],
        "seeds": [1, 2],
        "commit": "abc",
        "machine": "here",
        "versions": "1",
        "reports": [
            {"name": "success", "title": "success %", "metrics": ["first", "solved"]},
            {"name": "recognition", "title": "read %", "metrics": ["recognized"]},
        ],
        "splits": {"all": 20},
        "variants": dict.fromkeys(VARIANTS, {}),
        "temperatures": [0.2, 0],
        "curve_n": 6,
        "gflops": {"Init": 10, "sft": 40, "rl": 50_000},
        "table": table,
        "differences": differences,
        "curves": dict.fromkeys(VARIANTS, curve),
        "minutes": {"eval": 1.5},
    }
    return {**found, **changes}


@pytest.fixture
def show(tmp_path, capsys):
    """report.main over a run folder that holds an evaluation; returns what it prints."""

    def shown(*arguments, **changes):
        changes = {"curves": dict.fromkeys(VARIANTS, {}), **changes}  # drawing takes a second
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(**changes)))
        report.main([str(tmp_path), *arguments])
        return capsys.readouterr().out

    shown.folder = tmp_path
    return shown


# ---------------------------------------------------------------- on screen
def test_table_by_hand(show):
    """Values of every column, half the interval at the last one, references without interval."""
    block = show().splitlines()[1:10]
    assert block == [
        "all: success %, ± half the 95 % interval, n = 40",
        " " * 17 + "        T = 0.2         " + "         greedy         " + "   model GFLOPs",
        "ID        Init      50.0 /  60.0 ±10.0      50.0 /  60.0 ±10.0              10",
        "          sft       70.0 /  80.0 ±10.0      70.0 /  80.0 ±10.0              40",
        "          rl        55.0 /  65.0 ± 5.5      55.0 /  65.0 ± 5.5          50,000",
        "          guess      1.0 /   2.0",
        "rule OOD  Init      50.0 /  60.0 ±10.0      50.0 /  60.0 ±10.0              10",
        "          sft       70.0 /  80.0 ±10.0      70.0 /  80.0 ±10.0              40",
        "          rl        55.0 /  65.0 ± 5.5      55.0 /  65.0 ± 5.5          50,000",
    ]


def test_differences_by_hand(show):
    printed = show()
    block = printed[printed.index("paired differences of success") :].splitlines()[:4]
    assert block[0] == "paired differences of success in points [95 % interval]"
    assert [line.rstrip() for line in block[1:]] == [
        " " * 31 + "        T = 0.2                  greedy",
        "all     ID        sft - Init    +20.0 [+17.0, +24.5]    +20.0 [+17.0, +24.5]",
        "all     ID        rl - Init      +5.0 [ +2.0,  +9.5]     +5.0 [ +2.0,  +9.5]",
    ]


def test_seeds_by_hand(show):
    """Leading metrics alone; a seed in which nothing was asked is a dash and not in the mean."""
    printed = show()
    block = printed[printed.index("success by seed") :].splitlines()
    assert block[0] == "success by seed, T = 0.2"
    assert block[1].split() == "together mean of seeds seed 1 seed 2".split()
    assert block[2].split() == "all ID Init 60.0 59.5 55.0 64.0".split()
    assert block[8].split() == "all ID sft - Init 20.0 20.5 19.0 22.0".split()
    block = printed[printed.index("recognition by seed") :].splitlines()
    assert block[2].split() == "all ID Init 70.0 1.0 - 1.0".split()
    assert "by seed" not in show(seeds=[1])


def test_grades_by_hand(show):
    printed = show()
    block = printed[printed.index("all: grades of the answers, T = 0.2") :].splitlines()
    assert block[1].split() == "answers, % correct wrong_value illegal repeated".split()
    assert block[2].split() == "first attempts ID Init 50.0 50.0 0.0".split()
    assert block[8].split() == "retries ID Init 25.0 0.0 75.0 33.3".split()


def test_what_never_occurred_is_a_dash(show):
    """The reference has no recognition, no pair a difference in it."""
    printed = show()
    (read,) = re.findall(r"all: read %.*?\n\n", printed, re.DOTALL)
    assert [line.split()[-1] for line in read.splitlines() if "guess" in line] == ["-", "-"]
    gaps = printed[printed.index("differences of recognition") :].splitlines()[2:8]
    assert [line.split()[-2:] for line in gaps] == [["-", "-"]] * 6
    assert "nan" not in printed.lower()


def test_long_names_of_arms_and_splits_stand_in_columns(show):
    long = {"sft": "sft @ step_480", "rl": "rl-ppo.verify_iters=10"}
    text = json.dumps(evaluation(splits={"routes nyc.json": 20}))
    for old, new in long.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    printed = show(**json.loads(text.replace('"split": "all"', '"split": "routes nyc.json"')))
    assert "\nroutes nyc.json: success %, ± half the 95 % interval, n = 40\n" in printed
    table = printed[printed.index("routes nyc.json: success") :].splitlines()[2:9]
    assert len({line.index("±") for line in table if "guess" not in line}) == 1
    gaps = printed[printed.index("paired differences of success") :].splitlines()[2:8]
    assert len({line.index(" [") for line in gaps}) == 1
    assert gaps[0].startswith("routes nyc.json  ID        sft @ step_480 - Init   ")


def test_what_a_reader_must_know_follows_the_tables(show):
    assert "note" not in show()
    printed = show(notes=["sft has less", "rl has seen it"])
    assert "\n\nnote: sft has less\n\nnote: rl has seen it\n" in printed


def test_nothing_to_compare_prints_no_differences(show):
    assert "paired" not in show(differences=[])


def test_transcripts_are_printed_turn_by_turn(show):
    turns = [
        {"answer": "7*3", "reward": -1, "verifier": "No, 21."},
        {"answer": "8*3", "reward": 5, "verifier": ""},
    ]
    printed = show(transcripts=[{"arm": "rl", "variant": "ID", "episodes": [turns]}])
    assert printed.endswith(
        "\n--- rl, ID, T = 0.2\n  7*3\n    -> -1 No, 21.\n  8*3\n    -> +5 correct\n\n"
    )


def test_configuration_names_the_run_folder(show, capsys):
    printed = show()
    report.main([str(ROOT / "configs/mini/gp_l.yaml"), f"run.dir={show.folder}"])
    assert capsys.readouterr().out == printed


def test_nothing_evaluated_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="run eval.py first"):
        report.main([str(tmp_path)])


def test_evaluation_of_an_older_version_is_a_user_error(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"gflops": {}, "table": []}')
    with pytest.raises(UserError, match="older version: run eval.py again"):
        report.main([str(tmp_path)])


# ---------------------------------------------------------------- figures
def drawn(show, monkeypatch, **changes):
    """The Figures of the pictures written: {file name: Figure}."""
    from matplotlib.figure import Figure

    figures, save = {}, Figure.savefig

    def remember(figure, path, **given):
        figures[path.name] = figure
        save(figure, path, **given)

    monkeypatch.setattr(Figure, "savefig", remember)
    show(**{"curves": evaluation()["curves"], **changes})
    monkeypatch.undo()
    return figures


def test_figure_shows_success_against_compute_and_recognition(show, monkeypatch):
    axes = drawn(show, monkeypatch)["evaluation.png"].axes
    labels = [axis.get_ylabel() for axis in axes]
    assert labels == ["ID\nsuccess % (T = 0.2)", "", "rule OOD\nsuccess % (T = 0.2)", ""]
    curves = {
        line.get_label(): line.get_xydata().tolist()
        for line in axes[0].lines
        if line.get_marker() != "."
    }
    assert curves == {"Init": [[10, 60]], "SFT": [[10, 60], [40, 80]], "RL": [[10, 60], [50, 65]]}
    dots = [dots.get_offsets().tolist() for dots in axes[1].collections]
    assert dots == [[[90, 60]], [[90, 60], [60, 80]], [[90, 60], [95, 65]]]
    dots = [
        [dot.get_xydata().tolist() for dot in axis.lines if dot.get_marker() == "."]
        for axis in axes[:2]
    ]
    assert dots == [[[[10, 55]], [[10, 64]]], [[[89, 55]], [[91, 64]]]]  # of the seeds
    assert axes[0].get_title() == "6 episodes per seed and point, seeds: 2"
    assert (show.folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_figure_draws_every_arm_in_a_colour_of_its_own(show, monkeypatch):
    names = ["Init @ sft/step_1", "Init @ sft/step_5", "sft", "rl"]
    names += [f"rl-x={i}" for i in range(5)]
    points = evaluation()["curves"]["ID"]["rl"]
    curves = dict.fromkeys(VARIANTS, dict.fromkeys(names, points))
    figure = drawn(show, monkeypatch, curves=curves)["evaluation.png"]
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == [*names[:2], "SFT", "RL", *names[4:]]
    assert len({line.get_color() for line in lines}) == len(names)
    assert [line.get_marker() for line in lines] == 2 * ["*"] + 7 * ["o"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [line.get_label() for line in lines]


def test_several_ppo_trainings_are_drawn_over_their_updates(show, monkeypatch):
    """Each from its own start at 0; SFT, whose steps are others, is not among them."""
    def at(*steps):
        return [[900 + step, 50 + step, 40, 60, 0, [], step] for step in steps]

    curves = {"Init": at(80), "sft": at(80, 90), "rl": at(0, 4, 8), "rl-x=1": at(0, 3)}
    figures = drawn(show, monkeypatch, curves=dict.fromkeys(VARIANTS, curves))
    for panel, variant in zip(figures["updates.png"].axes, VARIANTS, strict=True):
        assert panel.get_ylabel().startswith(variant)
        lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
        assert lines == {"RL": [[0, 50], [4, 54], [8, 58]], "rl-x=1": [[0, 50], [3, 53]]}
    older = {arm: [point[:-1] for point in points] for arm, points in curves.items()}
    assert "updates.png" not in drawn(show, monkeypatch, curves=dict.fromkeys(VARIANTS, older))
    assert "updates.png" not in drawn(show, monkeypatch)  # one PPO alone


def test_figure_without_recognition_has_one_column(show, monkeypatch):
    reports = [{"name": "per-step accuracy", "title": "accuracy %", "metrics": ["first", "solved"]}]
    axes = drawn(show, monkeypatch, reports=reports)["evaluation.png"].axes
    labels = [axis.get_ylabel() for axis in axes]
    assert labels == [f"{variant}\nper-step accuracy % (T = 0.2)" for variant in VARIANTS]


def test_without_curves_the_figures_of_the_table_are_drawn(show):
    printed = show(curves=dict.fromkeys(VARIANTS, {}))
    assert sorted(re.findall(r"(\w+\.png)", printed)) == ["bars.png", "growth.png"]
    assert sorted(path.name for path in show.folder.glob("*.png")) == ["bars.png", "growth.png"]


def test_bars_by_hand(show, monkeypatch):
    """Arms from top to bottom, of the leading temperature alone; reference policies have none."""
    first, second = drawn(show, monkeypatch)["bars.png"].axes
    assert [axis.get_title() for axis in (first, second)] == list(VARIANTS)
    assert first.get_xlabel() == "success % (T = 0.2)"
    bars = {bar.get_y() + bar.get_height() / 2: bar.get_width() for bar in first.patches}
    assert bars == {2: 60, 1: 80, 0: 65}
    names = [label.get_text() for label in first.get_yticklabels()]
    assert dict(zip(first.get_yticks(), names)) == {2: "Init", 1: "SFT", 0: "RL"}
    lines = [line.get_xydata().tolist() for line in first.lines]
    assert lines[:2] == [[[50, 2], [70, 2]], [[55, 2], [64, 2]]]  # the interval, the seeds


def test_growth_by_hand(show, monkeypatch):
    """Gains over Init out of distribution against in it, a cross of intervals; not RL - SFT."""
    (axis,) = drawn(show, monkeypatch)["growth.png"].axes
    assert axis.get_ylabel() == "rule OOD: points above Init"
    crosses = [line.get_xydata().tolist() for line in axis.lines[:8]]
    assert crosses[:4] == [[[17, 20], [24.5, 20]], [[20, 17], [20, 24.5]], [[20, 20]],
                           [[19, 19], [22, 22]]]
    assert crosses[6:] == [[[5, 5]], [[4, 4], [7, 7]]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["SFT", "RL"]


# ---------------------------------------------------------------- the frontier
SEEDS = [[[55, 89], [64, 91]], [[65, 90], [84, 90]]]  # (success, recognition) at two points
PATHS = {
    "ID": {
        "Init": [[10, 60, 50, 70, 90, SEEDS[0]]],
        "sft-sft.lr=2.0e-4": [
            [10, 60, 50, 70, 90, SEEDS[0]],
            [40, 80, 70, 90, 60, SEEDS[1]],
        ],
    },
    "rule OOD": {
        "Init": [[10, 40, 50, 70, 90, [[41, 90], [39, 90]]]],
        "sft-sft.lr=2.0e-4": [
            [10, 40, 50, 70, 90, [[41, 90], [39, 90]]],
            [40, 20, 70, 90, 60, [[25, 90], [15, 90]]],
        ],
    },
}
ABOVE = {
    "variant": "rule OOD",
    "arm": "rl",
    "base": "sft-sft.lr=2.0e-4",
    "metrics": {"equal ID": [4.2, -1.1, 9.5]},
    "per_seed": {"equal ID": [4, 5]},
}


def test_frontier_by_hand(show, monkeypatch):
    """OOD against ID: all seeds together, then each of them; the last point again, large."""
    figure = drawn(show, monkeypatch, curves=PATHS)["frontier.png"]
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("ID: success %", "rule OOD: success %")
    lines = [line.get_xydata().tolist() for line in axis.lines]
    assert lines[::2] == [
        *([[60, 40]], [[55, 41]], [[64, 39]]),
        *([[60, 40], [80, 20]], [[55, 41], [65, 25]], [[64, 39], [84, 15]]),
    ]
    assert lines[1::2] == [path[-1:] for path in lines[::2]]
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["Init", "SFT, lr=2.0e-4"]
    assert (show.folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


def with_kl(points, *kl):
    """Points of PATHS with how far each has gone: in all seeds together and in each."""
    found = []
    for point, nats in zip(points, kl):
        found.append([*point, 0, [[nats, nats - 0.1, nats + 0.1], [nats - 0.1, nats + 0.1]]])
    return found


def test_frontier_over_kl_by_hand(show, monkeypatch):
    """The same heights over how far each checkpoint has gone, where that is known."""
    assert "frontier_kl.png" not in drawn(show, monkeypatch, curves=PATHS)
    curves = copy.deepcopy(PATHS)
    curves["ID"]["Init"] = with_kl(curves["ID"]["Init"], 0.0)
    curves["ID"]["rl"] = curves["ID"]["sft-sft.lr=2.0e-4"]  # of which it is not known
    curves["rule OOD"]["rl"] = curves["rule OOD"]["sft-sft.lr=2.0e-4"]
    curves["ID"]["sft-sft.lr=2.0e-4"] = with_kl(curves["ID"]["sft-sft.lr=2.0e-4"], 0.0, 1.5)
    (axis,) = drawn(show, monkeypatch, curves=curves)["frontier_kl.png"].axes
    assert axis.get_xlabel() == "ID: KL(Init || checkpoint), nats per first answer"
    lines = [line.get_xydata().tolist() for line in axis.lines]
    assert len(lines) == 12 and lines[6::2] == [
        [[0, 40], [1.5, 20]],
        [[-0.1, 41], [pytest.approx(1.4), 25]],
        [[0.1, 39], [pytest.approx(1.6), 15]],
    ]


def test_gaps_by_hand(show):
    printed = show(frontier=[ABOVE])
    block = printed[printed.index("RL above the curve of SFT") :].splitlines()
    assert block[1].split() == "points at equal FLOPs at equal ID".split()
    assert block[2].split() == (
        "rule OOD RL - SFT, lr=2.0e-4 - +4.2 [-1.1, 9.5], sign: 3 seeds".split())
    as_far = {**ABOVE, "metrics": {"equal KL": [3.0, 1.0, 5.0]}}
    printed = show(frontier=[as_far])
    block = printed[printed.index("RL above the curve of SFT") :].splitlines()
    assert block[1].split()[-8:] == "at equal KL at equal KL, first attempt".split()
    assert block[2].split()[-5:] == "- +3.0 [1.0, 5.0] -".split()


def test_gap_tells_in_how_many_seeds_the_curve_comes_so_far(show):
    printed = show(frontier=[{**ABOVE, "per_seed": {"equal ID": [4, None]}}])
    assert "+4.2 [-1.1, 9.5] (1 of 2 seeds)" in printed


# ---------------------------------------------------------------- documents
@pytest.fixture
def block(tmp_path, monkeypatch):
    """The lines that `regenerate` writes into a block whose results are those written by hand."""
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(evaluation()))
    (tmp_path / "results").mkdir()
    rows = {"GP-L rule OOD": {"Init": 11.5, "sft": 3.4, "rl": 15.0}}
    (tmp_path / "results" / "paper.json").write_text(json.dumps({"rows": rows}))

    def written(marker):
        text = f"before\n<!-- {marker}-->\nold\n<!-- end -->\nafter"
        new = documents.regenerate(text, tmp_path / "docs")
        assert new.startswith(f"before\n<!-- {marker}-->\n\n") and new.endswith(
            "\n\n<!-- end -->\nafter"
        )
        assert documents.regenerate(new, tmp_path / "docs") == new
        return new.splitlines()[marker.count("\n") + 3 : -3]

    return written


def test_table_block_by_hand(block):
    lines = block(
        "table\nsource: x.json\nrows:\n  ours, ID: [all, ID, solved]\n  paper: GP-L rule OOD\n"
    )
    assert lines == [
        "| % | Init | SFT | RL | SFT - Init | RL - Init | RL - SFT |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(f"| ours, ID, {at} | 60.0 ± 10.0 | 80.0 ± 10.0 | 65.0 ± 5.5"
          " | +20.0 [17.0, 24.5] | +5.0 [2.0, 9.5] | -15.0 [-18.0, -10.5] |"
          for at in ("T = 0.2", "greedy")),
        "| paper | 11.5 | 3.4 | 15.0 | -8.1 | +3.5 | +11.6 |",
        "| model GFLOPs | 10 | 40 | 50,000 |  |  |  |",
    ]


def test_table_block_says_what_a_reader_must_know(block, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(evaluation(notes=["sft has less"])))
    lines = block("table\nsource: x.json\nrows:\n  ours, ID: [all, ID, solved]\n")
    assert lines[-2:] == ["", "Note: SFT has less."]


def test_another_training_may_stand_for_sft(block, tmp_path):
    """The same numbers under the name of a gentler SFT."""
    wanted = "source: x.json\nrows:\n  ours: [all, ID, solved]\n"
    before = {kind: block(f"{kind}\n{wanted}") for kind in ("table", "seeds")}
    renamed = json.dumps(evaluation()).replace('"sft"', '"sft-gentle"')
    (tmp_path / "x.json").write_text(renamed)
    for kind, lines in before.items():
        assert block(f"{kind}\nsft: sft-gentle\n{wanted}") == lines
        with pytest.raises(UserError):
            block(f"{kind}\n{wanted}")


def test_verdicts_block_by_hand(block, tmp_path):
    """A finding in bold, its differences below, what must be read with them below the table."""
    line = {"at": ["gp", "all", "rule OOD", "solved"], "says": "rl > Init", "paper": 3.5}
    line.update(estimate=[4, 1, 7], per_seed=[4], verdict="shown")
    finding = {"name": "RL gains", "verdict": "shown", "minutes": 12.3, "seeds": 3,
               "decides": [line], "beside": [], "evaluations": {}, "unfinished": [],
               "notes": ["sft has less"]}
    (tmp_path / "f.json").write_text(json.dumps({"findings": {"1": finding}}))
    assert block("verdicts {source: f.json}")[2:] == [
        "| **1. RL gains** |  |  |  | SHOWN | 3 | 12 |",
        "| gp: rule OOD, solved | rl - Init | +3.5 | +4.0 [1.0, 7.0] | shown |  |  |",
        "",
        "Note: 1: sft has less.",
    ]


def test_seeds_block_by_hand(block):
    lines = block("seeds\nsource: x.json\nrows:\n  won: [all, rule OOD, solved]\n")
    assert lines[0] == (
        "| % or points | all together | mean of seeds | seeds 1, 2 | a sign would take |"
    )
    assert lines[2] == "| won: Init | 60.0 [50.0, 70.0] | 59.5 | 55.0, 64.0 |  |"
    assert lines[-1] == "| won: RL - SFT | -15.0 [-18.0, -10.5] | -14.5 | -16.0, -13.0 |  |"


@pytest.mark.parametrize("each, text", [
    ([8.2, 4.4, -1.2], "9 seeds"), ([5.0, None, 5.2], "more episodes"),
    ([3.0, -3.0], "over 1,000 seeds"), ([3.0, None], "")])
def test_an_open_difference_says_what_its_sign_would_take(each, text):
    assert sign_text(Estimate(3.8, -9.1, 16.7), each) == text
    assert sign_text(Estimate(3.8, 0.1, 7.5), each) == ""


def test_seeds_for_a_sign_by_hand():
    """Mean 3.8, standard deviation 4.73: t(7) 4.73 / sqrt(8) = 3.95 is too much, t(8) 4.73 / 3 =
    3.64 is not. Nine."""
    assert seeds_for_sign([8.2, 4.4, -1.2]) == seeds_for_sign([-8.2, -4.4, 1.2]) == 9
    assert seeds_for_sign([1, 1]) == 2
    assert seeds_for_sign([1, -1]) is seeds_for_sign([8.2, 4.4, -1.2], most=8) is None


def test_names_in_figures_are_short_where_they_stay_distinct():
    gentle, late = "sft-sft.init=sft_step_80-sft.lr=5e-5", "sft-sft.init=sft_step_90-sft.lr=5e-5"
    assert training_names(["Init", "sft", gentle, "rl"]) == {
        "Init": "Init", "sft": "SFT, lr of Init", gentle: "SFT, lr=5e-5", "rl": "RL"}
    assert training_names(["sft", gentle], "1e-3")["sft"] == "SFT, lr=1e-3"
    assert training_names([gentle, late]) == {
        gentle: "SFT, init=sft_step_80, lr=5e-5", late: "SFT, init=sft_step_90, lr=5e-5"}
    assert training_names(["sft", "rl-ppo.init=sft_step_320"]) == {
        "sft": "SFT", "rl-ppo.init=sft_step_320": "RL, init=sft_step_320"}


def test_notes_in_documents_name_arms_as_figures_do():
    gentle = "sft-sft.init=sft_step_80-sft.lr=5e-5"
    names = training_names(["Init", "sft", "sft-early", gentle, "rl"], "1e-3")
    note = f"sft/step_640 and {gentle} have more than rl/step_160; not so sft-early"
    assert documents.in_words(note, names) == (
        "SFT, lr=1e-3 at step 640 and SFT, lr=5e-5 have more than RL at step 160; not so SFT "
        "(early)")
    assert documents.in_words("ppo.init=sft_step_80 stays", names) == "ppo.init=sft_step_80 stays"


def test_the_rate_of_init_is_the_shipped_one():
    shipped = SimpleNamespace(settings={"shipped": "configs/mini/gp_l.yaml"})
    assert (rate_of_init(shipped), rate_of_init(SimpleNamespace())) == ("1e-3", "")


def test_what_stands_for_sft_has_its_colour():
    arms = ["Init", "sft", "sft-x", "rl"]
    red = colors_of(arms)["sft"]
    assert colors_of(arms, "sft-x")["sft-x"] == colors_of(["sft"], "sft-x")["sft"] == red
    assert len(set(colors_of(arms, "sft-x").values())) == 4
    several = colors_of(["Init @ sft-x/step_9", "Init @ sft/step_80", "Init @ sft/step_90"])
    assert several["Init @ sft/step_80"] == colors_of(["Init"])["Init"]
    assert len(set(several.values())) == 3


def test_a_frontier_may_have_trainings_of_another_file_beside(block, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(evaluation(curves=PATHS, frontier=[ABOVE])))
    others = {}
    for variant, curves in PATHS.items():
        others[variant] = {"Init": [], "rl-ppo.kl_coef=0": curves["sft-sft.lr=2.0e-4"]}
    (tmp_path / "y.json").write_text(json.dumps(evaluation(curves=others, curve_n=7)))
    fields = {"sources": {"A": "x.json"}, "beside": {"A": "y.json"}, "image": "f.png", "title": "T"}
    for panel in documents.panels_of(fields):
        for curves in panel.results.curves.values():
            assert curves["rl-ppo.kl_coef=0"] == curves["sft-sft.lr=2.0e-4"] and curves["Init"]
    lines = block(f"frontier {json.dumps(fields)}")
    assert lines[2].endswith("A: 2 seeds, 6 of the table's 20 episodes a point (RL, kl_coef=0: "
                             "2 seeds, 7 of 20).*")


def test_grades_block_by_hand(block):
    lines = block("grades\nsource: x.json\nsplit: all\n")
    assert lines[0] == "| answers, % |  |  | correct | wrong_value | illegal | repeated |"
    assert lines[-1] == "| retries | rule OOD | RL | 25.0 | 0.0 | 75.0 | 33.3 |"


def test_grid_block_by_hand(block):
    fields = "source: x.json\nsplit: all\nhead: arm\nmetrics: [solved, first]\nrows:\n  one: sft\n"
    assert block(f"grid\n{fields}")[2:] == ["| one | 80 ± 10 (70) | 80 ± 10 (70) |"]


def test_figure_block_says_how_much_is_behind_the_picture(block):
    lines = block("figure\nsource: x.json\nimage: docs/x.png\ntitle: T\nunit: hands\n")
    assert lines[0] == "![T](x.png)"
    assert lines[2] == (
        "*T, 2 seeds. In the picture each seed and point has 6 hands (bands: 95 %), "
        "in the tables 20.*"
    )


def test_frontier_blocks_by_hand(block, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(evaluation(curves=PATHS, frontier=[ABOVE])))
    lines = block("frontier\nsources: {A: x.json, B: x.json}\nimage: docs/f.png\ntitle: T\n")
    assert lines[0] == "![T](f.png)"
    size = "2 seeds, 6 of the table's 20 episodes a point"
    assert lines[2].endswith(f" A: {size}; B: {size}.*")
    assert block("gaps\nsource: x.json\n")[2:] == [
        "| rule OOD | RL - SFT, lr=2.0e-4 | - | +4.2 [-1.1, 9.5], sign: 3 seeds |"
    ]


def test_a_block_leaves_trainings_out(block, tmp_path):
    """Of curves and gaps; a table the notes on arms that it does not show."""
    gflops = {"Init": 10, "sft": 40, "rl": 50, "sft-x.y=1e-3": 40}
    notes = ["in a: sft-x.y=1e-3/step_9 has less than rl/step_8", "in a: sft/step_9 has less"]
    results = evaluation(curves=PATHS, frontier=[ABOVE], notes=notes, gflops=gflops)
    (tmp_path / "x.json").write_text(json.dumps(results))
    assert len(block("gaps\nsource: x.json\n")) == 3
    assert len(block("gaps\nsource: x.json\nwithout: [sft-sft.lr=2.0e-4]\n")) == 2
    fields = {"sources": {"A": "x.json", "B": "x.json"}, "without": {"B": ["sft-sft.lr=2.0e-4"]}}
    for panel in documents.panels_of(fields):
        for arms in panel.results.curves.values():
            assert ("sft-sft.lr=2.0e-4" in arms) == (panel.title == "A") and "Init" in arms
    lines = block("table\nsource: x.json\nrows:\n  ours, ID: [all, ID, solved]\n")
    assert lines[-1] == "Note: in a: SFT at step 9 has less." and "sft-x" not in str(lines)


def test_unknown_row_is_a_user_error(block):
    with pytest.raises(UserError, match="no solved of"):
        block("table\nsource: x.json\nrows:\n  x: [all, sideways, solved]\n")


@pytest.mark.parametrize("path", documents.documents(), ids=lambda path: path.name)
def test_documents_are_what_the_results_say(path):
    text = path.read_text(encoding="utf-8")
    assert documents.regenerate(text, path.parent) == text
    assert len(documents.BLOCK.findall(text)) == text.count("<!-- end -->")  # no marker misspelt


def test_documents_command_writes_text_and_figures(block, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    figure = (
        "<!-- figure\nsource: x.json\nimage: docs/x.png\ntitle: T\nunit: hands\n-->\n<!-- end -->\n"
    )
    (tmp_path / "README.md").write_text("nothing to write here\n")
    frontier = (
        "<!-- frontier\nsources: {A: x.json}\nimage: docs/f.png\ntitle: T\n-->\n<!-- end -->\n"
    )
    (tmp_path / "docs" / "r.md").write_text(figure + frontier)
    report.main(["--documents"])
    assert "![T](x.png)" in (tmp_path / "docs" / "r.md").read_text()
    for name in ("x.png", "f.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "README.md").read_text() == "nothing to write here\n"


def test_published_numbers_are_rounded_and_keep_what_a_person_wrote(show):
    target = show.folder / "x.json"
    target.write_text(json.dumps({"what": "by hand", "commit": "old"}))
    show("--publish", str(target), gflops={"Init": 1.23456, "sft": 40, "rl": 50}, transcripts=[])
    found = json.loads(target.read_text())
    assert found["what"] == "by hand" and found["commit"] == "abc" and "transcripts" not in found
    assert found["gflops"] == {"Init": 1.235, "sft": 40, "rl": 50}
    assert found["table"] == evaluation()["table"]
    assert found["settings"] == {"shipped": "", "changed": []}  # they are not there


def test_published_numbers_name_the_settings_that_differ(show):
    _, usual, _ = load([str(ROOT / "configs/mini/gp_l.yaml")])
    usual["sft"]["lr"] = 0.5
    (show.folder / "evaluation.yaml").write_text(yaml.safe_dump(usual))
    show("--publish", str(show.folder / "x.json"))
    row = {"key": "sft.lr", "shipped": "0.001", "here": "0.5", "names": ["evaluation"]}
    assert json.loads((show.folder / "x.json").read_text())["settings"] == {
        "shipped": "configs/mini/gp_l.yaml", "changed": [row]}


def test_report_needs_no_model():
    """Nor do the files of lib/ that it imports bring torch."""
    import subprocess
    import sys

    code = "import sys; import report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
