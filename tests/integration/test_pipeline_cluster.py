"""A pipeline on a Ray cluster of several nodes that loses the runner, a stage, the node of a stage, and its head."""

import contextlib
import json
import subprocess
import uuid
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.graph import state
from tests.jobprocess import running_jobs, wait_for
from tests.ports import free_port
from tests.rayhead import BIN, kill_marked, ray_head, ray_node

ROOT = Path(__file__).parents[2]
SMALL = ("--object-store-memory=200000000",)
STAGES = {
    "data": {"job": "prepare", "recipe": "demo_digits", "fields": {"tracking": False, "num_cpus": 1}},
    "pretrain": {
        "job": "pretrain",
        "recipe": "demo",
        "fields": {
            "data": "${data.output}/train",
            "validation": None,
            "steps": 80,
            "workers": 1,
            "checkpoint_every": "5steps",
        },
    },
}


class Cluster:
    """A head without memory for entry points, and nodes with memory, so that stages run on nodes that can be lost."""

    def __init__(self, home: Path) -> None:
        self.home, self.token = home, uuid.uuid4().hex * 2
        self.port, self.dashboard = free_port(), free_port()
        self.stack = contextlib.ExitStack()
        self.marks: dict[str, str] = {}

    def start_head(self) -> None:
        self.marks["head"] = uuid.uuid4().hex
        more = ("--memory=100000000", "--num-cpus=0", *SMALL)
        options = {"port": self.port, "dashboard": self.dashboard, "more": more, "mark": self.marks["head"]}
        head = self.stack.enter_context(ray_head(self.home, self.token, **options))
        self.address, _, self.environment = head

    def start_node(self) -> None:
        self.marks["node"] = uuid.uuid4().hex
        more = ("--num-cpus=2", "--memory=4000000000", *SMALL)
        self.stack.enter_context(ray_node(self.port, self.environment, self.marks["node"], more))

    def submit(self, place: Path, *options: str) -> None:
        """The runner as a job on the head, as infra/ submits it to clusters whose image has the project.

        The project cannot be uploaded here, because all nodes of one machine unpack it into the same folder.
        """
        variables = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{self.home}/mlflow.db"}
        command = [BIN / "ray", "job", "submit", f"--address={self.address}", *options]
        command += [f"--runtime-env-json={json.dumps({'env_vars': variables})}", "--"]
        command += ["python", str(ROOT / "jobs" / "pipeline.py"), "run", str(place)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=2400)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    with made.stack:
        made.start_head()
        made.start_node()
        yield made


def written(folder, name):
    place = folder / f"{name}.yaml"
    place.write_text(yaml.safe_dump({"name": name, "output": str(folder / name), "stages": STAGES}))
    return place


def committed(folder, name):
    return list((folder / name / "pretrain").glob("*/checkpoints/*/COMMIT.json"))


def trainings(folder):
    """{process id: process} of the entry points of the stage that trains."""
    return {process.pid: process for process in running_jobs(folder / "lost", "pretrain")}


def runners(place):
    """The entry points of the pipeline itself."""
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == ["run", str(place)]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_runner_a_killed_stage_a_lost_node_and_a_lost_head_are_survived(cluster, tmp_path):
    place = written(tmp_path, "lost")
    cluster.submit(place, "--no-wait")
    wait_for(lambda: trainings(tmp_path), 1200)
    for runner in runners(place):
        runner.kill()
    (first,) = trainings(tmp_path).values()
    cluster.submit(place, "--no-wait")
    wait_for(lambda: committed(tmp_path, "lost"), 1200)
    assert list(trainings(tmp_path).values()) == [first]  # the training continued under the next runner
    first.kill()
    wait_for(lambda: set(trainings(tmp_path)) - {first.pid}, 1200)
    node = cluster.marks["node"]
    assert {process.environ().get("VIT_TEST_NODE") for process in trainings(tmp_path).values()} == {node}
    kill_marked(node)  # with the entry point of the stage
    assert not trainings(tmp_path)
    cluster.start_node()
    wait_for(lambda: trainings(tmp_path), 1200)
    kill_marked(cluster.marks["head"])  # with the runner; the node and its stage work on for a while
    cluster.start_head()
    cluster.start_node()
    cluster.submit(place)
    records = state.load(str(tmp_path / "lost")).records
    assert {name: len(record.versions) for name, record in records.items()} == {"data": 1, "pretrain": 1}
    assert records["data"].versions[0].cost["attempts"] == 1
    assert records["pretrain"].versions[0].result["steps"] == 80
    assert records["pretrain"].versions[0].cost["attempts"] >= 4  # of the stage, the node and the head, and the last
