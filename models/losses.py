"""Losses of logits (B,K) and labels of the loader's batches. Labels: int64 (B,) class indices, or (B,M) several classes
per sample, padded with -1. A sample whose labels are all -1 is unlabelled and ignored. Mixup: `label_b` are the labels
of the second image, `lam` (B,) is the weight of the first.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from models.mpp import MaskedPrediction


def training_loss(outputs, batch: Mapping, kind: str = "softmax", label_smoothing: float = 0.0) -> torch.Tensor:
    """The loss of a model's output for a batch of the loader: classification, or masked patch prediction."""
    if isinstance(outputs, MaskedPrediction):
        return masked_patch_loss(outputs)
    loss = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}[kind]
    return loss(outputs, batch["label"], label_smoothing, batch.get("label_b"), batch.get("lam"))


def multi_hot(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Labels as float32 (B,K): 1 for each class present, nothing for -1."""
    labels = labels if labels.dim() == 2 else labels[:, None]
    # column K receives the padding and is removed
    marks = torch.zeros(labels.shape[0], num_classes + 1, device=labels.device)
    return marks.scatter_(1, labels.where(labels >= 0, num_classes), 1.0)[:, :num_classes]


def mixed_targets(
    labels: torch.Tensor, num_classes: int, label_b: torch.Tensor | None, lam: torch.Tensor | None
) -> torch.Tensor:
    """Multi-hot targets (B,K), mixed where mixup was applied."""
    target = multi_hot(labels, num_classes)
    if label_b is None or lam is None:
        return target
    return lam[:, None] * target + (1 - lam[:, None]) * multi_hot(label_b, num_classes)


def softmax_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    label_b: torch.Tensor | None = None,
    lam: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax cross-entropy, mean over the labelled samples.

    Several classes of a sample have equal probabilities. Smoothing distributes this fraction of the target evenly over
    all classes.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    target = mixed_targets(labels, logits.shape[1], label_b, lam)
    total = target.sum(dim=1, keepdim=True)
    labelled = total[:, 0] > 0
    target = target / total.clamp(min=1e-12)
    target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1]
    losses = -(target * log_probabilities).sum(dim=1)
    return losses.where(labelled, 0).sum() / labelled.sum().clamp(min=1)


def sigmoid_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    label_b: torch.Tensor | None = None,
    lam: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sigmoid cross-entropy summed over the classes, mean over the labelled samples: the loss for JFT and ImageNet-21k.
    With smoothing s the targets are 1-s and s (s = 1e-4 for ImageNet-21k). Initialise the bias of the head with -10, so
    that thousands of absent classes do not dominate the first steps.
    """
    logits = logits.float()
    target = mixed_targets(labels, logits.shape[1], label_b, lam)
    labelled = target.sum(dim=1) > 0
    target = target * (1 - 2 * label_smoothing) + label_smoothing
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)
    return losses.where(labelled, 0).sum() / labelled.sum().clamp(min=1)


def masked_patch_loss(masked: MaskedPrediction) -> torch.Tensor:
    """Cross-entropy over colour classes, or squared error of the pixels; mean over the corrupted patches."""
    prediction = masked.prediction.float()
    if masked.target.is_floating_point():
        return F.mse_loss(prediction, masked.target)
    return F.cross_entropy(prediction.flatten(0, -2), masked.target.flatten())


def correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the class with the largest logit is one of the labels, bool (B,); always False for unlabelled samples.

    With several labels this is the rule of ImageNet-ReaL (arXiv 2006.07159) and of big_vision for multi-label data.
    """
    labels = labels if labels.dim() == 2 else labels[:, None]
    return (logits.argmax(dim=1, keepdim=True) == labels).any(dim=1)
