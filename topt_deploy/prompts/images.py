"""Images out of untrusted files: opened within the data folder only, measured before they are decoded.

The pixels are those that transformers' ``load_image`` and image processors make of a file: the first frame, turned as
EXIF says, in Pillow's own conversion to RGB. It drops an alpha channel and paints a colour that stands for transparency
white. What it would clip, numbers of more than 8 bits, is refused: 16-bit grey would become white, fractions black.
"""

import io
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.errors import BadData
from topt_deploy.storage.hashed_file import sha256_bytes
from topt_deploy.storage.os_errors import reading

Array = np.ndarray[Any, Any]

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
"""The formats of satellite and street images. Pillow's other decoders, some of which start programs, are not used."""
DEEP = ("I", "F")
"""Pillow's modes of whole numbers of 32 bits, and of fractions."""
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An image.

    Attributes:
        pixels: uint8 (h, w, 3), RGB.
        sha256: Of the bytes that were decoded.
        name: As the table has it.
    """

    pixels: Array
    sha256: str
    name: str


def open_image(root: Path, name: str, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Picture:
    """Read an image that a table names.

    Args:
        root: The data folder, which nothing is read outside of.
        name: A path relative to ``root``, or an absolute one inside of it.
        max_pixels: The most that width times height may be.
        max_bytes: The largest file.

    Raises:
        BadData: If this image cannot or must not be read, for whatever reason of its own.
        IOFailure: If the disk fails.
    """
    path = _inside(root, name)
    data = _bytes(path, max_bytes)
    return Picture(pixels=decode_image(data, path, max_pixels), sha256=sha256_bytes(data), name=name)


def _inside(root: Path, name: str) -> Path:
    """The real path of ``name``, links followed, which lies below ``root``."""
    supported = f"a path relative to {str(root)!r}, or an absolute one inside of it"
    if "://" in name or name.startswith(("data:", "file:")):
        raise BadData("images are read from files, not from addresses", expected=supported, found=repr(name[:200]))
    if not name or "\0" in name or ".." in Path(name).parts:
        raise BadData("not a plain path of an image", expected=supported, found=repr(name[:200]))
    folder = root.resolve()
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        reason = getattr(error, "strerror", None) or "a circle of links"
        raise BadData(
            f"no such image ({reason})", file=root / name[:200], fix="add it, or correct the table"
        ) from error
    if not path.is_relative_to(folder):
        raise BadData("the image lies outside the data folder", file=root / name, expected=supported, found=str(path))
    return path


def _bytes(path: Path, max_bytes: int) -> bytes:
    def opener(name: str, flags: int) -> int:
        # The path has no link left: one put there since is refused. Non-blocking: a pipe would keep us waiting.
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    try:
        stream = open(path, "rb", opener=opener)  # noqa: SIM115
    except OSError as error:
        raise BadData(f"this image cannot be opened ({error.strerror})", file=path) from error
    with stream, reading(path):
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise BadData("not a plain file", file=path, expected="an image file")
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadData("the image file is too large", file=path, expected=f"at most {max_bytes:,} bytes")
    return data


def decode_image(data: bytes, path: object, max_pixels: int = MAX_PIXELS) -> Array:
    """The pixels of an image file, uint8 (h, w, 3).

    Raises:
        BadData: If these bytes are no image, or one that must not be decoded; naming ``path``.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(action="ignore"):  # of what is refused below, or does not change a pixel
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = _largest(image)
            deep = image.mode in DEEP or image.mode.startswith("I;")
            if width * height <= max_pixels and not deep:
                return np.asarray(_rgb(image))
    except UnidentifiedImageError as error:
        raise BadData("not an image of a known format", file=path, expected=f"one of {', '.join(FORMATS)}") from error
    except Exception as error:  # on damaged files Pillow's decoders raise more kinds than they document
        reason = str(error) or type(error).__name__
        raise BadData(f"the image cannot be decoded ({reason})", file=path, fix="fetch or write it again") from error
    if deep:
        raise BadData(
            "the image has more than 8 bits per channel, and does not say which values are black and white",
            file=path, expected="8 bits per channel", found=f"Pillow's mode {image.mode}",
            fix="scale it to 8 bits, as by gdal_translate -ot Byte -scale",
        )  # fmt: skip
    raise BadData(
        "the image has too many pixels",
        file=path,
        expected=f"at most {max_pixels:,}",
        found=f"{width} × {height}",
        fix="scale it down: the encoder reads less than that anyway",
    )


def normalised(pixels: Array, scale: float, mean: Sequence[float], std: Sequence[float]) -> Array:
    """uint8 (h, w, 3) as a model's authors rescale it: the product in float64, rounded before the mean is taken off.

    Args:
        pixels: RGB.
        scale: Of the bytes.
        mean, std: Taken off, and divided by, per channel.

    Returns:
        float32 (h, w, 3).
    """
    scaled = (pixels * np.float64(scale)).astype(np.float32)
    values: Array = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    return values


def _largest(image: Any) -> tuple[int, int]:
    """Width and height of the most that decoding will hold.

    A TIFF of 16 × 16 pixels may say that it is made of one tile of 40,000 × 40,000, and its decoder believes it.
    """
    tags = getattr(image, "tag_v2", {})
    return max(image.size, (tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)), key=lambda size: size[0] * size[1])


def _rgb(image: Any) -> Any:
    """First what transformers' ``load_image`` does, then what its processors do to that."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image).convert("RGB")
    if image.info.get("transparency") is None:
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
