"""evaluation/scoring.py: which images are taken, which are refused, and what is said."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from i2am_train.errors import ConfigError, DataError
from i2am_train.evaluation import scoring
from i2am_train.evaluation.scoring import ImageSet, ScoringOptions, open_folders, read_image, score_images
from i2am_train.types import GridSize

SIZE = GridSize(20, 14)


def picture(seed: int = 0, size: GridSize = SIZE) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def fill(folder: Path, *names: str, size: GridSize = SIZE) -> Path:
    """Writes colour PNGs under these names."""
    folder.mkdir()
    for seed, name in enumerate(names):
        Image.fromarray(picture(seed, size)).save(folder / name)
    return folder


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return fill(tmp_path / "real", "a.png", "b.png", "c.png")


def open_pair(images: Path, real: Path, **options: Any) -> tuple[ImageSet, ImageSet]:
    return open_folders(images, real, **{"paired": True, **options})


def test_images_pair_by_stem_and_come_in_order(tmp_path: Path, real: Path) -> None:
    """Endings do not matter, files of other kinds are not counted, pixels are those of the files."""
    images = fill(tmp_path / "images", "c.bmp", "a.webp", "b.png")
    (images / "notes.txt").write_text("made on Tuesday")
    (images / "._a.webp").write_bytes(b"what macOS leaves beside a file")
    first, second = open_pair(images, real)
    assert first.names == second.names == ("a", "b", "c")
    assert first.size == SIZE
    assert np.array_equal(first.read(2).permute(1, 2, 0).numpy(), picture(0))
    assert torch.equal(first.batch([1, 2])[1], first.read(2))


def test_unmatched_names_are_listed_both_ways(tmp_path: Path, real: Path) -> None:
    """Counts on both sides, ten names at most, and the way out; unpaired they are just two sets."""
    images = fill(tmp_path / "images", "a.png", *(f"x{index:02d}.png" for index in range(12)))
    message = (
        r"12 of 13 images in .*images .*\(x00, x01, .*x09, \.\.\.\); "
        r"2 of 3 images in .*real .*\(b, c\).*evaluation\.pairing=unpaired"
    )
    with pytest.raises(DataError, match=message):
        open_pair(images, real)
    first, second = open_pair(images, real, paired=False)
    assert (len(first), len(second)) == (13, 3)


def test_the_first_images_can_be_asked_for(tmp_path: Path, real: Path) -> None:
    """``samples`` takes the first names of both folders, and no more than there are."""
    images = fill(tmp_path / "images", "a.png", "b.png", "c.png")
    assert open_pair(images, real, samples=2)[1].names == ("a", "b")
    with pytest.raises(DataError, match=r"evaluation\.samples=4 .* has 3"):
        open_pair(images, real, samples=4)


def test_folders_without_images_are_refused(tmp_path: Path, real: Path) -> None:
    """A missing folder, one of sub-folders, and one with two files of a name."""
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        open_pair(tmp_path / "nowhere", real)
    with pytest.raises(DataError, match=r"holds no images .* found real\. "):
        open_pair(tmp_path, real)
    twice = fill(tmp_path / "twice", "a.png", "a.bmp")
    with pytest.raises(DataError, match=r"several images of one name: a\.bmp and a\.png"):
        open_pair(twice, real)


def test_sizes_must_agree_or_be_made_to(tmp_path: Path, real: Path) -> None:
    """Another size anywhere is refused with examples; ``resize`` brings all to one."""
    images = fill(tmp_path / "images", "a.png", "b.png", "c.png", size=GridSize(24, 16))
    with pytest.raises(DataError, match=r"2 sizes .*20x14 .*24x16 .*Set resize=\[20,14\]"):
        open_pair(images, real)
    first, second = open_pair(images, real, resize=GridSize(10, 8))
    assert first.read(0).shape == second.read(1).shape == (3, 10, 8)
    assert first.size == (10, 8)


def sixteen_bit_rgb() -> bytes:
    """A PNG of 16 bits per channel, which PIL opens as 8-bit RGB without a word."""
    import cv2

    encoded = cv2.imencode(".png", picture().astype(np.uint16) * 257)[1]
    return bytes(encoded)


def encoded(mode: str, kind: str = "PNG", **options: Any) -> bytes:
    """The picture converted to a mode."""
    buffer = io.BytesIO()
    Image.fromarray(picture()).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(alpha: int) -> bytes:
    """RGBA whose first pixel has this opacity, the others 255."""
    image = Image.fromarray(picture()).convert("RGBA")
    image.putpixel((0, 0), (1, 2, 3, alpha))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.png", encoded("L"), r"b\.png is grey \(mode L\)"),
        ("b.png", encoded("LA"), r"b\.png is grey \(mode LA\)"),
        ("b.png", encoded("1"), r"b\.png is grey \(mode 1\)"),
        ("b.png", encoded("I;16"), r"more than 8 bits"),
        ("b.png", sixteen_bit_rgb(), r"more than 8 bits"),
        ("b.jpg", encoded("CMYK", "JPEG"), r"colour space CMYK"),
        ("b.png", with_alpha(254), r"transparent in places"),
        ("b.png", encoded("P", transparency=bytes(256)), r"transparent in places"),
        ("b.png", b"\x89PNG not really", r"b\.png is no picture; expected JPEG, PNG"),
        ("b.png", b"", r"b\.png is empty"),
    ],
)
def test_what_metrics_would_misread_is_refused(
    tmp_path: Path, real: Path, name: str, content: bytes, message: str
) -> None:
    """Before anything is computed, with the file's name, how many there are and what to do."""
    images = fill(tmp_path / "images", "a.png", "c.png")
    (images / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"1 of 3 images in .*{message}.*All of them: {name}\."):
        open_pair(images, real)


@pytest.mark.parametrize("content", [with_alpha(255), encoded("P")])
def test_lossless_kinds_become_rgb(tmp_path: Path, real: Path, content: bytes) -> None:
    """An opaque alpha channel goes, a palette is looked up."""
    images = fill(tmp_path / "images", "a.png", "c.png")
    (images / "b.png").write_bytes(content)
    read = open_pair(images, real)[0].read(1).permute(1, 2, 0).numpy()
    assert np.array_equal(read, np.asarray(Image.open(images / "b.png").convert("RGB")))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)],
)  # fmt: skip
def test_photographs_are_scored_upright(tmp_path: Path, orientation: int, turn: Image.Transpose) -> None:
    """EXIF's orientation counts in the size that is compared and in the pixels."""
    images = fill(tmp_path / "images", "a.png")
    exif = Image.Exif()
    exif[274] = orientation
    (tmp_path / "real").mkdir()
    stored = Image.fromarray(picture()).transpose(turn)
    stored.save(tmp_path / "real" / "a.png", exif=exif)
    first, second = open_pair(images, tmp_path / "real")
    assert first.size == second.size == SIZE
    assert torch.equal(first.read(0), second.read(0))


def test_a_name_is_the_same_however_its_accents_are_stored(tmp_path: Path) -> None:
    """macOS takes letters and accents apart."""
    images = fill(tmp_path / "images", "caf\u00e9.png")
    real = fill(tmp_path / "real", "cafe\u0301.png")
    first, second = open_pair(images, real)
    assert first.names == second.names == ("caf\u00e9",)


def test_a_link_in_a_circle_is_named_and_not_left_out(tmp_path: Path, real: Path) -> None:
    images = fill(tmp_path / "images", "a.png", "c.png")
    (images / "b.png").symlink_to(images / "b.png")
    with pytest.raises(DataError, match=r"b\.png cannot be read: Too many levels"):
        open_pair(images, real)


def test_a_cut_off_image_is_named(tmp_path: Path) -> None:
    """Its header is whole, so that only reading finds it."""
    path = tmp_path / "a.png"
    content = encoded("RGB")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.png is cut off after 464 bytes\. Copy it again"):
        read_image(path, SIZE)


def image_set(count: int, seed: int = 0, size: GridSize = SIZE) -> ImageSet:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, *size), generator=draw).to(torch.uint8)
    names = tuple(f"{index}" for index in range(count))
    return ImageSet(names=names, size=size, read=lambda position: images[position])


def options(*metrics: str, **more: Any) -> ScoringOptions:
    return ScoringOptions(metrics=metrics, device=torch.device("cpu"), **more)


def test_features_are_computed_once_for_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distances on one network see every image once, in batches."""
    seen: list[int] = []

    def counted(images: torch.Tensor, network: str) -> torch.Tensor:
        seen.append(len(images))
        return images.float().mean(dim=(2, 3))

    monkeypatch.setattr(scoring, "image_features", counted)
    names = ("fd_efficientnet_lite0", "kd_efficientnet_lite0")
    scores = score_images(image_set(5), image_set(4, 1), options(*names, batch_size=3), paired=False)
    assert seen == [3, 2, 3, 1]
    assert set(scores.sets) == set(names)


def test_the_protocol_says_how_images_were_compared() -> None:
    """Counts, sizes, filter, network and subsets: what must agree for two results to be comparable."""
    chosen = options("ssim", "kd_efficientnet_lite0", kernel_subset_size=3, kernel_subsets=5)
    scores = score_images(image_set(6), image_set(4, 1), chosen, paired=False)
    assert scores.pairs == {"ssim": [None] * 6}
    assert scores.protocol == {
        "images": {"generated": 6, "real": 4},
        "image_size": "20x14",
        "feature_network": {"kd_efficientnet_lite0": "efficientnet_lite0"},
        "feature_input_size": {"efficientnet_lite0": 224},
        "resize_filter": "bicubic, antialiased, channels in float32 (PIL through clean-fid)",
        "kernel_subsets": {"size": 3, "number": 5, "seed": 0},
    }


@pytest.mark.parametrize(
    ("sets", "chosen", "error", "message"),
    [
        ((4, 9), {"kernel_subset_size": 5}, DataError, r"subsets of 5 .* 4 generated and 9 real .* to 4 or less"),
        ((1, 9), {}, DataError, r"at least 2 images in each, found 1 generated and 9 real"),
        ((4, 9), {"metrics": ("imacs_g",)}, ConfigError, r"No image metric is called 'imacs_g'"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(
    sets: tuple[int, int], chosen: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Too few images for the subsets, too few for any distance, and names that are no image metric."""
    given = {"metrics": ("kd_efficientnet_lite0",), "device": torch.device("cpu"), **chosen}
    with pytest.raises(error, match=message):
        score_images(image_set(sets[0]), image_set(sets[1], 1), ScoringOptions(**given), paired=False)
