"""Scores as in the paper, ReaL, decontaminated accuracy, reports and comparisons."""

import dataclasses
import json

import numpy as np
import pytest

from pipeline.data.duplicates.report import duplicates_table
from pipeline.errors import UserError
from pipeline.transfer import corrections, figures, mistakes, references, report, scores
from pipeline.transfer.corrections import read_seen_images
from pipeline.transfer.jobs import Result, final_jobs, next_jobs
from pipeline.transfer.predictions import Hits, Predictions, pack_hits, pack_predictions
from pipeline.transfer.protocols import L2_GRID, FineTune, Probe, Split, TransferTask
from pipeline.transfer.scores import Score, collect_scores
from pipeline.transfer.store import Store
from pipeline.transfer.suites import VTAB_GROUPS
from pipeline.vtab.tasks import TASKS


def row(model):
    return dict(zip(TASKS, references.TABLE_9[model], strict=True))


@pytest.mark.parametrize(
    ("model", "flat", "groups"),
    [
        ("ViT-H/14 JFT", 77.63, (86.69, 87.00, 65.03)),
        ("ViT-L/16 JFT", 76.29, (85.56, 86.73, 62.96)),
        ("ViT-L/16 I21k", 72.71, (83.27, 84.65, 57.50)),
    ],
)
def test_vtab_score_is_the_flat_mean_of_table_9(model, flat, groups):
    mean, by_group = scores.vtab_means(row(model))
    assert mean == pytest.approx(flat, abs=0.006)
    assert list(by_group) == ["natural", "specialized", "structured"]
    assert list(by_group.values()) == pytest.approx(groups, abs=0.006)
    assert abs(np.mean(list(by_group.values())) - mean) > 1  # the other mean, with which papers confuse it


def test_without_all_tasks_there_is_no_mean():
    without = row("ViT-H/14 JFT")
    del without["dmlab"]
    mean, groups = scores.vtab_means(without)
    assert mean is None
    assert list(groups) == ["natural", "specialized"]


def test_groups_are_the_papers():
    assert [len(names) for names in VTAB_GROUPS.values()] == [7, 4, 8]
    assert tuple(name for names in VTAB_GROUPS.values() for name in names) == TASKS


def test_real_labels_skip_empty_lists_and_accept_any_of_several():
    keys = [f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 3, 2, 4)]
    real = [[5], [], [7, 8], [1]]  # images 1, 2, 3, 4
    found = Predictions(keys, np.array([0, 0, 0, 0]), np.array([5, 8, 9, 2]))
    assert found.with_labels(corrections.real_labels(keys, real)).accuracy() == pytest.approx(100 * 2 / 3)
    with pytest.raises(UserError, match=r"photo\.jpg"):
        corrections.real_labels(["photo.jpg"], real)


def test_the_published_real_labels_have_the_published_counts(real_data):
    real = corrections.read_real_labels(str(real_data / "imagenet-real" / "real.json"))
    labels = corrections.real_labels([f"ILSVRC2012_val_{i + 1:08d}" for i in range(len(real))], real)
    assert (labels >= 0).any(1).sum() == 46_837
    assert (labels >= 0).sum() == 57_553


def task(name="pets", group="natural", protocol=None, **more):
    return TransferTask(
        name=name, group=group, train=Split(uri="/t"), test=Split(uri="/e"), protocol=protocol or FineTune(), **more
    )


def result(name="pets", seed=0, top1=50.0, **more):
    return Result(
        task=name, phase="final", lr=0.01, seed=seed, accuracy={"": top1}, images=100, seconds=1.0, **more
    )  # fmt: skip


def test_scores_over_seeds_with_and_without_seen_images(tmp_path):
    store, pets = Store(str(tmp_path)), task()
    results = {}
    for seed, wrong in enumerate(([0], [0, 1, 2])):
        classes = np.arange(10)
        classes[wrong] = -5
        found = Predictions([f"k{i}" for i in range(10)], np.arange(10), classes)
        results[f"pets/final-lr0.01-seed{seed}"] = result(seed=seed, top1=found.accuracy())
        job = final_jobs(pets, seed + 1, results)[seed]
        store.save(job, results[job.name], pack_predictions(found))
    (score,) = collect_scores([pets], 2, results, store, l2=1024.0, seen={"pets": frozenset({"k0", "k9", "other"})})
    assert score.values == (90.0, 70.0)
    assert (score.mean, score.std) == (80.0, pytest.approx(14.142, abs=1e-3))
    assert score.clean == (100.0, 75.0)  # of the eight images left
    assert score.removed == 2
    assert collect_scores([pets], 3, results, store, l2=1024.0, seen={}) == []  # the third seed is missing


def test_damaged_files_are_noticed_and_computed_again(tmp_path, caplog):
    """Truncated results, results without fields and results with a changed digit are
    ignored. Damaged predictions remove their result."""
    store, pets = Store(str(tmp_path)), task()
    found = Predictions([f"k{i}" for i in range(10)], np.arange(10), np.arange(10))
    jobs = next_jobs(pets, 3, {})
    for job in jobs:
        store.save(job, result(seed=job.seed, curve=[[1, 0.1 + 0.2, 1e-3]]), pack_predictions(found))
    assert list(store.load_all()) == [job.name for job in jobs]
    files = [tmp_path / "results" / f"{job.name}.json" for job in jobs]
    files[0].write_text(files[0].read_text()[:50])
    files[1].write_text(files[1].read_text().replace("50.0", "59.0"))
    files[2].write_text("{}")
    assert store.load_all() == {}
    warnings = caplog.text
    assert all(str(file) in warnings for file in files)
    store.save(jobs[0], result(), pack_predictions(found))
    predictions = tmp_path / "predictions" / f"{jobs[0].name}.parquet"
    data = bytearray(predictions.read_bytes())
    data[40] ^= 1  # in the first page
    predictions.write_bytes(data)
    with pytest.raises(UserError, match=f"{predictions.name}: missing or damaged"):
        store.predictions(jobs[0])
    assert store.load_all() == {}


def test_seen_images_come_from_the_report_of_prepare(tmp_path):
    """With the table that prepare writes: only matches with the test set of a task
    count, and keys are those of the test set."""
    tasks = [task("pets"), dataclasses.replace(task("dtd"), test=Split(uri="/other"))]
    numbers = {"distance": 3, "similarity": None, "detail": 0.9, "difference": 2.0}
    records = [
        {"key": "mine1", "reason": "near", "set": "/e", "match": "theirs1", **numbers},
        {"key": "mine2", "reason": "exact", "set": "/e/", "match": "theirs2", **numbers},
        {"key": "mine3", "reason": "exact", "set": "/elsewhere", "match": "theirs3", **numbers},
    ]
    (tmp_path / "duplicates.parquet").write_bytes(duplicates_table(records))
    expected = {"pets": frozenset({"theirs1", "theirs2"})}
    assert read_seen_images(str(tmp_path), tasks) == expected
    assert read_seen_images(str(tmp_path / "duplicates.parquet"), tasks) == expected
    (tmp_path / "seen.json").write_text('{"pets": ["theirs1", "theirs2"], "dtd": []}')
    assert read_seen_images(str(tmp_path / "seen.json"), tasks) == expected
    (tmp_path / "bad.json").write_text("[1]")
    for bad in ("bad.json", "gone.json", "gone.parquet", "gone"):
        with pytest.raises(UserError, match=r"(no|not a) decontamination report"):
            read_seen_images(str(tmp_path / bad), tasks)


def test_few_shot_with_and_without_seen_images(tmp_path):
    store, few = Store(str(tmp_path)), task("own", "", Probe(kind="fewshot", shots=(1, 5)))
    generator = np.random.default_rng(0)
    right = {shots: generator.random((len(L2_GRID), 20)) < 0.7 for shots in (1, 5)}
    labelled = np.arange(20) != 3
    hits = Hits([f"k{i}" for i in range(20)], labelled, right)
    details = {str(shots): [hits.accuracy(shots, i) for i in range(len(L2_GRID))] for shots in (1, 5)}
    found = Result(task="own", phase="final", lr=0, seed=0, accuracy={}, images=19, seconds=0, details=details)
    (job,) = final_jobs(few, 1, {"own/final-seed0": found})
    store.save(job, found, pack_hits(hits))
    seen = frozenset({"k0", "k1", "k3"})
    kept = labelled & ~np.isin(np.arange(20), (0, 1))
    for score, shots in zip(
        collect_scores([few], 1, {job.name: found}, store, l2=L2_GRID[7], seen={"own": seen}), (1, 5), strict=True
    ):
        assert score.name == f"own-{shots}"
        assert score.values == (pytest.approx(100 * right[shots][7][labelled].mean()),)
        assert score.clean == (pytest.approx(100 * right[shots][7][kept].mean()),)
        assert score.removed == 3


def test_few_shot_l2_is_the_given_one_or_the_best_by_mean_rank(tmp_path):
    tasks = [task(name, "", Probe(kind="fewshot", shots=(5,))) for name in ("a", "b")]
    lines = {"a": np.zeros(30), "b": np.zeros(30)}
    lines["a"][[3, 20]], lines["b"][[4, 20]] = (90, 80), (70, 60)  # 20 is good on both, best on none
    results = {
        f"{name}/final-seed0": Result(
            task=name, phase="final", lr=0, seed=0, accuracy={}, images=9, seconds=0, details={"5": line.tolist()}
        )
        for name, line in lines.items()
    }
    collect = lambda l2: collect_scores(tasks, 1, results, Store(str(tmp_path)), l2=l2, seen={})  # noqa: E731
    assert [(s.name, s.mean) for s in collect(0)] == [("a-5", 80), ("b-5", 60)]
    assert [s.mean for s in collect(L2_GRID[3])] == [90, 0]


def test_report_shows_our_numbers_next_to_the_papers():
    scores = [
        Score(name=name, task=name, group=group, values=(50.0, 60.0), images=1000, test=name, lr=0.01)
        for group, names in VTAB_GROUPS.items()
        for name in names
    ]
    tasks = [task(score.name, score.group) for score in scores]
    text = report.suite_report({"suite": "vtab1k", "checkpoint": "x"}, tasks, scores, {"pets/final": "boom"})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "55.00 ± 7.07" in lines["pets"]
    assert "97.20" in lines["pets"]  # H/14's
    assert {"55.00", "77.63", "76.29", "72.71"} <= set(
        lines["**mean of 19**"].replace("*", "").replace("|", " ").split()
    )
    assert "65.03" in lines["mean structured"]
    assert "`pets/final`: boom" in text
    columns = {line.count("|") for line in lines.values()}
    assert len(columns) == 1
    figure = figures.score_bars(scores)
    assert len(figure.axes[0].patches) >= 19


def test_report_has_standard_errors_protocols_in_words_and_no_empty_column():
    scores = [Score(name="own", task="own", group="", values=(50.0,), images=100, test="/e")]
    text = report.suite_report({"suite": "frozen"}, [task("own", "", Probe(kind="linear", resolution=32))], scores, {})
    assert "- own: linear (resolution 32, resize 256)" in text
    assert "| task | top-1 % | standard error | images |" in text
    assert "| own | 50.00 | 5.00 | 100 |" in text
    assert "mean of" not in text  # of a single score


def test_figures_of_curves_and_confusions():
    results = [
        result("a", curve=[[1, 2.0, 0.1], [2, 1.0, 0.1]], confusion=[[3, 1], [0, 4]]),
        result("a", seed=1, curve=[[1, 2.0, 0.1], [2, 1.0, 0.1]], confusion=[[4, 0], [0, 4]]),
        result("b", curve=[[1, 2.0, 0.1]]),
    ]
    assert [axes.get_title() for axes in figures.loss_curves(results).axes] == ["a", "b"]
    axes, scale = figures.confusion_matrices(results, {"a": ["cat", "dog"]}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert scale.get_ylabel() == "fraction of the label's images"
    assert np.allclose(axes.images[0].get_array(), [[7 / 8, 1 / 8], [0, 1]])
    assert figures.loss_curves([result()]) is None
    assert figures.confusion_matrices([result()], {}) is None


def test_the_error_of_a_mean_counts_scores_on_the_same_images_as_dependent():
    """Six probes of one test set tell little more than one of them; two test sets are independent."""
    folder = lambda name: Split(uri=f"/data/{name}/test")  # noqa: E731
    probes = [TransferTask(name=str(n), train=folder("own"), test=folder("own"), protocol=Probe()) for n in range(6)]
    many = [
        Score(name=one.name, task=one.name, group="", values=(50.0,), images=100, test=scores.find_test_images(one))
        for one in probes
    ]
    assert scores.standard_error(many[:1]) == pytest.approx(5)
    assert scores.standard_error(many) == pytest.approx(5)
    elsewhere = [dataclasses.replace(score, test="/data/other/test") for score in many]
    assert scores.standard_error(many + elsewhere) == pytest.approx(5 / 2**0.5)
    assert scores.error_of_mean([("a", 3.0), ("b", 4.0)]) == pytest.approx(2.5)
    tasks = [dataclasses.replace(probes[0], test=folder(name)) for name in ("clevr_count", "clevr_distance", "pets")]
    assert [scores.find_test_images(task) for task in tasks] == ["/data/clevr/test"] * 2 + [
        "/data/oxford_iiit_pet/test"
    ]


def test_comparison_marks_only_differences_beyond_their_spread(tmp_path):
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    for uri, near, far, single in ((first, (50, 52), (50, 51), (50,)), (second, (51, 53), (60, 61), (52,))):
        made = [
            Score(name=name, task=name, group="", values=values, images=1000, test=name)
            for name, values in (("near", near), ("far", far), ("single", single))
        ]
        scores.write_scores(uri, {"checkpoint": uri}, made, {})
    text, rows = report.compare_runs(first, second)
    by_task = {entry["task"]: entry for entry in rows}
    assert by_task["far"]["difference"] == pytest.approx(10)
    assert by_task["near"]["error"] == pytest.approx(2**0.5)  # two seeds, deviation sqrt(2) each
    assert by_task["single"]["error"] == pytest.approx(100 * (2 * 0.25 / 1000) ** 0.5, rel=1e-3)
    stars = {
        line.split()[0]: line.endswith("*") for line in text.splitlines() if line.startswith(("far", "near", "single"))
    }
    assert stars["far"]
    assert not stars["near"]
    assert not stars["single"]
    assert json.loads((tmp_path / "a" / "scores.json").read_text())["scores"]["far"]["mean"] == 50.5
    with pytest.raises(UserError, match="no transfer results"):
        report.compare_runs(first, str(tmp_path / "nowhere"))


def test_mistakes_name_the_most_confused_pairs_and_show_one_image_of_each_first():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, -1])
    found = Predictions([f"k{i}" for i in range(8)], labels, np.array([0, 1, 1, 2, 1, 0, 2, 0]))
    pairs = mistakes.most_confused(found, ["cat", "dog", "owl"])
    assert [(pair.label, pair.prediction, pair.count, pair.images) for pair in pairs] == [
        ("cat", "dog", 2, 4),
        ("cat", "owl", 1, 4),
        ("dog", "cat", 1, 2),
    ]
    assert mistakes.misclassified(found).tolist() == [1, 3, 5, 2]
    assert mistakes.describe_mistake(found, 3, ["cat", "dog", "owl"]) == "cat → owl"
