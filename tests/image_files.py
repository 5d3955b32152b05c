"""Image files written byte by byte, of kinds that Pillow reads and does not write."""

import struct
import zlib

import numpy as np


TIFF_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "s", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}
"""How a value of each type of a TIFF tag is packed."""


def ifd(tags: list[tuple[int, int, int, bytes]], *, order: str = "<", start: int = 8) -> bytes:
    """A TIFF directory that begins at `start`, the values that do not fit into it behind it.

    Args:
        tags: Number, type, count and packed value of each tag.
        order: "<" or ">".
        start: Where in the file it will be.
    """
    entries, behind = struct.pack(f"{order}H", len(tags)), b""
    values_start = start + 2 + 12 * len(tags) + 4
    for number, kind, count, value in sorted(tags):
        if len(value) > 4:
            behind, value = behind + value, struct.pack(f"{order}I", values_start + len(behind))
        entries += struct.pack(f"{order}HHI", number, kind, count) + value.ljust(4, b"\0")
    return entries + struct.pack(f"{order}I", 0) + behind


def exif(orientation: int, *others: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with an orientation and other tags of any kind."""
    tags = [(274, 3, 1, struct.pack("<H", orientation)), *others]
    return b"Exif\0\0" + struct.pack("<2sHI", b"II", 42, 8) + ifd(tags)


def tiff(pixels: np.ndarray, *, photometric: int, bits: int | None = None, planar: bool = False, order: str = "<"):
    """An uncompressed TIFF file of [H, W] or [H, W, C] pixels; twelve bits are packed.

    Args:
        pixels: Unsigned integers or float32.
        photometric: 0 for white is zero, 1 for black is zero, 2 for RGB.
        bits: Bits of a number; those of the pixels' type by default.
        planar: Whether each channel lies by itself.
        order: "<" or ">".
    """
    height, width, channels = (*pixels.shape, 1)[:3]
    bits = bits or 8 * pixels.dtype.itemsize
    if planar:
        pixels = np.moveaxis(pixels.reshape(height, width, channels), -1, 0)
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    if bits == 12:
        first, second = pixels.astype(np.uint16).reshape(-1, 2).T
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    number_of_strips = channels if planar else 1
    length = len(data) // number_of_strips
    starts = [8 + strip * length for strip in range(number_of_strips)]

    def tag(number: int, *values: int) -> tuple[int, int, int, bytes]:
        return number, 4, len(values), struct.pack(f"{order}{len(values)}I", *values)

    def short(number: int, *values: int) -> tuple[int, int, int, bytes]:
        return number, 3, len(values), struct.pack(f"{order}{len(values)}H", *values)

    tags = [tag(256, width), tag(257, height), short(258, *[bits] * channels), short(259, 1), short(262, photometric)]
    tags += [tag(273, *starts), short(277, channels), tag(278, height), tag(279, *[length] * number_of_strips)]
    tags += [short(284, 2 if planar else 1), short(339, *[3 if pixels.dtype.kind == "f" else 1] * channels)]
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return head + data + ifd(tags, order=order, start=8 + len(data))


def png(pixels: np.ndarray, *, bits: int, transparent: int | tuple[int, int, int]) -> bytes:
    """A PNG file of [H, W] grey or [H, W, 3] RGB pixels, one level or colour of which is transparent."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        shifts = np.arange(bits)[::-1]
        lines = [np.packbits((row[:, None] >> shifts & 1).astype(np.uint8)).tobytes() for row in rows]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    key = struct.pack(">3H", *transparent) if pixels.ndim == 3 else struct.pack(">H", transparent)
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
