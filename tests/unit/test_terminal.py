"""Output on a terminal: one line per step at any width, a bar with the loss, and the next commands."""

import dataclasses
import io
import logging
import re
import shlex
import time

import pytest
from rich.console import Console

from pipeline import logs
from pipeline.errors import plural
from pipeline.operations import next_steps
from pipeline.training.recipes import RECIPES

PARTS = ["step 20/200", "loss 2.1230", "185 img/s", "lr 9.50e-04", "grad 1.777", "wait 0.3%", "epoch 0.91", "eta 0:48"]


@pytest.fixture
def terminal(monkeypatch):
    """terminal(width) shows this project's logs on a terminal of that width and returns the output."""

    def show(width):
        text = io.StringIO()
        console = Console(file=text, force_terminal=True, width=width, color_system=None, legacy_windows=False)
        monkeypatch.setattr(logs, "console", console)
        logs.setup()
        return text

    yield show
    monkeypatch.undo()
    logs.setup()


@pytest.mark.parametrize(("width", "last"), [(60, "img/s"), (80, "1.777"), (160, "0:48")])
def test_a_step_is_one_line_at_any_width(terminal, width, last):
    text = terminal(width)
    logging.getLogger("pipeline").info("%s", "  ".join(PARTS), extra={"parts": PARTS})
    (line,) = text.getvalue().splitlines()
    assert "step 20/200  loss 2.1230" in line
    assert line.rstrip().endswith(last)


def test_the_loss_stays_on_a_line_of_forty_columns(terminal):
    text = terminal(40)
    logging.getLogger("pipeline").info("%s", "  ".join(PARTS), extra={"parts": PARTS})
    (line,) = text.getvalue().splitlines()
    assert line.rstrip().endswith("loss 2.1230")


def test_a_bar_of_forty_columns_has_percentage_loss_and_time(terminal):
    text = terminal(40)
    with logs.Progress("pretrain", total=10, lines=False) as progress:
        for loss in (2.3, 1.2, 0.1):
            progress.advance(1, f"loss {loss:.3f}  top-1 50.55%", loss)
            time.sleep(0.3)
    lines = [line for line in re.split(r"[\r\n]", text.getvalue()) if "loss 0.100" in line]
    assert lines
    assert all("30%" in line and re.search(r"[\d-]:[\d-]{2}", line) for line in lines)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_bar_has_percentage_loss_and_on_wide_terminals_its_curve(terminal, width):
    text = terminal(width)
    with logs.Progress("pretrain", total=10, lines=False) as progress:
        for loss in (2.3, 1.2, 0.1):
            progress.advance(1, f"loss {loss:.3f}", loss)
    assert "30%" in text.getvalue()
    assert "loss 0.100" in text.getvalue()
    assert ("█▅▁" in text.getvalue()) is (width >= logs.WIDE)


def test_sparklines():
    assert logs.sparkline([3.0, 2.0, 1.0, float("nan")]) == "█▅▁"
    assert logs.sparkline([1.0, 1.0]) == "▁▁"
    assert logs.sparkline([]) == ""


def test_the_next_commands_name_the_run_and_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "photos data" / split).mkdir(parents=True)
        (tmp_path / "photos data" / split / "manifest.json").write_text("{}")
    base = RECIPES["demo"]()
    runtime = dataclasses.replace(base.runtime, data="photos data/train", output="runs/x/")
    text = next_steps.after_pretraining(dataclasses.replace(base, runtime=runtime))
    transfer = next(line for line in text.replace("\\\n", "").splitlines() if "transfer" in line)
    command = ["python", "jobs/transfer.py", "--checkpoint", "runs/x", "--suite", "frozen", "--data"]
    assert shlex.split(transfer)[1:] == [*command, "photos data"]
    assert "python -m pipeline.tracking ui --tracking-uri sqlite:///" in " ".join(text.replace("\\\n", "").split())


def test_a_server_is_opened_by_its_address_without_the_password():
    words, _ = next_steps.look_at("http://user:secret@mlflow.example.com:5000")
    assert words[0] == "open"
    assert words[1].startswith("http://")
    assert "secret" not in words[1]


def test_prepared_splits_become_data_and_validation():
    text = next_steps.after_preparing({"train": "runs/p/data/train", "val": "runs/p/data/val"})
    shown = " ".join(text.replace("\\\n", "").split())
    assert "--data runs/p/data/train --validation runs/p/data/val --output runs/p/pretrain" in shown


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "class", "1 class"),
        (0, "class", "0 classes"),
        (1, "micro-batch", "1 micro-batch"),
        (2, "micro-batch", "2 micro-batches"),
        (1234, "test image", "1,234 test images"),
        (3, "entry", "3 entries"),
        ("?", "class", "? classes"),
    ],
)
def test_a_number_with_its_noun(number, noun, text):
    assert plural(number, noun) == text
