"""Parallel listing with Ray tasks, and over HTTP with faults."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import storage, workqueue
from pipeline.data.sources import listing, parallel_listing
from pipeline.data.sources.parallel_listing import ParallelListing
from pipeline.errors import UserError
from tests.faultproxy import FaultProxy

NAMES = [f"{'nested/' * (i % 3)}{i % 7}/{i:04d}.jpg" for i in range(80)]


def small_units(folder):
    return ParallelListing(folder=str(folder), tasks=4, small_files=0, small_seconds=0, unit_seconds=0)


def test_ray_tasks_list_what_one_process_lists(ray_local, tmp_path, caplog):
    caplog.set_level("INFO", "pipeline")
    photos = tmp_path / "photos"
    for name in NAMES:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(name.encode())
    found = parallel_listing.list_source(str(photos), small_units(tmp_path / "work"))
    assert found.equals(listing.list_source(str(photos)))
    assert found.num_rows == len(NAMES)
    assert "listing it with 4 tasks" in caplog.text


def test_an_error_of_a_ray_task_is_raised_on_the_driver(ray_local, tmp_path):
    work = small_units(tmp_path / "work")
    storage.write_json(storage.join(work.parts(str(tmp_path / "none")), "begun.json"), {"began": 9e9})
    with pytest.raises(UserError, match="no such folder on a node"):
        parallel_listing.list_source(str(tmp_path / "none"), work)


def test_every_listing_request_fails_once(cloud, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write_bytes(f"{cloud.uri}/photos/{name}", name.encode()), NAMES))
    uri = f"{cloud.uri}/photos"
    expected = listing.list_source(uri)
    with FaultProxy(cloud.server) as proxy, workqueue.without_ray():
        monkeypatch.setenv(*cloud.at(proxy.endpoint))
        proxy.fault = lambda method, path, n: "503" if n == 1 and method == "GET" else None
        assert parallel_listing.list_source(uri, small_units(f"{cloud.uri}/work")).equals(expected)
    assert sum(fault == "503" for _, _, fault in proxy.log) >= 5
