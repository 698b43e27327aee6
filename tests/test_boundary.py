"""Where arrays enter and leave: no copies, every kind of memory, refusals without a trace, threads, fork."""

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kilter import init
from kilter.norm import batch_norm, batch_norm_backward
from kilter.optim import SGD, Adam, AdamW
from kilter.stats import RunningStats, merge, moments
from support import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, arithmetic, refused, same_bits

SHAPE = (6, 5, 7, 4)


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


KINDS = [(dtype, kind) for dtype in DTYPES for kind in odd_kinds(dtype)]
kinds = pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)


# --------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("axis", [1, -1])
@kinds
def test_batch_norm_reads_any_memory(backend, rng, dtype, kind, axis):
    x, r, dy = rng.normal(size=(3, *SHAPE)).astype(dtype)
    gamma, beta, weights = rng.normal(size=(3, SHAPE[axis])).astype(arithmetic(dtype))
    weights = rng.random(SHAPE[0])
    options = {"axis": axis, "activation": "relu"}
    want, cache = batch_norm(x, gamma, beta, residual=r, weights=weights, **options)
    wants = batch_norm_backward(dy, cache)
    odd = ODD[kind]
    oddly = [backend.array(odd(a)) for a in (x, gamma, beta, r)]
    y, cache = batch_norm(*oddly[:3], residual=oddly[3], weights=backend.array(odd(weights)), **options)
    grads = batch_norm_backward(backend.array(odd(dy)), cache)
    # Channels-last memory is read in place, in another order of additions: equal, but not in bits.
    close = {FLOAT64: 1e-13, FLOAT32: 1e-5, FLOAT16: 2e-3, BFLOAT16: 2e-2}[dtype]
    equal = (lambda a, b: np.allclose(a, b, rtol=close, atol=close / 10)) if "last" in kind else same_bits
    assert equal(backend.numpy(y), want)
    assert all(equal(backend.numpy(a), b) for a, b in zip(grads, wants, strict=True))


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


@kinds
def test_moments_and_evaluation_read_any_memory(rng, dtype, kind):
    x = rng.normal(size=SHAPE).astype(dtype)
    running = RunningStats(5, dtype=arithmetic(dtype))
    running.update(rng.normal(size=5), rng.random(5), 10)
    for a, b in zip(moments(ODD[kind](x)), moments(x), strict=True):
        equal = np.allclose(a, b, rtol=1e-6, atol=1e-6) if "last" in kind else same_bits(a, b)
        assert equal
    y, _ = batch_norm(ODD[kind](x), running=running, training=False)
    assert same_bits(y, batch_norm(x, running=running, training=False)[0])


@pytest.mark.parametrize("kind", ODD)
def test_update_reads_any_memory(rng, kind):
    mean, var = rng.normal(size=9), rng.random(9)
    plain, odd = RunningStats(9, dtype="float64"), RunningStats(9, dtype="float64")
    plain.update(mean, var, 4)
    odd.update(ODD[kind](mean), ODD[kind](var), 4)
    assert same_bits(odd.mean, plain.mean) and same_bits(odd.var, plain.var)


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
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
def test_empty(dtype):
    small = arithmetic(dtype)
    for shape in ((4, 0), (4, 0, 5)):  # no channels: nothing to do
        x = np.empty(shape, dtype)
        y, cache = batch_norm(x, np.empty(0, small), np.empty(0, small))
        grads = batch_norm_backward(y, cache)
        assert y.shape == grads.dx.shape == shape and grads.dgamma.shape == (0,)
    for shape in ((0, 3), (4, 3, 0), (0, 3, 5)):  # no values: no statistics, but evaluation is defined
        x = np.empty(shape, dtype)
        running = RunningStats(3, dtype=small)
        with refused("(?i)value", running):
            batch_norm(x, running=running)
        y, cache = batch_norm(x, np.ones(3, small), running=running, training=False)
        grads = batch_norm_backward(y, cache)
        assert y.shape == grads.dx.shape == shape and (grads.dgamma == 0).all()
        assert (np.asarray(moments(x).count) == 0).all()
    assert init.he_normal((4, 0), seed=0, dtype=dtype).shape == (4, 0)


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_not_overlap_in_part(dtype):
    memory = np.arange(3000).astype(dtype)
    x, n = memory[:840].reshape(SHAPE), 840
    running, small = RunningStats(5, dtype=arithmetic(dtype)), np.ones(5, arithmetic(dtype))
    for shift in (1, 5, 835, 839):
        with refused("out", memory, running):
            batch_norm(x, running=running, out=memory[shift : shift + n].reshape(SHAPE))
        with refused("out", memory, running):
            batch_norm(np.ones(SHAPE, dtype), residual=x, out=memory[shift : shift + n].reshape(SHAPE))
    batch_norm(x, running=running, out=memory[n : 2 * n].reshape(SHAPE))  # neighbours are fine
    _, cache = batch_norm(x)
    with refused("out", memory):
        batch_norm_backward(np.ones(SHAPE, dtype), cache, out=memory[3 : n + 3].reshape(SHAPE))
    if dtype == small.dtype:
        with refused("out|gamma", memory):
            batch_norm(np.ones(SHAPE, dtype), memory[:5], out=x)


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
    p = np.ones((4, 2))
    for optimizer in (SGD, Adam, AdamW):
        opt = optimizer({"w": p})
        with refused(r"\bw\b", p, opt):
            opt.step({"w": bad})


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


# --------------------------------------------------------------------------- no copies


def largest_allocation(work):
    """Bytes that NumPy held at most during work(), over what it held before."""
    work()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layout", ["channels first", "channels last", "channels-last memory"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_copies_nothing(rng, dtype, layout):
    x, r, dy, out, dx = (rng.normal(size=(8, 16, 64, 64)).astype(dtype) for _ in range(5))
    axis = -1 if layout == "channels last" else 1
    if layout == "channels-last memory":
        x, r, dy, out, dx = (a.transpose(0, 3, 1, 2) for a in (x, r, dy, out, dx))
    gamma, beta = np.ones((2, x.shape[axis]), arithmetic(dtype))
    running = RunningStats(x.shape[axis], dtype=arithmetic(dtype))
    options = {"axis": axis, "residual": r, "activation": "relu", "running": running}

    def train():
        _, cache = batch_norm(x, gamma, beta, **options, out=out)
        batch_norm_backward(dy, cache, out=dx)

    limit = x.nbytes / 20
    # dresidual is a result of its own: as large as x, and the only one.
    assert largest_allocation(train) < x.nbytes + limit
    options["residual"] = None
    assert largest_allocation(train) < limit
    assert largest_allocation(lambda: batch_norm(x, gamma, beta, **options, training=False, out=out)) < limit
    assert largest_allocation(lambda: moments(x, axis)) < limit


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_copies_nothing(dtype, optimizer):
    p, g = np.ones((2, 500, 1000), dtype)
    opt = optimizer([p], clip_norm=1.0, skip_nonfinite=True)
    address = p.__array_interface__["data"]
    assert largest_allocation(lambda: opt.step([g])) < p.nbytes / 20
    assert p.__array_interface__["data"] == address


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fill_copies_nothing(dtype):
    out = np.empty((500, 1000), dtype)
    for fill in (init.he_normal, init.he_uniform):
        assert largest_allocation(lambda fill=fill: fill((500, 1000), seed=0, dtype=dtype, out=out)) < out.nbytes / 20


MEMORY = """
import resource, numpy as np
from kilter.norm import batch_norm, batch_norm_backward
from kilter.optim import Adam
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x, y, dx = (np.ones((32, 64, 90, 90), np.float32) for _ in range(3))  # 66 MB each
x[::2] += 1
p, g = np.ones((2, 8_000_000), np.float32)
opt, small = Adam([p]), np.ones((8, 64, 9, 9), np.float32)
small[0] = 2
batch_norm_backward(small, batch_norm(small)[1])
opt.step([g])
start = peak()
batch_norm_backward(x, batch_norm(x, out=y, activation="relu")[1], out=dx)
opt.step([g])
print(peak() - start)
"""


def test_the_core_copies_nothing_either():
    """Memory that NumPy does not see: the peak of a whole process."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8e6


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
