"""The object detection experiment written down: tables, a figure of samples, a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from i2am_train.experiments.detection.results import Detected, Example, Results
from i2am_train.experiments.detection.tables import tables_of
from i2am_train.files import write_text
from i2am_train.metrics.boxes import Box as PixelBox
from i2am_train.reporting.figures.canvas import OKABE_ITO, save_figure
from i2am_train.reporting.figures.sheet import Box, Sheet, draw_sheet
from i2am_train.reporting.figures.sheet import Cell as SheetCell
from i2am_train.reporting.figures.sheet import Section as SheetSection
from i2am_train.reporting.pages import Picture as PagePicture
from i2am_train.reporting.pages import Section, embedded_figure, page_environment
from i2am_train.reporting.provenance import provenance_rows
from i2am_train.reporting.table import LATEX_NEEDS, html, latex, markdown, number
from i2am_train.types import GridSize

TARGET_COLOR, OURS_COLOR, INVERTED_COLOR, DETECTOR_COLOR = (
    OKABE_ITO[2],
    OKABE_ITO[1],
    OKABE_ITO[5],
    OKABE_ITO[3],
)
FIGURE = "figures/samples.png"
WIDTH, DPI = 7.0, 220
"""Width of the figure in inches, and its pixels per inch."""
FIGURE_CAPTION = (
    "Samples: the image with the object's box (green), what is painted anew, the reference, the "
    "painted image with the detectors' best boxes (pink), the unified map on it, and the boxes found "
    "(orange: I²AM, blue: inverted map, green: the object's). Numbers: IoU of I²AM and of the "
    "inverted map."
)


def write_report(detected: Detected) -> Path:
    """Write ``results.md``, ``results.tex``, the figure and ``report.html`` into the experiment's folder.

    Nothing but what the folder keeps is read: the page can be made again without model and data.

    Returns:
        The path of the page.
    """
    folder, tables = detected.folder, tables_of(detected.results)
    write_text(folder / "results.md", "\n".join(map(markdown, tables)))
    write_text(folder / "results.tex", "\n".join((LATEX_NEEDS, *map(latex, tables))))
    drawing = drawing_of(detected.examples)
    if drawing is not None:
        save_figure(drawing, folder / FIGURE, dpi=DPI)
    write_text(folder / "report.html", page(detected.results, sections(detected, drawing)))
    return folder / "report.html"


def drawing_of(examples: Sequence[Example]) -> Figure | None:
    """The figure of samples; None where no pictures were kept."""
    return draw_sheet(sample_sheet(examples), WIDTH) if examples else None


def sections(detected: Detected, drawing: Figure | None, label: str = "") -> list[Section]:
    """What a page shows of the experiment: its tables, then the figure.

    Args:
        detected: the experiment.
        drawing: its figure, from ``drawing_of``.
        label: before each title, where a page shows several experiments.
    """
    before = f"{label}: " if label else ""
    found = [
        Section(before + table.caption, html=html(table), notes=list(table.notes))
        for table in tables_of(detected.results)
    ]
    if drawing is not None:
        names = ", ".join(example.row["name"] for example in detected.examples)
        alt = f"Rows of pictures: {names}."
        picture = PagePicture(embedded_figure(drawing, DPI), FIGURE_CAPTION, alt)
        found.append(Section(f"{before}Samples", pictures=[picture]))
    return found


def page(results: Results, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    bench = results["bench"]
    facts = [(str(bench["samples"]), "objects"), (str(bench["images"]), "images in the dataset")]
    if detectors := results["miou"]["real"]:
        facts.append((str(len(detectors)), "detectors"))
    return (
        page_environment()
        .get_template("paper.html.j2")
        .render(
            title="Object detection from the attention of Paint-by-Example",
            facts=facts,
            sections=sections,
            making=list(provenance_rows(results["manifest"])),
            left_out={},
            settings=json.dumps(results["settings"], indent=2, default=str),
            inputs={},
        )
    )


# ---- figure ------------------------------------------------------------------------------------


def sample_sheet(examples: Sequence[Example]) -> Sheet:
    """A row per sample: image, mask, reference, painted image, map, boxes."""
    rows = [_sheet_row(example) for example in examples]
    rest = [tuple(replace(cell, title="") for cell in row) for row in rows[1:]]
    section = SheetSection(
        rows=(rows[0], *rest),
        row_titles=tuple(str(example.row["category"]) for example in examples),
        groups=(3, 3),
        group_titles=("given", "found"),
    )
    return Sheet(sections=(section,), caption=FIGURE_CAPTION)


def _sheet_row(example: Example) -> tuple[SheetCell, ...]:
    row, size = example.row, GridSize(*example.generated.shape[:2])
    target = sheet_box(row["target"], size, TARGET_COLOR)
    best = [found["generated"] for found in row["detections"].values() if found["generated"]]
    seen = tuple(sheet_box(one["box"], size, DETECTOR_COLOR) for one in best)
    ours = (("i2am", OURS_COLOR), ("i2am_inverted", INVERTED_COLOR))
    boxes = [sheet_box(row["boxes"][name], size, c) for name, c in ours if row["boxes"][name]]
    scores = [number(row["iou"]["generated"][name], 2) for name, _ in ours]
    masked = np.where(example.mask[..., None], np.uint8(255), example.image)
    return (
        SheetCell(picture=example.image, boxes=(target,), title="image"),
        SheetCell(picture=masked, outline=example.mask, title="mask"),
        SheetCell(picture=example.reference, title="reference"),
        SheetCell(picture=example.generated, boxes=seen, title="painted"),
        SheetCell(picture=example.generated, heat=example.heat, title="map"),
        SheetCell(
            picture=example.generated,
            boxes=(target, *boxes),
            title="boxes",
            note=f"IoU {' / '.join(scores)}",
        ),
    )


def sheet_box(box: Sequence[float], size: GridSize, color: str) -> Box:
    """A box in pixels as one in shares of the picture.

    >>> sheet_box((2, 1, 4, 4), GridSize(8, 4), "black")
    Box(top=0.125, left=0.5, height=0.375, width=0.5, color='black')
    """
    left, top, right, bottom = PixelBox(*box).scaled(size, GridSize(1, 1))
    return Box(top, left, bottom - top, right - left, color)
