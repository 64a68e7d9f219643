"""docs/tour.ipynb is a fit thing to publish and, marked slow, runs from top to bottom."""

import json
import re

import pytest
from conftest import ROOT

PATH = ROOT / "docs" / "tour.ipynb"
OF_A_MACHINE = re.compile(r"/(home|root|tmp|work|Users|usr|opt|var|content)/|[A-Z]:\\|file://")


@pytest.fixture(scope="module")
def notebook():
    return json.loads(PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def texts(cell):
    """What a cell printed and showed, pictures apart."""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield "".join(output["text"])
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield "".join(data)


def test_every_code_cell_compiles(code_cells):
    for cell in code_cells:
        compile("".join(cell["source"]), cell["id"], "exec")


def test_it_was_executed_from_top_to_bottom_without_an_error(code_cells):
    counts = [cell["execution_count"] for cell in code_cells]
    assert counts == list(range(1, len(code_cells) + 1))
    kinds = {output["output_type"] for cell in code_cells for output in cell["outputs"]}
    assert kinds == {"stream", "display_data", "execute_result"}
    for cell in code_cells:
        assert cell["outputs"] or "print" not in "".join(cell["source"]), cell["id"]


def test_it_holds_nothing_of_the_machine_that_made_it(notebook, code_cells):
    assert PATH.stat().st_size < 500_000
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for cell in notebook["cells"]:
        assert not cell["metadata"]
        assert not OF_A_MACHINE.search("".join(cell["source"]))
    for cell in code_cells:
        for text in texts(cell):
            assert not OF_A_MACHINE.search(text), text
            assert "\x1b" not in text and "\r" not in text and "Traceback" not in text, text


def test_its_links_lead_somewhere(notebook):
    for cell in notebook["cells"]:
        for target in re.findall(r"\]\(([^)#\s]+)", "".join(cell["source"])):
            assert (PATH.parent / target).exists(), target


@pytest.mark.slow
def test_it_runs_from_scratch(tmp_path):
    pytest.importorskip("nbclient", reason="runs the notebook: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="runs the notebook: pip install nbclient ipykernel")
    from run_tour import copied, execute

    executed = execute(copied(tmp_path))  # raises what a cell raises
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
