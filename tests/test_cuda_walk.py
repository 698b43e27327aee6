"""A walk through the CUDA kernels: every path once, at the smallest sizes that lead there, beside the core.

Faults are planted and sanitizers look where this goes; what the operations promise is tested elsewhere.
"""

import numpy as np
import pytest

import cudasim
from kilter import _kilter
from kilter.cuda.ops import table
from kilter.cuda.optim import RULES
from kilter.optim import Adam, LossScaler, NAdam, RMSprop, clip_grad_norm
from support import FLOAT32, FLOAT64, same_bits

SMALL = 2 << 10  # bytes of shared memory of a device on which rows are long soon
REAL = {"sum_dy": FLOAT64, "sum_dy_xhat": FLOAT64, "mean": FLOAT64, "m2": FLOAT64, "count": FLOAT64}


class Walk:
    """Calls operations of the core and of a simulated device on the same arrays, which it compares."""

    def __init__(self, **options):
        self.runtime = cudasim.SimRuntime(**options)
        self.ops = table(self.runtime)
        self.there = {}

    def arrays(self, **shapes):
        """Arrays that are to be filled."""
        return {name: np.full(shape, np.nan, REAL.get(name, FLOAT32)) for name, shape in shapes.items()}

    def call(self, name, *arguments, size=1):
        """What both return; their results may differ by rounding, of sums over `size` terms. Scalars are tuples."""
        arguments = [np.array(a) if isinstance(a, tuple) else a for a in arguments]
        there = [self._on_device(a) for a in arguments]
        returned = getattr(_kilter, name)(*arguments), getattr(self.ops, name)(*there)
        for a in arguments:
            if id(a) in self.there:
                got, scale = self.there[id(a)][1].get().astype(np.float64), np.sqrt(a.size * size)
                distance = np.linalg.norm(got - a)
                assert distance <= 4e-6 * max(np.linalg.norm(a.astype(np.float64)), scale), (name, distance, got, a)
        return returned

    def _on_device(self, a):
        if not isinstance(a, np.ndarray):
            return a
        if id(a) not in self.there:
            self.there[id(a)] = a, cudasim.to_device(a)  # and keeps a, so that there is one of this id
        return self.there[id(a)][1]

    @property
    def kernels(self):
        return {launch.kernel for launch in self.runtime.log}


def numbers(rng, *shapes):
    return [rng.normal(0.5, 1, shape).astype(FLOAT32) for shape in shapes]


# --------------------------------------------------------------------------- norms

ROWS = {  # shape, shared memory, whether with residual and mean
    "a warp": ((9, 24), None, True),
    "a warp, one by one": ((3, 29), None, False),
    "a block": ((3, 300), None, True),
    "many warps": ((5, 2100), None, False),
    "shared": ((2, 2501), None, True),
    "parts": ((2, 2501), SMALL, True),
    "parts of vectors": ((1, 8600), SMALL, False),
    "more parts than half a warp": ((1, 20001), SMALL, True),
    "many rows": ((70, 24), None, False),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(rng, case):
    shape, shared, whole = ROWS[case]
    walk = Walk(**({} if shared is None else {"shared": shared}))
    x, residual, dy, dsum, gamma, beta = numbers(rng, *[shape] * 4, *[shape[1]] * 2)
    small = walk.arrays(hi=shape[0], lo=shape[0], rstd=shape[0])
    large = walk.arrays(total=shape, y=shape, dx=shape)
    mean = (small["hi"], small["lo"]) if whole else (None, None)
    source = large["total"] if whole else x
    added = (residual, large["total"]) if whole else (None, None)
    h = (1e-5,)
    walk.call("ln_forward", x, added[0], h, gamma, beta if whole else None, *mean, small["rstd"], added[1], large["y"])
    sums = walk.arrays(sum_dy=shape[1], sum_dy_xhat=shape[1])
    more = dsum if whole else None
    arguments = (dy, source, gamma, *mean, small["rstd"], more, *sums.values(), large["dx"])
    walk.call("ln_backward", *arguments, size=shape[0])


GROUPS = {  # shape, groups, whether channels are last, shared memory
    "planes of vectors": ((2, 6, 4, 8), 3, False, None),
    "odd planes": ((2, 6, 3, 5), 2, False, None),
    "planes in shared memory": ((2, 4, 10, 12), 2, False, None),
    "three planes in shared memory": ((2, 6, 10, 12), 2, False, None),
    "walks without a part": ((9, 6, 2, 4), 3, False, None),
    "long planes": ((1, 2, 50, 52), 1, False, SMALL),
    "channels as samples": ((40, 12), 4, False, None),
    "last": ((2, 5, 7, 24), 3, True, None),
    "last, one by one": ((2, 3, 5, 9), 3, True, None),
    "last, wide groups": ((2, 9, 600), 1, True, None),
    "last, instances": ((2, 40, 24), 24, True, None),
    "last, many positions": ((1, 20, 30, 8), 2, True, None),
    "last, twice": ((2, 5, 7, 24), 3, True, SMALL),
    "last, twice, instances": ((2, 40, 24), 24, True, SMALL),
    "last, twice, many positions": ((1, 20, 30, 8), 2, True, SMALL),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups(rng, case):
    shape, groups, last, shared = GROUPS[case]
    walk = Walk(**({} if shared is None else {"shared": shared}))
    axis = len(shape) - 1 if last else 1
    channels = shape[axis]
    x, dy, gamma, beta = numbers(rng, shape, shape, channels, channels)
    found = walk.arrays(mean=(shape[0], groups), m2=(shape[0], groups), y=shape)
    h = (1e-5,)
    walk.call("gn_forward", x, axis, groups, h, gamma, beta, *found.values(), size=x.size // groups // shape[0])
    sums = walk.arrays(sum_dy=channels, sum_dy_xhat=channels, dx=shape)
    arguments = (dy, x, axis, groups, h, found["mean"], found["m2"], gamma, *sums.values())
    walk.call("gn_backward", *arguments, size=x.size // channels)


BATCH = {  # shape, axis
    "planes": ((5, 3, 16, 24), 1),
    "planes, many parts": ((6, 2, 64, 40), 1),
    "odd planes": ((3, 2, 23, 25), 1),
    "small planes": ((24, 12, 7, 7), 1),
    "last": ((9, 11, 5, 20), 3),
    "many channels": ((33, 260), 1),
    "many rows": ((1501, 8), 1),
    "odd columns": ((151, 37), 1),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("way", ["twice", "cluster", "resident"])
@pytest.mark.parametrize("case", BATCH)
def test_batch(rng, monkeypatch, case, way, weighted):
    shape, axis = BATCH[case]
    monkeypatch.setenv("KILTER_CUDA_READ_ONCE", "" if way == "twice" else way)
    walk, channels = Walk(), shape[axis]
    x, dy, residual, gamma, beta, *running = numbers(rng, *[shape] * 3, *[channels] * 4)
    n = x.size // channels
    weights = rng.integers(0, 3, n).astype(FLOAT32) if weighted else None
    moments = walk.arrays(count=1, mean=channels, m2=channels)
    normal = walk.arrays(hi=channels, lo=channels, rstd=channels)
    large = walk.arrays(y=shape, dx=shape, dresidual=shape)
    sums = walk.arrays(sum_dy=channels, sum_dy_xhat=channels)
    how = (gamma, beta, residual if weighted else None, True)
    arguments = (weights, (1e-5, 0.3, 1.0), *how, *moments.values(), *normal.values(), *running)
    walk.call("bn_train", x, axis, *arguments, large["y"], size=n)
    arguments = (weights, moments["count"], *normal.values(), *how, *sums.values(), large["dx"])
    walk.call("bn_backward", dy, x, axis, *arguments, large["dresidual"] if weighted else None, size=n)
    if way == "twice":
        walk.call("bn_stats", x, axis, weights, *moments.values(), size=n)
        walk.call("bn_finish", *moments.values(), (1e-5, 0.3, 1.0), *normal.values(), *running, size=n)
        walk.call("bn_apply", x, axis, *normal.values(), *how, large["y"])


# --------------------------------------------------------------------------- optimizers, averages, fills

SIZES = (5, 64, 1029, 0, 2500)


@pytest.mark.parametrize("rule", ["sgd", "adam", "rmsprop_window_momentum", "adadelta_window"])
@pytest.mark.parametrize("shift", [0, 1])
def test_steps(rng, rule, shift):
    """The bits of the core, from any place."""
    walk, kernel = Walk(), RULES[rule]

    def moved(a):
        room = walk.ops.step.args[0].xp.empty(a.size + shift, a.dtype)
        room[shift:] = cudasim.to_device(a.ravel())
        return room[shift:].reshape(a.shape)

    params, grads = (numbers(rng, *SIZES) for _ in range(2))
    shapes = [(3, sum(SIZES))] * kernel.windows + [(sum(SIZES),)] * kernel.slots
    state = [np.abs(a) for a in numbers(rng, *shapes)]
    h = np.array([0.5, 0.7, 1.0 if kernel.windows else 0.0, *rng.uniform(0.1, 0.9, kernel.scalars)])
    names = [str(i) for i in range(len(SIZES))]
    there = [[moved(a) for a in some] for some in (params, grads, state)]
    _kilter.step(rule, names, params, grads, state, None, h, 0)
    walk.ops.step(rule, names, *there, None, h, 0)
    for got, want in zip([*there[0], *there[2]], [*params, *state], strict=True):
        assert same_bits(got.get(), want)
    out, want = walk.ops.step.args[0].xp.empty(2), np.empty(2)
    walk.ops.grad_scan(names, there[1], out)
    _kilter.grad_scan(names, grads, want)
    np.testing.assert_allclose(out.get(), want, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [1, 17, 64, 131])
def test_fills(dtype, size):
    walk, h = Walk(), np.array([0.5, 2.0])
    for op in ("fill_uniform", "fill_normal"):
        want, room = np.empty(size, dtype), cudasim.xp.zeros(size + 1, dtype)
        getattr(_kilter, op)(want, 3, 4, h)
        for start in (0, 1):
            out = room[start : start + size]
            getattr(walk.ops, op)(out, 3, 4, h)
            assert same_bits(out.get(), want)
    words, want = cudasim.xp.zeros(size, np.uint32), np.empty(size, np.uint32)
    walk.ops.philox(words, 1, 2, 3)
    _kilter.philox(want, 1, 2, 3)
    np.testing.assert_array_equal(words.get(), want)


@pytest.mark.parametrize("size", [1, 3, 40, 1027])
def test_flat(rng, size):
    walk = Walk()
    s, x, y = numbers(rng, size, size, size)
    target = np.empty(size, FLOAT32)
    walk.call("ema", s, x, (0.3,))
    there = [cudasim.to_device(a) for a in (x, y, s, target)]
    walk.ops.probe_copy(there[0], there[3])
    assert same_bits(there[3].get(), x)
    walk.ops.probe_update(there[:2], there[2:])
    np.testing.assert_allclose(there[2].get(), s + x + y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(there[3].get(), 2 * x + y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 7), (2, 300), (1030, 2)], ids=["a warp", "a block", "more than blocks"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_losses(rng, shape, soft):
    walk, q = Walk(), rng.dirichlet(np.ones(shape[1]), shape[0])
    targets = q if soft else q.argmax(axis=1).astype(FLOAT64)
    for weights in (None, rng.random(shape[0])):
        dz = walk.arrays(dz=shape)["dz"]
        here, there = walk.call("softmax_cross_entropy", *numbers(rng, shape), targets, weights, 0.9, 0.02, dz)
        assert there == pytest.approx(here, rel=1e-6)


def test_steps_that_are_measured(cuda, rng):
    """Clipped by a norm, with a scaler, a step that is skipped, and clocks that are corrected."""
    params, grads = (numbers(rng, *SIZES) for _ in range(2))
    found = []
    for place in (np.array, cuda.array):
        own = [place(p.copy()) for p in params]
        groups = [{"params": {"a": own[0]}}, {"params": {"b": own[1]}, "lr": 0.1, "betas": (0.5, 0.9)}]
        rules = [Adam(groups, clip_norm=0.5), RMSprop(own[2:4], window=2), NAdam(own[4:], weight_decay=0.1)]
        scaler = LossScaler(4.0, interval=2)
        for factor in (1.0, 2.0, np.inf, 0.5):
            given = [place((g * 4 * factor).astype(FLOAT32)) for g in grads]
            rules[0].step({"a": given[0], "b": given[1]}, scaler=scaler)
            if np.isfinite(factor):
                rules[1].step(given[2:4])
                rules[2].step(given[4:])
        clipped = [place(g.copy()) for g in grads]
        length = clip_grad_norm(clipped, 1.0)
        found.append([cuda.numpy(a) for a in (*own, *clipped, length, scaler.scale)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
