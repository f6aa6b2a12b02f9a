"""One image file at a time: the formats that are meant, upright, as an 8-bit RGB square."""

from __future__ import annotations

import contextlib
import io
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE

FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
"""What is opened, by Pillow's names, and the suffixes of its files.

Pillow knows many more, and calls external programs for some (Ghostscript for EPS).
"""

SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

LARGEST_FILE = 1 << 31
"""Bytes; no image within Pillow's limit of pixels needs more."""

LARGEST_SCALED = 1 << 26
"""Pixels of an image whose shorter side has been scaled."""


def explained(error: BaseException) -> str:
    """An error's kind and what it says; some, such as EOFError, say nothing."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def read_file(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises: OSError if it cannot be read, ValueError for pipes and devices, which may never end, and
    for files that are too large.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("must be a file, got a pipe, device or folder")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"must have at most {LARGEST_FILE} bytes, got {status.st_size}")
    return path.read_bytes()


def open_image(content: bytes) -> Image.Image:
    """The image in a file's bytes, decoded and turned as its EXIF orientation says.

    Of several frames it is the first. EXIF data that cannot be read turn nothing.

    Raises: ValueError if it is none of `FORMATS`, broken, cut short, or larger than Pillow allows.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=tuple(FORMATS))
        image.load()
    except UnidentifiedImageError:
        raise ValueError("must be an image, got something else") from None
    except Exception as error:  # hostile bytes lead Pillow's parsers to any of them
        raise ValueError(f"must be a whole image, got {explained(error)}") from None
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_square(image: Image.Image, size: int) -> np.ndarray[Any, Any]:
    """(3, size, size) uint8: the shorter side scaled to `size`, the middle cut out, in RGB.

    An image that is `size` x `size` keeps its pixels.

    Raises: ValueError as `to_rgb`, and for a strip that would fill the memory.
    """
    image = to_rgb(image)
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        scaled = max(size, round(width * scale)), max(size, round(height * scale))
        if math.prod(scaled) > LARGEST_SCALED:
            raise ValueError(
                f"must have sides that are more alike, got {width} x {height}, or {scaled[0]} x "
                f"{scaled[1]} as scaled"
            )
        image = image.resize(scaled, Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in scaled)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Of 16-bit grey the upper 8 bits stay, as Pillow does with 16-bit colours.

    Raises: ValueError for floats and 32-bit integers, whose range no file says.
    """
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        bits = 16
        if image.format == "TIFF":
            (bits,) = image.tag_v2.get(BITSPERSAMPLE, (16,))  # type: ignore[attr-defined]
        image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    elif mode in ("I", "F"):
        kind = "floats" if mode == "F" else "signed or 32-bit integers"
        raise ValueError(f"must have 8 or 16 bits a channel, got {kind} (mode {mode})")
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # what Pillow advises; the colours are the same
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"must be convertible to RGB, got {error}") from None
