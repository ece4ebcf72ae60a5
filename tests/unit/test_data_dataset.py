"""The reader of the VITON-HD layout."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from i2am_train.config.data import DataConfig, SyntheticConfig
from i2am_train.data.dataset import EpochPosition, TryOnDataset, prepare_data, require_correspondence
from i2am_train.data.dataset_report import check_dataset
from i2am_train.data.synthetic import FIRST_TEST_INDEX
from i2am_train.data.synthetic.rendering import render_sample
from i2am_train.errors import DataError
from i2am_train.types import GridSize, Pairing, Split

SIZE = GridSize(64, 48)


@pytest.fixture
def copy(small_dataset: Path, tmp_path: Path) -> Path:
    """A dataset to break."""
    return Path(shutil.copytree(small_dataset, tmp_path / "copy"))


def test_files_come_back_as_they_were_drawn(small_dataset: Path) -> None:
    # Proves the round trip: masks and correspondence exact, pictures within JPEG's error, range [-1, 1].
    drawn = render_sample(0, 5, SIZE)
    read = TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, SIZE)[5]
    assert (read["name"], read["garment_name"], read["index"], read["paired"]) == ("00005_00", "00005_00", 5, True)
    for name in ("garment_mask", "inpaint_mask", "warped_garment_mask"):
        np.testing.assert_array_equal(read[name].numpy(), getattr(drawn, name))
    np.testing.assert_allclose(read["correspondence"].numpy(), drawn.correspondence, atol=1 / 131_000)
    for name in ("person", "garment", "agnostic", "densepose"):
        expected = getattr(drawn, name).transpose(2, 0, 1) / 127.5 - 1
        assert read[name].shape == (3, *SIZE)
        assert read[name].dtype == torch.float32
        assert np.abs(read[name].numpy() - expected).mean() < 0.03
    assert read["agnostic"][:, read["inpaint_mask"]].mean().item() == pytest.approx(128 / 127.5 - 1, abs=0.01)


def test_unpaired_takes_the_lists_garment_and_knows_no_truth(small_dataset: Path) -> None:
    # Proves what the lists mean: person-side files follow column 1, the garment column 2.
    paired, unpaired = (TryOnDataset(small_dataset, Split.TEST, pairing, SIZE)[1] for pairing in Pairing)
    assert paired["garment_name"] == paired["name"] == unpaired["name"] == f"{FIRST_TEST_INDEX + 1}_00"
    assert unpaired["garment_name"] == f"{FIRST_TEST_INDEX + 2}_00"
    assert not unpaired["paired"]
    assert torch.equal(paired["person"], unpaired["person"])
    assert not torch.equal(paired["garment"], unpaired["garment"])
    assert not unpaired["warped_garment_mask"].any()
    assert unpaired["correspondence"].isnan().all()
    assert paired["warped_garment_mask"].any()


def test_samples_collate_into_a_batch(small_dataset: Path) -> None:
    # Proves that the default collation gives the batch of the contract.
    data = TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, SIZE)
    batch = default_collate([data[index] for index in range(3)])
    assert batch["name"] == ["00000_00", "00001_00", "00002_00"]
    assert batch["correspondence"].shape == (3, 64, 48, 2)
    assert batch["paired"].dtype == torch.bool
    assert batch["index"].tolist() == [0, 1, 2]


def test_another_size_is_resized(small_dataset: Path) -> None:
    # Proves that pictures, masks and correspondence follow the size that is asked for.
    sample = TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, GridSize(32, 24))[2]
    full = TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, SIZE)[2]
    assert sample["person"].shape == (3, 32, 24)
    assert sample["correspondence"].shape == (32, 24, 2)
    mean = torch.nn.functional.avg_pool2d(full["person"], 2)
    assert (mean - sample["person"]).abs().max() < 2 / 127.5
    share = full["inpaint_mask"].float().mean() - sample["inpaint_mask"].float().mean()
    assert abs(share) < 0.03


def test_without_optional_folders_the_truth_is_unknown(copy: Path) -> None:
    # Proves that the real dataset's test half (no warped masks, no correspondence) can be read.
    shutil.rmtree(copy / "test/gt_cloth_warped_mask")
    shutil.rmtree(copy / "test/correspondence")
    sample = TryOnDataset(copy, Split.TEST, Pairing.PAIRED, SIZE)[0]
    assert not sample["warped_garment_mask"].any()
    assert sample["correspondence"].isnan().all()


def test_a_subset_keeps_the_lists_numbers(small_dataset: Path) -> None:
    # Proves that a sample's index, which seeds its noise, does not depend on the subset that is read.
    data = TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, SIZE, indices=[11, 4])
    assert len(data) == 2
    assert data.global_index(1) == 4
    assert (data[0]["index"], data[0]["name"]) == (11, "00011_00")
    assert [sample["index"] for sample in data] == [11, 4]


@pytest.mark.parametrize("position", [-1, 20])
def test_a_sample_out_of_range_is_refused(small_dataset: Path, position: int) -> None:
    # Proves that the message names the range.
    data = TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, SIZE)
    with pytest.raises(DataError, match=rf"Sample {position} is out of range.*0 to 19"):
        data[position]


def test_small_inpainting_masks_become_everything_in_training_only(copy: Path) -> None:
    # Proves the authors' rule, as a share of any size, and that it can be switched off.
    for split, name in (("train", "00003_00"), ("test", f"{FIRST_TEST_INDEX}_00")):
        mask = np.zeros(SIZE, np.uint8)
        mask[20:30, 20:30] = 255
        cv2.imwrite(str(copy / split / f"agnostic-mask/{name}_mask.png"), mask)
    assert TryOnDataset(copy, Split.TRAIN, Pairing.PAIRED, SIZE)[3]["inpaint_mask"].all()
    kept = TryOnDataset(copy, Split.TRAIN, Pairing.PAIRED, SIZE, small_mask_rule=False)[3]["inpaint_mask"]
    assert kept.sum() == 100
    assert TryOnDataset(copy, Split.TEST, Pairing.PAIRED, SIZE)[0]["inpaint_mask"].sum() == 100


def test_missing_folders_are_named_with_what_was_found(copy: Path) -> None:
    # Proves the message of design rule 10.
    shutil.rmtree(copy / "train/cloth-mask")
    with pytest.raises(
        DataError, match=r"no folder 'cloth-mask' \(or cloth_mask\) \(found: .*i2am data derive.*i2am data check"
    ):
        TryOnDataset(copy, Split.TRAIN, Pairing.PAIRED, SIZE)
    with pytest.raises(DataError, match=r"no pair list train_pairs\.txt .*i2am data make"):
        TryOnDataset(copy / Split.TEST, Split.TRAIN, Pairing.PAIRED, SIZE)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "is empty"),
        (b"a.jpg b.jpg\na.jpg\n", "1 names in entry 2"),
        (b"a.jpg b.jpg c.jpg\n", r"3 names in entry 1 \('a\.jpg b\.jpg c\.jpg'\).*put a tab between"),
        (b"a.jpg\t\n", "1 names in entry 1"),
        ("a.jpg b.jpg\n\u00e9.jpg b.jpg".encode("latin-1"), r"no text in UTF-8 \(byte 0xe9 in line 2\)"),
        ("a.jpg b.jpg".encode("utf-16-le"), r"no text in UTF-8 \(zeros between the letters\)"),
        (b"\xff\xfea", r"no text in UTF-8"),
    ],
)  # fmt: skip
def test_broken_pair_lists_are_refused(copy: Path, text: bytes, match: str) -> None:
    # Proves that a list is checked before any picture is read.
    (copy / "test_pairs.txt").write_bytes(text)
    with pytest.raises(DataError, match=match):
        TryOnDataset(copy, Split.TEST, Pairing.PAIRED, SIZE)
    findings = check_dataset(copy, progress=False).findings
    assert [(f.code, f.file) for f in findings if f.level == "error"] == [("pair_list", "test_pairs.txt")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n  \n"])
def test_lists_are_read_as_editors_write_them(copy: Path, encoding: str, end: str) -> None:
    # Proves PowerShell's UTF-16, Notepad's mark, and every end of line.
    file = copy / "test_pairs.txt"
    lines = file.read_text().splitlines()
    expected = TryOnDataset(copy, Split.TEST, Pairing.UNPAIRED, SIZE).pairs
    file.write_bytes(end.join([*lines, ""]).encode(encoding))
    assert TryOnDataset(copy, Split.TEST, Pairing.UNPAIRED, SIZE).pairs == expected


@pytest.mark.parametrize("stem", ["IMG 1", "sam1 (1)", "a [x]  y", "a.jpg (1)", "x.y z"])
@pytest.mark.parametrize("form", ["{0}\t{1}", "{0} {1}"])
def test_names_with_spaces_are_read(copy: Path, stem: str, form: str) -> None:
    # Proves tabs, and the line 'NAME NAME' of own photographs, also where a name looks like two.
    for file in [*(copy / "test").glob("*/50003_00*")]:
        file.rename(file.with_name(file.name.replace("50003_00", stem)))
    pairs = [("50000_00.jpg", "50001_00.jpg"), (f"{stem}.jpg", f"{stem}.jpg")]
    (copy / "test_pairs.txt").write_text("\n".join(form.format(*pair) for pair in pairs))
    data = TryOnDataset(copy, Split.TEST, Pairing.UNPAIRED, SIZE)
    assert data.pairs[1] == (stem, stem)
    assert data[1]["name"] == stem


def test_a_line_that_folders_read_in_two_ways_is_refused(copy: Path) -> None:
    # Proves that nothing is guessed: 'a', 'a.jpg b' and so on all exist.
    for role in ("image", "cloth"):
        for name in ("a.jpg", "b.jpg", "a.jpg b.jpg", "b.jpg b.jpg"):
            shutil.copy(copy / "test" / role / "50003_00.jpg", copy / "test" / role / name)
    (copy / "test_pairs.txt").write_text("a.jpg b.jpg b.jpg\n")
    with pytest.raises(DataError, match=r"3 names in entry 1 \('a\.jpg b\.jpg b\.jpg'\)"):
        TryOnDataset(copy, Split.TEST, Pairing.UNPAIRED, SIZE)


@pytest.mark.parametrize(
    ("file", "keep", "match"),
    [
        ("image/00002_00.jpg", 0.6, "is cut off after"),
        ("agnostic-mask/00002_00_mask.png", 0.5, "is cut off after"),
        ("correspondence/00002_00.png", 0.9, "is cut off after"),
        ("cloth/00002_00.jpg", 0.0, "is empty"),
        ("cloth/00002_00.jpg", None, "No such file"),
    ],
)
def test_broken_pictures_are_named(copy: Path, file: str, keep: float | None, match: str) -> None:
    # Proves that a half-written picture is an error and never silently grey, also one that vanishes during training.
    data = TryOnDataset(copy, Split.TRAIN, Pairing.PAIRED, SIZE)
    path = copy / "train" / file
    content = path.read_bytes()
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=match) as caught:
        data[2]
    assert str(path) in str(caught.value)
    assert f"i2am data check root={copy}" in str(caught.value)


def test_augmentation_depends_on_seed_epoch_and_index(small_dataset: Path) -> None:
    # Proves that neither order nor process state enters, and that epochs differ.
    def make(seed: int) -> TryOnDataset:
        return TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, SIZE, augment=True, seed=seed)

    first, second = make(0), make(0)
    second[7]
    a, b = first[EpochPosition(3, 5)], second[EpochPosition(3, 5)]
    assert torch.equal(a["person"], b["person"])
    assert torch.equal(a["garment"], b["garment"])
    assert any(not torch.equal(first[EpochPosition(e, 5)]["person"], a["person"]) for e in (4, 5, 6))
    assert any(not torch.equal(make(s)[EpochPosition(3, 5)]["person"], a["person"]) for s in (1, 2, 3))


def test_truth_is_required_where_it_is_taught(copy: Path) -> None:
    # Proves that the supervised loss cannot silently be zero on a dataset without correspondence.
    require_correspondence(copy)
    shutil.rmtree(copy / "train" / "correspondence")
    with pytest.raises(DataError, match=r"has none.*switch the term off \(objective\.terms\.supervised=0"):
        require_correspondence(copy)


SPELLINGS = {
    "cloth-mask": "cloth_mask",
    "agnostic-v3.2": "agnostic",
    "agnostic-mask": "agnostic_mask",
    "image-densepose": "image_densepose",
}


def test_other_spellings_of_folders_and_names_are_read(small_dataset: Path, copy: Path) -> None:
    # Proves the second distribution: other folder names, masks named after the photograph, PNG pictures.
    for split in ("train", "test"):
        for usual, other in SPELLINGS.items():
            (copy / split / usual).rename(copy / split / other)
        for mask in (copy / split / "agnostic_mask").iterdir():
            mask.rename(mask.with_name(mask.name.replace("_mask", "")))
        for cloth in [*(copy / split / "cloth").iterdir()]:
            cv2.imwrite(str(cloth.with_suffix(".png")), cv2.imread(str(cloth)))
            cloth.unlink()
    usual, other = (TryOnDataset(root, Split.TRAIN, Pairing.PAIRED, SIZE)[3] for root in (small_dataset, copy))
    for name, value in usual.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), other[name].nan_to_num()), name  # type: ignore[literal-required]


def test_what_is_missing_says_where_it_comes_from(copy: Path) -> None:
    # Proves the advice for masks, for pose pictures and for photographs.
    shutil.rmtree(copy / "train/gt_cloth_warped_mask")
    with pytest.raises(DataError, match=rf"no folder 'gt_cloth_warped_mask'.*'i2am data derive root={copy}' makes it"):
        TryOnDataset(copy, Split.TRAIN, Pairing.PAIRED, SIZE)
    assert len(TryOnDataset(copy, Split.TEST, Pairing.PAIRED, SIZE)) == 6
    shutil.rmtree(copy / "test/image-densepose")
    with pytest.raises(DataError, match=r"no folder 'image-densepose' .*DensePose pictures come with VITON-HD's"):
        TryOnDataset(copy, Split.TEST, Pairing.PAIRED, SIZE)


def test_a_dataset_one_folder_deeper_is_pointed_at(copy: Path) -> None:
    # Proves the hint for an archive that was unpacked into a folder of its own.
    with pytest.raises(DataError, match=rf"no pair list train_pairs\.txt .*Did you mean {copy}\?"):
        TryOnDataset(copy.parent, Split.TRAIN, Pairing.PAIRED, SIZE)


def test_the_place_of_the_embedded_dataset_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it is drawn, and not when it is read again."""
    monkeypatch.setattr("i2am_train.data.dataset.dataset_folder", lambda *_: tmp_path / "drawn")
    data = DataConfig(height=32, width=16, synthetic=SyntheticConfig(train=2, test=2))
    assert prepare_data(data) == tmp_path / "drawn"
    assert f"The embedded dataset is drawn in {tmp_path / 'drawn'} (data.root=" in capsys.readouterr().err
    prepare_data(data)
    assert capsys.readouterr().err == ""
