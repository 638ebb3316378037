"""What would be lost: mathematics that can be read and used without Ray, and tests that are found where the code is."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("models", "pipeline", "jobs")
"""In the direction of imports: each may import itself and those before it."""
SOURCES = sorted(file for layer in LAYERS for file in (ROOT / layer).rglob("*.py") if "node_modules" not in file.parts)
FORBIDDEN = {
    "models": {"ray", "pyarrow", "typer", "rich", "jinja2"},
    "pipeline": {"typer", "rich", "jinja2"},
    "jobs": set[str](),
}
RAY_IN_PIPELINE = {"pipeline/dataset.py", "pipeline/isolation.py", "pipeline/training.py"}
OTHER_TESTS = {
    "test_architecture.py",
    "test_cluster_yaml.py",
    "test_dockerfile.py",
    "test_documents.py",
    "test_end_to_end.py",
    "test_lost_nodes.py",
    "test_rayjob.py",
    "test_real_size.py",
}
"""Tests that mirror no module: of the whole."""
COMMANDS = "cli demo edit evaluate finetune invert listing options progress report_command requests running session status tables"
TESTED_ELSEWHERE = {
    **{f"jobs/{name}.py": "test_end_to_end.py" for name in COMMANDS.split()},  # as people run them, in processes of their own
    "jobs/align.py": "test_alignment.py",  # with what it calls
    **{f"jobs/{name}.py": "test_submit.py" for name in ("cluster", "environment", "following", "submitted")},  # with a real cluster
    **{f"jobs/{name}.py": "test_plan.py" for name in ("planning", "prospect")},  # as the command uses them
    "jobs/showpiece.py": "test_truth.py",  # what it prints is measured there
    "jobs/rebuild.py": "test_pixelface_training.py",  # hours of training; its parts are tested
    "pipeline/aligning.py": "test_alignment.py",
    "pipeline/dataset.py": "test_end_to_end.py",  # needs a Ray cluster
    "pipeline/training.py": "test_end_to_end.py",
    "pipeline/tuning.py": "test_checks.py",  # planned by the same looks
    "pipeline/isolation.py": "test_faults.py",  # with real processes that die
    **{f"pipeline/{name}.py": "test_sources.py" for name in ("finding", "inputs")},  # through the functions that people call
    "pipeline/manifest.py": "test_resume.py",  # read and written there
    "pipeline/scoring.py": "test_stages.py",  # a stage like the others
}
"""Modules that may do without a test file of their name, and the one that covers them."""


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(file: Path) -> set[str]:
    """Names of all modules that a file imports, wherever in it; of ``from a import b``, ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)} imports relatively; say from where"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages(file: Path) -> set[str]:
    return {module.split(".")[0] for module in imported(file)}


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_imports_point_from_people_to_rows_to_tensors(file: Path) -> None:
    layer = file.relative_to(ROOT).parts[0]
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert packages(file).isdisjoint(above)
    assert packages(file).isdisjoint(FORBIDDEN[layer])
    assert "tests" not in packages(file)


def test_ray_is_where_rows_meet_the_cluster_and_nowhere_else_in_the_pipeline() -> None:
    assert {name_of(file) for file in SOURCES if name_of(file).startswith("pipeline/") and "ray" in packages(file)} == RAY_IN_PIPELINE


def test_only_the_modules_with_ray_in_them_are_built_on_them() -> None:
    """Importing ``pipeline.dataset`` imports Ray, so a module that must run without it must not."""
    tainted = {module.removesuffix(".py").replace("/", ".") for module in RAY_IN_PIPELINE}
    users = {name_of(file) for file in SOURCES if name_of(file).startswith("pipeline/") and imported(file) & tainted}
    assert users <= RAY_IN_PIPELINE


def test_the_mathematics_needs_torch_and_nothing_of_the_project() -> None:
    assert packages(ROOT / "models/diffusion.py") - set(sys.stdlib_module_names) == {"torch"}


def mirrors(file: Path) -> set[str]:
    """Names that the test file of a module may have; in a nested package the package may lead."""
    return {f"test_{file.stem}.py", f"test_{file.parent.name}_{file.stem}.py"}


@pytest.mark.parametrize("file", [f for f in SOURCES if f.name != "__init__.py"], ids=name_of)
def test_every_module_has_a_test_file_of_its_name(file: Path) -> None:
    wanted = mirrors(file) | {TESTED_ELSEWHERE.get(name_of(file), "")} - {""}
    assert any((ROOT / "tests" / name).is_file() for name in wanted), f"write tests/test_{file.stem}.py"


def test_every_test_file_has_a_module_and_every_exception_a_reason_to_be() -> None:
    known = {name for file in SOURCES for name in mirrors(file)} | OTHER_TESTS
    assert {file.name for file in (ROOT / "tests").glob("test_*.py")} <= known
    assert {name for name in TESTED_ELSEWHERE if not (ROOT / name).is_file()} == set()
