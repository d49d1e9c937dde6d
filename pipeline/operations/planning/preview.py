"""The plan of one pre-training run, before it starts."""

import os
from typing import TYPE_CHECKING, Any

from pipeline import address, storage
from pipeline import config as configuration
from pipeline.data.prepare.change import is_unfinished
from pipeline.errors import UserError, plural
from pipeline.lines import fit
from pipeline.operations.planning.config import CORPORA, PlanConfig
from pipeline.operations.planning.estimate import plan
from pipeline.operations.planning.table import hours_text, plan_table
from pipeline.revision_names import manifest_uri
from pipeline.training.config import PretrainConfig

if TYPE_CHECKING:
    from pipeline.data.format import Dataset
    from pipeline.training.plan import TrainPlan

CPU_UTILISATION = 0.4  # fraction of the speed of large matrix products that small models reach on two cores


def dry_run(training: PretrainConfig, recipe: str, changes: dict[str, tuple[Any, Any]]) -> str:
    """The plan of a pre-training run as text. Reads only manifests and starts nothing.

    changes: differences from the recipe. If the data exists, the checks are those of a real start; if its address is empty or
    is being prepared, the plan assumes the published corpus of the recipe. Missing GPUs are only a note, because a plan is often made on another
    machine. Raises UserError if the run could not start on a machine with its GPUs."""
    from pipeline.data.mixture import open_data
    from pipeline.training import run
    from pipeline.training.plan import make_plan

    note = ""
    try:
        open_data(training.runtime.data)
    except UserError as error:
        missing = [uri for uri in address.uris(training.runtime.data) if not storage.exists(manifest_uri(uri))]
        if not missing or any(_has_other_content(uri) for uri in missing):
            raise  # damaged, datasets that cannot be mixed, or another folder such as that of the images
        run.check_places(training)
        resolved = make_plan(training, stand_in(training, recipe, error), training.runtime.workers)
        run.check_model(resolved)
        note = f"  note      no dataset at {training.runtime.data} yet: planned for {plural(resolved.samples, 'image')} of the recipe's corpus{address.hint(training.runtime.data)}\n"
    else:
        resolved = run.check_run(training, devices=False)
        run.find_record(resolved, storage.normalise(training.runtime.output))
    try:
        run.check_devices(training)
    except UserError as lacking:
        note += f"  note      planned for --gpu {training.runtime.gpu}; {lacking}\n"
    if scarce := run.check_space(resolved):
        note += f"  note      {scarce}\n"
    text = fit(f"{run.describe_run(resolved, changes)}\n{note}", indent=10)
    if training.runtime.gpus:
        about = PlanConfig(
            training=training,
            gpus=training.runtime.workers,
            gpu=training.runtime.gpu,
            images=resolved.samples,
            classes=len(resolved.classes),
        )
        text += plan_table(plan(about, recipe))
    else:
        text += fit(_cost_on_cpu(resolved), indent=10)
    derived = configuration.to_yaml(resolved.derived)
    return f"{text}\n\n# every value (a file for --config)\n{configuration.to_yaml(training)}\n# derived from them and from the data\n{derived}"


def _has_other_content(uri: str) -> bool:
    """Whether no dataset can appear at an address without one: it is a file, on a web server, or a folder with content in
    which no command was stopped while it prepared a dataset."""
    if not storage.can_list(uri):
        return True
    if not storage.list_names(uri):
        return storage.exists(uri) and not os.path.isdir(uri)
    return not any(is_unfinished(folder) for folder in (uri, os.path.dirname(uri)))


def _cost_on_cpu(resolved: "TrainPlan") -> str:
    import torch

    from models.cost import flops
    from pipeline.hardware import peak_flops

    training = resolved.config
    work = (
        3
        * flops(resolved.model_options, patch_keep_rate=training.patch_keep_rate)
        * resolved.total
        * training.batch_size
    )
    peak = peak_flops(torch.device("cpu"), training.engine.precision)
    return (
        f"  cost      {work / 1e12:,.3g} teraFLOPs: about {hours_text(work / (CPU_UTILISATION * peak) / 3600)} at "
        f"{CPU_UTILISATION:.0%} of the {peak / 1e9:,.0f} GFLOP/s of this machine's matrix products"
    )


def stand_in(training: PretrainConfig, recipe: str, missing: UserError) -> "Dataset":
    """An empty dataset with the size of the recipe's published corpus. Raises `missing` when there is none."""
    from pipeline.data.format import Dataset, Manifest

    size = next((size for key, size in CORPORA.items() if key in recipe), None)
    if size is None:
        raise missing
    images, classes = size
    manifest = Manifest(
        encoding="jpeg",
        image={"size": max(256, training.image_size)},
        multilabel=training.loss == "sigmoid",
        rows=images,
        inputs=images,
        fingerprint="none yet",
        classes=[str(number) for number in range(classes)],
    )
    return Dataset(training.runtime.data, manifest)
