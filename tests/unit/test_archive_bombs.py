"""Small archives that expand to gigabytes: a worker uses less than 1 GiB, and the error names the archive."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources import items, labels, tar, urltables
from pipeline.data.sources.items import Item, ScanOptions
from pipeline.data.sources.prefetch import prefetched
from pipeline.errors import UserError

PROJECT = Path(__file__).parents[2]


def write_sparse_tar(path: Path, names: list[str], size: int) -> None:
    """Sparse members of `size` bytes with one data byte each, so that the archive stays small."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            info.pax_headers = {
                "GNU.sparse.major": "0",
                "GNU.sparse.minor": "1",
                "GNU.sparse.name": name,
                "GNU.sparse.size": str(size),
                "GNU.sparse.map": "0,1",
                "GNU.sparse.realsize": str(size),
            }
            archive.addfile(info, io.BytesIO(b"x"))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_giant_header(path: Path) -> None:
    """900 MB of extended attributes, which gzip compresses to 1 MB."""
    with gzip.open(path, "wb") as file:
        info = tarfile.TarInfo("a.png")
        info.type, info.size = tarfile.XHDTYPE, 900 << 20
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(900):
            file.write(bytes(1 << 20))


def write_parquet(path: Path, image: bytes, label: str, rows: int) -> None:
    """All rows have the same image and label, which Parquet stores once."""
    table = pa.table({"image": pa.array([image] * rows, pa.binary()), "label": pa.array([label] * rows)})
    pq.write_table(table, path, compression="zstd", row_group_size=rows)


def write_arrow(path: Path, image: bytes, rows: int) -> None:
    table = pa.table({"image": pa.array([image] * rows, pa.binary()), "label": [0] * rows})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write(table)


def read_all(path: Path) -> list[Item]:
    files = pa.table({"path": [""], "size": [path.stat().st_size]}, schema=items.LISTING)
    source = tar.scan(str(path), files, ScanOptions())
    return list(tar.read(source, source.fragments))


MEASURE = """
import re, sys
from pathlib import Path
from pipeline import workqueue
from pipeline.data.prepare.checks import check_config
from pipeline.data.prepare.config import PrepareConfig
from pipeline.data.prepare.plan import claim_output, make_plan
from pipeline.data.prepare.run import prepare_slices
from pipeline.errors import UserError
source, output, labels = sys.argv[1:]
flags = {"labels": labels} if labels else {"unlabelled": True}
try:
    config = PrepareConfig(source=(source,), output=output, max_reject_fraction=1.0, size=16, **flags)
    with workqueue.without_ray():
        prepare_slices(claim_output(make_plan(check_config(config))))
    print("prepared", file=sys.stderr)
except UserError as error:
    print(error, file=sys.stderr)
# not ru_maxrss: a process inherits that of whoever started it
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10)
"""
TABLE = b"file,label\n" + b"c/a.png,x\n" * 20_000_000
PARQUET_TABLE = {"file": ["c/a.png"] * 3_000_000, "label": ["x"] * 3_000_000}
LONG_ADDRESSES = {"url": ["http://h/" + "x" * (20 << 20)] * 64}
# kind: (file name, how to write it, what prepare says)
BOMBS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "one sample": ("a.tar", lambda path: write_sparse_tar(path, [f"a/b.x{i}" for i in range(6)], 120 << 20), "prepared"),
    "many samples": (
        "a.tar", lambda path: write_sparse_tar(path, [f"a/bomb{i}.png" for i in range(6)], 120 << 20), "prepared",
    ),
    "a tar of tars": (
        "a.tar", lambda path: write_sparse_tar(path, [f"class{i}.tar" for i in range(3)], 900 << 20), "prepared",
    ),
    "a giant header": ("a.tar.gz", write_giant_header, "prepared"),
    "one giant image": ("a.parquet", lambda path: write_parquet(path, bytes(400 << 20), "x", 3), "prepared"),
    "images of one dictionary": (
        "a.parquet", lambda path: write_parquet(path, bytes(100 << 20), "x", 18), "prepared",
    ),
    "labels of one dictionary": (
        "a.parquet", lambda path: write_parquet(path, b"x", "x" * (60 << 20), 30), "prepared",
    ),
    "addresses of one dictionary": (
        "list.parquet", lambda path: pq.write_table(pa.table(LONG_ADDRESSES), path, compression="zstd"),
        "no column of image bytes",
    ),
    "a compressed message": ("a.arrow", lambda path: write_arrow(path, bytes(300 << 20), 3), "message 1 unpacks from"),
    "a table in a tar": (
        "a.tar.gz", lambda path: write_tar(path, {"c/a.png": b"x", "labels.csv": TABLE}), "bytes, more than the limit of 16,777,216 for a table",
    ),
    "a table in a zip": (
        "a.zip", lambda path: write_zip(path, {"c/a.png": b"x", "labels.csv": TABLE}), "bytes, more than the limit of 16,777,216 for a table",
    ),
    "a label table": (
        "labels.csv.gz", lambda path: path.write_bytes(gzip.compress(TABLE)), "bytes unpack to more than",
    ),
    "a label table of one dictionary": (
        "labels.parquet", lambda path: pq.write_table(pa.table(PARQUET_TABLE), path), "labels.parquet: 3,000,000 rows, more than the limit of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_archive_never_takes_a_gigabyte(kind, tmp_path):
    name, write, expected = BOMBS[kind]
    path = tmp_path / "in" / name
    path.parent.mkdir()
    write(path)
    assert path.stat().st_size < 1 << 20
    source, labels = path, ""
    if name.startswith("labels."):
        source, labels = tmp_path / "photos", str(path)
        (source / "c").mkdir(parents=True)
        (source / "c" / "a.png").write_bytes(b"x")
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), labels]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=240, check=True)
    assert int(done.stdout) < 1024, f"{done.stdout.strip()} MiB, {done.stderr}"
    assert expected in done.stderr
    if expected != "prepared":
        assert name in done.stderr


def test_the_members_of_a_sample_are_limited_together(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "MAX_FILE_BYTES", 100_000)
    write_sparse_tar(tmp_path / "a.tar", [f"a/one.x{i}" for i in range(3)], 60_000)
    refused = {item.key: item.refused and item.refused.reason for item in read_all(tmp_path / "a.tar")}
    assert refused == {"a/one.x0": None, "a/one.x1": "too many bytes", "a/one.x2": "too many bytes"}


def test_an_archive_in_an_archive_is_streamed_and_a_third_level_is_no_image(tmp_path):
    inner, middle = io.BytesIO(), io.BytesIO()
    for sink, members in (
        (inner, {"deep.png": b"deep"}),
        (middle, {"one.png": b"first", "inner.tar": None, "two.png": b"second"}),
    ):
        with tarfile.open(fileobj=sink, mode="w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                data = inner.getvalue() if data is None else data
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    with tarfile.open(tmp_path / "outer.tar", "w") as archive:
        for name, data in (("n01440764.tar", middle.getvalue()), ("after/three.png", b"third")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found = {item.key: (bytes(item.image), item.labels) for item in read_all(tmp_path / "outer.tar")}
    assert found["one.png"] == (b"first", ["n01440764"])
    assert found["two.png"] == (b"second", ["n01440764"])
    assert found["after/three.png"] == (b"third", ["after"])
    assert "deep.png" not in found


@pytest.mark.parametrize("name", ["list.csv", "list.csv.gz", "list.jsonl"])
def test_the_rows_of_a_list_in_memory_are_limited_by_bytes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(urltables, "SPAN_BYTES", 100_000)
    rows = [{"url": f"http://h/{i}.jpg", "caption": "x" * 30_000} for i in range(50)]
    if ".csv" in name:
        text = "url,caption\n" + "".join(f"{row['url']},{row['caption']}\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with urltables.open_table(str(tmp_path / name)) as table:
        assert 0 < len(table.first_rows()) <= 4
        spans = [(span.first, span.rows, span.start, span.stop) for span in table.spans()]
        assert max(count for _, count, _, _ in spans) <= 4
        found = [pair for first, _, start, stop in spans for pair in table.rows(start, stop, first, None)]
    assert found == list(enumerate(rows))


def test_reading_ahead_is_limited_by_bytes(monkeypatch):
    read = []

    def large():
        for i in range(20):
            read.append(i)
            yield Item(str(i), "", bytes(30 << 20), None)

    reader = prefetched(large())
    next(reader)
    for _ in range(3):
        next(reader)
    assert len(read) <= 4 + 3 + 2  # taken, waiting, and the one that is being read
    reader.close()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_deeply_nested_json_is_one_line(text, tmp_path):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json"):
        labels.read_label_map(str(tmp_path / "classes.json"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("a/one.json", text.encode()), ("a/one.png", b"picture")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (item,) = read_all(tmp_path / "a.tar")
    assert (item.key, item.labels) == ("a/one.png", ["a"])
    with pytest.raises(RecursionError):
        json.loads(text)  # the exceptions that readers must expect
