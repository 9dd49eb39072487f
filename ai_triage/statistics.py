"""The figures an evidence table is made of: AUC with a patient-level interval, sensitivity, specificity, temperature.

Written out here (numpy only) so that a worker can monitor a model without scikit-learn; the tests compare with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def area_under_curve(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    Args:
        labels: [N] 0 or 1.
        scores: [N] any real numbers.

    Raises:
        ValueError: one of the two classes is absent.
    """
    positives = int(labels.sum())
    negatives = labels.size - positives
    if positives == 0 or negatives == 0:
        raise ValueError("an AUC needs both classes")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mid_ranks = np.cumsum(counts) - (counts - 1) / 2.0  # ranks from 1, ties share their mean (Mann-Whitney)
    rank_sum = float(mid_ranks[inverse][labels == 1].sum())
    return (rank_sum - positives * (positives + 1) / 2.0) / (positives * negatives)


def auc_with_interval(
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    patients: Sequence[str],
    *,
    rounds: int = 1000,
    seed: int = 1,
) -> Interval:
    """AUC with its 95 % percentile bootstrap interval; draws patients, as images of one child are not independent."""
    rng = np.random.default_rng(seed)
    _, owner = np.unique(np.asarray(patients), return_inverse=True)
    members = [np.flatnonzero(owner == index) for index in range(int(owner.max()) + 1)]
    draws: list[float] = []
    while len(draws) < rounds:
        drawn = np.concatenate([members[index] for index in rng.integers(0, len(members), len(members))])
        if 0 < labels[drawn].sum() < drawn.size:
            draws.append(area_under_curve(labels[drawn], scores[drawn]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(area_under_curve(labels, scores), float(low), float(high))


def sensitivity_specificity(
    labels: NDArray[np.int64], scores: NDArray[np.float64], threshold: float
) -> tuple[float, float]:
    """Shares of positives at or above the threshold and of negatives below it."""
    called = scores >= threshold
    return float(called[labels == 1].mean()), float((~called[labels == 0]).mean())


def threshold_at_specificity(labels: NDArray[np.int64], scores: NDArray[np.float64], specificity: float) -> float:
    """The lowest threshold that keeps at least that share of negatives below it."""
    negatives = np.sort(scores[labels == 0])
    index = min(int(np.ceil(specificity * negatives.size)), negatives.size - 1)
    return float(np.nextafter(negatives[index - 1], np.inf)) if index > 0 else float(negatives[0])


def fitted_temperature(labels: NDArray[np.int64], logits: NDArray[np.float64]) -> float:
    """The temperature T (> 0) for which sigmoid(logit / T) has the least negative log-likelihood (Guo 2017)."""
    candidates = np.exp(np.linspace(np.log(0.2), np.log(10.0), 400))
    signed = np.where(labels == 1, logits, -logits)
    losses = [float(np.logaddexp(0.0, -signed / temperature).mean()) for temperature in candidates]
    return float(candidates[int(np.argmin(losses))])


def calibration_error(labels: NDArray[np.int64], probabilities: NDArray[np.float64], bins: int = 10) -> float:
    """Expected calibration error over equal-width bins."""
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    return float(
        sum(
            abs(labels[which == index].mean() - probabilities[which == index].mean()) * (which == index).mean()
            for index in range(bins)
            if (which == index).any()
        )
    )
