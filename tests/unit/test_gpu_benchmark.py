"""Runs every section of tests/benchmarks/gpu.py at a small size on a CPU, without Ray and MLflow."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The command must run on a machine where these packages cannot be imported.
WITHOUT = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "mlflow", "tyro", "s3fs", "rich", "botocore", "aiobotocore", "google_crc32c"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(output: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT, str(ROOT / "tests/benchmarks/gpu.py"), "--device", "cpu", "--tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(20000 + os.getpid() % 9000)}
    return subprocess.run(
        [*command, "--output", str(output), *flags], env=environment, capture_output=True, text=True, timeout=900
    )


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_every_section_runs_without_the_libraries_of_a_cluster(tmp_path):
    done = run(tmp_path, "--here", "--budget", "800")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "failed: none; no time for: none" in done.stdout
    found = rows(tmp_path)
    assert {row["section"] for row in found} >= {"facts", "correct", "step_L", "waits", "restore", "finetuning"}
    assert [row for row in found if "error" in row or row.get("ok") is False] == []
    assert all(row["found"] == {} for row in found if row["section"] == "waits")


def test_failing_or_hanging_sections_do_not_affect_others(tmp_path):
    done = run(tmp_path, "--only", "fails", "hangs", "facts", "--budget", "800")
    assert done.returncode == 1
    assert "RuntimeError: this section fails whenever it is asked for" in done.stdout
    assert "hangs: stopped after 10 s" in done.stdout
    assert "facts: ok" in done.stdout
    assert "failed: fails, hangs; no time for: none" in done.stdout


def test_sections_without_time_are_listed(tmp_path):
    began = time.monotonic()
    done = run(tmp_path, "--only", "facts", "--budget", "1")
    assert time.monotonic() - began < 60
    assert done.returncode == 0
    assert "failed: none; no time for: facts" in done.stdout
