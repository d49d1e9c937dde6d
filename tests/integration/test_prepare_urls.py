"""Lists of URLs, from the table to the dataset: formats, labels, counts by reason, continued downloads, archives."""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import tarfile
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage, workqueue
from pipeline.data import open_dataset
from pipeline.data.downloads.config import DownloadConfig
from pipeline.data.format.verify import verify_dataset
from pipeline.data.prepare import PrepareConfig, download_images, prepare
from pipeline.data.prepare.checks import check_config
from pipeline.data.prepare.download import download_slice
from pipeline.data.prepare.plan import claim_output, make_plan
from pipeline.data.prepare.worker import prepare_slice
from pipeline.errors import NotRead, NotWritten, Unavailable, UserError
from pipeline.tracking import names
from pipeline.tracking.search import search_runs
from tests.faultproxy import FaultProxy
from tests.images import jpeg
from tests.prepared import content
from tests.webserver import web_server

FAST = DownloadConfig(retries=0, passes=0, stall_timeout=2.0, max_bytes=1 << 20)


@pytest.fixture(autouse=True)
def in_process():
    with workqueue.without_ray():
        yield


@pytest.fixture
def server():
    with web_server() as running:
        yield running


def good(server, count=40):
    """Rows whose images exist."""
    return [
        {
            "url": f"{server.url}/image/{i}.jpg",
            "caption": f'a "fine" picture, number {i}',
            "width": 60,
            "label": "ab"[i % 2],
        }
        for i in range(1, count + 1)
    ]


def write(path, rows):
    """A list of URLs in the format of the file's name."""
    name = path.name.removesuffix(".gz")
    text = io.StringIO(newline="")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return str(path)
    if name.endswith(".jsonl"):
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".txt"):
        text.write("".join(row["url"] + "\n" for row in rows))
    else:
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


def options(source, output, **more):
    return PrepareConfig(
        **{"source": (source,), "output": str(output), "size": 32, "allow_private_hosts": True, "download": FAST} | more
    )


FILES = ["list.parquet", "list.csv", "list.tsv", "list.jsonl", "list.csv.gz", "list.jsonl.gz"]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_list(server, tmp_path, name):
    source = write(tmp_path / name, good(server))
    manifest = prepare(options(source, tmp_path / "out"))[""]
    dataset = open_dataset(str(tmp_path / "out"))
    assert (manifest.rows, dataset.classes, manifest.class_counts) == (40, ["a", "b"], [20, 20])
    labels = {dataset[i]["key"]: dataset[i]["label"] for i in range(40)}
    assert labels == {f"{name}#{i}": (i + 1) % 2 for i in range(40)}
    assert manifest.rejects == {}


def test_plain_addresses_and_lists_without_a_header(server, tmp_path):
    source = write(tmp_path / "list.txt", good(server, 5))
    assert prepare(options(source, tmp_path / "out", unlabelled=True))[""].rows == 5
    lines = [f'"a caption" of {i}\t{server.url}/image/{i}.jpg\n' for i in range(1, 6)]  # like CC3M: not quoted
    (tmp_path / "cc3m.tsv").write_text("".join(lines))
    assert prepare(options(str(tmp_path / "cc3m.tsv"), tmp_path / "out3", unlabelled=True))[""].rows == 5


def test_columns_of_other_names_a_label_map_and_splits(server, tmp_path):
    rows = [
        {"photo": row["url"], "kind": f"{i % 3}.0", "subset": ["train", "val"][i % 2], "id": f"img{i}"}
        for i, row in enumerate(good(server, 12))
    ]
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    chosen = {"url_column": "photo", "label_column": "kind", "file_column": "id", "splits": ("from-source",)}
    source = write(tmp_path / "list.csv", rows)
    manifests = prepare(options(source, tmp_path / "out", label_map=str(tmp_path / "names.txt"), **chosen))
    assert {name: manifest.rows for name, manifest in manifests.items()} == {"train": 6, "val": 6}
    dataset = open_dataset(str(tmp_path / "out" / "train"))
    assert dataset.classes == ["ant", "bee", "cat"]
    assert {dataset[i]["key"]: dataset[i]["label"] for i in range(6)} == {
        f"list.csv/img{i}": i % 3 for i in range(0, 12, 2)
    }
    with pytest.raises(UserError, match="--url-column photos: no such column"):
        prepare(options(source, tmp_path / "other", **chosen | {"url_column": "photos"}, format="urls"))


def test_rejects_are_counted_by_reason_and_show_no_password(server, tmp_path):
    rows = good(server, 30)
    login = server.url.replace("http://", "http://user:hunter2@")
    bad = ["/status/404", "/status/404/2", "/html/1.jpg", "/cut/1.jpg", "/reset/1.jpg", "/noai/noai", "/huge/1.jpg"]
    rows += [{"url": f"{login}{path}?token=hunter2", "label": "a"} for path in bad]
    rows += [{"url": "", "label": "b"}, {"url": "ftp://h/x.jpg", "label": "b"}, {"url": rows[0]["url"], "label": "b"}]
    source = write(tmp_path / "list.parquet", rows)
    config = options(source, tmp_path / "out", max_reject_fraction=0.5)
    manifest = prepare(config)[""]
    expected = {"http 404": 2, "not an image": 1, "truncated": 1, "connection failed": 1, "x-robots-tag": 1}
    expected |= {"too many bytes": 1, "bad address": 2}
    assert (manifest.rejects, manifest.rows, manifest.inputs) == (expected, 31, 40)
    table = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert {row["reason"] for row in table} == set(expected)
    assert server.hits["/image/1.jpg"] == 1
    assert all(b"hunter2" not in data for data in content(tmp_path / "out").values())


def test_hashes_of_the_list_are_checked(server, tmp_path):
    rows = [row | {"sha256": hashlib.sha256(jpeg(i)).hexdigest()} for i, row in enumerate(good(server, 6), 1)]
    rows[2]["sha256"], rows[3]["sha256"], rows[4]["sha256"] = "0" * 64, "", "no hash"
    source = write(tmp_path / "list.csv", rows)
    config = options(source, tmp_path / "out", max_reject_fraction=0.5)
    assert prepare(config)[""].rejects == {"hash mismatch": 2}
    unchecked = DownloadConfig(retries=0, hash_column="none")
    assert prepare(options(source, tmp_path / "unchecked", download=unchecked))[""].rejects == {}


def test_the_same_command_repeats_only_temporary_failures(server, tmp_path):
    rows = good(server, 100)
    rows += [
        {"url": f"{server.url}/{path}", "label": "a"}
        for path in ("status/404", "flaky/1.jpg", "flaky/2.jpg", "silent/1")
    ]
    source = write(tmp_path / "list.csv", rows)
    config = options(source, tmp_path / "out", max_reject_fraction=0.02)
    with pytest.raises(UserError, match=r"4 of 104 inputs were rejected.*1 http 404; 2 http 500; 1 timeout"):
        prepare(config)
    server.hits.clear()
    manifest = prepare(config)[""]
    assert dict(server.hits) == {"/flaky/1.jpg": 1, "/flaky/2.jpg": 1, "/silent/1": 1}
    assert (manifest.rows, manifest.rejects) == (102, {"http 404": 1, "timeout": 1})
    server.hits.clear()
    assert prepare(config)[""].fingerprint == manifest.fingerprint  # finished, but for one address
    assert dict(server.hits) == {"/silent/1": 1}


def test_rows_with_equal_keys_are_fetched_again_one_by_one(server, tmp_path):
    """Only the row that failed, also if another row of the list has its key."""
    paths = ["/image/1.jpg", "/flaky/2.jpg", "/image/3.jpg", "/flaky/4.jpg"]
    rows = [
        {"url": f"{server.url}{path}", "id": name, "label": label}
        for path, name, label in zip(paths, "xxyz", "abba", strict=True)
    ]
    source = write(tmp_path / "list.csv", rows)
    again = {"file_column": "id", "download": dataclasses.replace(FAST, passes=2), "max_reject_fraction": 1.0}
    manifest = prepare(options(source, tmp_path / "out", **again))[""]
    assert (manifest.rows, manifest.inputs, manifest.rejects) == (3, 4, {"duplicate key": 1})
    assert [server.hits[path] for path in paths] == [1, 2, 1, 2]
    server.hits.clear()
    server.visits.clear()
    result = download_images(options(source, tmp_path / "files", download_only=True, **again))
    assert (result["inputs"], result["downloaded"], result["rejects"]) == (4, 4, {})
    assert [server.hits[path] for path in paths] == [1, 2, 1, 2]


def test_an_append_whose_downloads_fail_is_not_a_success_and_is_repeated(server, tmp_path):
    prepare(options(write(tmp_path / "one.csv", good(server, 8)), tmp_path / "out"))
    before, rows = content(tmp_path / "out"), good(server, 20)[10:]
    config = options(write(tmp_path / "two.csv", rows), tmp_path / "out", max_reject_fraction=1.0)
    server.down = True
    for _ in range(2):
        with pytest.raises(UserError, match=r"no image was added to .* because 10 inputs .*\(10 http 503, such as"):
            prepare(config, append=True)
        assert {
            name: data for name, data in content(tmp_path / "out").items() if not name.startswith("_work")
        } == before
    server.down = False
    manifest = prepare(config, append=True)[""]
    assert (manifest.revision, manifest.rows, manifest.inputs, manifest.rejects) == (2, 18, 18, {})
    assert verify_dataset(str(tmp_path / "out")) == []


def test_a_download_that_a_later_append_repeats_is_not_a_reject(server, tmp_path):
    prepare(options(write(tmp_path / "one.csv", good(server, 8)), tmp_path / "out"))
    rows = [*good(server, 20)[10:], {"url": f"{server.url}/flaky/30.jpg", "label": "a"}]
    rows += [{"url": f"{server.url}/status/503", "label": "b"}]
    config = options(write(tmp_path / "two.csv", rows), tmp_path / "out", max_reject_fraction=1.0)
    counts = [prepare(config, append=True)[""] for _ in range(2)]
    assert [(m.revision, m.rows, m.inputs, sum(m.rejects.values())) for m in counts] == [(2, 18, 20, 2), (3, 19, 20, 1)]
    before = content(tmp_path / "out")
    prepare(config, append=True)  # the input that fails again is counted once
    assert content(tmp_path / "out") == before
    assert [verify_dataset(f"{tmp_path}/out@{number}") for number in (1, 2, 3)] == [[]] * 3


def test_a_retry_with_a_lower_limit_leaves_the_report_of_the_finished_dataset(server, tmp_path):
    rows = [*good(server, 10), {"url": f"{server.url}/status/503", "label": "b"}]
    rows += [{"url": f"{server.url}/flaky/1.jpg", "label": "b"}]
    source = write(tmp_path / "list.csv", rows)
    prepare(options(source, tmp_path / "out", max_reject_fraction=0.5))
    with pytest.raises(UserError, match="1 of 12 inputs were rejected"):
        prepare(options(source, tmp_path / "out", max_reject_fraction=0.0))
    assert not any("rejects" in problem for problem in verify_dataset(str(tmp_path / "out")))
    assert prepare(options(source, tmp_path / "out", max_reject_fraction=0.5))[""].rows == 11
    assert verify_dataset(str(tmp_path / "out")) == []


def test_a_finished_dataset_without_such_failures_is_left_alone(server, tmp_path):
    source = write(tmp_path / "list.csv", [*good(server, 30), {"url": f"{server.url}/status/404", "label": "a"}])
    config = options(source, tmp_path / "out")
    prepare(config)
    before, server.down = content(tmp_path / "out"), True
    server.hits.clear()
    prepare(config)
    assert content(tmp_path / "out") == before
    assert not server.hits


def test_passes_of_one_command_and_bytes_that_depend_only_on_the_responses(server, tmp_path):
    rows = [*good(server, 90), {"url": f"{server.url}/flaky/1.jpg", "label": "a"}]
    source = write(tmp_path / "list.csv", rows)
    passes = DownloadConfig(retries=0, passes=1)
    first = prepare(options(source, tmp_path / "one", download=passes))[""]
    assert (first.rows, first.rejects) == (91, {})
    assert server.hits["/image/1.jpg"] == 1
    server.visits.clear()
    faster = DownloadConfig(retries=0, passes=1, connections=3, timeout=20.0)
    prepare(options(source, tmp_path / "two", download=faster))
    assert {path: data for path, data in content(tmp_path / "one").items() if path.startswith("part")} == {
        path: data for path, data in content(tmp_path / "two").items() if path.startswith("part")
    }


def test_tables_next_to_images_and_parquet_files_of_images_are_not_lists(tmp_path):
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.jpg").write_bytes(jpeg())
    for name in ("urls.csv", "more.csv", "third.csv"):
        (tmp_path / "photos" / name).write_text("url,label\nhttp://h/x.jpg,a\n")
    manifest = prepare(options(str(tmp_path / "photos"), tmp_path / "out", max_reject_fraction=1.0))[""]
    assert (manifest.rows, manifest.rejects) == (2, {"not an image": 3})
    table = pa.table({"image": [jpeg()] * 2, "url": ["http://h/x.jpg"] * 2, "label": ["a", "b"]})
    pq.write_table(table, tmp_path / "images.parquet")
    assert prepare(options(str(tmp_path / "images.parquet"), tmp_path / "out2"))[""].rows == 2


def test_include_and_sample_limit_the_downloads(server, tmp_path):
    source = write(tmp_path / "list.csv", good(server, 100))
    assert prepare(options(source, tmp_path / "some", include=("*#?",), unlabelled=True))[""].rows == 10
    assert sum(server.hits.values()) <= 11
    server.hits.clear()
    assert prepare(options(source, tmp_path / "few", sample=6))[""].rows == 6
    assert sum(server.hits.values()) <= 7


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("list.csv", b"", "the table is empty|nothing in it|not a list of URLs"),
        ("list.csv", b"url,label\n", "have no rows|not a list of URLs"),
        ("list.csv", b"link_to,label\nx,y\n", "no column of addresses|not a list of URLs"),
        ("list.csv", b"url,label\nhttp://h/\xff,a\n", "not UTF-8|not a list of URLs"),
        ("list.jsonl", b'{"url": "http://h/x.jpg"}\n[1]\n', "not an object|not a list of URLs"),
        ("list.csv.gz", b"\x1f\x8bnonsense", "not a gzipped file|not a list of URLs"),
        ("list.parquet", b"PAR1nonsense", "not a Parquet file"),
    ],
)
@pytest.mark.parametrize("format", ["auto", "urls"])
def test_files_that_are_not_lists_are_refused_before_any_work(tmp_path, name, data, message, format):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        prepare(options(str(tmp_path / name), tmp_path / "out", format=format))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- --download-only


def samples(folder):
    """{sample: {extension: bytes}} of all archives."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                stem, _, extension = member.name.partition(".")
                found.setdefault(stem, {})[extension] = archive.extractfile(member).read()
    return found


def test_archives_have_the_original_files_and_the_columns_of_the_list(server, tmp_path):
    login = server.url.replace("http://", "http://user:hunter2@")
    rows = [*good(server, 10), {"url": f"{login}/png/1.png", "caption": "p", "width": 1, "label": "b"}]
    rows.append({"url": f"{server.url}/status/404", "label": "a"})
    source = write(tmp_path / "list.parquet", rows)
    result = download_images(options(source, tmp_path / "tars", download_only=True, max_reject_fraction=0.5))
    assert (result["inputs"], result["downloaded"], result["rejects"]) == (12, 11, {"http 404": 1})
    found = list(samples(tmp_path / "tars").values())
    assert found[0]["jpg"] == jpeg(1)
    assert found[0]["txt"] == rows[0]["caption"].encode()
    about = json.loads(found[0]["json"])
    expected = rows[0] | {"key": "list.parquet#0", "status": "success", "sha256": hashlib.sha256(jpeg(1)).hexdigest()}
    assert about == expected
    assert set(found[-1]) == {"png", "json", "txt"}
    assert all(b"hunter2" not in data for data in content(tmp_path / "tars").values())
    manifest = prepare(PrepareConfig(source=(str(tmp_path / "tars"),), output=str(tmp_path / "out"), size=32))[""]
    assert (manifest.rows, manifest.classes) == (11, ["a", "b"])


def test_the_mlflow_run_of_a_download_names_no_encoding(server, tmp_path):
    """The files are kept as they are, so settings of prepared images are no parameters of the run."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    source = write(tmp_path / "list.csv", good(server, 2))
    download_images(options(source, tmp_path / "tars", download_only=True), tracking_uri=uri)
    (run,) = search_runs(names.PREPARE, uri=uri)
    assert run.params["encoding"] == "as downloaded"
    assert not {"size", "quality", "patch_size", "deduplicate"} & set(run.params)
    assert "the files as they are, in WebDataset archives" in run.tags[names.NOTE]
    assert run.metrics[names.ROWS] == 2


def test_archives_contain_valid_json_without_secrets(server, tmp_path):
    """A secret may be in any column, at any depth, and in the key of an image."""
    address = "https://me:hunter2@host/1.jpg?sig=hunter3"
    row = {
        "url": f"{server.url}/image/1.jpg?token=hunter4",
        "original": address,
        "mirrors": [[address], [None, address]],
        "about": {"source": address, "scores": [float("nan"), 0.5], "raw": address.encode()},
        "similarity": float("nan"),
        "most": float("inf"),
    }
    tags = pa.array([[(address, address)]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.Table.from_pylist([row]).append_column("tags", tags), tmp_path / "list.parquet")
    source = str(tmp_path / "list.parquet")
    download_images(options(source, tmp_path / "out", download_only=True, file_column="original"))
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        text = archive.extractfile("0000000000.json").read().decode()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    shown = "https://***@host/1.jpg?sig=***"
    assert found["mirrors"] == [[shown], [None, shown]]
    assert found["about"] == {"source": shown, "scores": [None, 0.5], "raw": shown.encode().hex()}
    assert (found["tags"], found["similarity"], found["most"]) == ([[shown, shown]], None, None)
    assert found["key"] == f"list.parquet/{shown}"
    assert not any(b"hunter" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_archives_are_continued_and_reproducible(server, tmp_path):
    rows = [*good(server, 150), {"url": f"{server.url}/flaky/1.jpg", "label": "a"}]
    source = write(tmp_path / "list.csv", rows)
    one, two = (options(source, tmp_path / name, download_only=True) for name in ("one", "two"))
    assert download_images(one)["may_pass"] == 1
    server.hits.clear()
    assert download_images(one)["rejects"] == {}
    assert dict(server.hits) == {"/flaky/1.jpg": 1}
    server.hits.clear()
    assert download_images(one)["downloaded"] == 151
    assert not server.hits  # finished
    server.visits.clear()

    def stop(inputs, rejects):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_images(two, on_progress=stop)
    assert [path.name for path in (tmp_path / "two").glob("*.tar")] == ["00000.tar"]
    server.hits.clear()
    assert download_images(two)["may_pass"] == 1
    assert not server.hits["/image/1.jpg"]
    download_images(two)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    with pytest.raises(UserError, match="already contains other downloads"):
        download_images(options(write(tmp_path / "list.csv", rows[:-1]), tmp_path / "one", download_only=True))


def _first_slice(server, tmp_path, work, **more):
    """Makes the plan for a list of one large file; `work` is called with the list, then processes its slice."""
    source = write(tmp_path / "list.csv", [{"url": f"{server.url}/large/1.jpg", "label": "a"}])
    plan = claim_output(make_plan(check_config(options(source, tmp_path / "out", **more))))
    with work(source):
        (download_slice if more else prepare_slice)(0, plan)


@contextlib.contextmanager
def full_disk(_):
    """A limit on the file size of the process simulates a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def lost_list(source):
    os.remove(source)
    yield


@pytest.mark.parametrize("more", [{}, {"download_only": True}])
def test_a_full_disk_and_a_lost_list_are_named(server, tmp_path, more):
    prepare(options(write(tmp_path / "first.csv", good(server)), tmp_path / "first"))  # creates the files of the limits
    folder = tempfile.gettempdir() if more else f"{tmp_path}/out"
    with pytest.raises(NotWritten, match=f"^{folder}: cannot be written .*File too large.*free some space"):
        _first_slice(server, tmp_path, full_disk, **more)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(NotRead, match=f"^{tmp_path}/list.csv: can no longer be read .*; restore it"):
        _first_slice(server, tmp_path, lost_list, **more)


@pytest.mark.parametrize("name", ["images/list.csv", "pictures/train.txt"])
def test_an_outage_is_not_mistaken_for_another_format_or_a_missing_table(
    server, s3, s3_server, tmp_path, monkeypatch, name
):
    storage.write_bytes(f"{s3}/images/list.csv", f"url\n{server.url}/image/1.jpg\n".encode())
    storage.write_bytes(f"{s3}/pictures/train.txt", b"ant/1.jpg 0\n")
    storage.write_bytes(f"{s3}/pictures/ant/1.jpg", jpeg(1))
    config = options(f"{s3}/{name.partition('/')[0]}", tmp_path / "out", unlabelled=True)
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("VIT_STORE_PATIENCE", "1")
        proxy.fault = lambda method, path, n: "reset" if path.endswith(name) and method == "GET" else None
        with pytest.raises(Unavailable, match=name):
            prepare(config)
        proxy.fault = lambda method, path, n: None
        assert prepare(config)[""].rows == 1


def test_download_only_needs_a_list(tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="is read as folder, not as a list of URLs"):
        download_images(options(str(tmp_path / "photos"), tmp_path / "out", download_only=True))


@pytest.mark.parametrize("name", ["list.parquet", "list.csv", "list.jsonl"])
def test_a_changed_list_is_another_input(server, tmp_path, name):
    rows = good(server, 20)
    config = options(write(tmp_path / name, rows), tmp_path / "out")
    prepare(config)
    rows[3]["url"] = rows[3]["url"].replace("/4.jpg", "/5.jpg")  # as many rows and bytes as before
    write(tmp_path / name, rows)
    with pytest.raises(UserError, match="the source files have changed"):
        prepare(config)


def test_rows_without_a_label_are_not_downloaded(server, tmp_path):
    rows = good(server, 10)
    for row in rows[:4]:
        row["label"] = None
    config = options(write(tmp_path / "list.parquet", rows), tmp_path / "out", max_reject_fraction=0.5)
    manifest = prepare(config)[""]
    assert (manifest.rows, manifest.rejects) == (6, {"no label": 4})
    assert sum(server.hits.values()) == 7  # with robots.txt


def test_archives_need_no_labels_and_keep_splits_together(server, tmp_path):
    rows = [{"url": row["url"], "split": ["train", "val"][i % 2]} for i, row in enumerate(good(server, 6))]
    source = write(tmp_path / "list.csv", rows)
    result = download_images(options(source, tmp_path / "tars", download_only=True))
    assert (result["downloaded"], result["rejects"]) == (6, {})
    found = [json.loads(sample["json"])["split"] for sample in samples(tmp_path / "tars").values()]
    assert found == ["train", "val"] * 3
