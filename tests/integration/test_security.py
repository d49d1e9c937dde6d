"""What docs/security.md promises: no token no job, credentials stay in the environment, nodes may do what their policy
says."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from pipeline import cluster, storage
from pipeline.credentials import redacted
from pipeline.operations.doctor import store as store_checks
from tests.objectstore import ADMIN, moto, restricted_user
from tests.rayhead import ray_head

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECRETS = {
    "AWS_ACCESS_KEY_ID": "key-id-6b1f0c7e",
    "AWS_SECRET_ACCESS_KEY": "secret-key-93d2ab10",
    "AWS_SESSION_TOKEN": "session-token-5e7f",
    "MLFLOW_TRACKING_PASSWORD": "password-1c9e44d0",
    "MLFLOW_TRACKING_TOKEN": "bearer-8842aa",
    "RAY_AUTH_TOKEN": "0f5e" * 16,
    "VIT_WEBHOOK": "https://hooks.example.com/webhook-secret-77",
}


# ---------------------------------------------------------------- what travels to workers


@pytest.mark.parametrize("ships", [True, False])
def test_no_secret_travels_in_a_runtime_environment(monkeypatch, ships):
    """Ray shows runtime environments in its dashboard and writes them to its logs."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    text = json.dumps(cluster.runtime_env(ship_project=ships))
    assert "http://store:9000" in text
    assert not [name for name, value in SECRETS.items() if value in text]


PLANTED = "planted-5f1e7c"
SHOW = """
import os, sys
from pipeline import config, logs
def main(argv):
    import logging
    logging.getLogger("pipeline.test").warning("proxy %s", os.environ.get("HTTPS_PROXY"))
    print(argv, [os.environ.get(n) for n in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL")], open("/proc/self/cmdline").read())
    print("found" if os.environ[sys.argv[1]] == os.environ["EXPECTED"] else "lost")
config.run_job(main)
"""


@pytest.mark.parametrize(
    ("where", "scheme", "variable"),
    [
        ("--tracking-uri", "http", "MLFLOW_TRACKING_PASSWORD"),
        ("--tracking-uri=", "https", "MLFLOW_TRACKING_PASSWORD"),
        ("--transfer.tracking_uri", "postgresql", "VIT_DATABASE_PASSWORD"),
        ("MLFLOW_TRACKING_URI", "http", "MLFLOW_TRACKING_PASSWORD"),
        ("MLFLOW_TRACKING_URI", "postgresql+psycopg", "VIT_DATABASE_PASSWORD"),
        ("AWS_ENDPOINT_URL", "http", "AWS_SECRET_ACCESS_KEY"),
        ("HTTPS_PROXY", "http", "HTTPS_PROXY"),
    ],
)
def test_a_password_in_an_address_reaches_neither_output_nor_process_list(tmp_path, where, scheme, variable):
    address = f"{scheme}://me:{PLANTED}@host:1/x"
    script = tmp_path / "job.py"
    script.write_text(SHOW)
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "MLFLOW_", "VIT_"))}
    environment |= {"PYTHONPATH": str(ROOT), "EXPECTED": address if where == "HTTPS_PROXY" else PLANTED}
    command = [sys.executable, str(script), variable]
    if where.endswith("="):
        command.append(where + address)
    elif where.startswith("--"):
        command += [where, address]
    else:
        environment[where] = address
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "found" in done.stdout, done.stderr
    assert PLANTED not in done.stdout + done.stderr


def test_a_password_in_a_configuration_file_stays_out_of_the_configuration(tmp_path, monkeypatch):
    from pipeline import config
    from pipeline.training.recipes import RECIPES

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    (tmp_path / "c.yaml").write_text(f"runtime:\n  tracking_uri: 'http://me:{PLANTED}@mlflow:5000'\n")
    read = config.parse(["--config", str(tmp_path / "c.yaml")], RECIPES, "demo", prog="x", description="")
    assert "http://mlflow:5000" in config.to_yaml(read)
    assert PLANTED not in config.to_yaml(read)
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == PLANTED


def test_a_password_in_an_address_is_not_shown():
    assert redacted("https://me:hidden@mlflow:5000/x") == "https://***@mlflow:5000/x"


# ---------------------------------------------------------------- no token, no job


@pytest.fixture
def head(tmp_path):
    with ray_head(tmp_path, SECRETS["RAY_AUTH_TOKEN"]) as started:
        yield started


@pytest.mark.slow
def test_a_submission_without_the_token_is_refused(head):
    address, without, with_token = head
    command = [BIN / "ray", "job", "submit", f"--address={address}", "--", "python", "-c", "print('it ran')"]
    wrong = without | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1234" * 16}
    for environment in (without, wrong):
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert refused.returncode != 0
        assert re.search(r"40[13]|[Uu]nauth|[Aa]uthenticat", refused.stdout + refused.stderr), refused.stderr
        assert "it ran" not in refused.stdout
    accepted = subprocess.run(command, env=with_token, capture_output=True, text=True, timeout=120)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert "it ran" in accepted.stdout


# ---------------------------------------------------------------- credentials stay in the environment


class ProcessList(threading.Thread):
    """Everything that `ps` shows to any user, while something runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.stop = set(), threading.Event()

    def run(self):
        while not self.stop.wait(0.1):
            for process in psutil.process_iter(["cmdline"]):
                self.seen.add(" ".join(process.info["cmdline"] or []))


def files_with(folder: Path, secrets) -> dict[str, list[str]]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            names = [name for name, value in secrets.items() if value.encode() in content]
            if names:
                found[str(path.relative_to(folder))] = names
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_credentials_appear_nowhere(s3_server, s3, image_folder, tmp_path):
    """prepare to S3, pretrain from it with MLflow: output, Ray's logs, MLflow, datasets, checkpoints, process list."""
    ray_folder = Path(tempfile.mkdtemp(prefix="ray"))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))
    }
    environment |= SECRETS | {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(ray_folder),
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow/mlflow.db",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    sizes = "--validation None --model.variant mu/8 --steps 4steps --image-size 16 --augment.size 16 --batch-size 8"
    run = ("--data", f"{s3}/set", "--output", f"{s3}/run", *sizes.split(), *["--workers", "1", "--log-every", "1steps"])
    commands = {
        "prepare": ("--source", str(image_folder), "--output", f"{s3}/set", "--size", "20"),
        "pretrain": run,
        "doctor": run,
    }
    processes = ProcessList()
    processes.start()
    said = ""
    for job, arguments in commands.items():
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        said += done.stdout + done.stderr
        assert done.returncode == 0, said
    processes.stop.set()
    processes.join()
    try:
        assert not [name for name, value in SECRETS.items() if value in said]
        assert not [line for line in processes.seen if any(value in line for value in SECRETS.values())]
        assert any("pretrain.py" in line for line in processes.seen)  # it did look
        assert (tmp_path / "mlflow" / "mlflow.db").stat().st_size > 0
        assert files_with(tmp_path, SECRETS) == {}
        assert any(ray_folder.rglob("*.log"))
        assert files_with(ray_folder, SECRETS) == {}
        for file in storage.list_files(s3):
            content = storage.read_bytes(file.uri)
            assert not [secret for secret, value in SECRETS.items() if value.encode() in content], file
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


# ---------------------------------------------------------------- rights


@pytest.mark.slow
def test_a_node_can_do_what_its_policy_says_and_no_more(tmp_path, monkeypatch):
    """infra/iam/node.json, enforced by moto's identity service: the doctor's probes pass and fail where they should."""
    import boto3

    with moto() as endpoint:
        store = boto3.client("s3", endpoint_url=endpoint, **ADMIN)
        for bucket in ("corpus", "bucket", "elsewhere"):
            store.create_bucket(Bucket=bucket)
            store.put_object(Bucket=bucket, Key="raw/manifest.json", Body=b"{}")
        for name, value in restricted_user(endpoint, ROOT / "infra" / "iam" / "node.json").items():
            monkeypatch.setenv(name, value)
        assert store_checks.readable("s3://corpus/raw").status == "ok"
        found = store_checks.writable("s3://bucket/vit/run")
        assert {finding.status for finding in found} == {"ok"}, found
        for place in ("s3://corpus/raw", "s3://bucket/other", "s3://elsewhere/x"):
            (finding,) = store_checks.writable(place)
            assert "access denied" in finding.message, place
        assert store_checks.readable("s3://elsewhere/raw").status == "error"
