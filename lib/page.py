"""report.html: one file that holds all of an evaluation, or of a training so far, for a browser.

It works offline, from disk: style, script and pictures are in it, and its Content-Security-Policy
forbids everything else. Whatever models or people wrote is escaped by the templates (page.html.j2,
conversation.html.j2), where answers may spell HTML. The script (page.js) only shows and hides what
is there. No torch in this file.
"""
import base64
import hashlib
import io
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lib.curves import HEIGHT, WIDTH
from lib.errors import UserError
from lib.runs import flat_settings, read_settings, write_atomic
from lib.settings import ROOT, load
from lib.tables import training_name
from lib.verdict_table import HEAD, VerdictTable, read_verdicts

HERE = Path(__file__).parent
LIMIT = 8_000_000  # bytes of the page; conversations that do not fit are left out
LARGEST = 448  # pixels of a side of a picture that a model saw, which may be larger
NOT_COMPARED = ("run.dir", "run.seed")  # settings that differ from run to run


@dataclass
class Page:
    """What a page shows; all but the title may be empty, and then it has no such part."""
    title: str
    facts: dict = field(default_factory=dict)  # {name: text}: how the figures came about
    notes: list = field(default_factory=list)  # lines that the tables must not be read without
    findings: VerdictTable | None = None
    tables: list = field(default_factory=list)  # of lib/tables.py
    figures: dict = field(default_factory=dict)  # {title: path of a PNG}
    trainings: dict = field(default_factory=dict)  # of curves.panels_of
    shipped: str = ""  # the YAML that settings are compared with
    settings: list = field(default_factory=list)  # rows of `changed_settings`
    bare: dict = field(default_factory=dict)  # {training: answers}, see `bare_answers`
    conversations: list = field(default_factory=list)  # of lib/conversations.py


def write_page(path, page):
    """Write a Page as HTML, at most LIMIT bytes of it. Raises: UserError if it cannot be written.

    Where not all conversations fit, the first of each variant are shown, and a note says so.
    """
    templates = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                            lstrip_blocks=True, undefined=StrictUndefined)
    templates.filters.update(picture=picture_uri, arm=training_name, number=number_text)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "page": page,
        "figures": {title: png_uri(file.read_bytes()) for title, file in page.figures.items()},
        "width": WIDTH, "height": HEIGHT, "columns": HEAD,
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script), "script_digest": digest,
        "arms": arms_of(page.conversations),
        "variants": list(dict.fromkeys(one.variant for one in page.conversations)),
    }
    whole = templates.get_template("page.html.j2")
    empty = whole.render(parts, conversations=[], left_out=0)
    room = LIMIT - len(encoded(empty)) - 1000
    shown = that_fit(page.conversations, templates.get_template("conversation.html.j2"), room)
    left_out = len(page.conversations) - len(shown)
    html = whole.render(parts, conversations=shown, left_out=left_out)
    write_atomic(path, encoded(html).decode())


def that_fit(conversations, template, room):
    """The conversations as HTML, as many as fit into `room` bytes, the first of each variant first.

    Returns: list of Markup, in the order given.
    """
    written = {}
    for nth, one in sorted(enumerate(conversations), key=lambda pair: pair[1].number):
        html = template.render(one=one)
        room -= len(encoded(html))
        if room < 0:
            break
        written[nth] = Markup(html)
    return [written[nth] for nth in sorted(written)]


def encoded(text):
    """As UTF-8; half a character, which JSON may spell, becomes a question mark."""
    return text.encode("utf-8", errors="replace")


def arms_of(conversations):
    """Names of the arms, each once."""
    names = {}
    for one in conversations:
        names.update(one.solved)
    return list(names)


def number_text(value):
    """A figure of a curve."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# ---------------------------------------------------------------- pictures
def png_uri(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def picture_uri(image):
    """A PIL image as the text of an <img>'s src: to the pixel, or scaled down to LARGEST."""
    if max(image.size) > LARGEST:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, method=2)  # half the size of PNG
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------- what lies beside
def findings_beside(folder):
    """The VerdictTable of the folder's findings.json, None if there is none that can be read."""
    with suppress(UserError):
        return read_verdicts(Path(folder) / "findings.json")
    return None


def settings_files(folder, runs):
    """{name: YAML} of the settings that an evaluation and the trainings of its runs were given."""
    files = {"evaluation": folder / "evaluation.yaml"}
    for run in map(Path, runs):
        for path in [run / "config.yaml", *sorted(run.glob("*/config.yaml"))]:
            training = path.parent.name
            files[training if len(runs) == 1 else f"{run}: {training}"] = path
    return {name: path for name, path in files.items() if path.exists()}


def changed_settings(files):
    """How settings differ from those shipped.

    Args: files: {name: path of a resolved YAML}, as a run keeps them.
    Returns: the shipped YAML that is nearest to them, relative to the repository, "" without files;
        rows {key, shipped, here, names: the files that say so}.
    """
    given = {}
    for name, path in files.items():
        with suppress(OSError, UserError):
            given[name] = flat_settings(read_settings(path))
    if not given:
        return "", []
    candidates = {}
    for path in sorted((ROOT / "configs").glob("*/*l.yaml")):  # tasks: *_l.yaml and *_vl.yaml
        _, shipped, _ = load([str(path)])
        candidates[str(path.relative_to(ROOT))] = rows_of(given, flat_settings(shipped))
    nearest = min(candidates, key=lambda name: len(candidates[name]))
    return nearest, candidates[nearest]


def rows_of(given, shipped):
    """The rows of `changed_settings` against one shipped YAML."""
    names = {}  # (key, shipped value, value here): names
    for name, settings in given.items():
        for key, value in settings.items():
            usual = shipped.get(key, "not there")
            if value != usual and key not in NOT_COMPARED:
                names.setdefault((key, str(usual), str(value)), []).append(name)
    rows = []
    for (key, usual, value), said_by in names.items():
        rows.append({"key": key, "shipped": usual, "here": value, "names": said_by})
    return rows
