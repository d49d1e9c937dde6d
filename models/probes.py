"""Classifiers on frozen features: few-shot ridge regression, a linear probe, and nearest neighbours.

All take features (N, D) and integer labels (N,), and return predicted labels. Shape suffixes: N training examples, M test
examples, D features, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

BIAS = 100.0  # constant feature, so large that its weight, the bias, is hardly regularised


def select_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` examples of every class, ascending: the first ones of a seeded permutation, so that 5 shots contain
    the 1 shot. Of a class with fewer examples, all are used."""
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels[order]
    picked = [order[np.flatnonzero(shuffled == k)[:shots]] for k in np.unique(labels)]
    return np.sort(np.concatenate(picked))


def ridge(
    train_ND: torch.Tensor, labels_N: torch.Tensor, test_MD: torch.Tensor, num_classes: int, l2s: Sequence[float]
) -> torch.Tensor:
    """Least squares from frozen features to {-1, 1}^K in closed form (section 4.1); predictions (len(l2s), M).

    Features are standardised with the mean and standard deviation of the training set and extended by a constant
    feature of 100; then W = (X'X + l2 I)^-1 X'Y. One eigendecomposition, of the smaller of X'X and XX', suffices for
    all values of l2. Computed in float64.
    """
    train, test = train_ND.double(), test_MD.double()
    mean, std = train.mean(0), train.std(0, correction=0) + 1e-5
    X, Z = (F.pad((x - mean) / std, (0, 1), value=BIAS) for x in (train, test))
    Y = 2 * F.one_hot(labels_N.long(), num_classes).to(X) - 1
    if len(X) < X.shape[1]:  # dual: W = X' (XX' + l2 I)^-1 Y
        values, vectors = torch.linalg.eigh(X @ X.T)
        left, right = Z @ (X.T @ vectors), vectors.T @ Y
    else:
        values, vectors = torch.linalg.eigh(X.T @ X)
        left, right = Z @ vectors, vectors.T @ (X.T @ Y)
    values = values.clamp_min(0)  # rounding errors can make them slightly negative
    return torch.stack([((left / (values + l2)) @ right).argmax(1) for l2 in l2s])


def best_by_mean_rank(accuracy_TL: np.ndarray) -> int:
    """The column (l2) with the best mean rank over the rows (tasks): one l2 for all, as the paper's evaluation chose it.

    accuracy_TL: test accuracy of T tasks and L values of l2; equal accuracies share their mean rank. The choice uses
    test accuracy, so results are slightly optimistic; with a single task this is tuning on the test set.
    """
    mine, others = accuracy_TL[:, :, None], accuracy_TL[:, None, :]
    ranks_TL = ((mine > others).sum(2) + (mine >= others).sum(2) + 1) / 2
    return int(ranks_TL.mean(0).argmax())


def linear_probe(
    train_ND: torch.Tensor,
    labels_N: torch.Tensor,
    test_MD: torch.Tensor,
    num_classes: int,
    *,
    l2s: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    seed: int = 0,
    iterations: int = 200,
) -> tuple[torch.Tensor, float]:
    """Multinomial logistic regression by L-BFGS on standardised features; predictions (M,) and the chosen l2. l2 is the
    penalty on the weights, but not the bias, which is added to the mean loss. It is chosen on a random fifth of the
    training set (`seed`); then the classifier is fitted on the complete set.
    """
    mean, std = train_ND.double().mean(0), train_ND.double().std(0, correction=0) + 1e-5
    train, test = (train_ND.double() - mean) / std, (test_MD.double() - mean) / std
    labels = labels_N.long()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    best, best_accuracy = l2s[-1], -1.0
    if len(l2s) > 1 and len(held):
        weights = None
        for l2 in sorted(l2s, reverse=True):  # decreasing; each fit starts from the previous weights
            weights = fit_logistic(train[kept], labels[kept], num_classes, l2, iterations, weights)
            accuracy = (logits(train[held], weights).argmax(1) == labels[held]).double().mean().item()
            if accuracy > best_accuracy:
                best, best_accuracy = l2, accuracy
    return logits(test, fit_logistic(train, labels, num_classes, best, iterations)).argmax(1), best


def logits(x_ND: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Logits (N, K) of features for `weights` (D+1, K), whose last row is the bias."""
    return x_ND @ weights[:-1] + weights[-1]


def fit_logistic(
    x_ND: torch.Tensor,
    labels_N: torch.Tensor,
    num_classes: int,
    l2: float,
    iterations: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights (D+1, K) that minimise mean cross-entropy + l2/2 * |W|^2; start: initial weights, by default zeros."""
    first = torch.zeros(x_ND.shape[1] + 1, num_classes, dtype=x_ND.dtype, device=x_ND.device)
    weights = (first if start is None else start.clone()).requires_grad_()
    optimiser = torch.optim.LBFGS([weights], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(logits(x_ND, weights), labels_N) + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    return weights.detach()


def nearest_neighbours(
    train_ND: torch.Tensor,
    labels_N: torch.Tensor,
    test_MD: torch.Tensor,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> torch.Tensor:
    """The class with most votes among the k training examples with the largest cosine similarity, (M,). The weight of a
    vote is exp(cosine / temperature) (arXiv 1805.01978, 2104.14294). Test examples are compared `chunk` at a time.
    """
    train, k = F.normalize(train_ND.float(), dim=1), min(k, len(train_ND))
    predictions = []
    for part in F.normalize(test_MD.float(), dim=1).split(chunk):
        similarity, neighbours = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), num_classes, device=part.device)
        votes.scatter_add_(1, labels_N.long()[neighbours], ((similarity - 1) / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)
