"""What ``i2am explain`` keeps of one sample, and the way back: all that figures need, no model.

In the run folder (beside ``settings.json`` and ``manifest.json``), or in a folder for each sample in
it where a run explains several::

    scores.json                 names, layer, patches, origin, options, scores
    maps.safetensors            the capture (attention/archive.py)
    images/*.png                garment, agnostic, densepose, person, generated, clean-<step>
    masks/*.png                 garment, inpaint, warped_garment; white inside
    correspondence.safetensors  true place of each person pixel on the garment, where known
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from i2am_train.attention.archive import load_maps, save_maps
from i2am_train.attention.maps import AttributionMaps
from i2am_train.errors import RunFolderError
from i2am_train.files import written
from i2am_train.json_files import entries_of, read_object, write_json
from i2am_train.metrics.correspondence import target_on_grid
from i2am_train.reporting.figures.canvas import Picture
from i2am_train.reporting.figures.explained import GridCell, Mask, array
from i2am_train.runs import MANIFEST_FILE, checkpoint_label
from i2am_train.types import Direction, GridSize, LayerWeighting

SCHEMA = 2
"""Version of the folder; 1 had only maps and scores."""

SCORES = "scores.json"
IMAGES = ("garment", "agnostic", "densepose", "person", "generated")
MASKS = ("garment", "inpaint", "warped_garment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a sample was made by and from; samples are compared if they differ in one of these."""

    checkpoint: str
    """Folder of the model."""
    data: str | None
    """Fingerprint of the dataset."""
    guidance: float
    steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class CleanImage:
    """The clean image that the model predicted at one sampling step."""

    step_index: int
    timestep: int
    picture: Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedSample:
    """One sample, the image made of it, and the attention that made it.

    Pictures are uint8 ``[height, width, 3]``, masks ``[height, width]``, all of one size.
    """

    name: str
    garment_name: str
    paired: bool
    """Whether the person wears this garment in the ``person`` picture."""
    layer: str
    """The layer that patches are counted on."""
    images: Mapping[str, Picture]
    masks: Mapping[str, Mask]
    correspondence: NDArray[np.float32] | None
    """``[height, width, 2]``: yx on the garment in units of its height and width, NaN where unknown."""
    clean: tuple[CleanImage, ...]
    """One per time group, noisiest first."""
    maps: AttributionMaps
    scores: Mapping[str, float | None]
    generated_patches: tuple[GridCell, ...]
    """Cells of the layer's generated grid that specific-reference maps are drawn of."""
    reference_patches: tuple[GridCell, ...]
    """Cells of the reference grid that reverse specific-reference maps are drawn of."""
    model: str
    """How figures call the checkpoint."""
    origin: Origin
    delta: float
    weighting: LayerWeighting
    time_groups: int

    @property
    def size(self) -> GridSize:
        """Size of the pictures."""
        return GridSize(*self.images["generated"].shape[:2])

    @property
    def reference_word(self) -> str:
        """What captions call the reference."""
        return "garment"

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Both."""
        return tuple(Direction)

    def picture(self, direction: Direction) -> Picture:
        """What maps of a direction are drawn on."""
        on_image = direction is Direction.REFERENCE_TO_GENERATED
        return self.images["generated" if on_image else "garment"]

    def outline(self, direction: Direction) -> Mask:
        """The region that a map of the direction should fill."""
        on_image = direction is Direction.REFERENCE_TO_GENERATED
        return self.masks["inpaint" if on_image else "garment"]

    def placement(self, direction: Direction) -> None:
        """Grids cover their pictures."""

    def grid(self, direction: Direction) -> GridSize:
        """Grid of the layer's generated or reference patches."""
        return self.maps.store.layer(self.layer).grid(direction)

    def unified(self, direction: Direction, *, thresholded: bool = False) -> NDArray[np.float32]:
        """The map that IMACS is computed from, ``[height, width]`` in [0, 1]."""
        heat_map = self.maps.unified(direction, self.weighting).on_picture(self.size)
        return array(heat_map.thresholded(self.delta) if thresholded else heat_map)

    def true_places(self, grid: GridSize, reference_grid: GridSize) -> NDArray[np.float32]:
        """True place of each cell of a generated grid, ``[generated, 2]`` yx in reference patches.

        NaN where it is not known.
        """
        if self.correspondence is None:
            return np.full((grid.tokens, 2), np.nan, np.float32)
        target = target_on_grid(
            torch.from_numpy(self.correspondence)[None],
            torch.from_numpy(self.masks["warped_garment"])[None],
            grid,
            reference_grid,
        )
        return np.asarray(target[0].numpy())


def write_explained(folder: Path, sample: ExplainedSample) -> None:
    """Write a sample's files into its run folder; ``scores.json`` comes last."""
    pictures = {f"images/{name}": sample.images[name] for name in IMAGES}
    pictures |= {f"images/{_clean_name(image.step_index)}": image.picture for image in sample.clean}
    pictures |= {
        f"masks/{name}": sample.masks[name].astype(np.uint8) * np.uint8(255) for name in MASKS
    }
    for name, picture in pictures.items():
        write_png(folder / f"{name}.png", picture)
    if sample.correspondence is not None:
        with written(folder / "correspondence.safetensors") as unfinished:
            save_file({"correspondence": np.ascontiguousarray(sample.correspondence)}, unfinished)
    save_maps(sample.maps, folder / "maps.safetensors", [sample.name])
    write_json(folder / SCORES, _description(sample))


def _description(sample: ExplainedSample) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": sample.name,
        "garment_name": sample.garment_name,
        "paired": sample.paired,
        "layer": sample.layer,
        "scores": dict(sample.scores),
        "generated_patches": sample.generated_patches,
        "reference_patches": sample.reference_patches,
        "clean_images": [[image.step_index, image.timestep] for image in sample.clean],
        "has_correspondence": sample.correspondence is not None,
        "origin": asdict(sample.origin),
        "delta": sample.delta,
        "weighting": sample.weighting,
        "time_groups": sample.time_groups,
    }


def sample_folders(run: Path) -> list[Path]:
    """The folders of the samples that a run of ``i2am explain`` explained: itself, or those in it.

    Those of several checkpoints come in the order in which the checkpoints were given.

    Raises:
        RunFolderError: there are none.
    """
    if (run / SCORES).is_file():
        return [run]
    folders = sorted((p.parent for p in run.glob(f"*/{SCORES}")), key=_place)
    if not folders:
        raise RunFolderError(
            f"{run} is not the folder of explained samples (it has no {SCORES}). Give a folder that "
            "'i2am explain' wrote."
        )
    return folders


def _place(folder: Path) -> tuple[int, str]:
    """Position of a sample's checkpoint among those of its run, and its own name."""
    checkpoints = manifest_of(folder)["settings"]["checkpoint"]
    own = read_object(folder / SCORES).get("origin", {}).get("checkpoint")
    known = isinstance(checkpoints, list) and own in checkpoints
    return (checkpoints.index(own) if known else 0, folder.name)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of the run that a sample's folder belongs to.

    Raises:
        RunFolderError: there is none, or the run did not come to its end.
    """
    inside = (folder / MANIFEST_FILE).is_file()
    manifest = read_object((folder if inside else folder.parent) / MANIFEST_FILE)
    if manifest.get("finished") is None:
        raise RunFolderError(
            f"The run of {folder} did not come to its end. Give its command again: "
            f"{manifest.get('command')}"
        )
    return manifest


def read_explained(folder: Path, model: str | None = None) -> ExplainedSample:
    """Read one sample of a finished ``i2am explain``.

    Args:
        folder: one of ``sample_folders``.
        model: how figures call the checkpoint; by default the name of its folder.

    Raises:
        RunFolderError: it is no such folder, unfinished, incomplete, or of another version.
        DataError: the archive of maps cannot be read.
    """
    manifest_of(folder)
    about = _checked_description(folder / SCORES)
    with entries_of(folder / SCORES):
        sample = _described(folder, about, model)
    _check_sizes(folder, sample)
    return sample


def _described(folder: Path, about: dict[str, Any], model: str | None) -> ExplainedSample:
    """The sample that a description tells of, with its pictures and maps."""
    origin = Origin(**about["origin"])
    return ExplainedSample(
        name=about["name"],
        garment_name=about["garment_name"],
        paired=about["paired"],
        layer=about["layer"],
        images={name: _read_png(folder / "images" / f"{name}.png", "RGB") for name in IMAGES},
        masks={name: _read_png(folder / "masks" / f"{name}.png", "L") > 127 for name in MASKS},
        correspondence=_read_correspondence(folder) if about["has_correspondence"] else None,
        clean=tuple(_read_clean(folder, *entry) for entry in about["clean_images"]),
        maps=_read_maps(folder / "maps.safetensors", about["name"]),
        scores=about["scores"],
        generated_patches=tuple((y, x) for y, x in about["generated_patches"]),
        reference_patches=tuple((y, x) for y, x in about["reference_patches"]),
        model=model or checkpoint_label(Path(origin.checkpoint)),
        origin=origin,
        delta=about["delta"],
        weighting=LayerWeighting(about["weighting"]),
        time_groups=about["time_groups"],
    )


def _checked_description(path: Path) -> dict[str, Any]:
    about = read_object(path)
    if "recipe" in about:
        raise RunFolderError(
            f"{path.parent} explains a picture by another model ({about['recipe']}), whose figures "
            "lie in it. Give folders that 'i2am explain' made of a try-on model."
        )
    if about.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{path} is of another version (schema {about.get('schema')}, this program reads "
            f"{SCHEMA}). Run 'i2am explain' again with another output=FOLDER."
        )
    return about


def _check_sizes(folder: Path, sample: ExplainedSample) -> None:
    sizes = {name: picture.shape[:2] for name, picture in sample.images.items()}
    sizes |= {f"{name} mask": mask.shape[:2] for name, mask in sample.masks.items()}
    sizes |= {f"step {image.step_index}": image.picture.shape[:2] for image in sample.clean}
    if sample.correspondence is not None:
        sizes["correspondence"] = sample.correspondence.shape[:2]
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size[0]}x{size[1]}" for name, size in sizes.items())
        raise RunFolderError(
            f"The pictures in {folder} differ in size ({found}), so they are not of one sample. "
            "Run 'i2am explain' again."
        )


def _read_maps(path: Path, name: str) -> AttributionMaps:
    archive = load_maps(path)
    if archive.names != (name,):
        raise RunFolderError(
            f"{path} holds the maps of {', '.join(archive.names) or 'an unnamed sample'}, and "
            f"{SCORES} beside it describes {name}. Run 'i2am explain' again."
        )
    return archive.maps


def _read_clean(folder: Path, step_index: int, timestep: int) -> CleanImage:
    path = folder / "images" / f"{_clean_name(step_index)}.png"
    return CleanImage(step_index, timestep, _read_png(path, "RGB"))


def _clean_name(step_index: int) -> str:
    return f"clean-{step_index:03d}"


def _read_correspondence(folder: Path) -> NDArray[np.float32]:
    path = folder / "correspondence.safetensors"
    try:
        values: NDArray[np.float32] = load_file(path)["correspondence"]
    except (OSError, SafetensorError, KeyError) as error:
        raise _unreadable(path, error) from error
    return values


def _read_png(path: Path, mode: str) -> NDArray[np.uint8]:
    try:
        with PillowImage.open(path) as image:
            if image.mode != mode:
                raise ValueError(f"its mode is {image.mode}, expected {mode}")
            return np.array(image, dtype=np.uint8)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> RunFolderError:
    reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
    return RunFolderError(f"{path} cannot be read ({reason}). Run 'i2am explain' again.")


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture in one step."""
    with written(path) as unfinished:
        PillowImage.fromarray(picture).save(unfinished, format="PNG")


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that occur more than once.

    >>> numbered(["x", "x", "y"])
    ['x-1', 'x-2', 'y']
    """
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if names.count(name) == 1 else f"{name}-{seen[name]}")
    return result
