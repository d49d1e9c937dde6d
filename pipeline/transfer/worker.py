"""A worker process that keeps the checkpoint in memory and runs jobs one after another."""

import platform
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from models import probes
from pipeline import logs
from pipeline.stores import expect_answers
from pipeline.transfer.backbones import build_model
from pipeline.transfer.features import load_features
from pipeline.transfer.finetune import Diverged, Examples, Execution, FineTuning, predict
from pipeline.transfer.head import run_head
from pipeline.transfer.jobs import Job, Result
from pipeline.transfer.predictions import Hits, Predictions, pack_hits, pack_predictions
from pipeline.transfer.protocols import L2_GRID, FineTune, Head, Probe


class TransferWorker:
    """A Ray actor with one device, or a fraction of one. max_concurrency is 2, so
    that `progress` responds during `run`."""

    def __init__(
        self,
        config: dict[str, Any],
        weights: list[Any],
        threads: int,
        micro_batch: int,
        records: Any = None,
        compile: bool = False,
        classes: tuple[str, ...] = (),
    ) -> None:
        """weights: a Ray reference to the model's arrays. records: handle of a `logs.Collector`. classes: names of the
        classes of the model's head."""
        if records is not None:
            logs.send_to(records)
        expect_answers()
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.execution = Execution(device=device, micro_batch=micro_batch, threads=threads, compile=compile)
        self.model: nn.Module = build_model(config, ray.get(weights[0]))
        self.classes = classes
        self.training: FineTuning | None = None

    def progress(self) -> tuple[int, int, float]:
        """(step, total steps, loss) of the running job; zeros if it has no steps."""
        training = self.training
        return training.progress if training is not None else (0, 0, 0.0)

    def run(self, job: Job, features: tuple[str, ...] | None) -> tuple[Result, bytes | None]:
        """The result of a job, and its packed predictions. features: folders of the train and test features of a
        probe; of the test features alone for the model's own head."""
        torch.set_num_threads(self.execution.threads)  # OpenMP keeps the number per thread
        if isinstance(job.task.protocol, Probe):
            assert features is not None
            if isinstance(job.task.protocol, Head):
                return run_head(job, features[-1], self.model, self.classes, self.execution.device)
            train, test = features
            return run_probe(job, train, test, device=self.execution.device)
        try:
            self.training = start_finetuning(job, self.model, self.execution)
            return finish_finetuning(job, self.training)
        finally:
            self.training = None


def start_finetuning(job: Job, model: nn.Module, execution: Execution) -> FineTuning:
    assert isinstance(job.task.protocol, FineTune)
    train = _examples(job)[0]
    return FineTuning(model, train, job.task.protocol, lr=job.lr, seed=job.seed, execution=execution)


def finish_finetuning(job: Job, training: FineTuning) -> tuple[Result, bytes | None]:
    """Fine-tunes and evaluates. Divergence scores 0 in a learning rate comparison, and is an error in the final
    training."""
    start, test = time.perf_counter(), _examples(job)[1]
    about: dict[str, Any] = {"task": job.task.name, "phase": job.phase, "lr": job.lr, "seed": job.seed}
    about["host"] = platform.node()
    try:
        tuned = training.run()
        found = predict(tuned.model, test, resolution=training.protocol.resolution, execution=training.execution)
    except Diverged as error:
        if job.phase == "final":
            raise
        seconds = time.perf_counter() - start
        return Result(**about, accuracy={"": 0.0}, images=0, seconds=seconds, details={"diverged": str(error)}), None
    result = Result(
        **about,
        accuracy={"": found.accuracy()},
        images=int(found.labelled().sum()),
        seconds=time.perf_counter() - start,
        images_per_second=tuned.images_per_second,
        curve=[list(row) for row in tuned.curve],
        confusion=found.small_confusion(test.num_classes),
    )
    return result, pack_predictions(found) if job.phase == "final" else None


def _examples(job: Job) -> tuple[Examples, Examples]:
    """(training examples, test examples) of a job."""
    task = job.task
    train, test = (task.tune or (task.train, task.test)) if job.phase == "tune" else (task.train, task.test)
    assert train is not None
    return Examples(train.open(), train), Examples(test.open(), test)


@dataclass(slots=True)
class _Frozen:
    """Features of a probe on a device. labels_N: labels of the training images."""

    train_ND: torch.Tensor
    labels_N: torch.Tensor
    test_MD: torch.Tensor
    num_classes: int


def run_probe(job: Job, train_folder: str, test_folder: str, device: str) -> tuple[Result, bytes | None]:
    """Few-shot, linear probe or nearest neighbours on feature sets."""
    start, probe = time.perf_counter(), job.task.protocol
    assert isinstance(probe, Probe)
    _, train_labels, train = load_features(train_folder)
    keys, test_labels, test = load_features(test_folder)
    known = train_labels >= 0
    train_labels, train = train_labels[known], train[torch.from_numpy(known)]
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    frozen = _Frozen(train.to(device), torch.from_numpy(train_labels).to(device), test.to(device), classes)
    found = Predictions(keys, test_labels, np.zeros(len(keys), np.int64))
    about: dict[str, Any] = {"task": job.task.name, "phase": job.phase, "lr": 0.0, "seed": job.seed}
    about |= {"images": int(found.labelled().sum()), "host": platform.node()}
    details: dict[str, Any] = {}
    if probe.kind == "fewshot":
        hits = _few_shot(frozen, train_labels, found, probe.shots, job.seed)
        details = {str(shots): [hits.accuracy(shots, i) for i in range(len(L2_GRID))] for shots in probe.shots}
        return Result(**about, accuracy={}, seconds=time.perf_counter() - start, details=details), pack_hits(hits)
    if probe.kind == "linear":
        guess, details["l2"] = probes.linear_probe(
            frozen.train_ND, frozen.labels_N, frozen.test_MD, classes, seed=job.seed
        )
    else:
        guess = probes.nearest_neighbours(frozen.train_ND, frozen.labels_N, frozen.test_MD, classes)
    found = replace(found, classes=guess.cpu().numpy())
    result = Result(
        **about,
        accuracy={"": found.accuracy()},
        seconds=time.perf_counter() - start,
        confusion=found.small_confusion(classes),
        details=details,
    )
    return result, pack_predictions(found)


def _few_shot(frozen: _Frozen, train_labels: np.ndarray, found: Predictions, shots: tuple[int, ...], seed: int) -> Hits:
    """Ridge regression with every l2, on each number of examples per class in `shots`."""
    correct = {}
    for n in shots:
        picked = torch.from_numpy(probes.select_shots(train_labels, n, seed)).to(frozen.labels_N.device)
        guesses = probes.ridge(
            frozen.train_ND[picked], frozen.labels_N[picked], frozen.test_MD, frozen.num_classes, L2_GRID
        )
        correct[n] = np.stack([replace(found, classes=row).correct() for row in guesses.cpu().numpy()])
    return Hits(found.keys, found.labelled(), correct)
