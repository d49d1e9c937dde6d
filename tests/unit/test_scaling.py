"""The scaling model compared with known values: limits, communication volumes of the papers, bandwidths."""

import pytest

from pipeline.operations import scaling
from pipeline.operations.planning.config import PlanConfig
from pipeline.operations.planning.estimate import plan
from pipeline.operations.scaling import Link, sent_bytes, step_seconds
from pipeline.training.recipes import RECIPES

NVLINK = Link(inside=450e9, outside=50e9)


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_bytes_by_stage_are_those_of_the_zero_paper(stage, passes):
    """arXiv 1910.02054, section 7: 2 Psi numbers a step for stages 1 and 2, 3 Psi for stage 3, on many workers."""
    assert sent_bytes(1_000_000, stage, 10_000, width=2) == pytest.approx(passes * 2e6, rel=1e-3)


def test_bytes_grow_with_micro_batches_where_gradients_are_reduced_in_each():
    once, four = (sent_bytes(1000, 2, 2, accumulation=n) for n in (1, 4))
    assert four / once == 5 / 2
    assert sent_bytes(1000, 1, 2, accumulation=4) == sent_bytes(1000, 1, 2)
    assert sent_bytes(1000, 3, 2, accumulation=4) == 4 * sent_bytes(1000, 3, 2)


def test_a_worker_alone_only_computes():
    assert step_seconds(0.5, 10**9, 1, 1, NVLINK) == 0.5
    assert sent_bytes(10**9, 3, 1) == 0


def test_a_ring_over_nodes_has_the_networks_speed():
    inside, outside = (step_seconds(0.0, 10**9, 1, n, Link(inside=450e9, outside=50e9, latency=0)) for n in (8, 16))
    assert inside == pytest.approx(2 * 2e9 * 7 / 8 / 450e9)
    assert outside == pytest.approx(2 * 2e9 * 15 / 16 / 50e9)


def test_communication_hides_behind_the_backward_pass_only():
    alone = step_seconds(0.3, 10**9, 1, 16, NVLINK)
    assert step_seconds(0.3, 10**9, 1, 16, NVLINK, overlap=1.0) == pytest.approx(max(0.3, alone - 0.2))
    assert step_seconds(10.0, 10**9, 1, 16, NVLINK, overlap=1.0) == 10.0


@pytest.fixture(scope="module")
def rows():
    planned = plan(PlanConfig(training=RECIPES["b16_imagenet"](), gpus=8), "b16_imagenet")
    return scaling.simulate(planned, counts=(1, 8, 64, 512)), planned


def test_weak_scaling_keeps_the_work_and_strong_the_batch(rows):
    rows, plan = rows
    by = {(row["mode"], row["stage"], row["gpus"]): row for row in rows}
    assert by["weak", 1, 512]["images_per_gpu"] == by["weak", 1, 1]["images_per_gpu"] == 512
    assert by["strong", 1, 512]["images_per_gpu"] * 512 == by["strong", 1, 1]["images_per_gpu"] == 4096
    assert by["weak", 1, 1]["images_per_second"] == pytest.approx(plan["run"]["images_per_second"] / 8)
    for stage in (1, 2, 3):
        weak, strong = ([by[mode, stage, n]["efficiency"] for n in (1, 8, 64, 512)] for mode in ("weak", "strong"))
        assert weak[0] == strong[0] == 1
        assert weak == sorted(weak, reverse=True)
        assert strong == sorted(strong, reverse=True)
        assert strong[-1] < weak[-1]
        assert by["strong", stage, 512]["efficiency"] <= by["strong", 1, 512]["efficiency"]


def test_launching_kernels_limits_a_small_batch_on_many_gpus(rows):
    """With 8 of 4096 images on each GPU, a step takes as long as with 200."""
    rows, plan = rows
    strong = {row["gpus"]: row for row in rows if (row["mode"], row["stage"]) == ("strong", 1)}
    assert strong[512]["images_per_gpu"] == 8
    assert plan["run"]["launch_seconds"] < strong[512]["step_seconds"] < 1.2 * plan["run"]["launch_seconds"]
    assert strong[512]["efficiency"] < 0.1
    assert strong[8]["efficiency"] > 0.9


def test_a_slower_network_is_slower(rows):
    _, plan = rows
    slow, fast = (scaling.simulate(plan, (16,), stages=(1,), network=n)[0]["efficiency"] for n in (1, 400))
    assert slow < fast


def test_the_figure_and_the_table(rows, tmp_path):
    rows, _ = rows
    scaling.draw(rows, str(tmp_path / "scaling.png"), "b16")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "strong, ZeRO-3" in scaling.scaling_table(rows)
