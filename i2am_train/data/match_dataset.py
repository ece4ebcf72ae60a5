"""``i2am data match``: the correspondence of a dataset that has none, found in its pictures.

The rules are those of :mod:`~i2am_train.data.matching`. Files are those of the embedded dataset's ``correspondence``,
so everything reads them; in place of valid stands the confidence, from half of the scale on. ``matched.json`` in the
dataset's folder is written first: it marks the correspondence as found and not true, and results carry the mark.
Without it, a correspondence that is there is somebody's, and stays as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from i2am_train.config.data import DataMatchConfig
from i2am_train.data.dataset import Reading, halves
from i2am_train.data.derivation import Refusal, attempt, refusal_lines, require_size
from i2am_train.data.layouts import GARMENT_ROLES, Layout, entries
from i2am_train.data.matching import Garment, Matched, matched, sift_source
from i2am_train.data.needed_files import refuse_doubles
from i2am_train.data.picture_files import (
    UnreadablePictureError,
    encode_correspondence,
    is_there,
    read_confidence,
    read_mask,
    read_rgb,
    write_picture,
)
from i2am_train.data.pictures import Image, Mask, fit_picture
from i2am_train.data.poses import read_parts
from i2am_train.errors import DataError
from i2am_train.files import read_object, write_json
from i2am_train.fingerprints import MATCHED_REPORT, PREVIEWS
from i2am_train.types import GridSize, Pairing, Role

METHOD = "sift"
NEEDED = (Role.PERSON, Role.GARMENT, Role.GARMENT_MASK, Role.WARPED_MASK)
ROLES = (*NEEDED, Role.POSE_PICTURE)
TILE = GridSize(480, 360)
"""Size of a preview's pictures."""


class Found(NamedTuple):
    """What a sample's correspondence holds."""

    coverage: float
    """Share of the worn garment's pixels whose place is known."""
    confidence: float
    """Mean over these, 0 without any."""
    matches: int | None
    """That the warps go through; None of a file that was there."""
    parts: bool | None
    """Whether body parts were told apart; None of a file that was there."""


@dataclass
class MatchReport:
    """What was found, kept and refused."""

    root: Path
    method: str
    made: int = 0
    kept: int = 0
    seconds: float = 0.0
    refused: list[Refusal] = field(default_factory=list)
    samples: dict[str, dict[str, Found]] = field(default_factory=dict)
    """By split (and category), and by person."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON.

        >>> report = MatchReport(Path("set"), "sift", samples={"train": {"a": Found(0.25, 0.5, 9, True)}})
        >>> report.to_dict()["samples"]["train"]["a"]["coverage"]
        0.25
        """
        return {
            "schema": 1, "root": str(self.root), "method": self.method, "made": self.made, "kept": self.kept,
            "seconds": self.seconds, "refused": [asdict(one) for one in self.refused],
            "samples": {part: {name: one._asdict() for name, one in of.items()} for part, of in self.samples.items()},
        }  # fmt: skip

    def add(self, part: str, outcomes: Mapping[str, Found | str], before: Mapping[str, Found]) -> None:
        """Outcomes of a part, which are reasons where samples are refused; ``before`` knows more of those kept."""
        self.refused += [Refusal(part, name, why) for name, why in outcomes.items() if isinstance(why, str)]
        found = {name: one for name, one in outcomes.items() if not isinstance(one, str)}
        kept = {name for name, one in found.items() if one.matches is None}
        self.made, self.kept = self.made + len(found) - len(kept), self.kept + len(kept)
        self.samples[part] = {name: before.get(name, one) if name in kept else one for name, one in found.items()}

    def summary(self) -> str:
        """A paragraph: counts and rate, what is known by split, and the first refusals.

        >>> found = {"a": Found(0.25, 0.5, 9, True), "b": Found(0.0, 0.0, 0, True)}
        >>> print(MatchReport(Path("set"), "sift", made=2, seconds=0.5, samples={"train": found}).summary())
        set: 2 made by sift, 0 kept, 0 refused; 4.0 samples a second.
          train: 1 of 2 have matches; 12.5% of the worn garments is known, with a mean confidence of 0.50.
        """
        rate = f"; {self.made / self.seconds:.1f} samples a second" if self.made and self.seconds else ""
        lines = [
            f"{self.root}: {self.made} made by {self.method}, {self.kept} kept, {len(self.refused)} refused{rate}."
        ]
        for part, of in self.samples.items():
            coverage = np.array([one.coverage for one in of.values()])
            sure = np.mean([one.confidence for one in of.values() if one.coverage] or [0.0])
            lines.append(
                f"  {part}: {np.count_nonzero(coverage)} of {len(of)} have matches; {coverage.mean():.1%} of the worn "
                f"garments is known, with a mean confidence of {sure:.2f}."
            )
        return "\n".join([*lines, *refusal_lines(self.refused)])


def parts_to_match(config: DataMatchConfig) -> list[Layout]:
    """The splits (of each category) that have a list, once it is sure that they can be matched.

    Raises:
        DataError: folders are missing, or there is a correspondence that this command did not make, or made otherwise.
    """
    there, _ = halves(config.root, Reading(config.layout, tuple(config.categories), options=""))
    layouts = [one for one in there if one.list_file(Pairing.PAIRED).is_file()] or there
    for layout in layouts:
        pairs = layout.pairs(Pairing.PAIRED)
        if missing := [role for role in NEEDED if not layout.has(role)]:
            folders = ", ".join(layout.folder_names(role) for role in missing)
            advice = " ".join(dict.fromkeys(layout.advice(role) for role in missing))
            raise DataError(
                f"{layout.folder} has no folder {folders} (found: {entries(layout.folder)}): matches are looked for "
                f"between the flat garment and the garment on the person, inside their masks. Nothing was written. "
                f"{advice}"
            )
        people, garments = [pair.person for pair in pairs], [pair.garment for pair in pairs]
        refuse_doubles(layout, {role: garments if role in GARMENT_ROLES else people for role in ROLES})
    mark = config.root / MATCHED_REPORT
    foreign = next((one for one in layouts if one.names(Role.CORRESPONDENCE)), None)
    if foreign is not None and not mark.is_file():
        raise DataError(
            f"{foreign.folder_of(Role.CORRESPONDENCE)} holds a correspondence that this command did not make (no "
            f"{mark}); it may be the true one. Nothing was written. Move that folder away to have it matched."
        )
    if mark.is_file() and (before := read_object(mark).get("method")) != METHOD:
        raise DataError(
            f"The correspondence in {config.root} was made with method={before}, and method={METHOD} is asked for. "
            f"Nothing was written. Remove {mark} and the folders {Role.CORRESPONDENCE}, or give the same method."
        )
    return layouts


def match_dataset(config: DataMatchConfig, progress: bool = True) -> MatchReport:
    """Make the correspondences that are missing; the mark is written first, and the report into it last.

    Args:
        config: the dataset.
        progress: show a bar with the rate.

    Raises:
        DataError: see :func:`parts_to_match`; before anything is written.
    """
    layouts = parts_to_match(config)
    mark = config.root / MATCHED_REPORT
    report, before = MatchReport(config.root, METHOD), _samples_of(mark)
    if not mark.is_file():
        write_json(mark, report.to_dict())
    started = time.perf_counter()
    for layout in layouts:
        people = sorted({pair.person for pair in layout.pairs(Pairing.PAIRED)})
        work = partial(attempt, partial(_match, layout, config.preview))
        with ThreadPoolExecutor(config.workers or os.cpu_count() or 1) as pool:
            outcomes = pool.map(work, people)
            bar = tqdm(outcomes, total=len(people), desc=layout.label, unit="sample", disable=not progress)
            report.add(layout.label, dict(zip(people, bar, strict=True)), before.get(layout.label, {}))
    report.seconds = round(time.perf_counter() - started, 3)
    write_json(mark, report.to_dict())
    return report


def _samples_of(mark: Path) -> dict[str, dict[str, Found]]:
    """What the report of an earlier call says; nothing where there was none, or it was cut short."""
    with suppress(TypeError, KeyError, AttributeError):
        said = read_object(mark)["samples"] if mark.is_file() else {}
        return {part: {name: Found(**one) for name, one in of.items()} for part, of in said.items()}
    return {}


def _match(layout: Layout, preview: bool, person: str) -> Found:
    """Make the correspondence of a person, unless it is there."""
    path = layout.path(Role.CORRESPONDENCE, person)
    if is_there(path):
        return _found(read_confidence(path), read_mask(layout.path(Role.WARPED_MASK, person)))
    worn = _garment(layout, Role.PERSON, Role.WARPED_MASK, person)
    flat = _garment(layout, Role.GARMENT, Role.GARMENT_MASK, layout.own_garment(person))
    parts = _body_parts(layout, person, GridSize(*worn.mask.shape))
    result = matched(worn, flat, [sift_source(worn, flat)], parts)
    if preview:
        sheet = preview_sheet(worn, flat, result)
        write_picture(layout.root / PREVIEWS / "matches" / layout.label.replace(" ", "_") / f"{person}.jpg", sheet)
    write_picture(path, encode_correspondence(result.correspondence, result.confidence))
    known = np.where(np.isnan(result.correspondence[..., 0]), np.nan, result.confidence)
    return _found(known, worn.mask)._replace(matches=len(result.matches), parts=parts is not None)


def _found(confidence: NDArray[np.floating], worn: Mask) -> Found:
    """Coverage and mean confidence of a file, whose confidence is NaN where nothing is known."""
    known = ~np.isnan(confidence)
    coverage = np.count_nonzero(known) / max(1, int(np.count_nonzero(worn)))
    mean = float(confidence[known].mean()) if known.any() else 0.0
    return Found(round(float(coverage), 5), round(mean, 5), None, None)


def _garment(layout: Layout, picture: Role, mask: Role, stem: str) -> Garment:
    """A picture and its garment's mask, which must not be empty."""
    path = layout.path(mask, stem)
    garment = Garment(read_rgb(layout.path(picture, stem)), read_mask(path))
    require_size(path, garment.mask.shape, GridSize(*garment.picture.shape[:2]))
    if not garment.mask.any():
        raise DataError(f"{path} is all black: it shows no garment. Make it again, or take its sample out of the list.")
    return garment


def _body_parts(layout: Layout, person: str, size: GridSize) -> NDArray[np.uint8] | None:
    """DensePose's labels; None where there are none, or the pose picture is not in its colours."""
    path = layout.path(Role.POSE_PICTURE, person)
    if not is_there(path):
        return None
    try:
        parts = read_parts(path)
    except UnreadablePictureError:
        raise
    except DataError:
        return None
    require_size(path, parts.shape, size)
    return parts


def preview_sheet(worn: Garment, flat: Garment, result: Matched) -> Image:
    """What was found, to be looked at: ``[480, 1080, 3]``.

    From left to right: the person with the places of matches, the flat garment with those that they have there, in the
    colour of their confidence; and the person where nothing is known grey, elsewhere in the flat garment's colours.
    """
    tiles = []
    scale = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1]
    tones = scale[(255 * result.matches.confidence).astype(np.intp)].tolist()
    for garment, places in ((worn, result.matches.worn), (flat, result.matches.flat)):
        zoom = min(TILE.height / garment.mask.shape[0], TILE.width / garment.mask.shape[1])
        picture = cv2.resize(garment.picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
        for number, ((y, x), tone) in enumerate(zip(zoom * places - 0.5, tones, strict=True)):
            middle, beside = (round(x), round(y)), (round(x) + 5, round(y))
            cv2.circle(picture, middle, 4, tone, 1, cv2.LINE_AA)
            cv2.putText(picture, str(number), beside, cv2.FONT_HERSHEY_PLAIN, 0.7, tone, 1, cv2.LINE_AA)
        tiles.append(picture)
    places = (result.correspondence * flat.mask.shape - 0.5).astype(np.float32)
    carried = cv2.remap(flat.picture, places[..., 1], places[..., 0], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    grey = cv2.cvtColor(cv2.cvtColor(worn.picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) // 2 + 64
    tiles.append(np.where(np.isnan(places[..., :1]), grey, carried))
    return np.hstack([fit_picture(np.asarray(tile, np.uint8), TILE, "pad", 255) for tile in tiles])
