"""Every address that a job accepts, by flag and by environment variable, contains a secret. Whole jobs run, and no
other user can see any of the secrets."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from pipeline import cluster, storage
from pipeline.config import to_dict
from pipeline.credentials import (
    redacted,
    take_from_arguments,
    take_from_environment,
    take_from_values,
    take_password,
    take_queries,
    without_logins,
)
from pipeline.errors import UserError
from pipeline.training.config import PretrainConfig, RuntimeConfig
from tests.faultproxy import FaultProxy
from tests.fileserver import FileServer
from tests.mlflowserver import mlflow_server

ROOT = Path(__file__).parents[2]
SECRETS = {
    "MLflow, by flag": "flag-6b1f0c7e",
    "MLflow, by environment": "environment-93d2ab10",
    "MLflow, in a file": "configuration-41aa",
    "S3 key": "key-id-77de01",
    "S3 secret": "endpoint-5e7f22",
    "S3 session": "session-token-5e7f",
    "proxy": "proxy-8842aa",
    "webhook": "webhook-1c9e44d0",
    "webhook path": "hooktoken-0aa1",
    "Ray": "0f5e" * 16,
    "Hugging Face": "hf_17cc09",
    "MLflow registry": "registry-55d1",
    "https, by flag": "signature-0b77ae",
    "az, by flag": "sas-e90c41",
    "https, as a user": "user-token-7f3a",
    "hook": "hook-query-31c8",
    "HF_ENDPOINT": "hub-90ab1c",
    "STORAGE_EMULATOR_HOST": "emulator-cc01",
    "RAY_ADDRESS": "cluster-1d2e3f",
    "RAY_API_SERVER_ADDRESS": "jobs-4a5b6c",
}
SMALL = (
    "--model.variant mu/8 --image-size 16 --augment.size 16 --batch-size 8 --workers 1 --validation None --steps 6steps"
)


class ProcessList(threading.Thread):
    """What `ps` shows to any user while jobs run: {process: command lines, in the order in which they were seen}."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[int, list[str]] = defaultdict(list)
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.1):
            for process in psutil.process_iter(["cmdline"]):
                line = " ".join(process.info["cmdline"] or [])
                if self.seen[process.pid][-1:] != [line]:
                    self.seen[process.pid].append(line)


@contextmanager
def webhook() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(an address, received requests: path and login)."""
    received: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.headers.get("Authorization", "")))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", received
    server.shutdown()


def login(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def found_in(content: bytes) -> list[str]:
    """Names of the secrets that some bytes contain, in plain text or encoded as in a login."""
    coded = {name: base64.b64encode(f"me:{value}".encode()) for name, value in SECRETS.items()}
    return [name for name, value in SECRETS.items() if value.encode() in content or coded[name] in content]


def files_with(folder: Path) -> dict[str, list[str]]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {str(path.relative_to(folder)): found_in(path.read_bytes()) for path in paths}
    return {path: names for path, names in found.items() if names}


def run_refused(environment: dict[str, str], folder: Path) -> str:
    """The output of jobs with a secret where none is accepted."""
    names = ("HF_ENDPOINT", "STORAGE_EMULATOR_HOST", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    commands = [(["prepare", "--source", "x"], {name: f"http://me:{SECRETS[name]}@127.0.0.1:1"}) for name in names]
    commands += [
        (["prepare", "--source", f"https://{SECRETS['https, as a user']}@127.0.0.1:1/a.tar"], {}),
        (["evaluate", "--hook", f"curl https://127.0.0.1:1/x?token={SECRETS['hook']}"], {}),
    ]
    said = ""
    for (job, *arguments), variables in commands:
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
        done = subprocess.run(
            command,
            env=environment | variables,
            stdout=-1,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            timeout=300,
        )
        assert done.returncode == 2, done.stdout
        said += done.stdout
    return said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_secret_in_any_address_is_visible(s3, s3_server, image_folder, tmp_path):
    """prepare (MLflow is unavailable, so its records stay on disk), pretrain and evaluate (which transfers) over S3,
    MLflow and Ray; prepare from signed addresses."""
    ray_folder = Path(tempfile.mkdtemp(prefix="ray"))
    config = tmp_path / "private" / "pretrain.yaml"
    config.parent.mkdir(mode=0o700)
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    processes = ProcessList()
    try:
        with (
            mlflow_server(tmp_path) as mlflow,
            FaultProxy(mlflow) as proxy,
            webhook() as (hook, received),
            FileServer(tmp_path) as web,
        ):
            place = proxy.endpoint.removeprefix("http://")
            endpoint = s3_server.replace("//", f"//{SECRETS['S3 key']}:{SECRETS['S3 secret']}@")
            web.query = f"sv=1&sig={SECRETS['https, by flag']}"
            shutil.make_archive(str(tmp_path / "images"), "tar", image_folder)
            environment = hidden | {
                **dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"), endpoint),
                "AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=http://127.0.0.1:1/away;AccountName=away",
                "VIT_STORE_PATIENCE": "5",
                "AWS_SESSION_TOKEN": SECRETS["S3 session"],
                "AWS_DEFAULT_REGION": "us-east-1",
                "MLFLOW_TRACKING_URI": f"http://me:{SECRETS['MLflow, by environment']}@{place}",
                "MLFLOW_REGISTRY_URI": f"http://me:{SECRETS['MLflow registry']}@{place}",
                **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), f"http://me:{SECRETS['proxy']}@127.0.0.1:1"),
                "NO_PROXY": "127.0.0.1,localhost",
                "VIT_WEBHOOK": f"http://me:{SECRETS['webhook']}@{hook}/{SECRETS['webhook path']}",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": SECRETS["Ray"],
                "RAY_TMPDIR": str(ray_folder),
                "HF_TOKEN": SECRETS["Hugging Face"],
                "VIT_SPOOL": str(tmp_path / "spool"),
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
            }
            config.write_text(f"runtime:\n  tracking_uri: http://me:{SECRETS['MLflow, in a file']}@{place}\n")
            away = f"http://me:{SECRETS['MLflow, by flag']}@127.0.0.1:1"
            folder = f"--suite folder --data {s3}/sets --transfer.steps 2 --transfer.batch-size 8 --transfer.lrs 0.001 --transfer.workers 1"
            commands = [
                (
                    "prepare",
                    0,
                    f"--source {image_folder} --output {s3}/sets/own --size 20 --splits train=0.5 test=0.5 "
                    f"--num-cpus 2 --tracking-uri {away}",
                ),
                (
                    "pretrain",
                    0,
                    f"--config {config} --data {s3}/sets/own/train --output {s3}/run {SMALL} --register None",
                ),
                ("evaluate", 0, f"--runs {s3}/run {folder} --output {tmp_path}/evaluate"),
                (
                    "prepare",
                    0,
                    f"--source {web.address}/images.tar?{web.query} --output {tmp_path}/web --size 20 --num-cpus 2",
                ),
                ("prepare", 75, f"--source az://box/a.tar?sv=1&sig={SECRETS['az, by flag']} --output {tmp_path}/az"),
            ]
            processes.start()
            said, pids = "", []
            for job, code, arguments in commands:
                command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments.split()]
                started = subprocess.Popen(
                    command, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
                )
                pids.append(started.pid)
                said += started.communicate(timeout=500)[0]
                assert started.returncode == code, said
            processes.stop.set()
            processes.join()
            said += run_refused(environment, tmp_path)
        config.unlink()
        assert (f"/{SECRETS['webhook path']}", login("me", SECRETS["webhook"])) in received
        assert found_in(said.encode()) == []
        for pid, lines in processes.seen.items():  # a flag is visible until the job has restarted itself without it
            assert not [line for line in (lines[-1:] if pid in pids else lines) if found_in(line.encode())], pid
        assert any("evaluate.py" in line for lines in processes.seen.values() for line in lines)
        assert list((tmp_path / "spool").rglob("metrics.jsonl"))
        assert (tmp_path / "mlflow.db").stat().st_size > 0
        assert files_with(tmp_path) == {}
        assert any(ray_folder.rglob("*.log"))
        assert files_with(ray_folder) == {}
        objects = storage.list_files(s3)
        assert any(file.path.endswith("config.json") for file in objects)
        assert not [file.path for file in objects if found_in(storage.read_bytes(file.uri))]
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


# ---------------------------------------------------------------- at the door


@pytest.fixture
def empty(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "VIT_DATABASE_PASSWORD"):
        monkeypatch.setenv(name, "")


PASSWORDS = ["planted", "pl,ant'ed", "pl%2Fant%40ed", "pl/an?t#ed", "pl:an:ted", "päßword", "1234"]


@pytest.mark.parametrize("password", PASSWORDS)
def test_password_of_any_characters_is_removed_from_the_address(empty, password):
    from urllib.parse import unquote

    assert take_password(f"http://me:{password}@host:5000/x") == "http://host:5000/x"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == unquote(password)
    for kind in ("postgresql://me:{}@host/db", "postgresql://me@host/db?sslmode=require&password={}"):
        os.environ["VIT_DATABASE_PASSWORD"] = ""
        if "?password" not in kind.replace("&", "?") or not set(password) & set("?#&"):
            assert password not in take_password(kind.format(password))
            assert os.environ["VIT_DATABASE_PASSWORD"] == unquote(password)


@pytest.mark.parametrize("password", [p for p in PASSWORDS if "'" not in p])
@pytest.mark.parametrize("text", ["cannot reach {} (refused)", "{}", "x={}\ny"])
def test_password_is_shown_in_no_message(password, text):
    assert password not in redacted(text.format(f"https://me:{password}@host:5000/x"))


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "token",
        "X-Amz-Signature",
        "X-Goog-Credential",
        "sig",
        "api_key",
        "x-api-key",
        "access_token",
        "auth",
        "code",
    ],
)
def test_secret_parameter_of_an_address_is_shown_in_no_message(name):
    assert redacted(f"https://host/x?a=1&{name}=planted&b=2") == f"https://host/x?a=1&{name}=***&b=2"


@pytest.mark.parametrize("value", ["AIzaSyA" + "b1_-" * 8, "0123456789abcdef0123456789abcdef"])
def test_key_is_shown_unless_it_is_a_file_name(value):
    assert redacted(f"https://host/x?key={value}&b=2") == "https://host/x?key=***&b=2"
    assert (
        redacted("https://host/x?key=photos/2024/train-part-0001.tar")
        == "https://host/x?key=photos/2024/train-part-0001.tar"
    )


@pytest.mark.parametrize(
    "token", ["AIzaSyA" + "b1_-" * 8, "hf_" + "a1" * 12, "ghp_" + "A1" * 18, "glpat-" + "a_1-" * 5]
)
def test_tokens_are_shown_nowhere(token):
    assert redacted(f"the server refused {token}: bad request") == "the server refused ***: bad request"


@pytest.mark.parametrize(
    "address", ["http://host:5000/a@b", "s3://bucket/a@b/c", "timm:name@weights", "https://host/x?a=b"]
)
def test_address_without_a_password_is_unchanged(address):
    assert redacted(address) == take_password(address) == address
    assert take_from_arguments(["--data", address]) == ["--data", address]


@pytest.mark.parametrize("flag", ["--source", "--data", "--checkpoint", "--hook", "--address", "--output"])
@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_password_in_the_address_of_another_flag_is_refused(flag, form):
    arguments = form.format(flag, "s3://me:planted@bucket/x").split()
    with pytest.raises(UserError, match=rf"{flag}: a password in the address s3://\*\*\*@") as refused:
        take_from_arguments(arguments)
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize("flag", ["--source", "--checkpoint", "--output"])
def test_user_of_an_https_address_is_refused(flag):
    with pytest.raises(UserError, match=rf"{flag}: a password in the address https://\*\*\*@") as refused:
        take_from_arguments([flag, "https://planted@host/x.tar"])
    assert "planted" not in str(refused.value)


def test_secret_in_the_query_of_a_hook_is_refused_by_flag_and_in_a_file():
    command = "curl -d @- https://host/x?{}=planted"
    for name in ("token", "sig", "api_key"):
        for arguments in (["--hook", command.format(name)], [f"--hook={command.format(name)}"]):
            with pytest.raises(UserError, match=r"--hook: a secret .*=\*\*\* would be visible"):
                take_from_arguments(arguments)
        with pytest.raises(UserError, match=r"x\.yaml\.hook: a secret"):
            take_from_values({"hook": command.format(name)}, "x.yaml")
    harmless = ["--hook", command.format("channel")]
    assert take_from_arguments(harmless) == harmless


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "STORAGE_EMULATOR_HOST", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
@pytest.mark.parametrize("address", ["http://me:planted@host:1", "me:planted@host:1", "https://planted@host"])
def test_login_in_an_address_without_logins_is_refused(empty, monkeypatch, name, address):
    monkeypatch.setenv(name, address)
    with pytest.raises(UserError, match=f"{name}: a login in the address") as refused:
        take_from_environment()
    assert "planted" not in str(refused.value) + str(cluster.runtime_env(ship_project=False))


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"])
def test_login_of_an_s3_endpoint_is_taken(monkeypatch, name):
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv(name, "https://key:pl%2Fanted@host:1")
    take_from_environment()
    assert os.environ[name] == "https://host:1"
    assert (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]) == ("key", "pl/anted")


def test_two_files_that_differ_only_in_their_queries_are_refused(monkeypatch):
    monkeypatch.setenv("VIT_URL_QUERIES", "")
    assert take_queries("https://host/get?id=1&sig=planted") == "https://host/get"
    assert take_queries("https://host/get?id=1&sig=renewed") == "https://host/get"
    with pytest.raises(UserError, match="https://host/get: two files"):
        take_queries("https://host/get?id=2&sig=planted")


def test_config_of_a_checkpoint_has_no_password():
    """`pretrain` called from Python has no command line from which they are taken."""
    runtime = RuntimeConfig(tracking_uri="http://me:planted@host:5000/x", data="https://host/x?sig=planted")
    config = PretrainConfig(runtime=runtime)
    written = without_logins(to_dict(config))
    assert "planted" not in json.dumps(written)
    assert written["runtime"]["tracking_uri"] == "http://host:5000/x"
    assert without_logins("postgresql://me:planted@host/db") == "postgresql://me@host/db"


def test_passwords_in_a_file_are_taken_or_refused_wherever_they_are(empty):
    values = {"stages": {"a": {"with": [{"transfer.tracking_uri": "http://me:pl,ant@host"}]}}, "tracking_uri": None}
    assert "pl,ant" not in json.dumps(take_from_values(values, "x.yaml"))
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "pl,ant"
    with pytest.raises(UserError, match=r"x\.yaml\.stages\.a\.data: a password in the address"):
        take_from_values({"stages": {"a": {"data": "s3://me:planted@bucket/x"}}}, "x.yaml")


def test_webhook_that_fails_shows_no_secret(monkeypatch, caplog):
    from pipeline.operations.evaluation import EvaluateConfig, notify

    for address in ("http://me:planted@127.0.0.1:1/planted", "planted", "http://[planted", "http://h:planted/"):
        monkeypatch.setenv("VIT_WEBHOOK", address)
        notify(EvaluateConfig(), "failed", None)
    assert caplog.text.count("webhook failed on failed") == 4
    assert "planted" not in caplog.text


@pytest.mark.parametrize("command", ["upload", "list", "ui"])
def test_commands_of_tracking_hide_passwords_too(tmp_path, command):
    planted = "http://me:planted@127.0.0.1:1/x"
    arguments = [sys.executable, "-m", "pipeline.tracking", command, "--tracking-uri", planted]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VIT_SPOOL": str(tmp_path), "MLFLOW_TRACKING_URI": planted}
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if command == "ui" else 0), done.stderr
    assert "planted" not in done.stdout + done.stderr
