"""Picture files as people have them: right, or refused by name, and the same by whichever reader."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from i2am_train.data.parsing import VITON_HD, read_labels
from i2am_train.data.picture_files import (
    UnreadablePictureError,
    read_correspondence,
    read_grey,
    read_mask,
    read_photograph,
    read_region,
    read_rgb,
    read_size,
    read_values,
    write_png,
)
from i2am_train.data.poses import read_keypoints, read_parts, read_pose_picture
from i2am_train.detection.bench import BenchSample, read_bench
from i2am_train.errors import DataError
from i2am_train.evaluation.scoring import open_folders, read_image
from i2am_train.metrics.boxes import Box
from i2am_train.types import GridSize

SIZE = GridSize(40, 30)
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size whose header alone is true."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content
            + struct.pack(">I", zlib.crc32(name + content))
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# -- bits ----------------------------------------------------------------------------------------------------------


def test_the_embedded_dataset_reads_as_plain_opencv_reads_it(small_dataset: Path) -> None:
    """Training data keep their bits: colours, masks and stored values of every file of a dataset."""
    files = [path for path in sorted(small_dataset.glob("t*/*/*")) if "0000" in path.name]
    assert len({path.parent.name for path in files}) == 8
    for path in files:
        if path.parent.name == "correspondence":
            stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1].astype(np.float32)
            known = stored[..., 2] > 0
            expected = stored[..., :2][known] / np.float32(65535)
            assert np.array_equal(read_correspondence(path)[known], expected)
            continue
        colours = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        assert np.array_equal(read_rgb(path), colours)
        assert np.array_equal(read_grey(path), cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) or (
            "densepose" in path.parent.name
        )
        assert read_size(path) == colours.shape[:2]


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_of_any_kind_reads_as_opencv_reads_it(tmp_path: Path, subsampling: int, progressive: bool) -> None:
    smooth = cv2.resize(PIXELS, (301, 405), interpolation=cv2.INTER_CUBIC)
    path = put(
        tmp_path / "x.jpg", encoded(smooth, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    )
    assert np.array_equal(read_rgb(path), cv2.imread(str(path))[..., ::-1])
    assert np.array_equal(read_grey(path), cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    reduced = cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_2)[..., ::-1]
    assert np.array_equal(read_rgb(path, about=200), reduced)


# -- what is understood --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_orientation_is_obeyed(tmp_path: Path, kind: str, orientation: int) -> None:
    """In colours, masks, values and the size from the header, against Pillow's own way."""
    exif = Image.Exif()
    exif[274] = orientation
    path = put(tmp_path / "x.png", encoded(PIXELS, kind, exif=exif))
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(read_rgb(path), np.asarray(upright))
    assert read_size(path) == read_grey(path).shape == upright.size[::-1]
    mask = put(tmp_path / "mask.png", encoded(PIXELS[..., 0], "PNG", exif=exif))
    with Image.open(mask) as opened:
        turned = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(read_values(mask, palette=True), turned)
    assert np.array_equal(read_mask(mask), turned >= 128)


def transparent(mode: str) -> tuple[bytes, Any]:
    """A picture in a mode with transparency, and its alpha: the left half shows what lies behind."""
    alpha = np.full(SIZE, 255, np.uint8)
    alpha[:, : SIZE.width // 2] = 0
    if mode == "P":
        palette = Image.fromarray(np.where(alpha > 0, 1, 0).astype(np.uint8))
        palette.putpalette([9, 9, 9, 200, 30, 30])
        return encoded(palette.convert("P"), "PNG", transparency=0), alpha
    full = np.full((*SIZE, 4), (200, 30, 30, 255), np.uint8)
    full[alpha == 0, :3] = 9
    full[..., 3] = alpha
    return encoded(Image.fromarray(full).convert(mode), "PNG"), alpha


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white_and_is_outside_of_masks(tmp_path: Path, mode: str) -> None:
    content, alpha = transparent(mode)
    path = put(tmp_path / "x.png", content)
    picture, grey = read_rgb(path), read_grey(path)
    assert (picture[alpha == 0] == 255).all()
    assert (read_rgb(path, "black")[alpha == 0] == 0).all()
    assert (grey[alpha == 0] == 0).all()
    assert (picture[alpha > 0] == picture[0, -1]).all()
    assert picture[0, -1].max() < 255
    assert np.array_equal(picture, read_photograph(path, "image"))
    white = np.full((*SIZE, 4), 255, np.uint8)
    white[..., 3] = alpha
    mask = put(tmp_path / "mask.png", encoded(white, "PNG"))
    assert np.array_equal(read_mask(mask), alpha > 0)
    assert np.array_equal(read_region(mask, "mask", picture, "image"), alpha > 0)


def test_an_opaque_alpha_changes_nothing(tmp_path: Path) -> None:
    path = put(tmp_path / "x.png", encoded(Image.fromarray(PIXELS).convert("RGBA"), "PNG"))
    assert np.array_equal(read_rgb(path), PIXELS)


def test_grey_and_palettes_become_colours_and_16_bits_become_8(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    deep_grey = cv2.imencode(".png", grey.astype(np.uint16) * 256 + 77)[1].tobytes()
    deep = cv2.imencode(".png", PIXELS[..., ::-1].astype(np.uint16) * 256 + 77)[1].tobytes()
    palette = Image.fromarray(PIXELS).quantize(256)
    for content, expected in (
        (encoded(grey, "PNG"), np.dstack([grey] * 3)),
        (encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        (encoded(Image.fromarray(grey > 99), "PNG"), np.dstack([(grey > 99) * 255] * 3)),
        (deep_grey, np.dstack([grey] * 3)),
        (deep, PIXELS),
        (encoded(PIXELS, "WEBP", lossless=True), PIXELS),
        (encoded(PIXELS, "BMP"), PIXELS),
    ):
        assert np.array_equal(read_rgb(put(tmp_path / "x.png", content)), expected)
    assert np.array_equal(read_grey(put(tmp_path / "x.png", deep_grey)), grey)


def test_bytes_behind_the_end_do_not_matter(tmp_path: Path) -> None:
    """Motion photos carry a film behind the picture; previews in the header do not count as its end."""
    for kind in ("JPEG", "PNG", "WEBP"):
        content = encoded(PIXELS, kind)
        plain = read_rgb(put(tmp_path / "plain", content))
        assert np.array_equal(read_rgb(put(tmp_path / "film", content + os.urandom(200_000))), plain)
    exif = Image.Exif()
    exif[0x927C] = encoded(PIXELS, "JPEG")  # a picture within the header
    content = encoded(PIXELS, "JPEG", exif=exif)
    header = content.index(b"\xff\xd9") + 2
    for length in (header, len(content) - 1, len(content) - 40):
        message = "cannot be decoded" if length == header else f"is cut off after {length} bytes"
        with pytest.raises(UnreadablePictureError, match=message):
            read_rgb(put(tmp_path / "cut.jpg", content[:length]))


# -- what is refused -----------------------------------------------------------------------------------------------


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. Copy it again"),
        (b"<html>404</html>", "is no picture; expected JPEG, PNG, WebP or BMP"),
        (b"\xff\xd8 not a picture", "is no picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "is a HEIC picture; expected"),
        (encoded(PIXELS, "GIF"), "is a GIF picture"),
        (encoded(PIXELS, "TIFF"), "is a TIFF picture"),
        (animation("WEBP"), "is an animation of 2 pictures"),
        (animation("PNG"), "is an animation of 2 pictures"),
        (encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), "is in the colour space CMYK"),
        (encoded(PIXELS, "PNG")[:-20], "is cut off after"),
        (encoded(PIXELS, "WEBP")[:-20], "is cut off after"),
        (encoded(PIXELS, "BMP")[:-200], "cannot be decoded"),
        (encoded(PIXELS, "PNG")[:60] + bytes(30) + encoded(PIXELS, "PNG")[90:], "cannot be decoded"),
        (png_header(0, 7), "cannot be decoded"),
    ],
)  # fmt: skip
def test_other_contents_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = put(tmp_path / "x.jpg", content)
    for read in (read_rgb, read_grey):
        with pytest.raises(UnreadablePictureError, match=rf"x\.jpg {message}"):
            read(path)


def folder(path: Path) -> None:
    path.mkdir()


def server(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)  # from within its folder: names of sockets are short


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (folder, "is a folder and no file"),
        (os.mkfifo, "is a FIFO and no file"),
        (server, "is a socket and no file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device and no file"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.symlink_to(path.with_name("gone")), "cannot be read: No such file"),
        (lambda path: None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_file_is_refused_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], message: str
) -> None:
    """A FIFO or device would let a command wait for ever."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.jpg"
    make(path)
    with pytest.raises(UnreadablePictureError, match=message):
        read_size(path)


@pytest.mark.parametrize(
    "read",
    [lambda path: read_bench(path, path.parent), lambda path: read_keypoints(path, SIZE)],
    ids=["coco", "keypoints"],
)
def test_other_files_of_a_dataset_do_not_hang_either(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"x\.json is a FIFO and no file"):
        read(tmp_path / "x.json")


def test_a_name_that_is_too_long_is_one_paragraph(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePictureError, match="File name too long"):
        read_size(tmp_path / ("x" * 300 + ".jpg"))


def bench_sample(path: Path) -> BenchSample:
    return BenchSample(index=0, image_id=1, path=path, size=SIZE, box=Box(0, 0, 5, 5), category="cat", crowd=False)


READERS: dict[str, Callable[[Path], Any]] = {
    "training": read_rgb,
    "masks": read_mask,
    "pose pictures": read_pose_picture,
    "parts": read_parts,
    "labels": lambda path: read_labels(path, VITON_HD),
    "correspondence": read_correspondence,
    "explain image=": lambda path: read_photograph(path, "image"),
    "explain mask=": lambda path: read_region(path, "mask", PIXELS, "image"),
    "evaluate, headers": lambda path: open_folders(path.parent, path.parent, paired=True),
    "evaluate": lambda path: read_image(path, SIZE),
    "detect": lambda path: bench_sample(path).image(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_header(16320, 12240), r"has 200 megapixels; at most 134 are read"),
        (png_header(30000, 30000), r"has 900 megapixels; at most 134 are read"),
        (encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), "is in the colour space CMYK"),
        (encoded(PIXELS, "JPEG")[:-30], "is cut off after"),
    ],
)
def test_every_reader_says_the_same(tmp_path: Path, reader: str, content: bytes, message: str) -> None:
    """One limit and one message, before anything is decoded, and no warning of a library."""
    (tmp_path / "root/train/image").mkdir(parents=True)
    path = put(tmp_path / "root/train/image/x.png", content)
    with pytest.raises(DataError, match=rf"x\.png {message}"):
        READERS[reader](path)


def test_photographs_of_100_megapixels_are_read(tmp_path: Path) -> None:
    """Beyond the size that Pillow warns of; reduced while it is decoded."""
    path = put(tmp_path / "x.jpg", encoded(Image.new("L", (12000, 8400), 77), "JPEG"))
    assert read_size(path) == (8400, 12000)
    assert read_grey(path, about=128).shape == (1050, 1500)


def test_a_written_picture_comes_back(tmp_path: Path) -> None:
    """Lossless, in a folder that is made, and nothing else in it."""
    picture = np.random.default_rng(4).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    path = tmp_path / "images" / "00004_00.png"
    write_png(path, picture)
    assert np.array_equal(read_rgb(path), picture)
    assert list(path.parent.iterdir()) == [path]
