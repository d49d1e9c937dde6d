"""Learning rates compared with the numbers of the paper's recipes."""

import re

import pytest

from pipeline.training.schedule import ScheduleConfig, learning_rate, schedule_warning


def rate(step, **config):
    config = ScheduleConfig(**config)
    return learning_rate(config, step, peak=8e-4, total=100_000, warmup=10_000, cooldown=20_000)


def test_linear_ends_where_the_reference_code_ends():
    assert rate(0, kind="linear", end=1e-5) == 0
    assert rate(5_000, kind="linear", end=1e-5) == pytest.approx(4e-4)
    assert rate(10_000, kind="linear", end=1e-5) == pytest.approx(8e-4)
    assert rate(55_000, kind="linear", end=1e-5) == pytest.approx((8e-4 + 1e-5) / 2)
    assert rate(100_000, kind="linear", end=1e-5) == pytest.approx(1e-5)


def test_cosine():
    assert rate(55_000, kind="cosine") == pytest.approx(4e-4)
    assert rate(100_000, kind="cosine") == pytest.approx(0, abs=1e-12)


def test_rsqrt_with_cooldown():
    assert rate(40_000, kind="rsqrt") == pytest.approx(8e-4 / 2)  # sqrt(1 + 30000 / 10000)
    assert rate(90_000, kind="rsqrt") == pytest.approx(8e-4 / 3 * 0.5)
    assert rate(100_000, kind="rsqrt") == 0


def test_no_warm_up_starts_at_the_peak():
    config = ScheduleConfig(kind="cosine")
    assert learning_rate(config, 0, peak=1.0, total=10, warmup=0) == 1.0


@pytest.mark.parametrize(
    ("kind", "warmup", "cooldown", "message"),
    [
        ("cosine", 100, 0, ""),
        ("cosine", 101, 0, r"schedule.warmup 101steps \(101 steps\) is longer than the run of 100 steps"),
        ("rsqrt", 60, 40, ""),
        ("rsqrt", 60, 41, r"schedule.warmup .* and schedule.cooldown .* are together longer"),
        ("constant", 0, 101, r"schedule.cooldown 101steps \(101 steps\) is longer"),
        ("cosine", 0, 10, "schedule.cooldown 10steps has no effect, because schedule.kind cosine"),
        ("linear", 10, 10, "schedule.cooldown 10steps has no effect"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_described(kind, warmup, cooldown, message):
    config = ScheduleConfig(kind=kind, warmup=f"{warmup}steps", cooldown=f"{cooldown}steps")
    text = schedule_warning(config, total=100, warmup=warmup, cooldown=cooldown)
    assert re.match(message, text) if message else text == ""
