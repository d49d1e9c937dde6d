"""The shard format: this project and other libraries can read the shards; damage is detected."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.format import Schema, ShardWriter, build_manifest, open_dataset, write_dataset
from pipeline.data.format.verify import verify_dataset
from pipeline.errors import UserError

PROJECT = Path(__file__).parents[2]
PATCHES = {"height": 8, "width": 8, "patch_size": 4, "channels": 3}


def make_rows(count, encoding, multilabel=False, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        image = (
            rng.integers(0, 256, (4, 48), dtype=np.uint8) if encoding == "patches" else rng.bytes(rng.integers(0, 900))
        )
        label = rng.integers(0, 5, rng.integers(0, 4)).tolist() if multilabel else int(rng.integers(-1, 5))
        yield f"ключ/{i}.jpg", image, label, i + 1, 2 * i + 1


@pytest.mark.parametrize("encoding", ["jpeg", "patches"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_round_trip(tmp_path, encoding, multilabel):
    rows = list(make_rows(700, encoding, multilabel))
    uri = str(tmp_path / "set")
    image = PATCHES if encoding == "patches" else {"size": 256, "quality": 90}
    options = {"classes": list("abcde"), "encoding": encoding, "image": image, "multilabel": multilabel}
    manifest = write_dataset(uri, rows, row_group_bytes=20_000, shard_bytes=60_000, **options)
    assert len(manifest.shards) > 2
    dataset = pickle.loads(pickle.dumps(open_dataset(uri)))
    assert dataset.manifest == manifest
    assert len(dataset) == 700
    assert dataset.starts[-1] == 700

    order = np.random.default_rng(1).permutation(700)
    for i, row in zip(order, dataset.read(order), strict=True):
        key, stored, label, width, height = rows[i]
        assert (row["key"], row["label"], row["width"], row["height"]) == (key, label, width, height)
        assert np.array_equal(row["image"], stored) if encoding == "patches" else row["image"] == stored
    table = dataset.table(["key", "label", "height"])
    assert table["key"].to_pylist() == [row[0] for row in rows]
    assert table["label"].to_pylist() == [row[2] for row in rows]
    assert table["height"].to_pylist() == [row[4] for row in rows]
    assert verify_dataset(uri) == []


def test_other_libraries_read_the_shards(tmp_path):
    rows = list(make_rows(50, "patches"))
    manifest = write_dataset(str(tmp_path), rows, classes=list("abcde"), encoding="patches", image=PATCHES)
    path = tmp_path / manifest.shards[0].name
    frame = pd.read_parquet(path)
    assert frame["label"].tolist() == [row[2] for row in rows]
    assert np.array_equal(np.frombuffer(frame["image"][7], np.uint8).reshape(4, 48), rows[7][1])
    assert pq.read_table(path)["key"].to_pylist() == [row[0] for row in rows]
    description = json.loads(pq.read_schema(path).metadata[b"vit_pipeline"])
    assert description == {"version": 5, "encoding": "patches", "image": PATCHES, "classes": list("abcde")}


def test_other_libraries_read_files_and_several_labels(tmp_path):
    rows = list(make_rows(50, "jpeg", multilabel=True))
    manifest = write_dataset(str(tmp_path), rows, classes=list("abcde"), multilabel=True, row_group_bytes=9_000)
    frame = pd.read_parquet(tmp_path / manifest.shards[0].name)
    assert [list(labels) for labels in frame["label"]] == [row[2] for row in rows]
    assert frame["image"].tolist() == [row[1] for row in rows]
    assert pq.ParquetFile(tmp_path / manifest.shards[0].name).num_row_groups > 2


@pytest.mark.slow
@pytest.mark.skipif(
    "VIT_PEERS" not in os.environ, reason="VIT_PEERS names no environment (tests/benchmarks/loader_speed.py)"
)
def test_hugging_face_datasets_reads_the_shards(tmp_path):
    """Runs in the environment in VIT_PEERS, because the dependencies of `datasets`
    conflict with those of this project."""
    rows = list(make_rows(50, "jpeg"))
    manifest = write_dataset(str(tmp_path / "set"), rows, classes=list("abcde"))
    script = """
import sys, datasets
table = datasets.load_dataset("parquet", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
print(table.features, len(table), sum(len(row["image"]) for row in table), table[49]["key"].encode(), sum(table["label"]))
"""
    python = os.path.join(os.environ["VIT_PEERS"], "bin", "python")
    arguments = [python, "-c", script, str(tmp_path / "set" / manifest.shards[0].name), str(tmp_path / "cache")]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    size, labels = sum(len(row[1]) for row in rows), sum(row[2] for row in rows)
    assert result.stdout.strip().endswith(f"50 {size} {rows[49][0].encode()} {labels}")


def test_patches_can_be_memory_mapped(tmp_path):
    """The values of a row group are an uncompressed uint8 matrix in the file, at the offset in the manifest."""
    rows = list(make_rows(300, "patches"))
    write_dataset(str(tmp_path), rows, classes=list("abcde"), encoding="patches", image=PATCHES, row_group_bytes=5_000)
    dataset = open_dataset(str(tmp_path))
    row = 0
    for group in dataset.row_groups:
        content = np.fromfile(dataset.shard_uri(group["shard"]), np.uint8)[group["values"] : group["end"]]
        assert len(content) == group["rows"] * 192 <= 5_000
        assert np.array_equal(content.reshape(-1, 4, 48), [row[1] for row in rows[row : row + group["rows"]]])
        row += group["rows"]
    assert row == 300


@given(
    lists=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=80),
    size=st.integers(1, 2_000),
)
@settings(max_examples=40, deadline=None)
def test_any_multilabel_shape(tmp_path_factory, lists, size):
    uri = str(tmp_path_factory.mktemp("multi"))
    rows = [(str(i), b"x" * (i % 7), labels, 1, 1) for i, labels in enumerate(lists)]
    write_dataset(uri, rows, classes=[str(k) for k in range(10)], multilabel=True, row_group_bytes=size)
    assert [row["label"] for row in open_dataset(uri).read(range(len(lists)))] == lists


def test_same_rows_same_bytes(tmp_path):
    rows = list(make_rows(100, "jpeg"))
    first, second = (write_dataset(str(tmp_path / name), rows, classes=list("abcde")) for name in "ab")
    assert first.to_json() == second.to_json()
    assert (tmp_path / "a" / first.shards[0].name).read_bytes() == (tmp_path / "b" / first.shards[0].name).read_bytes()
    other = write_dataset(str(tmp_path / "c"), rows[:-1], classes=list("abcde"))
    assert other.fingerprint != first.fingerprint


def test_an_image_larger_than_a_row_group(tmp_path):
    rows = [(str(i), bytes([i]) * 5_000, 0, 1, 1) for i in range(5)]
    write_dataset(str(tmp_path), rows, classes=["a"], row_group_bytes=1_000, shard_bytes=1_000)
    dataset = open_dataset(str(tmp_path))
    assert dataset.row_groups["rows"].tolist() == [1] * 5
    assert [row["image"] for row in dataset.read(range(5))] == [row[1] for row in rows]


def test_an_exception_leaves_no_partial_shard(tmp_path):
    writer = ShardWriter(str(tmp_path), "00000", Schema(classes=["a"]), row_group_bytes=10)
    for i in range(10):
        writer.write(str(i), b"0123456789", 0, 1, 1)
    assert len(list(tmp_path.iterdir())) == 1
    writer.__exit__(ZeroDivisionError, None, None)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
from pipeline.data.format import Schema, ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
with ShardWriter(sys.argv[1], "00000", Schema(classes=["a"]), row_group_bytes=2_000) as writer:
    for i in range(10):
        writer.write(str(i), bytes(1_000), 0, 1, 1)
"""


@pytest.mark.parametrize("limit", [0, 3_000, 11_000])  # nothing fits, some row groups, all of them without the footer
def test_a_full_disk_leaves_no_half_shard(tmp_path, limit):
    """A limit on the file size of the process simulates a full disk."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_labels_outside_the_classes_are_a_bug(tmp_path):
    writer = ShardWriter(str(tmp_path), "00000", Schema(classes=["a"]))
    with pytest.raises(ValueError, match="outside the 1 class"):
        writer.write("k", b"", 1, 1, 1)


def test_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        open_dataset(tmp_path / "nothing")
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version 99 of the format"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("[1, 2")
    with pytest.raises(UserError, match="not a dataset manifest"):
        open_dataset(tmp_path)


def test_nothing_to_write(tmp_path):
    with pytest.raises(UserError, match="no usable images"):
        write_dataset(str(tmp_path), [], classes=["a"])
    assert not (tmp_path / "manifest.json").exists()


@pytest.fixture
def dataset(tmp_path):
    write_dataset(
        str(tmp_path), make_rows(300, "jpeg"), classes=list("abcde"), row_group_bytes=20_000, shard_bytes=60_000
    )
    return open_dataset(str(tmp_path))


def test_a_dataset_is_a_sequence(dataset):
    rows = dataset.read(range(300))
    assert dataset[7] == rows[7]
    assert dataset[-1] == rows[299]
    assert dataset[295:400:2] == rows[295::2]
    assert list(dataset) == rows
    for outside in (300, -301):
        with pytest.raises(IndexError):
            dataset[outside]


def test_one_flipped_bit_is_found_at_the_first_read(dataset):
    path, group = Path(dataset.shard_uri(0)), dataset.row_groups[0]
    damaged = bytearray(path.read_bytes())
    damaged[int(group["end"]) - 5] ^= 1  # in an image
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{path.name}: row group 0 is damaged .*checksum"):
        open_dataset(dataset.uri)[0]


@pytest.mark.parametrize("multilabel", [False, True])
def test_labels_outside_the_classes_are_an_error(tmp_path, multilabel):
    rows = list(make_rows(50, "jpeg", multilabel))
    write_dataset(str(tmp_path), rows, classes=list("abcde"), multilabel=multilabel)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": list("abc")}))
    with pytest.raises(UserError, match="label 4 is outside the 3 classes"):
        open_dataset(tmp_path).read_row_group(0)


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"version": 2}', "1e400", '{"a":' * 5000])
def test_a_manifest_of_any_json_is_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json") as error:
        open_dataset(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", -5), ("rows", "x"), ("rows", None), ("image", None), ("encoding", "bogus"), ("mean", [1])],
)
def test_a_manifest_with_a_wrong_field_names_it(dataset, tmp_path, field, value):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=r"manifest\.json: not a dataset manifest"):
        open_dataset(tmp_path)


def test_impossible_positions_of_row_groups_are_refused(dataset, tmp_path):
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["row_groups"][0][3] = 10**15
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"row group 0 of .* rows cannot be at"):
        open_dataset(tmp_path)
    assert any("cannot be at" in problem for problem in verify_dataset(str(tmp_path)))


@pytest.mark.parametrize(("column", "complaint"), [(1, "is not at"), (4, "checksum of row group 0 differs")])
def test_verify_checks_what_the_loader_relies_on(dataset, tmp_path, column, complaint):
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["row_groups"][0][column] -= 1
    path.write_text(json.dumps(manifest))
    assert any(complaint in problem for problem in verify_dataset(str(tmp_path)))


def test_verify_finds_damage(dataset, tmp_path):
    path = tmp_path / dataset.manifest.shards[0].name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    assert any("checksum differs" in problem for problem in verify_dataset(str(tmp_path)))
    path.write_bytes(whole[:-100])
    problems = verify_dataset(str(tmp_path))
    assert any("bytes, the manifest says" in problem for problem in problems)
    path.unlink()
    assert f"{path.name}: missing" in verify_dataset(str(tmp_path))
    path.write_bytes(whole)
    assert verify_dataset(str(tmp_path)) == []
    (tmp_path / "part-99999-0000.parquet").write_bytes(whole)
    assert verify_dataset(str(tmp_path)) == ["part-99999-0000.parquet: not in the manifest"]


def test_verify_checks_the_manifest_itself(dataset, tmp_path):
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for key, value, complaint in [
        ("rows", 301, "rows is 301"),
        ("inputs", 5, "inputs is 5"),
        ("rejects", {"empty": 1}, "rejects.parquet"),
        ("class_counts", [1, 2, 3, 4, 5], "class counts differ"),
    ]:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {key: value}))
        assert any(complaint in problem for problem in verify_dataset(str(tmp_path))), key


def test_verify_finds_repeated_keys(tmp_path):
    write_dataset(str(tmp_path), [("same", b"1", 0, 1, 1), ("same", b"2", 0, 1, 1)], classes=["a"])
    assert verify_dataset(str(tmp_path)) == ["not unique: 1 key"]


def test_a_shard_that_shrank_is_named(dataset, tmp_path):
    path = tmp_path / dataset.manifest.shards[-1].name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=path.name):
        dataset.read([len(dataset) - 1])
    with pytest.raises(IndexError):
        dataset.read([len(dataset)])


def test_mean_and_deviation(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)
    schema = Schema(classes=["a"])
    with ShardWriter(str(tmp_path), "00000", schema) as writer:
        for i, picture in enumerate(pictures):
            writer.write(str(i), b"", 0, 6, 8, picture)
    manifest = build_manifest(str(tmp_path), [writer.receipt], schema)
    assert manifest.mean == pytest.approx((pictures / 255).mean((0, 1, 2)), abs=1e-5)
    assert manifest.std == pytest.approx((pictures / 255).std((0, 1, 2)), abs=1e-5)


@pytest.mark.slow
def test_three_hundred_million_images_open_plan_and_resume_in_a_second(tmp_path):
    """A manifest of 10,000 shards with 30 row groups each, in a separate process: CPU seconds and megabytes."""
    script = """
import sys, time
import psutil
from pipeline.data.loading.loader import Order
from pipeline.data.format import Dataset, Manifest, Shard
groups = [[1010, 4 + (g << 24), 40_000 + (g << 24), (g + 1) << 24, 7] for g in range(30)]
shards = [Shard(name=f"part-{i:05d}.parquet", rows=30_300, bytes=30 << 24, sha256="0" * 64, row_groups=groups) for i in range(10_000)]
text = Manifest(encoding="jpeg", image={}, rows=303_000_000, inputs=303_000_000, fingerprint="0", shards=shards).to_json()
del shards
before, start = psutil.Process().memory_info().rss, time.process_time()
dataset = Dataset("/nowhere", Manifest.from_json(text))
order = Order(dataset.row_groups["rows"], seed=0, epoch=7, batch_size=4096, lanes=64, shuffle_window=16_384)
order.reads(range(8))
order.locate(order.batch(order.steps // 2, range(8)))
print(len(dataset), time.process_time() - start, (psutil.Process().memory_info().rss - before) / 1e6)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT)
    images, seconds, megabytes = map(float, result.stdout.split())
    print(f"{images:,.0f} images: {seconds:.2f} s of CPU, {megabytes:.0f} MB")
    assert images == 303_000_000
    assert seconds < 1.0
    assert megabytes < 200
