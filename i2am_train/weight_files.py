"""The one place where files of weights are opened: as tensors and nothing else, whoever they are for.

A pickle can run any program while it is read. ``torch.load(weights_only=True)`` reads tensors and plain containers only
and refuses the rest; what it refuses is not read here by any other way. A file that others publish is checked against
their digest before it is opened, and the one kind that cannot be read as tensors (TorchScript) against all of it.
"""

import functools
import hashlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from i2am_train.errors import CheckpointError, WeightsMissingError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
"""Endings of the files that :func:`read_weights` opens."""

_GIT_LFS_POINTER = b"version https://git-lfs"
_SHOWN = 4
"""Tensors that an error names."""
_READING = (
    SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError,
    ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
)  # fmt: skip
"""What the readers raise for damaged bytes: a pickle is a program, and a broken one fails in any of these ways."""


# -- one file -------------------------------------------------------------------------------------------------------


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, in the file's own precision, on the CPU and mapped where possible.

    Of a training checkpoint, those of its ``state_dict``; everything that is no tensor is left out.

    Raises:
        CheckpointError: the file is missing, damaged, half downloaded, holds no tensors, or is a pickle with more than
            tensors in it.

    >>> read_weights(Path("no_such.ckpt"))
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: There is no file 'no_such.ckpt'. Give the path of a weight file.
    """
    content = _read(file)
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = content if isinstance(content, dict) else {}
    tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"'{file}' holds no named tensors. Expected a state dict, or a training checkpoint with one."
        )
    return tensors


def read_adapter(file: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by group and name: the two levels of a pickle, or the names of safetensors at their first
    dot. Its numbers are checked.

    Raises:
        CheckpointError: as for `read_weights` and `check_used`.
    """
    content = _read(file)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in (content if isinstance(content, dict) else {}).items():
        parts = value.items() if isinstance(value, dict) else [(str(name).partition(".")[2], value)]
        group = str(name).partition(".")[0]
        groups.setdefault(group, {}).update({str(part): tensor for part, tensor in parts if isinstance(tensor, Tensor)})
    check_used({f"{group}.{n}": t for group, own in groups.items() for n, t in own.items()}, file)
    return groups


def _read(file: Path) -> object:
    check_file(file)
    try:
        return load_file(file) if file.suffix == ".safetensors" else _read_pickle(file)
    except _READING as error:
        raise _unreadable(file, error) from error


def integer_tensors(file: Path) -> dict[str, str]:
    """Type of each tensor of a file that does not hold floating numbers, by name; no values are read.

    Raises:
        CheckpointError: as for `read_weights`.
    """
    if file.suffix != ".safetensors":
        return _integers(read_weights(file))
    check_file(file)
    try:
        with safe_open(file, "pt") as archive:
            kinds = {name: archive.get_slice(name).get_dtype() for name in archive.keys()}  # noqa: SIM118
    except _READING as error:
        raise _unreadable(file, error) from error
    return {name: kind for name, kind in kinds.items() if kind[:1] in ("I", "U", "B") and kind != "BF16"}


def _integers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    types = {name: value.dtype for name, value in tensors.items() if not value.is_floating_point()}
    return {name: str(kind).removeprefix("torch.") for name, kind in types.items()}


def check_file(file: Path) -> None:
    """Refuses what is no file of weights by its name or its first bytes.

    Raises:
        CheckpointError: there is no such file, or it is a pointer of git-lfs, a web page or empty.

    >>> check_file(Path(__file__))
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: ...weight_files.py' is no weight file by its name; ...
    """
    if not file.is_file():
        raise CheckpointError(f"There is no file '{file}'. Give the path of a weight file.")
    if file.suffix not in SUFFIXES:
        raise CheckpointError(
            f"'{file}' is no weight file by its name; expected one that ends with {', '.join(SUFFIXES)}."
        )
    with file.open("rb") as stream:
        start = stream.read(256)
    if not start:
        raise CheckpointError(f"'{file}' (0 bytes) cannot be read: it is empty. Download it again.")
    if start.startswith(_GIT_LFS_POINTER):
        raise CheckpointError(
            f"'{file}' is a pointer of git-lfs and not the weights. Run `git lfs pull` in its folder."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"'{file}' ({file.stat().st_size:,} bytes) cannot be read: it is a web page and not the weights, as a "
            "server sends instead of a file that needs a login. Open its address in a browser, and download it again."
        )


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"'{file}' ({file.stat().st_size:,} bytes) cannot be read: {reason} It may be half downloaded, or no "
        "weights at all; compare its size and checksum with its source, and download it again."
    )


def _read_pickle(file: Path) -> object:
    try:
        # Only the zip format can be mapped instead of read.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        names = _refused_names(file, str(error))
        if not names:
            raise
        raise CheckpointError(_refusal(file, names)) from error


def _refused_names(file: Path, message: str) -> list[str]:
    """The classes and functions that the pickle asks for beside tensors; none if it is merely damaged."""
    if zipfile.is_zipfile(file):
        return sorted(get_unsafe_globals_in_checkpoint(file))
    return re.findall(r"GLOBAL (\S+)", message)[:1]


def _refusal(file: Path, names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    target = file.with_suffix(".safetensors").name
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"c = torch.load('{file.name}', map_location='cpu', weights_only=False); "
        "c = c.get('state_dict', c); "
        "save_file({k: v.clone().contiguous() for k, v in c.items() if isinstance(v, torch.Tensor)}, "
        f"'{target}')"
    )
    return (
        f"'{file}' is a pickle with more than tensors in it ({shown}). Reading such a file can run any program, so it "
        "is not read, even where the extra objects are the harmless remains of a training run. Take its tensors out "
        "where nothing can come to harm, in a container without network that has torch, safetensors and the packages "
        f'named above: docker run --rm --network none -v "{file.parent.resolve()}:/weights" -w /weights IMAGE '
        f'python -c "{code}" -- and give {target} instead.'
    )


# -- a folder -------------------------------------------------------------------------------------------------------


def read_description(file: Path) -> dict[str, Any]:
    """The JSON object in a small file that says what a folder holds.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or holds something else.

    >>> read_description(Path("no_such.json"))
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: 'no_such.json' cannot be read as JSON ([Errno 2] No such file or directory: ...
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{file}' cannot be read as JSON ({error}). The folder may be half copied; copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{file}' holds a {type(content).__name__} where an object of names and values was expected. It is "
            "damaged, or of something else; copy or download it again."
        )
    return content


def files_of_index(index: Path) -> list[Path]:
    """The files of weights that an index names, all of which lie beside it.

    Raises:
        CheckpointError: it is no index, names files elsewhere, or some of its files are missing.
    """
    names = read_description(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise CheckpointError(
            f"'{index}' is no index of weights: expected 'weight_map', an object of tensors and the files that hold "
            "them. Copy or download it again."
        )
    files = sorted(set(names.values()))
    outside = [name for name in files if Path(name).name != name or "\\" in name]
    if outside:
        raise CheckpointError(
            f"'{index}' names files outside its folder ({', '.join(outside[:_SHOWN])}), which an index of weights "
            "never does. Do not use it; download the folder from its source."
        )
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(files)} files of weights that '{index}' names are missing "
            f"({', '.join(missing[:_SHOWN])}). The folder may be half downloaded; download it again."
        )
    return [index.parent / name for name in files]


# -- values ---------------------------------------------------------------------------------------------------------


def check_numbers(tensors: Mapping[str, Tensor], source: object, *, infinite: Collection[str] = ()) -> None:
    """Refuses tensors that a model cannot compute with: every value must be a finite number.

    Whole numbers are passed over; those named in ``infinite`` may hold infinities. ``source`` is for messages.

    Raises:
        CheckpointError: one holds not-a-number or infinity; the message names it.

    >>> check_numbers({"steps": torch.arange(3), "bias": torch.tensor([0.0, torch.nan])}, "a.ckpt")
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: 1 tensors of 'a.ckpt' hold values that are not finite numbers (bias): ...
    """
    bad = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not _are_numbers(value, name in infinite)
    ]
    if bad:
        first = tensors[bad[0]]
        count = int((first.isnan() if bad[0] in infinite else ~first.isfinite()).sum())
        raise CheckpointError(
            f"{len(bad)} tensors of '{source}' hold values that are not finite numbers ({_shown(bad)}): {bad[0]} has "
            f"{count:,} of {first.numel():,}. Nothing that such a model makes can be scored. The training that wrote "
            "it went wrong, or the file is damaged or was converted to too small a type; take another checkpoint, or "
            "download it again."
        )


def _are_numbers(value: Tensor, infinite: bool) -> bool:
    """Whether all values are numbers, and finite unless ``infinite``; one fast pass, as both ends say it of all."""
    if not value.numel():
        return True
    if value.element_size() == 1:  # float8, which torch only converts
        value = value.float()
    ends = map(float, value.aminmax())
    return not any(math.isnan(end) if infinite else not math.isfinite(end) for end in ends)


def check_used(tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuses tensors that cannot be weights: whole numbers, and values that are no finite numbers.

    Raises:
        CheckpointError: there are any.

    >>> check_used({"weight": torch.ones(2, dtype=torch.int8)}, "a.ckpt")
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: 1 tensors of 'a.ckpt' hold whole numbers where weights must be floating ...
    """
    _check_types(_integers(tensors), source)
    check_numbers(tensors, source)


def check_network(network: nn.Module, source: object, part: str = "") -> None:
    """As `check_numbers`, of a network's weights and buffers; ``part`` goes before their names.

    Only buffers may be infinite: attention masks are.

    >>> check_network(nn.Linear(3, 2), "a.ckpt")
    """
    prefix = f"{part}." if part else ""
    state = {prefix + name: value for name, value in network.state_dict().items()}
    weights = {prefix + name for name, _ in network.named_parameters()}
    check_numbers(state, source, infinite=state.keys() - weights)


def check_floating(files: Iterable[Path], network: nn.Module, source: object, unused: Collection[str] = ()) -> None:
    """Refuses whole numbers where a network has weights; libraries would convert them without a word.

    The network was filled from ``files``, whose ``unused`` tensors have no place in it.

    Raises:
        CheckpointError: a tensor of a file is not floating, and is none of the network's counters or positions.
    """
    counters = {name.rpartition(".")[2] for name, value in network.named_buffers() if not value.is_floating_point()}
    bad = {
        name: kind
        for file in files
        for name, kind in integer_tensors(file).items()
        if name not in unused and name.rpartition(".")[2] not in counters
    }
    _check_types(bad, source)


def _check_types(integers: Mapping[str, str], source: object) -> None:
    """Refuses weights that are whole numbers, given by name with their types."""
    if integers:
        first = next(iter(integers))
        raise CheckpointError(
            f"{len(integers)} tensors of '{source}' hold whole numbers where weights must be floating "
            f"({_shown(list(integers))}; {first} is {integers[first]}). They are quantised, or no weights; give the "
            "model in float32 or float16."
        )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


# -- files that others publish --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file of weights that no Python package carries.

    It is looked for in the ``checkpoints`` folder of the torch hub (``torch.hub.get_dir()``, set by the environment
    variable ``TORCH_HOME``), where torchvision keeps its own, and downloaded there. However it came there, it is not
    opened before its digest is found to be the publisher's.
    """

    name: str
    url: str
    sha256: str
    """SHA-256 of the file, or as many first digits of it as the publisher states."""
    advice: str = ""
    """What else to do where it cannot be had; follows "Fetch it and put it there"."""

    @property
    def path(self) -> Path:
        """Where the file is expected.

        >>> PublishedFile("alexnet.pth", "https://example.org/alexnet.pth", "7be5be79").path.parent.name
        'checkpoints'
        """
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name

    def fetch(self) -> Path:
        """The path of the file, after downloading it if it is not there, and checking it.

        Raises:
            WeightsMissingError: it is not there and cannot be downloaded, or it is another file.
        """
        if not self.path.is_file():
            self._download()
        state = self.path.stat()
        found = _digest(self.path, state.st_size, state.st_mtime_ns)
        if not found.startswith(self.sha256):
            raise WeightsMissingError(
                f"The weights at {self.path} cannot be read: they are not those that {self.url} gives. Their SHA-256 "
                f"begins with {found[: max(16, len(self.sha256))]}, expected {self.sha256}; the file is half "
                "downloaded, or was put there by somebody else. It was not opened. Delete the file and fetch "
                f"{self.url} again."
            )
        return self.path

    def read(self) -> dict[str, Tensor]:
        """The tensors of the file.

        Raises:
            WeightsMissingError: as for `fetch`, or it cannot be read as tensors.
        """
        path = self.fetch()
        try:
            return read_weights(path)
        except CheckpointError as error:
            raise WeightsMissingError(
                f"The weights at {path} cannot be read: {error} Delete the file and fetch {self.url} again."
            ) from error

    def _download(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(self.path), hash_prefix=self.sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise WeightsMissingError(
                f"The weights {self.name} are not at {self.path} and cannot be downloaded ({error}). Fetch {self.url} "
                f"on a machine with network access and put the file at that path{self.advice}."
            ) from error


@functools.lru_cache
def _digest(path: Path, _size: int, _changed: int) -> str:
    """SHA-256 of a file; computed again when the file has changed."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
