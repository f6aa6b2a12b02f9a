"""Image files, good, odd and hostile, for the tests of the trainer's data."""

import io
import os
import struct
import zlib

import numpy as np
import torch
from PIL import Image, PngImagePlugin

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
0 0 8 8 rectfill
%%EOF
"""


def picture(colour, width=32, height=32):
    return Image.new("RGB", (width, height), colour)


def colour_of(label, index):
    return (20 * label, index, 255 - index)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(width=32, height=32):
    pixels = torch.randint(
        256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def turned(form="JPEG"):
    """An image, red above and blue below, stored on its side with the orientation to say so."""
    upright = picture((255, 0, 0), 16, 16)
    upright.paste(picture((0, 0, 255), 16, 8), (0, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    return encoded(upright.transpose(Image.Transpose.ROTATE_90), form, exif=exif)


def is_upright(square):
    """Whether (3, height, width) pixels of `turned` are red on top and blue below."""
    height = square.shape[1]
    top, below = square[:, : height // 4], square[:, -(height // 4) :]
    return bool(
        (top[0] > 200).all()
        and (top[2] < 60).all()
        and (below[2] > 200).all()
        and (below[0] < 60).all()
    )


def gradient():
    """(256, 256) uint16: every upper byte, with every lower byte."""
    return np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)


def bomb():
    """A PNG of a few bytes that says it has 3.6e9 pixels."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def text_bomb():
    """A PNG whose text unpacks to more than Pillow allows."""
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "0" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return encoded(picture((1, 2, 3)), pnginfo=info)


BROKEN = {
    "empty": (b"", "must be an image, got something else"),
    "text": (b"no image", "must be an image, got something else"),
    "eps": (EPS, "must be an image, got something else"),
    "short-png": (encoded(noise())[:-400], "must be a whole image, got"),
    "short-jpeg": (encoded(noise(), "JPEG")[:-300], "must be a whole image, got OSError: .*trunc"),
    "bomb": (bomb(), "must be a whole image, got DecompressionBombError"),
    "text-bomb": (text_bomb(), "must be a whole image, got ValueError"),
    "floats": (
        encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
        r"must have 8 or 16 bits a channel, got floats \(mode F\)",
    ),
    "integers": (
        encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"),
        r"must have 8 or 16 bits a channel, got signed or 32-bit integers \(mode I\)",
    ),
}
"""Bytes that cannot be used, and what is said of them."""


def write_folder(root, classes=("cat", "dog"), count=3, width=32, height=32, suffix="png"):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(colour_of(label, index), width, height).save(root / name / f"{index}.{suffix}")
    return root


def settle(path, seconds=10):
    """As if the file had been written that long ago, as far as a program can say so."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - seconds * 10**9))
