"""Scripts of Slurm and SkyPilot: their commands name options and variables that exist, and the documents give what they need."""

import ast
import importlib.util
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml
from ray.scripts.scripts import start

from tests.documents import code_blocks

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
CLUSTERS = ROOT / "docs" / "clusters.md"
SLURM = (INFRA / "slurm" / "pretrain.sbatch").read_text()
SKYPILOT = INFRA / "skypilot" / "pretrain.yaml"
TASK = yaml.safe_load(SKYPILOT.read_text())


@pytest.mark.parametrize("script", [SLURM, TASK["run"]], ids=["Slurm", "SkyPilot"])
def test_scripts_are_shell(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "set -euo pipefail" in script
    assert "RAY_AUTH_MODE=token" in script
    assert "--dashboard-host 127.0.0.1" in script
    assert not re.search(r"^[^#]*\bray (stop|symmetric-run)", script, re.MULTILINE)  # they end the Ray of others


@pytest.mark.parametrize("script", [SLURM, TASK["run"]], ids=["Slurm", "SkyPilot"])
def test_ray_knows_the_options_of_its_nodes(script):
    (options,) = re.findall(r'infra/ray_node\.py "\$RAY_ADDRESS"([^&]*)&', script.replace("\\\n", " "))
    words = shlex.split(re.sub(r"\$\w+", "8", options))
    for role in (["--head", "--node-ip-address=10.0.0.1", "--port=6379"], ["--address=10.0.0.1:6379"]):
        start.make_context("start", [*role, "--block", *words])
    with pytest.raises(click.UsageError):
        start.make_context("start", ["--head", "--num-gpu", "8"])


def test_slurm_signals_the_script_alone_and_in_time():
    """The signal is earlier than --stop-grace and the seconds in which MLflow gets the reason."""
    from pipeline.cluster import STOP_RECORDS

    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM, re.MULTILINE))
    signal, _, seconds = options["signal"].partition("@")
    assert signal == "B:TERM"
    assert int(seconds) > int(re.search(r"--stop-grace (\d+)", SLURM)[1]) + STOP_RECORDS
    for path in (CLUSTERS, INFRA / "slurm" / "pretrain.sbatch"):
        for command in re.findall(r"scancel .*--signal TERM", path.read_text()):
            assert "--batch" in command, "without --batch, Slurm signals the steps and not the script"


def launch_commands():
    """{where: words of `sky jobs launch`}"""
    header = "\n".join(line.lstrip("# ") for line in SKYPILOT.read_text().splitlines() if line.startswith("#"))
    texts = {SKYPILOT: header, CLUSTERS: "\n".join(block.text for block in code_blocks(CLUSTERS))}
    for path, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("sky jobs launch"):
                yield path.name, shlex.split(line)


@pytest.mark.parametrize(("where", "words"), list(launch_commands()), ids=lambda value: str(value)[:20])
def test_skypilot_gets_every_secret_and_known_variables(where, words):
    """SkyPilot does not launch a task whose secret or variable is null."""
    given = {"env": [], "secret": []}
    for flag, value in itertools.pairwise(words):
        if flag in ("--env", "--secret"):
            given[flag[2:]].append(value.partition("=")[0])
    required = {name for kind in ("envs", "secrets") for name, value in TASK[kind].items() if value is None}
    assert required <= {*given["env"], *given["secret"]}
    assert {*given["env"]} <= TASK["envs"].keys()
    assert {*given["secret"]} <= TASK["secrets"].keys()
    placeholders = {name for name, value in TASK["envs"].items() if "example.com" in str(value)}
    assert placeholders <= {*given["env"]}


def test_launch_commands_are_in_both_places():
    assert [where for where, _ in launch_commands()] == ["pretrain.yaml", "clusters.md"]


PLACEHOLDER = re.compile(
    r"\b(?:[\w-]+\.)+(?:example\.com|internal)\b|\b203\.0\.113\.\d+\b|\b123456789012\b|\bmy-project\b"
)
OF_THE_CLOUDS = {"metadata.google.internal"}


def test_the_page_lists_every_placeholder():
    listed = re.search(r"Replace\s+these placeholders(.*?)After your\s+changes", CLUSTERS.read_text(), re.DOTALL)[1]
    used = set()
    for path in [CLUSTERS, *(p for p in INFRA.rglob("*") if p.is_file() and "__pycache__" not in p.parts)]:
        used |= set(PLACEHOLDER.findall(path.read_text())) - OF_THE_CLOUDS
    assert {name for name in used if name not in listed} == set()
    places = [CLUSTERS.read_text().replace(listed, ""), *(path.read_text() for path in INFRA.rglob("*.yaml"))]
    for name in re.findall(r"`([^`]+)`", listed):
        assert any(name in text for text in places), name


def test_ray_node_reports_wrong_arguments(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("ray_node", INFRA / "ray_node.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for argv, code in ((["ray_node.py"], 2), (["ray_node.py", "10.0.0.1"], 2), (["ray_node.py", "--help"], 0)):
        monkeypatch.setattr("sys.argv", argv)
        assert module.main() == code
    assert "infra/ray_node.py" in capsys.readouterr().out


def test_nodes_have_the_labels_and_taints_that_pods_expect():
    """Commands of the page give both, and pods tolerate each taint."""
    page = CLUSTERS.read_text()
    (cluster,) = [d for d in yaml.safe_load_all((INFRA / "kuberay" / "cluster.yaml").read_text()) if d]
    tolerated = set()
    for group in cluster["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        for name, value in pod["nodeSelector"].items():
            assert f"--node-labels {name}={value}" in page
            assert f"{name}={value}`" in page  # kubectl label
        tolerated |= {toleration["key"] for toleration in pod["tolerations"]}
    tainted = re.findall(r"--node-taints ([\w./-]+)=|kubectl taint node NODE\s+([\w./-]+)=", page)
    assert {name for names in tainted for name in names if name} == tolerated


@pytest.mark.parametrize("path", sorted(p for p in INFRA.rglob("*.py") if "ArgumentParser" in p.read_text()), ids=str)
def test_help_shows_commands_that_the_script_reads(path):
    """Each command is one line, and each of its flags exists."""
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text)) or ""
    name = str(path.relative_to(ROOT))
    commands = re.findall(rf"^    python {re.escape(name)}( .*)?$", docstring, re.MULTILINE)
    assert commands
    assert len(commands) == docstring.count(f"python {name}"), "a command that does not begin its line"
    for command in commands:
        words = re.split(r"\s{3,}|\s#", command)[0]
        for flag in re.findall(r"--[\w-]+", words):
            assert f'"{flag}"' in text, flag


def table():
    """The rows of "What executed or validated each file": (files and folders, test files)"""
    text = (
        (INFRA / "README.md").read_text().partition("## What executed or validated each file")[2].partition("\n## ")[0]
    )
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| file", "| ---")):
            what, how = line.split(" | ")[:2]
            named = list(re.findall(r"`([^`]+)`", what.removeprefix("| ")))
            tests = re.findall(r"`((?:unit|integration|e2e)/[\w.]+\.py)`", how)
            yield named, tests


def test_the_table_names_every_file_and_tests_that_exist():
    rows = list(table())
    assert len(rows) > 20
    named = [name for names, _ in rows for name in names]
    for name in named:
        assert (INFRA / name).exists(), name
    for path in INFRA.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md":
            name = str(path.relative_to(INFRA))
            assert any(name == one or (one.endswith("/") and name.startswith(one)) for one in named), name
    for names, tests in rows:
        assert tests, f"no test for {names}"
        text = "".join((ROOT / "tests" / test).read_text() for test in tests)
        for name in names:
            assert mentioned(name, text), f"{tests} do not mention {name}"


def mentioned(name, text):
    """Whether a test names a file, or reads it with others of its folder or suffix."""
    path = Path(name)
    globs = (
        f'"{path.parent.name}/*{path.suffix}"',
        f'/ "{path.parent.name}").glob(',
        f'glob("{path.name.split(".")[0]}*")',
    )
    return path.name in text or f'"{path.stem}"' in text or any(glob in text for glob in globs)
