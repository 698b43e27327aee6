"""The same values in every kind of memory that an array may have."""

import numpy as np

from support import BFLOAT16


def misaligned(a):
    out = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def channels_last(a):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) if a.ndim > 2 else a


ODD = {  # the same values in another kind of memory
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
    "strided at the end": lambda a: np.repeat(a, 3, axis=-1)[..., ::3],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "reversed at the end": lambda a: a[..., ::-1].copy()[..., ::-1],
    "fortran": np.asfortranarray,
    "permuted": lambda a: np.ascontiguousarray(a.swapaxes(0, -1)).swapaxes(0, -1),
    "channels-last memory": channels_last,
    "misaligned": misaligned,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "read-only": read_only,
}


def odd_kinds(dtype):
    return [k for k in ODD if not (k == "byte-swapped" and dtype == BFLOAT16)]


def place(values, dtype, placement="contiguous", axes=None):
    """The values in memory of that placement, seen through a permutation of the axes."""
    shape = values.shape
    if placement == "strided":
        view = np.full((*shape[:-1], 2 * shape[-1]), np.nan, dtype)[..., ::2]
    elif placement == "offset":
        view = np.full(values.size + 1, np.nan, dtype)[1:].reshape(shape)
    else:
        view = np.empty(shape, dtype)
    view[...] = values.astype(dtype)
    return view if axes is None else view.transpose(axes)


def output_like(x):
    """Memory for out=: x's layout where kilter reads x in place, else C order."""
    dense = x.flags.c_contiguous or np.moveaxis(x, 1, -1).flags.c_contiguous
    return np.empty_like(x) if dense else np.empty(x.shape, x.dtype)
