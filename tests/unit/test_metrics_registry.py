"""Metrics by name; and those of the user's own: what is taken, how it is described, what is refused."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from i2am_train.doors import allow_named
from i2am_train.errors import ConfigError
from i2am_train.metrics import registry
from i2am_train.metrics.image_quality import PerceptualDistance
from i2am_train.metrics.registry import (
    METRICS,
    available_image_metrics,
    check_imported,
    describe,
    image_metric,
    image_pair_score,
    metric_info,
    metric_names,
    own_metrics,
)
from i2am_train.types import GridSize

MODULE = '''
import torch
from torchmetrics import Metric

def error(generated, real, power=1):
    """Mean difference to the real image. And more."""
    return (generated - real).abs().pow(power).mean(dim=(1, 2, 3))
error.higher_is_better, error.label = False, "Error"

def lower(generated, real): return -error(generated, real)
def of_the_batch(generated, real): return error(generated, real).mean()
def failing(generated, real): raise RuntimeError("no such network")
def ssim(generated, real): return error(generated, real)
def _name(generated, real): return error(generated, real)
_name.label = "two\\nlines"

class Largest(Metric):
    higher_is_better = False
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.add_state("value", torch.zeros(()), dist_reduce_fx="max")
    def update(self, generated, real):
        self.value = torch.maximum(self.value, (generated - real).abs().max() * self.scale)
    def compute(self):
        return self.value

class Deaf(Metric):
    def update(self, pictures): ...
    def compute(self): return 0
'''


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of metrics that the user allowed, and the registry as it was afterwards."""
    (tmp_path / "own_metrics_of_a_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for table in ("METRICS", "_PAIR_SCORES"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    allow_named(["own_metrics_of_a_test:psnr"])
    yield
    sys.modules.pop("own_metrics_of_a_test", None)


def named(name: str) -> str:
    return f"own_metrics_of_a_test:{name}"


PICTURES = torch.randint(0, 256, (2, 3, 3, 8, 6), dtype=torch.uint8)
DIFFERENCE = (PICTURES[0].float() - PICTURES[1].float()).abs() / 255


def test_a_function_with_attributes() -> None:
    """Described by its attributes and the first line of its text; scores floats in [0, 1]."""
    assert metric_names(["ssim", named("error")]) == ("ssim", "error")
    info = metric_info("error")
    assert (info.label, info.higher_is_better, info.digits) == ("Error", False, 4)
    assert info.description == "Mean difference to the real image. And more"
    torch.testing.assert_close(image_pair_score("error")(*PICTURES), DIFFERENCE.mean(dim=(1, 2, 3)))


def test_a_mapping_describes_and_gives_arguments() -> None:
    """What describes a metric is not handed to it; everything else is."""
    entry = {"fn": named("error"), "power": 2, "name": "square", "label": "E²", "digits": 1, "unit": "x"}
    assert metric_names([entry, named("error")]) == ("square", "error")
    info = metric_info("square")
    assert (info.label, info.digits, info.unit, info.higher_is_better) == ("E²", 1, "x", False)
    expected = DIFFERENCE.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(image_pair_score("square")(*PICTURES), expected)


def test_a_torchmetrics_metric_is_asked_sample_by_sample() -> None:
    """One value for each, without what other samples or batches left in its state."""
    assert metric_names([{"fn": named("Largest"), "scale": 2}]) == ("Largest",)
    for _ in range(2):
        values = image_pair_score("Largest")(*PICTURES)
        torch.testing.assert_close(values, 2 * DIFFERENCE.amax(dim=(1, 2, 3)))
    assert metric_info("Largest").higher_is_better is False


def test_finished_results_describe_their_metrics() -> None:
    """A later process knows label and direction, imports nothing, and cannot compute it."""
    metric_names([named("error")])
    said = own_metrics(["ssim", "error"])
    assert list(said) == ["error"]
    del registry.METRICS["error"], registry._PAIR_SCORES["error"]
    describe(said)
    assert metric_info("error").label == "Error"
    with pytest.raises(ConfigError, match="No per-sample image metric is called 'error'"):
        image_pair_score("error")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([named("ssim")], "is called 'ssim', and so is another metric. Give it a name of its own"),
        ([named("error"), {"fn": named("lower"), "name": "error"}], "is called 'error', and so is another"),
        ([named("_name")], "has the label 'two\\nlines'. Expected one line"),
        ([{"fn": named("error"), "name": "a b"}], "is called 'a b', which cannot be the name of a column"),
        ([{"fn": named("error"), "digits": 40}], "digits=40. Expected true, false or null"),
        ([{"fn": named("error"), "force": 2}], "(generated, real, force=): got an unexpected keyword"),
        ([{"fn": named("Largest"), "scales": 2}], "cannot be called with (scales=)"),
        ([named("Deaf")], "cannot be called with (self, generated, real): too many"),
        ([named("torch.nn.Linear")], "does not derive from torchmetrics.Metric"),
    ],
)
def test_what_is_refused(entries: list[object], message: str) -> None:
    """Named by its place in the option, before anything is scored."""
    with pytest.raises(ConfigError, match=rf"evaluation\.metrics\[\d\]=.*{re.escape(message)}"):
        metric_names(entries)


@pytest.mark.parametrize(
    ("name", "message"),
    [("of_the_batch", "gave values of shape [] for 2 samples"), ("failing", "RuntimeError: no such network")],
)
def test_two_random_pictures_come_first(name: str, message: str) -> None:
    """What would fail after hours of sampling fails before."""
    metric_names([named(name), named("error")])
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_imported({n: image_pair_score(n) for n in ("error", name)}, GridSize(8, 6))


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    """A misspelled metric is an error that lists what there is."""
    with pytest.raises(ConfigError, match=r"'ssmi'.*ssim, stlpips, lpips, fd_efficientnet_lite0"):
        image_metric("ssmi")
    with pytest.raises(ConfigError, match=r"'imacs'.*imacs_g, imacs_r"):
        metric_info("imacs")
    with pytest.raises(ConfigError, match=r"'fid'.*ssim, stlpips, lpips"):
        image_pair_score("fid")
    with pytest.raises(ConfigError, match=r"'dists'.*stlpips, lpips"):
        PerceptualDistance("dists")


def test_registry_describes_every_image_metric() -> None:
    """Each image metric that can be made is described, and each described one can be made."""
    assert set(available_image_metrics()) == {k for k, v in METRICS.items() if v.group == "image"}
    for name in available_image_metrics(offline_only=True):
        assert image_metric(name).higher_is_better in {None, metric_info(name).higher_is_better}
    assert metric_info("center_spread").higher_is_better is None
    assert metric_info("pck_1").as_json() == {
        "label": "PCK@1",
        "higher_is_better": True,
        "digits": 3,
        "group": "attention",
        "unit": "",
        "description": "Share of garment patches whose attention centre is 1 patch off at most",
    }
