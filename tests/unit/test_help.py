"""Pages of help: short, narrow, complete on demand; near misses get an answer."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import config, help
from pipeline.errors import UserError
from pipeline.training.recipes import RECIPES

JOBS = Path(__file__).parents[2] / "jobs"


def page(*argv, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(list(argv), RECIPES, "demo", prog="jobs/pretrain.py", description="Pre-train.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= help.WIDTH
    return text


def test_help_shows_the_common_flags_and_help_all_every_one(capsys):
    short, whole = (page(flag, capsys=capsys) for flag in ("--help", "--help-all"))
    flags = [option.flag for option in help.options_of(RECIPES["demo"]())]
    shown = [flag for flag in flags if f"  {flag} " in short]
    assert len(shown) == help.MOST_COMMON
    assert {"--data", "--output", "--steps", "--batch-size", "--model.variant"} <= set(shown)
    assert all(f"  {flag} " in whole or f"  {flag}\n" in whole for flag in flags)
    assert len(short.splitlines()) < 60


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
        (["--recipe", "b16_imagenett"], 'did you mean "b16_imagenet"?'),
    ],
)
def test_near_misses_get_one_line(argv, answer):
    with pytest.raises(UserError) as caught:
        config.parse(argv, RECIPES, "demo", prog="jobs/pretrain.py", description="")
    assert answer in str(caught.value)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("job", ["pretrain", "transfer", "evaluate", "demo"])
def test_help_of_jobs_is_quick(job):
    """The target is half a second on a machine that is not busy; the CPU time is what counts here."""
    command = [sys.executable, str(JOBS / f"{job}.py"), "--help"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=JOBS.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "common:" in done.stdout
    assert time.perf_counter() - start < 20
