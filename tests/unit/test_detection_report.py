"""The detection experiment written down: what is ranked, printed beside the paper and said; what a report takes in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from i2am_train.config.store import compose
from i2am_train.detection.report import (
    KIND,
    SCHEMA,
    Example,
    main_table,
    published_iou,
    read_detected,
    sample_sheet,
    threshold_table,
    write_examples,
)
from i2am_train.evaluation.explanation import Explanation
from i2am_train.files import write_json, write_text
from i2am_train.reporting import table as formats
from i2am_train.results.run_files import RESULTS, SAMPLES
from i2am_train.runs import RunFolder
from i2am_train.workflows.report import report

YOLO, MASKFORMER = "hustvl/yolos-tiny", "facebook/maskformer-swin-tiny-coco"


def score(mean: float | None, n: int = 40) -> dict[str, Any]:
    ends = {"low": None, "high": None} if mean is None else {"low": mean - 0.01, "high": mean + 0.01}
    return {"mean": mean, **ends, "confidence": 0.95, "n": n, "left_out": 40 - n}


@pytest.fixture
def results() -> dict[str, Any]:
    ours = {"i2am": 0.25, "i2am_inverted": 0.22, "i2am_authors": 0.9}
    simple = {"daam": 0.18, "overall": 0.18, "random": 0.2, "random_authors": 0.8}
    generated = {name: score(mean) for name, mean in (simple | ours).items()}
    sweep = {f"{name}@d{delta:g}": score(mean - delta / 10) for name, mean in ours.items() for delta in (0.2, 0.4)}
    return {
        "bench": {"images": 60, "samples": 40, "crowds": 2, "mean_share": 0.18},
        "functional": False,
        "miou": {
            "real": {YOLO: score(0.5, 30), MASKFORMER: score(0.6, 35)},
            "generated": generated | {YOLO: score(0.4, 20), MASKFORMER: score(None, 0)},
            "sweep": sweep,
        },
        "missed": {"i2am": 3, "i2am_inverted": 0, "i2am_authors": 1},
        "differences": [
            {"method": "i2am", "against": "overall", "difference": -0.07, "low": -0.1, "high": 0.02, "n": 40}
        ],
        "thresholds": [0.2, 0.4],
        "settings": {
            "root": "/coco", "crowds": True, "height": 512, "width": 384, "delta": 0.4, "score": 0.5,
            "match_category": False,
        },
    }  # fmt: skip


def cells(results: dict[str, Any], label: str) -> list[str | None]:
    row = next(row for row in main_table(results).rows if row.label.startswith(label))
    return [None if cell is None else cell.text for cell in row.cells]


def test_rows_are_the_paper_s_with_its_values_beside(results: dict[str, Any]) -> None:
    """Detectors have both columns; the paper's numbers stand beside what does the same; a missing mean is a dash."""
    assert cells(results, YOLO) == ["0.5000", "30", "0.4000", "20", None, None]
    assert cells(results, MASKFORMER) == ["0.6000", "35", None, "0", "0.3568", "0.2932"]
    assert cells(results, "Overall") == [None, None, "0.1800", "40", None, "0.1807"]
    assert cells(results, "I²AM") == [None, None, "0.2500", "40", None, None]
    assert cells(results, "I²AM, authors") == [None, None, "0.9000", "40", None, "0.2416"]
    results["settings"]["root"] = None
    assert len(cells(results, YOLO)) == 4  # made pictures are not compared with COCO


def test_the_best_is_that_of_its_group_without_those_that_leave_out(results: dict[str, Any]) -> None:
    """The authors' rules drop failures, so that their high means are no best."""
    ranks = {row.label: [cell and cell.rank for cell in row.cells] for row in main_table(results).rows}
    assert ranks[MASKFORMER][0] == 1
    assert ranks[YOLO][0] == 2
    assert ranks["I²AM"][2] == 1
    assert ranks["I²AM, inverted map"][2] == 2
    assert ranks["I²AM, authors' code †"][2] == ranks["Random 10–30 %, authors' rule †"][2] == 0


def test_notes_say_what_must_be_known(results: dict[str, Any]) -> None:
    """Counts, misses, and that the maps of one token are not functional; not what does not apply."""
    notes = "\n".join(main_table(results).notes)
    for text in (
        "40 objects (2 of them crowds, which count like others), on average 18 %",
        "Not functional",
        "counts 0 (3 samples",
        "at most 0.5 are left out",
        "I²AM − Overall (whole image) −0.0700 [−0.1000, 0.0200]",
    ):
        assert text in notes
    assert "made pictures" not in notes
    results["functional"], results["settings"]["root"] = True, None
    results["miou"]["real"] = {}
    others = "\n".join(main_table(results).notes)
    assert "made pictures" in others
    assert "Not functional" not in others
    assert "Detectors" not in others


def test_the_sweep_is_table_3(results: dict[str, Any]) -> None:
    """A column per threshold, the best of each row, the paper's row last; written in every format."""
    table = threshold_table(results)
    assert [heading.label for heading in table.headings] == ["δ = 0.2", "δ = 0.4"]
    assert [[c and (c.text, c.rank) for c in row.cells] for row in table.rows[:2]] == [
        [("0.2300", 1), ("0.2100", 2)],
        [("0.2000", 1), ("0.1800", 2)],
    ]
    assert [c and c.text for c in table.rows[-1].cells] == ["0.2413", "0.2416"]
    for made in (main_table(results), table):
        assert "I²AM, inverted map" in formats.html(made)
        assert "| I²AM, inverted map |" in formats.markdown(made).replace("Unsupervised, unseen dataset: ", "")
        assert r"I$^2$AM, inverted map &" in formats.latex(made)


def test_published_values_belong_to_their_detectors() -> None:
    """A Mask R-CNN of torchvision is the paper's; RT-DETR has no row there."""
    assert published_iou("torchvision:maskrcnn_resnet50_fpn_v2", "generated") == 0.2706
    assert published_iou("PekingU/rtdetr_r50vd", "real") is None
    assert published_iou("overall", "real") is None


@pytest.fixture
def example() -> Example:
    """A cup in a picture of 20x40, found in part."""
    picture = np.arange(20 * 40 * 3, dtype=np.uint8).reshape(20, 40, 3)
    found = {"yolo": {"real": None, "generated": {"box": [0, 0, 20, 10], "score": 0.9, "category": "cup"}}}
    row = {
        "name": "7", "category": "cup", "target": [10, 5, 30, 15], "detections": found,
        "boxes": {"i2am": [0, 0, 40, 20], "i2am_inverted": None},
        "iou": {"generated": {"i2am": 0.25, "i2am_inverted": 0.0}},
    }  # fmt: skip
    mask = np.zeros((20, 40), np.bool_)
    mask[5:15, 10:30] = True
    return Example(
        image=picture, mask=mask, reference=picture, generated=picture, heat=np.ones((4, 8)), row=row
    )  # fmt: skip


def test_a_sample_is_drawn_with_its_boxes(example: Example) -> None:
    """The object's box on the image, the detector's on the painting, those of the map at the end."""
    panels = sample_sheet([example, example]).sections[0].rows[1]
    assert [len(panel.boxes) for panel in panels] == [1, 0, 0, 1, 0, 2]
    target = panels[0].boxes[0]
    assert (target.top, target.left, target.height, target.width) == (0.25, 0.25, 0.5, 0.5)
    assert panels[-1].note == "IoU 0.25 / 0.00"
    assert (panels[1].picture[example.mask] == 255).all()


@pytest.fixture
def experiment(results: dict[str, Any], example: Example, tmp_path: Path) -> Path:
    """A finished folder as `i2am detect` leaves it, without images and maps."""
    settings = results["settings"] | {"pipeline": "pbe"}
    folder = RunFolder.open(tmp_path / "experiment", settings)
    folder.start(data="d0")
    kept = {"schema": SCHEMA, "kind": KIND, **results, "settings": settings, "manifest": {}}
    write_json(folder / RESULTS, kept)
    write_text(folder / SAMPLES, json.dumps(example.row) + "\n")
    write_examples(folder.path, [example])
    folder.finish()
    return folder.path


def test_examples_come_back(experiment: Path, example: Example) -> None:
    """Every picture and the map, bit for bit, with the row of their sample; none where none are wanted."""
    (read,) = read_detected(experiment).examples
    for name in ("image", "mask", "reference", "generated", "heat"):
        assert np.array_equal(getattr(read, name), getattr(example, name)), name
        assert getattr(read, name).dtype == getattr(example, name).dtype
    assert read.row == example.row
    write_examples(experiment, [])
    assert read_detected(experiment).examples == ()


def test_one_report_holds_both_kinds_of_figures(
    experiment: Path,
    make_explained: Callable[..., Explanation],
    write_explained_run: Callable[[Explanation, Path], Path],
    tmp_path: Path,
) -> None:
    """What explained samples and experiments give is joined: in the index, on the page, in what it says of inputs."""
    explained = write_explained_run(make_explained(), tmp_path / "explained")
    options = [f"explained=[{explained}]", f"detected=[{experiment}]", "figures=[daam]"]
    written = ["formats=[png]", "dpi=60", f"output={tmp_path / 'report'}"]
    folder = report(compose("report", [*options, *written]))
    index = json.loads((folder / "index.json").read_text())
    assert [entry["figure"] for entry in index["figures"]] == ["daam", "detection"]
    assert len(index["tables"]) == 2
    assert all((folder / f).is_file() for e in index["figures"] + index["tables"] for f in e["files"])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 2
    for name in ("explained", "experiment"):
        assert f"<summary>{name}</summary>" in page
    assert "<b>1</b> detection experiments" in page
