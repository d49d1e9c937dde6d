"""Official files: verification, lookup, download."""

import hashlib
import io
import os
import shutil
import urllib.error
import zipfile

import pytest

from pipeline import retry
from pipeline.errors import UserError
from pipeline.vtab import TASKS, archives, get, prepare, requirements
from pipeline.vtab.datasets.base import OfficialFile
from tests.vtab import rows

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
    """Detected by size with verification, and by the format without it. No file that looks complete remains."""
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
    """Without the marker of miniatures, the official sizes and checksums apply."""
    shutil.copytree(f"{vtab_raw}/eurosat", tmp_path / "eurosat")
    with pytest.raises(UserError, match=r"EuroSAT.zip: truncated: .* bytes, the official file has 94,280,567"):
        prepare(["eurosat"], str(tmp_path), str(tmp_path / "out"))


def test_files_may_be_in_a_folder_with_the_name_of_the_task(vtab_raw, tmp_path):
    shutil.copytree(f"{vtab_raw}/oxford_iiit_pet", tmp_path / "raw" / "pets")
    counts = prepare(["pets"], str(tmp_path / "raw"), str(tmp_path / "out"), verify=False)
    assert counts["pets"]["test"]["images"] == 24


def test_every_data_set_states_its_files():
    for name in TASKS:
        files = requirements(name)
        assert files
        for file in files:
            assert file.manual or (file.url.startswith("http") and file.bytes and len(bytes.fromhex(file.sha256)) == 32)


class Server:
    """Imitates a download server: sends a body in pieces, and interrupts the first connection."""

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
def test_an_interrupted_download_continues(ranges, tmp_path, monkeypatch):
    body = os.urandom(5000)
    server = Server(body, ranges)
    monkeypatch.setattr(archives.urllib.request, "urlopen", server)
    file = OfficialFile(
        name="a.bin", bytes=5000, sha256=hashlib.sha256(body).hexdigest(), url="http://example.org/a.bin"
    )
    archives.download(str(tmp_path), "dtd", file)
    assert (tmp_path / "dtd/a.bin").read_bytes() == body
    assert server.requests == [0, 1000]


def test_a_download_of_another_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.urllib.request, "urlopen", Server(os.urandom(5000)))
    file = OfficialFile(name="a.bin", bytes=5000, sha256="0" * 64, url="http://example.org/a.bin")
    with pytest.raises(UserError, match="not the official"):
        archives.download(str(tmp_path), "dtd", file)
    assert not list((tmp_path / "dtd").iterdir())


@pytest.mark.parametrize(
    ("code", "message", "tries"), [(404, "download it manually", 1), (503, "repeat the command", 3)]
)
def test_a_server_that_refuses(code, message, tries, tmp_path, monkeypatch):
    calls = []

    def refuse(request, timeout):
        calls.append(request)
        raise urllib.error.HTTPError(request.full_url, code, "no", {}, None)

    monkeypatch.setattr(archives.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(retry, "PATIENCE", 0.5)
    file = OfficialFile(name="a.bin", bytes=5, sha256="0" * 64, url="http://example.org/a.bin")
    with pytest.raises(UserError, match=message):
        archives.download(str(tmp_path), "dtd", file)
    assert len(calls) == tries


@pytest.mark.parametrize("unpacked", [False, True])
def test_caltech_is_found_in_the_zip_of_its_current_address(unpacked, vtab_raw, vtab_prepared, tmp_path):
    """caltech-101.zip contains the official tar.gz, whose checksum still holds."""
    folder = tmp_path / "raw" / "caltech101"
    folder.mkdir(parents=True)
    shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path / "raw")
    tar = f"{vtab_raw}/caltech101/101_ObjectCategories.tar.gz"
    if unpacked:
        (folder / "caltech-101").mkdir()
        shutil.copy(tar, folder / "caltech-101")
    else:
        with zipfile.ZipFile(folder / "caltech-101.zip", "w") as archive:
            archive.writestr("caltech-101/Annotations.tar", b"")
            archive.write(tar, "caltech-101/101_ObjectCategories.tar.gz")
    prepare(["caltech101"], str(tmp_path / "raw"), str(tmp_path / "out"))
    for split in ("train800", "val200", "test"):
        assert rows(str(tmp_path / "out"), "caltech101", split) == rows(vtab_prepared[0], "caltech101", split)


def test_another_tar_in_the_zip_of_caltech_is_refused(vtab_raw, tmp_path):
    shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path)
    for member, message in (
        ("caltech-101/101_ObjectCategories.tar.gz", "differs from"),
        ("a.tar.gz", "is missing"),
    ):
        with zipfile.ZipFile(tmp_path / "caltech-101.zip", "w") as archive:
            archive.writestr(member, b"another file")
        with pytest.raises(UserError, match=rf"caltech-101\.zip: .*{message}"):
            prepare(["caltech101"], str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize("unpacked", [False, True])
def test_eurosat_is_found_under_its_current_name(unpacked, vtab_raw, vtab_prepared, tmp_path):
    with (
        zipfile.ZipFile(f"{vtab_raw}/eurosat/EuroSAT.zip") as old,
        zipfile.ZipFile(tmp_path / "EuroSAT_RGB.zip", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name.replace("2750/", "EuroSAT_RGB/"), old.read(name))
    if unpacked:
        zipfile.ZipFile(tmp_path / "EuroSAT_RGB.zip").extractall(tmp_path)
        (tmp_path / "EuroSAT_RGB.zip").unlink()
    shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path)
    prepare(["eurosat"], str(tmp_path), str(tmp_path / "out"))
    for split in ("train800", "val200"):
        assert rows(str(tmp_path / "out"), "eurosat", split) == rows(vtab_prepared[0], "eurosat", split)


def test_the_error_names_the_alternatives_to_a_missing_file(tmp_path):
    with pytest.raises(UserError) as error:
        prepare(["caltech101", "eurosat"], str(tmp_path), str(tmp_path / "out"))
    for name in ("caltech-101.zip", "101_ObjectCategories", "EuroSAT_RGB.zip", "2750", "zenodo.org/records/7711810"):
        assert name in str(error.value)
