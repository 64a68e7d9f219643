"""Executes docs/tour.ipynb from scratch and writes its outputs into it.

    pip install nbclient ipykernel
    python tools/run_tour.py

It runs in a copy of the repository without runs/, so it touches no run of yours and needs nothing
that a fresh clone has not. The file is written after each cell, and a cell that fails ends it.
"""
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOUR = Path("docs", "tour.ipynb")
LEFT_OUT = shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__", ".*_cache", "results")
LONGEST = 3600  # seconds that one cell may take, on a machine that is busy otherwise


def execute(root, after_cell=lambda notebook: None):
    """Run the notebook in `root`, a copy of the repository, by a kernel of this very Python.

    Returns: the executed notebook. Raises: nbclient's CellExecutionError if a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(root / TOUR, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=LONGEST, kernel_name="python3", record_timing=False,
                            coalesce_streams=True,
                            resources={"metadata": {"path": str(root / TOUR.parent)}})
    client.on_cell_executed = lambda **_: after_cell(notebook)
    metadata = dict(notebook.metadata)
    client.execute()
    notebook.metadata = metadata  # without what the kernel says of this machine
    return notebook


def copied(folder):
    """A copy of what a clone has, in `folder`. Returns: its root."""
    return Path(shutil.copytree(ROOT, folder / "repository", ignore=LEFT_OUT))


def main():
    """Execute the notebook and keep its outputs."""
    import nbformat

    def save(notebook):
        nbformat.write(notebook, ROOT / TOUR)
        done = sum(bool(cell.get("execution_count")) for cell in notebook.cells)
        print(f"{done} code cells done", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        save(execute(copied(Path(folder)), save))


if __name__ == "__main__":
    main()
