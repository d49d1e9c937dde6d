"""Published scores for comparison in reports."""

from collections.abc import Sequence

from pipeline.transfer.scores import Score, vtab_means
from pipeline.transfer.suites import VTAB_GROUPS

# Table 9 of the paper, VTAB-1k, in the order of VTAB_GROUPS. Its mean is the flat mean of the nineteen tasks.
TABLE_9 = {
    "ViT-H/14 JFT": (
        *(95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9, 83.3, 96.7, 91.4, 76.6),
        *(91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2),
    ),
    "ViT-L/16 JFT": (
        *(95.4, 81.9, 74.3, 99.7, 96.7, 63.5, 87.4, 83.6, 96.5, 89.7, 77.1),
        *(86.4, 63.1, 49.7, 74.5, 60.5, 82.2, 36.2, 51.1),
    ),
    "ViT-L/16 I21k": (
        *(90.8, 84.1, 74.1, 99.3, 92.7, 61.0, 80.9, 82.5, 95.6, 85.2, 75.3),
        *(70.3, 56.1, 41.9, 74.7, 64.9, 79.9, 30.5, 41.7),
    ),
}
# BiT's per-task numbers are not printed: flat mean, and the groups (natural, specialized, structured) of its
# repository.
BIT = {
    "BiT-L R152x4": (76.29, None, None, None),
    "BiT-M R152x4 (re-run)": (73.51, 80.77, 85.67, 61.08),
    "BiT-M R101x3": (72.65, 80.29, 85.75, 59.40),
}
# Table 2 (JFT columns and L/16 I21k: ImageNet at 512 px with Polyak averaging) and B/16 of Table 5 (384 px, without).
TABLE_2 = {
    "ViT-H/14 JFT": (88.55, 90.72, 99.50, 94.55, 97.56, 99.68),
    "ViT-L/16 JFT": (87.76, 90.54, 99.42, 93.90, 97.32, 99.74),
    "ViT-L/16 I21k": (85.30, 88.62, 99.15, 93.25, 94.67, 99.61),
    "BiT-L R152x4": (87.54, 90.54, 99.37, 93.51, 96.62, 99.63),
    "ViT-B/16 I21k (384 px)": (83.97, 88.35, 98.95, 91.67, 94.43, 99.38),
}
TABLE_2_NAMES = ("imagenet", "imagenet-real", "cifar10", "cifar100", "pets", "flowers102")


def published_scores(scores: Sequence[Score]) -> dict[str, dict[str, float | None]]:
    """Published numbers for the rows in `scores`: {model: {row: top-1 or None}}."""
    names = {score.name for score in scores}
    vtab = [name for group in VTAB_GROUPS.values() for name in group]
    references: dict[str, dict[str, float | None]] = {}
    if any(score.group in VTAB_GROUPS for score in scores):
        for model, row in TABLE_9.items():
            values: dict[str, float | None] = dict(zip(vtab, row, strict=True))
            flat, groups = vtab_means(dict(zip(vtab, row, strict=True)))
            references[model] = values | {"mean": flat} | {f"mean {group}": mean for group, mean in groups.items()}
        for model, bit in BIT.items():
            references[model] = dict(zip(("mean", *(f"mean {group}" for group in VTAB_GROUPS)), bit, strict=True))
    elif names & set(TABLE_2_NAMES):
        for model, tops in TABLE_2.items():
            references[model] = dict(zip(TABLE_2_NAMES, tops, strict=True))
    return references
