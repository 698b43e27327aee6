"""Small tools for tests: distances between numbers, bits, and calls that must be refused without a trace."""

from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest

FLOAT64, FLOAT32, FLOAT16 = (np.dtype(n) for n in ("float64", "float32", "float16"))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)


def arithmetic(dtype):
    """The dtype in which kilter computes on data of this dtype."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def ulp(values, dtype):
    """Distance between neighbouring numbers of dtype at each value."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.frexp(np.abs(np.asarray(values, np.float64)))[1] - 1
    return np.exp2(np.maximum(exponent, info.minexp) - float(info.nmant))


def relative_error(got, want, scale=0.0):
    """Norm of the difference over the norm of `want` (or over `scale` where that is larger)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    size = max(np.linalg.norm(want), scale)
    distance = np.linalg.norm(got - want)
    return distance / size if size else distance


def assert_close(got, want, dtype, bound=None, scale=0.0):
    """Norm-wise for float32 and float64; for 16 bit one rounding of `want` plus one ulp, each element."""
    if dtype in (FLOAT16, BFLOAT16):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
        # The arithmetic is float32: a result that cancels keeps float32's error, relative to its neighbours.
        float32 = 2e-6 * max(np.linalg.norm(want), scale) / np.sqrt(max(want.size, 1))
        worst = np.abs(got - want) / (1.5 * ulp(want, dtype) + float32)
        assert not (worst > 1).any() and not np.isnan(worst).any(), f"{np.nanmax(worst):.2f} times the allowed error"
    else:
        bound = bound or {FLOAT64: 1e-13, FLOAT32: 2e-6}[dtype]
        error = relative_error(got, want, scale)
        assert error <= bound, f"relative error {error:.2e}, allowed {bound:.0e}"


def same_bits(a, b):
    """Equal dtype, shape and bits; all NaNs count as one."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    canonical = [np.where(np.isnan(v), np.array(np.nan, v.dtype), v).tobytes() for v in (a, b)]
    return canonical[0] == canonical[1]


def arrays_of(things):
    """Every array in nested lists, tuples and dicts, and in the state of optimizers and statistics."""
    if isinstance(things, np.ndarray):
        return [things]
    if hasattr(things, "state_dict"):
        things = things.state_dict()
    if isinstance(things, dict):
        things = list(things.values())
    if isinstance(things, (list, tuple)):
        return [a for thing in things for a in arrays_of(thing)]
    return []


def memory_of(array):
    """The whole array that a view looks into, so that a stray write beside the view is seen too."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@contextmanager
def refused(match, *watched):
    """The block raises a KilterError whose message matches (any, if empty) and changes nothing watched."""
    from kilter import KilterError

    arrays = [memory_of(a) for a in arrays_of(watched)]
    before = [a.tobytes() for a in arrays]
    with pytest.raises(KilterError, match=match or None):
        yield
    assert before == [a.tobytes() for a in arrays], "an array changed although the call was refused"


def plain(state):
    """A state dict as comparable values: arrays as (dtype, shape, bytes)."""
    return {k: (v.dtype.str, v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for k, v in state.items()}


def copied(state):
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in state.items()}
