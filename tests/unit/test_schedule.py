"""Learning rates compared with the numbers of the paper's recipes."""

import pytest

from pipeline.training.schedule import ScheduleConfig, learning_rate


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
