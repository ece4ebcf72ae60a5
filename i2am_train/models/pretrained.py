"""Networks from folders of diffusers and transformers and from the hub; no weight is quietly drawn anew."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, CLIPVisionModel, PreTrainedModel, SiglipVisionModel

from i2am_train.config.hub import require_model
from i2am_train.errors import CheckpointError
from i2am_train.models.weight_files import SUFFIXES

VISION_MODELS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
"""Encoders whose folders hold a text model, too."""

_READING = (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError)


def load_encoder(source: str) -> PreTrainedModel:
    """An image encoder of transformers, of a folder with a text model the vision half, in float32.

    Raises:
        CheckpointError: it cannot be read, or gives no patch tokens.
    """
    name = place_of(source)
    config = _hub(source, lambda: AutoConfig.from_pretrained(name))
    loader = VISION_MODELS.get(config.model_type, AutoModel)
    encoder, info = _hub(
        source,
        lambda: loader.from_pretrained(name, dtype=torch.float32, output_loading_info=True),
    )
    _check_loaded(info, source)
    if not isinstance(getattr(encoder.config, "patch_size", None), int):
        raise CheckpointError(
            f"The encoder '{source}' ({type(encoder).__name__}) has no patches. Expected a vision transformer, such as "
            "facebook/dinov2-giant or openai/clip-vit-large-patch14."
        )
    return encoder.eval()


def as_file(source: str) -> Path | None:
    """The single file that a source names, or None for a folder or a name on the hub."""
    path = Path(source).expanduser()
    return path if path.is_file() or path.suffix in SUFFIXES else None


def load_network(kind: Any, source: str, part: str, check: Callable[[Any, str], None]) -> Any:
    """A network of diffusers in float32, from its own folder or a pipeline's, or such a name on the hub.

    Args:
        kind: class of the network.
        source: folder or name.
        part: option that the source was given as, and subfolder of a pipeline.
        check: refuses a network (on the meta device) by its configuration, before weights are read.

    Raises:
        CheckpointError: it cannot be read, is of another class, or lacks weights.
    """
    name = place_of(source)
    subfolder = _subfolder(source, part)
    where = {"subfolder": subfolder} if subfolder else {}
    config = _hub(source, lambda: kind.load_config(name, **where))
    if (found := config.get("_class_name", kind.__name__)) != kind.__name__:
        raise CheckpointError(
            f"'{source}' holds a {found} where {part}= needs a {kind.__name__}. Give Stable Diffusion 1.5's."
        )
    with torch.device("meta"):
        check(kind.from_config(config), source)
    network, info = _hub(
        source,
        lambda: kind.from_pretrained(
            name, **where, torch_dtype=torch.float32, output_loading_info=True
        ),
    )
    _check_loaded(info, source)
    return network.eval()


def load_part(kind: Any, source: str, part: str, **options: Any) -> Any:
    """A part of a pipeline that is no network of diffusers: image encoder, scheduler, feature extractor.

    Args:
        kind: class of the part.
        source: folder of the pipeline, or its name on the hub.
        part: subfolder.
        options: more arguments of ``from_pretrained``.

    Raises:
        CheckpointError: it cannot be read, or lacks weights.
    """
    name = place_of(source)
    if not issubclass(kind, PreTrainedModel):
        return _hub(source, lambda: kind.from_pretrained(name, subfolder=part, **options))
    options |= {"dtype": torch.float32, "output_loading_info": True}
    network, info = _hub(source, lambda: kind.from_pretrained(name, subfolder=part, **options))
    _check_loaded(info, source)
    return network.eval()


def load_pipeline(kind: Any, source: str, **parts: Any) -> Any:
    """A pipeline of diffusers in float32, of a folder or the hub.

    Args:
        kind: class of the pipeline.
        source: folder, or name on the hub.
        parts: those that are loaded already (each by a function that refuses missing weights), and
            more arguments of ``from_pretrained``.

    Raises:
        CheckpointError: it cannot be read.
    """
    name = place_of(source)
    return _hub(source, lambda: kind.from_pretrained(name, dtype=torch.float32, **parts))


def place_of(source: str) -> str:
    """The file or folder that a source names, or the name on the hub as it stands.

    Raises:
        CheckpointError: it is no path here, and no model that the hub would give.
    """
    path = Path(source).expanduser()
    if path.exists():
        return str(path)
    require_model(source)
    return source


def _subfolder(source: str, part: str) -> str:
    """``part`` for a pipeline, empty for the network's own folder."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (folder / part / "config.json").is_file():
            return part
        if (folder / "config.json").is_file():
            return ""
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"'{source}' is no folder of diffusers: it has neither config.json nor {part}/config.json (found: "
            f"{found}). Give the folder of a pipeline, or its {part}/."
        )
    return str(_hub(source, lambda: _hub_subfolder(source, part)))


def _hub_subfolder(name: str, part: str) -> str:
    """``part`` for a pipeline on the hub, empty for a network's own repository."""
    try:
        hf_hub_download(name, f"{part}/config.json")
    except LocalEntryNotFoundError:  # no network: only what was fetched before
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise
        return ""
    except EntryNotFoundError:
        return ""
    return part


def _hub(source: str, read: Callable[[], Any]) -> Any:
    """What ``read`` gives; the libraries' many errors as one that says what to do."""
    try:
        with warnings.catch_warnings():  # diffusers' own use of the hub's library
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            return read()
    except _READING as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if Path(source).expanduser().exists():
            raise CheckpointError(
                f"'{source}' cannot be read: {reason} The folder may be half downloaded, or its weights a pickle with "
                "more than tensors in it; download it again, in safetensors where there is a choice."
            ) from error
        raise CheckpointError(
            f"There is no folder '{source}' here, and the hub did not give it: {reason} Check the name and the "
            f"network, or fetch it elsewhere with `hf download {source} --local-dir FOLDER` and give the folder."
        ) from error


def _check_loaded(info: dict[str, Any], source: str) -> None:
    """Refuses weights that the libraries would have drawn at random with a mere warning."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"The weights of '{source}' lack {len(missing)} tensors ({', '.join(missing[:4])}). The folder may be half "
            "downloaded, or its config.json of another model; download it again."
        )
