"""report.html: escaped, self-contained, bounded, its filters' data right, and live; in a browser,
where one is installed (marked slow)."""

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from conftest import CONFIG, PICTURES
from PIL import Image
from test_report import evaluation

import report
from environments import make_env, observations
from lib import curves, page
from lib.conversations import conversation, read_conversations
from lib.errors import UserError
from lib.settings import load

EVIL = '</pre></mark><script>alert("x")</script><img src=http://x.invalid/ onerror=alert(1)> &'
HALF = "\ud83d"  # of a character, which JSON may spell


class Parsed(HTMLParser):
    """Tags with their attributes, the text of the page, the script and the style."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside = [], "", None
        self.tables = []  # rows of texts of their cells
        self.raw = {"script": "", "style": ""}
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "span":
            self.inside = tag if tag in self.raw else None
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.inside = tag
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag != "span":
            self.inside = None

    def handle_data(self, data):
        if self.inside in self.raw:
            self.raw[self.inside] += data
            return
        self.text += data
        if self.inside:
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self):
        """What models saw; figures are PNG."""
        return [image for image in self.all("img") if "image/webp" in image["src"]]

    @property
    def conversations(self):
        return self.all("article")


def turn(answer, category="wrong_value", recognized=True, seed=7, attempt=1, verifier="No."):
    correct = category == "correct"
    return {
        "seed": seed, "attempt": attempt, "answer": answer, "reward": 5.0 if correct else -1.0,
        "verifier": "" if correct else verifier, "category": category, "correct": correct,
        "recognized": recognized,
    }


def line(arm, episodes, variant="ID", env=None):
    env = env or {"name": "gp", "split": "all", "image_size": [112, 112]}
    return {
        "split": "all", "variant": variant, "arm": arm, "temperature": 0.2, "env": env,
        "verify_iters": 5, "episodes": episodes,
    }


def finding(**changes):
    """As findings.py writes it down."""
    ours = {"at": ["g", "all", "rule OOD", "solved"], "says": "g/rl > Init", "paper": 3.5,
            "estimate": [4, 1, 7], "per_seed": [4], "verdict": "shown"}
    other = {"at": ["g", "all", "ID", "solved"], "says": "g/rl > g/sft", "estimate": None,
             "per_seed": [], "verdict": "not measured"}
    provided = {"at": ["g", "all", "ID", "solved"], "start_of": "g/rl", "at_most": 0.5,
                "of_start_of": "g/q", "values": [7, None], "holds": False}
    found = {
        "name": "RL gains", "verdict": "not shown", "minutes": 12.3, "seeds": 3,
        "interval_over": "seeds", "evaluations": {"g": "elsewhere/g/evaluation.json"},
        "unfinished": ["rl seed 1: killed"], "notes": ["not equal"], "provided": provided,
        "decides": [ours], "beside": [other],
    }
    return {**found, **changes}


def save_findings(folder, findings):
    found = {"folder": str(folder), "quick": False, "findings": findings}
    (folder / "findings.json").write_text(json.dumps(found))


def save_evaluation(folder, lines, **changes):
    found = evaluation(**{"curves": {"ID": {}, "rule OOD": {}}, "runs": [str(folder)], **changes})
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(found))
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "conversations.jsonl").write_text(text)


@pytest.fixture
def written(tmp_path, capsys):
    """report.main over an evaluation with these conversations; the page Parsed."""

    def write(*lines, **changes):
        save_evaluation(tmp_path, lines, **changes)
        report.main([str(tmp_path)])
        return Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))

    write.folder = tmp_path
    return write


# ---------------------------------------------------------------- what is in it
def test_whatever_was_written_by_others_stays_text(written):
    lines = [line(EVIL, [[turn(EVIL + HALF, verifier=EVIL)]], variant=EVIL)]
    save_findings(written.folder, {EVIL: finding(name=EVIL, verdict=EVIL, notes=[EVIL])})
    found = written(*lines, notes=[EVIL], commit=EVIL)
    assert len(found.all("script")) == 1 and not found.all("script")[0]
    sources = [image["src"] for image in found.all("img")]
    assert all(re.match("data:image/(webp|png);base64,", source) for source in sources)
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.text.count('<script>alert("x")</script>') >= 5  # answer, verifier, note, names ..
    assert list(json.loads(found.conversations[0]["data-solved"]))[0].startswith("</pre>")


def test_nothing_is_fetched(written):
    found = written(line("Init", [[turn("7*3")]]))
    for _, attributes in found.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert re.match("#|data:image/(webp|png);base64,", attributes.get(name, "#"))
    assert not re.search(r"url\(|@import", found.raw["style"])
    (policy,) = [tag["content"] for tag in found.all("meta") if "http-equiv" in tag]
    digest = base64.b64encode(hashlib.sha256(found.raw["script"].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_what_is_printed_is_shown(written):
    """The same tables, the notes, and how many minutes it took."""
    found = written(notes=["sft has less"])
    words = " ".join(found.text.split())
    assert "all: success %, ± half the 95 % interval, n = 40" in words
    assert "50.0 / 60.0 ±10.0" in words and "+20.0 [+17.0, +24.5]" in words
    assert "sft has less." in words and "eval 1.5" in words


def test_figures_are_in_the_page(written):
    found = written(curves=evaluation()["curves"])
    for image, name in zip(found.all("img"), ("evaluation.png", "frontier.png")):
        data = base64.b64decode(image["src"].partition(",")[2])
        assert data == (written.folder / name).read_bytes()


def test_findings_beside_are_shown(written):
    """Each with its verdict, seeds and minutes, below it what decides, then what does not."""
    save_findings(written.folder, {"1": finding()})
    found = written()
    (table, *_) = found.tables
    assert table == [
        ["finding", "points", "paper", "ours [95 %]", "verdict", "seeds", "minutes"],
        ["1. RL gains", "", "", "", "NOT SHOWN", "3", "12"],
        ["g: provided", "start / Init <= 0.5", "", "7.0 / -", "not measured", "", ""],
        ["g: rule OOD, solved", "g/rl - Init", "+3.5", "+4.0 [1.0, 7.0]", "shown", "", ""],
        ["g: ID, solved", "g/rl - g/sft", "", "-", "", "", ""],
    ]
    words = " ".join(found.text.split())
    assert "1: unfinished, rl seed 1: killed 1: not equal" in words
    assert [badge["class"] for badge in found.all("span")] == ["badge right"]


@pytest.mark.parametrize("text", ["", "{", "3", "[1]", '{"rows": 3}', "null", '{"findings": 3}',
                                  '{"findings": {"1": {}}}', '{"findings": {"1": []}}'])
def test_findings_that_cannot_be_read_are_left_out(written, text):
    (written.folder / "findings.json").write_text(text)
    assert not [section for section in written().all("section") if section["id"] == "findings"]
    (written.folder / "evaluation.json").unlink()
    with pytest.raises(UserError, match="cannot read .*findings.json: run findings.py first"):
        report.main([str(written.folder)])


def test_settings_are_compared_with_the_nearest_shipped_ones(tmp_path):
    files = {}
    for name, overrides in {"a": ["env.rule=face"], "b": ["env.rule=face", "ppo.clip=0.3"]}.items():
        _, raw, _ = load([str(PICTURES), "run.dir=elsewhere", "run.seed=4", *overrides])
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(raw))
    shipped, rows = page.changed_settings(files)
    assert shipped == "configs/mini/gp_vl.yaml"
    assert rows == [
        {"key": "env.rule", "shipped": "ten", "here": "face", "names": ["a", "b"]},
        {"key": "ppo.clip", "shipped": "0.2", "here": "0.3", "names": ["b"]},
    ]
    assert page.changed_settings({}) == ("", [])


def test_page_stays_within_its_limit(written, monkeypatch):
    """The first conversations of each variant, and a note on how many are not there."""
    monkeypatch.setattr(page, "LIMIT", 150_000)
    lines = []
    for variant in ("ID", "rule OOD"):
        episodes = [[turn("x" * 8000, seed=seed)] for seed in range(12)]
        lines.append(line("Init", episodes, variant))
    found = written(*lines)
    assert (written.folder / "report.html").stat().st_size <= 150_000
    shown = [one["data-variant"] for one in found.conversations]
    assert 4 <= len(shown) < 24 and shown == sorted(shown)
    assert abs(shown.count("ID") - shown.count("rule OOD")) <= 1
    assert f"{24 - len(shown)} more did not fit" in " ".join(found.text.split())


# ---------------------------------------------------------------- of a whole suite
@pytest.fixture
def suite(tmp_path, capsys):
    """write(**more findings): the page of a suite of two evaluations, g and h, Parsed."""
    for name, drawn in {"g": evaluation()["curves"], "h": {"ID": {}}}.items():
        episodes = [[turn(f"{name} {seed}" + 4000 * "x", seed=seed)] for seed in range(9)]
        lines = [line("Init", episodes), line("rl", episodes, "rule OOD")]
        save_evaluation(tmp_path / name, lines, curves=drawn, runs=[str(tmp_path / "s1" / "gp")])
    arms = {"rl": ("sft/step_1", "not bare"), "rl-ppo.init=none": ("none", EVIL)}
    for arm, (init, answer) in arms.items():
        folder = tmp_path / "s1" / "gp" / arm
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"ppo: {{init: {init}}}")
        turns = [{"step": 1 + at // 6, **turn(f"{answer} {at}")} for at in range(8)]
        (folder / "transcripts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in turns))
        (folder / "metrics.jsonl").write_text(record(1, reward=-1.5) + "\n")

    def write(**more):
        names = {"h": "h/evaluation.json", "g": "g/evaluation.json"}
        save_findings(tmp_path, {"1": finding(evaluations=names), **more})
        report.main([str(tmp_path)])
        return Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))

    write.folder = tmp_path
    return write


def test_suite_shows_all_its_evaluations(suite, capsys):
    """Under their names, in the order in which the findings name them."""
    found = suite()
    out = capsys.readouterr().out
    assert "1. RL gains" in out and f"written: {suite.folder / 'report.html'}" in out
    variants = dict.fromkeys(one["data-variant"] for one in found.conversations)
    assert list(variants) == ["h: ID", "h: rule OOD", "g: ID", "g: rule OOD"]
    assert found.tables[0][1][0] == "1. RL gains"
    titles = re.findall(r"\b([gh]): all: success %", found.text)
    assert titles == ["h", "g"]
    figures = [image["alt"] for image in found.all("img") if "png" in image["src"][:20]]
    of_the_table = ["success of the arms", "Gained in other variants against the trained one"]
    of_curves = ["success against model GFLOPs", "Other variants against the trained one"]
    assert figures == [*[f"h: {title}" for title in of_the_table],
                       *[f"g: {title}" for title in of_curves + of_the_table]]
    assert [svg["aria-label"][:17] for svg in found.all("svg")] == ["reward per answer"]  # once


def test_what_was_measured_alike_is_said_once():
    alike = {"g": "abc, here", "h": "def, here", "i": "abc, here"}
    assert report.joined(alike) == {"g, i": "abc, here", "h": "def, here"}


def test_bare_model_answers_as_it_did(suite):
    """Five answers of the first update of the PPO that began there, and of no other."""
    found = suite()
    words = " ".join(found.text.split())
    assert [f"{EVIL} {at}" in words for at in range(8)] == 5 * [True] + 3 * [False]
    assert f"{suite.folder / 's1' / 'gp'}: rl-ppo.init=none" in words and "not bare" not in words


def test_suite_stays_within_the_limit(suite, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 400_000)
    found = suite()
    assert (suite.folder / "report.html").stat().st_size <= 400_000
    shown = [one["data-variant"] for one in found.conversations]
    counts = [shown.count(name) for name in dict.fromkeys(shown)]
    assert len(counts) == 4 and sum(counts) < 36 and max(counts) - min(counts) <= 1


def test_suite_says_which_evaluation_it_cannot_read(suite):
    (suite.folder / "old").mkdir()
    (suite.folder / "old" / "evaluation.json").write_text("{}")
    found = suite(**{"2": finding(evaluations={"old": "", "gone": ""})})
    words = " ".join(found.text.split())
    assert "Note: old: " in words and "is of an older version" in words
    assert "Note: gone: cannot read" in words and len(found.conversations) == 36


# ---------------------------------------------------------------- conversations
def test_filters_go_by_what_was_played(written):
    first = [turn("7*3"), turn("7*3", attempt=2), turn("8*3", "correct", attempt=3)]
    second = [turn("8*4", "misread", recognized=False, seed=8)]
    found = written(
        line("Init", [first, second]),
        line("rl", [[turn("8*3", "correct")], second]),
        line("rl", [[turn("3*8", "correct", seed=9)]], variant="rule OOD"),
    )
    keys = ("data-variant", "data-solved", "data-attempts", "data-misread", "data-repeated")
    assert [[one[key] for key in keys] for one in found.conversations] == [
        ["ID", '{"Init": true, "rl": true}', "3", "false", "true"],
        ["ID", '{"Init": false, "rl": false}', "1", "true", "false"],
        ["rule OOD", '{"rl": true}', "1", "false", "false"],
    ]
    choices = [option.get("value") for option in found.all("option")]
    assert choices == ["", None, None, "", "Init", "rl", "", "Init", "rl", "1", "2", "3"]


def test_what_was_wrong_is_said_and_marked():
    answer = '{"cards": [1], "formula": "2"}'
    turns = [
        turn(answer),
        turn(answer, "misread", recognized=False, attempt=2),
        turn("no JSON", "illegal", recognized=False, attempt=3),
        turn("no JSON", "illegal", recognized=False, attempt=4),
        turn(answer, "correct", recognized=False, attempt=5),
    ]
    found = conversation([line("rl", [turns])], 0, [], '"formula"')
    (position,) = found.positions
    said = [attempt.faults for attempt in position.attempts["rl"]]
    assert said == [["wrong value"], ["misread", "repeated"], ["illegal"], ["illegal", "repeated"],
                    ["misread", "repeated"]]
    read, decided = '{"cards": [1], ', '"formula": "2"}'
    marked = [[tuple(part) for part in attempt.parts] for attempt in position.attempts["rl"]]
    assert marked == [
        [(read, ""), (decided, "wrong")],
        [(read, "misread"), (decided, "")],
        [("no JSON", "wrong")],
        [("no JSON", "wrong")],
        [(read, "misread"), (decided, "")],
    ]


def test_a_walk_is_shown_position_by_position():
    """What each arm said at each, with the view there; one that failed did not come further."""
    cfg, _, _ = load([str(CONFIG.with_name("virl_vl.yaml"))])
    env = make_env(cfg.env, 2)
    seen = observations(env, 3)
    right = [turn("go", "correct", seed=3) for _ in seen]
    failed = [right[0], turn("stop", "wrong_action", seed=3), turn("left", "wrong_action", seed=3)]
    found = conversation([line("sft", [failed]), line("rl", [right])], 0, seen, env.answer_key)
    assert len(found.positions) == len(env.rail) > 3
    assert found.solved == {"sft": False, "rl": True}
    arms = [list(position.attempts) for position in found.positions]
    assert arms == [["sft", "rl"], ["sft", "rl"]] + [["rl"]] * (len(seen) - 2)
    faults = [attempt.faults for attempt in found.positions[1].attempts["sft"]]
    assert faults == 2 * [["wrong action"]]
    views = {position.image.tobytes() for position in found.positions}
    assert len(views) > 3 and "Turn" in found.positions[0].prompt


def test_a_walk_that_stops_before_its_end_is_not_solved():
    """Without the walk itself the answers alone tell."""
    lines = [line("rl", [[turn("go", "correct")]])]
    seen = {"messages": [{"content": ""}], "image": None}
    assert not conversation(lines, 0, [seen, seen], "").solved["rl"]
    assert conversation(lines, 0, [], "").solved["rl"]


def test_the_picture_is_the_one_that_was_played(written):
    found = written(line("Init", [[turn("7*3", seed=11)]]))
    data = base64.b64decode(found.pictures()[0]["src"].partition(",")[2])
    env = make_env({"name": "gp", "split": "all", "image_size": [112, 112]}, 5)
    dealt, _ = env.reset(11)
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == dealt["image"].tobytes()
    assert "Cards: in the picture" in found.text


def test_a_large_picture_is_scaled_down():
    uri = page.picture_uri(Image.new("RGB", (1200, 600)))
    data = base64.b64decode(uri.partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (448, 224)


def test_an_environment_that_is_not_here_leaves_the_words(written):
    found = written(line("Init", [[turn("7*3")]], env={"name": "elsewhere"}))
    words = " ".join(found.text.split())
    assert "ID: pictures and prompts are not shown (env.name: 'elsewhere'" in words
    assert "7*3" in words and not found.pictures()


def test_torn_lines_are_left_out(tmp_path):
    path = tmp_path / "conversations.jsonl"
    whole = json.dumps(line("Init", [[turn("a\u2028b")]]))
    path.write_text(f"{whole}\n3\n{json.dumps(line('rl', []))}\n{whole[:50]}")
    assert [one["arm"] for one in read_conversations(path)["ID"]] == ["Init"]


# ---------------------------------------------------------------- curves
def record(step, **numbers):
    return json.dumps({"step": step, "tokens": {"train": 100 * step}, "seconds": 2.0, **numbers})


def test_curves_of_a_training_under_way(tmp_path, capsys):
    """Of a line that is being written, nothing."""
    (tmp_path / "rl").mkdir()
    lines = [record(1, reward=-1.5, success=0.25), record(2, reward=0.5, success=None)]
    torn = record(3, reward=1)[:-9]
    (tmp_path / "rl" / "metrics.jsonl").write_text("\n".join([*lines, torn]))
    report.main([str(tmp_path)])
    assert "rl: 2 steps so far\n" in capsys.readouterr().out
    found = Parsed((tmp_path / "report.html").read_text())
    titles = [svg["aria-label"] for svg in found.all("svg")]
    assert titles == [
        "reward per answer, points, steps 1 to 2, from -1.5 to 0.5",
        "success, share, steps 1 to 1, from 0.25 to 0.25",
        "tokens per second, steps 2 to 2, from 50 to 50",
    ]
    assert found.all("polyline")[0]["points"] == "0.0,120.0 300.0,0.0"
    assert not found.conversations


def test_curves_of_one_training_by_its_own_folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(record(1, loss=4.0) + "\n" + record(2, loss=1.0) + "\n")
    report.main([str(tmp_path)])
    assert "loss, nats per token" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("text", ["", "\n", "{", "[]\n3\nnull\n", '{"step": 1}\n'])
def test_a_log_without_a_record_has_no_curve(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert curves.logs_of(tmp_path) == {}


def test_numbers_that_are_none_are_not_drawn():
    records = [{"step": 1, "reward": float("nan")}, {"step": 2, "reward": 1.0}, {"step": 3}]
    (panel, *_) = curves.panels_of({"rl": records})["PPO"]
    assert (panel.first, panel.last, panel.curves[0].path) == (2, 2, "150.0,60.0")


# ---------------------------------------------------------------- in a browser
def browser_path():
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def browse(written):
    """A page with conversations, opened from disk: its tab at a width; console errors fail."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if browser_path() is None:
        pytest.skip("no Chromium is installed")
    first = [turn("7*3"), turn("7*3", attempt=2), turn("8*3", "correct", attempt=3)]
    second = [turn(EVIL, "misread", recognized=False, seed=8)]
    third = [turn("3*8", "correct", seed=9)]
    written(
        line("Init", [first, second, third]), line("sft", [second, first, third]),
        line("rl", [third, third, first], "rule OOD"),
    )
    problems = []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])

        def open_at(width):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            tab.on("console", lambda message: problems.append(message.text))
            tab.on("pageerror", lambda error: problems.append(str(error)))
            tab.on("dialog", lambda dialog: problems.append(dialog.message))
            tab.on("request", lambda request: problems.append(request.url)
                   if request.url.startswith("http") else None)
            tab.goto((written.folder / "report.html").as_uri())
            return tab

        yield open_at
        browser.close()
    assert not problems


def shown(tab):
    """Headings of the conversations that are to be seen, and what the counter says."""
    return tab.locator("article:visible h3").all_inner_texts(), tab.locator("output").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_layout_in_a_browser(browse, width):
    """Nothing is wider than the window; arms stand side by side where there is room."""
    tab = browse(width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tops = [arm.bounding_box()["y"] for arm in tab.locator("article:visible .arm").all()]
    assert len(tops) == 2 and (tops[0] == tops[1]) == (width == 1400)
    assert tab.locator("article:visible img").evaluate("image => image.naturalWidth") == 112


@pytest.mark.slow
def test_filters_and_keys_in_a_browser(browse):
    tab = browse(1400)
    assert shown(tab) == (["ID, problem 1 seed 7"], "1 of 6")
    tab.keyboard.press("ArrowRight")
    assert shown(tab) == (["ID, problem 2 seed 8"], "2 of 6")
    answer = tab.locator("article:visible pre.answer").first
    assert '<script>alert("x")</script>' in answer.inner_text()
    tab.keyboard.press("k")
    tab.keyboard.press("ArrowLeft")
    assert shown(tab) == (["ID, problem 1 seed 7"], "1 of 6")
    tab.get_by_label("Solved by").select_option("Init")
    tab.get_by_label("not by").select_option("sft")
    assert shown(tab) == (["ID, problem 1 seed 7"], "1 of 1 (6 in all)")
    tab.get_by_label("Solved by").select_option("")
    tab.get_by_label("not by").select_option("")
    tab.locator("select[name=variant]").select_option("rule OOD")
    assert shown(tab)[1] == "1 of 3 (6 in all)"
    tab.get_by_label("misread").check()
    assert shown(tab) == ([], "none (6 in all)")
    tab.get_by_label("misread").uncheck()
    tab.get_by_label("repeated answers").check()
    assert shown(tab) == (["rule OOD, problem 3 seed 7"], "1 of 1 (6 in all)")
    tab.get_by_label("repeated answers").uncheck()
    assert shown(tab)[1] == "3 of 3 (6 in all)"  # what was looked at stays
    tab.get_by_role("button", name="Previous").click()
    assert shown(tab)[1] == "2 of 3 (6 in all)"
    tab.get_by_label("At least").select_option("3")
    assert shown(tab)[1] == "1 of 1 (6 in all)"
