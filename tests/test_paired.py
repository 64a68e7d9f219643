"""tools/paired.py on episodes written by hand."""
import json

import paired
import pytest

from lib.errors import UserError


def cell(checkpoint, solved, rule="face", temperature=0.2):
    """A line of evaluations.jsonl; each episode is a cluster of its own."""
    episodes = []
    for hand, right in enumerate(solved):
        counts = {"solved": [right, 1], "first": [right and hand == 1, 1]}
        episodes.append({"cluster": hand, "counts": counts, "grades": {}})
    key = [checkpoint, 0, {"rule": rule}, "all", temperature, len(solved), 5, 1000]
    return json.dumps({"key": key, "episodes": episodes}) + "\n"


@pytest.fixture
def runs(tmp_path):
    """Two runs in which RL gains 2 of 4 hands, then loses 1 of 4 and 2 of 4."""
    names = []
    for name, last in (("a", [1, 1, 0, 0]), ("b", [1, 0, 0, 0])):
        names.append(str(tmp_path / name))
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluations.jsonl").write_text(
            json.dumps({"key": ["rl/step_9", 0, "KL", "all", 1, 4, 5, 1000], "episodes": []}) + "\n"
            + cell("rl/step_120", last) + cell("rl/step_40", [1, 1, 1, 0])
            + cell("rl/step_200", [0, 0]) + cell("sft/step_35", [1, 0, 0, 0])
            + cell("rl/step_40", [0, 0, 0, 0], rule="ten") + cell("rl/step_40", [0] * 4, "face", 1)
        )
    return names


def test_by_hand(runs, capsys):
    paired.main(["rl:first", "rl", *runs, "--where", "rule=face", "--n", "4"])
    *names, shown = capsys.readouterr().out.splitlines()
    assert names == [f"{run}: rl/step_120 - rl/step_40" for run in runs]
    assert shown.startswith("solved: -37.5 [") and shown.endswith("] (-25.0, -50.0)")
    paired.main(["sft", "rl:first", *runs, "--where", "rule=face", "--n", "4"])
    assert "solved: +50.0 [" in capsys.readouterr().out


def test_by_hand_of_one_metric_less_another(runs, capsys):
    """What was solved, but not in the first attempt: hands 0 and 2, then hand 0."""
    paired.main(["rl:first", "rl", *runs, "--where", "rule=face", "--n", "4",
                 "--metric", "solved-first"])
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown.startswith("solved-first: -25.0 [") and shown.endswith("] (-25.0, -25.0)")


@pytest.mark.parametrize("change, told", [
    ({"--where": []}, "several variants of rl/step_40"),
    ({"--metric": ["per_step"]}, "--metric per_step: nothing was counted"),
    ({"--metric": ["solved-frist"]}, "--metric solved-frist: nothing was counted"),
    ({"--n": ["5"]}, "no checkpoint of rl"),
])
def test_what_it_cannot_compare_is_told_in_one_line(runs, change, told):
    options = {"--where": ["rule=face"], "--n": ["4"], **change}
    given = [word for name, values in options.items() for word in (name, *values)]
    with pytest.raises(UserError, match=told):
        paired.main(["rl:first", "rl", *runs, *given])
    with pytest.raises(UserError, match="sft/step_35 would be compared with itself"):
        paired.main(["sft:first", "sft", *runs, "--where", "rule=face", "--n", "4"])
    with pytest.raises(UserError, match="run eval.py"):
        paired.main(["rl:first", "rl", f"{runs[0]}x"])
