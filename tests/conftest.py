"""Fixtures shared by all tests: embedded Ray, a real S3 endpoint over HTTP, small generated images."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch

from pipeline.libraries import load_torchvision
from tests.azurestore import CONNECTION, CONNECTION_STRING, azurite, make_container
from tests.definitions import KUBERAY, KUEUE, definitions, validator
from tests.googlestore import fake_gcs, make_google_bucket
from tests.images import tinted
from tests.objectstore import make_bucket, moto
from tests.ports import free_port

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; the jobs would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each of the processes has one core

# timm and transformers import torchvision: the product's own workaround for a build that does not match torch
load_torchvision()


@pytest.fixture(scope="session")
def process_group():
    """A process group of this process only. One per session, because DeepSpeed keeps the first group."""
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone(process_group):
    """The process group and environment of a single worker."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(key, value)
        patch.setenv("MASTER_PORT", str(free_port()))
        yield


SHARED_RAY: list[ModuleType] = []
"""ray, while `ray_local` is running in this process."""


@pytest.fixture(scope="session")
def ray_local():
    """Embedded Ray with two CPUs, shared by every test of the session that needs one."""
    import ray

    from pipeline import cluster

    for left in reversed(range(3)):
        try:
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                runtime_env=cluster.runtime_env(ship_project=False),
                logging_level="warning",
            )
            break
        except Exception as error:  # Ray waits only 30 s for its own processes
            if "timed out" not in str(error) or not left:
                raise
    SHARED_RAY.append(ray)
    yield ray
    SHARED_RAY.clear()
    ray.shutdown()


@pytest.fixture(autouse=True)
def no_ray_of_its_own(request, monkeypatch):
    """Fails a test that uses Ray in this process without `ray_local`, also if another test has started that, or that ends it."""
    from pipeline import cluster

    def connect():
        pytest.fail("the test uses Ray in this process; give it the fixture ray_local, or use workqueue.without_ray")

    if "ray_local" not in request.fixturenames:
        monkeypatch.setattr(cluster, "connect", connect)
    yield
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized() and not SHARED_RAY:
        ray.shutdown()
        pytest.fail("the test left Ray running in this process; use the fixture ray_local")
    if SHARED_RAY and not ray.is_initialized():
        pytest.fail("the test ended the Ray of the fixture ray_local, perhaps by `cluster.disconnect`")


@pytest.fixture(scope="session")
def s3_server():
    """The endpoint of a moto server."""
    with moto() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_server, monkeypatch):
    """`s3://<fresh bucket>`, with the AWS_* environment that reaches it."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test-access-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{time.time_ns()}"
    make_bucket(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory):
    """A fake-gcs-server process on loopback: gcsfs speaks real HTTP to it."""
    with fake_gcs(tmp_path_factory.mktemp("gcs")) as endpoint:
        yield endpoint


@pytest.fixture
def gs(gcs_server, monkeypatch):
    """`gs://<fresh bucket>`, with the environment that reaches it."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    bucket = f"bucket-{time.time_ns()}"
    make_google_bucket(gcs_server, bucket)
    return f"gs://{bucket}"


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory):
    """An Azurite process on loopback. It is a package of npm: CONTRIBUTING.md says how the tests find it."""
    program = os.environ.get("VIT_AZURITE") or shutil.which("azurite-blob")
    if not program:
        pytest.skip("Azurite is not installed: VIT_AZURITE names its azurite-blob")
    with azurite(program, tmp_path_factory.mktemp("azurite")) as endpoint:
        yield endpoint


@pytest.fixture
def az(azure_server, monkeypatch):
    """`az://<new container>`; sets the environment variables for access."""
    monkeypatch.setenv(CONNECTION, CONNECTION_STRING.format(azure_server))
    container = f"container-{time.time_ns()}"
    make_container(azure_server, container)
    return f"az://{container}"


class Cloud(NamedTuple):
    """An empty bucket of a store that can be written, its server, and the environment variable that names the server."""

    uri: str
    server: str
    variable: str
    value: str = "{}"

    def at(self, server: str) -> tuple[str, str]:
        """(environment variable, value) that selects another server."""
        return self.variable, self.value.format(server)


@pytest.fixture(params=["s3", "gs", "az"])
def cloud(request) -> Cloud:
    """A bucket on each store that can be written."""
    if request.param == "az":
        server = request.getfixturevalue("azure_server")
        return Cloud(request.getfixturevalue("az"), server, CONNECTION, CONNECTION_STRING)
    server, variable = {"s3": ("s3_server", "AWS_ENDPOINT_URL"), "gs": ("gcs_server", "STORAGE_EMULATOR_HOST")}[
        request.param
    ]
    return Cloud(request.getfixturevalue(request.param), request.getfixturevalue(server), variable)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Three class folders of ten pictures each, JPEG and PNG, 40x56 to 90x120, each class its own colour."""
    root = tmp_path / "images"
    generator = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for i in range(10):
            height, width = generator.integers((40, 56), (90, 120))
            picture = tinted(generator, height, width, label, noise=60, tint=180)
            cv2.imwrite(str(root / name / f"{i:03d}.{'png' if i % 5 == 0 else 'jpg'}"), picture)
    return root


@pytest.fixture
def without_ray():
    """Runs the work queue in this process."""
    from pipeline import workqueue

    with workqueue.without_ray():
        yield


@pytest.fixture(scope="session")
def vtab_raw(tmp_path_factory) -> str:
    """Miniature archives of all nineteen tasks."""
    from pipeline.vtab import miniature

    return miniature.write("all", str(tmp_path_factory.mktemp("vtab") / "raw"), per_class=6)


@pytest.fixture(scope="session")
def vtab_prepared(vtab_raw, tmp_path_factory) -> tuple[str, dict]:
    """(folder, {task: {split: counts}}) of all nineteen tasks, made from the miniature archives."""
    from pipeline import workqueue
    from pipeline.vtab import TASKS, prepare

    output = str(tmp_path_factory.mktemp("vtab-out"))
    with workqueue.without_ray():
        return output, prepare(TASKS, vtab_raw, output)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images that VIT_REAL_DATA names."""
    folder = os.environ.get("VIT_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("VIT_REAL_DATA names no folder of real images")
    return Path(folder)


@pytest.fixture(scope="session", params=KUBERAY)
def kuberay_definitions(request) -> dict:
    """{kind: validator of ray.io/v1}, from the custom resource definitions of each version of KubeRay."""
    folder = definitions(f"kuberay-{request.param}")
    if folder is None:
        pytest.skip(
            f"no definitions of KubeRay {request.param}: python -m tests.definitions FOLDER, VIT_DEFINITIONS=FOLDER"
        )
    files = (folder / f"ray.io_{kind}.yaml" for kind in ("rayclusters", "rayjobs", "raycronjobs"))
    return dict(validator(file, "v1") for file in files)


@pytest.fixture(scope="session")
def kueue_definitions() -> dict:
    """{kind: validator of kueue.x-k8s.io/v1beta2}"""
    folder = definitions(f"kueue-{KUEUE}")
    if folder is None:
        pytest.skip(f"no definitions of Kueue {KUEUE}: python -m tests.definitions FOLDER, VIT_DEFINITIONS=FOLDER")
    kinds = ("resourceflavors", "clusterqueues", "localqueues")
    return dict(validator(folder / f"kueue.x-k8s.io_{kind}.yaml", "v1beta2") for kind in kinds)
