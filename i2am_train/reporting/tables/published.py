"""The paper's Table 2, to stand beside a run that repeats one of its models."""

from collections.abc import Mapping

from i2am_train.metrics.registry import METRICS
from i2am_train.types import PublishedModel

TABLE_2: Mapping[PublishedModel, Mapping[str, float]] = {
    "dci_vton": {"fid": 13.0953, "kid": 0.0334, "lpips": 0.0824, "ssim": 0.8612, "imacs_g": 0.0785},
    "stableviton": {
        "fid": 10.6755,
        "kid": 0.0064,
        "lpips": 0.0817,
        "ssim": 0.8634,
        "imacs_g": 0.3083,
        "imacs_r": 0.3388,
    },
    "custom": {"fid": 11.6572, "kid": 0.0042, "lpips": 0.1020, "ssim": 0.8396, "imacs_g": 0.0833, "imacs_r": 0.0403},
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
