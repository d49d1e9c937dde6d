"""What a run would find wrong later is said before anything is written."""

from dataclasses import replace

import pytest

from pipeline import cluster
from pipeline.errors import UserError
from pipeline.training.plan import check_values
from pipeline.training.recipes import RECIPES
from pipeline.training.run import check_writable
from tests.runs import changed

DEMO = RECIPES["demo"]()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(DEMO, keep_last=-1), "keep_last -1"),
        (changed(DEMO, cpus_per_worker=-1.0), "cpus_per_worker -1.0"),
        (changed(DEMO, optimizer=replace(DEMO.optimizer, lr=float("nan"))), "optimizer.lr nan"),
        (changed(DEMO, ema_decay=1.0), "ema_decay 1.0"),
        (changed(DEMO, image_size=64), "validation_resize 32 is less than image_size 64; give --validation-resize 73"),
        (changed(DEMO, workers=0), "workers 0"),
        (changed(DEMO, workers=2, min_workers=3), "min_workers 3 must be between 1 and workers"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        check_values(config)


def test_output_that_is_a_file_or_below_one(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is not a folder"):
            check_writable(str(output))
    check_writable(str(tmp_path / "new" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_in_a_bucket_that_does_not_exist(s3):
    with pytest.raises(UserError, match="--output s3://no-such-bucket-here/run cannot be written"):
        check_writable("s3://no-such-bucket-here/run")
    check_writable(f"{s3}/run")


def test_output_in_the_package_folder_of_a_ray_job(monkeypatch):
    output = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs/demo"
    cluster.refuse_package_folder(output=output)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"temporary copy .* absolute path .* s3://"):
        cluster.refuse_package_folder(output=output)
