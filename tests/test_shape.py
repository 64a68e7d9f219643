"""The shape of the program: imports form a tree, nothing is evaluated or swallowed, trainers name
no environment.
"""

import ast

import pytest
from conftest import ROOT

FOLDERS = ("lib", "scenery")
PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
PROGRAM = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        p.read_text()
    )
    for p in PATHS
}
LEAVES = ("sft", "rl", "eval", "report", "plan", "findings")  # import each other never
PURE = (
    "gp",
    "virl",
    "environments",
    "scenery",
    "lib.settings",
    "lib.runs",
    "lib.answers",
    "lib.checks",
    "lib.suite",
    "lib.jobs",
    "lib.conversations",
    "lib.curves",
    "lib.documents",
    "lib.figures",
    "lib.page",
    "lib.tables",
    "lib.verdict_table",
    "report",
    "findings",
)  # without torch
LAYERS = (  # a module imports from layers above its own line, or from its own folder
    ("lib", "scenery"),
    ("gp", "virl", "policy"),
    ("environments",),
    ("rollout",),
    LEAVES,
)
FILES = pytest.mark.parametrize("name", sorted(PROGRAM))


def imported(tree):
    """Names of all modules that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name):
    """Which line of LAYERS a module stands in, None if it is not ours."""
    top = name.split(".")[0]
    return next((i for i, names in enumerate(LAYERS) if top in names), None)


@FILES
def test_imports_form_a_tree(name):
    for module in imported(PROGRAM[name]):
        same_folder = module.split(".")[0] == name.split(".")[0] and name.split(".")[0] in FOLDERS
        assert layer(module) is None or layer(module) < layer(name) or same_folder, module


@FILES
def test_environments_and_scenery_know_no_torch_and_models_no_environment(name):
    tops = {module.split(".")[0] for module in imported(PROGRAM[name])}
    if name.startswith(PURE):
        assert not tops & {"torch", "transformers", "peft", "bitsandbytes", "policy"}
    if name == "policy" or name.startswith("lib"):
        assert not tops & {"gp", "virl", "scenery"}
    if name in LEAVES:
        assert not tops & {"gp", "virl", "scenery"}


def test_every_file_has_its_place():
    assert all(layer(name) is not None for name in PROGRAM)


@FILES
def test_nothing_is_evaluated_unpickled_or_swallowed(name):
    for node in ast.walk(PROGRAM[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in (
                "eval",
                "exec",
                "compile",
                "pickle.load",
                "pickle.loads",
                "yaml.load",
            ), node.lineno
            if call == "torch.load":
                assert "weights_only=True" in ast.unparse(node)


@pytest.mark.parametrize("name", ["sft", "rl", "eval", "policy", "lib.loading", "lib.families"])
def test_trainers_name_no_environment(name):
    strings = {node.value for node in ast.walk(PROGRAM[name]) if isinstance(node, ast.Constant)}
    assert not strings & {"gp", "virl", "GeneralPoints", "Navigation"}
