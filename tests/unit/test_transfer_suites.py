"""Protocols match the papers; invalid requests are refused first; unfinished jobs follow from the results."""

import dataclasses

import numpy as np
import pytest

from pipeline.data.format import write_dataset
from pipeline.errors import UserError
from pipeline.transfer.jobs import Result, count_jobs, estimate_flops, final_jobs, next_jobs
from pipeline.transfer.protocols import FineTune, Probe, Split, TransferTask
from pipeline.transfer.suites import TransferConfig, build_tasks, check_config, open_datasets

MODEL = {"variant": "B/16", "image_size": 224}


def protocols(suite, **config):
    return {t.name: t.protocol for t in build_tasks(TransferConfig(suite=suite, data="/data", **config), MODEL)}


def test_vtab1k_is_the_papers_protocol_with_bits_exemptions():
    tasks = protocols("vtab1k")
    assert len(tasks) == 19
    for name, p in tasks.items():
        assert (p.resolution, p.steps, p.batch_size, p.lrs, p.momentum, p.clip, p.decay) == (
            *(384, 2500, 512, (0.01,), 0.9, 1.0, "cosine"),
        )
        assert round(p.resolution * p.enlarge) == 448, name
    no_flip = {name for name, p in tasks.items() if not p.flip}
    no_crop = {name for name, p in tasks.items() if p.crop == "squash"}
    assert no_flip == {"dsprites_orientation", "smallnorb_azimuth", "dsprites_location"}
    assert no_crop == {"clevr_count", "clevr_distance", "dmlab", "kitti_distance", "dsprites_location"}


def test_vtab1k_trains_on_the_1000_and_tunes_on_the_800_and_200():
    task = build_tasks(TransferConfig(suite="vtab1k", data="/data"), MODEL)[4]
    uris = [split.uri for split in (task.train, task.test, *task.tune)]
    assert uris == [f"/data/pets/{split}" for split in ("train800val200", "test", "train800", "val200")]


def test_task_adaptation_protocol():
    p = protocols("vtab1k-224")["svhn"]
    assert (p.resolution, p.steps, p.batch_size, p.lrs, p.warmup) == (224, 1000, 64, (0.01,), 80)
    assert (p.decay, p.crop, p.flip) == ("step", "squash", False)


def test_paper_suite_is_table_4():
    tasks = protocols("paper")
    assert {name: (p.steps, p.lrs) for name, p in tasks.items()} == {
        "imagenet": (20_000, (0.003, 0.01, 0.03, 0.06)),
        "cifar10": (10_000, (0.001, 0.003, 0.01, 0.03)),
        "cifar100": (10_000, (0.001, 0.003, 0.01, 0.03)),
        "pets": (500, (0.001, 0.003, 0.01, 0.03)),
        "flowers102": (500, (0.001, 0.003, 0.01, 0.03)),
    }
    assert (tasks["imagenet"].resolution, tasks["imagenet"].ema_decay) == (512, 0.9999)
    huge = build_tasks(TransferConfig(suite="paper", data="/data"), {"variant": "H/14", "image_size": 224})
    assert huge[0].protocol.resolution == 518
    shares = {t.name: t.tune[1].part[1] for t in huge}
    assert shares == {"imagenet": 0.01, "cifar10": 0.02, "cifar100": 0.02, "pets": 0.1, "flowers102": 0.1}
    table_5 = protocols("paper", resolution=384, ema_decay=0.0)["imagenet"]
    assert (table_5.resolution, table_5.ema_decay) == (384, 0.0)


def test_overrides_reach_every_task_and_shorten_the_warmup():
    p = protocols("vtab1k", steps=50, resolution=32, batch_size=8, lrs=(0.1, 0.2))["dtd"]
    assert (p.steps, p.warmup, p.resolution, p.batch_size, p.lrs) == (50, 10, 32, 8, (0.1, 0.2))
    assert protocols("vtab1k", steps=50, warmup=3)["dtd"].warmup == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "vtab1q"}, 'unknown suite "vtab1q".*vtab1k'),
        ({"seeds": 0}, "--seeds"),
        ({"micro_batch": 0}, "--micro-batch"),
        ({"lrs": (0.1, -1.0)}, "--lrs"),
        ({"ema_decay": 1.0}, "--ema-decay"),
        ({"l2": 3.0}, "--l2"),
        ({"gpus_per_worker": 2.0}, "--gpus-per-worker"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    check_config(TransferConfig())
    with pytest.raises(UserError, match=message):
        check_config(TransferConfig(**change))


def test_unknown_tasks_and_missing_data_are_refused(tmp_path):
    with pytest.raises(UserError, match=r'no task "petz" \(did you mean "pets"\?\)'):
        build_tasks(TransferConfig(suite="vtab1k", data="/data", tasks=("petz",)), MODEL)
    with pytest.raises(UserError, match="needs --data"):
        build_tasks(TransferConfig(suite="vtab1k"), MODEL)
    with pytest.raises(UserError, match="no dataset with train and test"):
        build_tasks(TransferConfig(suite="folder", data=str(tmp_path)), MODEL)


def picture_set(uri, n=40, classes=("a", "b", "c"), **more):
    rows = [(f"k{i}", np.full((16, 48), i, np.uint8), i % len(classes), 16, 16) for i in range(n)]
    image = {"height": 16, "width": 16, "patch_size": 4, "channels": 3}
    return write_dataset(uri, rows, classes=classes, encoding="patches", image=image, **more)


def test_every_task_without_data_is_named(tmp_path):
    for name in ("pets", "dtd"):
        picture_set(str(tmp_path / name / "train800val200"))
    picture_set(str(tmp_path / "pets" / "test"))
    picture_set(str(tmp_path / "svhn" / "train800val200"))
    picture_set(str(tmp_path / "svhn" / "test"), classes=("a", "b"))
    config = TransferConfig(suite="vtab1k", data=str(tmp_path), tasks=("pets", "dtd", "svhn"), resolution=16)
    with pytest.raises(UserError) as caught:
        open_datasets(build_tasks(config, MODEL))
    assert "2 of 3 tasks cannot run" in str(caught.value)
    assert "dtd/test" in str(caught.value)
    assert "different classes" in str(caught.value)
    assert len(open_datasets(build_tasks(dataclasses.replace(config, tasks=("pets",)), MODEL))) == 2
    with pytest.raises(UserError, match="pets/train800"):  # needed as soon as learning rates are compared
        open_datasets(build_tasks(dataclasses.replace(config, tasks=("pets",), lrs=(0.1, 0.01)), MODEL))


def test_dev_split_and_rest_share_nothing_and_miss_nothing():
    keys = [f"image{i}.jpg" for i in range(5000)]
    rest, dev = (np.array(Split(uri="/x", part=part).chosen(keys)) for part in ((0.02, 1.0), (0.0, 0.02)))
    assert not (rest & dev).any()
    assert (rest | dev).all()
    assert 60 < dev.sum() < 140
    assert Split(uri="/x", part=(0.0, 0.02)).chosen(keys[::-1]) == dev[::-1].tolist()  # no matter the order


# ---------------------------------------------------------------- what is left to do


def task(lrs=(0.1,), protocol=None):
    tune = (Split(uri="/a"), Split(uri="/b"))
    return TransferTask(
        name="t", train=Split(uri="/x"), test=Split(uri="/y"), tune=tune, protocol=protocol or FineTune(lrs=lrs)
    )


def done(job, top1=50.0):
    return Result(task="t", phase=job.phase, lr=job.lr, seed=job.seed, accuracy={"": top1}, images=1, seconds=1)


def test_learning_rates_are_tried_then_the_best_trains_with_every_seed():
    swept, results = task(lrs=(0.3, 0.1, 0.2)), {}
    trials = next_jobs(swept, 2, results)
    assert [(job.phase, job.lr, job.seed) for job in trials] == [("tune", 0.1, 0), ("tune", 0.2, 0), ("tune", 0.3, 0)]
    for job, top1 in zip(trials, (60.0, 70.0, 70.0), strict=True):
        assert all(left.phase == "tune" for left in next_jobs(swept, 2, results))
        results[job.name] = done(job, top1)
    finals = next_jobs(swept, 2, results)
    assert [(job.phase, job.lr, job.seed) for job in finals] == [("final", 0.2, 0), ("final", 0.2, 1)]
    results[finals[0].name] = done(finals[0])
    assert next_jobs(swept, 2, results) == finals[1:]
    results[finals[1].name] = done(finals[1])
    assert next_jobs(swept, 2, results) == []
    assert len(next_jobs(swept, 3, results)) == 1  # an additional seed adds one job
    assert final_jobs(swept, 2, results) == finals
    assert count_jobs(swept, 2) == 5


def test_probes_need_no_learning_rate_and_neighbours_no_seed():
    assert [job.seed for job in next_jobs(task(protocol=Probe(kind="fewshot")), 3, {})] == [0, 1, 2]
    assert [job.name for job in next_jobs(task(protocol=Probe(kind="knn")), 3, {})] == ["t/final-seed0"]


def test_cost_orders_by_work():
    model = {"variant": "mu/4", "num_classes": 3, "image_size": 16}
    small, long, large = (
        estimate_flops(task(protocol=FineTune(steps=s, resolution=r)), model, 100)
        for s, r in ((10, 16), (20, 16), (20, 32))
    )
    assert small < long < large
    assert estimate_flops(task(protocol=Probe()), model, 100) < small
