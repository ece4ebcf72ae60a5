"""Means, spreads, paired intervals and correlations against values known by hand, by theory or by simulation."""

import json
import math
import warnings

import numpy as np
import pytest
from scipy.stats import binom, ttest_rel

from i2am_train.results.statistics import Over, PairedDifference, correlation, mean_interval, paired_difference, verdict
from i2am_train.results.study import compare


def cell(arm, seed, **metrics):
    return {"arm": arm, "seed": seed, "folder": f"cells/{arm}-{seed}", "metrics": metrics}


def compared(cells, arms=("baseline", "refined"), samples=None):
    return compare(cells, ["ssim", "pck_1", "fid"], arms, "baseline", samples)


def test_summary_is_mean_and_sample_deviation_over_seeds():
    # By hand: 1, 2, 6 have mean 3 and sample variance (4 + 1 + 9) / 2 = 7.
    summary = compared([cell("refined", s, ssim=v) for s, v in enumerate((1.0, 2.0, 6.0))])["summary"]
    assert summary["refined"]["ssim"] == {"mean": 3.0, "std": pytest.approx(math.sqrt(7.0)), "n": 3}


def test_summary_of_one_seed_has_no_spread_and_values_that_are_not_finite_do_not_count():
    cells = [cell("a", 0, ssim=0.5, pck_1=math.nan), cell("a", 1, ssim=None, pck_1=math.nan)]
    summary = compared(cells, arms=["a"])["summary"]["a"]
    assert summary["ssim"] == {"mean": 0.5, "std": None, "n": 1}
    assert "pck_1" not in summary


def draws(distribution, studies, seeds, arms=2):
    """Values of arms that do not differ: ``[study, arm, seed]``."""
    random = np.random.default_rng(seeds)
    return getattr(random, distribution)(size=(studies, arms, seeds))


def claims(values, over, **options):
    """In how many studies the report would say better or worse."""
    found = (paired_difference(first, second, over, **options) for first, second in values)
    return sum(str(verdict(True, one.low, one.high)) in {"better", "worse"} for one in found)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("distribution", "exact"), [("normal", True), ("lognormal", False)])
def test_differences_that_do_not_exist_are_claimed_in_a_twentieth_of_studies(distribution, exact, seeds):
    # No study of these has a true difference. Skewed values make t careful, never bold.
    studies = 2000
    claimed = claims(draws(distribution, studies, seeds), Over.SEEDS)
    low, high = binom.ppf([1e-4, 1 - 1e-4], studies, 0.05)
    assert claimed <= high
    assert claimed >= (low if exact else 1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_bootstrap_over_seeds_would_claim_many(seeds):
    # Why the interval over seeds is another than that over samples: the same studies, 15 to 50 %.
    studies = 300
    claimed = claims(draws("normal", studies, seeds), Over.SAMPLES, resamples=200)
    assert claimed > binom.ppf(1 - 1e-4, studies, 0.05)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_interval_over_seeds_is_scipys_paired_t(confidence):
    first, second = draws("normal", 1, 4)[0]
    found = paired_difference(first, second, Over.SEEDS, confidence)
    assert (found.low, found.high) == pytest.approx(ttest_rel(first, second).confidence_interval(confidence))


def test_two_seeds_leave_a_wide_interval():
    # 12.7 standard errors to each side: 1 and 2 do not even show that the mean is above 0.
    low, high = mean_interval([1.0, 2.0], Over.SEEDS)
    assert (low, high) == pytest.approx((1.5 - 12.7062 * 0.5, 1.5 + 12.7062 * 0.5), abs=1e-3)


def test_interval_over_samples_is_close_to_theory_for_many():
    # 400 normal differences: the interval is near mean +- 1.96 std / 20, and seeded.
    differences = np.random.default_rng(7).normal(0.3, 1.0, 400)
    values = differences + 5.0, np.full(400, 5.0)
    found = paired_difference(*values, Over.SAMPLES)
    half = 1.96 * differences.std(ddof=1) / 20
    assert found.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.1 * half)
    assert found == paired_difference(*values, Over.SAMPLES)
    assert found.positive == (differences > 0).sum()


@pytest.mark.parametrize("over", Over)
def test_pairing_removes_what_both_arms_share(over):
    # Pairs differ by 10, arms by 0.1: unpaired the arms overlap, paired zero is excluded.
    base = np.array([0.0, 10.0, 20.0, 30.0])
    found = paired_difference(base + [0.1, 0.12, 0.08, 0.1], base, over)
    assert found.excludes_zero
    assert 0.07 <= found.low <= found.mean <= found.high <= 0.13


@pytest.mark.parametrize("over", Over)
@pytest.mark.parametrize("n", [2, 3, 64])
def test_equal_differences_have_an_interval_without_width_and_no_warning(n, over):
    # Equal up to rounding (0.3 - 0.1, 0.4 - 0.2 ...): scipy alone would warn and return NaN.
    other = 0.1 * np.arange(1, n + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference(other + 0.2, other, over)
    assert found.low == found.high == pytest.approx(0.2)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0, 1.0], [1.0, -1.0], [5.0, 0.0, 0.0]])
def test_few_and_lumpy_samples_give_a_finite_interval_and_no_warning(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference(values, np.zeros(len(values)), Over.SAMPLES)
    assert min(values) <= found.low <= found.high <= max(values)


@pytest.mark.parametrize("over", Over)
def test_one_pair_has_no_interval_and_excludes_nothing(over):
    found = paired_difference([2.0], [0.5], over)
    assert (found.mean, found.low, found.high, found.n) == (1.5, None, None, 1)
    assert not found.excludes_zero


def test_touching_zero_is_not_excluding_it():
    assert not PairedDifference(mean=0.1, low=0.0, high=0.2, n=3).excludes_zero


def test_pairs_that_are_not_finite_are_left_out():
    found = paired_difference([1.0, math.nan, 3.0], [0.0, 0.0, math.inf], Over.SEEDS)
    assert (found.mean, found.n) == (1.0, 1)


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [([1.0, 2.0], [1.0], "equal length"), ([], [], "None of the 0 pairs"), ([math.nan], [1.0], "None of the 1 pairs")],
)
def test_what_cannot_be_paired_is_refused(a, b, match):
    with pytest.raises(ValueError, match=match):
        paired_difference(a, b, Over.SEEDS)


def test_seeds_are_matched_by_number_and_the_start_has_no_pair():
    # Seed 2 is missing for one arm, order differs, the shared start has seed None.
    cells = [
        cell("base", None, ssim=9.0),
        cell("refined", 1, ssim=5.0),
        cell("refined", 0, ssim=1.0),
        cell("refined", 2, ssim=7.0),
        cell("baseline", 0, ssim=0.0),
        cell("baseline", 1, ssim=2.0),
    ]
    (found,) = compared(cells, arms=["base", "baseline", "refined"])["paired"]  # none for the start
    assert (found["arm"], found["difference"], found["n"], found["over"]) == ("refined", 2.0, 2, "seeds")


def test_samples_are_matched_by_name():
    first = [{"name": "b", "ssim": 3.0}, {"name": "a", "ssim": 1.0}, {"name": "c", "ssim": None}]
    second = [{"name": "a", "ssim": 0.5}, {"name": "b", "ssim": 1.0}, {"name": "c", "ssim": 1.0}]
    cells = [cell("refined", 0, ssim=2.0), cell("baseline", 0, ssim=1.0)]
    samples = {"cells/refined-0": first, "cells/baseline-0": second}
    (found,) = compared(cells, samples=samples)["paired"]  # none for a metric that has no scores
    assert (found["metric"], found["difference"], found["n"], found["over"]) == ("ssim", 1.25, 2, "samples")


def test_results_entries_are_plain_json_and_follow_the_schema():
    cells = [cell("base", None, ssim=0.5)]
    cells += [cell(arm, s, ssim=s + k) for k, arm in enumerate(("baseline", "refined")) for s in (0, 1)]
    found = compare(cells, ["ssim"], ["base", "baseline", "refined"], "baseline")
    assert json.loads(json.dumps(found)) == found
    assert found["summary"]["base"]["ssim"] == {"mean": 0.5, "std": None, "n": 1}
    (entry,) = found["paired"]
    assert entry == {
        "arm": "refined",
        "against": "baseline",
        "metric": "ssim",
        "difference": 1.0,
        "low": 1.0,
        "high": 1.0,
        "n": 2,
        "positive": 2,
        "confidence": 0.95,
        "over": "seeds",
        "interval": "Student's t",
    }


def test_a_single_seed_falls_back_to_samples_only_if_they_are_given():
    # Over samples where there are scores of samples; a set distance stays without interval.
    cells = [cell("baseline", 3, ssim=0.1, fid=5.0), cell("refined", 3, ssim=0.3, fid=4.0)]
    samples = {
        "cells/baseline-3": [{"name": n, "ssim": 0.1} for n in "abc"],
        "cells/refined-3": [{"name": n, "ssim": v} for n, v in zip("abc", (0.2, 0.3, 0.4), strict=True)],
    }
    arguments = (cells, ["ssim", "fid"], ["baseline", "refined"], "baseline")
    without = compare(*arguments)["paired"]
    assert [(e["low"], e["n"], e["over"]) for e in without] == [(None, 1, "seeds")] * 2
    ssim, fid = compare(*arguments, samples=samples)["paired"]
    assert (ssim["over"], ssim["n"], ssim["low"] > 0) == ("samples", 3, True)
    assert (fid["over"], fid["low"], fid["difference"]) == ("seeds", None, -1.0)
    assert ssim["interval"] == "bootstrap, BCa"


def test_a_metric_known_for_one_of_two_seeds_is_not_compared_over_samples():
    # Else one table would mix both kinds of intervals under one heading.
    cells = [
        cell(arm, seed, ssim=None if (arm, seed) == ("refined", 1) else 0.1 * seed)
        for arm in ("baseline", "refined")
        for seed in (0, 1)
    ]
    samples = {c["folder"]: [{"name": n, "ssim": 0.1} for n in "abc"] for c in cells}
    arms = ["baseline", "refined"]
    (entry,) = compare(cells, ["ssim"], arms, "baseline", samples=samples)["paired"]
    assert (entry["over"], entry["n"], entry["low"]) == ("seeds", 1, None)


def runs_of_checkpoints(studies, steps, shared, relation=0.0, runs=6):
    """Two scores of every checkpoint, ``[study, score, run, step]``; ``shared``: the runs' part of the variance."""
    random = np.random.default_rng(steps)
    mix = np.array([[1.0, 0.0], [relation, math.sqrt(1 - relation**2)]])
    of_run, of_checkpoint = (
        np.einsum("ab,nbrs->nars", mix, random.normal(size=(studies, 2, runs, count))) for count in (1, steps)
    )
    return math.sqrt(shared) * of_run + math.sqrt(1 - shared) * of_checkpoint


@pytest.mark.parametrize("relation", [0.0, 0.7])
@pytest.mark.parametrize(("steps", "shared"), [(1, 1.0), (6, 0.9), (6, 0.3)])
def test_intervals_of_correlations_cover_the_truth(steps, shared, relation):
    # Six runs as in the repository. Checkpoints of one run resemble each other: never fewer than 95 %.
    studies = 800
    names = [f"run{number}" for number in range(6) for _ in range(steps)]
    hits = 0
    for x, y in runs_of_checkpoints(studies, steps, shared, relation):
        low, high = correlation(x.ravel(), y.ravel(), names).pearson_interval
        hits += low <= relation <= high
    assert hits >= binom.ppf(1e-4, studies, 0.95)


def test_a_correlation_of_few_runs_or_exactly_one_has_no_interval():
    x, names = [1.0, 2.0, 3.0, 5.0], list("abcd")
    assert correlation(x, [1.0, 2.0, 3.0, 4.0], names).pearson_interval is not None
    assert correlation(x, x, names).pearson_interval is None
    assert correlation(x, [1.0, 2.0, 3.0, 4.0], list("abcc")).pearson_interval is None
