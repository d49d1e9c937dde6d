"""Every command of every page and docstring: parsed by the program that it starts, or listed with what it needs.

Slow tests run those that one machine can run: tests/e2e/test_document_commands.py says which and why others not."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from pipeline.errors import UserError
from tests.commandlines import parse_job, parse_script
from tests.documents import (
    ROOT,
    SHELL,
    code_blocks,
    commands_in_docstring,
    commands_in_text,
    pages,
    simple_commands,
)

LANGUAGES = {*SHELL, "python", "yaml", "ini", "text"}
BUILTINS = {"source", "export", "cd", "umask", "ulimit", "mkdir"}
# Programs whose commands no test reads unless the program is installed, and what their commands need
NEED = {
    "aws": "an account",
    "gcloud": "an account",
    "docker": "a container engine and a registry",
    "helm": "a Kubernetes cluster",
    "kubectl": "a Kubernetes cluster",
    "prometheus": "a cluster with metrics; tests/integration/test_monitoring.py reads its files",
    "promtool": "Prometheus; tests/integration/test_monitoring.py runs it",
    "sky": "SkyPilot and an account; tests/unit/test_infra_launchers.py checks the task and its variables",
    "ssh": "a second machine",
    "scp": "a second machine",
    "sbatch": "Slurm; tests/integration/test_slurm.py submits the script",
    "scancel": "Slurm",
    "squeue": "Slurm",
    "srun": "Slurm",
    "sed": "nothing: it writes a file for a command that needs an account",
    "grep": "the command before it",
    "base64": "the command before it",
    "jq": "the command before it",
    "uv": "uv; `pip` reads its packages",
}
# What stands for the reader's own values
VALUES = {
    "$split": "train",
    "$STORE": "s3://bucket/vit",
    "NAME": "b16_imagenet",
    "FILE.yaml": "sweep.yaml",
    "[STAGE]": "pretrain",
    "[RUNS]": "1000",
    "file://trust-mlflow.json": "file://infra/iam/trust-eks.json",  # `sed` makes one from the other
}


def every_command():
    """[(where, words)] of all pages and docstrings."""
    found = []
    sources = [*ROOT.glob("jobs/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("infra/**/*.py")]
    sources += [*ROOT.glob("tests/benchmarks/*.py"), ROOT / "pipeline" / "tracking" / "__main__.py"]
    blocks = [block for path in pages() for block in [*code_blocks(path), *commands_in_text(path)]]
    blocks += [block for path in sorted(sources) for block in commands_in_docstring(path)]
    for block in blocks:
        if block.language in SHELL:
            for words in simple_commands(block.text):
                for name, value in VALUES.items():
                    words = [
                        value if word == name else word.replace(name, value) if name[0] == "$" else word
                        for word in words
                    ]
                found.append((f"{block.where} {' '.join(words)}", words))
    return found


COMMANDS = every_command()


def program(words):
    """The name of the program of a command, without its folder and version."""
    return re.sub(r"(?<=python)[\d.]+$", "", words[0].rpartition("/")[2])


def of_program(name):
    return [(where, words[1:]) for where, words in COMMANDS if program(words) == name]


def cases(commands):
    return [pytest.param(*rest, id=where) for where, *rest in commands]


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_says_its_language(path):
    """A block without one would not be seen by the tests of commands."""
    assert [block.where for block in code_blocks(path) if block.language not in LANGUAGES] == []


def test_every_program_is_read_by_its_own_parser_or_listed():
    programs = {program(words) for _, words in COMMANDS}
    assert programs - BUILTINS - NEED.keys() == {"python", "make", "pip", "ray"}
    assert NEED.keys() - programs == set()


def test_commands_are_found_in_blocks_text_and_docstrings(tmp_path):
    found = " ".join(re.sub(r":\d+ ", ": ", where) for where, _ in COMMANDS)
    for known in (
        "README.md: make demo",
        "docs/decontamination.md: python tests/benchmarks/decontamination.py --photos",
        "docs/vtab.md: python jobs/prepare.py vtab all",
        "docs/clusters.md: .venv/bin/python jobs/prepare.py --source s3://corpus/raw",
        "jobs/doctor.py: python jobs/doctor.py --recipe",
    ):
        assert known in found
    script = "a --b | c > d; for x in 1 2; do\n  e=1 f \"$(g -h)\" || i\ndone\nssh host 'j && k l'\n(umask 077; m -n)"
    words = [" ".join(words) for words in simple_commands(script)]
    assert words == ["a --b", "c", "g -h", "f $(g -h)", "i", "ssh host j && k l", "j", "k l", "umask 077", "m -n"]


PYTHON = of_program("python")
JOBS = [(where, Path(a[0]).stem, a[1:]) for where, a in PYTHON if re.fullmatch(r"jobs/\w+\.py", a[0])]
SCRIPTS = [(where, a[0], a[1:]) for where, a in PYTHON if re.fullmatch(r"(docs|infra|tests)/[\w/]+\.py", a[0])]
MODULES = [(where, a[1], a[2:]) for where, a in PYTHON if a[0] == "-m"]


def test_every_python_command_is_one_of_these():
    rest = [a for _, a in PYTHON if a[0] not in ("-m", "-c")]
    assert len(rest) == len(JOBS) + len(SCRIPTS)
    assert {a[1] for _, a in PYTHON if a[0] == "-m"} == {"pytest", "venv", "pipeline.tracking", "tests.definitions"}


@pytest.mark.parametrize(("job", "argv"), cases(JOBS))
def test_a_job_reads_its_command(job, argv, monkeypatch, capsys):
    parse_job(job, argv, monkeypatch)


@pytest.mark.parametrize(("path", "argv"), cases(SCRIPTS))
def test_a_script_reads_its_command(path, argv, monkeypatch):
    parse_script(path, argv, monkeypatch)


@pytest.mark.parametrize(("module", "argv"), cases(MODULES))
def test_a_module_reads_its_command(module, argv, monkeypatch):
    if module == "pipeline.tracking" and argv:
        parse_script("pipeline/tracking/__main__.py", argv, monkeypatch)
    elif module == "pytest":
        files = [word for word in argv if word.endswith(".py")]
        text = "".join((ROOT / file).read_text() for file in files)
        assert text
        for flag, value in itertools.pairwise(argv):
            if flag == "-k":
                assert all(re.search(rf"def test_\w*{word}", text) for word in value.split(" or "))
            if flag == "-m":
                assert f"pytest.mark.{value}" in text
    elif module == "tests.definitions":
        assert "sys.argv[1]" in (ROOT / "tests" / "definitions.py").read_text()


def test_wrong_commands_are_noticed(monkeypatch):
    with pytest.raises(UserError, match="--wokers"):
        parse_job("pretrain", ["--recipe", "b16_imagenet", "--wokers", "8"], monkeypatch)
    with pytest.raises(SystemExit):
        parse_script("tests/benchmarks/table.py", ["--rite", "docs/benchmarks.md"], monkeypatch)
    with pytest.raises(AssertionError, match="does not read"):
        parse_script("tests/benchmarks/leaderboard.py", ["--runs", "10"], monkeypatch)
    with pytest.raises(click.UsageError):
        read_ray(["job", "submitt"])
    with pytest.raises(click.UsageError):
        read_ray(["start", "--haed"])


@pytest.mark.parametrize("argv", cases(of_program("make")))
def test_make_has_the_target(argv):
    done = subprocess.run(["make", "--dry-run", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    variables = [word.partition("=")[0] for word in argv if "=" in word]
    assert all(re.search(rf"^{name} +\?=", (ROOT / "Makefile").read_text(), re.MULTILINE) for name in variables)


def read_ray(argv):
    """Reads a command with Ray's own parser. Raises click.UsageError if Ray does not know it."""
    from ray.scripts.scripts import cli

    command, argv = cli, list(argv)
    while isinstance(command, click.Group) and argv and not argv[0].startswith("-"):
        name = argv.pop(0)
        command = command.get_command(click.Context(command), name)
        if command is None:
            raise click.UsageError(f"ray has no command {name}")
    if argv:  # without arguments the text only names the command
        command.make_context("ray", argv)


@pytest.mark.parametrize("argv", cases(of_program("ray")))
def test_ray_reads_its_command(argv):
    if "--version" in argv:
        with pytest.raises(click.exceptions.Exit):
            read_ray(argv)
    else:
        read_ray(argv)


@pytest.mark.parametrize("argv", cases([*of_program("pip"), *of_program("uv")]))
def test_pip_installs_extras_and_versions_of_this_project(argv):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    for flag, value in itertools.pairwise(argv):
        if flag in ("-c", "-r"):
            assert (ROOT / value).is_file()
        if flag == "-e":
            assert set(re.findall(r"[\w-]+", value)) <= project.keys(), value
    names = {line.partition("==")[0] for line in pinned}
    for requirement in argv:
        if requirement.partition("==")[0] in names and "==" in requirement:
            assert requirement in pinned


def test_every_extra_that_a_file_names_exists():
    """pip installs the project without an extra that it does not know, and only warns."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    files = [ROOT / "Makefile", *pages(), *(path for path in (ROOT / "infra").rglob("*") if path.is_file())]
    named = {}
    for path in files:
        for extras in re.findall(r"[.`']\[([a-z][\w,-]*)\]['`]", path.read_text(errors="ignore")):
            named |= dict.fromkeys(extras.split(","), path)
    assert named.keys() <= known, {name: path for name, path in named.items() if name not in known}
    assert {"s3", "gcs", "ray-up-gcp", "test"} <= named.keys()


# ---------------------------------------------------------------- clouds, where their programs are installed


def has(name):
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


def output(command):
    """(exit code, output) of a command. Nothing can be reached from it."""
    away = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1", "KUBECONFIG": "/dev/null"}
    environment = os.environ | away | {"DOCKER_HOST": "tcp://127.0.0.1:1", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout + done.stderr


def test_sed_gives_the_role_of_mlflow():
    ((_, argv),) = of_program("sed")
    code, text = output(["sed", *argv])
    assert code == 0
    assert "system:serviceaccount:vit:mlflow" in str(json.loads(text))


@has("aws")
@pytest.mark.parametrize("argv", cases(of_program("aws")))
def test_aws_reads_its_command(argv):
    code, text = output(["aws", *argv, *([] if "get-login-password" in argv else ["--generate-cli-skeleton", "input"])])
    assert code == 0 or "Unable to locate credentials" in text, text


@has("gcloud")
@pytest.mark.timeout(600)
def test_gcloud_reads_its_commands(tmp_path):
    file = tmp_path / "commands.txt"
    file.write_text("\n".join(shlex.join(["gcloud", *argv]) for _, argv in of_program("gcloud")))
    code, text = output(["gcloud", "meta", "lint-gcloud-commands", f"--commands-text-file={file}"])
    assert code == 0
    assert [found["command_string"] for found in json.loads(text) if not found["success"]] == []


@has("kubectl")
@pytest.mark.parametrize("argv", cases(of_program("kubectl")))
def test_kubectl_reads_its_command(argv):
    assert not re.search(r"unknown (shorthand )?(flag|command)|required flag", output(["kubectl", *argv])[1])


@has("docker")
@pytest.mark.parametrize("argv", cases(of_program("docker")))
def test_docker_reads_its_command(argv):
    wrong = r"unknown (shorthand )?(flag|command)" + ("|requires" if len(argv) > 1 else "")  # else only its name
    assert not re.search(wrong, output(["docker", *argv])[1])
