"""Number formats, value ranges and devices: float32 at least for losses and scores, pictures in [-1, 1] or bytes.

The functions that follow the rule of float32 use sums and elementwise products only: autocast would quietly run a
matrix product of float32 tensors in bfloat16.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from i2am_train.errors import ConfigError
from i2am_train.types import Device, Precision, SamplingPrecision


def at_least_float32(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Float16 and bfloat16 become float32; float32 and float64 stay as they are.

    >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32
    >>> at_least_float32(torch.zeros(2, dtype=torch.float64)).dtype
    torch.float64
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def to_unit(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """From the model's range [-1, 1] to [0, 1], clamped, in float32 or float64.

    >>> to_unit(torch.tensor([-1.0, 0.0, 1.5])).tolist()
    [0.0, 0.5, 1.0]
    """
    return ((at_least_float32(images) + 1) / 2).clamp(0, 1)


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """From the model's range [-1, 1] to bytes, clamped and rounded.

    The inverse of ``bytes / 127.5 - 1``, exactly.

    >>> to_uint8(torch.tensor([-1.2, -1.0, 0.0, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    return (to_unit(images) * 255).round().to(torch.uint8)


def rows_at_fault(values: Float[Tensor, " batch *shape"]) -> Bool[Tensor, " batch"]:
    """True for the samples of a batch with a value that is NaN or infinite; on the values' device, nothing is read.

    >>> import torch
    >>> rows_at_fault(torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, -torch.inf]])).tolist()
    [False, True, True]
    """
    ends = values.flatten(start_dim=1) if values.ndim > 1 else values[:, None]
    return ~ends.isfinite().all(dim=1)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the host goes on while a GPU copies what was on the CPU.

    >>> to_device(torch.ones(2), torch.device("cpu"))
    tensor([1., 1.])
    """
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    # Only from pinned memory is a copy the GPU's own work; torch keeps that memory until it is done.
    return values.pin_memory().to(device, non_blocking=True)


def check_device(name: Device) -> None:
    """Raises `ConfigError` where a command could not compute on ``device``.

    >>> check_device("cpu")
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda was asked for, and torch finds no CUDA device on this machine. Set device=cpu, or device=auto "
            "to take what there is."
        )


def chosen_device(name: Device) -> torch.device:
    """The device that a command without a trainer computes on.

    Raises:
        ConfigError: there is no CUDA device.

    >>> chosen_device("cpu")
    device(type='cpu')
    """
    check_device(name)
    use_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def check_bfloat16(device: torch.device, options: str) -> None:
    """Raises `ConfigError` where a card lacks the bfloat16 that ``options`` ask for.

    >>> check_bfloat16(torch.device("cpu"), "sampling.precision=bf16-mixed")
    """
    if device.type == "cuda" and not has_bfloat16():
        raise ConfigError(
            f"{options} is not possible: {torch.cuda.get_device_name()} has no bfloat16. Set the precision to 32-true, "
            "or to 16-mixed."
        )


def has_bfloat16() -> bool:
    """Whether the card computes in bfloat16 by itself."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def chosen_precision(asked: SamplingPrecision, device: torch.device) -> Precision:
    """What the denoiser computes in where images are made on a device.

    Raises:
        ConfigError: bfloat16 is asked for, and the card has none.

    >>> chosen_precision("auto", torch.device("cpu"))
    '32-true'
    """
    if asked == "auto":
        return "bf16-mixed" if device.type == "cuda" and has_bfloat16() else "32-true"
    if asked == "bf16-mixed":
        check_bfloat16(device, "sampling.precision=bf16-mixed")
    return asked
