"""Logs a suite to MLflow: a parent run, a child run per task, scores of registered versions. Used only by the
driver."""

import csv
import io
import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import storage
from pipeline.config import to_dict
from pipeline.data.loading.samples import stored_pictures
from pipeline.errors import UserError, plural
from pipeline.pictures import sheet
from pipeline.tracking import Run, description, names, registry, start_run
from pipeline.tracking.views import page
from pipeline.transfer import figures, mistakes
from pipeline.transfer.checkpoint import PretrainedModel
from pipeline.transfer.head import class_names
from pipeline.transfer.jobs import Job, Result
from pipeline.transfer.predictions import Predictions
from pipeline.transfer.protocols import HEAD_METRICS, FineTune, Head, Probe, Split, TransferTask
from pipeline.transfer.scores import SCORES, Score, standard_error
from pipeline.transfer.store import Store, SuiteState
from pipeline.transfer.suites import TransferConfig, suite_version

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

logger = logging.getLogger(__name__)


class Recorder:
    """Logs to MLflow, and writes figures to the output folder."""

    def __init__(
        self,
        config: TransferConfig,
        checkpoint: PretrainedModel,
        parent: Run,
        state: SuiteState,
        datasets: Mapping[Split, "Dataset"],
    ) -> None:
        self.config, self.parent, self.state, self.datasets = config, parent, state, datasets
        self._model, self._head_classes = description.checkpoint_name(checkpoint.uri), checkpoint.classes
        self._tasks: dict[str, TransferTask] = {}

    def task(self, task: TransferTask, known: Mapping[str, Result]) -> None:
        """Logs a child run for a finished task: curves, accuracy per seed, confusion matrix.

        Compares the number of results in the run, because an earlier driver may have died before or while writing it.
        """
        self._tasks[task.name] = task
        results = [result for result in known.values() if result.task == task.name]
        if self.state.recorded.get(task.name) == len(results):
            return
        child = start_run(
            self.config.experiment,
            description.run_name(task.name, self._model),
            config={"task": task.name, "group": task.group, **to_dict(task.protocol)},
            tags={names.NOTE: self._about_task(task)},
            run_id=self.state.children.get(task.name),
            parent_id=self.parent.id,
            tracking_uri=self.config.tracking_uri,
        )
        self.state.children[task.name] = child.id
        self.state.save()
        for role, split in task.splits.items():
            manifest = self.datasets[split].manifest
            about = {"fingerprint": manifest.fingerprint, "rows": manifest.rows}
            child.log_dataset(split.uri, about, role=role)
            self.parent.log_dataset(split.uri, about, role=f"{task.name}.{role}", linked=False)
        child.log_cost({names.SECONDS: sum(result.seconds for result in results)})
        self._results(child, task, results)
        child.finish()
        self.state.recorded[task.name] = len(results)
        self.state.save()

    def _about_task(self, task: TransferTask) -> str:
        group = f" ({task.group})" if task.group else ""
        kind = (
            f"fine-tuned for {plural(task.protocol.steps, 'step')}"
            if isinstance(task.protocol, FineTune)
            else "the checkpoint's own classifier"
            if isinstance(task.protocol, Head)
            else "frozen features"
        )
        titles = {"train": "training image", "test": "test image"}
        images = ", ".join(
            f"{plural(self.datasets[split].manifest.rows, titles[role])} of {split.uri}"
            for role, split in task.splits.items()
        )
        return f"Task {task.name}{group}: {kind} at {task.protocol.resolution} px.\n\n{description.DATA} {images}"

    def _results(self, child: Run, task: TransferTask, results: Sequence[Result]) -> None:
        for result in results:
            suffix = f"/lr{result.lr:g}-seed{result.seed}" if len(results) > 1 else ""
            for step, loss, lr in result.curve:
                child.log({names.LOSS + suffix: loss, names.LEARNING_RATE + suffix: lr}, step=int(step))
            accuracy = {f"{result.phase}_top1{suffix}": result.accuracy[""]} if "" in result.accuracy else {}
            numbers = {
                f"{result.phase}_{name}": result.details[name] for name in HEAD_METRICS if name in result.details
            }
            child.log({**accuracy, **numbers, names.IMAGES_PER_SECOND + suffix: result.images_per_second})
        finals = [result for result in results if result.phase == "final"]
        if all("" in result.accuracy for result in finals):
            mean = sum(result.accuracy[""] for result in finals) / len(finals)
            child.log({names.MEAN_SCORE: mean})
            self.parent.log({names.SCORE + task.name: mean})
        classes = {task.name: self._confusion_classes(task)}
        if figure := figures.confusion_matrices(finals, classes):
            child.log_figure(figure, "confusion.png")
        self._mistakes(child, task, finals)

    def _classes(self, task: TransferTask) -> list[str]:
        """Names of the classes in predictions."""
        own = list(self.datasets[task.test].classes)
        return class_names(own, self._head_classes) if isinstance(task.protocol, Head) else own

    def _confusion_classes(self, task: TransferTask) -> list[str]:
        """Names of the rows of a confusion matrix."""
        names, count = self._classes(task), len(self.datasets[task.test].classes)
        return [*names[:count], *(["(others)"] if len(names) > count else [])]

    def _mistakes(self, child: Run, task: TransferTask, finals: Sequence[Result]) -> None:
        """Logs the most confused pairs of classes and misclassified test images, for the first seed."""
        if not finals or (isinstance(task.protocol, Probe) and task.protocol.kind == "fewshot"):
            return
        try:
            found = Store(self.state.output).predictions(Job(task=task, lr=finals[0].lr, seed=finals[0].seed))
            dataset, classes = self.datasets[task.test], self._classes(task)
            self._per_class(child, task, found)
            if figure := figures.confused_pairs(mistakes.most_confused(found, classes)):
                child.log_figure(figure, "confused-pairs.png")
            wrong = mistakes.misclassified(found)
            if not len(wrong):
                return
            rows = {key: row for row, key in enumerate(dataset.table(["key"])["key"].to_pylist())}
            shown = [np.array(p) for p in stored_pictures(dataset, [rows[found.keys[i]] for i in wrong])]
        except (UserError, OSError, KeyError) as error:  # the scores do not depend on the figures
            logger.warning("cannot draw the mistakes of %s: %s", task.name, error)
            return
        titles = [mistakes.describe_mistake(found, int(i), classes) for i in wrong]
        share = f"{len(found.keys) - int(found.correct().sum()):,} of {plural(len(found.keys), 'test image')}"
        heading = f"Misclassified by {task.name}: label → prediction ({share})"
        child.log_bytes(sheet(shown, titles, heading, columns=6, side=168), "misclassified.png")

    def _per_class(self, child: Run, task: TransferTask, found: Predictions) -> None:
        """Logs the top-1 of each class to the child run, and writes it to the output folder."""
        classes = self._classes(task)
        counts = found.by_class(len(classes))
        if counts is None:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", "images", "correct", "top1"])
        for name, (images, correct) in zip(classes, counts, strict=True):
            if images:
                writer.writerow([name, images, correct, f"{100 * correct / images:.2f}"])
        child.log_text(text.getvalue(), "classes.csv")
        place = storage.join(self.state.output, "classes", f"{task.name}.csv")
        storage.write_bytes(place, text.getvalue().encode())

    def suite(
        self,
        text: str,
        summary: dict[str, Any],
        scores: Sequence[Score],
        results: Sequence[Result],
        others: Mapping[str, Mapping[str, float | None]],
    ) -> None:
        """Logs scores, means, the report (`text`, Markdown) and figures to the parent run; writes figures to the output
        folder.

        others: additional scores to draw, {title: {row: top-1}}.
        """
        parent = self.parent
        parent.log({names.SCORE + score.name: score.mean for score in scores})
        if summary["mean"] is not None:
            parent.log({names.PARTIAL_MEAN if summary["partial"] else names.MEAN_SCORE: summary["mean"]})
            parent.log({names.MEAN_ERROR: standard_error(scores)})
        if summary["mean_clean"] is not None:
            parent.log({names.CLEAN_MEAN: summary["mean_clean"]})
        parent.log({names.CLEAN_SCORE + s.name: statistics.fmean(s.clean) for s in scores if s.clean})
        parent.log({names.GROUP_SCORE + group: mean for group, mean in summary["groups"].items()})
        parent.log_text(text, "report.md")
        parent.log_dict(summary, SCORES)
        drawn = {
            "scores.png": figures.score_bars(scores, others) if scores else None,
            "curves.png": figures.loss_curves(results),
            "confusion.png": figures.confusion_matrices(
                results, {name: self._confusion_classes(task) for name, task in self._tasks.items()}
            ),
        }
        pictures: dict[str, bytes] = {}
        for name, figure in drawn.items():
            if figure is not None:
                picture = io.BytesIO()
                figure.savefig(picture, format="png", bbox_inches="tight")
                pictures[name] = picture.getvalue()
                storage.write_bytes(storage.join(self.state.output, name), pictures[name])
                parent.log_bytes(pictures[name], name)
        parent.log_text(page(text, pictures), "report.html")


def attach_scores(
    config: TransferConfig, checkpoint_uri: str, summary: Mapping[str, Any], scores: Sequence[Score], parent: Run
) -> None:
    """Adds the scores to every registered version of this checkpoint, like scheduled evaluation."""
    if summary["mean"] is None or not parent.flush():
        return
    evaluation = {
        "mean": summary["mean"],
        "spread": standard_error(scores),
        "scores": {score.name: score.mean for score in scores},
    }
    try:
        for registered in registry.versions_of(checkpoint_uri, parent.uri):
            suite = f"{config.suite}:{suite_version(config)}"
            registry.record_evaluation(registered, suite, evaluation, parent.id, parent.uri)
    except Exception as error:  # the scores have already been saved
        logger.warning("cannot add the scores to the registered versions of %s: %s", checkpoint_uri, error)
