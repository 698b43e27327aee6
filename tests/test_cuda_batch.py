"""Batch norm on the device: every way and layout against the core, the same bits in one call as in several, and what it
must not do: wait for the device, depend on where arrays lie, or count past 32 bits."""

from contextlib import contextmanager

import numpy as np
import pytest

import cudasim
from kilter import _kilter
from kilter.cuda import batch, batch_once, channels, source
from kilter.cuda.ops import table
from kilter.dist import Threads
from kilter.norm import batch_norm, batch_norm_backward
from kilter.stats import RunningStats, moments
from support import DTYPES, FLOAT16, FLOAT32, FLOAT64, arithmetic, assert_close, relative_error, same_bits

LAYOUTS = {  # shape, axis: how the elements of a block lie; whether its channels are columns
    "planes": ((7, 5, 32, 24), 1, False),
    "planes, many parts": ((6, 2, 96, 80), 1, False),
    "odd planes": ((3, 2, 33, 35), 1, False),
    "tiles of small planes": ((40, 24, 7, 7), 1, True),
    "tiles of tiny planes": ((19, 72, 2, 2), 1, True),
    "channels last": ((9, 11, 5, 40), 3, True),
    "many channels": ((33, 520), 1, True),
    "a column of vectors": ((3001, 8), 1, True),
    "odd columns": ((151, 37), 1, True),
}
TWICE = ["bn_stats", "bn_apply", "bn_sums", "bn_gradient"]
SEVERAL = ["bn_stats", "bn_finish", "bn_apply", "bn_sums", "bn_gradient"]
WAYS = {"cluster": "_cluster", "resident": "_resident"}  # the ends of their kernels' names


def operations(monkeypatch, way="", **options):
    """The table of operations that reads in this way, and the runtime that logs its launches."""
    monkeypatch.setenv("KILTER_CUDA_READ_ONCE", way)
    runtime = cudasim.SimRuntime(**options)
    return table(runtime), runtime


class Case:
    """Arguments of the operations for random data, on the host."""

    def __init__(self, rng, dtype, shape, axis, weighted=False, residual=True, relu=True, affine=True):
        self.axis, self.relu, self.channels = axis, relu, shape[axis]
        real = arithmetic(dtype)
        self.x, self.dy, r = rng.normal(1, 2, (3, *shape)).astype(dtype)
        self.residual = r if residual else None
        positions = self.x.size // self.channels
        self.weights = rng.integers(0, 3, positions).astype(real) if weighted else None
        self.gamma, self.beta = rng.normal(size=(2, self.channels)).astype(real) if affine else (None, None)
        self.running = rng.random((2, self.channels)).astype(real)
        self.h = np.array([1e-5, 0.3, 1.0])

    def results(self, ops, xp, fused=True, part=slice(None)):
        """What training and its backward write of some channels, by name."""
        here = {k: v if v is None or k == "h" or np.isscalar(v) else xp.asarray(v) for k, v in vars(self).items()}
        x, dy, w, h, gamma, beta, r = (here[k] for k in ("x", "dy", "weights", "h", "gamma", "beta", "residual"))
        axis, relu, dtype, real = self.axis, self.relu, x.dtype, arithmetic(self.x.dtype)
        mean, m2, sum_dy, sum_dy_xhat = (xp.empty(self.channels) for _ in range(4))
        count, (hi, lo, rstd) = xp.empty(1), (xp.empty(self.channels, real) for _ in range(3))
        running_mean, running_var = (xp.array(here["running"][i]) for i in range(2))
        y, dx = xp.empty(x.shape, dtype), xp.empty(x.shape, dtype)
        dresidual = xp.empty(x.shape, dtype) if relu and r is not None else None
        normal, running, how = (hi, lo, rstd), (running_mean, running_var), (hi, lo, rstd, gamma, beta, r, relu)
        if fused:
            ops.bn_train(x, axis, w, h, gamma, beta, r, relu, count, mean, m2, *normal, *running, y)
            ops.bn_backward(dy, x, axis, w, count, *how, sum_dy, sum_dy_xhat, dx, dresidual)
        else:
            ops.bn_stats(x, axis, w, count, mean, m2)
            ops.bn_finish(count, mean, m2, h, *normal, *running)
            ops.bn_apply(x, axis, *how, y)
            ops.bn_backward_reduce(dy, x, axis, *how, sum_dy, sum_dy_xhat)
            ops.bn_backward_apply(dy, x, axis, w, count, *how, sum_dy, sum_dy_xhat, dx, dresidual)
        kept = {k: v for k, v in locals().items() if k in _RESULTS and v is not None}
        kept = {k: v[part] if v.ndim == 1 else v[:, part] if axis == 1 else v for k, v in kept.items()}
        return {k: v.get() if hasattr(v, "get") else v for k, v in kept.items()}


_RESULTS = {  # the dtype by whose bound each is judged: the data's, or that of the arithmetic
    **dict.fromkeys(("y", "dx", "dresidual"), "data"),
    **dict.fromkeys(("count", "mean", "m2", "rstd", "running_mean", "running_var", "sum_dy", "sum_dy_xhat"), "real"),
}


def assert_same(got, want, dtype):
    """Results within the bounds of numbers that were added in another order."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        judge = dtype if _RESULTS[name] == "data" else arithmetic(dtype)
        size = np.sqrt(want["y"].size) if name.startswith("sum") else 0
        assert_close(value, want[name], judge, scale=size)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_call_is_several(cuda, rng, dtype, layout, weighted):
    shape, axis, columns = LAYOUTS[layout]
    case, found = Case(rng, dtype, shape, axis, weighted=weighted), []
    for fused, kernels in ((True, TWICE), (False, SEVERAL)):
        cuda.runtime.log.clear()
        found.append(case.results(cuda.ops, cuda.xp, fused))
        assert launches(cuda) == kernels
        for launch in cuda.runtime.log:
            has = "weights" in launch.given  # one for each place of a plane
            assert has == (weighted and launch.kernel in ("bn_stats", "bn_gradient"))
            assert launch.macros["V"] == "1" or "odd" not in layout
            if launch.kernel != "bn_finish":
                assert launch.macros["COLUMNS"] == str(int(columns and not (has and "tiles" in layout)))
    once, chain = found
    assert once.keys() == chain.keys()
    assert all(same_bits(once[name], chain[name]) for name in once)
    assert_same(once, case.results(_kilter, np), dtype)


OPTIONS = {
    "all": {},
    "no residual": {"residual": False},
    "no relu": {"relu": False},
    "plain": {"residual": False, "relu": False, "affine": False},
    "weighted": {"weighted": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_ways_that_read_once(rng, monkeypatch, way, layout, name):
    """Each layout in every dtype, with one set of options or another."""
    ops, runtime = operations(monkeypatch, way)
    dtype = DTYPES[(list(LAYOUTS).index(layout) + list(OPTIONS).index(name)) % 4]
    case, options = Case(rng, dtype, *LAYOUTS[layout][:2], **OPTIONS[name]), OPTIONS[name]
    got = case.results(ops, cudasim.xp)
    used = [launch.kernel for launch in runtime.log]
    inner = channels.around(case.x, case.axis)[2]
    odd = "odd" in layout or (options.get("weighted") and inner > 1 and inner * dtype.itemsize % 16 != 0)
    assert all(name.endswith(WAYS[way]) != odd for name in used) and len(used) == (4 if odd else 2)
    assert_same(got, case.results(_kilter, np), dtype)


@pytest.mark.parametrize("layout", [*((7, n, 32, 24) for n in (5, 2)), (40, 24, 7, 7), (495, 40), (3, 16)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "size"), [(FLOAT32, 1), (FLOAT32, 2), (FLOAT32, 4), *((dtype, 8) for dtype in DTYPES)], ids=str
)
def test_clusters_of_every_size(rng, monkeypatch, dtype, size, layout):
    ops, runtime = operations(monkeypatch, "cluster")
    monkeypatch.setattr(batch_once, "_CLUSTERS", (size,))
    batch_once.in_cluster.cache_clear()
    case = Case(rng, dtype, layout, 1)
    assert_same(case.results(ops, cudasim.xp), case.results(_kilter, np), dtype)
    assert [launch.kernel for launch in runtime.log] == ["bn_train_cluster", "bn_backward_cluster"]
    assert all(launch.grid[0] % size == 0 for launch in runtime.log)
    batch_once.in_cluster.cache_clear()


def test_groups_take_tiles_in_turn(rng, monkeypatch):
    """Two processors, five channels: three rounds of each group's barrier, whose counters are zero afterwards."""
    ops, runtime = operations(monkeypatch, "resident", processors=2)
    monkeypatch.setattr(batch_once, "_L2", 60000)
    batch_once.in_l2.cache_clear()
    case = Case(rng, FLOAT32, (7, 9, 32, 24), 1)
    for _ in range(2):
        assert_same(case.results(ops, cudasim.xp), case.results(_kilter, np), FLOAT32)
    way = batch_once.in_l2((7, 9, 768), 4, 1, False, 2)
    assert way.groups * 2 < way.split.tiles and way.split.parts > 1
    assert {launch.kernel for launch in runtime.log} == {"bn_train_resident", "bn_backward_resident"}
    batch_once.in_l2.cache_clear()


@pytest.mark.parametrize(
    ("way", "capability", "shape", "kernels"),
    [
        ("", 90, (8, 4, 64), ["bn_stats", "bn_apply"]),
        ("cluster", 80, (8, 4, 64), ["bn_stats", "bn_apply"]),
        ("cluster", 90, (8, 4, 64), ["bn_train_cluster"]),
        ("auto", 90, (8, 4, 64), ["bn_train_cluster"]),
        ("auto", 80, (8, 4, 64), ["bn_stats", "bn_apply"]),
        ("resident", 80, (8, 4, 64), ["bn_train_resident"]),
        ("auto", 90, (8, 3, 5, 5), ["bn_stats", "bn_apply"]),
    ],
    ids=str,
)
def test_the_way_that_is_gone(rng, monkeypatch, way, capability, shape, kernels):
    ops, runtime = operations(monkeypatch, way, capability=capability)
    Case(rng, FLOAT32, shape, 1).results(ops, cudasim.xp)
    assert [launch.kernel for launch in runtime.log][: len(kernels)] == kernels


def test_slices_of_a_residual_network():
    """With 256 images in bfloat16, a cluster holds every channel of ResNet-50 but the stem's."""
    room, sizes = 227 << 10, {(64, 56): 8, (256, 56): 8, (512, 28): 2, (256, 14): 2, (1024, 14): 2, (2048, 7): 2}
    for (count, side), k in sizes.items():
        way = batch_once.in_cluster((256, count, side * side), 2, 1, False, room)
        assert way.split.parts == k and way.shared <= 204 << 10, (count, side, way)
    assert batch_once.in_cluster((256, 64, 112 * 112), 2, 1, False, room) is None
    assert batch_once.in_l2((256, 64, 112 * 112), 2, 1, False, 132).groups >= 2


# --------------------------------------------------------------------------- what the results must not depend on


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_where_arrays_lie(cuda, rng, dtype, layout):
    shape, axis, _ = LAYOUTS[layout]
    x, dy, r = rng.normal(size=(3, *shape)).astype(dtype)
    found = []
    for off in (0, 1):
        arrays = []
        for a in (x, dy, r):
            room = cuda.xp.zeros(a.size + off, dtype)
            room[off:] = cuda.array(a.ravel())
            arrays.append(room[off:].reshape(shape))
        y, cache = batch_norm(arrays[0], axis=axis, residual=arrays[2], activation="relu")
        grads = batch_norm_backward(arrays[1], cache)
        found.append([cuda.numpy(a) for a in (y, cache.moments.m2, grads.dx, grads.dresidual)])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_scalars_may_lie_on_the_device(cuda, rng):
    case = Case(rng, FLOAT32, (9, 4, 6), 1)
    host = case.results(cuda.ops, cuda.xp)
    case.h = cuda.array(case.h)
    device = case.results(cuda.ops, cuda.xp)
    assert all(same_bits(host[name], device[name]) for name in host)


def test_splits_cover_the_array():
    """No empty part but the only one, enough blocks where the data allow, tiles of whole channels and whole vectors."""
    for outer in (0, 1, 3, 256, 100_003, 1 << 25):
        for count in (1, 3, 64, 129, 4096):
            for inner in (1, 4, 49, 196, 784, 3136, 12_543):
                for size, aligned in ((2, 8), (2, 1), (4, 4), (8, 2)):
                    found = channels.split((outer, count, inner), size, aligned, 132)
                    assert (found.parts - 1) * found.per < max(found.positions, 1) <= found.parts * found.per
                    assert found.threads % 32 == 0 and found.tiles * found.parts < 2**31
                    if found.columns:
                        width = found.lanes * found.width
                        assert width % inner == 0 and count * inner % found.width == 0
                        assert (found.tiles - 1) * width < count * inner <= found.tiles * width
                        assert width // inner <= min(found.threads, 256) and found.lanes <= found.threads
                        assert found.per <= found.at_once * channels.MANY
                    else:
                        assert inner % found.width == 0 and found.positions * found.width == outer * inner
                    if outer * count * inner > 1 << 26:
                        assert found.tiles * found.parts * found.threads >= 132 * 1024


def test_places_have_64_bits():
    """There is no other variant: past 2**31 elements (trap 30) the same instructions count."""
    for family in batch.FAMILIES:
        for variant in family.variants():
            for kernel, declared in source.declarations(family.name, variant).items():
                kinds = {p.name: p.dtype for p in declared.parameters if p.kind == "number"}
                if kernel != "bn_finish":
                    assert {kinds[name] for name in ("inner", "positions", "per")} == {np.int64}
    assert channels.split((3, 2**20, 2**12), 2, 8, 132).positions == 3 * 2**9
    assert channels.split((2**33, 8, 1), 2, 8, 132).per * 2**33 > 2**31


# --------------------------------------------------------------------------- the public functions


@contextmanager
def nothing_waits(monkeypatch):
    """What would wait for the device fails."""

    def waited(self, *_):
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        for name in ("get", "item", "tolist", "__float__", "__bool__", "__int__", "__index__"):
            patch.setattr(cudasim.SimArray, name, waited)
        yield


def launches(cuda):
    return [launch.kernel for launch in cuda.runtime.log]


@pytest.mark.parametrize("out", [False, True], ids=["", "out="])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_waits_for_nothing_and_has_two_launches_each_way(cuda, rng, monkeypatch, momentum, out):
    x, dy, r = map(cuda.array, rng.normal(size=(3, 6, 4, 5, 8)).astype(FLOAT16))
    gamma, beta = map(cuda.array, rng.normal(size=(2, 4)).astype(FLOAT32))
    running = RunningStats(4, momentum=momentum, xp=cuda.xp)
    y, dx = (cuda.xp.empty(x.shape, FLOAT16) if out else None for _ in range(2))
    with nothing_waits(monkeypatch):
        cuda.runtime.log.clear()
        _, cache = batch_norm(x, gamma, beta, running=running, residual=r, activation="relu", out=y)
        batch_norm_backward(dy, cache, out=dx)
        assert launches(cuda) == TWICE


PUBLIC = {  # options; kernels forward and backward; where weights and a residual are given to them
    "training": ({}, TWICE[:2], TWICE[2:], "", ""),
    "relu": ({"activation": "relu"}, TWICE[:2], TWICE[2:], "", ""),
    "residual": ({"residual": True}, TWICE[:2], TWICE[2:], "", "bn_apply"),
    "relu, residual": (
        {"residual": True, "activation": "relu"},
        TWICE[:2],
        TWICE[2:],
        "",
        "bn_apply bn_sums bn_gradient",
    ),
    "weights of samples": ({"weights": 1}, TWICE[:2], TWICE[2:], "bn_stats bn_gradient", ""),
    "weights of positions": ({"weights": 3}, TWICE[:2], TWICE[2:], "bn_stats bn_gradient", ""),
    "ranks": ({"comm": True}, SEVERAL[:3], SEVERAL[3:], "", ""),
    "ranks, weights": ({"comm": True, "weights": 3}, SEVERAL[:3], SEVERAL[3:], "bn_stats bn_gradient", ""),
    "frozen": ({"training": False}, SEVERAL[1:3], ["bn_sums", "bn_apply"], "", ""),
    "frozen, relu, residual": (
        {"training": False, "residual": True, "activation": "relu"},
        SEVERAL[1:3],
        TWICE[2:],
        "",
        "bn_apply bn_sums bn_gradient",
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_functions_take_these_kernels(cuda, rng, dtype, name):
    options, forward, backward, weighted, residual = PUBLIC[name]
    x, dy, r = rng.normal(1, 2, (3, 6, 4, 5, 8)).astype(dtype)
    gamma, beta = rng.normal(size=(2, 4)).astype(arithmetic(dtype))
    weights = rng.integers(0, 3, (6, 5, 8)[: options.get("weights", 0)])

    def results(place, xp, comm=None):
        given = {**options, "running": RunningStats(4, dtype=arithmetic(dtype), xp=xp), "comm": comm}
        given |= {"residual": place(r)} if residual else {}
        given |= {"weights": place(weights.astype(arithmetic(dtype)))} if weighted else {}
        y, cache = batch_norm(place(x), place(gamma), place(beta), **given)
        there = launches(cuda)
        grads = batch_norm_backward(place(dy), cache)
        return there, [y, *grads[:3], *([grads.dresidual] if residual else [])]

    def ranked(*where):
        return Threads(1).run(lambda comm: results(*where, comm))[0] if "comm" in options else results(*where)

    want = ranked(lambda a: a, np)[1]
    cuda.runtime.log.clear()
    there, found = ranked(cuda.array, cuda.xp)
    assert (there, launches(cuda)[len(there) :]) == (forward, backward)
    for array, kernels in (("weights", weighted), ("residual", residual)):
        assert [one.kernel for one in cuda.runtime.log if array in one.given] == kernels.split()
    for got, good in zip(found, want, strict=True):
        assert_close(cuda.numpy(got), good, good.dtype, scale=np.sqrt(good.size))


@pytest.mark.parametrize("relu", [None, "relu"])
def test_evaluation_waits_for_nothing(cuda, rng, monkeypatch, relu):
    x, dy = map(cuda.array, rng.normal(size=(2, 6, 4, 5)).astype(FLOAT32))
    running = RunningStats(4, xp=cuda.xp)
    with nothing_waits(monkeypatch):
        _, cache = batch_norm(x, running=running, training=False, activation=relu)
        batch_norm_backward(dy, cache)
        moments(x)


@pytest.mark.parametrize("ends", [(5, 9), (0, 12)], ids=str)
def test_ranks_on_the_device_are_one_batch(cuda, rng, ends):
    """Also those without values; one synchronised batch is as accurate as one array."""
    x, dy = rng.normal(size=(2, 13, 4, 6))
    running = RunningStats(4, dtype=FLOAT64, xp=cuda.xp)
    want, cache = batch_norm(cuda.array(x), running=running)
    wants = batch_norm_backward(cuda.array(dy), cache)
    xs, dys = (np.split(a, ends) for a in (x, dy))

    def work(comm):
        mine = RunningStats(4, dtype=FLOAT64, xp=cuda.xp)
        y, cache = batch_norm(cuda.array(xs[comm.rank]), running=mine, comm=comm)
        grads = batch_norm_backward(cuda.array(dys[comm.rank]), cache)
        return [cuda.numpy(a) for a in (y, grads.dx, mine.mean, mine.var, cache.moments.count)]

    found = Threads(3).run(work)
    assert relative_error(np.concatenate([f[0] for f in found]), cuda.numpy(want)) < 1e-13
    assert relative_error(np.concatenate([f[1] for f in found]), cuda.numpy(wants.dx)) < 1e-13
    for _, _, mean, var, count in found:
        assert relative_error(mean, cuda.numpy(running.mean)) < 1e-13 and count == 78
        assert relative_error(var, cuda.numpy(running.var)) < 1e-13
