"""Files that the pair lists ask for and that are not there: said when a dataset is opened."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from i2am_train.config.data import DataConfig, DataDeriveConfig
from i2am_train.data.dataset import AS_IT_LIES, TryOnDataset
from i2am_train.data.dataset_report import check_dataset
from i2am_train.data.derivation import derive_dataset
from i2am_train.data.module import TryOnDataModule
from i2am_train.errors import DataError
from i2am_train.fingerprints import DESCRIPTION_FILE
from i2am_train.types import GridSize, Pairing, Split

SIZE = GridSize(64, 48)


@pytest.fixture
def embedded(small_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the embedded dataset, to break."""
    return Path(shutil.copytree(small_dataset, tmp_path / "embedded"))


@pytest.fixture
def viton_hd(embedded: Path) -> Path:
    """What a download of VITON-HD has: nothing says how it was made, and only training knows the worn garment."""
    (embedded / DESCRIPTION_FILE).unlink()
    for folder in ("train/correspondence", "test/correspondence", "test/gt_cloth_warped_mask"):
        shutil.rmtree(embedded / folder)
    return embedded


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("image/00002_00.jpg", ""),
        ("cloth/00002_00.jpg", ""),
        ("image-densepose/00002_00.jpg", ""),
        ("correspondence/00002_00.png", ""),
        ("agnostic-v3.2/00002_00.jpg", "derive"),
        ("agnostic-mask/00002_00_mask.png", "derive"),
        ("cloth-mask/00002_00.jpg", "derive"),
        ("gt_cloth_warped_mask/00002_00.jpg", "derive"),
    ],
)
def test_each_file_of_the_embedded_dataset(embedded: Path, file: str, advice: str) -> None:
    # Proves that one missing file of any kind is named before a sample is read, with what makes it again.
    (embedded / "train" / file).unlink()
    folder, name = file.split("/")
    with pytest.raises(DataError, match=rf"train_pairs\.txt asks for: 1 of 20 in {folder} \({name}\)\."):
        TryOnDataset(embedded, Split.TRAIN, Pairing.PAIRED, SIZE)
    with pytest.raises(DataError, match=r"data check root=.*") as caught:
        TryOnDataset(embedded, Split.TRAIN, Pairing.PAIRED, SIZE)
    assert ("'i2am data derive root=" in str(caught.value)) == (advice == "derive")
    assert "'i2am data make' draws this dataset again" in str(caught.value)
    assert len(TryOnDataset(embedded, Split.TEST, Pairing.PAIRED, SIZE)) == 6


def test_all_folders_of_viton_hd_are_summed_up(viton_hd: Path) -> None:
    # Proves one message for everything: counts, the first names, and no advice on drawing what was photographed.
    for number in range(5, 0, -1):
        (viton_hd / f"train/cloth/0000{number}_00.jpg").unlink()
    (viton_hd / "train/agnostic-mask/00019_00_mask.png").unlink()
    with pytest.raises(
        DataError,
        match=r"train lacks files .*: 1 of 20 in agnostic-mask \(00019_00_mask\.png\); "
        r"5 of 20 in cloth \(00001_00\.jpg, 00002_00\.jpg, 00003_00\.jpg, \.\.\.\)\. Copy them there",
    ) as caught:
        TryOnDataset(viton_hd, Split.TRAIN, Pairing.PAIRED, SIZE)
    assert "data make" not in str(caught.value)


def test_only_what_is_read_is_asked_for(viton_hd: Path) -> None:
    # Proves that unpaired tests need the listed garment and not the person's own, and that subsets need no more.
    for role in ("cloth", "cloth-mask"):
        (viton_hd / f"test/{role}/50000_00.jpg").unlink()  # of the last pair; person 50000 tries on 50001

    def opened(pairing: Pairing, indices: list[int]) -> TryOnDataset:
        return TryOnDataset(viton_hd, Split.TEST, pairing, SIZE, AS_IT_LIES, indices=indices)

    assert len([*opened(Pairing.UNPAIRED, [0, 1, 2, 3, 4])]) == 5
    assert len([*opened(Pairing.PAIRED, [1, 2, 3, 4, 5])]) == 5
    for pairing, index in ((Pairing.UNPAIRED, 5), (Pairing.PAIRED, 0)):
        with pytest.raises(DataError, match=r"1 of 1 in cloth \(50000_00\.jpg\); 1 of 1 in cloth-mask"):
            opened(pairing, [index])


def test_training_and_validation_each_need_their_own(embedded: Path) -> None:
    # Proves that the held-out end is checked on its own, as a run that trains from a cache needs.
    (embedded / "train/image/00018_00.jpg").unlink()
    data = TryOnDataModule(DataConfig(batch_size=3), embedded, validation_samples=5)
    assert len(data.train_dataset()) == 15
    with pytest.raises(DataError, match=r"1 of 5 in image \(00018_00\.jpg\)"):
        data.validation_dataset()


@pytest.mark.parametrize("name", ["00007_00.PNG", "00007_00.webp", "00007_00.JPG", "00007_00.jpeg"])
def test_files_may_end_otherwise_than_the_others(viton_hd: Path, name: str) -> None:
    # Proves that a photograph under another ending is read, and that a second file of its name is refused.
    photograph = viton_hd / "train/cloth/00007_00.jpg"
    expected = TryOnDataset(viton_hd, Split.TRAIN, Pairing.PAIRED, SIZE)[7]["garment"]
    kind = "PNG" if name.endswith("PNG") else "WEBP" if name.endswith("webp") else None
    if kind is None:
        photograph.rename(photograph.with_name(name))
    else:
        with Image.open(photograph) as opened:
            opened.save(photograph.with_name(name), kind, lossless=True)
        both = " and ".join(sorted(["00007_00.jpg", name]))
        with pytest.raises(DataError, match=rf"holds {both}, and which of them is meant"):
            TryOnDataset(viton_hd, Split.TRAIN, Pairing.PAIRED, SIZE)
        codes = {(f.code, f.file) for f in check_dataset(viton_hd, progress=False).findings}
        assert ("ambiguous_name", "00007_00.jpg") in codes
        photograph.unlink()
    assert TryOnDataset(viton_hd, Split.TRAIN, Pairing.PAIRED, SIZE)[7]["garment"].equal(expected)
    assert not check_dataset(viton_hd, progress=False).findings


def test_whole_folders_may_end_in_capitals(viton_hd: Path) -> None:
    for folder in (viton_hd / "train").iterdir():
        for file in folder.iterdir():
            file.rename(file.with_suffix(file.suffix.upper()))
    assert len([*TryOnDataset(viton_hd, Split.TRAIN, Pairing.PAIRED, SIZE)]) == 20


def test_accents_may_be_stored_apart(viton_hd: Path) -> None:
    # Proves macOS's way of file names against a list in the usual one.
    for folder in (viton_hd / "train").iterdir():
        for file in folder.glob("00007_00*"):
            file.rename(file.with_name(file.name.replace("00007_00", "cafe\u0301")))
    list_file = viton_hd / "train_pairs.txt"
    list_file.write_text(list_file.read_text().replace("00007_00", "caf\u00e9"))
    assert TryOnDataset(viton_hd, Split.TRAIN, Pairing.PAIRED, SIZE)[7]["name"] == "caf\u00e9"
    assert not check_dataset(viton_hd, progress=False).findings


def test_names_that_are_too_long_are_missing_files(viton_hd: Path) -> None:
    # Proves that no system's error comes through: such a name is said when the dataset is opened, checked, and derived.
    name = "x" * 300
    (viton_hd / "test_pairs.txt").write_text(f"{name}.jpg {name}.jpg\n")
    with pytest.raises(DataError, match=r"1 of 1 in image \(x{300}\.jpg\)"):
        TryOnDataset(viton_hd, Split.TEST, Pairing.PAIRED, SIZE)
    codes = {f.code for f in check_dataset(viton_hd, progress=False).findings if f.level == "error"}
    assert codes == {"missing_file"}
    config = DataDeriveConfig(root=viton_hd, pose="none", workers=1)
    for split in ("train", "test"):
        (viton_hd / split / "image-parse-v3").mkdir()
    refused = derive_dataset(config, progress=False).refused
    assert any("File name too long" in one.reason for one in refused if one.name == name)


def test_two_photographs_of_a_name_are_refused_before_anything_is_derived(viton_hd: Path) -> None:
    for split in ("train", "test"):
        (viton_hd / split / "image-parse-v3").mkdir()
    photograph = viton_hd / "test/image/50001_00.jpg"
    shutil.copy(photograph, photograph.with_suffix(".JPG"))
    with pytest.raises(DataError, match=r"holds 50001_00\.JPG and 50001_00\.jpg, and which"):
        derive_dataset(DataDeriveConfig(root=viton_hd, pose="none"), progress=False)


def test_column_two_of_other_names_is_explained(viton_hd: Path) -> None:
    # Proves VITON's form of lists: paired training reads the garment of the person's own name, which is not there.
    for role in ("cloth", "cloth-mask"):
        for file in (viton_hd / "train" / role).iterdir():
            file.rename(file.with_name(f"g_{file.name}"))
    list_file = viton_hd / "train_pairs.txt"
    list_file.write_text("".join(f"{n:05}_00.jpg g_{n:05}_00.jpg\n" for n in range(20)))
    said = r"column 2 of train_pairs\.txt names others \(as 'g_00000_00' for '00000_00'\), which"
    with pytest.raises(DataError, match=said):
        TryOnDataset(viton_hd, Split.TRAIN, Pairing.PAIRED, SIZE)
    findings = [f for f in check_dataset(viton_hd, progress=False).findings if f.level == "error"]
    assert {f.code for f in findings} == {"missing_file"}
    assert any("own name; column 2 of train_pairs.txt names 'g_00003_00'" in f.message for f in findings)


def test_a_folder_is_listed_once_whatever_the_number_of_samples(
    viton_hd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Proves that no file is asked for by itself: seven folders, each listed once.
    scanned, asked = Counter[str](), Counter[str]()

    def counted(call: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
        def count(path: Any, *arguments: Any, **options: Any) -> Any:
            counts[Path(path).name] += 1
            return call(path, *arguments, **options)

        return count

    monkeypatch.setattr(os, "scandir", counted(os.scandir, scanned))
    monkeypatch.setattr(os, "stat", counted(os.stat, asked))
    TryOnDataset(viton_hd, Split.TRAIN, Pairing.PAIRED, SIZE)
    assert len(scanned) == 7
    assert set(scanned.values()) == {1}
    assert not [name for name in asked if name.endswith((".jpg", ".png"))]
