"""The same input gives the same bits for any number of threads and any SIMD level."""

import hashlib
import itertools
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

THREADS = ("1", "2", "3", "7", "16")
LEVELS = ("baseline", "avx2", "avx512")  # one that the machine lacks falls to the next lower
SHAPES = [  # all past 4 MiB in float32, so that work is split along every axis
    (9000, 130),
    (300, 4099),
    (16, 34, 46, 47),
    (3, 5, 283, 281),
    (16, 1543, 7, 7),
    (1, 3, 640, 641),
    (150_001, 8),
]
DTYPES = ("float64", "float32", "float16", ml_dtypes.bfloat16)


def bits(*arrays):
    """One hash for all bytes; every NaN counts as the same."""
    digest = hashlib.sha256()
    for a in arrays:
        a = np.asarray(a)
        digest.update(a.tobytes() if a.dtype.kind in "iu" else np.where(a == a, a, np.array(np.nan, a.dtype)).tobytes())
    return digest.hexdigest()


def norms():
    from kilter.norm import batch_norm, batch_norm_backward
    from kilter.stats import RunningStats

    rng = np.random.default_rng(1)
    for (shape, dtype), axis in itertools.product(itertools.product(SHAPES, DTYPES), (1, -1, "permuted")):
        big = np.dtype(dtype).itemsize == 8 or dtype == "float16"
        if (axis == "permuted" and len(shape) == 2) or (big and shape not in SHAPES[:5:2]):
            continue
        x, r, dy = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3))
        x.flat[7] = 1e4
        if shape == SHAPES[0]:
            x[3, 5] = np.nan
        if axis != 1:
            x, r, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, r, dy))
        if axis == "permuted":
            x, r, dy = (np.moveaxis(a, -1, 1) for a in (x, r, dy))
        axis_number = 1 if axis == "permuted" else axis
        small = np.float64 if dtype == "float64" else np.float32
        gamma, beta = rng.standard_normal((2, x.shape[axis_number])).astype(small)
        running = RunningStats(x.shape[axis_number], dtype=small)
        weights = rng.random(shape[0]) if shape == SHAPES[2] else None
        y, cache = batch_norm(
            x, gamma, beta, axis=axis_number, activation="relu", residual=r, running=running, weights=weights
        )
        grads = batch_norm_backward(dy, cache)
        plain, _ = batch_norm(x, gamma, beta, axis=axis_number, running=running, training=False)
        name = f"batch norm {shape} {np.dtype(dtype).name} {axis}"
        yield f"{name} forward", bits(y, cache.moments.mean, cache.moments.m2, running.mean, running.var)
        yield f"{name} backward", bits(*grads)
        yield f"{name} evaluation", bits(plain)


GROUPED = [  # (N, C, *spatial), groups: split by samples and by groups, inside a group, and not at all
    ((8, 32, 65, 67), 8),
    ((3, 64, 90, 91), 64),
    ((150, 96, 7, 7), 12),
    ((3000, 300), 30),
    ((1, 6, 800, 803), 3),
]


def groups():
    from kilter.norm import group_norm, group_norm_backward

    rng = np.random.default_rng(4)
    for ((shape, parts), dtype), axis in itertools.product(itertools.product(GROUPED, DTYPES), (1, -1)):
        if np.dtype(dtype).itemsize == 8 and (shape, parts) not in GROUPED[::4]:
            continue
        x, dy = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
        x.flat[7] = 1e4
        if axis == -1:
            x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
        gamma, beta = rng.standard_normal((2, shape[1])).astype("float64" if dtype == "float64" else "float32")
        y, cache = group_norm(x, parts, gamma, beta, axis=axis)
        name = f"group norm {shape} {parts} {np.dtype(dtype).name} {axis}"
        yield f"{name} forward", bits(y, cache.moments.mean, cache.moments.m2)
        yield f"{name} backward", bits(*group_norm_backward(dy, cache))


ROWS = [(30_001, 64), (3000, 1027), (45, 65_540), (2, 1_500_000)]


def rows():
    from kilter.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward

    rng = np.random.default_rng(5)
    for shape, dtype in itertools.product(ROWS, DTYPES):
        if np.dtype(dtype).itemsize == 8 and shape not in ROWS[::3]:
            continue
        x, r, dy = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3))
        x.flat[7] = 1e4
        gamma, beta = rng.standard_normal((2, shape[1])).astype("float64" if dtype == "float64" else "float32")
        name = f"{shape} {np.dtype(dtype).name}"
        y, cache = layer_norm(x, gamma, beta, residual=r)
        yield f"layer norm {name} forward", bits(y, cache.x, cache.hi, cache.lo, cache.rstd)
        yield f"layer norm {name} backward", bits(*layer_norm_backward(dy, cache, dsum=r))
        y, cache = rms_norm(x, gamma)
        yield f"RMS norm {name} forward", bits(y, cache.rstd)
        yield f"RMS norm {name} backward", bits(*rms_norm_backward(dy, cache))


def steps():
    from kilter.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, DiagonalNewton, Lion, NAdam, RMSprop

    rng = np.random.default_rng(2)
    rules = [
        (SGD, {}),
        (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (SGD, {"momentum": 0.9, "lr_inside": True, "clip_norm": 1.0}),
        (Adam, {"amsgrad": True, "track_norm": True}),
        (Adam, {"weight_decay": 0.1, "clip_norm": 1.0, "skip_nonfinite": True}),
        (AdamW, {}),
        (AdamW, {"decay": "independent"}),
        (AdamW, {"state_dtype": "bfloat16"}),
        (Adagrad, {}),
        (RMSprop, {"centered": True, "momentum": 0.9}),
        (RMSprop, {"window": 3}),
        (RMSprop, {"window": 3, "momentum": 0.9, "state_dtype": "bfloat16"}),
        (Adadelta, {}),
        (Adadelta, {"window": 3}),
        (Adamax, {}),
        (NAdam, {"track_norm": True}),
        (Lion, {}),
        (DiagonalNewton, {"clip": 0.1}),
    ]
    for (kind, options), dtype in itertools.product(rules, DTYPES):
        sizes = (0, 7, 1_000_003, 1, 65_537)
        ps = [rng.standard_normal(n, np.float32).astype(dtype) for n in sizes]
        gs = [rng.standard_normal(n, np.float32).astype(dtype) for n in sizes]
        if dtype == "float64" and "state_dtype" in options:
            continue
        opt = kind(ps, 0.01, **options)
        more = (gs,) if kind is DiagonalNewton else ()
        for _ in range(20 if kind in (SGD, Adam) else 5):
            report = opt.step(gs, *more)
        state = [v for v in opt.state_dict().values() if isinstance(v, np.ndarray)]
        norm = [np.float64(report.grad_norm)] if options.get("track_norm") else []
        yield f"{kind.__name__} {options} {np.dtype(dtype).name}", bits(*ps, *state, *norm)


def fills():
    from kilter import init

    for name, dtype in itertools.product(("he_normal", "xavier_uniform", "torch_default"), DTYPES):
        w = getattr(init, name)((1201, 1399), seed=3, stream=1, dtype=dtype)
        yield f"{name} {np.dtype(dtype).name}", bits(w)


def run(**env):
    env = {**os.environ, **env}
    return subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def expected():
    done = run(KILTER_NUM_THREADS="1", KILTER_SIMD="baseline")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 100 and len({line.split("\t")[0] for line in lines}) == len(lines)
    return lines


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", THREADS)
def test_same_bits(expected, threads, level):
    done = run(KILTER_NUM_THREADS=threads, KILTER_SIMD=level)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    different = [a.split("\t")[0] for a, b in zip(expected, lines, strict=True) if a != b]
    assert not different


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KILTER_NUM_THREADS", "0"),
        ("KILTER_NUM_THREADS", "-1"),
        ("KILTER_NUM_THREADS", "two"),
        ("KILTER_NUM_THREADS", "1.5"),
        ("KILTER_SIMD", "sse9"),
        ("KILTER_SIMD", "AVX-2"),
    ],
)
def test_unknown_settings_are_refused_at_import(name, value):
    done = subprocess.run(
        [sys.executable, "-c", "import kilter"],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "KilterError" in message and name in message and value in message


if __name__ == "__main__":
    for item, digest in itertools.chain(norms(), groups(), rows(), steps(), fills()):
        print(item, digest, sep="\t")
