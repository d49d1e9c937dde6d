"""https:// addresses: sources, datasets and weights from a web server. The server is on loopback, where http:// is allowed."""

import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models import create_model
from pipeline import retry, storage, stores
from pipeline.credentials import redacted, take_from_arguments, take_from_values, take_queries
from pipeline.data import Loader, open_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import StorageError, UserError
from pipeline.operations.doctor import store
from pipeline.operations.planning import preview
from pipeline.outputs import check_output
from pipeline.stores import base
from pipeline.training import run
from pipeline.training.config import ModelConfig
from pipeline.weights import load_weights, save_checkpoint_weights
from tests import prepared
from tests.faultproxy import FaultProxy
from tests.fileserver import FileServer
from tests.runs import changed, pretrain_config

SIGNATURE = "sv=2026&sp=r&sig=c2VjcmV0LXNpZ25hdHVyZQ%3D%3D"


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_URL_QUERIES", "")  # so that additions are undone after the test
    (tmp_path / "web").mkdir()
    with FileServer(tmp_path / "web") as server:
        yield server


def archives(image_folder: Path, folder: Path) -> None:
    """The images of the folder as tar, zip and Parquet."""
    files = sorted(path for path in image_folder.rglob("*.*"))
    with tarfile.open(folder / "photos.tar", "w") as archive, zipfile.ZipFile(folder / "photos.zip", "w") as second:
        for path in files:
            archive.add(path, path.relative_to(image_folder))
            second.write(path, path.relative_to(image_folder))
    rows = {"image": [path.read_bytes() for path in files], "label": [path.parent.name for path in files]}
    pq.write_table(pa.table(rows), folder / "photos.parquet", row_group_size=7)


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
def test_an_archive_on_the_web_is_prepared_like_one_on_disk(web, image_folder, tmp_path, without_ray, kind):
    archives(image_folder, web.folder)
    made = {}
    for place in (web.address, str(web.folder)):
        config = PrepareConfig(source=(f"{place}/photos.{kind}",), output=str(tmp_path / f"out{len(made)}"), size=32)
        made[place] = prepare(config)[""]
    assert made[web.address].rows == 30
    assert made[web.address].fingerprint == made[str(web.folder)].fingerprint
    assert {method for method, _, _ in web.requests} == {"GET"}


def test_several_addresses_become_one_dataset_through_faults(web, image_folder, tmp_path, without_ray, monkeypatch):
    archives(image_folder, web.folder)
    with FaultProxy(web.address) as proxy:
        proxy.fault = lambda method, path, n: {1: "503", 2: "cut"}.get(n)
        sources = (f"{proxy.endpoint}/photos.tar", f"{proxy.endpoint}/photos.parquet")
        made = prepare(PrepareConfig(source=sources, output=str(tmp_path / "out"), size=32))[""]
    assert (made.rows, made.duplicates, made.rejects) == (60, 0, {})


def test_a_published_dataset_is_loaded_like_one_on_disk(web, image_folder, tmp_path, without_ray):
    """A dataset needs no listing; with a cache the batches are the same."""
    prepare(PrepareConfig(source=(str(image_folder),), output=str(web.folder / "set"), size=40))
    found = []
    for uri, cache in [
        (f"{web.folder}/set", None),
        (f"{web.address}/set", None),
        (f"{web.address}/set", str(tmp_path / "c")),
    ]:
        with Loader(open_dataset(uri), batch_size=10, lanes=2, augment=Augment(size=32), cache_dir=cache) as loader:
            found.append([(batch["key"], batch["image"].clone()) for batch in loader])
    for other in found[1:]:
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(found[0], other, strict=True))
    assert store.readable(f"{web.address}/set").status == "ok"


def test_the_checks_before_training_accept_a_dataset_on_the_web(web, image_folder, tmp_path, without_ray, monkeypatch):
    """A web server cannot list files, so missing shards are found when they are read."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    prepare(PrepareConfig(source=(str(image_folder),), output=str(web.folder / "set"), size=40))
    small = {"model": ModelConfig(variant="mu/8", depth=1), "image_size": 32, "augment": Augment(size=32)}
    data = f"{web.address}/set"
    config = pretrain_config(data=data, validation=data, output=str(tmp_path / "run"), batch_size=8, lanes=8, **small)
    assert run.check_run(config).samples == len(list(image_folder.rglob("*.*")))
    with pytest.raises(UserError, match="elsewhere: no dataset here"):
        preview.dry_run(changed(config, data=f"{web.address}/elsewhere"), "demo", {})


def test_weights_are_loaded_from_a_file_on_the_web(web):
    source, target = create_model("mu/8", 4, 16), create_model("mu/8", 4, 16)
    save_checkpoint_weights(source, {"classes": list("abcd")}, str(web.folder / "run"))
    load_weights(target, f"{web.address}/run/model.safetensors")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    with pytest.raises(UserError, match="/run: no such file; name the file of the weights"):
        load_weights(target, f"{web.address}/run")


def test_reading_gives_the_same_bytes_as_from_disk(web, monkeypatch):
    data = random.Random(0).randbytes(10_000)
    (web.folder / "a file.bin").write_bytes(data)
    (web.folder / "empty").write_bytes(b"")
    uri = f"{web.address}/a file.bin"
    assert storage.read_bytes(uri) == storage.read_bytes(f"{web.address}/a%20file.bin") == data
    assert storage.read_bytes(uri, 100, 200) == data[100:200]
    assert storage.read_bytes(uri, 9_990, 20_000) == data[9_990:]
    assert storage.read_bytes(uri, 20_000, 30_000) == b""
    assert (storage.file_size(uri), storage.file_size(f"{web.address}/empty")) == (10_000, 0)
    assert (storage.exists(uri), storage.exists(f"{web.address}/nothing")) == (True, False)
    with storage.open_file(uri, block=999) as file:
        file.seek(-5, 2)
        assert file.read() == data[-5:]
    with pytest.raises(FileNotFoundError, match="shorter"):
        storage.read_range(uri, 9_990, 20_000)
    with pytest.raises(FileNotFoundError, match=f"{web.address}/nothing: missing"):
        storage.read_bytes(f"{web.address}/nothing")


@pytest.mark.parametrize("fault", ["cut", "short", "stall", "500"])
def test_every_failed_attempt_is_counted(web, monkeypatch, fault):
    (web.folder / "x").write_bytes(data := random.Random(0).randbytes(40_000))
    monkeypatch.setattr(base, "READ_TIMEOUT", 0.5)
    with FaultProxy(web.address, stall=1.0) as proxy:
        own = stores.make_store(f"{proxy.endpoint}/x")
        proxy.fault = lambda method, path, n: fault if n < 3 else None
        assert own.read(f"{proxy.endpoint}/x", 100, 30_000) == data[100:30_000]
        assert own.retries == 2
        monkeypatch.setattr(retry, "PATIENCE", 0.5)
        proxy.fault = lambda method, path, n: fault
        with pytest.raises(StorageError, match=rf"{proxy.endpoint}/x: no answer after \d attempts? in 0.5 s"):
            own.read(f"{proxy.endpoint}/x", 100, 30_000)


def test_only_small_files_are_read_from_a_server_without_ranges(web, monkeypatch):
    web.ranges = False
    (web.folder / "x").write_bytes(b"0123456789")
    assert storage.read_bytes(f"{web.address}/x", 2, 4) == b"23"
    assert storage.file_size(f"{web.address}/x") == 10
    monkeypatch.setattr(stores.web, "WHOLE", 5)
    with pytest.raises(UserError, match=r"/x: the server does not support byte ranges"):
        storage.read_bytes(f"{web.address}/x", 2, 4)
    web.sizes = False
    with pytest.raises(UserError, match=r"/x: the server does not report the size of the file"):
        storage.file_size(f"{web.address}/x")


def test_redirects_are_followed_but_not_to_where_others_can_read(web):
    (web.folder / "x").write_bytes(b"0123456789")
    web.redirects = {
        "/moved": "/x",
        "/plain": "http://example.com/x",
        "/file": "file:///etc/passwd",
        "/round": "/round",
    }
    assert storage.read_bytes(f"{web.address}/moved", 2, 4) == b"23"
    for path, message in [
        ("plain", "redirects to http://example.com, which is not encrypted"),
        ("file", "not encrypted"),
    ]:
        with pytest.raises(UserError, match=message):
            storage.read_bytes(f"{web.address}/{path}")
    with pytest.raises(UserError, match="more than 5 redirects"):
        storage.read_bytes(f"{web.address}/round")
    with pytest.raises(UserError, match=r"http://example\.com/x: is not encrypted; use https://"):
        storage.read_bytes("http://example.com/x")


@pytest.mark.parametrize("entry", ["default", "machine 127.0.0.1", "machine localhost"])
def test_a_login_is_sent_only_to_the_host_of_the_address(web, tmp_path, monkeypatch, entry):
    (tmp_path / "netrc").write_text(f"{entry} login bob password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (web.folder / "x").write_bytes(b"0123456789")
    with FileServer(web.folder) as other:
        web.redirects = {
            "/here": "/x",
            "/there": f"{other.address}/x",
            "/name": other.address.replace("127.0.0.1", "localhost") + "/x",
        }
        for path in ("x", "here", "there", "name"):
            assert storage.read_bytes(f"{web.address}/{path}") == b"0123456789"
        assert set(other.logins) == {""}
    assert set(web.logins) == {"" if "localhost" in entry else "Basic Ym9iOmh1bnRlcjI="}


def test_a_server_elsewhere_cannot_redirect_to_this_machine(web, tmp_path):
    """The server at 127.0.0.2 counts as another machine. The certificate is read when aiohttp is imported."""
    (web.folder / "x").write_bytes(b"0123456789")
    pem = tmp_path / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", pem, "-out", tmp_path / "c.pem"]
    subprocess.run(
        [*command, "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.2"], check=True, capture_output=True
    )
    pem.write_bytes(pem.read_bytes() + (tmp_path / "c.pem").read_bytes())
    with FileServer(web.folder, "127.0.0.2", pem) as public:
        public.redirects = {"/there": f"{web.address}/x", "/again": "/there", "/own": "/x"}
        code = "import sys; from pipeline import storage; print(storage.read_bytes(sys.argv[1]))"
        environment = os.environ | {"SSL_CERT_FILE": str(tmp_path / "c.pem")}
        found = {}
        for path in ("own", "there", "again"):
            result = subprocess.run(
                [sys.executable, "-c", code, f"{public.address}/{path}"],
                env=environment,
                text=True,
                capture_output=True,
            )
            found[path] = result.stdout + result.stderr
    assert found["own"] == "b'0123456789'\n"
    for path in ("there", "again"):
        assert f"/{path}: redirects to http://127.0.0.1, which is not encrypted" in found[path]
    assert not web.requests


def test_writing_and_listing_are_refused(web, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for work in (
        lambda uri: storage.write_bytes(uri, b""),
        lambda uri: storage.create_bytes(uri, b""),
        lambda uri: storage.copy_file(tmp_path / "file", uri),
        storage.remove,
        check_output,
    ):
        with pytest.raises(UserError, match=r"https://host/x.*https:// can only be read; write to a local path"):
            work("https://host/x")
    with pytest.raises(UserError, match="files cannot be listed over https://; name a file"):
        storage.list_files("https://host/folder")
    (found,) = store.writable("https://host/folder")
    assert (found.check, found.status) == ("output", "error")
    with pytest.raises(UserError, match=r"/none: no such file; name an archive or a Parquet file"):
        prepare(PrepareConfig(source=(f"{web.address}/none",), output=str(tmp_path / "out")))


# ---------------------------------------------------------------- signed addresses


def test_a_signed_address_is_read_and_its_signature_is_shown_nowhere(web, image_folder, tmp_path):
    """The whole job: command line, log, errors, and every byte that it writes."""
    archives(image_folder, web.folder)
    web.query = SIGNATURE
    address = f"{web.address}/photos.tar?{SIGNATURE}"
    options = ("--output", tmp_path / "out", "--size", 32, "--num-cpus", 1, "--json")
    result = prepared.job("--source", address, *options)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["dataset"]["prepared"] == 30
    assert "stays in the shell history" in result.stderr
    assert all(query.endswith(SIGNATURE) for _, query, _ in web.requests)
    web.query = "another"
    failed = prepared.job("--source", address, "--output", tmp_path / "none", *options[2:])
    assert failed.returncode == 2
    assert f"{web.address}/photos.tar: access denied" in failed.stderr
    for text in (result.stdout, result.stderr, failed.stdout, failed.stderr):
        assert "c2VjcmV0" not in text
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"c2VjcmV0" not in path.read_bytes(), path


def test_the_signature_of_a_folder_applies_to_its_files(web, image_folder, monkeypatch, without_ray):
    prepare(PrepareConfig(source=(str(image_folder),), output=str(web.folder / "set"), size=32))
    web.query = SIGNATURE
    with pytest.raises(UserError, match="access denied"):
        open_dataset(f"{web.address}/set")
    dataset = open_dataset(f"{web.address}/set?{SIGNATURE}")
    assert dataset.uri == f"{web.address}/set"
    assert len(dataset[0]["image"]) > 100


def test_signatures_are_sent_only_where_they_apply(monkeypatch):
    for name in ("VIT_URL_QUERIES", "AZURE_STORAGE_SAS_TOKEN"):
        monkeypatch.setenv(name, "")
    signed = "https://host/set/a.tar?X-Amz-Date=1&X-Amz-Signature=5e7f22&x=1"
    assert take_from_arguments(["--source", signed, f"--labels={signed}"]) == [
        "--source",
        "https://host/set/a.tar",
        "--labels=https://host/set/a.tar",
    ]
    assert take_queries("az://container/a?sv=1&sig=abc") == "az://container/a"
    assert os.environ["AZURE_STORAGE_SAS_TOKEN"] == "sv=1&sig=abc"
    assert take_queries("https://host/a?download=1") == "https://host/a?download=1"
    values = {"source": [signed], "data": "https://other/b?sig=abc"}
    expected = {"source": ["https://host/set/a.tar"], "data": "https://other/b"}
    assert take_from_values(values, "x.yaml") == expected
    assert json.loads(os.environ["VIT_URL_QUERIES"]) == {
        "https://host/set/a.tar": "X-Amz-Date=1&X-Amz-Signature=5e7f22&x=1",
        "https://other/b": "sig=abc",
    }
    with pytest.raises(UserError, match=r"x.yaml.hook: a secret in .*Signature=\*\*\*"):
        take_from_values({"hook": signed}, "x.yaml")  # a command, so that nothing can be taken out of it
    monkeypatch.setenv("VIT_URL_QUERIES", "[1]")
    with pytest.raises(UserError, match="VIT_URL_QUERIES: write"):
        storage.read_bytes("https://host/a")


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a?sv=1&sig=SECRET",
        "GET https://host/a?X-Goog-Signature=SECRET&x=1 failed",
        "https://host/a?AWSAccessKeyId=SECRET",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=SECRET;x=1",
        "SharedAccessSignature=sv=1&sig=SECRET",
        "the token hf_SECRETSECRETSECRET is no longer valid",
        "Authorization: Bearer ya29.SECRET-SECRET_SECRET",
    ],
)
def test_secrets_in_any_text_are_hidden(text):
    assert "SECRET" not in redacted(text)


def test_without_the_library_one_line_names_the_extra():
    code = "import sys; sys.modules['aiohttp'] = None; from pipeline import storage; storage.exists('https://host/x')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "aiohttp is not installed" in result.stderr.splitlines()[-1]
    assert "-e '.[http]'" in result.stderr.splitlines()[-1]
