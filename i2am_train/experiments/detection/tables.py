"""Tables 1 and 3 of the paper, filled by the object detection experiment (paper section 5.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from i2am_train.metrics.boxes import METHOD_LABELS, METHODS_OF_MAPS
from i2am_train.reporting.formatting import interval_text, minus, number, percent
from i2am_train.reporting.table import Cell, Heading, Row, Table, with_best
from i2am_train.results.statistics import few_samples_note

DIGITS = 4
"""As the paper prints mean IoU."""
SUPERVISED, UNSUPERVISED = "Supervised, seen dataset", "Unsupervised, unseen dataset"
KINDS = {"real": "Real images", "generated": "Generated images"}
LEFT_OUT_MARK = "†"

Results = Mapping[str, Any]
"""Content of ``results.json``."""

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
    """The paper's tables that the experiment fills, in their order."""
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
        notes=notes(results),
    )


def _rows(results: Results, title: str, names: Sequence[str], paper: bool) -> Iterator[Row]:
    """The methods of one group of rows."""
    ranked = [LEFT_OUT_MARK not in label(name) for name in names]
    columns: list[Sequence[Cell | None]] = []
    for kind in KINDS:
        scores = [results["miou"][kind].get(name) for name in names]
        columns.append(with_best([score and score_cell(score) for score in scores], True, ranked))
        columns.append([score and Cell.of(score["n"], 0) for score in scores])
    if paper:
        columns += [[published_cell(published_iou(n, kind)) for n in names] for kind in KINDS]
    for name, *cells in zip(names, *columns, strict=True):
        yield Row(label(name), tuple(cells), title)


def score_cell(score: Mapping[str, Any]) -> Cell | None:
    """A mean IoU with its interval; None where no image counts."""
    if score["mean"] is None:
        return None
    interval = None if score["low"] is None else (score["low"], score["high"])
    return Cell.of(score["mean"], DIGITS, interval=interval)


def published_cell(value: float | None) -> Cell | None:
    """A number of the paper."""
    return None if value is None else Cell.of(value, DIGITS)


def threshold_table(results: Results) -> Table:
    """Table 3: mean IoU by threshold, of the same maps."""
    deltas, swept = results["thresholds"], results["miou"]["sweep"]
    rows = {
        label(name): with_best([score_cell(swept[swept_name(name, delta)]) for delta in deltas], True)
        for name in METHODS_OF_MAPS
    }
    if _is_coco(results):
        rows["Paper"] = [published_cell(TABLE_3.get(delta)) for delta in deltas]
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


def notes(results: Results) -> tuple[str, ...]:
    """What a reader must know to judge the table."""
    bench, settings, missed = results["bench"], results["settings"], results["missed"]
    scores, coco = results["miou"]["generated"], _is_coco(results)
    counted = "count like others" if settings["crowds"] else "are left out"
    of = "of the object's category" if settings["match_category"] else "of any category"
    found = (
        f"Bench: of each of the {bench['images']} images the first annotation whose box covers 10–30 % of it, which "
        f"gives {bench['samples']} objects ({bench['crowds']} of them crowds, which {counted}), on average "
        f"{percent(bench['mean_share'])} of their image. All boxes are compared in one frame, that of the generated "
        f"image ({settings['height']}x{settings['width']}); real images are resized to it.",
        ""
        if coco
        else "These are made pictures of coloured shapes: the table shows that the experiment runs, not "
        "what a model can do. Give root=FOLDER for COCO.",
        ""
        if results["functional"]
        else "Not functional: the model's reference is one token, and a softmax over one "
        "key is 1 whatever the attention says. The maps probe the geometry that the weights inherited from the text "
        "model; no pixel depends on them.",
        "DAAM's softmax runs over the reference: with one token its map is the same everywhere, so its box is the "
        "whole image (paper A.7).",
        f"I²AM: extents of the largest region of the unified map of the nine decoder layers above δ = "
        f"{settings['delta']:g}; a map without such a region counts 0 ({missed['i2am']} samples; inverted, 1 − map as "
        f"the authors show it: {missed['i2am_inverted']}).",
        f"{LEFT_OUT_MARK} By the authors' scripts, which leave samples out of the mean: without a contour "
        f"({scores['i2am_authors']['left_out']}), and of random boxes those that miss the object "
        f"({scores['random_authors']['left_out']}). Their map: 15 layers, inverted. Not ranked; one frame here, where "
        "theirs has two.",
        f"Detectors: the box of the highest score {of}; images whose score is at most {settings['score']:g} are left "
        "out, so that rows are means over different images (column images)."
        if results["miou"]["real"]
        else "",
        "Brackets: 95 % bootstrap (BCa) over samples of one seed. Bold and underlined: best and second of its group."
        f"{_few_samples(results)}",
        _difference_note(results),
        "Paper: Table 1, of COCO val2017 with the authors' code; it does not say how many images." if coco else "",
    )
    return tuple(filter(None, found))


def _few_samples(results: Results) -> str:
    scores = [score for of in results["miou"].values() for score in of.values()]
    counts = [score["n"] for score in scores if score["low"] is not None]
    return few_samples_note(min(counts)) if counts else ""


def _difference_note(results: Results) -> str:
    texts = []
    for entry in results["differences"]:
        interval = None if entry["low"] is None else (entry["low"], entry["high"])
        value = number(entry["difference"], DIGITS, signed=True)
        versus = f"{label(entry['method'])} − {label(entry['against'])}"
        texts.append(f"{versus} {value} {interval_text(interval, DIGITS)}".rstrip())
    return minus(f"Paired over samples: {'; '.join(texts)}.")
