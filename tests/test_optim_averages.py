"""kilter.optim: accumulated gradients, averaged weights, and the structures of arrays they take."""

import math
import re

import numpy as np
import pytest

import reference
from kilter.optim import (
    SGD,
    GradAccumulator,
    LossScaler,
    WeightEMA,
    clip_grad_norm,
    clip_grad_value,
    hutchinson,
)
from optimizers import fewer, on, read
from support import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    arithmetic,
    copied,
    plain,
    refused,
    relative_error,
    same_bits,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --------------------------------------------------------------------------- structures


A, B, C = np.ones((2, 3)), np.ones(3), np.ones(())
FORMS = {
    "list": [A, B, C],
    "tuple": (A, B, C),
    "dict": {"a": A, "b": B, "c": C},
    "groups": [{"params": [A], "lr": 0.1}, {"params": {"b": B, "c": C}}],
    "bare groups": [[A, B], {"c": C}],
    "empty": [],
    "empty group": [{"params": {}}, {"params": [A]}],
}


def shape_of(tree):
    """The structure alone, groups without options, tuples as lists."""
    if isinstance(tree, dict):
        return {k: shape_of(v) for k, v in tree.items()}
    return [shape_of(v) for v in tree] if isinstance(tree, list | tuple) else tree.shape


def placed(backend, tree):
    """The structure with its options, as tuples and lists as they are, on a backend."""
    if isinstance(tree, dict):
        return {k: v if k == "lr" else placed(backend, v) for k, v in tree.items()}
    return type(tree)(placed(backend, v) for v in tree) if isinstance(tree, list | tuple) else backend.array(tree)


def without_options(tree):
    if isinstance(tree, list | tuple):
        return [one["params"] if isinstance(one, dict) and "params" in one else one for one in tree]
    return tree


def doubled(tree):
    if isinstance(tree, dict):
        return {k: doubled(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [doubled(v) for v in tree]
    return np.asarray(2 * tree) if type(tree) is np.ndarray else 2 * tree


@pytest.mark.parametrize("form", FORMS)
def test_every_structure_of_an_optimizer_is_taken(backend, form):
    tree = placed(backend, FORMS[form])
    bare = without_options(tree)
    acc = GradAccumulator(tree)
    acc.add(doubled(bare))
    mean = acc.finish()
    assert shape_of(mean) == shape_of(bare)
    curvature = hutchinson(lambda v: doubled(v), tree, seed=0)
    assert shape_of(curvature) == shape_of(bare)
    clipped = doubled(bare)
    clip_grad_value(clipped, 0.5)
    assert clip_grad_norm(clipped, 100.0) == pytest.approx(0.5 * math.sqrt(sum(a.size for a in arrays_in(bare))))
    assert all((a == 0.5).all() for a in arrays_in(clipped))


@pytest.mark.parametrize("form", ["list", "tuple", "dict", "groups"])
def test_an_optimizer_takes_what_finish_returns(backend, form):
    groups = form == "groups"
    params = placed(backend, FORMS[form])
    params = [{**one, "params": doubled(one["params"])} for one in params] if groups else doubled(params)
    acc = GradAccumulator(params)
    acc.add(without_options(params))
    SGD(params, 1.0).step(acc.finish())
    assert [float(a.max()) for a in arrays_in(without_options(params))] == [1.8 if groups else 0, 0, 0]


def arrays_in(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [a for one in tree for a in arrays_in(one)] if isinstance(tree, list | tuple) else [tree]


def test_groups_may_be_given_by_name():
    acc = GradAccumulator([{"params": {"w": A}}, {"params": [B]}])
    acc.add({"1": 3 * B, "w": 2 * A})
    first, second = acc.finish()
    assert (first["w"] == 2).all()
    assert (second[0] == 3).all()


TAKE = {
    "like": GradAccumulator,
    "grads": lambda tree: GradAccumulator({"w": B}).add(tree),
    "params": WeightEMA,
    "grads ": lambda tree: clip_grad_norm(tree, 1.0),
    "grads  ": lambda tree: clip_grad_value(tree, 1.0),
    "like ": lambda tree: hutchinson(lambda v: v, tree, seed=0),
}


@pytest.mark.parametrize(
    ("entry", "tree"),
    [
        ("", 5),
        ("", A),
        ("", None),
        ("[w]", {"w": [1.0]}),
        ("[w]", {"w": 1.0}),
        ("[w]", {"w": None}),
        ("[w]", {"w": np.ones(3, int)}),
        ("[w]", {"w": np.ones(3, complex)}),
        ("", {3.5: B}),
        ("[1]", [B, None]),
        ("[1]", [[B], 5]),
        ("", [{"w": B}, {"w": C}]),
    ],
)
@pytest.mark.parametrize("argument", TAKE)
def test_what_is_no_structure_is_refused_by_name(argument, entry, tree):
    name = argument.strip()
    with refused(f"^{re.escape(name + entry)}: expected"):
        TAKE[argument](tree)


# --------------------------------------------------------------------------- accumulation


def test_v16_a_partial_window_divides_by_its_true_weight(backend):
    acc = GradAccumulator([backend.array(np.zeros(1))])
    acc.add([backend.array(np.array([2.0]))], weight=3)  # the mean of 1, 2, 3
    acc.add([backend.array(np.array([10.0]))], weight=1)
    np.testing.assert_allclose(backend.numpy(acc.finish()[0]), 4.0, rtol=1e-15)
    acc.add([backend.array(np.array([6.0]))], weight=2)  # a window that ends early
    assert acc.finish()[0] == 6.0


@dtypes
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (5, 16, 1, 10), (32,), (1,) * 32])
def test_micro_batches_are_one_batch(backend, rng, dtype, sizes):
    """Least squares: the gradient of the mean loss over all rows, whatever the cuts."""
    x, y, w = rng.normal(size=(32, 6)), rng.normal(size=(32, 2)), rng.normal(size=(6, 2))

    def grads(rows):
        error = x[rows] @ w - y[rows]
        return {"w": (x[rows].T @ error / len(error)).astype(dtype), "b": error.mean(0).astype(dtype)}

    cuts = np.split(np.arange(32), np.cumsum(sizes)[:-1])
    parts = [grads(rows) for rows in cuts]
    acc = GradAccumulator(on(backend, {"w": w.astype(dtype), "b": np.zeros(2, dtype)}))
    for rows, part in zip(cuts, parts, strict=True):
        acc.add(on(backend, part), weight=len(rows))
    mean = read(backend, acc.finish())
    for name in mean:
        exact = sum(n * part[name].astype(np.float64) for n, part in zip(sizes, parts, strict=True)) / 32
        assert mean[name].dtype == arithmetic(dtype)
        assert relative_error(mean[name], exact) < (1e-13 if dtype == FLOAT64 else 1e-6)
        if dtype == FLOAT64:
            np.testing.assert_allclose(mean[name], grads(np.arange(32))[name], rtol=1e-12)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_sums_of_16_bit_gradients_lose_nothing(backend, dtype):
    """4,096 gradients of which 16-bit sums would keep a fraction; and 4 whose sum leaves float16's range."""
    acc = GradAccumulator([backend.array(np.zeros(2, dtype))])
    small, large = on(backend, [np.array([1 / 64, 1.0], dtype), np.full(2, 60000).astype(dtype)])
    for _ in range(fewer(backend, 4096, 300)):
        acc.add([small])
    np.testing.assert_allclose(backend.numpy(acc.finish()[0]), [1 / 64, 1.0], rtol=1e-6)
    for _ in range(4):
        acc.add([large], weight=1000)
    assert (acc.finish()[0] == float(np.array(60000).astype(dtype))).all()


def test_accumulation_with_a_scaler_and_an_optimizer(backend):
    """16-bit parameters take the float32 mean; a non-finite micro-batch skips the whole step."""
    p, scaler = backend.array(np.ones(4, FLOAT16)), LossScaler(init=1024.0)
    opt, acc = SGD([p], 0.5), GradAccumulator([p])
    for parts in ([1, 3], [2, np.inf], [np.nan, 1, 1], [np.inf, -np.inf], [4]):
        for part in parts:
            acc.add([backend.array(np.full(4, 1024 * part if part < 10 else part).astype(FLOAT16))])
        opt.step(acc.finish(), scaler=scaler)
        scaler.scale = 1024.0
    assert (opt.calls, opt.applied) == (5, 2)
    assert (p == 1 - 0.5 * 2 - 0.5 * 4).all()


def test_a_weight_of_zero_adds_nothing():
    acc = GradAccumulator([np.zeros(2)])
    acc.add([np.array([np.nan, 1.0])], weight=0)
    with refused("^weight: expected gradients of a positive weight"):
        acc.finish()
    acc.add([np.ones(2)], weight=0.5)
    acc.add([np.full(2, np.inf)], weight=0.0)
    assert (acc.finish()[0] == 1).all()
    with refused("^weight"):
        acc.finish()


def test_the_arrays_of_finish_stay_the_same():
    acc = GradAccumulator([np.zeros(2)])
    seen = []
    for value in (1.0, 2.0):
        acc.add([np.full(2, value)])
        seen.append(acc.finish()[0])
    assert seen[0] is seen[1]


def test_any_layout_is_taken(backend, rng):
    x = rng.normal(size=(4, 6))
    for view in (x.T, x[::2, ::-1].copy(order="F"), np.broadcast_to(x[0], (3, 6)), x.astype(">f8")):
        acc, g = GradAccumulator([backend.array(np.zeros(view.shape))]), backend.array(view)
        acc.add([g])
        acc.add([g])
        np.testing.assert_allclose(backend.numpy(acc.finish()[0]), view, rtol=1e-15)


@pytest.mark.parametrize(
    ("match", "grads", "weight"),
    [
        ("grads: .*no b", {"w": np.ones(3, FLOAT32)}, 1),
        ("grads: .*also c", {"w": np.ones(3, FLOAT32), "b": np.ones(2, FLOAT32), "c": np.ones(1)}, 1),
        (r"grads\[b\]: expected shape \(2,\)", {"w": np.ones(3, FLOAT32), "b": np.ones(3, FLOAT32)}, 1),
        (r"grads\[b\]: .*float64", {"w": np.ones(3, FLOAT32), "b": np.ones(2)}, 1),
        (r"grads: .*no b, w", [np.ones(3, FLOAT32), np.ones(2, FLOAT32)], 1),
        *(("weight", {"w": np.ones(3, FLOAT32), "b": np.ones(2, FLOAT32)}, w) for w in (-1, math.nan, math.inf, "2")),
    ],
)
def test_accumulated_gradients_are_checked(match, grads, weight):
    acc = GradAccumulator({"w": np.zeros(3, FLOAT16), "b": np.zeros(2, FLOAT32)})
    acc.add({"w": np.ones(3, FLOAT16), "b": np.ones(2, BFLOAT16)})
    with refused(match):
        acc.add(grads, weight)
    assert all((g == 1).all() for g in acc.finish().values())


def test_the_sums_themselves_are_no_gradients(backend):
    first, second = on(backend, [np.ones(3), np.ones(2)])
    acc = GradAccumulator([first, second])
    acc.add([first, second])
    mean = acc.finish()
    acc.add([first, second])
    with refused(r"grads\[0\]: expected memory of its own", mean):
        acc.add([mean[0][::-1], second])


def test_a_scaler_that_should_have_grown_is_refused():
    scaler = LossScaler(interval=3)
    scaler.load_state_dict({"scale": 8.0, "clean": 2})
    with refused(r"^state\[clean\]"):
        scaler.load_state_dict({"scale": 8.0, "clean": 3})
    scaler.update(True)
    assert (scaler.scale, scaler.clean) == (16.0, 0)


# --------------------------------------------------------------------------- averaged weights


@dtypes
@pytest.mark.parametrize("warmup", [False, True])
def test_weight_ema_follows_its_formula(backend, rng, dtype, warmup):
    start = {"w": rng.normal(size=(5, 3)).astype(dtype), "b": rng.normal(size=40).astype(dtype)}
    ps, updates = on(backend, start), fewer(backend, 100, 15)
    ema = WeightEMA(ps, 0.9, warmup)
    want = {name: p.astype(np.float64) for name, p in start.items()}
    for n in range(updates):
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        for name, p in ps.items():
            p += backend.array(rng.normal(size=p.shape).astype(dtype))
            want[name] = reference.ema(want[name], backend.numpy(p).astype(np.float64), 1 - decay)
        ema.update()
    state = ema.state_dict()
    assert state["updates"] == updates
    for name in ps:
        average = state[f"average.{name}"]
        assert average.dtype == arithmetic(dtype)
        assert relative_error(average, want[name]) < (1e-13 if dtype == FLOAT64 else 1e-6)


def test_warmup_forgets_the_first_weights():
    p = np.zeros(1)
    averages = {}
    for warmup in (False, True):
        p[0] = 0.0
        ema = WeightEMA([p], 0.999, warmup)
        p[0] = 1.0
        for _ in range(10):
            ema.update()
        averages[warmup] = ema.state_dict()["average.0"][0]
    decays = np.prod([(1 + n) / (10 + n) for n in range(10)])
    np.testing.assert_allclose([averages[False], averages[True]], [1 - 0.999**10, 1 - decays], rtol=1e-12)
    assert averages[False] < 0.01
    assert averages[True] > 0.99


@dtypes
def test_swap_exchanges_in_place_and_back(backend, rng, dtype):
    ps = on(backend, [rng.normal(size=n).astype(dtype) for n in (5, 1, 300)])
    ema = WeightEMA(ps, 0.75)
    for _ in range(5):
        for p in ps:
            p += backend.array(rng.normal(size=p.shape).astype(dtype))
        ema.update()
    weights = [p.copy() for p in read(backend, ps)]
    averages = [a for k, a in copied(ema.state_dict()).items() if k != "updates"]
    for _ in range(3):
        assert not ema.swapped
        ema.swap()
        assert ema.swapped
        assert all(same_bits(p, a.astype(dtype)) for p, a in zip(read(backend, ps), averages, strict=True))
        ema.swap()
        assert all(same_bits(p, w) for p, w in zip(read(backend, ps), weights, strict=True))
    assert plain(ema.state_dict()) == plain({"updates": 5, **{f"average.{i}": a for i, a in enumerate(averages)}})


def test_nothing_moves_while_swapped():
    p = np.ones(3)
    ema = WeightEMA([p], 0.5)
    state = ema.state_dict()
    ema.swap()
    for call in (ema.update, lambda: ema.load_state_dict(state)):
        with refused("^params: .*call swap first", p):
            call()
    ema.swap()
    ema.update()


def test_averages_of_16_bit_weights_keep_small_steps():
    p = np.zeros(1, BFLOAT16)
    ema = WeightEMA([p], 0.999)
    p[0] = 1
    for _ in range(10):
        ema.update()
    np.testing.assert_allclose(ema.state_dict()["average.0"], 1 - 0.999**10, rtol=1e-5)


def test_averaging_damps_noise(rng):
    """The standard deviation of an average of noise is sqrt(a / (2 - a)) of the noise's, a = 1 - decay."""
    p = np.zeros(20_000)
    ema = WeightEMA([p], 0.9)
    for _ in range(100):
        p[...] = rng.normal(size=p.size)
        ema.update()
    assert ema.state_dict()["average.0"].std() == pytest.approx(math.sqrt(0.1 / 1.9), rel=0.03)


def test_a_resumed_average_goes_on(backend, rng):
    grads = on(backend, list(rng.normal(size=(20, 6))))

    def walk(p, ema, part):
        for g in part:
            p += g
            ema.update()
        return ema

    p, q = on(backend, [np.zeros(6), np.zeros(6)])
    whole = walk(p, WeightEMA({"w": p}, 0.9, True), grads)
    saved = copied(walk(q, WeightEMA({"w": q}, 0.9, True), grads[:10]).state_dict())
    second = WeightEMA({"w": q}, 0.9, True)
    second.load_state_dict(saved)
    assert plain(walk(q, second, grads[10:]).state_dict()) == plain(whole.state_dict())


def test_foreign_averages_are_refused():
    p = np.ones(3, FLOAT32)
    ema = WeightEMA({"w": p})
    good = copied(ema.state_dict())
    for bad in (
        {},
        None,
        {**good, "more": 1},
        {**good, "updates": -1},
        {**good, "updates": 1.5},
        {**good, "updates": math.inf},
        {**good, "average.w": np.ones(4, FLOAT32)},
        {**good, "average.w": np.ones(3)},
        {**good, "average.w": [1.0, 1.0, 1.0]},
    ):
        with refused("^state", p):
            ema.load_state_dict(bad)
        assert plain(ema.state_dict()) == plain(good)


def test_averaged_parameters_are_checked():
    locked = np.ones(3)
    locked.flags.writeable = False
    for bad in (locked, np.ones(6)[::2], np.ones((2, 3), order="F"), np.ones(3, ">f8")):
        with refused(r"params\[w\]"):
            WeightEMA({"b": np.ones(3), "w": bad})
    shared = np.ones(6)
    with refused("params.*memory"):
        WeightEMA([shared[:4], shared[3:]])
    for decay in (-0.1, 1.0, 1.1, math.nan, "x", None):
        with refused("decay"):
            WeightEMA([np.ones(3)], decay)
