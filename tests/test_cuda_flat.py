"""Fills and elementwise operations on flat arrays: the bits of the CPU's, on every array library."""

import numpy as np
import pytest

import cudasim
from kilter import KilterError, _kilter, init
from support import BFLOAT16, DTYPES, FLOAT32, arithmetic, same_bits

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 127, 1000, 5003)
SEEDS = (0, 2**32 + 1, 2**64 - 1)
FILLS = ("fill_uniform", "fill_normal")


def filled(backend, op, size, dtype, seed, stream, h, *attempt):
    out = backend.xp.empty(size, dtype)
    assert getattr(backend.ops, op)(out, seed, stream, h, *attempt) is None
    return backend.numpy(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", FILLS)
@pytest.mark.parametrize("size", SIZES)
def test_fills_have_the_bits_of_the_cpu(cuda, op, size, dtype):
    h = np.array([0.3, 1.7])
    for seed in SEEDS:
        want = np.empty(size, dtype)
        getattr(_kilter, op)(want, seed, 2**32 - 1, h)
        assert same_bits(filled(cuda, op, size, dtype, seed, 2**32 - 1, h), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_attempts_have_the_bits_of_the_cpu(cuda, dtype):
    h = np.array([0.3, 1.7])
    for attempt in (1, 2**32 - 1):
        want = np.empty(300, dtype)
        _kilter.fill_normal(want, 5, 6, h, attempt)
        assert same_bits(filled(cuda, "fill_normal", 300, dtype, 5, 6, h, attempt), want)


@pytest.mark.parametrize("op", FILLS)
def test_scalars_may_lie_on_the_device(cuda, op):
    h = np.array([-1.0, 0.5])
    want = filled(cuda, op, 300, FLOAT32, 3, 0, h)
    assert same_bits(filled(cuda, op, 300, FLOAT32, 3, 0, cuda.array(h)), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fills_of_places_without_alignment(cuda, dtype):
    room = cuda.xp.zeros(200, dtype)
    cuda.ops.fill_normal(room[1:180], 5, 6, np.array([0.0, 1.0]))
    want = np.empty(179, dtype)
    _kilter.fill_normal(want, 5, 6, np.array([0.0, 1.0]))
    assert same_bits(cuda.numpy(room)[1:180], want)
    assert not cuda.numpy(room)[[0, *range(180, 200)]].astype(np.float32).any()


@pytest.mark.parametrize("size", SIZES)
def test_words(cuda, size):
    for seed, stream, attempt in ((0, 0, 0), (2**64 - 1, 7, 3)):
        out, want = cuda.xp.empty(size, np.uint32), np.empty(size, np.uint32)
        cuda.ops.philox(out, seed, stream, attempt)
        _kilter.philox(want, seed, stream, attempt)
        np.testing.assert_array_equal(cuda.numpy(out), want)


INITIALISERS = {
    "uniform": lambda **options: init.uniform((7, 90), -1.0, 3.0, **options),
    "normal": lambda **options: init.normal((7, 90), 0.5, 2.0, **options),
    "truncated normal": lambda **options: init.truncated_normal((7, 90), 0.5, 2.0, **options),
    "truncated normal, empty": lambda **options: init.truncated_normal((0, 9), **options),
    "he normal": lambda **options: init.he_normal((7, 90), **options),
    "xavier uniform": lambda **options: init.xavier_uniform((7, 90), **options),
    "lecun normal": lambda **options: init.lecun_normal((7, 90), **options),
    "torch default": lambda **options: init.torch_default((7, 90), **options),
    "orthogonal": lambda **options: init.orthogonal((7, 90), gain=2.0, **options),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INITIALISERS)
def test_initialisers_have_the_bits_of_the_cpu(cuda, name, dtype):
    """In new arrays, and in given ones, which may lie on another than the current device."""
    fill, options = INITIALISERS[name], {"seed": 4, "stream": 2, "dtype": dtype}
    want = fill(**options)
    got = fill(**options, xp=cuda.xp)
    with cudasim.Device(1):
        out = cuda.xp.empty(want.shape, dtype)
    assert fill(**options, out=out) is out
    for array, device in ((got, 0), (out, 1)):
        assert isinstance(array, cudasim.SimArray) and array.device.id == device
        assert same_bits(cuda.numpy(array), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", [0, 1, 2])
def test_ema(backend, rng, dtype, size, start):
    real = arithmetic(dtype)
    s, x = rng.normal(size=size + start).astype(real), rng.normal(size=size + start).astype(dtype)
    want = s.astype(np.float64) + 0.3 * (x.astype(np.float64) - s)
    got, x = backend.array(s.copy()), backend.array(x)
    backend.ops.ema(got[start:], x[start:], np.array([0.3]))
    got = backend.numpy(got)
    assert same_bits(got[:start], s[:start])
    np.testing.assert_allclose(got[start:], want[start:], rtol=0, atol=1e-15 if real == np.float64 else 5e-7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", [0, 1, 2])
def test_copy(backend, rng, size, start):
    source, target = backend.array(rng.normal(size=size + start).astype(FLOAT32)), backend.xp.zeros(size, FLOAT32)
    backend.ops.probe_copy(source[start:], target)
    assert same_bits(backend.numpy(target), backend.numpy(source)[start:])


def test_launches_check_their_arguments(cuda):
    s, x, h = cuda.xp.zeros(8, FLOAT32), cuda.xp.zeros(8, BFLOAT16), np.array([0.5])
    far = cudasim.to_device(np.zeros(8, FLOAT32))
    far._device = 1
    for message, bad in (
        ("s: expected an array of float32", (cuda.xp.zeros(8, np.float64), x, h)),
        ("s: expected an array of float32", (np.zeros(8, FLOAT32), x, h)),
        ("h: expected 1 float64", (s, x, np.zeros(2))),
        ("expected all arrays on one device", (s, far, h)),
        ("C-contiguous", (cuda.xp.zeros(16, FLOAT32)[::2], x, h)),
    ):
        with pytest.raises(KilterError, match=message):
            cuda.ops.ema(*bad)
