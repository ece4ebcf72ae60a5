"""The object detection experiment written down: Tables 1 and 3, a figure of samples, a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from i2am_train.experiments.detection.results import Detected, Example, Results
from i2am_train.metrics.boxes import METHOD_LABELS, METHODS_OF_MAPS
from i2am_train.metrics.boxes import Box as PixelBox
from i2am_train.reporting import score_table_formats as formats
from i2am_train.reporting.figures.canvas import OKABE_ITO, save_figure
from i2am_train.reporting.figures.sheet import Box, Sheet, draw_sheet
from i2am_train.reporting.figures.sheet import Cell as SheetCell
from i2am_train.reporting.figures.sheet import Section as SheetSection
from i2am_train.reporting.pages import Picture as PagePicture
from i2am_train.reporting.pages import Section, embedded_figure, page_environment, provenance_rows
from i2am_train.reporting.published import TABLE_3, published_iou
from i2am_train.reporting.score_tables import Cell, Heading, Row, ScoreTable
from i2am_train.reporting.table_formats import minus
from i2am_train.reporting.tables import (
    few_samples_note,
    interval_text,
    number,
    percent,
    printed_ranks,
)
from i2am_train.runs import write_text
from i2am_train.types import GridSize

DIGITS = 4
"""As the paper prints mean IoU."""
SUPERVISED, UNSUPERVISED = "Supervised, seen dataset", "Unsupervised, unseen dataset"
KINDS = {"real": "Real images", "generated": "Generated images"}
LEFT_OUT_MARK = "†"

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
    write_text(folder / "results.md", "\n".join(map(formats.markdown, tables)))
    latex = "\n".join(map(formats.latex, tables))
    write_text(folder / "results.tex", f"% Needs \\usepackage{{booktabs}}.\n{latex}")
    drawing = drawing_of(detected.examples)
    if drawing is not None:
        save_figure(drawing, folder / FIGURE, dpi=DPI)
    write_text(folder / "report.html", page(detected.results, sections(detected, drawing)))
    return folder / "report.html"


def tables_of(results: Results) -> tuple[ScoreTable, ...]:
    """The paper's tables that the experiment fills, in their order."""
    return main_table(results), threshold_table(results)


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
        Section(f"{before}{t.title} ({t.source})", html=formats.html(t), notes=list(t.notes))
        for t in tables_of(detected.results)
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


# ---- tables ------------------------------------------------------------------------------------


def main_table(results: Results) -> ScoreTable:
    """Table 1: methods by mean IoU on real and on generated images.

    Ranks are within a group of rows; methods that leave out samples (†) take no part.
    """
    compared = _is_coco(results)
    headings = [
        heading
        for title in KINDS.values()
        for heading in (Heading("mIoU", "↑", title), Heading("images", "", title))
    ]
    if compared:
        headings += [Heading(title.split()[0].lower(), "", "Paper") for title in KINDS.values()]
    ranks = {kind: _ranks(results, kind) for kind in KINDS}
    groups = ((SUPERVISED, list(results["miou"]["real"])), (UNSUPERVISED, list(METHOD_LABELS)))
    rows = [
        Row(label(name), tuple(_cells(results, name, ranks, compared)), group)
        for group, names in groups
        for name in names
    ]
    return ScoreTable(
        name="detection",
        title="Object detection",
        source="paper Table 1",
        corner="Method",
        headings=tuple(headings),
        rows=tuple(rows),
        notes=notes(results),
    )


def label(method: str) -> str:
    """How tables call a method: by our name; a detector by its own, without the folders that lead to it.

    >>> label("/models/yolos-tiny"), label("hustvl/yolos-tiny"), label("torchvision:ssd300_vgg16@/models/ssd.pth")
    ('yolos-tiny', 'hustvl/yolos-tiny', 'torchvision:ssd300_vgg16@ssd.pth')
    """
    network, at, file = method.rpartition("@")
    name = Path(file).name if at or Path(file).is_absolute() else file
    return METHOD_LABELS.get(method, f"{network}{at}{name}")


def _ranks(results: Results, kind: str) -> dict[str, int]:
    of_kind = results["miou"][kind]
    means = {
        name: score["mean"]
        for name, score in of_kind.items()
        if score["mean"] is not None and LEFT_OUT_MARK not in label(name)
    }
    ranks: dict[str, int] = {}
    for supervised in (True, False):
        group = {
            name: mean for name, mean in means.items() if (name not in METHOD_LABELS) == supervised
        }
        ranks |= printed_ranks(group, DIGITS, True)
    return ranks


def _cells(
    results: Results, name: str, ranks: Mapping[str, Mapping[str, int]], compared: bool
) -> Iterator[Cell | None]:
    for kind in KINDS:
        score = results["miou"][kind].get(name)
        yield score and score_cell(score, ranks[kind].get(name, 0))
        yield score and Cell(str(score["n"]), score["n"])
    if compared:
        for kind in KINDS:
            value = published_iou(name, kind)
            yield None if value is None else Cell(number(value, DIGITS), value)


def score_cell(score: Mapping[str, Any], rank: int = 0) -> Cell | None:
    """A mean IoU with its interval; None where no image counts."""
    if score["mean"] is None:
        return None
    interval = None if score["low"] is None else (score["low"], score["high"])
    return Cell(
        text=number(score["mean"], DIGITS),
        value=score["mean"],
        interval=interval,
        interval_text=interval_text(interval, DIGITS),
        rank=rank,
    )


def threshold_table(results: Results) -> ScoreTable:
    """Table 3: mean IoU by threshold, of the same maps."""
    deltas = results["thresholds"]
    swept = results["miou"]["sweep"]
    rows = []
    for name in METHODS_OF_MAPS:
        scores = [swept[swept_name(name, delta)] for delta in deltas]
        ranks = printed_ranks(
            {str(i): s["mean"] for i, s in enumerate(scores) if s["mean"] is not None}, DIGITS, True
        )
        cells = (score_cell(score, ranks.get(str(i), 0)) for i, score in enumerate(scores))
        rows.append(Row(label(name), tuple(cells)))
    if _is_coco(results):
        values = [TABLE_3.get(delta) for delta in deltas]
        paper = (None if v is None else Cell(number(v, DIGITS), v) for v in values)
        rows.append(Row("Paper", tuple(paper)))
    return ScoreTable(
        name="detection_thresholds",
        title="Threshold of the map",
        source="paper Table 3",
        corner="Method",
        headings=tuple(Heading(f"δ = {delta:g}", "", "mIoU, generated images") for delta in deltas),
        rows=tuple(rows),
        notes=(
            "Every threshold is of the same maps and images. Bold: best of a row.",
            "The authors' script takes a percentile of the thresholded map, so that δ hardly matters there.",
        ),
    )


def swept_name(method: str, delta: float) -> str:
    """A method at one threshold of the sweep.

    >>> swept_name("i2am", 0.4)
    'i2am@d0.4'
    """
    return f"{method}@d{delta:g}"


def _is_coco(results: Results) -> bool:
    return results["settings"]["root"] is not None


def notes(results: Results) -> tuple[str, ...]:
    """What a reader must know to judge the table."""
    found = (_bench_note, _made_note, _functional_note, _daam_note, _ours_note, _authors_note)
    more = (_detector_note, _interval_note, _difference_note, _paper_note)
    return tuple(note for make in (*found, *more) if (note := make(results)))


def _bench_note(results: Results) -> str:
    bench, settings = results["bench"], results["settings"]
    counted = "count like others" if settings["crowds"] else "are left out"
    return (
        f"Bench: of each of the {bench['images']} images the first annotation whose box covers 10–30 % of it, which "
        f"gives {bench['samples']} objects ({bench['crowds']} of them crowds, which {counted}), on average "
        f"{percent(bench['mean_share'])} of their image. All boxes are compared in one frame, that of the generated "
        f"image ({settings['height']}x{settings['width']}); real images are resized to it."
    )


def _made_note(results: Results) -> str:
    if _is_coco(results):
        return ""
    return (
        "These are made pictures of coloured shapes: the table shows that the experiment runs, not what a model can "
        "do. Give root=FOLDER for COCO."
    )


def _functional_note(results: Results) -> str:
    if results["functional"]:
        return ""
    return (
        "Not functional: the model's reference is one token, and a softmax over one key is 1 whatever the attention "
        "says. The maps probe the geometry that the weights inherited from the text model; no pixel depends on them."
    )


def _daam_note(results: Results) -> str:
    return (
        "DAAM's softmax runs over the reference: with one token its map is the same everywhere, so its box is the "
        "whole image (paper A.7)."
    )


def _ours_note(results: Results) -> str:
    missed = results["missed"]
    return (
        f"I²AM: extents of the largest region of the unified map of the nine decoder layers above δ = "
        f"{results['settings']['delta']:g}; a map without such a region counts 0 ({missed['i2am']} samples; inverted, "
        f"1 − map as the authors show it: {missed['i2am_inverted']})."
    )


def _authors_note(results: Results) -> str:
    scores = results["miou"]["generated"]
    return (
        f"{LEFT_OUT_MARK} By the authors' scripts, which leave samples out of the mean: without a contour "
        f"({scores['i2am_authors']['left_out']}), and of random boxes those that miss the object "
        f"({scores['random_authors']['left_out']}). Their map: 15 layers, inverted. Not ranked; one frame here, where "
        "theirs has two."
    )


def _detector_note(results: Results) -> str:
    if not results["miou"]["real"]:
        return ""
    settings = results["settings"]
    of = "of the object's category" if settings["match_category"] else "of any category"
    return (
        f"Detectors: the box of the highest score {of}; images whose score is at most {settings['score']:g} are left "
        "out, so that rows are means over different images (column images)."
    )


def _interval_note(results: Results) -> str:
    counts = [
        score["n"]
        for scores in results["miou"].values()
        for score in scores.values()
        if score["low"] is not None
    ]
    note = (
        "Brackets: 95 % bootstrap (BCa) over samples of one seed. Bold and underlined: best and second "
        "of its group."
    )
    return note + few_samples_note(min(counts)) if counts else note


def _difference_note(results: Results) -> str:
    texts = []
    for entry in results["differences"]:
        interval = None if entry["low"] is None else (entry["low"], entry["high"])
        value = number(entry["difference"], DIGITS, signed=True)
        versus = f"{label(entry['method'])} − {label(entry['against'])}"
        texts.append(f"{versus} {value} {interval_text(interval, DIGITS)}".rstrip())
    return minus(f"Paired over samples: {'; '.join(texts)}.")


def _paper_note(results: Results) -> str:
    if not _is_coco(results):
        return ""
    return (
        "Paper: Table 1, of COCO val2017 with the authors' code; it does not say how many images."
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
