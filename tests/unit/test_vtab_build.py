"""The command: finished work is not repeated, and failures do not stop other tasks."""

import json
import runpy
import shutil
import tarfile
from pathlib import Path

import pytest

from pipeline.data import Loader, open_dataset
from pipeline.data.loading.augment import Augment
from pipeline.errors import InUse, UserError
from pipeline.lease import Lease
from pipeline.vtab import Incomplete, archives, counts_table, open_split, parts, prepare
from tests.vtab import rows

PROJECT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("without_ray")


def test_the_counts_are_printed_beside_the_official_ones(vtab_prepared):
    lines = counts_table(vtab_prepared[1]).splitlines()
    assert len(lines) == 1 + 19 * 4
    assert any(
        line.split()[:2] == ["cifar100", "test"] and "10,000" in line and "(miniature)" in line for line in lines
    )


def test_the_loader_reads_every_split(vtab_prepared):
    output, _ = vtab_prepared
    for task in ("sun397", "smallnorb_azimuth"):
        dataset = open_split(f"{output}/{task}", "train800val200")
        with Loader(dataset, batch_size=8, train=False, augment=Augment(size=32, crop="squash", flip=False)) as loader:
            batches = list(loader)
        assert sum(len(batch["label"]) for batch in batches) == len(dataset)
        assert batches[0]["image"].shape[1:] == (32, 32, 3)


def test_an_incomplete_unpacked_folder_is_refused(vtab_raw, tmp_path):
    shutil.copytree(f"{vtab_raw}/resisc45", tmp_path / "resisc45")
    with pytest.raises(UserError, match="officially 18,900"):
        prepare(["resisc45"], str(tmp_path), str(tmp_path / "out"))


def test_missing_images_are_errors_or_rejects(vtab_raw, tmp_path):
    folder = tmp_path / "raw" / "oxford_flowers102"
    folder.mkdir(parents=True)
    for name in ("imagelabels.mat", "setid.mat"):
        shutil.copy(f"{vtab_raw}/oxford_flowers102/{name}", folder)
    with tarfile.open(f"{vtab_raw}/oxford_flowers102/102flowers.tgz") as archive:
        archive.extractall(folder, filter="data")
    missing = sorted((folder / "jpg").iterdir())[0]
    missing.unlink()
    (tmp_path / "raw" / archives.MINIATURE).write_text('{"files": {}}')
    splits = ("train", "val", "test")
    with pytest.raises(
        UserError, match=f"1 or more of the listed images are missing from the archive, such as jpg/{missing.name}"
    ):
        prepare(["flowers102"], str(tmp_path / "raw"), str(tmp_path / "out"), splits=splits)
    counts = prepare(["flowers102"], str(tmp_path / "raw"), str(tmp_path / "out2"), splits=splits, verify=False)
    assert sum(counts["flowers102"][split]["rejects"] for split in splits) == 1


def test_one_broken_data_set_does_not_stop_the_others(vtab_raw, tmp_path):
    for name in ("cifar100", "dtd"):
        shutil.copytree(f"{vtab_raw}/{name}", tmp_path / "raw" / name)
    shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path / "raw")
    path = tmp_path / "raw/cifar100/cifar-100-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Incomplete, match=r"cifar100: .*truncated") as error:
        prepare(["cifar100", "dtd"], str(tmp_path / "raw"), str(tmp_path / "out"))
    assert error.value.counts["dtd"]["test"]["images"] == 24  # finished splits are still reported
    assert list(error.value.counts) == ["dtd"]
    assert len(open_split(str(tmp_path / "out/dtd"), "test")) == 24
    assert not (tmp_path / "out/cifar100/test/manifest.json").exists()


def test_finished_work_is_not_repeated(vtab_raw, tmp_path):
    """One of three archives is damaged. After it is replaced, the images of the
    other archives are not written again."""
    raw, output = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(f"{vtab_raw}/patch_camelyon", raw / "patch_camelyon")
    damaged = raw / "patch_camelyon/camelyonpatch_level_2_split_test_x.h5.gz"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:200] + bytes(len(good) - 200))
    arguments = ["patch_camelyon"], str(raw), str(output)
    with pytest.raises(Incomplete, match=damaged.name):
        prepare(*arguments, verify=False)
    assert not list(tmp_path.rglob("manifest.json"))
    written = {path: path.stat().st_mtime_ns for path in output.rglob("part-*.parquet")}
    assert {path.parent.name for path in written} == {"train800", "val200", "train800val200"}
    damaged.write_bytes(good)
    first = prepare(*arguments, verify=False)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert prepare(*arguments, verify=False) == first
    assert [path.name for path in output.iterdir()] == ["patch_camelyon"]  # no receipts are left
    assert {path.name for path in (output / "patch_camelyon").iterdir()} == set(first["patch_camelyon"])


def test_finished_tasks_do_not_need_their_archives(vtab_raw, tmp_path):
    shutil.copytree(f"{vtab_raw}/dtd", tmp_path / "raw" / "dtd")
    shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path / "raw")
    arguments = str(tmp_path / "raw"), str(tmp_path / "out")
    first = prepare(["dtd"], *arguments)
    shutil.rmtree(tmp_path / "raw")
    assert prepare(["dtd"], *arguments) == first
    with pytest.raises(UserError, match=r"dtd-r1\.0\.1\.tar\.gz"):  # another split needs them again
        prepare(["dtd"], *arguments, splits=("train800", "trainval"))
    (tmp_path / "out" / "dtd").rename(tmp_path / "out" / "pets")
    with pytest.raises(UserError, match="already contains another dataset"):
        prepare(["pets"], *arguments)


@pytest.mark.parametrize(
    "name", ["cat/0.jpg", "part-0.parquet", "shard-00000.parquet", "train.csv", "part-00000-0000.parquet/x"]
)
def test_other_files_in_the_output_are_refused_and_stay(name, vtab_raw, tmp_path):
    """Also Parquet files of another program, which would be removed at the end as those of a killed worker."""
    other = tmp_path / "dtd" / "val200" / name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x")
    with pytest.raises(UserError, match=rf"val200: already contains other files \({name}\); choose another --output"):
        prepare(["dtd"], vtab_raw, str(tmp_path), splits=("val200",))
    assert other.read_bytes() == b"x"


@pytest.mark.parametrize("name", ["part-00000-0000.parquet", "part-00007-0001.parquet.0123abcd.tmp", "rejects.parquet"])
def test_files_of_a_killed_worker_are_no_other_files(name, vtab_raw, tmp_path):
    left = tmp_path / "dtd" / "val200" / name
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    assert prepare(["dtd"], vtab_raw, str(tmp_path), splits=("val200",))["dtd"]["val200"]["images"]


def test_another_dataset_in_the_output_is_refused(vtab_raw, tmp_path):
    prepare(["dtd"], vtab_raw, str(tmp_path), splits=("val200",))
    with pytest.raises(UserError, match="already contains another dataset"):
        prepare(["dtd"], vtab_raw, str(tmp_path), splits=("val200",), verify=False)


def test_a_second_command_into_one_output_is_refused_by_the_name_of_the_first(vtab_raw, tmp_path):
    with Lease(str(tmp_path / "out"), "prepare vtab", doing="being written"):
        with pytest.raises(InUse, match=r"out is being written by prepare vtab, process \d+"):
            prepare(["flowers102"], vtab_raw, str(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_full_pools(vtab_raw, tmp_path):
    counts = prepare(["eurosat"], vtab_raw, str(tmp_path), splits=("train", "val", "trainval", "test"))["eurosat"]
    assert {split: c["images"] for split, c in counts.items()} == {"train": 72, "val": 24, "trainval": 96, "test": 24}
    assert counts["trainval"]["official"] == 21600
    assert len(open_dataset(tmp_path / "eurosat" / "trainval")) == 96


def test_wrong_names_and_missing_splits(tmp_path):
    with pytest.raises(UserError, match='did you mean "dmlab"'):
        prepare(["dmlabs"], str(tmp_path), str(tmp_path))
    with pytest.raises(UserError, match='did you mean "trainval"'):
        prepare(["dmlab"], str(tmp_path), str(tmp_path), splits=("trainvl",))
    with pytest.raises(UserError, match="vtab dmlab --raw FOLDER --splits val200"):
        open_split(str(tmp_path / "dmlab"), "val200")


def test_missing_files_are_listed_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        prepare(["cifar100", "resisc45", "pets"], str(tmp_path), str(tmp_path / "out"))
    text = str(error.value)
    for part in (
        "cifar100: 1 file is missing",
        "pets: 2 files are missing",
        "168,513,733 bytes",
        "58a81ae192c23a4b",
        "NWPU-RESISC45.rar",
        "annotations.tar.gz",
    ):
        assert part in text


def test_a_missing_archive_fails_only_its_task(vtab_raw, tmp_path):
    shutil.copytree(f"{vtab_raw}/dtd", tmp_path / "raw" / "dtd")
    shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path / "raw")
    with pytest.raises(
        Incomplete, match=r"^clevr_count, clevr_distance: 1 file is missing.*\n.*CLEVR_v1.0.zip"
    ) as error:
        prepare(["clevr_count", "dtd", "clevr_distance"], str(tmp_path / "raw"), str(tmp_path / "out"))
    assert list(error.value.counts) == ["dtd"]
    assert not (tmp_path / "out" / "clevr_count").exists()


def test_an_empty_split_fails_only_that_split(vtab_raw, tmp_path):
    """Only the flowers of the train split exist."""
    raw = tmp_path / "raw" / "oxford_flowers102"
    shutil.copytree(f"{vtab_raw}/oxford_flowers102", raw)
    with tarfile.open(raw / "102flowers.tgz") as archive:
        archive.extractall(raw, filter="data")
    (raw / "102flowers.tgz").unlink()
    train = {row["key"] for row in rows(*prepare_flowers(vtab_raw, tmp_path / "all"), "train")}
    for path in (raw / "jpg").iterdir():
        if path.name not in train:
            path.unlink()
    splits = ("train800", "val200", "test")
    with pytest.raises(Incomplete) as error:
        prepare(["flowers102"], str(tmp_path / "raw"), str(tmp_path / "out"), splits=splits, verify=False)
    assert str(error.value).splitlines() == [
        "flowers102, split val200: none of the 24 listed images could be read; --splits train800 skips it",
        "flowers102, split test: none of the 24 listed images could be read; --splits train800 skips it",
    ]
    assert {split: made["images"] for split, made in error.value.counts["flowers102"].items()} == {"train800": 24}


def prepare_flowers(raw: str, output: Path) -> tuple[str, str]:
    prepare(["flowers102"], raw, str(output), splits=("train",))
    return str(output), "flowers102"


def test_a_missing_list_fails_only_its_split(vtab_prepared, tmp_path):
    folder = tmp_path / "raw" / "dtd"
    (folder / "images").mkdir(parents=True)
    for split in ("train800", "test"):
        lines = []
        for row in rows(vtab_prepared[0], "dtd", split):
            name = f"images/{row['key'].replace('/', '_')}"
            (folder / name).write_bytes(row["image"])
            lines.append(f"{name} {row['label']}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    with pytest.raises(Incomplete, match=r"^dtd, split val200: .*val200.txt is missing") as error:
        prepare(["dtd"], str(tmp_path / "raw"), str(tmp_path / "out"), splits=("train800", "val200", "test"))
    assert set(error.value.counts["dtd"]) == {"train800", "test"}


def test_the_command_ends_with_exit_code_1_and_the_list(vtab_raw, tmp_path, capsys, caplog):
    """Prepared tasks are printed; failed tasks and splits are logged in one line each."""
    shutil.copytree(f"{vtab_raw}/dtd", tmp_path / "raw" / "dtd")
    shutil.copy(f"{vtab_raw}/{archives.MINIATURE}", tmp_path / "raw")
    command = runpy.run_path(str(PROJECT / "jobs" / "prepare.py"))["main"]
    arguments = ["--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "out"), "--no-tracking", "--json"]
    assert command(["vtab", "dtd", "pets", *arguments]) == 1
    assert list(json.loads(capsys.readouterr().out)) == ["dtd"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage().startswith("pets: 2 files are missing; --download downloads those that have a URL:")
    assert command(["vtab", "dtd", *arguments]) == 0
    with pytest.raises(UserError, match="pets: 2 files are missing"):  # nothing can be done: wrong input, exit code 2
        command(["vtab", "pets", *arguments])


def test_the_images_that_wait_in_memory_are_limited_together(vtab_raw, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MAX_HELD_BYTES", 10_000)
    with pytest.raises(Incomplete, match=r"dtd-r1\.0\.1\.tar\.gz: .* images have .* bytes in total"):
        prepare(["dtd"], vtab_raw, str(tmp_path))
