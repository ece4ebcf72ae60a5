"""The device that a command without a trainer computes on."""

import torch

from i2am_train.errors import ConfigError
from i2am_train.types import Device


def check_device(name: Device) -> None:
    """Fails where a command could not compute on ``device``.

    Raises:
        ConfigError: there is no CUDA device.
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
    """
    check_device(name)
    use_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")
