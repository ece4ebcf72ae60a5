"""Every metric of the project by name: what tables and reports say of it, and how to make it.

Attention metrics are computed from attention maps where those are (`metrics.attention`), those of faithfulness from
images that were made again (`metrics.faithfulness`); here they are only described.
Image metrics are also made here, and so are those of the user's own: entries of the option ``evaluation.metrics`` that
are import paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from i2am_train.doors import calls, is_import_path, make, path_and_keywords, resolve
from i2am_train.errors import ConfigError, I2AMError
from i2am_train.metrics.image_quality import (
    FrechetDistance,
    ImagePairScore,
    KernelDistance,
    MeanImageMetric,
    PerceptualDistance,
    SetDistance,
    ssim,
)
from i2am_train.types import GridSize


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """What a reader of a table needs to know of a metric.

    >>> MetricInfo("SSIM", True, 4, "image", "Structural similarity").heading
    'SSIM ↑'
    """

    label: str
    higher_is_better: bool | None
    """None where neither end is good: such a number is there to be watched."""
    digits: int
    """Decimal places worth printing."""
    group: str
    """``attention``, ``faithfulness`` or ``image``."""
    description: str
    unit: str = ""
    """Empty for a plain number."""
    per_sample: bool = True
    """False for a distance between sets, which has no value for a single image."""
    paired_only: bool = False
    """Needs the real photograph of this person in this garment."""
    needs_download: bool = False
    """Its weights come with no package."""

    def as_json(self) -> dict[str, str | int | bool | None]:
        """The fields that ``results.json`` carries.

        >>> metric_info("pck_1").as_json()["label"]
        'PCK@1'
        """
        fields = ("label", "higher_is_better", "digits", "group", "unit", "description")
        return {name: getattr(self, name) for name in fields}

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> MetricInfo:
        """From one entry of ``results["metrics"]``, whichever version wrote it.

        >>> MetricInfo.of("error", {"higher_is_better": False}).heading
        'error ↓'
        """
        return cls(
            label=str(entry.get("label") or name),
            higher_is_better=entry.get("higher_is_better"),
            digits=int(entry.get("digits", 3)),
            group=str(entry.get("group", "")),
            unit=str(entry.get("unit") or ""),
            description=str(entry.get("description") or ""),
        )

    @property
    def arrow(self) -> str:
        """Where better values lie: up, down, or empty if neither is better.

        >>> METRICS["ssim"].arrow, METRICS["spread_ratio"].arrow
        ('↑', '')
        """
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    @property
    def heading(self) -> str:
        """Label with arrow.

        >>> METRICS["stlpips"].heading
        'ST-LPIPS ↓'
        """
        return f"{self.label} {self.arrow}".strip()


# fmt: off
METRICS: dict[str, MetricInfo] = {
    "imacs_g": MetricInfo(
        "IMACS_g", True, 3, "attention",
        "Attribution inside minus outside the inpainted region, on the generated image"),
    "imacs_r": MetricInfo(
        "IMACS_r", True, 3, "attention",
        "Attribution inside minus outside the garment, on the reference image"),
    "correspondence_error": MetricInfo(
        "Correspondence error", False, 2, "attention",
        "Mean distance of the attention centre from the true reference position", unit="patches"),
    "pck_1": MetricInfo(
        "PCK@1", True, 3, "attention",
        "Share of garment patches whose attention centre is 1 patch off at most"),
    "pck_2": MetricInfo(
        "PCK@2", True, 3, "attention",
        "Share of garment patches whose attention centre is 2 patches off at most"),
    "center_spread": MetricInfo(
        "Centre spread", None, 2, "attention",
        "Standard deviation of the attention centres; near 0 is collapse to one point", unit="patches"),
    "spread_ratio": MetricInfo(
        "Spread ratio", None, 2, "attention",
        "Spread of the attention centres over that of the true positions; 1 is ideal"),
    "attention_entropy": MetricInfo(
        "Attention entropy", None, 2, "attention",
        "Entropy of the attention over reference patches; high means scattered", unit="nats"),
    "use": MetricInfo(
        "Use", None, 4, "faithfulness",
        "Change of the image inside the mask when the layer may not choose where it looks, as a share of the range"),
    "where": MetricInfo(
        "Where", True, 2, "faithfulness",
        "Rank correlation of the layer's attention to a quarter of the garment with the change when it is white"),
    "where_all": MetricInfo(
        "Where, all layers", True, 2, "faithfulness",
        "Rank correlation of the attention to a quarter of the garment with the change when it is white"),
    "deletion": MetricInfo(
        "Deletion", True, 4, "faithfulness",
        "Change of the image when the map's highest patches go, minus that when its lowest go (area over shares)"),
    "deletion_perceptual": MetricInfo(
        "Deletion, perceptual", True, 4, "faithfulness",
        "The same with a learned distance of the images (evaluation.faithfulness.perceptual)"),
    "ssim": MetricInfo(
        "SSIM", True, 4, "image",
        "Structural similarity to the real image (11x11 Gaussian window, inside only)", paired_only=True),
    "stlpips": MetricInfo(
        "ST-LPIPS", False, 4, "image",
        "Shift-tolerant perceptual distance to the real image (AlexNet)", paired_only=True),
    "lpips": MetricInfo(
        "LPIPS", False, 4, "image",
        "Perceptual distance to the real image (LPIPS 0.1, AlexNet)", paired_only=True, needs_download=True),
    "fd_efficientnet_lite0": MetricInfo(
        "FD (EfficientNet-Lite0)", False, 2, "image",
        "Fréchet distance of the image sets; comparable at equal sample counts only", per_sample=False),
    "kd_efficientnet_lite0": MetricInfo(
        "KD (EfficientNet-Lite0)", False, 4, "image",
        "Kernel distance of the image sets; may be negative, most of all when paired", per_sample=False),
    "fid": MetricInfo(
        "FID", False, 2, "image",
        "Fréchet distance of the image sets on Inception-v3, clean-fid's protocol",
        per_sample=False, needs_download=True),
    "kid": MetricInfo(
        "KID", False, 4, "image",
        "Kernel distance of the image sets on Inception-v3, clean-fid's protocol",
        per_sample=False, needs_download=True),
    "step_seconds": MetricInfo(
        "Seconds a step", None, 3, "training",
        "Median time of a training step on the machine of the run, loading included", unit="s", per_sample=False),
}
# fmt: on
"""The shipped metrics, and behind them those that were registered or described since."""
SHIPPED = tuple(METRICS)

_PAIR_SCORES: dict[str, Callable[[], ImagePairScore]] = {
    "ssim": lambda: ssim,
    "stlpips": lambda: PerceptualDistance("stlpips"),
    "lpips": lambda: PerceptualDistance("lpips"),
}
_SET_DISTANCES: Mapping[str, tuple[type[SetDistance], str]] = {
    "fd_efficientnet_lite0": (FrechetDistance, "efficientnet_lite0"),
    "kd_efficientnet_lite0": (KernelDistance, "efficientnet_lite0"),
    "fid": (FrechetDistance, "inception_v3"),
    "kid": (KernelDistance, "inception_v3"),
}


def register(name: str, info: MetricInfo, score: ImagePairScore) -> None:
    """Make a user's own metric known by name, in place of an earlier one of that name."""
    METRICS[name] = info
    _PAIR_SCORES[name] = lambda: score


def own_metrics(names: Iterable[str] | None = None) -> dict[str, dict[str, str | int | bool | None]]:
    """Those among some metrics, or among all that are known, that are not shipped; as `describe` takes them.

    >>> own_metrics(["ssim"])
    {}
    """
    own = [name for name in METRICS if name not in SHIPPED]
    return {name: METRICS[name].as_json() for name in own if names is None or name in names}


def describe(own: Mapping[str, Mapping[str, Any]]) -> None:
    """Make metrics of finished results known to tables and figures; they can be shown and not computed."""
    for name, said in own.items():
        METRICS.setdefault(name, MetricInfo.of(name, said))


def metric_info(name: str) -> MetricInfo:
    """Describe a metric.

    Raises:
        ConfigError: the project has no metric of that name.

    >>> metric_info("correspondence_error").unit
    'patches'
    """
    _require_name(name, METRICS, "metric")
    return METRICS[name]


def available_image_metrics(*, offline_only: bool = False) -> tuple[str, ...]:
    """Names that `image_metric` knows; on request only those whose weights come with packages.

    >>> available_image_metrics(offline_only=True)
    ('ssim', 'stlpips', 'fd_efficientnet_lite0', 'kd_efficientnet_lite0')
    """
    names = (*_PAIR_SCORES, *_SET_DISTANCES)
    return tuple(name for name in names if not (offline_only and METRICS[name].needs_download))


def image_pair_score(name: str) -> ImagePairScore:
    """The function behind a per-sample image metric: two uint8 batches to one value each.

    Raises:
        ConfigError: not the name of a per-sample image metric.
        WeightsMissingError: its weights are missing and cannot be downloaded.

    >>> image_pair_score("ssim") is ssim
    True
    """
    _require_name(name, _PAIR_SCORES, "per-sample image metric")
    return _PAIR_SCORES[name]()


def set_distance(name: str) -> SetDistance:
    """Make a distance between sets of images; its ``network`` says whose features it compares.

    Raises:
        ConfigError: not the name of such a distance.
        WeightsMissingError: its weights are missing and cannot be downloaded.

    >>> set_distance("kd_efficientnet_lite0").network
    'efficientnet_lite0'
    """
    _require_name(name, _SET_DISTANCES, "distance between sets")
    kind, network = _SET_DISTANCES[name]
    return kind(network)


def image_metric(name: str) -> Metric:
    """Make an image metric: ``update(generated, real, index)``, ``compute()``, ``reset()``.

    Raises:
        ConfigError: not the name of an image metric; the message lists them.
        WeightsMissingError: its weights are missing and cannot be downloaded.

    >>> image_metric("psnr")
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: No image metric is called 'psnr'. Choose one of: ssim, stlpips, \
lpips, fd_efficientnet_lite0, kd_efficientnet_lite0, fid, kid.
    """
    _require_name(name, available_image_metrics(), "image metric")
    if name in _SET_DISTANCES:
        return set_distance(name)
    return MeanImageMetric(image_pair_score(name))


def image_metrics(names: Iterable[str]) -> MetricCollection:
    """Make several image metrics that are updated together.

    Set distances on the same network share their features, which are computed once. The groups are said, not left to
    torchmetrics, which would merge metrics that agree on the first batch.

    >>> image_metrics(["ssim", "fd_efficientnet_lite0", "kd_efficientnet_lite0"]).compute_groups
    {0: ['ssim'], 1: ['fd_efficientnet_lite0', 'kd_efficientnet_lite0']}
    """
    metrics = {name: image_metric(name) for name in names}
    groups: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        groups.setdefault(metric.network if isinstance(metric, SetDistance) else name, []).append(name)
    return MetricCollection(dict(metrics), compute_groups=list(groups.values()))


def _require_name(name: str, known: Iterable[str], kind: str) -> None:
    known = tuple(known)
    if name not in known:
        raise ConfigError(f"No {kind} is called '{name}'. Choose one of: {', '.join(known)}.")


OPTION = "evaluation.metrics"
EXPECTED = (
    "a function of two batches of pictures (generated, real), float32 [batch, 3, height, width] in [0, 1], that "
    "returns one number per sample, or a torchmetrics.Metric that is updated with two such batches"
)
DESCRIPTION = ("name", "label", "higher_is_better", "digits", "unit", "description")
"""What an attribute of the object, or an entry of the mapping, says of a metric; other entries are its arguments."""
COLUMNS = ("index", "name", "garment_name")
"""What else stands in a sample's row."""


@dataclass(frozen=True)
class _ImportedScore:
    """A metric of the user's own as all others are: two uint8 batches to one value per sample.

    A ``torchmetrics.Metric`` is reset and asked for each sample alone, in this process alone.
    """

    path: str
    score: Callable[..., Any]

    def __call__(
        self, generated: UInt8[Tensor, "batch 3 height width"], real: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """One value per sample.

        Raises:
            ConfigError: what comes back is something else.
        """
        with torch.no_grad():
            found = self._values(generated.float() / 255, real.float() / 255)
        values = torch.as_tensor(found, device=generated.device)
        if values.shape != (len(generated),) or values.is_complex():
            raise ConfigError(
                f"{OPTION}: {self.path} gave values of shape {list(values.shape)} for {len(generated)} samples. "
                f"Expected {EXPECTED}."
            )
        return values.float()

    def _values(self, generated: Tensor, real: Tensor) -> Any:
        if not isinstance(self.score, Metric):
            return self.score(generated, real)
        metric = self.score.to(generated.device)
        metric.sync_on_compute = False
        values = []
        for pair in zip(generated[:, None], real[:, None], strict=True):
            metric.reset()
            metric.update(*pair)
            values.append(torch.as_tensor(metric.compute()).reshape(()))
        metric.reset()
        return torch.stack(values)


def metric_names(entries: Sequence[str | Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the metrics that the option's entries mean; those by import path are registered.

    Args:
        entries: names, import paths, or mappings of an import path (``fn``) and what describes the metric.

    Raises:
        ConfigError: an entry cannot be imported or is no metric, or its name is taken.

    >>> metric_names(["ssim", "fid"])
    ('ssim', 'fid')
    """
    names: dict[str, str] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry, str) and not is_import_path(entry):
            names[entry] = entry
            continue
        option = f"{OPTION}[{index}]"
        path, keywords = path_and_keywords(entry, option)
        found = resolve(path, option, EXPECTED, partial(_fault, _arguments(keywords)))
        name, info = _described(f"{option}={path}", found, keywords)
        if names.setdefault(name, path) != path or name in (*SHIPPED, *COLUMNS):
            raise ConfigError(
                f"{option}={path} is called '{name}', and so is another metric. Give it a name of its own: "
                f"{{fn: {path}, name: my_{name}}}."
            )
        register(name, info, _ImportedScore(path, _made(f"{option}={path}", found, keywords)))
    return tuple(names)


def check_imported(scores: Mapping[str, Callable[[Tensor, Tensor], Tensor]], size: GridSize) -> None:
    """Ask the user's own metrics for two random pictures: what would fail after hours fails now.

    Raises:
        ConfigError: one fails, or gives something else than one number per sample.
    """
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 2, 3, *size), generator=draw, dtype=torch.uint8)
    for name, score in scores.items():
        if not isinstance(score, _ImportedScore):
            continue
        try:
            score(*pictures)
        except I2AMError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{OPTION}: {name} ({score.path}) fails on two random pictures of {size}: {type(error).__name__}: "
                f"{error}. Expected {EXPECTED}; --debug shows where it fails."
            ) from error


def _arguments(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name not in DESCRIPTION}


def _fault(arguments: Mapping[str, Any], found: Any) -> str | None:
    if isinstance(found, type):
        if not issubclass(found, Metric):
            return "is a class that does not derive from torchmetrics.Metric"
        return calls(**arguments)(found) or calls("self", "generated", "real")(found.update)
    if isinstance(found, Metric):
        if arguments:
            return f"is an object already and takes no {', '.join(arguments)}"
        return calls("generated", "real")(found.update)
    return calls("generated", "real", **arguments)(found)


def _made(named: str, found: Any, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    if isinstance(found, Metric):
        return found
    if not isinstance(found, type):
        return partial(found, **_arguments(keywords))
    made: Metric = make(found, named, **_arguments(keywords))
    return made


def _described(named: str, found: Any, keywords: Mapping[str, Any]) -> tuple[str, MetricInfo]:
    """Name and description: what the mapping says, else the object's attributes, else its own name and text."""
    own = getattr(found, "__name__", type(found).__name__)
    said: dict[str, Any] = {
        "name": own,
        "label": None,
        "higher_is_better": None,
        "digits": 4,
        "unit": "",
        "description": None,
    }
    said |= {name: getattr(found, name) for name in DESCRIPTION if hasattr(found, name)}
    said |= {name: keywords[name] for name in DESCRIPTION if name in keywords}
    name = str(said.pop("name"))
    if not re.fullmatch(r"[^\W\d]\w{0,39}", name):
        raise ConfigError(
            f"{named} is called {name!r}, which cannot be the name of a column: expected letters, digits and _, at "
            f"most 40. Give it a name: {{fn: {named.partition('=')[2]}, name: my_metric}}."
        )
    first_line = (getattr(found, "__doc__", None) or name).strip().splitlines()[0].rstrip(".")
    said["label"] = said["label"] or name
    said["description"] = said["description"] or first_line[:100]
    for text in ("label", "unit", "description"):
        line = said[text]
        if not isinstance(line, str) or not line.isprintable() or len(line) > 100:
            raise ConfigError(f"{named} has the {text} {line!r}. Expected one line of at most 100 letters.")
    better, digits = said["higher_is_better"], said["digits"]
    if better not in (True, False, None) or digits not in range(11):
        raise ConfigError(
            f"{named} has higher_is_better={better!r} and digits={digits!r}. Expected true, false or null, and a "
            "number of 0 to 10 decimal places."
        )
    return name, MetricInfo(said["label"], better, digits, "image", said["description"], said["unit"], paired_only=True)
