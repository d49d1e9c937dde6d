"""Settings of a plan: recipe, GPUs, prices and corpus."""

from dataclasses import dataclass, field

from pipeline.errors import UserError
from pipeline.training.config import PretrainConfig

GB = 1e9
PREPARE_SECONDS = 2.0e-3
"""CPU time of prepare for an image: decode an original, shrink it to 256 px, encode."""

# Images and classes of the corpora in recipe names (arXiv 2010.11929, section 4.1; torchvision for ImageNet).
CORPORA = {
    "jft": (303_000_000, 18_291),
    "imagenet21k": (14_000_000, 21_843),
    "imagenet": (1_281_167, 1_000),
    "augreg21k": (14_000_000, 21_843),
    "augreg": (1_281_167, 1_000),
    "cifar10": (50_000, 10),
    "demo": (1_437, 10),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Settings of a plan. Fields of the recipe are flags under --training."""

    training: PretrainConfig = field(default_factory=PretrainConfig)
    gpus: int = 8
    """Number of GPUs."""
    gpu: str = "h100"
    """GPU model: h100, h100-pcie, h200, b200, a100, a100-40gb, l40s, l4, v100 and others; an unknown name lists all."""
    gpus_per_node: int = 8
    """GPUs per machine."""
    price: float = 2.5
    """Price in $ per GPU-hour."""
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1: the achieved fraction of the GPU's dense bf16 peak, without recomputation. None:
    estimated from measurements on an H100."""
    read_gbps: float = 1.0
    """Speed at which one node reads shards, in GB/s."""
    images: float | None = None
    """Images in the corpus. None: from the published recipe, otherwise from --training.data."""
    classes: int | None = None
    """Classes in the corpus. None: from the published recipe, otherwise from --training.data."""
    storage_price: float = 0.023
    """Price of object storage in $ per GB and month."""
    failure_hours: float = 50_000
    """GPU-hours between failures that stop the run. Llama 3 reports 419 failures in 54 days on 16,384 GPUs."""
    write_gbps: float = 1.0
    """Checkpoint write speed of a node, in GB/s."""
    corpus_images: float | None = None
    """Also estimate jobs/prepare.py for this number of original images."""
    cores: int = 64
    """CPU cores for jobs/prepare.py."""


def find_corpus(config: PlanConfig, recipe: str) -> tuple[int, int]:
    """(images, classes) from the flags, the published corpus, or the dataset in the config."""
    images, classes = next((size for key, size in CORPORA.items() if key in recipe), (None, None))
    if images is None and config.images is None:
        from pipeline.data.mixture import open_data

        try:
            dataset = open_data(config.training.runtime.data)
        except UserError as error:
            raise UserError(f"unknown corpus size; give --images and --classes ({error})") from error
        images, classes = len(dataset), len(dataset.classes)
    given = images if config.images is None else round(config.images)
    if not given or given < config.training.batch_size:
        raise UserError(f"--images {given} is less than one batch of {config.training.batch_size}")
    return given, classes or 1_000 if config.classes is None else config.classes
