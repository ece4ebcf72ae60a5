"""Every metric of the project by name: what tables and reports say of it, and how to make it.

Attention metrics are computed from attention maps where those are (`metrics.imacs`,
`metrics.correspondence`); here they are only described. Image metrics are also made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torchmetrics import Metric, MetricCollection

from i2am_train.errors import ConfigError
from i2am_train.metrics.distribution import FrechetDistance, KernelDistance, SetDistance
from i2am_train.metrics.image_quality import ImagePairScore, MeanImageMetric, PerceptualDistance, ssim


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """What a reader of a table needs to know of a metric."""

    label: str
    higher_is_better: bool | None
    """None where neither end is good: such a number is there to be watched."""
    digits: int
    """Decimal places worth printing."""
    group: str
    """``attention`` or ``image``."""
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
        """Return the fields that ``results.json`` carries."""
        fields = ("label", "higher_is_better", "digits", "group", "unit", "description")
        return {name: getattr(self, name) for name in fields}

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> MetricInfo:
        """From one entry of ``results["metrics"]``, whichever version wrote it."""
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
        """Where better values lie: up, down, or empty if neither is better."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    @property
    def heading(self) -> str:
        """Label with arrow."""
        return f"{self.label} {self.arrow}".strip()


# fmt: off
METRICS: dict[str, MetricInfo] = {
    "imacs_g": MetricInfo(
        "IMACS_g", True, 3, "attention",
        "Attribution inside minus outside the inpainted region, on the generated image",
    ),
    "imacs_r": MetricInfo(
        "IMACS_r", True, 3, "attention",
        "Attribution inside minus outside the garment, on the reference image",
    ),
    "correspondence_error": MetricInfo(
        "Correspondence error", False, 2, "attention",
        "Mean distance of the attention centre from the true reference position", unit="patches",
    ),
    "pck_1": MetricInfo(
        "PCK@1", True, 3, "attention",
        "Share of garment patches whose attention centre is 1 patch off at most",
    ),
    "pck_2": MetricInfo(
        "PCK@2", True, 3, "attention",
        "Share of garment patches whose attention centre is 2 patches off at most",
    ),
    "center_spread": MetricInfo(
        "Centre spread", None, 2, "attention",
        "Standard deviation of the attention centres; near 0 is collapse to one point", unit="patches",
    ),
    "spread_ratio": MetricInfo(
        "Spread ratio", None, 2, "attention",
        "Spread of the attention centres over that of the true positions; 1 is ideal",
    ),
    "attention_entropy": MetricInfo(
        "Attention entropy", None, 2, "attention",
        "Entropy of the attention over reference patches; high means scattered", unit="nats",
    ),
    "ssim": MetricInfo(
        "SSIM", True, 4, "image",
        "Structural similarity to the real image (11x11 Gaussian window, inside only)", paired_only=True,
    ),
    "stlpips": MetricInfo(
        "ST-LPIPS", False, 4, "image",
        "Shift-tolerant perceptual distance to the real image (AlexNet)", paired_only=True,
    ),
    "lpips": MetricInfo(
        "LPIPS", False, 4, "image",
        "Perceptual distance to the real image (LPIPS 0.1, AlexNet)", paired_only=True, needs_download=True,
    ),
    "fd_efficientnet_lite0": MetricInfo(
        "FD (EfficientNet-Lite0)", False, 2, "image",
        "Fréchet distance of the image sets; comparable at equal sample counts only", per_sample=False,
    ),
    "kd_efficientnet_lite0": MetricInfo(
        "KD (EfficientNet-Lite0)", False, 4, "image",
        "Kernel distance of the image sets; may be negative, most of all when paired", per_sample=False,
    ),
    "fid": MetricInfo(
        "FID", False, 2, "image",
        "Fréchet distance of the image sets on Inception-v3, clean-fid's protocol",
        per_sample=False, needs_download=True,
    ),
    "kid": MetricInfo(
        "KID", False, 4, "image",
        "Kernel distance of the image sets on Inception-v3, clean-fid's protocol",
        per_sample=False, needs_download=True,
    ),
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
    """Those among some metrics, or among all that are known, that are not shipped; as `describe` takes them."""
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
    """Return the function behind a per-sample image metric: two uint8 batches to one value each.

    Raises:
        ConfigError: not the name of a per-sample image metric.
        WeightsMissingError: its weights are missing and cannot be downloaded.
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

    Set distances on the same network share their features, which are computed once. The groups are
    said, not left to torchmetrics, which would merge metrics that agree on the first batch.
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
