"""The commands of all pages that need one machine only, word for word, on small data.

`tests/e2e/test_operating.py` runs those of docs/operating.md, and `tests/unit/test_command_lines.py` reads the flags
of every command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.documents import SHELL, code_blocks, pages, script_lines
from tests.images import tinted
from tests.webserver import web_server

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/jobs.md",
    "docs/data.md",
    "docs/pipeline.md",
    "docs/vtab.md",
    "docs/scale.md",
]
# pages whose commands are run, or not, for a reason of the whole page
ELSEWHERE = {
    "docs/clusters.md": "tests/e2e/test_clusters_guide.py runs its jobs on two nodes; the page names what needs an account",
    "docs/operating.md": "tests/e2e/test_operating.py runs it against an S3 server and a cluster",
    "docs/install.md": "makes environments: the page says what was run",
    "CONTRIBUTING.md": "installs, and runs this suite",
    "docs/benchmarks.md": "the recorded run of 83 minutes, and measurements",
    "docs/decontamination.md": "measurements with photographs; tests/unit/test_dedup.py has small ones",
    "docs/index.md": "installs, and runs this suite",
    "infra/README.md": "needs a bucket; docs/operating.md has the same commands",
    "docs/security.md": "a test of this suite",
    "docs/gpu.md": "needs a GPU; tests/unit/test_gpu_benchmark.py runs its small form",
}
# commands that cannot run here, with reasons
REASONS = {
    r"s3://": "needs a bucket",
    r"^ray job submit": "needs a cluster",
    r"^make ": "installs; CI runs `make demo` and `make test`",
    r"sets/vtab": "needs the VTAB tasks, from the published archives",
    r"^source ": "activates an environment",
    r"recipe b16_imagenet": "needs ImageNet",
    r"infra/pipelines/": "needs a bucket",
    r"run sweep.yaml$": "trains for minutes: tests/integration/test_pipeline_survival.py runs such a file",
}
# flags that a command needs here, with reasons in their comments
MORE = {
    r"list\.parquet": "--allow-private-hosts",  # the web server of the test is on this machine
}


def commands(page):
    """[(language, text)] of a page in its order: each line of a shell block, and each python block as a whole."""
    found = []
    for block in code_blocks(ROOT / page):
        if block.language in SHELL:
            found += [("bash", line) for line in script_lines(block)]
        elif block.language == "python":
            found.append(("python", block.text))
    return found


def reason(text):
    """Why a command cannot be run here; None when it can."""
    return next((why for pattern, why in REASONS.items() if re.search(pattern, text)), None)


@pytest.fixture(scope="module")
def server():
    with web_server() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory, server):
    """A folder like the project's, with photos/, images/ with labels.csv, list.parquet of a web server's images, and the
    runs of a short demo."""
    root = tmp_path_factory.mktemp("documents")
    for name in ("jobs", "pipeline", "models"):
        (root / name).symlink_to(ROOT / name)
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    table = ["file,species"]
    for number in range(360):
        name = ("ant", "bee", "cat")[number % 3]
        picture = tinted(generator, 48, 56, number % 3, noise=60, tint=180)
        (root / "photos" / name).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "photos" / name / f"{number:03d}.jpg"), picture)
        if number < 30:
            cv2.imwrite(str(root / "images" / f"{number:03d}.jpg"), picture)
            table.append(f"{number:03d}.jpg,{name}")
    (root / "images" / "labels.csv").write_text("\n".join(table))
    (root / "labels.csv").write_text("\n".join(table))
    addresses = [f"{server.url}/image/{number}.jpg" for number in range(30)] + [f"{server.url}/status/404"]
    pq.write_table(pa.table({"url": addresses}), root / "list.parquet")
    (root / "sweep.yaml").write_text(
        re.search(r"```yaml\n(.*?)```", (ROOT / "docs/pipeline.md").read_text(), re.DOTALL)[1]
    )
    run(root, "bash", "python jobs/prepare.py")
    run(root, "bash", "python jobs/pretrain.py --steps 8steps")
    return root


def run(folder, language, text):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = ["bash", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_every_page_with_commands_is_run_or_says_where():
    every = [str(path.relative_to(ROOT)) for path in pages()]
    assert {page for page in every if commands(page)} == {*PAGES, *ELSEWHERE}


def test_no_reason_is_left_over():
    every = [text for page in PAGES for _, text in commands(page)]
    assert [pattern for pattern in REASONS if not any(re.search(pattern, text) for text in every)] == []


def test_most_commands_can_be_run():
    every = [text for page in PAGES for _, text in commands(page)]
    assert sum(reason(text) is None for text in every) > len(every) / 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_its_order(folder, page):
    written = ""
    for language, text in commands(page):
        if reason(text) is None:
            more = [flags for pattern, flags in MORE.items() if re.search(pattern, text)]
            written += run(folder, language, " ".join([text, *more]))
    if page == "README.md":
        assert re.search(r"pretrain: top1=\d+\.\d+", written)
        assert re.search(r"photos-linear +\d+\.\d+", written)
