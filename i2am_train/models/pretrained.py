"""Networks from folders of diffusers and transformers and from the hub; no weight is quietly drawn anew.

What a folder says of itself is checked before the libraries read it, and what they made of it afterwards: every weight
was there, was floating, and is a finite number.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModel, PreTrainedModel, SiglipVisionModel

from i2am_train.config.locations import expanded, require_model
from i2am_train.errors import CheckpointError, I2AMError
from i2am_train.weight_files import (
    PICKLES,
    SUFFIXES,
    check_file,
    check_floating,
    check_network,
    files_of_index,
    integer_tensors,
    read_description,
)

T = TypeVar("T")

_VISION_MODELS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
"""Encoders whose folders hold a text model, too."""

INDEX_FILE = "model_index.json"
"""What the folder of a pipeline is known by."""
_REASON = 300
"""Characters of a library's own message that are repeated."""
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""Names that diffusers (the first) and transformers give to files of weights."""
_DESCRIPTIONS = ("config.json", "scheduler_config.json", "preprocessor_config.json", INDEX_FILE)
"""What a folder may say of itself."""


class _Place(NamedTuple):
    """Where a model is read from."""

    name: str
    """File or folder, or OWNER/NAME on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    @property
    def options(self) -> dict[str, str]:
        """What ``from_pretrained`` must be told besides the name."""
        return {} if self.revision is None else {"revision": self.revision}

    @property
    def folder(self) -> Path | None:
        """The folder, or None for the hub."""
        path = Path(self.name)
        return path if path.exists() else None

    def file(self, name: str) -> Path | None:
        """A file of it that is on this machine."""
        if self.folder is not None:
            path = self.folder / name
            return path if path.exists() else None
        cached = try_to_load_from_cache(self.name, name, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None


def _place_of(source: str) -> _Place:
    """The file or folder that a source names, or the model on the hub: OWNER/NAME, or OWNER/NAME@REVISION."""
    path = expanded(source)
    if path.exists():
        return _Place(str(path))
    name, _, revision = source.partition("@")
    require_model(name, revision or None)
    return _Place(name, revision or None)


def as_file(source: str) -> Path | None:
    """The single file that a source names, or None for a folder or a name on the hub.

    >>> as_file("facebook/dinov2-base"), as_file("v1-5-pruned.ckpt").name
    (None, 'v1-5-pruned.ckpt')
    """
    path = expanded(source)
    return path if path.is_file() or path.suffix in SUFFIXES else None


# -- networks -------------------------------------------------------------------------------------------------------


def load_encoder(source: str) -> PreTrainedModel:
    """An image encoder of transformers, of a folder with a text model the vision half, in float32.

    Raises:
        CheckpointError: it cannot be read, or gives no patch tokens.
    """
    place = _place_of(source)
    config = load_config(source)
    loader = _VISION_MODELS.get(config.model_type, AutoModel)
    encoder = _load_network(loader, place, source)
    if not isinstance(getattr(encoder.config, "patch_size", None), int):
        raise CheckpointError(
            f"The encoder '{source}' ({type(encoder).__name__}) has no patches. Expected a vision transformer, such as "
            "facebook/dinov2-giant or openai/clip-vit-large-patch14."
        )
    return encoder.eval()


def load_network(kind: Any, source: str, part: str, check: Callable[[Any, str], None] | None = None) -> Any:
    """A network of diffusers in float32, from its own folder or a pipeline's, or such a name on the hub.

    ``part`` is the option that the source was given as, and the subfolder of a pipeline. ``check`` refuses a network
    (on the meta device) by its configuration, before weights are read.

    Raises:
        CheckpointError: it cannot be read, is of another class, or lacks weights.
    """
    place = _place_of(source)
    subfolder = _subfolder(place, source, part)
    where = {"subfolder": subfolder} if subfolder else {}
    _check_descriptions(place, subfolder)
    config = reading(source, lambda: kind.load_config(place.name, **where, **place.options))
    if (found := config.get("_class_name", kind.__name__)) != kind.__name__:
        raise CheckpointError(
            f"'{source}' holds a {found} where {part}= needs a {kind.__name__}. Give Stable Diffusion 1.5's."
        )
    if check is not None:
        with torch.device("meta"):
            empty = reading(source, lambda: kind.from_config(config))
        check(empty, source)
    return _load_network(kind, place, source, subfolder).eval()


def load_part(kind: Any, source: str, part: str, **options: Any) -> Any:
    """A part of a pipeline that is no network of diffusers: image encoder, scheduler, feature extractor.

    ``part`` is its subfolder; ``options`` are more arguments of ``from_pretrained``.

    Raises:
        CheckpointError: it cannot be read, or lacks weights.
    """
    place = _place_of(source)
    _check_descriptions(place, part)
    if issubclass(kind, PreTrainedModel):
        return _load_network(kind, place, source, part, **options).eval()
    options |= place.options
    return reading(source, lambda: kind.from_pretrained(place.name, subfolder=part, **options))


def load_with_processor(option: str, name: str, kind: Any, device: str) -> tuple[Any, Any]:
    """A model of transformers, in the numbers of its file, and its image processor, from a folder or from the hub.

    ``option`` named it, for messages; ``device`` is cpu, cuda or auto.

    Raises:
        CheckpointError: there is no such model, or it is of another kind.
    """
    try:
        processor = _from_transformers(AutoImageProcessor, name)
        model = _load_network(kind, _place_of(name), name, dtype=None)
    except CheckpointError as error:
        what = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"No model for {option} could be loaded from {option}={name} ({what}). Give a folder with config.json, "
            "preprocessor_config.json and the weights, or a name on the hub that this machine can reach."
        ) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), processor


def load_config(source: str) -> Any:
    """The configuration of a model of transformers, from its folder or the hub.

    Raises:
        CheckpointError: it cannot be read, or needs code of its own.
    """
    return _from_transformers(AutoConfig, source)


def _from_transformers(kind: Any, source: str) -> Any:
    place = _place_of(source)
    _check_descriptions(place, "")
    options = {"trust_remote_code": False, **place.options}
    return reading(source, lambda: kind.from_pretrained(place.name, **options))


def load_pipeline(kind: Any, source: str, **parts: Any) -> Any:
    """A pipeline of diffusers in float32, of a folder or the hub.

    ``parts`` are those that are loaded already (each by a function that refuses missing weights), and more arguments of
    ``from_pretrained``.

    Raises:
        CheckpointError: it cannot be read, or a network of it is not whole.
    """
    place = _place_of(source)
    _check_descriptions(place, "")
    parts |= place.options
    pipeline = reading(source, lambda: kind.from_pretrained(place.name, dtype=torch.float32, **parts))
    for part, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module) and part not in parts:
            check_network(network, source, part)
    return pipeline


def _load_network(
    kind: Any,
    place: _Place,
    source: str,
    subfolder: str = "",
    *,
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> Any:
    """A network of either library, of which every weight was there and is a number."""
    before = _weight_files(place, subfolder)
    if place.folder is not None:
        _check_files(place.folder / subfolder, before)
    options |= place.options | ({"subfolder": subfolder} if subfolder else {})
    of_diffusers = issubclass(kind, ModelMixin)
    if dtype is not None:
        options["torch_dtype" if of_diffusers else "dtype"] = dtype
    if not of_diffusers:
        options["trust_remote_code"] = False
        options["ignore_mismatched_sizes"] = True  # they are named afterwards, and refused
    network, info = reading(source, lambda: kind.from_pretrained(place.name, output_loading_info=True, **options))
    shown = f"{source}/{subfolder}" if subfolder else source
    _check_loaded(info, shown)
    files = before or _weight_files(place, subfolder)
    check_floating(files, network, shown, unused=info.get("unexpected_keys", ()))
    check_network(network, shown)
    if of_diffusers and place.folder is not None:
        network.register_to_config(_name_or_path="")  # a saved copy would name this machine's folder
    return network


# -- files ----------------------------------------------------------------------------------------------------------


def _subfolder(place: _Place, source: str, part: str) -> str:
    """``part`` for a pipeline, empty for the network's own folder."""
    folder = place.folder
    if folder is not None:
        if (folder / part / "config.json").is_file():
            return part
        if (folder / "config.json").is_file():
            return ""
        found = "a file"
        if folder.is_dir():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"'{source}' is no folder of diffusers: it has neither config.json nor {part}/config.json (found: "
            f"{found}). Give the folder of a pipeline, or its {part}/."
        )
    return str(reading(source, lambda: _hub_subfolder(place, part)))


def _hub_subfolder(place: _Place, part: str) -> str:
    """``part`` for a pipeline on the hub, empty for a network's own repository."""
    try:
        hf_hub_download(place.name, f"{part}/config.json", revision=place.revision)
    except LocalEntryNotFoundError:  # no network: only what was fetched before
        if place.file("config.json") is None:
            raise
        return ""
    except EntryNotFoundError:
        return ""
    return part


def _check_descriptions(place: _Place, subfolder: str) -> None:
    """Refuses what is no JSON object before a library makes something of it: of a text, a name on the hub."""
    for name in _DESCRIPTIONS:
        file = place.file(f"{subfolder}/{name}" if subfolder else name)
        if file is not None:
            read_description(file)


def _weight_files(place: _Place, subfolder: str) -> list[Path]:
    """The files of weights that the libraries take of a folder, in their order; none that is not on this machine."""
    prefix = f"{subfolder}/" if subfolder else ""
    for ending in (".safetensors", ".bin"):
        for stem in _STEMS:
            if file := place.file(f"{prefix}{stem}{ending}"):
                return [file]
            if index := place.file(f"{prefix}{stem}{ending}.index.json"):
                return files_of_index(index)
    return []


def _check_files(folder: Path, files: list[Path]) -> None:
    """Refuses damaged files of weights with a reason that the libraries do not give."""
    if folder.is_dir() and not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"'{folder}' holds no weights: expected {_STEMS[0]}.safetensors of diffusers or {_STEMS[1]}.safetensors of "
            f"transformers (found: {found}). The folder may be half downloaded; download it again."
        )
    for file in files:
        check_file(file)
        if file.suffix in PICKLES:  # read here first, so that what it asks for is named
            integer_tensors(file)


def reading(source: str, read: Callable[[], Any]) -> Any:
    """What ``read`` gives; the libraries' many errors as one that says what to do.

    >>> reading("models/mine", lambda: {}["weight_map"])
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: There is no folder 'models/mine' here, and the hub did not give it: KeyError: ...
    """
    try:
        with warnings.catch_warnings():  # diffusers' own use of the hub's library
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            return read()
    except I2AMError:
        raise
    except Exception as error:  # damaged files fail in the words of whichever library reads them
        reason = " ".join(str(error).split())[:_REASON] or type(error).__name__
        if not isinstance(error, (OSError, ValueError, RuntimeError)):  # whose texts need no name
            reason = f"{type(error).__name__}: {reason}"
        if expanded(source).exists():
            raise CheckpointError(
                f"'{source}' cannot be read: {reason} The folder may be half downloaded, of another model, or its "
                "weights a pickle with more than tensors in it; download it again, in safetensors where there is a "
                "choice."
            ) from error
        name, _, revision = source.partition("@")
        at = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"There is no folder '{source}' here, and the hub did not give it: {reason} Check the name and the "
            f"network, or fetch it elsewhere with `hf download {name}{at} --local-dir FOLDER` and give the folder."
        ) from error


def _check_loaded(info: dict[str, Any], source: str) -> None:
    """Refuses weights that the libraries would have drawn at random with a mere warning."""
    missing = sorted(info["missing_keys"])
    if missing:
        extra = sorted(info["unexpected_keys"])
        has = f" and has {len(extra)} others ({', '.join(extra[:4])})" if extra else ""
        raise CheckpointError(
            f"The weights of '{source}' lack {len(missing)} tensors ({', '.join(missing[:4])}){has}. The folder may be "
            "half downloaded, or its config.json of another model; download it again."
        )
    if misshapen := sorted(info["mismatched_keys"]):
        name, found, expected = misshapen[0]
        raise CheckpointError(
            f"{len(misshapen)} tensors of '{source}' have other shapes than its config.json says: {name} is "
            f"{list(found)}, expected {list(expected)}. One of the two is of another model; download the folder again."
        )


def check_pipeline(source: str, expected: Sequence[str], model: str) -> None:
    """Refuses the folder of another pipeline than the ``expected`` classes; a name on the hub is left to its download.

    Raises:
        CheckpointError: the folder is no pipeline's, or of another one, or its index cannot be read.

    >>> check_pipeline("Fantasy-Studio/Paint-by-Example", ["PaintByExamplePipeline"], "paint_by_example")
    """
    folder = expanded(source)
    if not folder.is_dir():
        return
    index = folder / INDEX_FILE
    found = read_description(index).get("_class_name") if index.is_file() else None
    if found in expected:
        return
    what = f"is of a {found}" if found else f"has no {INDEX_FILE}"
    raise CheckpointError(
        f"'{source}' {what}; model={model} needs the folder of a {' or '.join(expected)}. Give "
        f"checkpoint=FOLDER with such a {INDEX_FILE}, or another model=."
    )


def fitting(option: str, file: Path, fill: Callable[[], T]) -> T:
    """What ``fill`` makes of the weights of a file; the libraries' errors name the option and the file.

    Raises:
        CheckpointError: its tensors are not what the model has.

    >>> fitting("adapter", Path("a.bin"), lambda: {}["to_q"])
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: adapter=a.bin does not fit this model (KeyError: 'to_q'). Give the weights ...
    """
    try:
        return fill()
    except CheckpointError:
        raise
    except Exception as error:  # weights of something else fail in the words of whoever uses them
        reason = " ".join(str(error).split())[:_REASON]
        raise CheckpointError(
            f"{option}={file} does not fit this model ({type(error).__name__}: {reason}). Give the weights that were "
            "made for it."
        ) from error
