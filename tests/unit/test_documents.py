"""README and docs/: links are valid, generated pages are complete, the Python examples and the notebook run."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from models import create_model
from pipeline.data.format import write_dataset
from pipeline.training.recipes import RECIPES
from pipeline.weights import save_checkpoint_weights
from tests.benchmarks import table

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "infra" / "README.md"]
LINK = re.compile(r"\[[^\]]+\]\((?!https?://)([^)#\s]*)(#[^)]*)?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of headings, as GitHub creates them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_valid(page):
    for target, anchor in LINK.findall(page.read_text()):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}{anchor}"


def functions(module: Path) -> set[str]:
    return {item.name for item in ast.parse(module.read_text()).body if isinstance(item, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_a_page_names_exist(page):
    module = None
    for file, name in re.findall(r"`((?:[\w/]+/)?test_\w+\.py)?(?:::(test_\w+))?`", page.read_text()):
        if file:
            module = next((path for path in ROOT.glob("tests/**/test_*.py") if str(path).endswith(f"/{file}")), None)
            assert module, f"{page.name} names {file}"
        assert not name or name in functions(module), f"{page.name} names {name}"


def test_every_fault_of_the_guide_names_its_test():
    table = (ROOT / "docs" / "operating.md").read_text().partition("\n## Faults\n")[2]
    rows = re.findall(r"^\| (.+) \|$", table, re.MULTILINE)[2:]
    assert len(rows) > 30
    assert [row for row in rows if not re.search(r"\| `(unit|integration|e2e)/test_\w+\.py(::test_\w+)?`", row)] == []


def test_the_site_builds_without_a_dead_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / page.with_suffix(".html").name).exists()
    assert "--engine.zero" in (tmp_path / "jobs.html").read_text()
    assert "A freshly initialised model" in (tmp_path / "api.html").read_text()
    notebook = (tmp_path / "notebook.html").read_text()
    assert "attention_rollout" in notebook
    assert notebook.count('<img alt="figure"') == 2
    assert 'href="notebook.html"' in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("name", table.TABLES)
def test_a_table_of_benchmarks_is_that_of_the_results(name):
    assert table.TABLES[name]() in (ROOT / "docs" / "benchmarks.md").read_text(), (
        "run python tests/benchmarks/table.py --write docs/benchmarks.md"
    )


@pytest.mark.parametrize("name", ["demo", "s16_imagenet_90ep", "b32_imagenet", "l16_imagenet"])
def test_the_page_of_recipes_is_that_of_today(name):
    """Four of the rows, as all would take minutes: each limit occurs."""
    row = runpy.run_path(str(ROOT / "docs" / "recipes.py"))["row"]
    assert row(name) in (ROOT / "docs" / "recipes.md").read_text(), "run python docs/recipes.py"


def test_the_page_of_recipes_has_every_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert all(f"| `{name}` |" in text for name in RECIPES)


@pytest.fixture
def digits(tmp_path):
    """(folder with train and test of 80 images of 32 pixels and ten classes each, checkpoint of a small model)"""
    picture = cv2.imencode(".jpg", np.full((32, 32, 3), 100, np.uint8))[1].tobytes()
    classes = [str(i) for i in range(10)]
    for split in ("train", "test"):
        rows = [(f"{i:03d}.jpg", picture, i % 10, 32, 32) for i in range(80)]
        write_dataset(str(tmp_path / "data" / split), rows, classes=classes)
    model = create_model("Ti/8", num_classes=10, image_size=32, depth=1, pool="gap")
    save_checkpoint_weights(model, {"classes": classes}, str(tmp_path / "checkpoint"))
    return tmp_path / "data", tmp_path / "checkpoint"


def test_the_python_example_runs(digits):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert "runs/demo/data/train" in code
    names = {}
    exec(code.replace("runs/demo/data", str(digits[0])), names)
    assert names["batch"]["image"].shape == (64, 32, 32, 3)
    assert names["batch"]["label"].shape == (64,)
    assert names["logits"].shape == (64, 10)


def test_the_notebook_runs(digits, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert json.dumps(notebook).count("image/png") == 2  # the site and GitHub show the figures of the demo
    assert str(ROOT) not in json.dumps(notebook)
    assert cells[0] == 'DATA = "runs/demo/data"\nCHECKPOINT = "runs/demo/pretrain"'
    names = {"DATA": str(digits[0]), "CHECKPOINT": str(digits[1])}
    for cell in cells[1:]:
        exec(cell, names)
    assert names["probabilities"].shape == (16, 10)
    assert names["shares"].shape == (8, 4, 4)
