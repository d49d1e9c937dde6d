"""The same functions for local paths and object stores."""

import random
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from pipeline import libraries, retry, storage, stores
from pipeline.errors import StorageError, UserError
from pipeline.stores import base
from tests.faultproxy import FaultProxy
from tests.objectstore import copy_folder
from tests.ports import free_port


@pytest.fixture(params=["local", "s3", "gs", "az"])
def root(request, tmp_path):
    return f"{tmp_path if request.param == 'local' else request.getfixturevalue(request.param)}/folder"


def test_write_read_list_remove(root):
    assert storage.list_files(root) == []
    storage.write_bytes(storage.join(root, "a", "one.bin"), b"0123456789")
    storage.write_json(storage.join(root, "two.json"), {"x": [1, 2]})
    assert storage.read_bytes(storage.join(root, "a/one.bin"), 2, 5) == b"234"
    assert storage.read_json(storage.join(root, "two.json")) == {"x": [1, 2]}
    listed = storage.list_files(root)
    assert next((file.path, file.size) for file in listed) == ("a/one.bin", 10)
    assert [file.path for file in storage.list_files(root, recursive=False)] == ["two.json"]
    assert storage.read_bytes(listed[0].uri) == b"0123456789"
    storage.remove(storage.join(root, "a"), recursive=True)
    storage.remove(storage.join(root, "never-there"))
    assert [file.path for file in storage.list_files(root)] == ["two.json"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "a/one.bin"))


def test_files_are_copied_between_places(root, tmp_path):
    for i in range(5):
        storage.write_bytes(str(tmp_path / "source" / "deep" / f"{i}.bin"), bytes([i]) * 1000)
    copy_folder(str(tmp_path / "source"), root)
    copy_folder(root, str(tmp_path / "back"))
    for i in range(5):
        assert (tmp_path / "back" / "deep" / f"{i}.bin").read_bytes() == bytes([i]) * 1000


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(tmp_path / "x.bin"), b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["gopher://x/y", "s3://", "gs://"])
def test_invalid_addresses(uri):
    with pytest.raises(UserError, match=f"{uri}: .*(s3|gs)://bucket/prefix"):
        storage.exists(uri)


def test_a_file_address_with_a_host_is_no_path():
    assert storage.normalise("file:///data/x/") == "/data/x"
    with pytest.raises(UserError, match="file://host/x: an address of a local file has three slashes"):
        storage.normalise("file://host/x")


def test_no_credentials_is_a_clear_error(monkeypatch, s3_server):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    with pytest.raises(UserError, match="AWS_"):
        storage.read_bytes("s3://some-bucket/file")


@pytest.mark.parametrize("endpoint", ["server", "http://", "http://host:99999", "ftp://host"])
def test_an_endpoint_that_is_no_address_is_refused_at_once(s3, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=r"Invalid endpoint|was not a valid URI") as refused:
        storage.read_bytes(f"{s3}/file")
    assert not isinstance(refused.value, StorageError)


def test_listing_page_by_page_finds_what_a_whole_listing_finds(cloud):
    """More objects than fit on a page; names with special characters of URLs and
    patterns; no folder marker, no similar prefix."""
    names = [f"{i % 7}/{i:04d}.jpg" for i in range(1005)] + ["日本 [1]*?#%20+&.jpg", "a b/<ü>.png", "{0}/%2F.png"]
    bodies = {f"images/{name}": name.encode() for name in names} | {"images-too/1.jpg": b"x", "other.jpg": b"x"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: storage.write_bytes(f"{cloud.uri}/{item[0]}", item[1]), bodies.items()))
    if cloud.uri.startswith("s3://"):  # the object that consoles create for a new folder
        boto3.client("s3").put_object(Bucket=cloud.uri.removeprefix("s3://"), Key="images/folder/", Body=b"")
    pages = list(storage.iter_pages(f"{cloud.uri}/images"))
    found = storage.list_files(f"{cloud.uri}/images")
    assert sorted((file.path, file.size) for page in pages for file in page) == [(f.path, f.size) for f in found]
    assert {file.path: file.size for file in found} == {name: len(name.encode()) for name in names}
    assert storage.list_folders(f"{cloud.uri}/images")[:3] == ["0", "1", "2"]
    assert storage.read_bytes(found[-1].uri) == found[-1].path.encode()
    nowhere = f"{cloud.uri}-that-is-nowhere"
    assert not any(page for where in (f"{cloud.uri}/nothing", nowhere) for page in storage.iter_pages(where))


def test_a_listing_begins_after_any_name_where_the_store_lists_by_name(cloud):
    names = ["a/1.jpg", "a/2.jpg", "a0.jpg", "b/1.jpg", "z.jpg", "ü.jpg"]
    for name in names:
        storage.write_bytes(f"{cloud.uri}/images/{name}", b"x")
    assert storage.lists_by_name(cloud.uri) == cloud.uri.startswith(("s3://", "gs://"))
    if storage.lists_by_name(cloud.uri):
        for after in ["", *names, "a", "a/", "c", "日"]:
            pages = storage.iter_pages(f"{cloud.uri}/images", after=after, limit=2)
            assert [file.path for page in pages for file in page] == [name for name in names if name > after]


def in_place(root):
    """{operation: expected result} on a bucket that contains folder/one.json = [1, 2]."""
    return {
        "read_bytes": (lambda: storage.read_bytes(f"{root}/folder/one.json", 3, 4), b"1"),
        "read_range": (lambda: storage.read_range(f"{root}/folder/one.json", 3, 4), b"1"),
        "read_json": (lambda: storage.read_json(f"{root}/folder/one.json"), [1, 2]),
        "read_many": (lambda: [len(data) for data in storage.read_many([f"{root}/folder/one.json"])], [11]),
        "open_file": (lambda: opened(f"{root}/folder/one.json"), b"2"),
        "exists": (lambda: (storage.exists(f"{root}/folder"), storage.exists(f"{root}/fold")), (True, False)),
        "file_size": (lambda: storage.file_size(f"{root}/folder/one.json"), 11),
        "list_files": (lambda: [file.path for file in storage.list_files(root)], ["folder/one.json"]),
        "list_folders": (lambda: storage.list_folders(root), ["folder"]),
        "write_bytes": (lambda: storage.write_bytes(f"{root}/b", b"b"), None),
        "create_bytes": (lambda: storage.create_bytes(f"{root}/c", b"c"), True),
        "copy_file": (lambda: storage.copy_file(f"{root}/folder/one.json", f"{root}/d"), None),
        "remove": (lambda: storage.remove(f"{root}/folder", recursive=True), None),
    }


def opened(uri):
    with storage.open_file(uri) as file:
        file.seek(-4, 2)
        return file.read(1)


@pytest.mark.parametrize("name", list(in_place("")))
def test_one_retry_policy_holds_for_every_function(name, cloud, monkeypatch):
    """Each request is refused, then reset, then served; an unavailable store is one error that names the address."""
    storage.write_json(f"{cloud.uri}/folder/one.json", [1, 2])
    with FaultProxy(cloud.server) as proxy:
        monkeypatch.setenv(*cloud.at(proxy.endpoint))
        proxy.fault = lambda method, path, n: {1: "503", 2: "reset"}.get(n)
        work, expected = in_place(cloud.uri)[name]
        assert work() == expected
        faults = [fault for _, _, fault in proxy.log]
        assert {"503", "reset"} <= set(faults)
        monkeypatch.setattr(retry, "PATIENCE", 0.5)
        proxy.fault = lambda method, path, n: "503"
        with pytest.raises(StorageError, match=rf"{cloud.uri}.*no answer after \d attempts? in 0.5 s"):
            work()


# aiohttp repeats a request once if the connection is closed before a response; Azure's SDK retries an incomplete body
REPEATED_INSIDE = {"gs": ("reset",), "az": ("reset", "cut", "short")}


@pytest.mark.parametrize("fault", ["cut", "short", "stall", "500", "reset"])
def test_every_failed_attempt_is_counted_and_none_changes_what_is_read(cloud, monkeypatch, fault):
    data = random.Random(0).randbytes(40_000)
    storage.write_bytes(f"{cloud.uri}/x", data)
    monkeypatch.setattr(base, "READ_TIMEOUT", 0.5)
    with FaultProxy(cloud.server, stall=1.0) as proxy:
        monkeypatch.setenv(*cloud.at(proxy.endpoint))
        store = stores.make_store(cloud.uri)
        # requests of the file, without requests of its size, which some stores get after a short response
        proxy.fault = lambda method, path, n: fault if n < 3 and not path.startswith("/storage/v1/") else None
        assert store.read(f"{cloud.uri}/x", 100, 30_000) == data[100:30_000]
        if fault in REPEATED_INSIDE.get(cloud.uri.partition(":")[0], ()):
            assert store.retries <= 2
        else:
            assert store.retries >= 2  # more on a machine too busy to answer in half a second
        assert [used for _, _, used in proxy.log if used] == [fault] * 2


@pytest.mark.parametrize(("fault", "message"), [("403", "access denied"), ("404", "missing, or shorter")])
def test_permanent_errors_are_not_retried(cloud, monkeypatch, fault, message):
    with FaultProxy(cloud.server) as proxy:
        monkeypatch.setenv(*cloud.at(proxy.endpoint))
        proxy.fault = lambda method, path, n: fault
        with pytest.raises((UserError, FileNotFoundError), match=f"{cloud.uri}/x: {message}"):
            storage.read_bytes(f"{cloud.uri}/x")
        assert len(proxy.log) == 1


def test_a_file_whose_response_was_lost_is_recognised_as_ours(cloud, monkeypatch):
    """A repeated conditional write finds its own file, which is distinguished from the file of another caller."""
    with FaultProxy(cloud.server) as proxy:
        monkeypatch.setenv(*cloud.at(proxy.endpoint))
        proxy.fault = lambda method, path, n: "lost" if method in ("PUT", "POST") and n == 1 else None
        assert storage.create_bytes(f"{cloud.uri}/claim", b"mine")
        assert len(proxy.log) == 3
        assert not storage.create_bytes(f"{cloud.uri}/claim", b"yours")


def test_one_of_many_callers_makes_a_file(cloud):
    for i in range(5):
        with ThreadPoolExecutor(16) as pool:
            made = list(pool.map(lambda n, i=i: storage.create_bytes(f"{cloud.uri}/{i}", b"%d" % n), range(16)))
        assert storage.read_bytes(f"{cloud.uri}/{i}") == b"%d" % made.index(True)
        assert made.count(True) == 1


@pytest.mark.parametrize("data", [b"", b"\r", b"\n", b"x\r\n", b"\r\n--==0==--", b"--==0=="])
def test_bytes_that_protocols_use_as_separators(cloud, data, tmp_path):
    (tmp_path / "file").write_bytes(data)
    storage.write_bytes(f"{cloud.uri}/x", data)
    storage.copy_file(tmp_path / "file", f"{cloud.uri}/y")
    assert storage.read_bytes(f"{cloud.uri}/x") == storage.read_bytes(f"{cloud.uri}/y") == data


def test_an_open_file_reads_like_a_local_one(cloud, tmp_path):
    data = bytes(range(256)) * 40
    storage.write_bytes(f"{cloud.uri}/x", data)
    (tmp_path / "x").write_bytes(data)
    draws = random.Random(0)
    with storage.open_file(f"{cloud.uri}/x", block=999) as there, storage.open_file(tmp_path / "x") as here:
        for _ in range(60):
            place, size = draws.randrange(11_000), draws.choice((1, 100, 3000, 20_000))
            assert there.seek(place) == here.seek(place)
            assert there.read(size) == here.read(size)
            assert there.tell() == here.tell()
    with pytest.raises(FileNotFoundError, match=rf"{cloud.uri}/nothing"), storage.open_file(f"{cloud.uri}/nothing"):
        pass
    assert storage.read_bytes(f"{cloud.uri}/x", 10_000, 99_999) == data[10_000:]
    assert storage.read_bytes(f"{cloud.uri}/x", 99_999, 999_999) == b""
    for place in (f"{cloud.uri}/x", str(tmp_path / "x")):
        with pytest.raises(FileNotFoundError, match="shorter"):
            storage.read_range(place, 10_000, 99_999)


def test_a_large_file_is_uploaded_in_parts_and_read_back(cloud, tmp_path):
    data = random.Random(1).randbytes((16 << 20) + 5)
    (tmp_path / "large").write_bytes(data)
    storage.copy_file(tmp_path / "large", f"{cloud.uri}/large")
    storage.copy_file(f"{cloud.uri}/large", f"{cloud.uri}/again")
    storage.copy_file(f"{cloud.uri}/again", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_listing_follows_links_and_ends(kind, tmp_path, s3):
    root = tmp_path if kind == "local" else s3
    storage.write_bytes(f"{root}/a/one", b"1")
    storage.write_bytes(f"{root}/two", b"22")
    if kind == "local":
        (tmp_path / "a" / "loop").symlink_to(tmp_path)
        (tmp_path / "a" / "nothing").symlink_to(tmp_path / "gone")
        (tmp_path / "b").symlink_to(tmp_path / "a")
    assert [file.path for file in storage.list_files(root)] == ["a/one", "two"]
    assert storage.list_folders(root) == ["a", *(["b"] if kind == "local" else [])]
    assert (
        storage.list_files(f"{root}/two")
        == storage.list_files(f"{root}/none")
        == storage.list_folders(f"{root}/none")
        == []
    )


def test_an_address_that_never_answered_is_given_up_soon(cloud, monkeypatch):
    monkeypatch.setenv(*cloud.at(f"http://127.0.0.1:{free_port()}"))
    monkeypatch.setattr(base, "FIRST_PATIENCE", 0.3)
    with pytest.raises(
        StorageError, match=rf"no answer after .* in 0.3 s.*check that the store is up.*{cloud.variable}"
    ):
        storage.exists(f"{cloud.uri}/x")


def test_writing_into_a_bucket_that_is_not_there(cloud, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for write in (lambda uri: storage.write_bytes(uri, b""), lambda uri: storage.copy_file(tmp_path / "file", uri)):
        with pytest.raises(StorageError, match=r"://no-such-bucket-at-all/x: no such (bucket|container)"):
            write(f"{cloud.uri.partition('://')[0]}://no-such-bucket-at-all/x")


LIBRARIES = {"s3": ("boto3", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure")}


@pytest.mark.parametrize("scheme", LIBRARIES)
def test_a_missing_library_of_an_extra_is_one_line_with_the_install_command(monkeypatch, scheme):
    library, extra = LIBRARIES[scheme]
    for name in [name for name in sys.modules if name.partition(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, name, None)  # `import` then raises ImportError
    with pytest.raises(
        UserError, match=rf"{library} is not installed.*pip install -c constraints.txt -e '.\[{extra}\]'"
    ):
        stores.make_store(f"{scheme}://bucket/photos")


def test_extras_and_the_errors_that_name_them_agree():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, packages in libraries.EXTRAS.items():
        wanted = {name.replace("-", "_").removesuffix("_cpu") for name in project["optional-dependencies"][extra]}
        assert wanted == set(packages)
