"""Help pages: short, narrow, complete on request; misspelled flags get a suggestion."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config, help
from pipeline.errors import UserError
from pipeline.training.recipes import RECIPES

JOBS = Path(__file__).parents[2] / "jobs"
PAGES = [
    *(pytest.param(path.stem, [], id=path.stem) for path in sorted(JOBS.glob("*.py"))),
    *(pytest.param("prepare", [name], id=f"prepare {name}") for name in ("vtab", "verify", "describe", "delete")),
]


def page(*argv, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(list(argv), RECIPES, "demo", prog="jobs/pretrain.py", description="Pre-train.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= help.WIDTH
    return text


def help_of(job, argv):
    """(docstring, output of the job's main() before it exits with code 0)"""
    spec = importlib.util.spec_from_file_location(f"help_{job}", JOBS / f"{job}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stop:
        module.main(argv)
    assert stop.value.code == 0
    return module.__doc__, text.getvalue()


@pytest.mark.parametrize(("job", "subcommand"), PAGES)
def test_every_job_has_a_page_of_ten_flags_that_all_say_what_they_do(job, subcommand, monkeypatch):
    doc, short = help_of(job, [*subcommand, "--help"])
    monkeypatch.setenv("COLUMNS", "160")  # of a wide terminal: long lines are hard to read
    _, whole = help_of(job, [*subcommand, "--help-all"])
    for text in (short, whole):
        assert max(map(len, text.splitlines())) <= help.WIDTH
    lines = whole.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("  --"):  # its text follows on the line or below
            text = line[26:].strip() if len(line) > 26 and line[25] == " " else lines[i + 1].strip()
            assert text[:1].isalnum(), line
            assert not text.startswith("(default"), line
    assert sum(line.startswith("  --") for line in short.partition("defaults:")[0].splitlines()) <= help.SHORT
    if not subcommand:  # examples are printed as they are written
        examples = [line for line in doc.splitlines() if line.startswith("    ")]
        assert all(line in short for line in examples)


def test_help_shows_the_common_flags_and_help_all_every_one(capsys):
    short, whole = (page(flag, capsys=capsys) for flag in ("--help", "--help-all"))
    flags = [option.flag for option in help.options_of(RECIPES["demo"]())]
    shown = [flag for flag in flags if f"  {flag} " in short]
    assert len(shown) == help.MOST_COMMON
    assert {"--data", "--output", "--steps", "--batch-size", "--model.variant"} <= set(shown)
    assert all(f"  {flag} " in whole or f"  {flag}\n" in whole for flag in flags)
    assert len(short.splitlines()) < 60


@pytest.mark.parametrize("job", ["doctor", "evaluate", "plan", "prepare", "pretrain", "transfer"])
@pytest.mark.parametrize("columns", ["80", "160"])
def test_lists_of_recipes_fit(job, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    _, text = help_of(job, ["--list-recipes"])
    assert text.startswith("recipes (--recipe NAME; default ")
    assert max(map(len, text.splitlines())) <= help.WIDTH


def test_recipes_are_listed_by_family(capsys):
    text = page("--list-recipes", capsys=capsys)
    assert all(f"  {name} " in text or f"  {name}\n" in text for name in RECIPES)
    assert "\nimagenet21k:" in text


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["--epochs", "5"], "did you mean --steps 5epochs?"),
        (["--epochs=5"], "did you mean --steps 5epochs?"),
        (["--lr", "0.1"], "did you mean --optimizer.lr 0.1?"),
        (["--batch-sise", "8"], "did you mean --batch-size?"),
        (["--variant", "B/16"], "did you mean --model.variant?"),
        (["--model", "B/16"], "did you mean --model.variant B/16?"),
        (["--model", "vit_tiny_patch16_224"], "did you mean --model.variant Ti/16?"),
        (["--config", "none.yaml"], "--config none.yaml: no such file"),
        (["--epoch", "5"], "did you mean --steps 5epochs?"),
        (["--wdecay", "0.1"], "did you mean --optimizer.weight-decay 0.1?"),
        (["--num-workers", "8"], "did you mean --threads 8?"),
        (["--ckpt", "a"], "did you mean --init-from a?"),
        (["--recipe", "ViT-B/16"], "did you mean b16_jft300m_7ep or b16_imagenet21k_90ep or b16_imagenet?"),
        (["--recipe", "vit_large_patch16_224"], "did you mean l16_jft300m_7ep or "),
        (["--recipe", "b16-augreg"], 'did you mean "b16_augreg"?'),
        (["--recipe", "b16_imagenett"], 'did you mean "b16_imagenet"?'),
    ],
)
def test_near_misses_get_one_line(argv, answer):
    with pytest.raises(UserError) as caught:
        config.parse(argv, RECIPES, "demo", prog="jobs/pretrain.py", description="")
    assert answer in str(caught.value)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--no-register"], "runtime.register", None),
        (["--no-validation"], "runtime.validation", None),
        (["--optimizer.no-clip"], "optimizer.clip", None),
        (["--no_register", "--steps", "5"], "runtime.register", None),
        (["--register", "None"], "runtime.register", None),
        (["--name=--no-register"], "runtime.register", "auto"),
        (["--no-gpus"], "runtime.gpus", False),
    ],
)
def test_no_before_a_name_sets_nothing_or_false(flags, name, value):
    found = config.parse(flags, RECIPES, "demo", prog="jobs/pretrain.py", description="")
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    plain: bool = False
    """A switch."""
    maybe: bool | None = None
    """A switch with three states."""
    name: str = ""
    """A text."""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--maybe"], (False, True, "")),
        (["--maybe", "--plain"], (True, True, "")),
        (["--maybe", "yes", "--plain", "no"], (False, True, "")),
        (["--maybe", "No"], (False, False, "")),
        (["--maybe", "False"], (False, False, "")),
        (["--no-maybe"], (False, False, "")),
        (["--maybe", "None"], (False, None, "")),
        (["--plain", "true", "--name", "--plain"], None),
        (["--plain", "1", "--name", "yes"], (True, None, "yes")),
        (["--no-plain"], (False, None, "")),
        (["--maybe=no", "--plain=yes"], (True, False, "")),
        (["--plain=perhaps"], None),
    ],
)
def test_switches_take_a_word_or_none(flags, expected):
    def read():
        return config.parse(flags, {"it": Switches}, "it", prog="x", description="")

    if expected is None:
        with pytest.raises(UserError):
            read()
    else:
        assert read() == Switches(plain=expected[0], maybe=expected[1], name=expected[2])


def test_the_help_shows_switches_without_a_value(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"], {"it": Switches}, "it", prog="x", description="")
    text = capsys.readouterr().out
    assert "--maybe " in text
    assert "yes|no" not in text


def test_the_help_says_how_to_give_no_value(capsys):
    text = " ".join(page("--help-all", capsys=capsys).split())
    assert "(default: auto; --no-register for None)" in text
    assert "--optimizer.no-clip for None)" in text


@pytest.mark.parametrize(
    ("job", "argv", "answer"),
    [
        ("plan", ["--gpus", "eight"], "--gpus: 'eight' is not a whole number; "),
        ("pretrain", ["--optimizer.lr", "big"], "--optimizer.lr: 'big' is not a number; "),
        ("pretrain", ["--engine.precision", "fp8"], "invalid choice 'fp8' for argument '--engine.precision'. "),
        ("pretrain", ["--steps"], "Missing value for argument '--steps'. "),
        ("pretrain", ["demo"], "Unrecognized options: demo; "),
        ("pretrain", ["--recipe"], "argument --recipe: expected one argument; "),
        ("prepare", ["describe"], "Missing from jobs/prepare.py describe: "),
        ("pipeline", ["run", "a.yaml", "--parallel", "two"], "argument --parallel: invalid int value: 'two'; "),
    ],
)
def test_a_wrong_value_gets_one_line(job, argv, answer):
    done = subprocess.run([sys.executable, JOBS / f"{job}.py", *argv], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {answer}")
    assert done.stderr.count("\n") == 1


SLOW_TO_IMPORT = {
    *(
        "PIL",
        "botocore",
        "cv2",
        "deepspeed",
        "fsspec",
        "matplotlib",
        "mlflow",
        "numpy",
        "pandas",
        "pyarrow",
        "pydantic",
    ),
    *("ray", "s3fs", "safetensors", "scipy", "sklearn", "sqlalchemy", "timm", "torch", "torchvision", "transformers"),
}
# Prints the page, then the names of all imported modules.
PRINT_MODULES = """
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("modules:", *sys.modules)
"""


@pytest.mark.parametrize(("job", "subcommand"), PAGES)
def test_help_of_a_job_imports_no_library_that_is_slow_to_import(job, subcommand):
    code = f"import sys; sys.argv[0] = {str(JOBS / f'{job}.py')!r}" + PRINT_MODULES
    command = [sys.executable, "-c", code, *subcommand, "--help"]
    environment = {**os.environ, "PYTHONPATH": str(JOBS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    page, _, modules = done.stdout.partition("modules:")
    assert "flags:" in page
    assert not SLOW_TO_IMPORT & {name.partition(".")[0] for name in modules.split()}
