"""The documents keep their word: links lead somewhere, commands are accepted, the example works."""

import importlib.util
import json
import re
import shlex
from statistics import median

import pytest
from conftest import ROOT
from PIL import Image

import environments
import gp
import rollout
from lib import errors, settings

DOCUMENTS = [ROOT / "README.md", ROOT / "mini" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=NAMED)
SCRIPTS = ("sft.py", "rl.py", "eval.py", "report.py", "plan.py")
WAYS = {
    "one at a time": "one at a time",
    "bare generate": "bare `generate`",
    "ours": "this repository",
}
RATIOS = {
    "rollout, times one at a time": "rollout, ours / one at a time",
    "rollout and update, times one at a time": "rollout + update, ours / one at a time",
    "rollout, times bare `generate`": "rollout, ours / bare generate",
}
MEDIANS = {
    "seconds for 256 turns: rollout": "rollout",
    "seconds for 256 turns: update": "update",
    "peak memory, GiB": "peak",
}


def turns_per_second(rounds):
    return median(played["turns"] / played["rollout"] for played in rounds)


def blocks(path, language):
    """The code blocks of one language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def anchors(path):
    """The anchors that GitHub makes of a file's headings."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    for target in targets:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@every_document
def test_nothing_is_left_of_a_merge(path):
    assert not re.search(r"^(<<<<<<<|=======|>>>>>>>)", path.read_text(), re.MULTILINE)


def commands(path):
    """(script, arguments) of every `python ...` in a file's shell blocks and backticks."""
    text = "\n".join([*blocks(path, "bash"), *re.findall(r"`(python [^`]*)`", path.read_text())])
    for part in re.split(r"&&|;|\n", text.replace("\\\n", " ")):
        words = shlex.split(part, comments=True)
        if "python" in words:
            script, *arguments = words[words.index("python") + 1 :]
            yield script, arguments


@every_document
def test_commands_are_accepted(path):
    for script, arguments in commands(path):
        if script.startswith("-") or "$" in script:  # python -m pytest
            continue
        assert (ROOT / script).is_file(), script
        unnamed = [word for word in arguments if "=" in word or word.endswith(".yaml")]
        if script in SCRIPTS and arguments[0].startswith("configs/"):
            known = [word for word in unnamed if "$" not in word]
            cfg, _, _ = settings.load([str(ROOT / known[0]), *known[1:]])
            for variant in cfg.eval.variants.values():
                rollout.make_env(cfg.env, cfg.eval.verify_iters, **variant)


def test_readme_is_one_sitting():
    assert len((ROOT / "README.md").read_text().split()) <= 2000


def test_the_episode_is_what_the_verifier_says():
    """README's prompt, verifier's text, rewards and picture, from the seed that it names."""
    text = (ROOT / "README.md").read_text()
    episode = re.search(r"^Prompt .*?^```", text, re.MULTILINE | re.DOTALL)[0]
    first, second = re.findall(r"Answer \d +(.*)", episode)
    env = gp.GeneralPoints(split="all", image_size=[112, 112])
    obs, _ = env.reset(int(re.search(r"evaluation seed (\d+)", text)[1]))
    prompt = obs["messages"][0]["content"][1]["text"]
    shown = re.search(r"Prompt (.*?)Answer 1", episode, re.DOTALL)[1]
    assert shown.split() == prompt.split()
    _, reward, _, _, info = env.step(first)
    assert f"Verifier   {info['feedback']}   (reward {reward:+g})" in episode
    _, reward, solved, _, _ = env.step(second)
    assert solved and f"(reward {reward:+g})" in episode
    large = obs["image"].resize((336, 336), Image.Resampling.NEAREST)
    drawn = Image.open(ROOT / "docs" / "episode.png").convert("RGB")
    assert drawn.tobytes() == large.tobytes()


def test_the_speeds_are_those_measured():
    """docs/speed.md's table, from results/benchmark_*.json."""
    page = (ROOT / "docs" / "speed.md").read_text()
    cells = {}  # label: [GP-L, GP-VL]
    for name in ("benchmark_mini", "benchmark_gp_vl_mini"):
        result = json.loads((ROOT / "results" / f"{name}.json").read_text())
        ours = result["rounds"]["ours"]
        numbers = {
            f"turns/s in the rollout: {shown}": f"{turns_per_second(result['rounds'][way]):.1f}"
            for way, shown in WAYS.items()
        }
        for label, key in RATIOS.items():
            numbers[label] = f"{result['ratios'][key]['median']:.1f}"
        for label, key in MEDIANS.items():
            numbers[label] = f"{median(played[key] for played in ours):.2f}"
        for phase in ("rollout", "update"):
            share = median(played[f"{phase}_share"] for played in ours)
            numbers[f"{phase}, % of the core's matmul rate"] = f"{100 * share:.0f}"
        for label, number in numbers.items():
            cells.setdefault(label, []).append(number)
    for label, (gp_l, gp_vl) in cells.items():
        assert f"| {label} | {gp_l} | {gp_vl} |" in page


def test_the_ratios_to_trl_are_those_measured():
    """docs/speed.md's second table, from results/trl_mini.json."""
    page = (ROOT / "docs" / "speed.md").read_text()
    cases = json.loads((ROOT / "results" / "trl_mini.json").read_text())["cases"]
    for case in cases.values():
        sampling, update, both = (case["ratios"][part] for part in ("sampling", "update", "all"))
        spread = f"{min(both['rounds']):.2f} to {max(both['rounds']):.2f}"
        assert (f"| {sampling['median']:.2f} | {update['median']:.2f} | {both['median']:.2f} "
                f"({spread}) |") in page


# ---------------------------------------------------------------- docs/new_environment.md's example
@pytest.fixture
def sorting(tmp_path, monkeypatch):
    """The page's environment, saved and registered as it tells."""
    page = ROOT / "docs" / "new_environment.md"
    (code,) = blocks(page, "python")
    (tmp_path / "sorting.py").write_text(code)
    spec = importlib.util.spec_from_file_location("sorting", tmp_path / "sorting.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(environments.ENVIRONMENTS, "sorting", module.Sorting)
    return module


def make(**settings):
    return rollout.make_env({"name": "sorting", **settings}, verify_iters=3)


@pytest.mark.parametrize("rule", ["up", "down"])
def test_the_example_rewards_its_expert(sorting, rule):
    env = make(rule=rule)
    for seed in range(50):
        env.reset(seed)
        _, reward, terminated, truncated, info = env.step(env.expert())
        assert (reward, terminated, truncated) == (5.0, True, False)
        assert info["correct"] and info["feedback"] == ""


def test_the_example_lets_one_try_again(sorting):
    env = make()
    first, _ = env.reset(0)
    obs, reward, terminated, truncated, info = env.step(env.mistake())
    assert (reward, terminated, truncated) == (-1.0, False, False)
    assert obs["messages"][:1] == first["messages"]
    assert obs["messages"][2] == {"role": "user", "content": info["feedback"]}
    assert env.step("no JSON")[1:4] == (-3.0, False, False)
    assert env.step('{"order": [1, 2]}')[1:4] == (-3.0, False, True)


def test_the_example_knows_its_splits_rules_and_settings(sorting):
    problems = {split: set() for split in ("train", "unseen")}
    for split, found in problems.items():
        env = make(split=split)
        for seed in range(300):
            env.reset(seed)
            found.add("".join(sorted(env.letters)))
    assert not problems["train"] & problems["unseen"]
    with pytest.raises(errors.UserError, match="env.rule: 'sideways' is none of up, down"):
        make(rule="sideways")
    with pytest.raises(errors.UserError, match=r"env.rulle \(did you mean rule\?\)"):
        make(rulle="up")


def test_the_example_plays_in_the_evaluation(sorting):
    records = rollout.play_reference({"name": "sorting"}, "as they stand", 40, 0, 3, rule="down")
    answers = [record["counts"]["per_step"] for record in records]
    assert set(answers) <= {(0, 3), (1, 1)}
    assert len({record["cluster"] for record in records}) > 30
