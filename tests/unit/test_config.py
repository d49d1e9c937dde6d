"""Command lines, config files and horizons."""

import dataclasses
import errno
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from pipeline import cluster, config, ray_watch
from pipeline.errors import Unavailable, UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["linear", "cosine"] = "linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    data: str = "here"
    names: tuple[str, ...] = ()
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)
    dry_run: bool = False


RECIPES = {"small": lambda: Outer(), "large": lambda: Outer(limit=10, inner=Inner(lr=0.5))}


def parse(*argv):
    return config.parse(list(argv), RECIPES, "small", prog="job", description="A job.")


def test_flags_override_the_recipe():
    assert parse() == Outer()
    chosen = parse("--recipe", "large", "--inner.betas", "0.8", "0.9", "--dry-run")
    assert chosen == Outer(limit=10, inner=Inner(lr=0.5, betas=(0.8, 0.9)), dry_run=True)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UserError, match='did you mean "large"'):
        parse("--recipe", "lagre")
    with pytest.raises(UserError, match=r"unknown flag --inner.lrr \(did you mean --inner.lr\?\)"):
        parse("--inner.lrr", "3")
    with pytest.raises(UserError, match=r"did you mean --inner.betas\?"):
        parse("--betas", "0.8", "0.9")


def test_yaml_round_trip_and_file(tmp_path):
    written = Outer(names=("a", "b"), limit=3, inner=Inner(lr=1e-5, kind="cosine"))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(written))
    assert config.from_yaml(Outer, path.read_text()) == written
    assert parse("--config", str(path), "--limit", "4") == dataclasses.replace(written, limit=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: {lrr: 1}", 'unknown key "lrr" .did you mean "lr"'),
        ("inner: {kind: cosin}", 'did you mean "cosine"'),
        ("limit: many", "expected int"),
        ("inner: {betas: [1]}", "expected 2 values"),
        ("data: 3", "expected str"),
        ("a: [", "not valid YAML"),
        ("- a", "expected a mapping"),
    ],
)
def test_bad_yaml_names_the_key(text, message):
    with pytest.raises(UserError, match=message):
        config.from_yaml(Outer, text)


def test_diff_and_fingerprint():
    changed = Outer(inner=Inner(lr=2.0))
    assert config.diff(changed, Outer()) == {"inner.lr": (1e-3, 2.0)}
    assert config.fingerprint(changed) != config.fingerprint(Outer()) == config.fingerprint(Outer())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100", 100),
        ("100steps", 100),
        ("3epochs", 30),
        ("1 epoch", 10),
        ("5e3examples", 50),
        ("10%", 20),
        ("0.5epochs", 5),
    ],
)
def test_horizons(text, expected):
    assert config.steps(text, batch_size=100, examples_per_epoch=1000, total_steps=200) == expected


@pytest.mark.parametrize("text", ["fast", "10 parsecs", "-5", "", "1.2.3", ".", "1e400steps", "1e400%"])
def test_unreadable_horizons(text):
    with pytest.raises(UserError, match="length"):
        config.steps(text, batch_size=100)


def test_horizons_that_need_what_is_not_known():
    with pytest.raises(UserError, match="size of the data set"):
        config.steps("3epochs", batch_size=100)
    with pytest.raises(UserError, match="relative to the length of the run"):
        config.steps("10%", batch_size=100)


def test_exit_codes(capsys, monkeypatch):
    monkeypatch.setattr(ray_watch, "enable", lambda: None)
    monkeypatch.setattr(cluster, "disconnect", lambda: None)  # Ray may be running in this process

    def bad(argv):
        raise UserError("no such bucket")

    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(argv):
        raise OSError(errno.EIO, "Input/output error")

    def away(argv):
        raise Unavailable("s3://bucket/x: no answer")

    def read_only(argv):
        raise OSError(errno.EROFS, "Read-only file system", "/mnt/x")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="Input/output"):
        config.run_job(broken)
    for main, code in {bad: 2, full: 1, away: 75, read_only: 1, lambda argv: None: 0, lambda argv: 1: 1}.items():
        with pytest.raises(SystemExit) as stop:
            config.run_job(main)
        assert stop.value.code == code
    signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr().err
    assert "error: no such bucket" in printed
    assert "error: [Errno 28] No space left on device: free some space; repeat the command to continue" in printed


IGNORED = """class Thing:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)
    Thing()
    time.sleep(60)"""
IN_RAY = """import ray
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    stops.handle_signals()  # as `cluster.connect` does, because Ray replaces the handler
    threading.Timer(1, signal.raise_signal, [signal.SIGTERM]).start()
    ray.get(ray.remote(lambda: time.sleep(60)).remote())"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("raise KeyboardInterrupt", 130),
        ("signal.raise_signal(signal.SIGTERM)", 143),
        (IGNORED, 143),
        (IN_RAY, 143),
    ],
    ids=["ctrl-c", "sigterm", "in a destructor", "while Ray waits"],
)
def test_a_job_that_is_stopped_says_how_to_continue(end, code):
    job = "import signal, threading, time\nfrom pipeline import stops\nfrom pipeline.config import run_job\n"
    job += f"def main(argv):\n    {end}\nrun_job(main)"
    done = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert "stopped; repeat the command to continue" in done.stderr


def test_a_closed_output_pipe_is_not_an_error():
    job = "from pipeline.config import run_job\ndef main(argv):\n    print('line\\n' * 100_000)\nrun_job(main)"
    command = f'{shlex.quote(sys.executable)} -c {shlex.quote(job)} | head -n 1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("line\n141\n", "")
