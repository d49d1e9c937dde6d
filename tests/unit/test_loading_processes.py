"""ProcessLoader delivers the batches of Loader, and its processes end with it."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from pipeline.data import Loader, open_dataset
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.processes import ProcessLoader, default_processes
from pipeline.data.mixture import open_data
from pipeline.errors import UserError
from tests.images import jpeg

OPTIONS = {"batch_size": 16, "lanes": 8, "seed": 3, "shuffle_window": 64}
STRONG = Augment(size=16, randaug_layers=2, randaug_magnitude=10, mixup=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """203 images, one of them not decodable; 60 others; 90 with several labels."""
    root = tmp_path_factory.mktemp("data")
    pictures = [jpeg(seed, 20, 24) for seed in range(203)]
    pictures[50] = b"\xff\xd8 no image"
    rows = [(f"k{i:03d}", data, i % 7, 20, 24) for i, data in enumerate(pictures)]
    write_dataset(f"{root}/one", rows, classes=list("abcdefg"), row_group_bytes=12_000)
    write_dataset(f"{root}/other", rows[100:160], classes=list("abcdefg"), row_group_bytes=12_000)
    several = [(f"m{i:03d}", data, list(range(i % 3)), 20, 24) for i, data in enumerate(pictures[100:190])]
    write_dataset(f"{root}/several", several, classes=list("abcdefg"), multilabel=True)
    return root


def batches(loader, steps):
    with loader:
        found = []
        while len(found) < steps:
            for batch in loader:
                found.append(batch)
                if len(found) == steps:
                    break
        return found, loader.state(), loader.counters, dict(loader.replaced)


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            same = left[name] == right[name] if name == "key" else torch.equal(left[name], right[name])
            assert same, name


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("one", {"augment": STRONG, "epoch": 2, "step": 5}),
        ("one", {"augment": Augment(size=16), "patch_size": 8, "patch_keep_rate": 0.5, "rank": 1, "world_size": 2}),
        ("several", {"augment": Augment(size=16), "drop_last": True}),
        ("mixture", {"augment": STRONG, "drop_last": True}),
    ],
)
def test_batches_of_processes_are_those_of_threads(folder, data, options):
    """Over the end of an epoch, with a short last batch, and with a replaced image."""
    text = f"{folder}/one=0.7,{folder}/other=0.3" if data == "mixture" else f"{folder}/{data}"
    dataset = open_data(text)
    expected, state, counters, replaced = batches(Loader(dataset, **OPTIONS, **options), 15)
    found, *rest = batches(ProcessLoader(dataset, processes=2, threads=2, **OPTIONS, **options), 15)
    assert_same(found, expected)
    assert rest[0] == state
    assert rest[2] == replaced
    assert rest[1].keys() == counters.keys()
    assert rest[1]["reads"] >= len(dataset.row_groups)


def test_a_replaced_image_is_reported_in_the_training_process_and_counts_against_the_limit(folder, caplog):
    dataset = open_dataset(f"{folder}/one")
    options = {**OPTIONS, "augment": Augment(size=16)}
    with caplog.at_level(logging.WARNING, "pipeline"):
        *_, counters, replaced = batches(ProcessLoader(dataset, processes=2, threads=2, **options), 13)
    assert list(replaced) == ["k050"]
    assert counters["replaced"] == 1
    assert sum("k050 cannot be decoded" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(UserError, match="more than max_replaced 0; the last one is k050"):
        batches(ProcessLoader(dataset, processes=2, threads=2, max_replaced=0, **options), 13)


def test_settings_that_cannot_work(folder):
    dataset = open_dataset(f"{folder}/one")
    with pytest.raises(UserError, match="3 loading processes cannot share 8 lanes"):
        ProcessLoader(dataset, processes=3, threads=3, **OPTIONS)
    with pytest.raises(UserError, match="batch_size 16 is not divisible by lanes 5"):
        ProcessLoader(dataset, processes=2, threads=2, **{**OPTIONS, "lanes": 5})
    assert [default_processes(dataset, threads, 8) for threads in (1, 3, 4, 8, 14)] == [1, 2, 4, 8, 8]
    assert default_processes(dataset, 14, 1) == 1


def children():
    return {process.pid for process in psutil.Process().children()}


def ended(pids):
    for _ in range(400):
        if not any(psutil.pid_exists(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_processes_end_with_the_loader(folder):
    dataset, before = open_dataset(f"{folder}/one"), children()
    with ProcessLoader(dataset, processes=2, threads=2, **OPTIONS) as loader:
        next(iter(loader))
        mine = children() - before
        assert len(mine) == 2
    assert ended(mine)
    forgotten = ProcessLoader(dataset, processes=2, threads=2, **OPTIONS)
    next(iter(forgotten))
    mine = children() - before
    del forgotten
    assert ended(mine)


def test_a_process_that_dies_is_an_error(folder):
    dataset, before = open_dataset(f"{folder}/one"), children()
    with ProcessLoader(dataset, processes=2, threads=2, **OPTIONS) as loader:
        stream = iter(loader)
        next(stream)
        os.kill(max(children() - before), signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"has ended with exit code -9; .* --loading-processes"):
            list(itertools.islice(stream, 20))


def test_processes_end_when_the_training_process_is_killed(folder):
    program = (
        "import psutil\n"
        "from pipeline.data import open_dataset\n"
        "from pipeline.data.loading.processes import ProcessLoader\n"
        f"loader = ProcessLoader(open_dataset('{folder}/one'), processes=2, threads=2, batch_size=16, lanes=8)\n"
        "next(iter(loader))\n"
        "print(*(p.pid for p in psutil.Process().children()), flush=True)\n"
        "input()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    trainer = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) == 2
    trainer.kill()
    trainer.wait()
    assert ended(pids)
