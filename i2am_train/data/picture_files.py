"""Picture files as people have them: the one place where a file becomes pixels.

Read are JPEG, PNG, WebP and BMP, told by their content and not by their names. A picture is turned upright by its
EXIF orientation, in its size as in its pixels; what is transparent shows the background that the caller names; of 16
bits a channel the upper eight count. A file of another kind, colour space or size is refused, and so is what is no
file, before anything is decoded: with an :class:`UnreadablePictureError`, which all readers here raise for whatever
cannot be read, unless they say otherwise.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from i2am_train.data.pictures import Image, Mask
from i2am_train.errors import DataError
from i2am_train.files import written
from i2am_train.types import GridSize

LARGEST = 1 << 27
"""Pixels of the largest picture that is read: 134 million, 400 MB as RGB."""

JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""A marker with a segment, or the end; zeros and restart marks belong to the pixels."""
TAIL = 4096
"""Bytes at the end of a file in which its end mark usually lies (some writers append zeros)."""

READ = "JPEG, PNG, WebP or BMP"
KINDS: tuple[tuple[re.Pattern[bytes], Callable[[BinaryIO], PillowImage.Image]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    (re.compile(rb"BM"), BmpImageFile),
)
"""How files begin, and what opens them: Pillow's own ``open`` would warn of large pictures and take other kinds."""
OTHER_KINDS = (
    (re.compile(rb"GIF8"), "a GIF picture"),
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF picture"),
    (re.compile(rb"....ftyp(heic|heix|hevc|mif1|msf1)", re.DOTALL), "a HEIC picture"),
    (re.compile(rb"....ftypavi", re.DOTALL), "an AVIF picture"),
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS and not the picture itself"),
)
NOT_FILES = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip

COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes that are read."""
COPY_AGAIN, SAVE_AGAIN = "Copy it again from the source.", "Save it as PNG or JPEG again."
CHECK_NAME = "Check the name, the links and the rights."
ORIENTATION = 0x0112
"""EXIF's tag."""

Ground = Literal["white", "black"]
"""What shows through transparent pixels."""

WRITING = {
    ".jpg": [cv2.IMWRITE_JPEG_QUALITY, 97, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
    ".png": [cv2.IMWRITE_PNG_COMPRESSION, 3],
    ".webp": [cv2.IMWRITE_WEBP_QUALITY, 101],
}  # fmt: skip
"""OpenCV's options by file name ending; WebP without loss."""


INSIDE = 128
"""Grey value from which a mask's pixel is inside."""

FULL_SCALE, LEAST_VALID = 65_535, 32_768
"""A coordinate of a correspondence is stored as round(coordinate x 65535); of its third channel, 0 is no place, and the
upper half says that there is one, with the confidence: 65535 is 1."""


class UnreadablePictureError(DataError):
    """A file that is no whole picture of a kind that is read.

    Attributes:
        fault: what is wrong with it; continues its name to a sentence.
        advice: what to do, a sentence.
    """

    fault = advice = ""

    @classmethod
    def of(cls, path: Path, fault: str, advice: str = COPY_AGAIN) -> UnreadablePictureError:
        """The error of a file. (Processes that read samples make errors again from their text alone.)

        >>> UnreadablePictureError.of(Path("a.jpg"), "is empty").advice
        'Copy it again from the source.'
        """
        error = cls(f"{path} {fault}. {advice}")
        error.fault, error.advice = fault, advice
        return error


def read_size(path: Path) -> GridSize:
    """Height and width of a picture once it is upright, from its header.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_png(Path(folder) / "a.png", np.zeros((4, 3, 3), np.uint8))
    ...     read_size(Path(folder) / "a.png")
    GridSize(height=4, width=3)
    """
    with open_picture(path) as picture:
        return upright_size(picture)


def read_rgb(path: Path, ground: Ground = "white", about: int | None = None) -> Image:
    """A picture as RGB ``[H, W, 3]``.

    Args:
        path: the file.
        ground: what shows through transparent pixels.
        about: a height; larger pictures are reduced by 2, 4 or 8 while they keep it, which is faster.
    """
    with open_picture(path) as picture:
        return _decoded(picture, path, "RGB", ground, about)


def read_grey(path: Path, about: int | None = None) -> Image:
    """A picture, such as a mask, as grey values ``[H, W]``; what is transparent is black, and so outside of a mask.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_png(Path(folder) / "mask.png", np.full((1, 2), 255, np.uint8))
    ...     read_grey(Path(folder) / "mask.png").tolist()
    [[255, 255]]
    """
    with open_picture(path) as picture:
        return _decoded(picture, path, "L", "black", about)


def write_png(path: Path, picture: Image) -> None:
    """Write a picture, RGB ``[H, W, 3]`` or grey ``[H, W]``, in one step."""
    with written(path) as unfinished:
        PillowImage.fromarray(picture).save(unfinished, format="PNG")


def read_values(path: Path, *, palette: bool) -> NDArray[Any]:
    """Values ``[H, W]`` as they are stored, or RGB ``[H, W, 3]`` of a picture in colours.

    Args:
        path: the file.
        palette: whether a palette's indices are the values; otherwise its colours are read.
    """
    with open_picture(path) as picture:
        if not (picture.mode[:1] in ("L", "I") or (palette and picture.mode == "P")):
            return _decoded(picture, path, "RGB", "black", None)
        turn = _turn(picture)
        return turn(np.array(picture if picture.mode != "LA" else picture.getchannel("L")))


@contextmanager
def open_picture(path: Path) -> Iterator[PillowImage.Image]:
    """A picture whose header was read and whose end is there, for as long as the block lasts.

    Raises:
        UnreadablePictureError: also for whatever goes wrong in the block, which should only decode.
    """
    try:
        refuse_what_is_no_file(path)
        with path.open("rb") as stream:
            yield _opened(path, stream)
    except DataError:
        raise
    except OSError as error:
        if error.errno is not None:
            fault = f"cannot be read: {error.strerror or error}"
            raise UnreadablePictureError.of(path, fault, CHECK_NAME) from error
        raise UnreadablePictureError.of(path, f"cannot be decoded ({error})") from error
    except PillowImage.DecompressionBombError as error:
        raise _too_large(path, "more than 178") from error
    except Exception as error:  # whatever a decoder stumbles over is the file's fault
        raise UnreadablePictureError.of(path, f"cannot be decoded ({error})") from error


def refuse_what_is_no_file(path: Path) -> None:
    """Opening a FIFO or a device would wait for ever.

    Raises:
        UnreadablePictureError: it is no regular file.
        OSError: it is not there, or cannot be reached.
    """
    mode = path.stat().st_mode
    for is_kind, name in NOT_FILES:
        if is_kind(mode):
            raise UnreadablePictureError.of(path, f"is {name} and no file", "Put a file there.")


def is_there(path: Path) -> bool:
    """Whether there is a file of a name, readable or not (Path's own methods fail on names that are too long).

    >>> is_there(Path("x" * 300))
    False
    """
    try:
        path.lstat()
    except OSError:
        return False
    return True


def upright_size(picture: PillowImage.Image) -> GridSize:
    """The size that an open picture has once it is turned.

    >>> upright_size(PillowImage.new("L", (4, 3)))
    GridSize(height=3, width=4)
    """
    lies_down = _orientation(picture) >= 5
    return GridSize(*(picture.size if lies_down else picture.size[::-1]))


def is_deep(picture: PillowImage.Image) -> bool:
    """Whether an open picture has more than 8 bits a channel.

    Pillow calls 16-bit RGB "RGB" and drops the lower bytes; only the decoder's argument tells.

    >>> is_deep(PillowImage.new("I;16", (1, 1))), is_deep(PillowImage.new("L", (1, 1)))
    (True, False)
    """
    return picture.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))


# -- of a dataset ------------------------------------------------------------------------------------------------------


def read_mask(path: Path) -> Mask:
    """A mask ``[H, W]``, upright and at its own size: grey value at least 128; what is transparent is outside."""
    return np.asarray(read_grey(path) >= INSIDE)


def write_picture(path: Path, picture: NDArray[Any]) -> None:
    """Write RGB, grey or a mask (True as 255) in one step: readers see a whole picture or none."""
    if picture.dtype == np.bool_:
        picture = picture.astype(np.uint8) * np.uint8(255)
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    ending = path.suffix.lower().replace(".jpeg", ".jpg")
    _, content = cv2.imencode(ending, np.ascontiguousarray(picture), WRITING.get(ending, []))
    with written(path) as unfinished:
        unfinished.write_bytes(content.tobytes())


def read_correspondence(path: Path) -> NDArray[np.float32]:
    """Exact correspondence ``[H, W, 2]`` (yx in 0..1, NaN outside) from a 16-bit PNG, at its own size.

    Raises:
        DataError: the file is no whole picture, or has another format.
    """
    encoded = read_encoded_correspondence(path)
    if encoded.dtype != np.uint16 or encoded.ndim != 3:
        raise DataError(
            f"{path} is {encoded.dtype} with shape {encoded.shape}; expected 16 bits and three channels (y, x, valid). "
            "Make the dataset again with 'i2am data make', or remove its folder 'correspondence'."
        )
    return decode_correspondence(encoded[..., ::-1])


def read_encoded_correspondence(path: Path) -> NDArray[Any]:
    """The correspondence as it is stored, channels valid, x, y (Pillow has no 16-bit RGB)."""
    read_size(path)
    encoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if encoded is None:
        raise UnreadablePictureError.of(path, "cannot be decoded")
    return cast("NDArray[Any]", encoded)


def read_confidence(path: Path) -> NDArray[np.float32]:
    """Confidence ``[H, W]`` of a correspondence in 0..1, NaN outside; 1 everywhere of one that is true."""
    stored = read_encoded_correspondence(path)[..., 0].astype(np.float32)
    return np.where(stored >= LEAST_VALID, (stored - LEAST_VALID) / (FULL_SCALE - LEAST_VALID), np.float32(np.nan))


def encode_correspondence(
    correspondence: NDArray[np.float32], confidence: NDArray[np.float32] | None = None
) -> NDArray[np.uint16]:
    """Coordinates ``[H, W, 2]`` in 0..1 with NaN, as 16-bit ``[H, W, 3]``.

    The third channel is 0 where there is none, else the confidence ``[H, W]`` in 0..1 (None: 1) as 32768..65535.

    >>> encode_correspondence(np.array([[[0.5, 1.0], [np.nan, np.nan]]], np.float32)).tolist()
    [[[32768, 65535, 65535], [0, 0, 0]]]
    >>> encode_correspondence(np.zeros((1, 1, 2), np.float32), np.zeros((1, 1), np.float32)).tolist()
    [[[0, 0, 32768]]]
    """
    valid = ~np.isnan(correspondence[..., :1])
    whole = np.rint(np.where(valid, correspondence, 0.0) * FULL_SCALE)
    sure = 1.0 if confidence is None else confidence[..., None]
    stored = np.rint(LEAST_VALID + sure * (FULL_SCALE - LEAST_VALID))
    return np.concatenate([whole, np.where(valid, stored, 0.0)], axis=-1).astype(np.uint16)


def decode_correspondence(encoded: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Inverse of :func:`encode_correspondence`, exact to 1 / 131070.

    >>> decode_correspondence(np.array([[[65535, 0, 65535], [0, 0, 0]]], np.uint16)).tolist()
    [[[1.0, 0.0], [nan, nan]]]
    """
    coordinates = encoded[..., :2].astype(np.float32) / np.float32(FULL_SCALE)
    return np.where(encoded[..., 2:] >= LEAST_VALID, coordinates, np.float32(np.nan))


# -- that the command line names -----------------------------------------------------------------------------------


def read_photograph(path: Path, option: str) -> Image:
    """RGB ``[height, width, 3]`` of a picture, upright; what is transparent becomes white.

    ``option`` is how the command line calls it, for the DataError about a file that is missing or no whole picture.
    """
    with _named(path, option):
        return read_rgb(path)


def read_region(path: Path, option: str, picture: Image, of: str) -> Mask:
    """The white region ``[height, width]`` of a mask of a picture's size; the command line calls the picture ``of``.

    A mask that cannot be read, has another size or no white pixel is a DataError.
    """
    with _named(path, option):
        mask = read_mask(path)
    height, width = picture.shape[:2]
    if mask.shape != (height, width):
        raise DataError(
            f"{option}={path} is {mask.shape[0]}x{mask.shape[1]} (height x width), and {of}= is "
            f"{height}x{width}. Give a mask of the same size, white inside the region."
        )
    if not mask.any():
        raise DataError(f"{option}={path} has no white pixel, so there is no region. Paint it white, the rest black.")
    return mask


@contextmanager
def _named(path: Path, option: str) -> Iterator[None]:
    """Puts the option into the error of its file."""
    if not is_there(path):
        raise DataError(f"There is no file {path}. Give {option}=FILE, a picture.")
    try:
        yield
    except UnreadablePictureError as error:
        raise DataError(f"{option}={error}") from error


# -- opening -------------------------------------------------------------------------------------------------------


def _opened(path: Path, stream: BinaryIO) -> PillowImage.Image:
    start = stream.read(32)
    if not start:
        raise UnreadablePictureError.of(path, "is empty")
    opener = next((opener for kind, opener in KINDS if kind.match(start)), None)
    if opener is None:
        other = next((name for kind, name in OTHER_KINDS if kind.match(start)), None)
        fault = f"is {other}" if other else "is no picture"
        raise UnreadablePictureError.of(path, f"{fault}; expected {READ}", SAVE_AGAIN)
    if _is_cut_off(stream, start):
        raise UnreadablePictureError.of(path, f"is cut off after {stream.seek(0, 2)} bytes")
    stream.seek(0)
    picture = opener(stream)
    if (pixels := picture.width * picture.height) > LARGEST:
        raise _too_large(path, f"{pixels / 1e6:.0f}")
    if getattr(picture, "is_animated", False):
        fault = f"is an animation of {getattr(picture, 'n_frames', 2)} pictures"
        raise UnreadablePictureError.of(path, fault, "Save the one that is meant.")
    if picture.mode not in COLOURS:
        advice = "Convert it to sRGB with its colour profile."
        raise UnreadablePictureError.of(path, f"is in the colour space {picture.mode}", advice)
    return picture


def _too_large(path: Path, megapixels: str) -> UnreadablePictureError:
    fault = f"has {megapixels} megapixels; at most {LARGEST / 1e6:.0f} are read"
    return UnreadablePictureError.of(path, fault, "Make it smaller.")


def _is_cut_off(stream: BinaryIO, start: bytes) -> bool:
    """Whether a file ends before its picture does; motion photos go on behind it."""
    length = stream.seek(0, 2)
    if start.startswith(b"RIFF"):
        return length < int.from_bytes(start[4:8], "little") + 8
    end = {b"\xff\xd8": JPEG_END, b"\x89P": PNG_END}.get(start[:2])
    if end is None:
        return False
    stream.seek(max(0, length - TAIL))
    if stream.read().rstrip(b"\0").endswith(end):
        return False
    stream.seek(0)
    content = stream.read()
    return not _jpeg_ends(content) if end == JPEG_END else PNG_END not in content


def _jpeg_ends(content: bytes) -> bool:
    """Whether the end mark comes behind the pixels (previews in the header have one, too)."""
    place = 2
    while marker := JPEG_MARKER.search(content, place):
        if marker[1] == JPEG_END[1:]:
            return True
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return False


def _orientation(picture: PillowImage.Image) -> int:
    """EXIF's, 1 where there is none; from what was read so far (a PNG's own method would decode it)."""
    found = PillowImage.Image.getexif(picture).get(ORIENTATION, 1)
    return int(found) if found in range(1, 9) else 1


# -- pixels --------------------------------------------------------------------------------------------------------


def _decoded(
    picture: PillowImage.Image, path: Path, mode: Literal["RGB", "L"], ground: Ground, about: int | None
) -> Image:  # fmt: skip
    height = upright_size(picture).height
    factor = next((n for n in (8, 4, 2) if about and height >= n * about), 1)
    small = (max(1, picture.width // factor), max(1, picture.height // factor))
    if picture.draft(mode, small):  # JPEG is reduced, and becomes grey, as it is decoded
        factor = 1
    before = _orientation(picture)
    picture.load()
    if _orientation(picture) != before:
        fault = "says only behind its pixels how it is turned"
        raise UnreadablePictureError.of(path, fault, SAVE_AGAIN)
    turn = _turn(picture)
    picture = _without_transparency(picture, ground)
    if picture.mode.startswith("I"):
        upper = np.asarray(picture).astype(np.uint32) >> 8
        picture = PillowImage.fromarray(upper.astype(np.uint8))
    picture = picture if picture.mode == mode else picture.convert(mode)
    return cast(Image, turn(np.array(picture.reduce(factor) if factor > 1 else picture)))


def _without_transparency(picture: PillowImage.Image, ground: Ground) -> PillowImage.Image:
    if not picture.has_transparency_data or picture.mode.startswith("I"):
        return picture
    above = picture.convert("RGBA")
    below = PillowImage.new("RGBA", above.size, ground)
    return PillowImage.alpha_composite(below, above).convert("RGB")


def _turn(picture: PillowImage.Image) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """What brings an open picture's array upright (the EXIF standard's eight orientations)."""
    steps, mirrored = {
        1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True),
        5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False),
    }[_orientation(picture)]  # fmt: skip

    def turn(array: NDArray[Any]) -> NDArray[Any]:
        turned = np.rot90(array, steps) if steps else array
        return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)

    return turn
