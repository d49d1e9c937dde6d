"""The loader with S3: real clients use HTTP to a real server process, through a proxy that injects faults."""

import itertools
import os
import threading
import time

import cv2
import numpy as np
import pytest
import simplejpeg
import torch

from pipeline import retry
from pipeline.data import Loader, open_dataset
from pipeline.data.format import write_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.processes import ProcessLoader
from pipeline.errors import StorageError, UserError
from pipeline.stores import base
from tests.faultproxy import FaultProxy

OPTIONS = {"batch_size": 16, "lanes": 4, "augment": Augment(size=16), "shuffle_window": 32, "threads": 2}


def rows(n=120):
    for i in range(n):
        image = cv2.resize(np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8), (40, 32))
        yield f"k{i:03d}", simplejpeg.encode_jpeg(image), i % 3, 40, 32


@pytest.fixture(scope="module")
def written():
    """The dataset that the first test writes to the server, for all tests."""
    return []


@pytest.fixture
def dataset(s3, s3_server, written, monkeypatch):
    """120 images in about ten row groups on S3, and the proxy through which the loader's own client reaches it."""
    if not written:
        write_dataset(f"{s3}/data", rows(), classes=list("abc"), row_group_bytes=12_000, shard_bytes=40_000)
        written.append(open_dataset(f"{s3}/data"))
    assert len(written[0].row_groups) > 6
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield written[0], proxy


@pytest.fixture
def on_disk(tmp_path):
    """One epoch of the same dataset, read from a local folder."""
    sizes = {"row_group_bytes": 12_000, "shard_bytes": 40_000}
    write_dataset(f"{tmp_path}/data", rows(), classes=list("abc"), **sizes)
    return epoch(open_dataset(f"{tmp_path}/data"))[0]


def epoch(dataset, **options):
    with Loader(dataset, **OPTIONS | options) as loader:
        batches = [(batch["key"], batch["image"].clone()) for batch in loader]
    return batches, loader.counters


def same(a, b):
    return len(a) == len(b) and all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


def gets(proxy):
    return [fault for method, path, fault in proxy.log if method == "GET" and path.endswith(".parquet")]


def test_one_range_request_per_row_group_and_the_same_batches_as_from_disk(dataset, on_disk):
    data, proxy = dataset
    batches, counters = epoch(data)
    assert same(batches, on_disk)
    assert counters["retries"] == 0
    assert {method for method, _, _ in proxy.log} == {"GET"}  # no listing, no HEAD, no footer
    assert len(proxy.log) == counters["reads"]


def test_temporary_faults_are_retried_and_counted_and_change_nothing(dataset, on_disk, monkeypatch):
    data, proxy = dataset
    monkeypatch.setattr(base, "READ_TIMEOUT", 2)
    proxy.stall = 4.0
    kinds, lock = itertools.cycle(["500", "503", "reset", "cut", "short", "stall", "slow"]), threading.Lock()

    def fault(method, path, n):
        with lock:
            return next(kinds) if n == 1 else None

    proxy.fault = fault
    batches, counters = epoch(data)
    assert same(batches, on_disk)
    injected = [kind for kind in gets(proxy) if kind not in (None, "slow")]  # slow responses are not failures
    assert {"500", "503", "reset", "cut", "short", "stall"} <= set(injected)
    assert counters["retries"] >= len(injected)
    assert counters["retries"] + counters["reads"] == len(proxy.log)  # every request that failed was counted


@pytest.mark.parametrize("kind", ["503", "reset", "cut"])
def test_a_shard_that_stays_unreadable_is_named(dataset, monkeypatch, kind):
    data, proxy = dataset
    monkeypatch.setattr(retry, "PATIENCE", 1.0)
    shard = data.manifest.shards[1].name
    proxy.fault = lambda method, path, n: kind if path.endswith(shard) else None
    with pytest.raises(StorageError, match=rf"{shard}: no answer after \d attempts? in 1 s"):
        epoch(data)


def test_several_processes_read_the_same_batches_and_report_an_outage_as_one(dataset, on_disk, monkeypatch, tmp_path):
    data, proxy = dataset
    options = {**OPTIONS, "processes": 2, "cache_dir": str(tmp_path / "cache")}
    with ProcessLoader(data, **options) as loader:
        assert same([(batch["key"], batch["image"].clone()) for batch in loader], on_disk)
        assert loader.counters["reads"] >= len(data.row_groups)
    assert list((tmp_path / "cache").iterdir())
    monkeypatch.setenv(retry.VARIABLE, "1")
    proxy.fault = lambda method, path, n: "reset"
    options["cache_dir"] = str(tmp_path / "other")
    with ProcessLoader(data, **options) as loader, pytest.raises(StorageError, match=r"no answer after \d+ attempt"):
        list(loader)


def test_the_loader_waits_for_the_end_of_an_outage(dataset, on_disk):
    data, proxy = dataset
    back = time.monotonic() + 4
    proxy.fault = lambda method, path, n: "reset" if time.monotonic() < back else None
    batches, counters = epoch(data)
    assert same(batches, on_disk)
    assert counters["retries"] >= 5


@pytest.mark.parametrize(("kind", "message"), [("403", "access denied"), ("404", "missing, or shorter")])
def test_permanent_errors_fail_at_once(dataset, kind, message):
    data, proxy = dataset
    proxy.fault = lambda method, path, n: kind
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        epoch(data)
    assert time.monotonic() - start < 5
    assert len(gets(proxy)) <= len(data.row_groups) + 4  # each once


def test_the_cache_saves_requests_and_stays_within_its_limit(dataset, on_disk, tmp_path):
    data, proxy = dataset
    cache = tmp_path / "cache"
    total = int((data.row_groups["end"] - data.row_groups["start"]).sum())
    assert same(epoch(data, cache_dir=str(cache))[0], on_disk)
    assert len(list(cache.iterdir())) == len(data.row_groups)
    assert not list(cache.glob("*.tmp"))
    before = len(proxy.log)
    batches, counters = epoch(data, cache_dir=str(cache))
    assert same(batches, on_disk)
    assert len(proxy.log) == before
    assert counters["cache_hits"] == counters["reads"]

    victim = next(cache.iterdir())  # a file cut short, as by a full disk, is fetched again
    victim.write_bytes(victim.read_bytes()[:100])
    assert same(epoch(data, cache_dir=str(cache))[0], on_disk)
    assert len(proxy.log) > before

    small = tmp_path / "small"
    assert same(epoch(data, cache_dir=str(small), cache_bytes=total // 2)[0], on_disk)
    assert 0 < sum(os.path.getsize(file) for file in small.iterdir()) <= total // 2


def test_the_workers_of_a_node_fill_one_cache(dataset, tmp_path):
    data, proxy = dataset
    shared = {"cache_dir": str(tmp_path / "cache"), "world_size": 2}
    for number in range(3):
        before = len(gets(proxy))
        for rank in range(2):
            epoch(data, rank=rank, epoch=number, **shared)
        requests = len(gets(proxy)) - before
        if number == 0:
            assert requests == len(data.row_groups)
        else:
            assert requests == 0  # although each worker reads other row groups than before


def test_closing_does_not_wait_for_an_unavailable_store(dataset):
    data, proxy = dataset
    proxy.fault = lambda method, path, n: "503"
    loader = Loader(data, **OPTIONS)
    loader.enqueue()
    while loader.counters["retries"] < 12:  # some reads wait half a second or more before a retry
        time.sleep(0.05)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 20  # the reads would go on for minutes
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read", "decode"))]
