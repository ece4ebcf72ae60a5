"""Watches what a sampling run computes, and says where it stopped being numbers.

In half precision a network can overflow in one step; all that follows is NaN, which a picture shows as black and a
score as nothing at all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from i2am_train.errors import NotFiniteError
from i2am_train.ops.numerics import rows_at_fault

_SHOWN = 4
"""Samples that an error names."""


class Watch:
    """Sees tensors in the order in which they are computed; samples without ``names`` are numbered.

    Nothing is read from the device before :meth:`check`, so that watching does not slow it down.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self._names = names
        self._seen: list[tuple[str, Bool[Tensor, " batch"], torch.dtype]] = []

    def see(self, values: Float[Tensor, " batch *shape"], what: str) -> None:
        """Notes which samples of a batch are not finite in ``what``.

        >>> watch = Watch()
        >>> watch.see(torch.ones(3, 4), "The latents")
        >>> watch.check()  # says nothing of numbers
        """
        self._seen.append((what, rows_at_fault(values), _computing_dtype(values)))

    def see_step(self, steps: int, index: int, timestep: Any, latents: Tensor) -> None:
        """Notes which samples are not finite after one of a sampler's steps.

        >>> watch = Watch()
        >>> watch.see_step(steps=20, index=6, timestep=650, latents=torch.full((1, 4, 2, 2), torch.inf))
        >>> watch.check()
        Traceback (most recent call last):
            ...
        i2am_train.errors.NotFiniteError: Step 7 of 20 of sampling (timestep 650): the latents became ...
        """
        what = f"Step {index + 1} of {steps} of sampling (timestep {int(timestep)}): the latents"
        self.see(latents, what)

    def images(self, images: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.uint8]:
        """Images ``[batch, height, width, 3]`` in [0, 1] as bytes, rounded as diffusers does.

        Raises:
            NotFiniteError: they, or what was seen before, are no numbers.

        >>> Watch().images(np.full((1, 1, 1, 3), 0.5, np.float32), torch.float32).tolist()
        [[[[128, 128, 128]]]]
        """
        self.check()
        if not np.isfinite(images).all():
            raise NotFiniteError(f"The images that the VAE decodes are no numbers. {advice(dtype)}")
        return (images * 255).round().astype(np.uint8)

    def check(self) -> None:
        """Reads what was noted.

        Raises:
            NotFiniteError: something was no finite number; the message names the first, and the samples.

        >>> watch = Watch(["shirt", "dress"])
        >>> watch.see(torch.tensor([[1.0], [torch.nan]]), "The latents")
        >>> watch.check()
        Traceback (most recent call last):
            ...
        i2am_train.errors.NotFiniteError: The latents became NaN or infinite for dress, so nothing that follows ...
        """
        if not self._seen:
            return
        faults = torch.stack([rows for _, rows, _ in self._seen]).cpu()
        at_fault = faults.any(dim=1)
        if not at_fault.any():
            return
        first = int(at_fault.int().argmax())
        rows = faults[first].nonzero().flatten().tolist()
        what, _, dtype = self._seen[first]
        raise NotFiniteError(
            f"{what} became NaN or infinite for {self._of(rows)}, so nothing that follows can be drawn or scored. "
            f"{advice(dtype)}"
        )

    def _of(self, rows: list[int]) -> str:
        names = [f"sample {row + 1} of the batch" if self._names is None else self._names[row] for row in rows]
        return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _computing_dtype(values: Tensor) -> torch.dtype:
    """What networks compute in where these values came from: autocast's type, else the values' own."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


def advice(dtype: torch.dtype) -> str:
    """What to do about numbers that overflowed in a type.

    >>> advice(torch.bfloat16).partition(",")[0]
    'The networks compute in bfloat16'
    """
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float16:
        return (
            f"The networks compute in {name}, which no sound model overflows: look at these samples, or take another "
            "checkpoint."
        )
    return (
        f"The networks compute in {name}, whose largest number is 65,504. Compute in float32, or in bfloat16 where the "
        "machine has it: sampling.precision=32-true where images are made, optimization.precision=32-true of "
        "'i2am train', dtype=float32 elsewhere."
    )
