"""Reads the tensors of one file: safetensors, or a pickle that torch opens without running code.

A pickle can run any program while it is read. ``torch.load(weights_only=True)`` reads tensors and plain containers only
and refuses the rest; what it refuses is not read here by any other way.
"""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from i2am_train.errors import CheckpointError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
"""Endings of the files that :func:`read_weights` opens."""

GIT_LFS_POINTER = b"version https://git-lfs"


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, in the file's own precision, on the CPU and mapped where possible.

    Of a training checkpoint, those of its ``state_dict``; everything that is no tensor is left out.

    Raises:
        CheckpointError: the file is missing, damaged, half downloaded, holds no tensors, or is a pickle with more than
            tensors in it.
    """
    _check_file(file)
    try:
        content = load_file(file) if file.suffix == ".safetensors" else _read_pickle(file)
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"'{file}' ({file.stat().st_size:,} bytes) cannot be read: {reason} It may be half downloaded, or no "
            "weights at all; compare its size and checksum with its source, and download it again."
        ) from error
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = content if isinstance(content, dict) else {}
    tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"'{file}' holds no named tensors. Expected a state dict, or a training checkpoint with one."
        )
    return tensors


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"There is no file '{file}'. Give the path of a weight file.")
    if file.suffix not in SUFFIXES:
        raise CheckpointError(
            f"'{file}' is no weight file by its name; expected one that ends with {', '.join(SUFFIXES)}."
        )
    with file.open("rb") as stream:
        start = stream.read(len(GIT_LFS_POINTER))
    if start == GIT_LFS_POINTER:
        raise CheckpointError(
            f"'{file}' is a pointer of git-lfs and not the weights. Run `git lfs pull` in its folder."
        )


def _read_pickle(file: Path) -> object:
    try:
        # Only the zip format can be mapped instead of read.
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
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
