"""Ray's autoscaler with the node types of infra/ray-up/ and a simulated clock (tests/benchmarks/autoscaling_day.py)."""

import copy
from pathlib import Path

import pytest
import yaml

from tests.benchmarks.autoscaling_day import BOOT_MINUTES, STEP, Job, costs, main, simulate

RAY_UP = sorted((Path(__file__).parents[2] / "infra" / "ray-up").glob("*.yaml"))


@pytest.fixture(params=RAY_UP, ids=lambda path: path.name)
def config(request) -> dict:
    return yaml.safe_load(request.param.read_text())


def nodes(samples, kind: str) -> list[int]:
    return [sample.nodes[kind] for sample in samples]


def cpu_nodes(config: dict, cpus: int) -> int:
    return -(-cpus // config["available_node_types"]["cpu"]["resources"]["CPU"])


def test_prepare_grows_the_cpu_pool_and_releases_it(config):
    prepare = Job("prepare", "prepare", 1, {"CPU": 1}, tasks=512, minutes=8, at_once=256)
    samples = simulate(config, [prepare], {}, hours=1)
    assert (samples[0].nodes["cpu"], samples[-1].nodes["cpu"]) == (0, 0)
    assert max(nodes(samples, "cpu")) == cpu_nodes(config, 256)
    assert prepare.began - prepare.start == pytest.approx(BOOT_MINUTES, abs=STEP)
    leaves = max(sample.minute for sample in samples if sample.nodes["cpu"])
    assert leaves - prepare.ended == pytest.approx(config["idle_timeout_minutes"], abs=1)
    assert max(nodes(samples, "gpu")) == 0


def test_training_waits_for_all_of_its_nodes_and_continues_after_a_loss(config):
    pretrain = Job("pretrain", "pretrain", 0, {"CPU": 8, "GPU": 1}, tasks=16, minutes=60, gang=True)
    samples = simulate(config, [pretrain], {30.0: ("gpu", 1)}, hours=2)
    assert {sample.busy["gpu"] for sample in samples} <= {0, 2}
    assert max(nodes(samples, "cpu")) == 0
    assert 60 + BOOT_MINUTES <= pretrain.ended - pretrain.began <= 60 + BOOT_MINUTES + 10 + 2 * STEP


def test_evaluation_runs_on_idle_nodes(config):
    pretrain = Job("pretrain", "pretrain", 0, {"CPU": 8, "GPU": 1}, tasks=16, minutes=60, gang=True)
    evaluate = Job("evaluate", "evaluate", 20, {"CPU": 1}, tasks=4, minutes=6)
    samples = simulate(config, [pretrain, evaluate], {}, hours=1)
    assert evaluate.began == evaluate.start
    assert (max(nodes(samples, "cpu")), max(nodes(samples, "gpu"))) == (0, 2)


def test_lost_spot_nodes_are_replaced_and_no_task_is_lost(config):
    prepare = Job("prepare", "prepare", 0, {"CPU": 1}, tasks=512, minutes=8, at_once=256)
    samples = simulate(config, [prepare], {10.0: ("cpu", 3)}, hours=1)
    assert prepare.done == 512
    at_loss = next(sample for sample in samples if sample.minute == 10)
    assert at_loss.busy["cpu"] == cpu_nodes(config, 256) - 3
    assert at_loss.nodes["cpu"] == cpu_nodes(config, 256)  # replacements are requested at once


def test_min_workers_stay(config):
    config = copy.deepcopy(config)
    config["available_node_types"]["cpu"]["min_workers"] = 2
    evaluate = Job("evaluate", "evaluate", 10, {"CPU": 1}, tasks=4, minutes=6)
    samples = simulate(config, [evaluate], {}, hours=1)
    assert set(nodes(samples, "cpu")[1:]) == {2}
    assert evaluate.began == evaluate.start
    rows = costs(samples, {"head": 1, "cpu": 2, "gpu": 3})
    assert rows["cpu"]["dollars"] == pytest.approx(2 * 2 * 1, rel=0.01)


def test_a_pool_never_exceeds_its_limit(config):
    most = config["available_node_types"]["cpu"]["max_workers"]
    prepare = Job("prepare", "prepare", 0, {"CPU": 16}, tasks=4 * most, minutes=4)
    assert max(nodes(simulate(config, [prepare], {}, hours=0.1), "cpu")) == most


def test_the_table_of_the_guide_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["autoscaling_day.py"])
    assert main() == 0
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    guide = (RAY_UP[0].parents[2] / "docs" / "clusters.md").read_text()
    for row in rows:
        assert row.replace("|  |", "| |") in guide
