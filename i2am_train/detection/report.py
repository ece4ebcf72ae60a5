"""What ``i2am detect`` keeps, read back and written down: a page of its own, and a part of ``i2am report``.

In its folder, beside images, maps and detections::

    samples.jsonl       boxes and IoU of every sample
    panels.safetensors  pictures and map of the first samples, all of one size
    results.json        means with intervals, settings, manifest

The tables are Tables 1 and 3 of the paper, filled by the experiment (section 5.1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from i2am_train.environment import command_line
from i2am_train.errors import RunFolderError
from i2am_train.files import numbered, read_object, write_text, written
from i2am_train.metrics import boxes
from i2am_train.metrics.boxes import METHOD_LABELS, METHODS_OF_MAPS
from i2am_train.reporting import pages
from i2am_train.reporting.figures import sheet
from i2am_train.reporting.figures.canvas import OKABE_ITO, Picture, save_figure
from i2am_train.reporting.report_files import origin_of, write_figure, write_table
from i2am_train.reporting.table import (
    LATEX_NEEDS,
    Cell,
    Heading,
    Row,
    Table,
    interval_text,
    latex,
    markdown,
    minus,
    number,
    percent,
    with_best,
)
from i2am_train.results.run_files import PANELS, RESULTS, SAMPLES, read_samples
from i2am_train.results.statistics import few_samples_note, sample_interval
from i2am_train.types import GridSize

SCHEMA, KIND = 1, "detection"
"""Version and kind that ``results.json`` states."""
WIDTH, DPI = 7.0, 220
"""Width of the figure in inches, and its pixels per inch."""
OURS_COLOR, TARGET_COLOR, DETECTOR_COLOR, _, INVERTED_COLOR = OKABE_ITO[1:]
FIGURE_CAPTION = (
    "Samples: the image with the object's box (green), what is painted anew, the reference, the "
    "painted image with the detectors' best boxes (pink), the unified map on it, and the boxes found "
    "(orange: I²AM, blue: inverted map, green: the object's). Numbers: IoU of I²AM and of the "
    "inverted map."
)


Results = Mapping[str, Any]
"""Content of ``results.json``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sample to draw, all pictures of one size."""

    image: Picture
    mask: NDArray[np.bool_]
    reference: Picture
    generated: Picture
    heat: NDArray[np.floating]
    """Unified map in [0, 1], of the same size for all samples."""
    row: Mapping[str, Any]
    """Of ``samples.jsonl``."""


ARRAYS = ("image", "mask", "reference", "generated", "heat")
"""The fields of ``Example`` that ``panels.safetensors`` holds, stacked over samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """The experiment in a folder."""

    folder: Path
    results: Results
    """What ``results.json`` says."""
    rows: tuple[Mapping[str, Any], ...]
    """Of all samples."""
    examples: tuple[Example, ...]
    """The first samples; none where no pictures were kept."""


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Keep the pictures of the first samples in one step; no examples, no file."""
    if not examples:
        (folder / PANELS).unlink(missing_ok=True)
        return
    stacks = {name: np.stack([getattr(one, name) for one in examples]) for name in ARRAYS}
    names = {"names": json.dumps([one.row["name"] for one in examples])}
    with written(folder / PANELS) as unfinished:
        save_file(stacks, unfinished, names)


def read_detected(folder: Path) -> Detected:
    """The results in a folder of ``i2am detect``, with the pictures that it kept.

    Raises:
        RunFolderError: it is no such folder, of another version, or cannot be read.

    >>> read_detected(Path("runs/other"))
    Traceback (most recent call last):
        ...
    i2am_train.errors.RunFolderError: Found runs/other, without results.json, and expected the folder of a finished ...
    """
    path = folder / RESULTS
    results = read_object(path) if path.is_file() else {}
    if results.get("kind") != KIND:
        what = f"whose results are no detection ({path})" if results else f"without {RESULTS}"
        raise RunFolderError(
            f"Found {folder}, {what}, and expected the folder of a finished 'i2am detect'. Give such folders in "
            "detected; evaluations and studies belong in runs, explained samples in explained."
        )
    if results.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{path} has schema {results.get('schema')!r}; this version reads schema {SCHEMA}. Give the command of "
            "its manifest again: images, maps and detections are kept."
        )
    rows = read_samples(folder / SAMPLES)
    examples = _read_examples(folder / PANELS, {row["name"]: row for row in rows})
    return Detected(folder=folder, results=results, rows=rows, examples=examples)


def _read_examples(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> tuple[Example, ...]:
    if not path.is_file():
        return ()
    try:
        with safe_open(path, framework="numpy") as file:
            names = json.loads(file.metadata()["names"])
            stacks = {name: file.get_tensor(name) for name in ARRAYS}
        return tuple(
            Example(row=rows[name], **{field: stack[place] for field, stack in stacks.items()})
            for place, name in enumerate(names)
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path} cannot be read: {error}. Give 'i2am detect' again; images and maps are kept."
        ) from None


# ---- the tables --------------------------------------------------------------------------------

DIGITS = 4
"""As the paper prints mean IoU."""
SUPERVISED, UNSUPERVISED = "Supervised, seen dataset", "Unsupervised, unseen dataset"
KINDS = {"real": "Real images", "generated": "Generated images"}
LEFT_OUT_MARK = "†"

TABLE_1: Mapping[str, Mapping[str, float]] = {
    "fasterrcnn": {"real": 0.3225, "generated": 0.2658},
    "maskrcnn": {"real": 0.3294, "generated": 0.2706},
    "maskformer": {"real": 0.3568, "generated": 0.2932},
    "daam": {"generated": 0.1807},
    "overall": {"generated": 0.1807},
    "random_authors": {"generated": 0.2028},
    "i2am_authors": {"generated": 0.2416},
}
"""Mean IoU on COCO val2017 by method, beside what here does the same; YOLOv3 and RTMDet have no counterpart."""

TABLE_3: Mapping[float, float] = {0.2: 0.2413, 0.3: 0.2413, 0.4: 0.2416, 0.5: 0.2416, 0.6: 0.24}
"""Mean IoU of the paper's method by threshold: of the authors' script, in which a percentile follows."""


def published_iou(method: str, kind: str) -> float | None:
    """What Table 1 says of a method, or of a detector whose name holds that of one.

    >>> published_iou("torchvision:maskrcnn_resnet50_fpn", "real"), published_iou("i2am", "generated")
    (0.3294, None)
    """
    if method in TABLE_1:
        return TABLE_1[method].get(kind)
    detectors = [name for name in TABLE_1 if "real" in TABLE_1[name] and name in method.lower()]
    return TABLE_1[detectors[0]][kind] if detectors else None


def tables_of(results: Results) -> tuple[Table, ...]:
    """The paper's Tables 1 and 3."""
    return main_table(results), threshold_table(results)


def main_table(results: Results) -> Table:
    """Table 1: methods by mean IoU on real and on generated images.

    Ranks are within a group of rows; methods that leave out samples (†) take no part.
    """
    paper = _is_coco(results)
    headings = [
        heading for title in KINDS.values() for heading in (Heading("mIoU", "↑", title), Heading("images", group=title))
    ]
    if paper:
        headings += [Heading(title.split()[0].lower(), group="Paper") for title in KINDS.values()]
    groups = {SUPERVISED: list(results["miou"]["real"]), UNSUPERVISED: list(METHOD_LABELS)}
    return Table(
        name="detection",
        title="Object detection",
        source="paper Table 1",
        corner="Method",
        headings=tuple(headings),
        rows=tuple(row for title, names in groups.items() for row in _rows(results, title, names, paper)),
        notes=tuple(_notes(results)),
    )


def _rows(results: Results, title: str, names: Sequence[str], paper: bool) -> Iterator[Row]:
    """The methods of one group of rows."""
    ranked = [LEFT_OUT_MARK not in label(name) for name in names]
    columns: list[Sequence[Cell | None]] = []
    for kind in KINDS:
        scores = [results["miou"][kind].get(name) for name in names]
        columns.append(with_best([score and _measured(score) for score in scores], True, ranked))
        columns.append([score and Cell.of(score["n"], 0) for score in scores])
    if paper:
        columns += [[_published(published_iou(name, kind)) for name in names] for kind in KINDS]
    for name, *cells in zip(names, *columns, strict=True):
        yield Row(label(name), tuple(cells), title)


def _measured(score: Mapping[str, Any]) -> Cell | None:
    """A mean IoU with its interval; None where no image counts."""
    return None if score["mean"] is None else Cell.of(score["mean"], DIGITS, interval=sample_interval(score))


def _published(value: float | None) -> Cell | None:
    """A number of the paper."""
    return None if value is None else Cell.of(value, DIGITS)


def threshold_table(results: Results) -> Table:
    """Table 3: mean IoU by threshold, of the same maps."""
    deltas, swept = results["thresholds"], results["miou"]["sweep"]
    rows = {
        label(name): with_best([_measured(swept[swept_name(name, delta)]) for delta in deltas], True)
        for name in METHODS_OF_MAPS
    }
    if _is_coco(results):
        rows["Paper"] = [_published(TABLE_3.get(delta)) for delta in deltas]
    return Table(
        name="detection_thresholds",
        title="Threshold of the map",
        source="paper Table 3",
        corner="Method",
        headings=tuple(Heading(f"δ = {delta:g}", group="mIoU, generated images") for delta in deltas),
        rows=tuple(Row(name, tuple(cells)) for name, cells in rows.items()),
        notes=(
            "Every threshold is of the same maps and images. Bold: best of a row.",
            "The authors' script takes a percentile of the thresholded map, so that δ hardly matters there.",
        ),
    )


def label(method: str) -> str:
    """How tables call a method: by our name; a detector by its own, without the folders that lead to it.

    >>> label("/models/yolos-tiny"), label("hustvl/yolos-tiny"), label("torchvision:ssd300_vgg16@/models/ssd.pth")
    ('yolos-tiny', 'hustvl/yolos-tiny', 'torchvision:ssd300_vgg16@ssd.pth')
    """
    network, at, file = method.rpartition("@")
    name = Path(file).name if at or Path(file).is_absolute() else file
    return METHOD_LABELS.get(method, f"{network}{at}{name}")


def swept_name(method: str, delta: float) -> str:
    """A method at one threshold of the sweep.

    >>> swept_name("i2am", 0.4)
    'i2am@d0.4'
    """
    return f"{method}@d{delta:g}"


def _is_coco(results: Results) -> bool:
    return results["settings"]["root"] is not None


def _notes(results: Results) -> Iterator[str]:
    """What a reader must know to judge the table."""
    bench, settings, missed = results["bench"], results["settings"], results["missed"]
    scores, coco = results["miou"]["generated"], _is_coco(results)
    counted = "count like others" if settings["crowds"] else "are left out"
    yield (
        f"Bench: of each of the {bench['images']} images the first annotation whose box covers 10–30 % of it, which "
        f"gives {bench['samples']} objects ({bench['crowds']} of them crowds, which {counted}), on average "
        f"{percent(bench['mean_share'])} of their image. All boxes are compared in one frame, that of the generated "
        f"image ({settings['height']}x{settings['width']}); real images are resized to it."
    )
    if not coco:
        yield (
            "These are made pictures of coloured shapes: the table shows that the experiment runs, not what a model "
            "can do. Give root=FOLDER for COCO."
        )
    if not results["functional"]:
        yield (
            "Not functional: the model's reference is one token, and a softmax over one key is 1 whatever the "
            "attention says. The maps probe the geometry that the weights inherited from the text model; no pixel "
            "depends on them."
        )
    yield (
        "DAAM's softmax runs over the reference: with one token its map is the same everywhere, so its box is the "
        "whole image (paper A.7)."
    )
    yield (
        "I²AM: extents of the largest region of the unified map of the nine decoder layers above δ = "
        f"{settings['delta']:g}; a map without such a region counts 0 ({missed['i2am']} samples; inverted, 1 − map as "
        f"the authors show it: {missed['i2am_inverted']})."
    )
    yield (
        f"{LEFT_OUT_MARK} By the authors' scripts, which leave samples out of the mean: without a contour "
        f"({scores['i2am_authors']['left_out']}), and of random boxes those that miss the object "
        f"({scores['random_authors']['left_out']}). Their map: 15 layers, inverted. Not ranked; one frame here, where "
        "theirs has two."
    )
    if results["miou"]["real"]:
        of = "of the object's category" if settings["match_category"] else "of any category"
        yield (
            f"Detectors: the box of the highest score {of}; images whose score is at most {settings['score']:g} are "
            "left out, so that rows are means over different images (column images)."
        )
    counts = [score["n"] for of in results["miou"].values() for score in of.values() if score["low"] is not None]
    yield (
        "Brackets: 95 % bootstrap (BCa) over samples of one seed. Bold and underlined: best and second of its group."
        f"{few_samples_note(min(counts)) if counts else ''}"
    )
    yield minus(f"Paired over samples: {'; '.join(map(_difference, results['differences']))}.")
    if coco:
        yield "Paper: Table 1, of COCO val2017 with the authors' code; it does not say how many images."


def _difference(entry: Mapping[str, Any]) -> str:
    value = number(entry["difference"], DIGITS, signed=True)
    interval = interval_text(sample_interval(entry), DIGITS)
    return f"{label(entry['method'])} − {label(entry['against'])} {value} {interval}".rstrip()


# ---- the page ----------------------------------------------------------------------------------


def write_report(detected: Detected) -> Path:
    """Write ``results.md``, ``results.tex``, the figure and ``report.html`` into the experiment's folder.

    Nothing but what the folder keeps is read: the page can be made again without model and data.

    Returns:
        The path of the page.
    """
    folder, results, tables = detected.folder, detected.results, tables_of(detected.results)
    write_text(folder / "results.md", "\n".join(map(markdown, tables)))
    write_text(folder / "results.tex", "\n".join((LATEX_NEEDS, *map(latex, tables))))
    drawing = _drawing_of(detected.examples)
    if drawing is not None:
        save_figure(drawing, folder / "figures" / "samples.png", dpi=DPI)
    bench, detectors = results["bench"], results["miou"]["real"]
    facts = [(str(bench["samples"]), "objects"), (str(bench["images"]), "images in the dataset")]
    facts += [(str(len(detectors)), "detectors")] if detectors else []
    page = pages.page(
        "Object detection from the attention of Paint-by-Example",
        [*_sections(detected, drawing), pages.making(results["manifest"], results["settings"])],
        facts=facts,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _drawing_of(examples: Sequence[Example]) -> Figure | None:
    """The figure of samples; None where no pictures were kept."""
    return sheet.draw_sheet(sample_sheet(examples), WIDTH) if examples else None


def _sections(detected: Detected, drawing: Figure | None, label: str = "") -> list[pages.Section]:
    """What a page shows of the experiment: its tables, then the figure.

    Args:
        detected: the experiment.
        drawing: its figure, from ``_drawing_of``.
        label: before each title, where a page shows several experiments.
    """
    before = f"{label}: " if label else ""
    found = [pages.Section.of(table, before) for table in tables_of(detected.results)]
    if drawing is not None:
        names = ", ".join(example.row["name"] for example in detected.examples)
        source, alt = pages.embedded_figure(drawing, DPI), f"Rows of pictures: {names}."
        picture = pages.Picture(source, FIGURE_CAPTION, alt)
        found.append(pages.Section(f"{before}Samples", pictures=[picture]))
    return found


def sample_sheet(examples: Sequence[Example]) -> sheet.Sheet:
    """A row per sample: image, mask, reference, painted image, map, boxes."""
    rows = [_sheet_row(example) for example in examples]
    rest = [tuple(replace(panel, title="") for panel in row) for row in rows[1:]]
    section = sheet.Section(
        rows=(rows[0], *rest),
        row_titles=tuple(str(example.row["category"]) for example in examples),
        groups=(3, 3),
        group_titles=("given", "found"),
    )
    return sheet.Sheet(sections=(section,), caption=FIGURE_CAPTION)


def _sheet_row(example: Example) -> tuple[sheet.Panel, ...]:
    row, size = example.row, GridSize(*example.generated.shape[:2])
    target = _sheet_box(row["target"], size, TARGET_COLOR)
    best = [one["generated"] for one in row["detections"].values() if one["generated"]]
    seen = tuple(_sheet_box(one["box"], size, DETECTOR_COLOR) for one in best)
    ours = (("i2am", OURS_COLOR), ("i2am_inverted", INVERTED_COLOR))
    found = [_sheet_box(row["boxes"][name], size, c) for name, c in ours if row["boxes"][name]]
    scores = [number(row["iou"]["generated"][name], 2) for name, _ in ours]
    masked = np.where(example.mask[..., None], np.uint8(255), example.image)
    return (
        sheet.Panel(picture=example.image, boxes=(target,), title="image"),
        sheet.Panel(picture=masked, outline=example.mask, title="mask"),
        sheet.Panel(picture=example.reference, title="reference"),
        sheet.Panel(picture=example.generated, boxes=seen, title="painted"),
        sheet.Panel(picture=example.generated, heat=example.heat, title="map"),
        sheet.Panel(picture=example.generated, boxes=(target, *found), title="boxes", note=f"IoU {' / '.join(scores)}"),
    )


def _sheet_box(box: Sequence[float], size: GridSize, color: str) -> sheet.Box:
    """A box in pixels as one in shares of the picture.

    >>> _sheet_box((2, 1, 4, 4), GridSize(8, 4), "black")
    Box(top=0.125, left=0.5, height=0.375, width=0.5, color='black')
    """
    left, top, right, bottom = boxes.Box(*box).scaled(size, GridSize(1, 1))
    return sheet.Box(top, left, bottom - top, right - left, color)


# ---- i2am report -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DetectionSet:
    """Experiments whose tables and figures will be written, by their names in files."""

    inputs: Mapping[str, Detected]
    origins: Mapping[str, Mapping[str, Any]]
    """What made each."""

    def write(self, folder: Path, formats: Sequence[str], dpi: int) -> tuple[dict[str, Any], list[pages.Section]]:
        """Write ``tables/*`` and ``figures/*`` of each; the index of them, and the page's sections."""
        index: dict[str, Any] = {"tables": [], "figures": [], "left_out": {}}
        shown: list[pages.Section] = []
        for label, detected in self.inputs.items():
            made_by = self._made_by(label)
            for table in tables_of(detected.results):
                index["tables"].append(write_table(table, folder, f"{table.name}-{label}", [made_by]))
            drawing = _drawing_of(detected.examples)
            if drawing is None:
                index["left_out"][f"samples of {label}"] = "'i2am detect' with pictures=N"
            else:
                description = f"{FIGURE_CAPTION}\nMade by '{command_line()}' from\n{made_by}"
                files = write_figure(drawing, folder, f"{KIND}-{label}", formats, dpi, description)
                about = {"figure": KIND, "paper": "section 5.1", "caption": FIGURE_CAPTION}
                index["figures"].append({**about, "files": files, "inputs": [label]})
            shown += _sections(detected, drawing, label)
        return index | {"detections": {n: dict(origin) for n, origin in self.origins.items()}}, shown

    def _made_by(self, label: str) -> str:
        origin = self.origins[label]
        return (
            f"{label}: '{origin['command']}', pipeline {origin['settings']['pipeline']}, "
            f"data {origin['data']}, code {pages.code_state(origin['git'])}"
        )


def plan_detections(folders: Sequence[Path]) -> DetectionSet:
    """Read the experiments in folders of ``i2am detect``; each is called by its folder.

    Raises:
        RunFolderError: a folder is not one of ``i2am detect``, or its run did not come to its end.

    >>> plan_detections([])
    DetectionSet(inputs={}, origins={})
    """
    places = dict(zip(numbered([folder.name for folder in folders]), folders, strict=True))
    return DetectionSet(
        {label: read_detected(folder) for label, folder in places.items()},
        {label: origin_of(folder) for label, folder in places.items()},
    )
