"""The paper's Table 2, to stand beside a run that repeats one of its models."""

from collections.abc import Mapping

from i2am_train.metrics.registry import METRICS
from i2am_train.types import PublishedModel

TABLE_2: Mapping[PublishedModel, Mapping[str, float]] = {
    "dci_vton": {
        "fid": 13.0953,
        "kid": 0.0334,
        "lpips": 0.0824,
        "ssim": 0.8612,
        "imacs_g": 0.0785,
    },
    "stableviton": {
        "fid": 10.6755,
        "kid": 0.0064,
        "lpips": 0.0817,
        "ssim": 0.8634,
        "imacs_g": 0.3083,
        "imacs_r": 0.3388,
    },
    "custom": {
        "fid": 11.6572,
        "kid": 0.0042,
        "lpips": 0.1020,
        "ssim": 0.8396,
        "imacs_g": 0.0833,
        "imacs_r": 0.0403,
    },
    "refined_custom": {
        "fid": 11.5420,
        "kid": 0.0022,
        "lpips": 0.0964,
        "ssim": 0.8644,
        "imacs_g": 0.2215,
        "imacs_r": 0.0948,
    },
}
"""VITON-HD at 512x384; SSIM, LPIPS and IMACS of paired images, FID and KID of unpaired ones."""

UNPAIRED = ("fid", "kid")
CAUTION = (
    "The paper's numbers are of VITON-HD's 2,032 test pairs at 512x384. Its FID compares with real images at 1024x768, "
    "and its KID comes from code that turns pictures black and white; this program does neither."
)


def published_values(model: PublishedModel, *, paired: bool) -> dict[str, float]:
    """The numbers of a row that the paper reports for this kind of pairs, by metric."""
    return {n: value for n, value in TABLE_2[model].items() if (n not in UNPAIRED) == paired}


def published_row(model: PublishedModel) -> str:
    """A row in one line, with the metrics' names."""
    values = ", ".join(f"{METRICS[name].label} {value}" for name, value in TABLE_2[model].items())
    return f"The paper's Table 2, {model}: {values}"


TABLE_1: Mapping[str, Mapping[str, float]] = {
    "fasterrcnn": {"real": 0.3225, "generated": 0.2658},
    "maskrcnn": {"real": 0.3294, "generated": 0.2706},
    "maskformer": {"real": 0.3568, "generated": 0.2932},
    "daam": {"generated": 0.1807},
    "overall": {"generated": 0.1807},
    "random_authors": {"generated": 0.2028},
    "i2am_authors": {"generated": 0.2416},
}
"""Mean IoU on COCO val2017 by method, beside what here does the same; YOLOv3 and RTMDet have no counterpart."""

TABLE_3: Mapping[float, float] = {0.2: 0.2413, 0.3: 0.2413, 0.4: 0.2416, 0.5: 0.2416, 0.6: 0.24}
"""Mean IoU of the paper's method by threshold: of the authors' script, in which a percentile follows."""


def published_iou(method: str, kind: str) -> float | None:
    """What Table 1 says of a method, or of a detector whose name holds that of one.

    >>> published_iou("torchvision:maskrcnn_resnet50_fpn", "real"), published_iou("i2am", "generated")
    (0.3294, None)
    """
    if method in TABLE_1:
        return TABLE_1[method].get(kind)
    detectors = [name for name in TABLE_1 if "real" in TABLE_1[name] and name in method.lower()]
    return TABLE_1[detectors[0]][kind] if detectors else None
