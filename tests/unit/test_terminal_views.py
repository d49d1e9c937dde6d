"""Everything that the jobs print fits into 80 columns; only a path or an address may be longer, at the end of its line."""

import ast
import dataclasses
import io
import itertools
import logging
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline import config, lines, logs
from pipeline.operations import comparison, doctor, next_steps, scaling
from pipeline.operations.doctor.finding import CheckResult
from pipeline.operations.planning import preview
from pipeline.operations.planning.config import PlanConfig
from pipeline.operations.planning.estimate import plan
from pipeline.operations.planning.table import plan_table
from pipeline.tracking.leaderboard import Row
from pipeline.training import run
from pipeline.training.recipes import RECIPES
from pipeline.transfer import report
from pipeline.transfer.scores import Score, write_scores
from pipeline.vtab.finish import counts_table
from pipeline.vtab.tasks import TASKS
from tests.datasets import write_tinted
from tests.runs import changed

ROOT = Path(__file__).parents[2]
WIDTHS = (80, 160)


def too_wide(text, width=80):
    """The lines of a text that do not fit. The last word of a line may be a long path or address, after a short label."""
    found = []
    for line in text.splitlines():
        *before, last = line.removesuffix(" \\").split(" ")
        is_address = "/" in last and (len(" ".join(before)) <= lines.LABEL + 16 or not "".join(before))
        if len(line) > width and not is_address:
            found.append(line)
    return found


@pytest.fixture(autouse=True, scope="module")
def terminal():
    """As if a person reads the output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "is_terminal", lambda: True)
        yield


@pytest.fixture
def deep(tmp_path):
    """A folder whose path is longer than a line."""
    folder = tmp_path / "a-long-name-of-a-project" / "with-one-more-folder-of-a-long-name" / "experiments"
    folder.mkdir(parents=True)
    assert len(str(folder)) > 80
    return folder


def test_what_is_too_wide():
    path = "/home/" + "x" * 90
    assert too_wide("word " * 20)
    assert too_wide(f"  look    {path} and more")
    assert too_wide(f"{'a label that is long ' * 4}{path}")
    assert not too_wide(f"  output  {path}")
    assert not too_wide(f"    --data {path} \\")
    assert not too_wide("word " * 20, 160)


WORDS = st.lists(st.text("abc/=é", min_size=1, max_size=100), min_size=1, max_size=30)


@given(words=WORDS, margin=st.integers(0, 20), indent=st.integers(0, 30))
def test_fitted_lines_have_all_words_in_order(words, margin, indent):
    text = lines.fit(" " * margin + " ".join(words), indent)
    assert text.split() == words
    for line in text.splitlines():
        last = line.split()[-1]
        label = line[: -len(last)].rstrip()
        assert len(line) <= 80 or ("/" in last or len(last) + margin + indent > 80)
        assert len(line) <= 80 or len(label) <= lines.LABEL


def test_lines_in_a_pipe_stay_whole(monkeypatch):
    monkeypatch.setattr(lines, "is_terminal", lambda: False)
    assert lines.fit("word " * 40) == "word " * 40


@given(words=WORDS, indent=st.integers(0, 20))
def test_a_command_in_several_lines_is_the_same_command(words, indent):
    command = ["python", "jobs/x.py", *itertools.chain(*((f"--{i}", word) for i, word in enumerate(words)))]
    rows = lines.command(command, indent)
    assert shlex.split("\n".join(rows).replace("\\\n", "")) == command
    assert all(len(row) + indent <= 80 or max(map(len, words)) > 40 for row in rows)


def test_a_table_shortens_its_texts_and_keeps_its_numbers():
    rows = [["task", "note", "mean", "empty"], ["n" * 70, "m" * 30, "92.10", ""], ["short", "", "7.00", "–"]]
    table = lines.table(rows, left=(0, 1))
    assert not too_wide(table)
    assert [line.split()[-1] for line in table.splitlines()] == ["mean", "92.10", "7.00"]
    assert "m" * 27 in table


# ---------------------------------------------------------------- the jobs print only what fits

FITTING = {
    "fit",
    "dumps",
    "to_json",
    "plan_table",
    "scaling_table",
    "results_table",
    "counts_table",
    "to_text",
    "dry_run",
}
"""Functions whose text fits (the tests below), and JSON."""


def printed(path):
    """The first argument of each `print` of a program."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.args[0]


def fits(node):
    if isinstance(node, ast.IfExp):
        return fits(node.body) and fits(node.orelse)
    if isinstance(node, ast.JoinedStr):
        return all(
            fits(part.value)
            for part in node.values
            if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Call)
        )
    if isinstance(node, ast.Call):
        return (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) in FITTING
    return False


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_a_job_prints_fitted_text_or_json(path):
    wrong = [ast.unparse(node) for node in printed(path) if not fits(node)]
    assert not wrong, f"{path.name}: print(fit(...)): {wrong}"


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("argv", [["--help"], ["ui", "--help"], ["upload", "--help"]], ids=" ".join)
def test_the_help_of_the_other_program_fits(argv, columns):
    command = [sys.executable, "-m", "pipeline.tracking", *argv]
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0
    assert done.stdout
    assert not too_wide(done.stdout, columns)


# ---------------------------------------------------------------- plans


def test_the_plan_of_a_run_fits(deep):
    sets = [write_tinted(str(deep / f"train-{count}"), count, 16) for count in (6, 7)]
    base = RECIPES["demo"]()
    for data in (sets[0], f"{sets[0]}=0.7,{sets[1]}=0.3"):
        fields = {"data": data, "validation": sets[1], "output": str(deep / "run"), "steps": "5steps", "batch_size": 4}
        training = changed(base, **fields, lanes=2, min_workers=1, workers=2)
        text = preview.dry_run(training, "demo", config.diff(training, base))
        assert not too_wide(text)
        assert sets[0] in text


@pytest.mark.parametrize("recipe", ["b16_imagenet", "h14_jft300m_14ep"])
def test_a_plan_fits(recipe):
    found = plan(PlanConfig(training=RECIPES[recipe](), gpus=64, images=300e6, corpus_images=3e9, cores=256), recipe)
    found["scaling"] = scaling.simulate(found)
    text = f"{plan_table(found)}\n{scaling.scaling_table(found['scaling'])}"
    assert not too_wide(text)
    assert "corpus" in text
    assert "prepare" in text


def test_a_plan_with_very_large_numbers_fits():
    training = RECIPES["h14_jft300m_14ep"]()
    options = PlanConfig(
        training=training, gpus=256, images=30e9, classes=100_000, corpus_images=100e9, cores=4, price=99.0
    )
    assert not too_wide(plan_table(plan(options, "a_recipe_of_ones_own_with_a_long_name_14ep")))


def test_findings_of_the_doctor_fit(deep):
    remedy = f"make {deep} writable, or give --output; {'and one more sentence about that ' * 3}"
    results = [
        CheckResult(
            check="store", status="error", message=f"{deep} cannot be written", remedy=remedy, where="10.0.0.1"
        ),
        CheckResult(check="GPU driver of the node", status="warning", message="word " * 40, remedy="update it"),
        CheckResult(check="clock", status="ok", message="0.1 s"),
    ]
    text = doctor.results_table(results)
    assert not too_wide(text)
    assert str(deep) in text


# ---------------------------------------------------------------- results


def test_the_summary_of_a_run_and_the_next_commands_fit(deep, monkeypatch):
    monkeypatch.chdir(deep)
    for split in ("train", "test"):
        write_tinted(str(deep / "sets" / split), 3, 8)
    base = RECIPES["demo"]()
    training = changed(base, data=str(deep / "sets" / "train"), output=str(deep / "run"))
    numbers = dict.fromkeys(("steps", "images", "seconds", "skipped", "replaced"), 123456789)
    waits = {"checkpoint_wait_seconds": 1.0, "checkpoint_wait_share": 0.1}
    result = {
        **numbers,
        **waits,
        "missing": [],
        "unsaved": [*range(40)],
        "checkpoint": str(deep / "checkpoints/step-1"),
    }
    texts = [
        lines.fit(run.summarize(result)),
        next_steps.after_pretraining(training),
        next_steps.after_preparing({"train": str(deep / "data" / "train"), "val": str(deep / "data" / "val")}),
        next_steps.after_transfer("demo", f"sqlite:///{deep}/mlflow.db"),
        next_steps.after_transfer("vtab1k", "http://127.0.0.1:5000"),
    ]
    for text in texts:
        assert not too_wide(text)
    for text in texts[1:]:
        for command in re.findall(r"(?:python|make) (?:\\\n|[^\n(])*", text):
            assert "\\" not in shlex.join(shlex.split(command.replace("\\\n", "")))
    assert f"--data {deep / 'sets'}" in texts[1]


def test_the_results_of_a_pipeline_fit():
    scores = [f"{task}={12.34:.2f}" for task in TASKS]
    found = lines.with_prefix("a-pipeline: transfer", scores)
    assert not too_wide("\n".join(found))
    assert [word for line in found for word in line.split()[2:]] == scores
    assert all(line.startswith("a-pipeline: transfer ") for line in found)


def test_tables_of_scores_fit(deep):
    nothing = {field.name: None for field in dataclasses.fields(Row)}
    groups = {"natural": 71.2, "specialized": 83.4, "structured": 55.1}
    row = {"suite": "vtab1k", "name": "a run with a long name · data · 1234", "variant": "R50+B/16", "mean": 71.43}
    row |= {"images_seen": 4.2e9, "train_flops": 4.26e21, "gpu_hours": 12345.6, "transfer_run": "x", "checkpoint": "c"}
    made = Row(**{**nothing, **row, "groups": groups, "tasks": {"pets": 1.0}, "config": {}, "datasets": {}})
    plain = dataclasses.replace(made, suite="demo", groups={}, train_flops=3.6e12)
    text = comparison.to_text([made, dataclasses.replace(made, mean=100.0), plain])
    assert not too_wide(text)
    assert "special." in text
    assert "4,260" in text
    counts = {"images": 1_000_000, "official": 1_000_000, "rejects": 100, "miniature": True}
    assert not too_wide(counts_table({task: {"train800val200": counts} for task in TASKS}))
    places = [str(deep / name) for name in ("a", "b")]
    for place in places:
        values = {"values": (12.345, 99.9), "images": 100, "group": ""}
        write_scores(place, {"checkpoint": place}, [Score(name=t, task=t, test=t, **values) for t in TASKS], {})
    compared, _ = report.compare_runs(*places)
    assert not too_wide(lines.fit(compared))
    assert not too_wide("\n".join(line for line in compared.splitlines() if line.startswith(tuple(TASKS))))


# ---------------------------------------------------------------- progress, on a terminal


@pytest.mark.parametrize("width", WIDTHS)
def test_progress_and_log_lines_fit(width, deep, monkeypatch):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(logs, "console", console)
    logs.setup()
    try:
        with logs.Progress("prepare", total=10) as progress:
            for _ in range(3):
                progress.advance(
                    1, "1,234,567,890 inputs, 123,456/s, 1,234,567 rejects, and more to say about them", 0.5
                )
        logging.getLogger("pipeline").info("transfer: %s -> %s", deep / "run", deep / "transfer")
    finally:
        monkeypatch.undo()
        logs.setup()
    shown = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()))
    assert any("30%" in line for line in shown)
    assert all(len(line) <= width for line in shown)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_on_a_terminal_fits(deep):
    """jobs/prepare.py, with its log, its bar and its summary; at 160 columns it finds the finished dataset."""
    for i in range(12):
        write_image(deep / "images" / "abc"[i % 3] / f"{i}.png")
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "--source", str(deep / "images"), "--size", "16"]
    command += ["--output", str(deep / "out"), "--splits", "train=0.5", "test=0.5", "--num-cpus", "1", "--no-tracking"]
    for width in WIDTHS:
        text = on_terminal(command, width)
        assert "prepared=" in text
        assert "next:" in text
        assert not too_wide(text, width)


def write_image(path):
    from tests.images import jpeg

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg())


def on_terminal(command, width):
    """What a command shows on a terminal of that width, as plain text."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    parts, deadline = [], time.monotonic() + 1000
    while time.monotonic() < deadline:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the last writer has closed the terminal
            break
        parts.append(part)
        if not part:
            break
    text = re.sub(r"\r+", "\n", re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", b"".join(parts)).decode())
    assert process.wait(60) == 0, text
    return text
