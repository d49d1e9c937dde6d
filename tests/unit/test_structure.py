"""Import rules: imports go jobs -> pipeline -> models, without cycles, and only one package imports each heavy library.

Imports inside functions count as well."""

import ast
import functools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for room in ("models", "pipeline", "jobs") for path in (ROOT / room).rglob("*.py"))
each_file = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))

# who may import what: a file's path must start with one of these
DOORS = {
    "deepspeed": ("pipeline/training/engine.py", "pipeline/training/zero_layout.py"),
    "mlflow": ("pipeline/tracking",),
    "ray": ("pipeline/", "jobs/"),
    "pipeline": ("pipeline/", "jobs/"),
    "jobs": (),
}
MATHS = {"models", "torch", "numpy"} | sys.stdlib_module_names
"""All that models/ imports."""
# package -> packages of pipeline/ that it must not import
FORBIDDEN = {
    "pipeline/data": ("training", "transfer", "vtab", "operations", "graph"),
    "pipeline/weights": ("training", "transfer", "vtab", "operations", "graph"),
    "pipeline/training": ("transfer", "vtab", "operations", "graph"),
    "pipeline/transfer": ("operations", "graph"),
    "pipeline/tracking": ("data", "weights", "training", "transfer", "vtab", "operations", "graph"),
    "pipeline/operations": ("graph",),
}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Full names of everything that a file imports: modules, or names in modules."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names)


def own_modules(names: Iterable[str]) -> set[str]:
    """The files of this project behind imported names: `from models import posemb` is models.posemb."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & set(MODULES)


@each_file
def test_imports_go_one_way(path):
    libraries = {name.partition(".")[0] for name in imported(path)}
    for library, rooms in DOORS.items():
        if library in libraries:
            assert place(path).startswith(rooms), f"{place(path)} imports {library}, which only {rooms} may import"


@each_file
def test_models_is_maths_only(path):
    if place(path).startswith("models/"):
        others = {name.partition(".")[0] for name in imported(path)} - MATHS
        assert not others, f"{place(path)} imports {others}: models/ is torch, NumPy and the standard library alone"


@each_file
def test_packages_of_the_pipeline_do_not_import_upwards(path):
    for room, above in FORBIDDEN.items():
        if place(path).startswith(room + "/"):
            up = {
                name for name in own_modules(imported(path)) if name.startswith(tuple(f"pipeline.{r}" for r in above))
            }
            assert not up, f"{place(path)} imports {up}"


def circles(edges: Mapping[str, set[str]]) -> list[frozenset[str]]:
    """Groups of nodes that reach one another (strongly connected components of more than one node)."""
    reach = {node: set(targets) for node, targets in edges.items()}
    for middle in edges:  # Warshall
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    groups = {
        frozenset(other for other in reach[node] if node in reach[other]) for node in edges if node in reach[node]
    }
    return [group for group in groups if len(group) > 1]


def test_no_files_import_one_another():
    edges = {name: own_modules(imported(path)) - {name} for name, path in MODULES.items()}
    assert [sorted(circle) for circle in circles(edges)] == []


PACKAGES = sorted({name.rpartition(".")[0] for name in MODULES} - {""})


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_no_folders_import_one_another(package):
    """The files of one folder must not need those of another folder that needs them, even without a circle of files."""
    inside = f"{package}." if package else ""
    edges: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        for target in own_modules(imported(path)):
            if name.startswith(inside) and target.startswith(inside):
                here, there = (other.removeprefix(inside).partition(".")[0] for other in (name, target))
                edges.setdefault(there, set())
                edges.setdefault(here, set()).update({there} - {here})
    assert [sorted(circle) for circle in circles(edges)] == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [frozenset("bc")]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_class_name_has_one_meaning():
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        if not place(path).startswith("jobs/"):  # each job has a Command
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    where.setdefault(node.name, []).append(place(path))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def own_names(tree: ast.Module) -> set[str]:
    """Names that a test has imported from this project."""
    own = ("models", "pipeline", "jobs", "tests")
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in own:
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.asname or a.name.partition(".")[0] for a in node.names if a.name.partition(".")[0] in own}
    return found


def private_names(code: str) -> set[str]:
    """Private names of this project that a test imports, reads or patches."""
    tree = ast.parse(code)
    own, found = own_names(tree), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root: ast.AST = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in own:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            target = node.args[0]
            if isinstance(target, ast.Constant):  # setattr("pipeline.module.name", value)
                found.add(str(target.value).rpartition(".")[2])
            elif any(isinstance(part, ast.Name) and part.id in own for part in ast.walk(target)):
                found |= {str(name.value) for name in node.args[1:2] if isinstance(name, ast.Constant)}
    return {name for name in found | own if name.startswith("_") and not name.startswith("__")} - {"_exit"}  # os._exit


def test_tests_use_and_patch_no_private_name():
    found = {place(path): private_names(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}
    assert {path: names for path, names in found.items() if names} == {}


def test_private_names_are_found():
    assert private_names("from pipeline.training.loop import _open") == {"_open"}
    assert private_names("from pipeline import lease\nlease._settle()") == {"_settle"}
    assert private_names("from pipeline import lease\nmonkeypatch.setattr(lease, '_settle', 0)") == {"_settle"}
    assert private_names("monkeypatch.setattr('pipeline.lease._settle', 0)") == {"_settle"}
    assert private_names("from pipeline import lease\nmonkeypatch.setattr(lease.os, '_exit', 0)") == set()
    assert private_names("from pipeline import lease\nself._mine = lease.__doc__") == set()


def test_no_two_test_files_have_the_same_name():
    """pytest imports them by this name, so a run of all tests would not find the second one."""
    counts = Counter(path.stem for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in counts.items() if count > 1]


def test_no_job_hides_a_module_of_another_name():
    """`python jobs/NAME.py` puts jobs/ first on the path: a file there must not be named like anything that is
    imported."""
    taken = sys.stdlib_module_names | {"models", "tests"} | set(DOORS)
    found = {path.stem for path in (ROOT / "jobs").glob("*.py")} & taken
    assert found <= {"pipeline"}, found  # jobs/pipeline.py returns the package: tests/unit/test_pipeline_name.py


def test_errors_of_ray_data_become_one_line():
    """Calls that create a dataset of Ray start tasks, which may fail as those that read it do."""
    made, guarded = set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("ray.data.from_"):
                made.add((place(path), node.lineno))
            if isinstance(node, ast.With) and any("errors_of_tasks" in ast.unparse(item) for item in node.items):
                guarded |= {(place(path), line) for line in range(node.lineno, node.end_lineno + 1)}
    assert made
    assert made - guarded == set()
