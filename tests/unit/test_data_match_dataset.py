"""Matching a dataset: files, mark and report; going on; what is refused. The matches: test_data_matching.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from i2am_train.config.data import DataMatchConfig
from i2am_train.data.dataset import Reading, TryOnDataset, require_correspondence
from i2am_train.data.dataset_report import check_dataset
from i2am_train.data.match_dataset import MatchReport, match_dataset
from i2am_train.data.matching import Garment, matched, sift_source
from i2am_train.data.picture_files import (
    encode_correspondence,
    read_confidence,
    read_correspondence,
    read_mask,
    read_rgb,
    write_picture,
)
from i2am_train.data.poses import read_parts
from i2am_train.data.synthetic import make_dataset
from i2am_train.errors import DataError
from i2am_train.types import GridSize, Pairing, Split
from tests.support.commands import exit_status

SIZE = GridSize(128, 96)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn samples, some of whose garments have something printed on them."""
    root = tmp_path_factory.mktemp("truth") / "set"
    make_dataset(root, 6, 2, SIZE, 21, workers=1, progress=False)
    return root


def without_correspondence(truth: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(truth, folder / "copy"))
    for there in copy.glob("*/correspondence"):
        shutil.rmtree(there)
    return copy


@pytest.fixture
def copy(truth: Path, tmp_path: Path) -> Path:
    return without_correspondence(truth, tmp_path)


@pytest.fixture(scope="module")
def done(truth: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MatchReport]:
    """A dataset that was matched, and what was said."""
    copy = without_correspondence(truth, tmp_path_factory.mktemp("matched"))
    return copy, found(copy, preview=True)


def found(root: Path, **options: object) -> MatchReport:
    return match_dataset(DataMatchConfig(root=root, workers=1, **options), progress=False)  # type: ignore[arg-type]


def files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.glob("*/correspondence/*")}


def test_what_is_read_is_near_to_the_truth_and_nowhere_else(done: tuple[Path, MatchReport], truth: Path) -> None:
    off, worn = [], 0
    pairs = [TryOnDataset(root, Split.TRAIN, Pairing.PAIRED, SIZE) for root in (done[0], truth)]
    for ours, true in zip(*pairs, strict=True):
        known = ~ours["correspondence"].isnan().any(dim=-1)
        assert not (known & ~true["warped_garment_mask"]).any()
        distance = ((ours["correspondence"] - true["correspondence"]).numpy() * SIZE)[known.numpy()]
        off.append(np.linalg.norm(distance, axis=-1))
        worn += int(true["warped_garment_mask"].sum())
    errors = np.concatenate(off)
    errors = errors[~np.isnan(errors)]  # the mask, a JPEG, is a pixel wider here and there
    assert len(errors) / worn > 0.05
    assert np.median(errors) < 0.8
    assert np.mean(errors > 3) < 0.05


def test_the_report_says_what_lies_in_the_files(done: tuple[Path, MatchReport]) -> None:
    root, report = done
    said = json.loads((root / "matched.json").read_text())
    assert said == report.to_dict()
    assert (said["method"], said["made"], said["kept"], said["refused"]) == ("sift", 8, 0, [])
    assert {part: len(of) for part, of in said["samples"].items()} == {"train": 6, "test": 2}
    for part, of in said["samples"].items():
        for name, one in of.items():
            known = ~np.isnan(read_correspondence(root / part / "correspondence" / f"{name}.png")[..., 0])
            mask = read_mask(root / part / "gt_cloth_warped_mask" / f"{name}.jpg")
            assert one["coverage"] == pytest.approx(known.sum() / mask.sum(), abs=1e-5)
            assert (one["matches"] >= 5) == known.any()
            assert one["parts"] is True
    assert sum(one["coverage"] > 0.1 for one in said["samples"]["train"].values()) >= 2


def test_files_hold_what_the_module_finds(done: tuple[Path, MatchReport]) -> None:
    folder = done[0] / "train"
    name = max(done[1].samples["train"], key=lambda one: done[1].samples["train"][one].coverage)
    worn, flat = (
        Garment(read_rgb(folder / picture / f"{name}.jpg"), read_mask(folder / mask / f"{name}.jpg"))
        for picture, mask in (("image", "gt_cloth_warped_mask"), ("cloth", "cloth-mask"))
    )
    parts = read_parts(folder / "image-densepose" / f"{name}.jpg")
    expected = matched(worn, flat, [sift_source(worn, flat)], parts)
    file = folder / "correspondence" / f"{name}.png"
    assert np.allclose(read_correspondence(file), expected.correspondence, atol=1 / 65535, equal_nan=True)
    known = ~np.isnan(expected.correspondence[..., 0])
    assert np.allclose(read_confidence(file)[known], expected.confidence[known], atol=1e-4)
    assert np.isnan(read_confidence(file)[~known]).all()


def test_the_confidence_of_the_truth_is_one(truth: Path) -> None:
    confidence = read_confidence(next((truth / "train/correspondence").iterdir()))
    assert set(np.unique(confidence[~np.isnan(confidence)])) == {1.0}


def test_confidence_is_kept_and_places_stay_as_they_were(tmp_path: Path) -> None:
    places = np.random.default_rng(0).random((5, 4, 2)).astype(np.float32)
    places[0, 0] = np.nan
    confidence = np.random.default_rng(1).random((5, 4)).astype(np.float32)
    confidence[1, 1] = 0.0
    write_picture(tmp_path / "a.png", encode_correspondence(places, confidence))
    assert np.allclose(read_correspondence(tmp_path / "a.png"), places, atol=1e-5, equal_nan=True)
    back: NDArray[np.float32] = read_confidence(tmp_path / "a.png")
    assert np.isnan(back[0, 0])
    assert np.allclose(back.ravel()[1:], confidence.ravel()[1:], atol=2e-5)


def test_a_matched_dataset_passes_the_check(done: tuple[Path, MatchReport]) -> None:
    report = check_dataset(done[0], progress=False)
    assert report.findings == []


def test_previews_show_matches_and_what_they_carry(done: tuple[Path, MatchReport]) -> None:
    sheets = sorted((done[0] / "previews/matches/train").iterdir())
    assert len(sheets) == 6
    coverage = done[1].samples["train"]
    for sheet in sheets:
        picture = cv2.imread(str(sheet))
        assert picture is not None
        assert picture.shape == (480, 1080, 3)
        coloured = np.ptp(picture[:, 720:], axis=-1) > 40  # what is not known is grey
        assert (coloured.mean() > 0.01) == (coverage[sheet.stem].coverage > 0.03)


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_second_call_makes_what_is_missing_alone(done: tuple[Path, MatchReport], tmp_path: Path) -> None:
    root = Path(shutil.copytree(done[0], tmp_path / "again"))
    before, report = files(root), done[1]
    for name in ("00001_00", "00003_00"):
        (root / f"train/correspondence/{name}.png").unlink()
    kept = root / "train/correspondence/00002_00.png"
    there = kept.stat().st_mtime_ns
    again = found(root)
    assert (again.made, again.kept) == (2, 6)
    assert kept.stat().st_mtime_ns == there
    assert files(root) == before
    assert again.samples == report.samples  # also the numbers of matches of those that were kept


def test_the_mark_is_there_before_the_first_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops it, no correspondence is left that could be taken for the truth."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt("stopped")

    monkeypatch.setattr("i2am_train.data.match_dataset.write_picture", killed)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        found(copy)
    assert json.loads((copy / "matched.json").read_text())["method"] == "sift"
    assert files(copy) == {}
    monkeypatch.undo()
    assert found(copy).made == 8


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_correspondence_of_others_is_never_overwritten(truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(truth)
    assert exit_status("data match", [f"root={truth}"]) == 2
    said = capsys.readouterr().err
    assert "train/correspondence holds a correspondence that this command did not make" in said
    assert "it may be the true one" in said
    assert files(truth) == before
    assert not (truth / "matched.json").exists()


@pytest.mark.parametrize("folder", ["cloth", "cloth-mask", "gt_cloth_warped_mask"])
def test_without_garment_or_masks(copy: Path, folder: str) -> None:
    shutil.rmtree(copy / "test" / folder)
    with pytest.raises(DataError, match=rf"test has no folder '{folder}'.*Nothing was written"):
        found(copy)
    assert not (copy / "matched.json").exists()


def test_another_method_s_files_are_not_mixed_in(done: tuple[Path, MatchReport], tmp_path: Path) -> None:
    root = Path(shutil.copytree(done[0], tmp_path / "other"))
    report = root / "matched.json"
    report.write_text(report.read_text().replace('"sift"', '"other"'))
    with pytest.raises(DataError, match="made with method=other, and method=sift is asked for"):
        found(root)


def test_one_bad_sample_stops_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = copy / "train/gt_cloth_warped_mask"
    write_picture(masks / "00001_00.jpg", np.zeros(SIZE, np.bool_))
    write_picture(masks / "00002_00.jpg", np.ones((64, 48), np.bool_))
    (copy / "train/cloth/00003_00.jpg").unlink()
    assert exit_status("data match", [f"root={copy}", "workers=2"]) == 1
    said = capsys.readouterr().out
    assert "5 made by sift, 0 kept, 3 refused" in said
    reasons = [one["reason"] for one in json.loads((copy / "matched.json").read_text())["refused"]]
    for reason, expected in zip(
        reasons, ("it shows no garment", "is 64x48 (height x width)", "00003_00.jpg"), strict=True
    ):
        assert expected in reason
    assert len(files(copy)) == 5


def test_body_parts_are_left_out_where_a_pose_picture_is_not_densepose_s(copy: Path) -> None:
    shutil.copy(copy / "train/image/00000_00.jpg", copy / "train/image-densepose/00000_00.jpg")
    report = found(copy)
    assert [one.parts for one in report.samples["train"].values()] == [False, *[True] * 5]


# -- the mark ----------------------------------------------------------------------------------------------------------


def test_the_mark_travels_into_results(
    overrides: list[str], small_dataset: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    """An evaluation of matched data says so in its protocol; one of true data says nothing new."""
    copy = Path(shutil.copytree(small_dataset, tmp_path / "data"))
    options = [*overrides, f"checkpoint={small_checkpoint}", "sampling.steps=1", "evaluation.samples=2", "device=cpu",
               "evaluation.metrics=[ssim]", "progress_bar=false", f"data.root={copy}", "tracking=files"]  # fmt: skip
    for folder in ("true", "matched"):
        if folder == "matched":
            (copy / "matched.json").write_text(json.dumps(MatchReport(copy, "sift").to_dict()))
        output = tmp_path / folder
        assert exit_status("evaluate", [*options, f"output={output}"]) == 0
        said = json.loads((output / "results.json").read_text())["protocol"].get("correspondence")
        assert said == (None if folder == "true" else "matched")


def test_every_layout_may_have_a_correspondence(tmp_path: Path) -> None:
    """A term that needs it looks where the layout says that it lies: DressCode has a folder for each category."""
    for category in ("upper_body", "dresses"):
        (tmp_path / category / "images").mkdir(parents=True)
    (tmp_path / "upper_body/correspondence").mkdir()
    require_correspondence(tmp_path, Reading(categories=("upper_body",)))
    with pytest.raises(DataError, match=r"no folder .*dresses/correspondence\)\. Have it matched \(i2am data match"):
        require_correspondence(tmp_path)
