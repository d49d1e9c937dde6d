"""The environments that infra/kuberay/ and infra/ray-up/ give to jobs, given to a job on this machine: settings, MLflow's user and
password, the rights of infra/iam/node.json, and the spool on its volume.

Servers stand in for the cluster's: MLflow with its own password check, moto for S3 and the identity service, and an
imitation of Google Cloud Storage."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml

from pipeline import storage
from tests.googlestore import make_google_bucket
from tests.images import jpeg
from tests.mlflowserver import count_runs, mlflow_server
from tests.objectstore import ADMIN, moto, policy_for_moto, restricted_user
from tests.ports import free_port
from tests.rayhead import STARTS

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PASSWORD = "correct horse battery"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def settings() -> dict[str, str]:
    """The ConfigMap of all pods."""
    (generated,) = yaml.safe_load((INFRA / "kuberay" / "kustomization.yaml").read_text())["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generated["literals"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """(endpoint with the buckets and images, environment that EKS gives to pods of the service account)"""
    folder = tmp_path_factory.mktemp("store")
    with moto() as endpoint:
        s3 = boto3.client("s3", endpoint_url=endpoint, **ADMIN)
        iam = boto3.client("iam", endpoint_url=endpoint, **ADMIN)
        for bucket in ("corpus", "bucket"):
            s3.create_bucket(Bucket=bucket)
        for number in range(20):
            s3.put_object(Bucket="corpus", Key=f"raw/{('ant', 'bee')[number % 2]}/{number}.jpg", Body=jpeg(number))
        policy = policy_for_moto(INFRA / "iam" / "node.json", "bucket")
        (account, _) = list(yaml.safe_load_all((INFRA / "kuberay" / "account.yaml").read_text()))
        role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        trust = (INFRA / "iam" / "trust-eks.json").read_text()
        iam.create_role(RoleName=role.rpartition("/")[2], AssumeRolePolicyDocument=trust)
        iam.put_role_policy(RoleName="vit-node", PolicyName="node", PolicyDocument=policy)
        (folder / "token").write_text("a token of the cluster")
        yield endpoint, {"AWS_ROLE_ARN": role, "AWS_WEB_IDENTITY_TOKEN_FILE": str(folder / "token")}


def pod(store, volume: Path, address: str, **more: str) -> dict[str, str]:
    """The environment of a pod, with local addresses. volume: the one that is mounted at /tmp."""
    endpoint, role = store
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment |= settings() | role | {"HOME": str(volume), "PYTHONPATH": str(ROOT), "AWS_ENDPOINT_URL": endpoint}
    assert environment["VIT_SPOOL"].startswith("/tmp/")
    environment["VIT_SPOOL"] = environment["VIT_SPOOL"].replace("/tmp", str(volume))
    return environment | {"MLFLOW_TRACKING_URI": address} | more


def prepare(environment: dict[str, str], output: str, source: str = "s3://corpus/raw") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "--source", source, "--size", "20"]
    command += ["--output", output, "--num-cpus", "2"]
    for _ in range(STARTS):  # Ray may not start in its time on a busy machine
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if "error: Ray did not start in time" not in done.stderr:
            break
    return done


USER = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}


def test_a_pod_records_and_writes_with_what_the_manifests_give_it(store, tmp_path):
    with mlflow_server(tmp_path, password=PASSWORD) as address:
        done = prepare(pod(store, tmp_path, address, **USER), "s3://bucket/vit/data")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "prepared=" in done.stdout
        assert count_runs(address, PASSWORD) > 0
        refused = prepare(pod(store, tmp_path, address), "s3://bucket/vit/other")
        assert refused.returncode == 2
        assert "MLFLOW_TRACKING_USERNAME" in refused.stderr


def test_records_wait_on_the_volume_while_the_server_is_away(store, tmp_path):
    port = free_port()
    environment = pod(store, tmp_path, f"http://127.0.0.1:{port}", **USER)
    done = prepare(environment, "s3://bucket/vit/later")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "spool").iterdir())
    with mlflow_server(tmp_path, port, PASSWORD) as address:
        upload = [sys.executable, "-m", "pipeline.tracking", "upload"]
        sent = subprocess.run(upload, env=environment, capture_output=True, text=True, timeout=600)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert count_runs(address, PASSWORD) == 1


# ---------------------------------------------------------------- ray up


@pytest.fixture
def s3_of_a_node():
    """(environment of a machine whose profile has the rights of iam/node.json, prefix of addresses)"""
    with moto() as endpoint:
        s3 = boto3.client("s3", endpoint_url=endpoint, **ADMIN)
        for bucket in ("corpus", "bucket"):
            s3.create_bucket(Bucket=bucket)
        for number in range(20):
            s3.put_object(Bucket="corpus", Key=f"raw/{('ant', 'bee')[number % 2]}/{number}.jpg", Body=jpeg(number))
        yield restricted_user(endpoint, INFRA / "iam" / "node.json"), "s3"


@pytest.fixture
def gs_of_a_node(gcs_server, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    for bucket in ("corpus", "bucket"):
        make_google_bucket(gcs_server, bucket)
    for number in range(20):
        storage.write_bytes(f"gs://corpus/raw/{('ant', 'bee')[number % 2]}/{number}.jpg", jpeg(number))
    return {"STORAGE_EMULATOR_HOST": gcs_server}, "gs"


def container(path: Path, folder: Path) -> dict[str, str]:
    """The environment of Ray's container on a machine: the options of docker, its mounted files and volumes."""
    cluster = yaml.safe_load(path.read_text())
    options = dict(
        option.split(" ", 1) for option in cluster["docker"]["run_options"] if option.startswith("--volume ")
    )
    machine, inside = options["--volume"].split(":")
    assert f"sudo install -d -o 1000 -g 1000 {machine}" in cluster["initialization_commands"]
    (folder / "volume").mkdir()
    pairs = [
        option.removeprefix("--env ") for option in cluster["docker"]["run_options"] if option.startswith("--env ")
    ]
    given = dict(pair.split("=", 1) for pair in pairs)
    assert given["VIT_SPOOL"].startswith(f"{inside}/")
    given["VIT_SPOOL"] = given["VIT_SPOOL"].replace(inside, str(folder / "volume"))
    for target in cluster["file_mounts"]:
        home = folder / Path(target).relative_to("/home/ray")
        home.parent.mkdir(exist_ok=True)
        home.write_text({"auth_token": "51ab" * 16, "credentials": CREDENTIALS}[home.name])
        home.chmod(0o600)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | given | {"HOME": str(folder), "PYTHONPATH": str(ROOT)}


CREDENTIALS = f"[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = {PASSWORD}\n"


@pytest.mark.parametrize(("name", "store_of_a_node"), [("aws.yaml", "s3_of_a_node"), ("gcp.yaml", "gs_of_a_node")])
def test_a_machine_of_ray_up_writes_and_records(name, store_of_a_node, tmp_path, request):
    """MLflow is away at first: the records wait on the machine's disk, and reach it with the mounted password."""
    store, scheme = request.getfixturevalue(store_of_a_node)
    port = free_port()
    environment = container(INFRA / "ray-up" / name, tmp_path) | store
    assert environment["MLFLOW_TRACKING_URI"].startswith("http://")
    environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
    done = prepare(environment, f"{scheme}://bucket/vit/data", f"{scheme}://corpus/raw")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "volume" / "spool").iterdir())
    with mlflow_server(tmp_path, port, PASSWORD) as address:
        upload = [sys.executable, "-m", "pipeline.tracking", "upload"]
        sent = subprocess.run(upload, env=environment, capture_output=True, text=True, timeout=600)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert count_runs(address, PASSWORD) == 1
