"""Where arrays enter and leave: every kind of memory, refusals without a trace, threads, fork."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kilter import init
from kilter.norm import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from kilter.optim import Adam
from kilter.stats import RunningStats, merge, moments
from memory import ODD, misaligned, odd_kinds, read_only
from optimizers import KINDS as OPTIMIZERS
from support import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, arithmetic, refused, same_bits

SHAPE = (6, 5, 7, 4)
ROW_NORMS = ((layer_norm, layer_norm_backward), (rms_norm, rms_norm_backward))


KINDS = [(dtype, kind) for dtype in DTYPES for kind in odd_kinds(dtype)]
kinds = pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)

PER_SAMPLE = {  # x, gamma, beta, options -> y and cache; dy, cache, options -> gradients
    "group": (lambda x, *affine, **options: group_norm(x, 1, *affine, **options), group_norm_backward),
    "instance": (instance_norm, instance_norm_backward),
}
per_sample = pytest.mark.parametrize(("forward", "backward"), PER_SAMPLE.values(), ids=PER_SAMPLE)


# --------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("axis", [1, -1])
@kinds
def test_batch_norm_reads_any_memory(backend, rng, dtype, kind, axis):
    x, r, dy = rng.normal(size=(3, *SHAPE)).astype(dtype)
    gamma, beta, weights = rng.normal(size=(3, SHAPE[axis])).astype(arithmetic(dtype))
    weights = rng.random(SHAPE[0])
    options = {"axis": axis, "activation": "relu"}

    def results(place):
        *inputs, residual, w, upstream = (backend.array(place(a)) for a in (x, gamma, beta, r, weights, dy))
        y, cache = batch_norm(*inputs, residual=residual, weights=w, **options)
        return [backend.numpy(a) for a in (y, *batch_norm_backward(upstream, cache))]

    # Channels-last memory is read in place, in another order of additions: equal, but not in bits.
    close = {FLOAT64: 1e-13, FLOAT32: 1e-5, FLOAT16: 2e-3, BFLOAT16: 2e-2}[dtype]
    equal = (lambda a, b: np.allclose(a, b, rtol=close, atol=close / 10)) if "last" in kind else same_bits
    assert all(equal(a, b) for a, b in zip(results(ODD[kind]), results(np.copy), strict=True))


@kinds
def test_row_norms_read_any_memory(backend, rng, dtype, kind):
    data = rng.normal(size=(4, *SHAPE)).astype(dtype)
    affine = rng.normal(size=(2, *SHAPE[-2:])).astype(arithmetic(dtype))

    def results(place):
        x, r, dy, dsum, gamma, beta = (backend.array(place(a)) for a in (*data, *affine))
        y, cache = layer_norm(x, gamma, beta, ndim=2, residual=r)
        y2, cache2 = rms_norm(x, gamma, ndim=2)
        grads = *layer_norm_backward(dy, cache, dsum=dsum), *rms_norm_backward(dy, cache2)
        return [backend.numpy(a) for a in (y, y2, *grads)]

    assert all(same_bits(a, b) for a, b in zip(results(ODD[kind]), results(np.copy), strict=True))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_reads_broadcast_memory(rng, dtype, axis):
    rows = rng.normal(size=(4, 1, 5, 3)).astype(dtype)
    x = np.broadcast_to(rows, (4, 3, 5, 3))  # stride 0
    same = x.copy()
    dy = np.broadcast_to(rng.normal(size=3).astype(dtype), x.shape)
    y, cache = batch_norm(x, axis=axis, residual=x)
    want, expected = batch_norm(same, axis=axis, residual=same)
    assert same_bits(y, want)
    grads, wants = batch_norm_backward(dy, cache), batch_norm_backward(dy.copy(), expected)
    assert same_bits(grads.dx, wants.dx) and same_bits(grads.dresidual, wants.dresidual)


@per_sample
@pytest.mark.parametrize("axis", [1, -1])
@kinds
def test_norms_of_samples_read_any_memory(backend, rng, dtype, kind, axis, forward, backward):
    data = rng.normal(size=(2, *SHAPE)).astype(dtype)
    affine = rng.normal(size=(2, SHAPE[axis])).astype(arithmetic(dtype))

    def results(place):
        x, dy, gamma, beta = (backend.array(place(a)) for a in (*data, *affine))
        y, cache = forward(x, gamma, beta, axis=axis)
        return [backend.numpy(a) for a in (y, *backward(dy, cache))]

    close = {FLOAT64: 1e-13, FLOAT32: 1e-5, FLOAT16: 2e-3, BFLOAT16: 2e-2}[dtype]
    equal = (lambda a, b: np.allclose(a, b, rtol=close, atol=close)) if "last" in kind else same_bits
    assert all(equal(a, b) for a, b in zip(results(ODD[kind]), results(np.copy), strict=True))


@kinds
def test_moments_and_evaluation_read_any_memory(backend, rng, dtype, kind):
    x = rng.normal(size=SHAPE).astype(dtype)
    oddly, plain = backend.array(ODD[kind](x)), backend.array(x)
    running = RunningStats(5, dtype=arithmetic(dtype), xp=backend.xp)
    running.update(backend.array(rng.normal(size=5)), backend.array(rng.random(5)), 10)
    for a, b in zip(moments(oddly), moments(plain), strict=True):
        a, b = backend.numpy(a), backend.numpy(b)
        equal = np.allclose(a, b, rtol=1e-6, atol=1e-6) if "last" in kind else same_bits(a, b)
        assert equal
    y, _ = batch_norm(oddly, running=running, training=False)
    assert same_bits(backend.numpy(y), backend.numpy(batch_norm(plain, running=running, training=False)[0]))


@pytest.mark.parametrize("kind", ODD)
def test_update_reads_any_memory(backend, rng, kind):
    mean, var = rng.normal(size=9), rng.random(9)
    plain, odd = (RunningStats(9, dtype="float64", xp=backend.xp) for _ in range(2))
    plain.update(backend.array(mean), backend.array(var), 4)
    odd.update(backend.array(ODD[kind](mean)), backend.array(ODD[kind](var)), 4)
    assert same_bits(backend.numpy(odd.mean), backend.numpy(plain.mean))
    assert same_bits(backend.numpy(odd.var), backend.numpy(plain.var))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@kinds
def test_gradients_in_any_memory(rng, dtype, kind, optimizer):
    start, g = rng.normal(size=(2, *SHAPE)).astype(dtype)
    a, b = start.copy(), start.copy()
    odd = ODD[kind](g)
    optimizer([a]).step([odd])
    optimizer([b]).step([g])
    assert same_bits(a, b) and (np.array(odd, dtype) == g).all()


# --------------------------------------------------------------------------- empty


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(backend, dtype):
    small, xp = arithmetic(dtype), backend.xp
    for shape in ((4, 0), (4, 0, 5)):  # no channels: nothing to do
        x = xp.empty(shape, dtype)
        y, cache = batch_norm(x, xp.empty(0, small), xp.empty(0, small))
        grads = batch_norm_backward(y, cache)
        assert y.shape == grads.dx.shape == shape and grads.dgamma.shape == (0,)
    for shape in ((0, 3), (4, 3, 0), (0, 3, 5)):  # no values: no statistics, but evaluation is defined
        x = xp.empty(shape, dtype)
        running = RunningStats(3, dtype=small, xp=xp)
        with refused("(?i)value", running):
            batch_norm(x, running=running)
        y, cache = batch_norm(x, xp.ones(3, small), running=running, training=False)
        grads = batch_norm_backward(y, cache)
        assert y.shape == grads.dx.shape == shape and (backend.numpy(grads.dgamma) == 0).all()
        assert backend.numpy(moments(x).count) == 0
    assert init.he_normal((4, 0), seed=0, dtype=dtype, xp=xp).shape == (4, 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_empty_tensors(optimizer):
    opt = optimizer([np.empty(0), np.empty((3, 0))], track_norm=True)
    assert float(opt.step([np.empty(0), np.empty((3, 0))]).grad_norm) == 0


# --------------------------------------------------------------------------- out


def bad_outs(dtype):
    """Arrays that no function may write a SHAPE result into."""
    other = FLOAT64 if dtype != FLOAT64 else FLOAT32
    big = np.full((2 * SHAPE[0], *SHAPE[1:]), 7, dtype)
    return {
        "strided": big[::2],
        "reversed": np.full(SHAPE, 7, dtype)[::-1],
        "fortran": np.full(SHAPE, 7, dtype, "F"),
        "broadcast": np.broadcast_to(np.full(SHAPE[1:], 7, dtype), SHAPE),
        "read-only": read_only(np.full(SHAPE, 7, dtype)),
        "misaligned": misaligned(np.full(SHAPE, 7, dtype)),
        "byte-swapped": np.full(SHAPE, 7, np.dtype(">f4") if dtype == FLOAT32 else np.dtype(">i2")),
        "dtype": np.full(SHAPE, 7, other),
        "shape": np.full(SHAPE[:-1], 7, dtype),
        "transposed shape": np.full(SHAPE[::-1], 7, dtype),
        "list": [[7.0]],
        "number": 7.0,
    }


@pytest.mark.parametrize("kind", bad_outs(FLOAT32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_checked(rng, dtype, kind):
    x = rng.normal(size=SHAPE).astype(dtype)
    running = RunningStats(5, dtype=arithmetic(dtype))
    out = bad_outs(dtype)[kind]
    with refused(r"\bout\b", out, x, running):
        batch_norm(x, running=running, out=out)
    with refused(r"\bout\b", out, x, running):
        batch_norm(x, running=running, training=False, out=out)
    _, cache = batch_norm(x)
    with refused(r"\bout\b", out, x):
        batch_norm_backward(x, cache, out=out)
    for row_norm, backward in ROW_NORMS:
        with refused(r"\bout\b", out, x):
            row_norm(x, out=out)
        with refused(r"\bout\b", out, x):
            backward(x, row_norm(x)[1], out=out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_not_overlap_in_part(dtype):
    memory = np.arange(3000).astype(dtype)
    x, n = memory[:840].reshape(SHAPE), 840
    running = RunningStats(5, dtype=arithmetic(dtype))
    for shift in (1, 5, 835, 839):
        with refused("out", memory, running):
            batch_norm(x, running=running, out=memory[shift : shift + n].reshape(SHAPE))
        with refused("out", memory, running):
            batch_norm(np.ones(SHAPE, dtype), residual=x, out=memory[shift : shift + n].reshape(SHAPE))
    batch_norm(x, running=running, out=memory[n : 2 * n].reshape(SHAPE))  # neighbours are fine
    _, cache = batch_norm(x)
    with refused("out", memory):
        batch_norm_backward(np.ones(SHAPE, dtype), cache, out=memory[3 : n + 3].reshape(SHAPE))
    for row_norm, backward in ROW_NORMS:
        with refused("out", memory):
            row_norm(x, out=memory[1 : n + 1].reshape(SHAPE))
        _, cache = row_norm(x)
        with refused("out", memory):
            backward(np.ones(SHAPE, dtype), cache, out=memory[3 : n + 3].reshape(SHAPE))
        with refused("out", memory):
            backward(x, row_norm(np.ones(SHAPE, dtype))[1], out=memory[3 : n + 3].reshape(SHAPE))


@per_sample
@pytest.mark.parametrize("kind", bad_outs(FLOAT32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_of_a_norm_of_samples_is_checked(rng, dtype, kind, forward, backward):
    x, out = rng.normal(size=SHAPE).astype(dtype), bad_outs(dtype)[kind]
    with refused(r"\bout\b", out, x):
        forward(x, out=out)
    _, cache = forward(x)
    with refused(r"\bout\b", out, x):
        backward(x, cache, out=out)


@per_sample
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_of_a_norm_of_samples_may_not_overlap_in_part(dtype, forward, backward):
    memory, small = np.arange(3000).astype(dtype), arithmetic(dtype)
    x, n = memory[:840].reshape(SHAPE), 840
    _, cache = forward(x)
    for shift in (1, 5, 839):
        with refused("out", memory):
            forward(x, out=memory[shift : shift + n].reshape(SHAPE))
        with refused("out", memory):
            backward(np.ones(SHAPE, dtype), cache, out=memory[shift : shift + n].reshape(SHAPE))
    forward(x, out=memory[n : 2 * n].reshape(SHAPE))  # neighbours are fine
    gamma = memory[800:805] if dtype == small else np.arange(5).astype(dtype)
    with refused("out", memory):
        forward(np.ones(SHAPE, dtype), memory[:5], out=x)
    _, cache = forward(x, gamma)
    with refused("out", memory):
        backward(np.ones(SHAPE, dtype), cache, out=memory[:840].reshape(SHAPE))


@pytest.mark.parametrize("name", ["mean", "var"])
def test_out_may_not_overlap_the_running_statistics(name):
    memory = np.arange(840, dtype=FLOAT32)
    running = RunningStats(5)
    out = memory.reshape(SHAPE)
    try:
        setattr(running, name, memory[:5])
    except (AttributeError, TypeError):
        pytest.skip("the statistics keep their own memory")
    with refused("", memory, running):
        batch_norm(np.random.default_rng(0).normal(size=SHAPE).astype(FLOAT32), running=running, out=out)


# --------------------------------------------------------------------------- what is no array of numbers

NO_DATA = {
    "list": [[1.0, 2.0], [3.0, 4.0]],
    "number": 1.0,
    "scalar": np.float32(1),
    "zero dimensions": np.array(1.0),
    "one dimension": np.ones(5),
    "none": None,
    "text": "x",
    "int": np.ones((4, 2), int),
    "bool": np.ones((4, 2), bool),
    "complex": np.ones((4, 2), complex),
    "object": np.ones((4, 2), object),
    "string": np.full((4, 2), "1.0"),
    "longdouble": np.ones((4, 2), np.longdouble),
    "structured": np.ones((4, 2), [("a", "f4")]),
    "datetime": np.ones((4, 2), "M8[s]"),
}


@pytest.mark.parametrize("kind", NO_DATA)
def test_no_data(kind):
    bad, x = NO_DATA[kind], np.arange(8.0).reshape(4, 2)
    running, out = RunningStats(2, dtype="float64"), np.full((4, 2), 7.0)
    with refused(r"\bx\b|\baxis\b", running, out):
        batch_norm(bad, running=running, out=out)
    if kind != "one dimension":
        with refused(r"\bx\b|\baxis\b"):
            moments(bad)
    if kind != "none":
        for name in ("residual", "gamma", "beta"):
            with refused(rf"\b{name}\b", running, out):
                batch_norm(x, **{name: bad}, running=running, out=out)
    _, cache = batch_norm(x)
    with refused(r"\bdy\b", out):
        batch_norm_backward(bad, cache, out=out)
    if kind != "one dimension":
        for row_norm, backward in ROW_NORMS:
            with refused(r"\bx\b|\bndim\b", out):
                row_norm(bad, out=out)
            with refused(r"\bdy\b", out):
                backward(bad, row_norm(x)[1], out=out)
            if kind != "none":
                with refused(r"\bgamma\b", out):
                    row_norm(x, bad, out=out)
    p = np.ones((4, 2))
    for optimizer in OPTIMIZERS.values():
        opt = optimizer({"w": p})
        with refused(r"\bw\b", p, opt):
            opt.step({"w": bad})


@per_sample
@pytest.mark.parametrize("kind", NO_DATA)
def test_no_data_for_a_norm_of_samples(kind, forward, backward):
    bad, x, out = NO_DATA[kind], np.arange(16.0).reshape(4, 2, 2), np.full((4, 2, 2), 7.0)
    with refused(r"\bx\b|\baxis\b", out):
        forward(bad, out=out)
    if kind != "none":
        for affine in ((bad,), (None, bad)):
            with refused(r"\bgamma\b|\bbeta\b", out):
                forward(x, *affine, out=out)
    with refused(r"\bdy\b", out):
        backward(bad, forward(x)[1], out=out)


def test_mixed_dtypes_are_refused():
    for a in DTYPES:
        for b in set(DTYPES) - {a}:
            x, other = np.arange(8).reshape(4, 2).astype(a), np.ones((4, 2), b)
            out = np.full((4, 2), 7, a)
            with refused("residual", out):
                batch_norm(x, residual=other, out=out)
            _, cache = batch_norm(x)
            with refused("dy", out):
                batch_norm_backward(other, cache, out=out)
            if b != arithmetic(a):
                with refused("gamma", out):
                    batch_norm(x, np.ones(2, b), out=out)


def test_subclasses_are_arrays(rng):
    class Named(np.ndarray):
        pass

    x = rng.normal(size=(6, 3))
    y, _ = batch_norm(x.view(Named))
    assert same_bits(np.asarray(y), batch_norm(x)[0])


# --------------------------------------------------------------------------- threads and fork


def work(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 8, 40, 40)).astype(FLOAT32)
    y, cache = batch_norm(x, activation="relu")
    dx = batch_norm_backward(x, cache).dx
    p = rng.normal(size=300_000).astype(FLOAT32)
    opt = Adam([p])
    for _ in range(3):
        opt.step([p * np.float32(0.5)])
    return [y, dx, p, init.he_normal((600, 700), seed=seed), merge(moments(x), moments(y)).m2]


def test_concurrent_calls():
    alone = [work(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            together = list(pool.map(work, range(6)))
            for a, b in zip(alone, together, strict=True):
                assert all(same_bits(u, v) for u, v in zip(a, b, strict=True))


def test_threads_may_read_one_array(rng):
    x = rng.normal(size=(64, 8, 40, 40)).astype(FLOAT16)
    want, _ = batch_norm(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(same_bits(y, want) for y, _ in pool.map(batch_norm, [x] * 8))


FORK = """
import os, signal, sys, time, hashlib
import numpy as np
from kilter.norm import batch_norm
from kilter.optim import Adam
x = np.arange(4_000_000, dtype=np.float32).reshape(1000, 4000) % 17
def parallel():
    p = x.ravel().copy()
    Adam([p]).step([p.copy()])
    return hashlib.sha256(batch_norm(x)[0].tobytes() + p.tobytes()).hexdigest()
want = parallel()
child = os.fork()
if child == 0:
    ok = parallel() == want
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if parallel() == want else 4)
    _, status = os.waitpid(grandchild, 0)
    os._exit(0 if ok and status == 0 else 3)
end = time.monotonic() + 60
while time.monotonic() < end:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        same = parallel() == want
        sys.exit(os.waitstatus_to_exitcode(status) if same else 5)
    time.sleep(0.01)
os.kill(child, signal.SIGKILL)
sys.exit("the child hangs")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", ["2", "7"])
def test_fork_after_a_parallel_call(threads, monkeypatch):
    monkeypatch.setenv("KILTER_NUM_THREADS", threads)
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
