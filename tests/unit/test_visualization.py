"""The images that jobs/visualize.py shows by default."""

from dataclasses import replace

from pipeline.config import to_dict
from pipeline.operations.visualization import sample_uri
from pipeline.training.config import PretrainConfig


def written_by(validation):
    """The part of a checkpoint's config.json about the run that wrote it."""
    config = PretrainConfig()
    return {"pretrain": to_dict(replace(config, runtime=replace(config.runtime, validation=validation)))}


def test_the_validation_set_of_the_run_is_shown_while_it_is_there(tmp_path):
    folder = tmp_path / "val"
    assert sample_uri(written_by(str(folder))) is None
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    assert sample_uri(written_by(str(folder))) == str(folder)


def test_weights_of_other_programs_name_no_images():
    for config in ({}, {"pretrain": None}, {"pretrain": []}, written_by(None)):
        assert sample_uri(config) is None
