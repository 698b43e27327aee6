"""The IDX file format of MNIST and its relatives."""

import gzip
import math
import os
import struct
import zlib
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kilter._check import fail

GZIP_MAGIC = b"\x1f\x8b"
MAX_DIMENSIONS = 64  # NumPy's own limit
# The third byte of an IDX file names the element type; elements are big-endian.
ELEMENTS = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read one IDX file, compressed by gzip or plain.

    The file holds two zero bytes, a type byte, the number of dimensions, each dimension as a big-endian
    uint32, and the elements in C order.

    Parameters
    ----------
    path
        The file. Compression is recognised by its content, not by its name.

    Returns
    -------
    array
        A new array in native byte order: uint8, int8, int16, int32, float32 or float64, as the file says.

    Raises
    ------
    KilterError
        The content is no IDX file, is cut short, or goes on after the last element. The message names the
        file.
    OSError
        The file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            _refuse(path, "a complete gzip file", str(error))
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in ELEMENTS or data[3] > MAX_DIMENSIONS:
        _refuse(path, "an IDX file", f"one that starts with the bytes {data[:4].hex(' ') or 'of nothing'}")
    element, dimensions = np.dtype(ELEMENTS[data[2]]), data[3]
    start = 4 + 4 * dimensions
    if len(data) < start:
        _refuse(path, f"an IDX header of {start} bytes", f"{len(data)} bytes")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    size = start + math.prod(shape) * element.itemsize
    if len(data) != size:
        _refuse(path, f"{size} bytes for {element.newbyteorder('=')} of shape {shape}", f"{len(data)} bytes")
    values = np.frombuffer(data, element, offset=start).reshape(shape)
    return values.astype(element.newbyteorder("="))


def _refuse(path: str | os.PathLike[str], expected: str, got: str) -> NoReturn:
    fail("path", expected, f"{got} in {os.fspath(path)!r}")
