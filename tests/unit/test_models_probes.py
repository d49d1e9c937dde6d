"""Probes on frozen features compared with scikit-learn, on data that is not perfectly separable."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from models import probes


def clouds(n, classes=7, width=20, spread=2.5, seed=0):
    """Overlapping Gaussian clouds with features of very different scales."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    features = centres[labels] + spread * generator.normal(size=(n, width))
    return (features * np.logspace(-2, 3, width)).astype(np.float32), labels


@pytest.mark.parametrize("n", [14, 70, 400])  # fewer rows than features (dual form), and more
def test_ridge_predicts_what_scikit_learn_predicts(n):
    (x, y), (z, _) = clouds(n), clouds(500, seed=1)
    grid = (2.0**-10, 1.0, 2.0**10, 2.0**19)
    ours = probes.ridge(torch.tensor(x), torch.tensor(y), torch.tensor(z), 7, grid).numpy()
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0) + 1e-5
    augment = lambda a: np.hstack([(a - mean) / std, np.full((len(a), 1), 100.0)])  # noqa: E731
    for row, l2 in zip(ours, grid, strict=True):
        reference = Ridge(alpha=l2, fit_intercept=False, solver="cholesky").fit(augment(x), 2.0 * np.eye(7)[y] - 1)
        assert np.array_equal(row, reference.predict(augment(z)).argmax(1))
    assert len({tuple(row) for row in ours}) > 1  # the grid matters on this data, so equality above is not vacuous


def test_shots_are_nested_seeded_and_complete():
    labels = np.array([0] * 3 + [1] * 40 + [4] * 40)
    one, five = probes.select_shots(labels, 1, seed=3), probes.select_shots(labels, 5, seed=3)
    assert np.bincount(labels[one]).tolist() == [1, 1, 0, 0, 1]
    assert np.bincount(labels[five]).tolist() == [3, 5, 0, 0, 5]  # class 0 has only three
    assert set(one) <= set(five)
    assert np.array_equal(five, probes.select_shots(labels, 5, seed=3))
    assert not np.array_equal(five, probes.select_shots(labels, 5, seed=4))


def test_mean_rank_prefers_what_is_good_everywhere():
    accuracy = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.1], [0.5, 0.6, 0.7]])
    assert probes.best_by_mean_rank(accuracy) == 1


def test_linear_probe_agrees_with_scikit_learn_logistic_regression():
    (x, y), (z, t) = clouds(300, spread=1.5), clouds(400, spread=1.5, seed=1)
    l2 = 1e-2
    ours, chosen = probes.linear_probe(torch.tensor(x), torch.tensor(y), torch.tensor(z), 7, l2s=(l2,))
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0) + 1e-5
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit((x - mean) / std, y)
    assert chosen == l2
    assert (ours.numpy() == reference.predict((z - mean) / std)).mean() > 0.99
    assert 0.5 < (ours.numpy() == t).mean() < 1


def test_linear_probe_chooses_strong_decay_for_noise_and_weak_for_signal():
    x, y = clouds(300, spread=0.3)
    _, weak = probes.linear_probe(torch.tensor(x), torch.tensor(y), torch.tensor(x[:1]), 7, l2s=(1e-6, 100.0))
    assert weak < 100  # with l2 = 100 everything shrinks to the prior


def test_nearest_neighbours_agree_with_brute_force():
    (x, y), (z, t) = clouds(300, spread=1.5), clouds(50, spread=1.5, seed=1)
    x, z = x / np.logspace(-2, 3, 20), z / np.logspace(-2, 3, 20)
    ours = probes.nearest_neighbours(torch.tensor(x), torch.tensor(y), torch.tensor(z), 7, k=9, chunk=16).numpy()
    reference = KNeighborsClassifier(9, metric="cosine", weights=lambda d: np.exp(-d / 0.07)).fit(x, y)
    assert np.array_equal(ours, reference.predict(z))
    assert 0.5 < (ours == t).mean() < 1
