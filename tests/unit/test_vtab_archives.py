"""Official files: checked, found in their places, downloaded."""

import hashlib
import io
import os
import shutil
import urllib.error

import pytest

from pipeline.errors import UserError
from pipeline.vtab import TASKS, archives, get, prepare, requirements
from pipeline.vtab.datasets.base import OfficialFile

pytestmark = pytest.mark.usefixtures("without_ray")
DATASETS = sorted({get(name).dataset for name in TASKS})


def packed_files(vtab_raw: str, dataset: str) -> list[str]:
    return [
        place.file.name
        for place in archives.locate(vtab_raw, dataset)[0]
        if place.packed and not place.file.name.endswith(".csv")
    ]


@pytest.mark.parametrize(
    "dataset", [name for name in DATASETS if name not in ("resisc45", "diabetic_retinopathy_detection")]
)
def test_a_truncated_archive_is_named(dataset, vtab_raw, tmp_path):
    """With verification by its size; without by what the format itself tells. Nothing complete is left behind."""
    task = next(name for name in TASKS if get(name).dataset == dataset)
    for name in packed_files(vtab_raw, dataset):
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        shutil.copytree(f"{vtab_raw}/{dataset}", tmp_path / "raw" / dataset)
        shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path / "raw")
        path = tmp_path / "raw" / dataset / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 5])
        for verify in (True, False):
            with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
                prepare([task], str(tmp_path / "raw"), str(tmp_path / "out"), verify=verify)
            assert verify is False or "truncated" in str(error.value)
            assert not list(tmp_path.glob("out/*/test/manifest.json"))


def test_a_changed_archive_is_named(vtab_raw, tmp_path):
    shutil.copytree(f"{vtab_raw}/cifar100", tmp_path / "cifar100")
    shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path)
    path = tmp_path / "cifar100/cifar-100-binary.tar.gz"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"cifar-100-binary\.tar\.gz: damaged or another version"):
        prepare(["cifar100"], str(tmp_path), str(tmp_path / "out"))


def test_an_official_name_with_other_contents_is_refused(vtab_raw, tmp_path):
    """Without the miniature's marker the official sizes and checksums hold."""
    shutil.copytree(f"{vtab_raw}/eurosat", tmp_path / "eurosat")
    with pytest.raises(UserError, match=r"EuroSAT.zip: truncated: .* bytes, the official file has 94,280,567"):
        prepare(["eurosat"], str(tmp_path), str(tmp_path / "out"))


def test_files_may_lie_under_the_name_of_the_task(vtab_raw, tmp_path):
    shutil.copytree(f"{vtab_raw}/oxford_iiit_pet", tmp_path / "raw" / "pets")
    counts = prepare(["pets"], str(tmp_path / "raw"), str(tmp_path / "out"), verify=False)
    assert counts["pets"]["test"]["images"] == 24


def test_every_data_set_states_its_files():
    for name in TASKS:
        files = requirements(name)
        assert files
        for file in files:
            assert file.by_hand or (
                file.url.startswith("http") and file.bytes and len(bytes.fromhex(file.sha256)) == 32
            )


class Server:
    """Stands in for the owners' servers: hands out a body in pieces, and cuts the first connection short."""

    def __init__(self, body: bytes, ranges: bool = True) -> None:
        self.body, self.ranges, self.requests = body, ranges, []

    def __call__(self, request, timeout):
        start = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.requests.append(start)
        response = io.BytesIO(self.body[start if self.ranges else 0 :])
        response.status = 206 if self.ranges else 200
        if len(self.requests) == 1:
            pieces = [self.body[:1000]]

            def read(_):
                if pieces:
                    return pieces.pop()
                raise ConnectionResetError("connection reset")

            response.read = read
        return response


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_broke_off(ranges, tmp_path, monkeypatch):
    body = os.urandom(5000)
    server = Server(body, ranges)
    monkeypatch.setattr(archives.urllib.request, "urlopen", server)
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    file = OfficialFile(
        name="a.bin", bytes=5000, sha256=hashlib.sha256(body).hexdigest(), url="http://example.org/a.bin"
    )
    archives.download(str(tmp_path), "dtd", file)
    assert (tmp_path / "dtd/a.bin").read_bytes() == body
    assert server.requests == [0, 1000]


def test_a_download_of_another_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.urllib.request, "urlopen", Server(os.urandom(5000)))
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    file = OfficialFile(name="a.bin", bytes=5000, sha256="0" * 64, url="http://example.org/a.bin")
    with pytest.raises(UserError, match="not the official"):
        archives.download(str(tmp_path), "dtd", file)
    assert not list((tmp_path / "dtd").iterdir())


@pytest.mark.parametrize(
    ("code", "message", "tries"), [(404, "fetch it by hand", 1), (503, "run the command again", 5)]
)
def test_a_server_that_refuses(code, message, tries, tmp_path, monkeypatch):
    calls = []

    def refuse(request, timeout):
        calls.append(request)
        raise urllib.error.HTTPError(request.full_url, code, "no", {}, None)

    monkeypatch.setattr(archives.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    file = OfficialFile(name="a.bin", bytes=5, sha256="0" * 64, url="http://example.org/a.bin")
    with pytest.raises(UserError, match=message):
        archives.download(str(tmp_path), "dtd", file)
    assert len(calls) == tries
