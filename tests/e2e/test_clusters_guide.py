"""docs/clusters.md: the jobs of its first run, word by word, on two Ray nodes with token authentication, and the commands that
start Ray on bare machines.

The nodes are on this machine, with ports of their own. Commands of clouds, of Kubernetes and of Slurm are not run: the page
says so."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from ray.scripts.scripts import start

from tests.ports import free_port
from tests.rayhead import ray_head, ray_node

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "clusters.md"
TOKEN = "51ab" * 16


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## )", PAGE.read_text() + "\n## ", re.MULTILINE | re.DOTALL)[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_each_platform_starts_runs_and_ends():
    """Each section refers to the jobs or has its own, and says how to tear everything down."""
    for title in ("AWS", "Google Cloud", "Kubernetes", "Slurm", "Bare machines"):
        text = section(title)
        assert "[the first run](#the-first-run)" in text, title
        before, found, after = text.partition("Tear it down")
        assert found, title
        assert blocks(before, "sh"), title
        assert blocks(after, "sh"), title
    assert "were not executed" in PAGE.read_text()


def test_ray_knows_the_options_that_bare_machines_give_it():
    commands = re.findall(r"ray start (--[^'\n;]*)", section("Bare machines"))
    assert len(commands) == 3  # the head, what it prints, and the others
    for options in commands:
        start.make_context("start", shlex.split(options))
    with pytest.raises(click.UsageError):
        start.make_context("start", ["--haed"])


def jobs_on_cpus() -> list[str]:
    """The commands of the first run that need neither a corpus nor GPUs."""
    (first, _) = blocks(section("The first run"), "bash")
    return [line for line in first.splitlines() if line.startswith("ray job submit")]


def test_the_first_run_has_four_commands_and_three_jobs():
    assert [re.search(r"python jobs/(\w+)\.py", line)[1] for line in jobs_on_cpus()] == [
        "prepare",
        "doctor",
        "pretrain",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_run_on_two_nodes(tmp_path):
    port, dashboard = free_port(), free_port()
    with ray_head(tmp_path, TOKEN, port, dashboard=dashboard) as (address, _, environment):
        environment = environment | {"RAY_API_SERVER_ADDRESS": address, "STORE": str(tmp_path / "shared")}
        environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
        with ray_node(port, environment, "clusters-guide", ["--num-cpus=2"]):
            printed = ""
            for line in jobs_on_cpus():
                done = subprocess.run(
                    ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
                )
                assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
                printed += done.stdout
            listed = subprocess.run(
                ["ray", "job", "list"], env=environment, capture_output=True, text=True, timeout=300
            )
    for line in shown():
        assert line in printed, line
    for name in ("prepare", "doctor", "pretrain"):
        assert f"'job_name': '{name}'" in listed.stdout + listed.stderr


def shown() -> list[str]:
    """Parts of the outputs on the page that are the same on every machine."""
    text = "\n".join(blocks(section("The first run"), "text"))
    return re.findall(r"(?:train|test): prepared=\d+|2 workers of 1 CPU fit now|\[all 2 nodes\]|top-1 \d+\.\d+%", text)
