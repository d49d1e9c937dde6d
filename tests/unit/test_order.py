"""The sample order: every sample once, the same for any number of workers, resumable at any step, cheap to compute."""

import cProfile
import pstats

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loading.order import WINDOWS, Order, bits, default_lanes, uniform
from pipeline.errors import UserError

FROZEN_BITS = [13881986062148240272, 6065279026603622420]
FROZEN_BATCH = [[[2, 3], [0, 0]], [[0, 1], [0, 2]]]


@st.composite
def orders(draw):
    rows = np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=12)))
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    return {
        "rows": rows,
        "seed": draw(st.integers(0, 2**63)),
        "epoch": draw(st.integers(0, 1000)),
        "lanes": lanes,
        "batch_size": lanes * draw(st.integers(1, 5)),
        "shuffle_window": draw(st.integers(1, 100)),
    }


@given(orders())
@settings(max_examples=60, deadline=None)
def test_every_sample_once_but_for_a_remainder_smaller_than_the_lanes(arguments):
    order = Order(**arguments)
    lanes = range(arguments["lanes"])
    positions = np.concatenate([order.batch(step, lanes).ravel() for step in range(order.steps)] or [np.empty(0)])
    total = int(arguments["rows"].sum())
    assert len(np.unique(positions)) == len(positions)
    assert 0 <= total - len(positions) < arguments["lanes"]
    samples = list(zip(*(part.tolist() for part in order.locate(positions.astype(int))), strict=True))
    assert len(set(samples)) == len(samples)
    assert all(0 <= row < arguments["rows"][group] for group, row in samples)


@given(orders(), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_step_needs_no_history_and_all_ranks_together_form_the_same_batch(arguments, step):
    order, lanes = Order(**arguments), arguments["lanes"]
    step = min(step, max(order.steps - 1, 0))
    whole = order.batch(step, range(lanes))
    for world_size in (w for w in (1, 2, 4, 8) if lanes % w == 0):
        share = lanes // world_size
        parts = [Order(**arguments).batch(step, range(r * share, (r + 1) * share)) for r in range(world_size)]
        assert np.array_equal(np.concatenate(parts), whole)


@given(orders())
@settings(max_examples=60, deadline=None)
def test_reads_name_every_row_group_a_step_needs_and_no_other(arguments):
    order, lanes = Order(**arguments), arguments["lanes"]
    for part in (range(lanes), range(lanes // 2, lanes)):
        reads = order.reads(part)
        assert np.all(np.diff(reads[:, 1]) >= 0)
        used = set()
        for step in range(order.steps):
            open_now = set(reads[(reads[:, 1] <= step) & (step <= reads[:, 2]), 0].tolist())
            needed = set(order.locate(order.batch(step, part))[0].ravel().tolist())
            for lane in part:  # a replacement is also read from an open row group
                index = min(step * order.per_lane, order.lane_size - 1)
                needed |= {int(order.locate(np.array([p]))[0][0]) for p in order.replacements(lane, index)}
            assert needed <= open_now
            used |= needed
        assert used == set(reads[:, 0].tolist())


@given(orders())
@settings(max_examples=40, deadline=None)
def test_replacements_are_the_rest_of_the_window(arguments):
    order = Order(**arguments)
    if not order.lane_size:
        return
    window = min(order.window, order.lane_size)
    at = [int(order.batch(i // order.per_lane, range(1))[0, i % order.per_lane]) for i in range(window)]
    assert list(order.replacements(0, 0)) == at[1:]
    assert list(order.replacements(0, window - 1)) == at[:-1]


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    arguments = {"rows": np.full(50, 20), "batch_size": 100, "lanes": 4, "shuffle_window": 200}
    batch = Order(seed=1, epoch=0, **arguments).batch(3, range(4))
    assert np.array_equal(batch, Order(seed=1, epoch=0, **arguments).batch(3, range(4)))
    for other in (Order(seed=2, epoch=0, **arguments), Order(seed=1, epoch=1, **arguments)):
        assert not np.array_equal(other.permutation, Order(seed=1, epoch=0, **arguments).permutation)
        assert not np.array_equal(other.batch(3, range(4)), batch)


def test_the_order_is_frozen():
    """Runs resume across releases, so these numbers may never change."""
    assert bits(7, WINDOWS, 1, np.arange(2)).tolist() == FROZEN_BITS
    order = Order(np.array([5, 3, 4, 6]), seed=7, epoch=2, batch_size=4, lanes=2, shuffle_window=6)
    groups, rows = order.locate(order.batch(1, range(2)))
    assert [groups.tolist(), rows.tolist()] == FROZEN_BATCH


def test_random_numbers_are_uniform_and_independent_of_each_other():
    draws = uniform(3, WINDOWS, 0, np.arange(50_000)[:, None], np.arange(6))
    assert np.allclose(draws.mean(axis=0), 0.5, atol=0.006)
    assert np.allclose(draws.var(axis=0), 1 / 12, atol=0.002)
    assert np.allclose(np.corrcoef(draws.T), np.eye(6), atol=0.02)
    assert np.allclose(np.corrcoef(draws[:-1, 0], draws[1:, 0]), np.eye(2), atol=0.02)
    assert draws.min() >= 0
    assert draws.max() < 1


def test_shuffling_mixes_across_the_whole_dataset():
    """The correlation of storage position and time equals that of a random order."""
    order = Order(np.full(200, 100), seed=0, epoch=0, batch_size=64, lanes=16, shuffle_window=4096)
    groups, rows = order.locate(np.concatenate([order.batch(s, range(16)).ravel() for s in range(order.steps)]))
    stored = groups * 100 + rows
    assert abs(np.corrcoef(stored, np.arange(len(stored)))[0, 1]) < 0.04
    distinct = [len(np.unique(order.locate(order.batch(s, range(16)))[0])) for s in range(order.steps)]
    assert np.mean(distinct) >= 16


def test_three_hundred_million_images_need_few_calls_and_little_memory():
    """It takes 0.1 s. Calls are counted instead, because a loaded machine is slow: none is made for each row group."""
    rows = np.full(300_000, 1_010)
    with cProfile.Profile() as profile:
        order = Order(rows, seed=1, epoch=3, batch_size=4096, lanes=64, shuffle_window=16_384)
        reads = order.reads(range(64))
        order.locate(order.batch(50_000, range(64)))
    assert pstats.Stats(profile).total_calls < 60_000
    assert reads.nbytes + order.starts.nbytes + order.ends.nbytes + order.permutation.nbytes < 20e6


@pytest.mark.parametrize(
    ("batch_size", "samples", "lanes"),
    [(4096, 10**8, 64), (512, 10**6, 64), (96, 10**6, 48), (1, 10**6, 1), (7, 10**6, 1), (512, 1000, 32), (32, 5, 1)],
)
def test_default_lanes(batch_size, samples, lanes):
    assert default_lanes(batch_size, samples) == lanes


def test_lanes_must_divide_the_batch():
    with pytest.raises(UserError, match=r"batch_size 100 is not divisible by lanes 64.*--lanes 50"):
        Order(np.array([1000]), seed=0, epoch=0, batch_size=100, lanes=64, shuffle_window=1)
