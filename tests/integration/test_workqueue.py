"""Resumable work: units with a receipt are skipped, and errors belong to their unit, with Ray and in process."""

import contextlib
import logging
import os
import sys

import pytest
from ray import cloudpickle

from pipeline import storage, workqueue
from pipeline.errors import JobFailed, UserError
from pipeline.workqueue import Receipts

logger = logging.getLogger("pipeline.tests")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray workers cannot import a test file


def square(unit, context):
    logger.info("unit %d", unit)
    with open(f"{context}/{unit}.calls", "a") as file:
        file.write("x")
    if unit == 3:
        raise UserError("three is wrong")
    return {"square": unit * unit, "large": "x" * 1000}


class Squares:
    def __init__(self, context):
        self.folder = context

    def __call__(self, unit):
        return square(unit, self.folder)


def go(tmp_path, work, **options):
    units = {f"unit-{i}": i for i in range(6)}
    outcomes = workqueue.run(
        units,
        work,
        receipts=Receipts(str(tmp_path / "receipts")),
        context=str(tmp_path),
        summary=lambda receipt: receipt["square"],
        **options,
    )
    return {outcome.name: outcome for outcome in outcomes}


@pytest.mark.parametrize("work", [square, Squares])
@pytest.mark.parametrize("in_process", [True, False])
def test_a_finished_unit_is_not_done_again(ray_local, tmp_path, work, in_process):
    where = workqueue.without_ray if in_process else contextlib.nullcontext
    workers = None if work is square else 1
    with where():
        first = go(tmp_path, work, workers=workers)
    assert {name: o.summary for name, o in first.items() if not o.error} == {
        f"unit-{i}": i * i for i in (0, 1, 2, 4, 5)
    }
    assert str(first["unit-3"].error) == "three is wrong"
    storage.remove(Receipts(str(tmp_path / "receipts")).uri("unit-1"))
    with where():
        again = go(tmp_path, work, workers=workers)
    assert set(again) == {"unit-1", "unit-3"}
    calls = {path.stem: len(path.read_text()) for path in tmp_path.glob("*.calls")}
    assert calls == {"0": 1, "1": 2, "2": 1, "3": 2, "4": 1, "5": 1}
    receipts = Receipts(str(tmp_path / "receipts")).read(["unit-2", "unit-1"])
    assert [receipt["square"] for receipt in receipts] == [4, 1]


def test_records_of_workers_are_logged_on_the_driver(ray_local, tmp_path, caplog):
    logging.getLogger("pipeline").propagate = True
    with caplog.at_level(logging.INFO, "pipeline"):
        go(tmp_path, square)
    assert {f"unit {i}" for i in (0, 1, 2, 4, 5)} <= set(caplog.messages)


@pytest.mark.parametrize("cpus", [0, 1, 2, 7, 64])
def test_tasks_take_several_small_units_first_and_one_each_at_the_end(cpus):
    small = workqueue.group_units([10 << 20] * 37, cpus)
    assert [unit for share in small for unit in share] == list(range(37))
    counts = [len(share) for share in small]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == {0: 1, 1: 4, 2: 4, 7: 2, 64: 1}[cpus]
    assert counts[-max(cpus, 1) :] == [1] * min(max(cpus, 1), len(counts))
    assert all(len(share) <= 2 for share in workqueue.group_units([100 << 20] * 37, cpus))
    assert workqueue.group_units([1 << 30] * 5, cpus) == [[unit] for unit in range(5)]


def fail(error):
    if error is SystemExit:
        os._exit(1)
    raise error("wrong")


def test_the_error_of_a_task_keeps_its_type(ray_local):
    with pytest.raises(UserError, match=r"^wrong$") as caught:
        workqueue.map_tasks(fail, [UserError] * 3)
    assert caught.value.__cause__ is None
    with pytest.raises(ValueError, match=r"^wrong$") as failed:
        workqueue.map_tasks(fail, [ValueError] * 3)
    assert "in fail" in str(failed.value.__cause__)  # the traceback of the task


def test_a_process_that_dies_repeatedly_is_one_line(ray_local):
    with pytest.raises(JobFailed, match=r"^[^\n]*the same command continues[^\n]*$"):
        workqueue.map_tasks(fail, [SystemExit] * 3)
