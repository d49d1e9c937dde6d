"""hf:// addresses: data sets of a Hub on loopback, with its redirects, tokens, revisions and pages."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import storage
from pipeline.data import Loader, open_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import StorageError, UserError
from pipeline.operations.doctor import store
from pipeline.outputs import check_output
from pipeline.stores import base
from tests import prepared
from tests.faultproxy import FaultProxy
from tests.fileserver import FileServer
from tests.hubserver import HubServer
from tests.objectstore import copy_folder
from tests.ports import free_port

TOKEN = "hf_SecretOfTheTests17cc09"
NAME = "hf://datasets/owner/photos"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # ignore the token of this machine
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def publish(hub, image_folder, revision="main"):
    """The pictures as folders, as Parquet in two files, and as a prepared dataset; its folder on the server."""
    root = hub.folder / "owner" / "photos" / revision
    copy_folder(image_folder, root / "folders")
    files = sorted(path for path in image_folder.rglob("*.*"))
    for number, some in enumerate((files[::2], files[1::2])):
        rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in some]}
        rows["label"] = [path.parent.name for path in some]
        (root / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), root / "data" / f"train-{number:05d}-of-00002.parquet", row_group_size=4)
    return root


@pytest.mark.parametrize("part", ["folders", "data", "data/train-00000-of-00002.parquet"])
def test_a_data_set_of_the_hub_is_prepared_like_one_on_disk(hub, image_folder, tmp_path, without_ray, part):
    root = publish(hub, image_folder)
    made = [
        prepare(PrepareConfig(source=(source,), output=str(tmp_path / f"out{i}"), size=32))[""]
        for i, source in enumerate((f"{NAME}/{part}", f"{root}/{part}"))
    ]
    assert made[0].rows == (15 if part.endswith("parquet") else 30)
    assert made[0].fingerprint == made[1].fingerprint


def test_a_prepared_dataset_of_the_hub_is_loaded_like_one_on_disk_despite_faults(
    hub, image_folder, without_ray, monkeypatch
):
    there = str(hub.folder / "owner" / "photos" / "main" / "set")
    prepare(PrepareConfig(source=(str(image_folder),), output=there, size=40))
    found = []
    with FaultProxy(hub.address) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.endpoint)
        proxy.fault = lambda method, path, n: "503" if n == 1 else None
        for uri in (there, f"{NAME}/set"):
            with Loader(open_dataset(uri), batch_size=10, lanes=2, augment=Augment(size=32)) as loader:
                found.append([(batch["key"], batch["image"].clone()) for batch in loader])
        assert {fault for _, _, fault in proxy.log} == {"503", None}
        assert store.readable(f"{NAME}/set").status == "ok"
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(*found, strict=True))


def test_listing_by_pages_revisions_and_odd_names(hub):
    names = [f"{i % 3}/{i:03d}.jpg" for i in range(25)] + ["a b/é#?%20[1].jpg"]
    for revision in ("main", "refs/convert/parquet"):
        for name in names:
            storage.write_bytes(hub.folder / "owner" / "photos" / revision / name, f"{revision} {name}".encode())
    for uri, revision in [(NAME, "main"), (f"{NAME}@refs/convert/parquet", "refs/convert/parquet")]:
        found = storage.list_files(uri)
        assert [file.path for file in found] == sorted(names)
        assert storage.list_folders(uri) == ["0", "1", "2", "a b"]
        for file in found:
            assert storage.read_bytes(file.uri) == f"{revision} {file.path}".encode()
            assert storage.file_size(file.uri) == file.size
    assert storage.exists(f"{NAME}/0")
    assert not storage.exists(f"{NAME}/9")
    assert storage.list_files("hf://datasets/owner/none") == []
    with pytest.raises(FileNotFoundError, match=f"{NAME}/9: missing"):
        storage.read_bytes(f"{NAME}/9")


def test_a_private_data_set_needs_a_token_which_is_sent_to_the_hub_alone_and_shown_nowhere(
    hub, image_folder, tmp_path, monkeypatch
):
    publish(hub, image_folder)
    hub.token = TOKEN
    command = ("--source", f"{NAME}/data", "--output", tmp_path / "out", "--size", 32, "--num-cpus", 1)
    refused = prepared.job(*command)
    assert refused.returncode == 2
    assert f"{NAME}/data: access denied" in refused.stderr
    assert "set HF_TOKEN" in refused.stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = prepared.job(*command)
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert "cdn-5e7f22" not in result.stdout + result.stderr
    assert hub.files.requests  # the files were requested from the other server,
    assert not any("Bearer" in login for login in hub.files.logins)  # which never saw the token
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_the_token_is_not_sent_to_the_host_of_another_page(hub, monkeypatch):
    for i in range(20):
        storage.write_bytes(hub.folder / "owner" / "photos" / "main" / f"{i:03d}.jpg", b"x")
    hub.token, hub.pages = TOKEN, hub.files.address
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    storage.list_files(NAME)
    assert hub.requests[0][1] == f"Bearer {TOKEN}"
    assert set(hub.files.logins) == {""}
    hub.pages = hub.address.replace("http://", "HTTP://")  # the same host, written differently
    assert len(storage.list_files(NAME)) == 20


def test_a_login_of_netrc_is_not_sent_to_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login bob password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    storage.write_bytes(hub.folder / "owner" / "photos" / "main" / "x.jpg", bytes(2000))
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        hub.token = token
        assert storage.read_bytes(f"{NAME}/x.jpg") == bytes(2000)
    assert {login for _, login in hub.requests} == {"", f"Bearer {TOKEN}"}
    assert set(hub.files.logins) == {""}


def test_addresses_that_are_not_data_sets_and_writing_are_refused(hub, monkeypatch):
    for uri in ("hf://owner/model/x", "hf://datasets/owner", "hf://spaces/owner/x/y"):
        with pytest.raises(UserError, match=f"{uri}: .*use hf://datasets/OWNER/NAME"):
            storage.read_bytes(uri)
    with pytest.raises(UserError, match="hf:// can only be read"):
        check_output(f"{NAME}/out")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(base, "FIRST_PATIENCE", 0.3)
    with pytest.raises(
        StorageError, match=r"no answer after .* check that the server is up, the address and HF_ENDPOINT"
    ):
        storage.read_bytes(f"{NAME}/x")
    assert "no response from HF_ENDPOINT" in store.readable(f"{NAME}/set").message


@pytest.mark.parametrize(
    "page", ["[" * 100_000, "{}", "null", "[1]", '[{"path": 1}]', '[{"path": "a", "type": "file", "size": 1e400}]']
)
def test_a_server_that_is_not_the_hub_is_one_line(tmp_path, monkeypatch, page):
    listing = tmp_path / "api" / "datasets" / "owner" / "photos" / "tree" / "main"
    listing.parent.mkdir(parents=True)
    listing.write_text(page)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with FileServer(tmp_path) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        if page == "{}":
            assert storage.list_files(NAME) == []
            return
        with pytest.raises(UserError, match=f"{NAME}: the server does not answer like the Hub"):
            storage.list_files(NAME)
