"""THE type for a picture and the attention that made it, and its files.

In a folder of its own::

    scores.json                 names, patches, scores, what the maps mean, origin
    maps.safetensors            the capture (attention/maps.py)
    images/*.png                generated, reference (try-on: garment) and other inputs, clean-<step>
    masks/*.png                 inpaint (what was made anew) and that of the reference; white inside
    correspondence.safetensors  true place of each generated pixel on the reference, where known

The folder of the run, which may be the same one, has a finished ``manifest.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from i2am_train.attention.known import of_same_picture
from i2am_train.attention.maps import AttributionMaps, HeatMap, load_maps, save_maps
from i2am_train.attention.store import LayerRecord
from i2am_train.data.picture_files import write_png
from i2am_train.data.pictures import Image, Mask, fit_mask, fit_picture
from i2am_train.errors import RunFolderError
from i2am_train.files import entries_of, read_object, write_json, written
from i2am_train.losses.attention import attention_centers
from i2am_train.metrics.attention import alignment_table, target_on_grid
from i2am_train.ops.grids import mask_on_grid
from i2am_train.results.run_files import SamplePanels
from i2am_train.runs import MANIFEST_FILE
from i2am_train.types import Canvas, Direction, Fit, GridSize, LayerWeighting

SCHEMA = 3
"""Version of the files. 2 was of try-on models alone, 1 of other models or without pictures."""
SCORES, MAPS, CORRESPONDENCE = "scores.json", "maps.safetensors", "correspondence.safetensors"

SHOWN_AT_MOST = 512
"""Pixels of a reference's longer side in figures and on the page; a photograph's own would be slow."""
FITS: Mapping[Canvas, Fit] = {Canvas.STRETCH: "stretch", Canvas.CENTRE_CROP: "crop", Canvas.LETTERBOX: "pad"}
"""How a reference picture came to the canvas that its grids cover."""
WHITE = 255

TO_GENERATED = Direction.REFERENCE_TO_GENERATED
TO_REFERENCE = Direction.GENERATED_TO_REFERENCE

PatchIndex = tuple[int, int]
"""Row and column of a patch on a grid."""


@dataclass(frozen=True, slots=True)
class CleanImage:
    """The clean image that the model predicted at one sampling step."""

    step_index: int
    timestep: int
    picture: Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One picture that a model made after a reference, and the attention of the pass that made it.

    Pictures are uint8 ``[height, width, 3]``, masks bool ``[height, width]``. The pictures of a dataset's sample have
    one size; elsewhere the reference is as the user gave it.
    """

    name: str
    images: Mapping[str, Image]
    """"generated" and the reference ("garment" of try-on models, else "reference"); of try-on models also "agnostic",
    "densepose" and "person"."""
    masks: Mapping[str, Mask] = field(default_factory=dict)
    """As far as known: "inpaint" (what was made anew), that of the reference (called as it), "warped_garment"."""
    maps: AttributionMaps
    """The capture, of one sample."""
    layer: str
    """The layer that patches are counted on."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """None: it has no value here (an empty mask, no truth)."""
    correspondence: NDArray[np.float32] | None = None
    """Truth, ``[height, width, 2]``: yx on the reference in units of its height and width, NaN where unknown."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What it was made from: name by kind."""
    index: int = 0
    """Position in the dataset's list of pairs; 0 outside of a dataset."""
    paired: bool | None = None
    """Whether the person wears this garment in the "person" picture; None outside of a dataset."""
    clean: tuple[CleanImage, ...] = ()
    """One per time group, noisiest first, where they were kept."""
    generated_patches: tuple[PatchIndex, ...] = ()
    """Of the layer's generated grid: those that figures show a map of."""
    reference_patches: tuple[PatchIndex, ...] = ()
    """Likewise of its reference grid."""
    model: str = ""
    """How figures call the model."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What it was made by, ready for JSON: checkpoint, data, guidance, steps, seed, and what else there is.
    Explanations are compared if they differ in one of these."""
    delta: float
    weighting: LayerWeighting
    time_groups: int

    @property
    def reference(self) -> str:
        """What the reference is called, among the pictures and in captions.

        >>> fields = {"maps": None, "layer": "", "delta": 0.4, "weighting": LayerWeighting.PAPER, "time_groups": 5}
        >>> picture = np.zeros((4, 3, 3), np.uint8)
        >>> Explanation(name="a", images={"generated": picture, "garment": picture}, **fields).reference
        'garment'
        """
        return "garment" if self.is_tryon else "reference"

    @property
    def is_tryon(self) -> bool:
        """Whether a try-on model of ours made it of a dataset's sample."""
        return "garment" in self.images

    @property
    def size(self) -> GridSize:
        """Of the generated picture.

        >>> fields = {"maps": None, "layer": "", "delta": 0.4, "weighting": LayerWeighting.PAPER, "time_groups": 5}
        >>> Explanation(name="a", images={"generated": np.zeros((4, 3, 3), np.uint8)}, **fields).size
        GridSize(height=4, width=3)
        """
        return GridSize(*self.images["generated"].shape[:2])

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Those that have maps."""
        return self.maps.store.directions

    @property
    def covers_pictures(self) -> bool:
        """Whether both pictures have one size and the grids cover all of them."""
        same = self.picture(TO_REFERENCE).shape == self.picture(TO_GENERATED).shape
        return same and self.maps.store.canvas is Canvas.STRETCH

    def picture(self, direction: Direction) -> Image:
        """What a map of the direction says something of."""
        return self.images["generated" if direction is TO_GENERATED else self.reference]

    def mask(self, direction: Direction) -> Mask | None:
        """The region that a map of the direction should fill.

        >>> fields = {"maps": None, "layer": "", "delta": 0.4, "weighting": LayerWeighting.PAPER, "time_groups": 5}
        >>> images, masks = {"generated": np.zeros((1, 3, 3), np.uint8)}, {"inpaint": np.array([[True, False, True]])}
        >>> Explanation(name="a", images=images, masks=masks, **fields).mask(TO_GENERATED).tolist()
        [[True, False, True]]
        """
        return self.masks.get("inpaint" if direction is TO_GENERATED else self.reference)

    def record(self) -> LayerRecord:
        """The capture of the layer that patches are counted on."""
        return self.maps.store.layer(self.layer)

    def grid(self, direction: Direction) -> GridSize:
        """Of the layer's generated or reference patches."""
        return self.record().grid(direction)

    def unified(self, direction: Direction, *, thresholded: bool = False) -> NDArray[np.float32]:
        """The map that IMACS is computed from, at the size of the generated picture, in [0, 1]."""
        heat_map = self.maps.unified(direction, self.weighting).on_picture(self.size)
        return array(heat_map.thresholded(self.delta) if thresholded else heat_map)

    def region(self) -> Mask:
        """Where generated patches count: on the garment where that is known, else what was made anew, else everywhere.

        >>> fields = {"maps": None, "layer": "", "delta": 0.4, "weighting": LayerWeighting.PAPER, "time_groups": 5}
        >>> Explanation(name="a", images={"generated": np.zeros((1, 3, 3), np.uint8)}, **fields).region().tolist()
        [[True, True, True]]
        """
        warped, inpaint = self.masks.get("warped_garment"), self.mask(TO_GENERATED)
        if warped is not None and warped.any():
            return warped
        return np.ones(self.size, np.bool_) if inpaint is None else inpaint

    def patches_inside(self, grid: GridSize) -> Bool[Tensor, " generated"]:
        """The cells of a generated grid of which at least half lies in the ``region``."""
        return mask_on_grid(torch.from_numpy(self.region())[None], grid)[0]

    def true_places(self, grid: GridSize, reference_grid: GridSize) -> NDArray[np.float32]:
        """True place of each patch of a generated grid, ``[generated, 2]`` yx in reference patches; NaN: not known.

        >>> fields = {"maps": None, "layer": "", "delta": 0.4, "weighting": LayerWeighting.PAPER, "time_groups": 5}
        >>> Explanation(name="a", images={}, **fields).true_places(GridSize(1, 2), GridSize(5, 4)).tolist()
        [[nan, nan], [nan, nan]]
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

    def seen_picture(self) -> Image:
        """What the model saw of the reference, as far as its maps know: the whole canvas, borders white."""
        picture = self.picture(TO_REFERENCE)
        return picture if self.covers_pictures else fit_picture(picture, *self._canvas(), WHITE)

    def seen_mask(self) -> Mask | None:
        """The reference's mask on the same canvas."""
        mask = self.mask(TO_REFERENCE)
        return mask if mask is None or self.covers_pictures else fit_mask(mask, *self._canvas())

    def _canvas(self) -> tuple[GridSize, Fit]:
        """The size that the reference's canvas is shown in, and how the picture was fitted to it."""
        picture = GridSize(*self.picture(TO_REFERENCE).shape[:2])
        fit = FITS[self.maps.store.canvas]
        if TO_REFERENCE not in self.directions or fit == "stretch":
            aspect, fit = picture, FITS[Canvas.STRETCH]
        else:
            aspect = max(record.grid(TO_REFERENCE) for record in self.maps.store.layers)
        factor = min(SHOWN_AT_MOST, max(picture)) / max(aspect)
        return GridSize(round(aspect.height * factor), round(aspect.width * factor)), fit

    def panels(self) -> SamplePanels:
        """What an evaluation of a try-on model keeps of it."""
        record, weights = self.record(), self.maps.scores(self.layer)
        generated_grid, reference_grid = record.generated_grid, record.grid(TO_REFERENCE)
        centers = attention_centers(weights.reshape(*weights.shape[:2], *reference_grid))
        return SamplePanels(
            name=self.name,
            garment_name=self.inputs["garment"],
            layer=self.layer,
            generated_grid=generated_grid,
            reference_grid=reference_grid,
            **self.images,
            map_generated=self.unified(TO_GENERATED),
            map_reference=self.unified(TO_REFERENCE),
            centers=centers[0].numpy(),
            target_centers=self.true_places(generated_grid, reference_grid),
            mask=self.patches_inside(generated_grid).numpy(),
            inpaint_mask=self.masks["inpaint"],
            garment_mask=self.masks["garment"],
        )


def array(heat_map: HeatMap) -> NDArray[np.float32]:
    """Values of the one sample of a heat map: ``[*axes, height, width]``.

    >>> array(HeatMap(torch.zeros(1, 2, 3), TO_GENERATED)).shape
    (2, 3)
    """
    return np.asarray(heat_map.values[0].cpu().numpy())


# ---- files ---------------------------------------------------------------------------------------


def write_explanation(folder: Path, explanation: Explanation) -> None:
    """Write the files of one explanation; ``scores.json`` comes last."""
    pictures = {f"images/{name}": picture for name, picture in explanation.images.items()}
    for clean in explanation.clean:
        pictures[f"images/{_clean_name(clean.step_index)}"] = clean.picture
    for name, mask in explanation.masks.items():
        pictures[f"masks/{name}"] = mask.astype(np.uint8) * np.uint8(WHITE)
    for name, picture in pictures.items():
        write_png(folder / f"{name}.png", picture)
    if explanation.correspondence is not None:
        values = {"correspondence": np.ascontiguousarray(explanation.correspondence)}
        with written(folder / CORRESPONDENCE) as unfinished:
            save_file(values, unfinished)
    save_maps(explanation.maps, folder / MAPS, [explanation.name])
    write_json(folder / SCORES, _description(explanation))


def _description(explanation: Explanation) -> dict[str, Any]:
    """``scores.json``: what the maps are of, what they mean, and the scores."""
    store, same = explanation.maps.store, of_same_picture(explanation.maps.store.recipe)
    return {
        "schema": SCHEMA,
        "name": explanation.name,
        "inputs": dict(explanation.inputs),
        "index": explanation.index,
        "paired": explanation.paired,
        "model": explanation.model,
        "recipe": store.recipe,
        "marks": list(store.marks),
        "functional": store.functional,
        "partial": store.partial,
        "directions": [str(direction) for direction in explanation.directions],
        "layer": explanation.layer,
        "layers": [
            {
                "layer": record.layer,
                "heads": record.heads,
                "generated_grid": record.generated_grid,
                "reference_grid": record.reference_grid,
                "functional": record.functional,
                "mass": None if record.mass is None else float(record.mass.mean()),
            }
            for record in store.layers
        ],
        "scores": dict(explanation.scores),
        "mass": float(explanation.maps.mass().values.mean()) if store.joint else None,
        "alignment": (alignment_table(explanation.maps) or None) if same else None,
        "generated_patches": explanation.generated_patches,
        "reference_patches": explanation.reference_patches,
        "images": list(explanation.images),
        "masks": list(explanation.masks),
        "clean_images": [[image.step_index, image.timestep] for image in explanation.clean],
        "has_correspondence": explanation.correspondence is not None,
        "origin": dict(explanation.origin),
        "delta": explanation.delta,
        "weighting": explanation.weighting,
        "time_groups": explanation.time_groups,
    }


def explanation_folders(run: Path) -> list[Path]:
    """The folders of the explanations that a run of ``i2am explain`` made: itself, or those in it.

    Those of several checkpoints come in the order in which the checkpoints were given.

    Raises:
        RunFolderError: there are none.

    >>> explanation_folders(Path("runs/other"))
    Traceback (most recent call last):
        ...
    i2am_train.errors.RunFolderError: runs/other is not the folder of explained samples (it has no scores.json). ...
    """
    if (run / SCORES).is_file():
        return [run]
    folders = sorted((path.parent for path in run.glob(f"*/{SCORES}")), key=_order)
    if not folders:
        raise RunFolderError(
            f"{run} is not the folder of explained samples (it has no {SCORES}). Give a folder that "
            "'i2am explain' wrote."
        )
    return folders


def _order(folder: Path) -> tuple[int, str]:
    """Position of an explanation's checkpoint among those of its run, and its own name."""
    checkpoints = manifest_of(folder)["settings"]["checkpoint"]
    own = read_object(folder / SCORES).get("origin", {}).get("checkpoint")
    known = isinstance(checkpoints, list) and own in checkpoints
    return (checkpoints.index(own) if known else 0, folder.name)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of the run that an explanation's folder belongs to.

    Raises:
        RunFolderError: there is none, or the run did not come to its end.

    >>> manifest_of(Path("runs/other"))
    Traceback (most recent call last):
        ...
    i2am_train.errors.RunFolderError: runs/manifest.json is missing: runs is not the folder of a run.
    """
    inside = (folder / MANIFEST_FILE).is_file()
    manifest = read_object((folder if inside else folder.parent) / MANIFEST_FILE)
    if manifest.get("finished") is None:
        raise RunFolderError(
            f"The run of {folder} did not come to its end. Give its command again: {manifest.get('command')}"
        )
    return manifest


def read_explanation(folder: Path, model: str | None = None) -> Explanation:
    """Read one explanation of a finished ``i2am explain``.

    Args:
        folder: one of ``explanation_folders``.
        model: how figures call the model; as it was written where None.

    Raises:
        RunFolderError: it is no such folder, unfinished, incomplete, or of another version.
        DataError: the archive of maps cannot be read.
    """
    manifest_of(folder)
    path = folder / SCORES
    about = read_object(path)
    if about.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{path} is of another version (schema {about.get('schema')}, this program reads "
            f"{SCHEMA}). Run 'i2am explain' again with another output=FOLDER."
        )
    with entries_of(path):
        explanation = _described(folder, about, model)
    _check_sizes(folder, explanation)
    return explanation


def _described(folder: Path, about: dict[str, Any], model: str | None) -> Explanation:
    """The explanation that a description tells of, with its pictures and maps."""
    as_written = (
        "name", "inputs", "index", "paired", "layer", "scores", "origin", "delta", "time_groups",
    )  # fmt: skip
    images, masks = folder / "images", folder / "masks"
    return Explanation(
        **{name: about[name] for name in as_written},
        images={name: _read_png(images / f"{name}.png", "RGB") for name in about["images"]},
        masks={name: _read_png(masks / f"{name}.png", "L") > 127 for name in about["masks"]},
        correspondence=_read_correspondence(folder) if about["has_correspondence"] else None,
        clean=tuple(
            CleanImage(step, timestep, _read_png(images / f"{_clean_name(step)}.png", "RGB"))
            for step, timestep in about["clean_images"]
        ),
        maps=_read_maps(folder / MAPS, about["name"]),
        generated_patches=tuple((y, x) for y, x in about["generated_patches"]),
        reference_patches=tuple((y, x) for y, x in about["reference_patches"]),
        model=model or about["model"],
        weighting=LayerWeighting(about["weighting"]),
    )


def _check_sizes(folder: Path, read: Explanation) -> None:
    """All pictures have the generated one's size; a reference of other models has its mask's."""
    sizes = {name: picture.shape[:2] for name, picture in read.images.items()}
    sizes |= {f"{name} mask": mask.shape[:2] for name, mask in read.masks.items()}
    sizes |= {f"step {image.step_index}": image.picture.shape[:2] for image in read.clean}
    if read.correspondence is not None:
        sizes["correspondence"] = read.correspondence.shape[:2]
    apart = () if read.is_tryon else ("reference", "reference mask")
    for side in (sizes.keys() - set(apart), sizes.keys() & set(apart)):
        if len({sizes[name] for name in side}) > 1:
            found = ", ".join(f"{name} {size[0]}x{size[1]}" for name, size in sizes.items() if name in side)
            raise RunFolderError(
                f"The pictures in {folder} differ in size ({found}), so they are not of one "
                "sample. Run 'i2am explain' again."
            )


def _read_maps(path: Path, name: str) -> AttributionMaps:
    archive = load_maps(path)
    if archive.names != (name,):
        raise RunFolderError(
            f"{path} holds the maps of {', '.join(archive.names) or 'an unnamed sample'}, and "
            f"{SCORES} beside it describes {name}. Run 'i2am explain' again."
        )
    return archive.maps


def _clean_name(step_index: int) -> str:
    return f"clean-{step_index:03d}"


def _read_correspondence(folder: Path) -> NDArray[np.float32]:
    path = folder / CORRESPONDENCE
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
