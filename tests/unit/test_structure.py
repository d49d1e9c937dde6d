"""The rules that keep the rooms apart: imports go jobs -> pipeline -> models, and each heavy library has one door."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for room in ("models", "pipeline", "jobs") for path in (ROOT / room).rglob("*.py"))

# who may import what: a file's path must start with one of these
DOORS = {
    "deepspeed": ("pipeline/training/engine.py",),
    "mlflow": ("pipeline/tracking",),
    "ray": ("pipeline/", "jobs/"),
    "pipeline": ("pipeline/", "jobs/"),
    "jobs": (),
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    place = path.relative_to(ROOT).as_posix()
    for library, rooms in DOORS.items():
        if library in imported(path):
            assert place.startswith(rooms), f"{place} imports {library}, which only {rooms} may"


def test_no_job_hides_a_module_of_another_name():
    """`python jobs/NAME.py` puts jobs/ first on the path: a file there must not be named like anything that is imported."""
    taken = sys.stdlib_module_names | {"models", "pipeline", "tests"} | set(DOORS)
    assert not {path.stem for path in (ROOT / "jobs").glob("*.py")} & taken
