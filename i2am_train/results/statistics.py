"""Intervals of means, of paired differences and of correlations.

``Over`` says what the values are, and decides the interval (:func:`mean_interval`): Student's t over training seeds,
a bootstrap over samples. An interval over samples says nothing about what another training seed would give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, norm, rankdata
from scipy.stats import t as student_t


class Over(StrEnum):
    """What the values of a mean, or the pairs of a difference, are."""

    SEEDS = "seeds"
    """Training seeds, of which there are few."""
    SAMPLES = "samples"
    """Held-out samples of one evaluation."""

    @property
    def interval(self) -> str:
        """What tables call the interval of :func:`mean_interval`.

        >>> Over.SEEDS.interval
        "Student's t"
        """
        return {Over.SEEDS: "Student's t", Over.SAMPLES: "bootstrap, BCa"}[self]


_BOOTSTRAP_COVERAGE = {5: 85, 10: 90, 20: 93}
"""True coverage in percent of the 95 % bootstrap interval by number of samples: simulated by us,
4000 draws of normal values through ``mean_interval``. With two to five values it misses in 50 to
15 %, which is why the interval over seeds is another."""


def few_samples_note(fewest: int) -> str:
    """What a bootstrap over so few samples is worth; empty where there are enough.

    >>> few_samples_note(6)
    ' With few samples they are too narrow (95 % intervals cover 85 % with 5, 90 % with 10, 93 % with 20).'
    """
    if fewest >= max(_BOOTSTRAP_COVERAGE):
        return ""
    covers = ", ".join(f"{c} % with {n}" for n, c in _BOOTSTRAP_COVERAGE.items())
    return f" With few samples they are too narrow (95 % intervals cover {covers})."


class Verdict(StrEnum):
    """What a paired difference shows about an arm."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no difference shown"
    HIGHER = "higher"
    LOWER = "lower"
    NOT_TESTED = "not tested"


def verdict(higher_is_better: bool | None, low: float | None, high: float | None) -> Verdict:
    """What an interval of a difference shows.

    >>> str(verdict(False, -0.4, -0.1)), str(verdict(True, -0.4, 0.1))
    ('better', 'no difference shown')
    """
    if low is None or high is None:
        return Verdict.NOT_TESTED
    if low <= 0 <= high:
        return Verdict.NOT_SHOWN
    if higher_is_better is None:
        return Verdict.HIGHER if low > 0 else Verdict.LOWER
    return Verdict.BETTER if (low > 0) == higher_is_better else Verdict.WORSE


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of ``a - b`` over ``n`` pairs with its interval (``None`` for n < 2)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    positive: int = 0
    """How many of the pairs have ``a > b``."""
    confidence: float = 0.95
    over: Over = Over.SEEDS

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and it lies wholly on one side of zero.

        >>> PairedDifference(mean=0.1, low=0.0, high=0.2, n=3).excludes_zero
        False
        """
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_difference(
    a: ArrayLike, b: ArrayLike, over: Over, confidence: float = 0.95, resamples: int = 10_000
) -> PairedDifference:
    """Mean of ``a - b`` with the interval of :func:`mean_interval`.

    Args:
        a: one value per seed (or sample).
        b: the values of the same seeds (or samples), in the same order.
        over: what the pairs are.
        confidence: as for :func:`mean_interval`, like ``resamples``.

    Pairs in which a value is not finite are left out. One pair has no interval.

    Raises:
        ValueError: if ``a`` and ``b`` differ in length or hold no finite pair.

    >>> paired_difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], Over.SEEDS)
    PairedDifference(mean=1.0, low=1.0, high=1.0, n=3, positive=3, confidence=0.95, \
over=<Over.SEEDS: 'seeds'>)
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"Paired values have shapes {first.shape} and {second.shape}; "
            "give two sequences of equal length, in the same order."
        )
    differences = first - second
    differences = differences[np.isfinite(differences)]
    if differences.size == 0:
        raise ValueError(f"None of the {first.size} pairs has two finite values.")
    low, high = mean_interval(differences, over, confidence, resamples)
    return PairedDifference(
        mean=float(differences.mean()),
        low=low,
        high=high,
        n=int(differences.size),
        positive=int((differences > 0).sum()),
        confidence=confidence,
        over=over,
    )


def mean_interval(
    values: ArrayLike, over: Over, confidence: float = 0.95, resamples: int = 10_000
) -> tuple[float, float] | tuple[None, None]:
    """Interval of the mean of finite ``values``: the one place that decides which kind.

    Over seeds it is Student's t, which keeps what it promises with two or three values; a bootstrap
    cannot know from so few how far they may lie apart (``_BOOTSTRAP_COVERAGE``). With two
    seeds it reaches 12.7 standard errors to each side: so little is known then. Where nothing differs
    it claims a difference in 5 % of studies (normal values; 2 to 3 % for arms of one skewed
    distribution, up to 12 % where the differences themselves are skewed). Over samples it is the
    bias-corrected, accelerated bootstrap, which asks for many values and not for a distribution.

    Args:
        values: one per seed or sample.
        over: what they are.
        confidence: nominal coverage of the interval, between 0 and 1.
        resamples: number of bootstrap resamples, seeded so that a report can be made again to the digit; over samples
            only.

    Returns:
        Both ends; ``(None, None)`` for fewer than two values, and no width where all are equal.

    Source: Efron, "Better bootstrap confidence intervals", 1987, as in ``scipy.stats.bootstrap``.

    >>> low, high = mean_interval([1.0, 2.0, 3.0], Over.SEEDS)
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    >>> mean_interval([0.5, 0.5, 0.5], Over.SAMPLES)
    (0.5, 0.5)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        return None, None
    if _all_equal(values):  # the bootstrap distribution is one point; scipy would return NaN
        value = float(values.mean())
        return value, value
    match over:
        case Over.SEEDS:
            return _student_interval(values, confidence)
        case Over.SAMPLES:
            return _bootstrap_interval(values, confidence, resamples)


def sample_mean(values: Sequence[float | None], confidence: float = 0.95) -> dict[str, Any]:
    """The mean over the samples that have a value, its interval, and how many they are: the form of results' files.

    >>> sample_mean([0.5, None, 0.5])
    {'mean': 0.5, 'low': 0.5, 'high': 0.5, 'confidence': 0.95, 'n': 2}
    >>> sample_mean([None])["mean"] is None
    True
    """
    known = [value for value in values if value is not None]
    low, high = mean_interval(known, Over.SAMPLES, confidence)
    mean = math.fsum(known) / len(known) if known else None
    return {"mean": mean, "low": low, "high": high, "confidence": confidence, "n": len(known)}


def sample_interval(found: Mapping[str, Any]) -> tuple[float, float] | None:
    """Both ends of what :func:`sample_mean` found, None where there is no interval.

    >>> sample_interval(sample_mean([0.5, 0.5])), sample_interval(sample_mean([0.5]))
    ((0.5, 0.5), None)
    """
    return None if found["low"] is None else (found["low"], found["high"])


def _student_interval(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    half = student_t.ppf((1 + confidence) / 2, values.size - 1) * values.std(ddof=1)
    half /= math.sqrt(values.size)
    return float(values.mean() - half), float(values.mean() + half)


def _bootstrap_interval(values: NDArray[np.float64], confidence: float, resamples: int) -> tuple[float, float]:
    result = bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        batch=max(1, 2**20 // values.size),  # resamples at a time: 8 MiB of float64
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclass(frozen=True, slots=True)
class Correlation:
    """Linear (Pearson) and rank (Spearman) correlation with their intervals, where there are any."""

    pearson: float
    pearson_interval: tuple[float, float] | None
    spearman: float
    spearman_interval: tuple[float, float] | None
    n: int


def correlation(x: ArrayLike, y: ArrayLike, clusters: Sequence[str]) -> Correlation | None:
    """Correlation over points that come in clusters, with Fisher's 95 % interval for as many values as clusters.

    Args:
        x: one value per point.
        y: the other value of each point.
        clusters: the training run that each point comes from. Checkpoints of one run resemble each
            other; counted one by one they would promise too much.

    The interval is wider than need be where points of one cluster differ much; a bootstrap over few
    clusters is too narrow nearly everywhere (55 to 97 % instead of 95 % with six, where this covers 85 to
    100 %: simulated by us). None with fewer than four clusters, and none at exactly 1 or -1.
    ``None`` for fewer than three points, or where one of the two does not vary.

    Source: Fisher, "On the probable error of a coefficient of correlation", 1921; for ranks Bonett
    and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman
    correlations", 2000.

    >>> found = correlation([1, 2, 3, 4], [1, 2, 3, 5], ["a", "b", "c", "d"])
    >>> round(found.pearson, 3), [round(end, 2) for end in found.pearson_interval]
    (0.983, [0.39, 1.0])
    >>> found.spearman, found.spearman_interval
    (1.0, None)
    """
    points = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)])
    whole = _coefficients(points)
    if points.shape[1] < 3 or whole is None:
        return None
    (pearson, spearman), count = whole, len(set(clusters))
    return Correlation(
        pearson,
        _fisher_interval(pearson, 1.0, count),
        spearman,
        _fisher_interval(spearman, 1 + spearman**2 / 2, count),
        points.shape[1],
    )


def _fisher_interval(coefficient: float, variance: float, count: int) -> tuple[float, float] | None:
    """Around ``atanh`` of the coefficient, whose variance is ``variance / (count - 3)``."""
    if count < 4 or abs(coefficient) > 1 - 1e-9:
        return None
    half = norm.ppf((1 + 0.95) / 2) * math.sqrt(variance / (count - 3))
    low, high = np.tanh(np.arctanh(coefficient) + np.array([-half, half]))
    return float(low), float(high)


def _coefficients(points: NDArray[np.float64]) -> tuple[float, float] | None:
    """Pearson's and Spearman's coefficient of ``[2, point]``; None where they are not defined."""
    if any(_all_equal(values) for values in points):
        return None
    pearson, spearman = (np.asarray(np.corrcoef(of)) for of in (points, rankdata(points, axis=1)))
    return float(pearson[0, 1]), float(spearman[0, 1])


def _all_equal(values: NDArray[np.float64]) -> bool:
    # Differences of equal gaps differ by rounding only: 0.3 - 0.1 and 0.4 - 0.2.
    scale = float(np.abs(values).max())
    return float(np.ptp(values)) <= 1e-12 * max(scale, 1e-300)
