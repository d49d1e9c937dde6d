"""Parallel listing of large sources: the same table as the sequential listing, whatever the layout and the store."""

import contextlib
import os
import random
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from pipeline import storage, workqueue
from pipeline.data import sources
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.sources import keyranges, listing, parallel_listing
from pipeline.data.sources.parallel_listing import ParallelListing
from pipeline.errors import NotRead, StorageError, UserError
from pipeline.stores import SCHEMES
from tests import simulatedstore
from tests.images import jpeg


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setitem(SCHEMES, "sim", simulatedstore.SimulatedStore)
    with workqueue.without_ray():
        yield


def small_units(folder, **options):
    """Every source is large, and every unit lists one page or one folder."""
    return ParallelListing(folder=str(folder), **{"small_files": 0, "small_seconds": 0, "unit_seconds": 0, **options})


def receipts_in(folder):
    return [file for file in storage.list_files(str(folder)) if len(os.path.basename(file.path)) == 29]


@pytest.mark.parametrize("layout", simulatedstore.LAYOUTS)
@pytest.mark.parametrize("store", ["", "folders-"])
def test_the_parallel_listing_of_a_store_equals_the_sequential_one(tmp_path, layout, store):
    uri = f"sim://{store}{layout}-12345-0/photos"
    found = parallel_listing.list_source(uri, small_units(tmp_path))
    assert found.equals(listing.list_source(uri))
    assert 0 < found.num_rows <= 12345
    assert (found.num_rows < 12345) == (layout == "mixed")
    if store == "" or layout in ("nested", "skewed"):
        assert len(receipts_in(tmp_path)) > 8  # the work was divided


def test_the_parallel_listing_of_a_bucket_equals_the_sequential_one(tmp_path, cloud):
    names = [f"{i % 7}/{i:04d}.jpg" for i in range(40)] + ["日本 [1]*?#%20+&.jpg", "a b/<ü>.png", "a b/.git/x.jpg"]
    for name in names:
        storage.write_bytes(f"{cloud.uri}/photos/{name}", name.encode())
    found = parallel_listing.list_source(f"{cloud.uri}/photos", small_units(tmp_path))
    assert found.equals(listing.list_source(f"{cloud.uri}/photos"))
    assert found.num_rows == len(names) - 1


def test_the_parallel_listing_of_a_local_folder_equals_the_sequential_one(tmp_path, caplog):
    photos = tmp_path / "photos"
    for i in range(200):
        folder = photos / ("." * (i % 11 == 0) + f"{i % 5}") / f"{i % 13}" / "x y"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(b"x" * i)
    os.symlink(photos, photos / "1" / "loop")
    os.symlink(photos / "2", photos / "3" / "again")
    (tmp_path / "elsewhere").mkdir()
    for i in range(40):
        (tmp_path / "elsewhere" / f"{i}.jpg").write_bytes(b"z")
    os.symlink(tmp_path / "elsewhere", photos / "3" / "linked")
    os.symlink("nothing", photos / "3" / "dangling.jpg")
    (photos / os.fsdecode(b"\xff.jpg")).write_bytes(b"y")
    caplog.set_level("INFO", "pipeline")
    expected = listing.list_source(str(photos))
    found = parallel_listing.list_source(str(photos), small_units(tmp_path / "work"))
    assert found.equals(expected)
    assert found.num_rows > 200
    ignored = [record.args[1] for record in caplog.records if "hidden or system" in record.message]
    assert len(ignored) == 2
    assert ignored[0] == ignored[1]
    assert len(receipts_in(tmp_path / "work")) > 10


def test_a_small_source_stays_in_the_process_and_leaves_no_files(tmp_path):
    found = parallel_listing.list_source("sim://flat-3000-0/photos", ParallelListing(folder=str(tmp_path / "work")))
    assert found.num_rows == 3000
    assert not (tmp_path / "work").exists()


def test_a_stopped_listing_continues_and_lists_no_page_twice(tmp_path, monkeypatch):
    uri, options = "sim://skewed-15000-0/photos", small_units(tmp_path / "work")
    requests = tmp_path / "requests"
    monkeypatch.setenv("SIMULATED_REQUESTS", str(requests))
    whole = parallel_listing.list_source(uri, options)
    units, before = receipts_in(tmp_path / "work"), requests.stat().st_size
    for file in random.Random(0).sample(units, len(units) // 2):
        storage.remove(file.uri)  # as after a kill: the units with these receipts are open, or were never found
    assert parallel_listing.list_source(uri, options).equals(whole)
    assert requests.stat().st_size < 2 * before
    requests.unlink()
    assert parallel_listing.list_source(uri, options).equals(whole)
    assert not requests.exists()
    options.remove()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("error", "stays"), [(UserError, False), (StorageError, True), (NotRead, True), (None, False)])
def test_a_listing_is_used_again_after_an_outage_and_not_after_an_error_of_the_user(tmp_path, error, stays):
    options = small_units(tmp_path / "work")
    parallel_listing.list_source("sim://flat-3000-0/photos", options)
    with contextlib.suppress(UserError), options.used():
        if error:
            raise error("labels.csv names none of the files")
    assert (tmp_path / "work").exists() == stays


def test_a_damaged_part_of_a_listing_is_named(tmp_path):
    options = small_units(tmp_path / "work")
    parallel_listing.list_source("sim://flat-3000-0/photos", options)
    part = next((tmp_path / "work").rglob("*.arrow"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(NotRead, match=rf"{part.name}: damaged; remove .* and repeat"):
        parallel_listing.list_source("sim://flat-3000-0/photos", options)


def test_an_old_unfinished_listing_begins_again(tmp_path, caplog):
    uri, options = "sim://flat-5000-0/photos", small_units(tmp_path)
    whole = parallel_listing.list_source(uri, options)
    storage.write_json(storage.join(options.parts(uri), "begun.json"), {"uri": uri, "began": 1.0})
    assert parallel_listing.list_source(uri, options).equals(whole)
    assert "begins again" in caplog.text


def test_a_lost_file_of_a_listing_is_an_error(tmp_path):
    uri = "sim://flat-5000-0/photos"
    parallel_listing.list_source(uri, small_units(tmp_path))
    storage.remove(next(file.uri for file in storage.list_files(str(tmp_path)) if file.path.endswith(".arrow")))
    with pytest.raises(NotRead, match="removed while"):
        parallel_listing.list_source(uri, small_units(tmp_path))


def test_refused_pages_are_requested_again(tmp_path, monkeypatch):
    uri = "sim://nested-9000-0/photos"
    expected = listing.list_source(uri)
    monkeypatch.setenv("SIMULATED_FAULTS", "5")
    assert parallel_listing.list_source(uri, small_units(tmp_path)).equals(expected)


def test_an_outage_ends_the_command_which_then_continues(tmp_path, monkeypatch):
    uri = "sim://nested-20000-0/photos"
    monkeypatch.setenv("SIMULATED_FAULTS", "1")
    monkeypatch.setenv("VIT_STORE_PATIENCE", "0.2")
    storage.write_json(storage.join(small_units(tmp_path).parts(uri), "begun.json"), {"uri": uri, "began": 9e9})
    with pytest.raises(StorageError, match="sim://"):
        parallel_listing.list_source(uri, small_units(tmp_path))
    monkeypatch.delenv("SIMULATED_FAULTS")
    assert parallel_listing.list_source(uri, small_units(tmp_path)).equals(listing.list_source(uri))


def test_a_store_that_does_not_list_by_name_as_expected_is_listed_by_one_process(tmp_path, monkeypatch, caplog):
    class Careless(simulatedstore.SimulatedStore):
        """Ignores where a page should begin."""

        def _page(self, uri, recursive, token, limit):
            return super()._page(uri, recursive, None if isinstance(token, simulatedstore.After) else token, limit)

    monkeypatch.setitem(SCHEMES, "sim", Careless)
    uri = "sim://nested-5000-0/careless"
    found = parallel_listing.list_source(uri, small_units(tmp_path))
    assert found.equals(listing.list_source(uri))
    assert "listed by one process" in caplog.text


def test_a_source_of_hidden_files_is_an_error_in_both_listings(tmp_path):
    for i in range(9):
        (tmp_path / "photos" / ".git" / str(i)).mkdir(parents=True)
        (tmp_path / "photos" / ".git" / str(i) / "1.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="only 9 hidden or system files"):
        parallel_listing.list_source(str(tmp_path / "photos"), small_units(tmp_path / "work"))


@pytest.mark.parametrize("layout", simulatedstore.LAYOUTS)
def test_ranges_are_consecutive_and_balanced(layout):
    names = [simulatedstore.LAYOUTS[layout](i, 10_000) for i in range(10_000)]
    ranges = keyranges.divide(lambda after: next_of(names, after), "", None, 64)
    assert ranges[0][0] == ""
    assert ranges[-1][1] is None
    assert all(one[1] == other[0] for one, other in pairwise(ranges))
    sizes = [sum(after < name and (upto is None or name <= upto) for name in names) for after, upto in ranges]
    assert sum(sizes) == len(names)
    if layout in ("flat", "hex", "nested"):
        assert max(sizes) < len(names) / 8


def next_of(names, after):
    i = simulatedstore.bisect.bisect_right(names, after)
    return names[i] if i < len(names) else None


def test_the_successor_of_a_prefix_skips_invalid_code_points():
    assert keyranges.successor("a/") == "a0"
    assert keyranges.successor("x\ud7ff") == "x\ue000"
    assert keyranges.successor("x\U0010ffff") == "y"
    assert keyranges.successor("\U0010ffff") is None


def test_discover_lists_large_sources_in_parallel(tmp_path):
    uri = "sim://nested-9000-0/photos"
    [source] = sources.discover([uri], large=small_units(tmp_path))
    [expected] = sources.discover([uri])
    assert source.fragments.equals(expected.fragments)
    assert receipts_in(tmp_path)


KILLED = """
import sys
from pipeline import workqueue
from pipeline.data.sources import parallel_listing
from tests import simulatedstore
simulatedstore.register()
with workqueue.without_ray():
    how = parallel_listing.ParallelListing(folder=sys.argv[2], small_files=0, small_seconds=0, unit_seconds=0)
    parallel_listing.list_source(sys.argv[1], how)
"""


def test_a_listing_continues_after_its_process_was_killed(tmp_path, monkeypatch):
    uri, work = "sim://hex-40000-20/photos", tmp_path / "work"
    process = subprocess.Popen([sys.executable, "-c", KILLED, uri, str(work)])
    try:
        while process.poll() is None and (not work.exists() or len(receipts_in(work)) < 10):
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    done = len(receipts_in(work))
    assert done >= 10
    assert (again := parallel_listing.list_source(uri, small_units(work))).equals(
        listing.list_source("sim://hex-40000-0/photos")
    )
    assert again.num_rows == 40000
    assert len(receipts_in(work)) > done


def test_an_unfinished_listing_in_a_finished_dataset_is_not_unfinished_work(tmp_path):
    for i in range(8):
        path = tmp_path / "photos" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    config = PrepareConfig(source=(str(tmp_path / "photos"),), output=str(tmp_path / "out"), size=32)
    manifest = prepare(config)[""]
    storage.write_json(str(tmp_path / "out" / "_work" / "listing" / "x" / "begun.json"), {"uri": "x", "began": 1.0})
    assert prepare(config)[""] == manifest
    assert not (tmp_path / "out" / "_work").exists()
