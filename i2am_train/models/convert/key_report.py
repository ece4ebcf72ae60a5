"""What becomes of every tensor when weights of another layout are taken over: nothing is lost or made up in silence."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from i2am_train.errors import CheckpointError
from i2am_train.weight_files import check_used

SHOWN = 5
"""Names of each kind in an error; the report has all of them."""


class KeyMismatchError(CheckpointError):
    """Weights are missing or have other shapes; ``report`` has all of them."""

    def __init__(self, message: str, report: "KeyReport") -> None:
        super().__init__(message)
        self.report = report


class Renamed(NamedTuple):
    """Tensors of a file under the names of a network of ours."""

    tensors: dict[str, Tensor]
    sources: dict[str, str]
    """Key in the file of each of our names; one key may serve several names (a fused projection)."""


def renamed(
    weights: Mapping[str, Tensor],
    prefixes: tuple[str, ...],
    split: Callable[[str, Tensor], Mapping[str, Tensor]],
    name: Callable[[str], str | None],
) -> Renamed:
    """The tensors whose keys start with ``prefixes``, each split into those of single layers, under
    the names that ``name`` gives; what has no such name keeps its own."""
    found = Renamed({}, {})
    for key, tensor in weights.items():
        if not key.startswith(prefixes):
            continue
        for single, part in split(key, tensor).items():
            ours = name(single) or key
            found.tensors[ours] = part
            found.sources[ours] = key
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReport:
    """Every key of a file, and every weight of the networks that were filled from it.

    Names of weights start with the network's (``unet.conv_in.weight``).
    """

    file: str
    mapped: dict[str, list[str]]
    """Key of the file to the weights that it filled."""
    missing: list[str]
    """Weights that the file has nothing for."""
    wrong_shape: dict[str, str]
    """Key of the file to what was found and what was expected."""
    unexpected: list[str]
    """Keys of the networks in question that have no place in them."""
    left_out: list[str]
    """Keys of other networks in the same file."""

    @property
    def complete(self) -> bool:
        """True if every weight was filled."""
        return not self.missing and not self.wrong_shape

    def as_json(self) -> dict[str, Any]:
        """All lists by name."""
        return asdict(self)

    def summary(self) -> str:
        """One line: how many keys of each kind."""
        counts = (
            f"{len(getattr(self, name))} {name.replace('_', ' ')}"
            for name in ("mapped", "missing", "wrong_shape", "unexpected", "left_out")
        )
        return f"{self.file}: {', '.join(counts)}"

    def check(self) -> None:
        """Refuses weights that would leave a part of a network as it was drawn.

        Raises:
            KeyMismatchError: a weight is missing or has another shape.
        """
        if self.complete:
            return
        found = [f"{key} is {text}" for key, text in self.wrong_shape.items()]
        found += [f"nothing for {name}" for name in self.missing]
        shown = "; ".join(found[:SHOWN]) + ("; ..." if len(found) > SHOWN else "")
        raise KeyMismatchError(
            f"The weights in {self.summary()}. {shown}. Expected every weight of Stable Diffusion 1.5's topology; the "
            "file is of another model, or incomplete.",
            self,
        )


def key_report(
    file: str, keys: Iterable[str], parts: Mapping[str, tuple[nn.Module, Renamed]], *, ours: tuple[str, ...]
) -> KeyReport:
    """Compares what a file offers with what the networks in ``parts`` need.

    Args:
        file: name of the file, for messages.
        keys: all keys of the file.
        parts: by name, each network (its weights may be on the meta device) and the tensors for it.
        ours: how the keys of these networks start; all others belong to networks that were not asked for.
    """
    mapped: dict[str, list[str]] = {}
    missing: list[str] = []
    wrong_shape: dict[str, str] = {}
    unexpected: list[str] = []
    for part, (network, renamed) in parts.items():
        wanted = network.state_dict()
        missing += [f"{part}.{name}" for name in wanted if name not in renamed.tensors]
        for name, tensor in renamed.tensors.items():
            source = renamed.sources[name]
            if name not in wanted:
                unexpected.append(source)
            elif tensor.shape != wanted[name].shape:
                wrong_shape[source] = f"{_shape(tensor)} where {part}.{name} is {_shape(wanted[name])}"
            else:
                mapped.setdefault(source, []).append(f"{part}.{name}")
    rest = [key for key in keys if key not in mapped.keys() | wrong_shape.keys()]
    left_out = [key for key in rest if not key.startswith(ours)]
    return KeyReport(
        file=file,
        mapped=mapped,
        missing=missing,
        wrong_shape=wrong_shape,
        unexpected=sorted({*unexpected, *rest} - {*left_out}),
        left_out=left_out,
    )


def lacking(error: Exception) -> str:
    """Of a table of tensors that was looked through in vain: what is not there, or not as it should be."""
    return f"no {error}" if isinstance(error, KeyError) else f"tensors of other shapes ({error})"


def load_renamed(network: nn.Module, renamed: Renamed, file: str) -> None:
    """Gives a network on the meta device its weights, as float32 copies.

    Raises:
        CheckpointError: a tensor of the file holds whole numbers, or values that are no finite numbers.
    """
    used = {renamed.sources[name]: renamed.tensors[name] for name in network.state_dict()}
    check_used(used, file)
    weights = {name: renamed.tensors[name].to(torch.float32, copy=True).contiguous() for name in network.state_dict()}
    network.load_state_dict(weights, assign=True)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
