"""Optimizers on the device: the bits of the CPU, few launches, nothing that waits, and steps that a graph replays."""

from contextlib import contextmanager

import numpy as np
import pytest

import cudasim
from kilter import KilterError, _kilter
from kilter.cuda import tensors
from kilter.cuda.ops import table
from kilter.cuda.optim import RULES as KERNELS
from kilter.optim import SGD, Adam, AdamW, DiagonalNewton, GradAccumulator, LossScaler, RMSprop, WeightEMA, device
from kilter.schedule import linear
from optimizers import RULES, on, read, rules
from support import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, same_bits

SIZES = (0, 1, 7, 1025, 0, 2500, 33)  # one more than a chunk, and several
NAMES = [str(i) for i in range(len(SIZES))]
KINDS = {  # parameters, gradients, state, masters
    "float32": (FLOAT32, FLOAT32, FLOAT32, False),
    "float64": (FLOAT64, FLOAT64, FLOAT64, False),
    "float16 with masters": (FLOAT16, FLOAT16, FLOAT32, True),
    "bfloat16 with masters": (BFLOAT16, BFLOAT16, FLOAT32, True),
    "bfloat16": (BFLOAT16, BFLOAT16, BFLOAT16, False),
    "float32 from bfloat16": (FLOAT32, BFLOAT16, BFLOAT16, False),
}
kernels = pytest.mark.parametrize("rule", [rule for rule in KERNELS if rule != "average"])


def given(rng, rule, kind="float32", sizes=SIZES, rows=4):
    """Arguments of ops.step but for h and flags, and the numbers of a rule."""
    p, g, s, masters = KINDS[kind]
    kernel, total = KERNELS[rule], sum(sizes)
    params, grads = ([rng.normal(size=n).astype(dtype) for n in sizes] for dtype in (p, g))
    state = [np.abs(rng.normal(size=(rows, total))).astype(s) for _ in range(kernel.windows)]
    state += [np.abs(rng.normal(size=total)).astype(s) for _ in range(kernel.slots)]
    exact = np.concatenate(params).astype(FLOAT32) if masters else None
    names = [str(i) for i in range(len(sizes))]
    return [rule, names, params, grads, state, exact], rng.uniform(0.05, 0.9, kernel.scalars)


def placed(cuda, arguments):
    return [[cuda.array(a) for a in one] if isinstance(one, list) else one for one in arguments[2:5]]


def same(cuda, theirs, own):
    return all(same_bits(cuda.numpy(a), b) for a, b in zip(theirs, own, strict=True))


# --------------------------------------------------------------------------- the operations


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float32 from bfloat16"])
@kernels
def test_steps_have_the_bits_of_the_cpu(cuda, rng, rule, kind):
    arguments, numbers = given(rng, rule, kind)
    params, grads, state = placed(cuda, arguments)
    masters = None if arguments[5] is None else cuda.array(arguments[5])
    for oldest in (2, 3) if KERNELS[rule].windows else (0, 0):
        h = np.array([0.5, 0.7, oldest, *numbers])
        _kilter.step(*arguments, h, 0)
        cuda.ops.step(rule, NAMES, params, grads, state, masters, h, 0)
    assert same(cuda, params, arguments[2]) and same(cuda, state, arguments[4])
    assert masters is None or same_bits(cuda.numpy(masters), arguments[5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["adam", "rmsprop_window_momentum"])
def test_arrays_without_alignment(cuda, rng, rule, kind):
    arguments, numbers = given(rng, rule, kind, sizes=(5, 1029, 2048))
    h = np.array([0.5, 0.7, 0, *numbers])

    def shifted(a):
        room = cuda.xp.empty(a.size + 1, a.dtype)
        room[1:] = cuda.array(a.ravel())
        return room[1:].reshape(a.shape)

    params, grads, state = ([shifted(a) for a in some] for some in arguments[2:5])
    masters = None if arguments[5] is None else shifted(arguments[5])
    _kilter.step(*arguments, h, 0)
    cuda.ops.step(*arguments[:2], params, grads, state, masters, h, 0)
    assert same(cuda, params, arguments[2]) and same(cuda, state, arguments[4])


def test_state_may_be_laid_out_apart(cuda, rng):
    arguments, numbers = given(rng, "adam", sizes=(5, 64, 100))
    h = np.array([1.0, np.inf, 0, *numbers])
    params, grads, _ = placed(cuda, arguments)
    apart = [np.zeros(64 + 64 + 128, FLOAT32) for _ in range(2)]
    starts = ((0, 0, 5), (5, 64, 64), (69, 128, 100))  # in the one, in the other, elements
    for flat, own in zip(apart, arguments[4], strict=True):
        for at, to, n in starts:
            flat[to : to + n] = own[at : at + n]
    state = [cuda.array(flat) for flat in apart]
    _kilter.step(*arguments, h, 0)
    cuda.ops.step("adam", arguments[1], params, grads, state, None, h, 0)
    assert same(cuda, params, arguments[2])
    for flat, own in zip(state, arguments[4], strict=True):
        assert all(same_bits(cuda.numpy(flat)[to : to + n], own[at : at + n]) for at, to, n in starts)


def test_a_negative_row_on_the_device_skips(cuda, rng):
    arguments, numbers = given(rng, "rmsprop_window")
    params, grads, state = placed(cuda, arguments)
    for oldest, changed in ((-1, False), (1, True)):
        h = cuda.array(np.array([1.0, np.inf, oldest, *numbers]))
        cuda.ops.step("rmsprop_window", NAMES, params, grads, state, None, h, 0)
        assert same(cuda, params, arguments[2]) != changed and same(cuda, state, arguments[4]) != changed


def test_offsets_have_64_bits():
    """A tensor that begins 2^33 elements before its memory, of which the last chunks are there."""
    ops = table(cudasim.SimRuntime(orders=(0,)))
    launcher = ops.step.args[0]
    p, g = cudasim.to_device(np.ones(2000, FLOAT32)), cudasim.to_device(np.full(2000, 0.5, FLOAT32))
    prepared = ops.prepare("sgd", [(["w"], [p], [g], [], None)])
    rows = np.zeros(1, tensors.TENSOR)
    rows["p"], rows["g"] = (cudasim.memory.address(a) - 4 * 2**33 for a in (p, g))
    rows["n"], rows["wide"], rows["wide_g"] = 2**33 + 2000, 1, 1
    found = tensors.Table(
        cudasim.to_device(rows.view(np.uint64)), cudasim.to_device(np.array([[0, 2**23], [0, 2**23 + 1]], np.int32)), 2
    )
    prepared.launches = [prepared.launches[0]._replace(table=found)]
    prepared.launch(np.array([1.0, np.inf, 0.0, 0.5, 0.0]))
    assert (p == 0.75).all()
    out = launcher.xp.empty(2)
    ops.scan([prepared], out)
    assert out.get().tolist() == [2000 * 0.25, 1.0]


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_scans(cuda, rng, dtype, shift):
    """The same bits from any place; the last block of many adds up."""
    values = [rng.normal(size=n).astype(dtype) for n in (*SIZES, 90_000)]
    grads = []
    for g in values:
        room = cuda.xp.empty(g.size + shift, dtype)
        room[shift:] = cuda.array(g)
        grads.append(room[shift:])
    out, straight, want = cuda.xp.empty(2), cuda.xp.empty(2), np.empty(2)
    names = [str(i) for i in range(len(grads))]
    cuda.ops.grad_scan(names, grads, out)
    cuda.ops.grad_scan(names, on(cuda, values), straight)
    _kilter.grad_scan(names, values, want)
    assert same_bits(out.get(), straight.get())
    np.testing.assert_allclose(out.get(), want, rtol=1e-13)
    for bad in (np.inf, np.nan):
        grads[-1][71_717] = bad
        cuda.ops.grad_scan(names, grads, out)
        assert out.get()[1] == 0


def test_scans_of_several_dtypes_and_of_none(cuda, rng):
    values = [rng.normal(size=20_000).astype(dtype) for dtype in (FLOAT32, FLOAT16, FLOAT64, FLOAT32)]
    out, want = cuda.xp.empty(2), np.empty(2)
    for bad in (None, 0, 1, 2):
        if bad is not None:
            values[bad][3] = np.inf
        cuda.ops.grad_scan(list("abcd"), on(cuda, values), out)
        _kilter.grad_scan(list("abcd"), values, want)
        np.testing.assert_allclose(out.get(), want, rtol=1e-13)
    cuda.ops.grad_scan([], [], out)
    assert out.get().tolist() == [0, 1]


def unfitting(rng):
    """Arguments of ops.step that do not fit."""
    arguments, numbers = given(rng, "adam", sizes=(3, 4))
    h = np.array([1.0, np.inf, 0, *numbers])

    def changed(index, value, at=None):
        found = [list(one) if isinstance(one, list) else one for one in [*arguments, h, 0]]
        if at is None:
            found[index] = value
        else:
            found[index][at] = value
        return found

    shared = np.zeros(20, FLOAT32)
    window, numbers = given(rng, "rmsprop_window", sizes=(3, 4))
    return {
        "rule": changed(0, "adams"),
        "fewer gradients": changed(3, arguments[3][:1]),
        "shape": changed(3, np.zeros(5, FLOAT32), 1),
        "float64 gradient": changed(3, np.zeros(4), 1),
        "whole numbers": changed(3, np.zeros(4, int), 1),
        "float64 parameter": changed(2, np.zeros(4), 1),
        "strided gradient": changed(3, np.zeros(8, FLOAT32)[::2], 1),
        "one slot": changed(4, arguments[4][:1]),
        "short slot": changed(4, np.zeros(6, FLOAT32), 0),
        "float64 slot": changed(4, np.zeros(7), 0),
        "short masters": changed(5, np.zeros(6, FLOAT32)),
        "short h": changed(6, h[:-1]),
        "no h": changed(6, h[:2]),
        "shared": changed(2, [shared[:3], shared[2:6]]),
        "shared slot": changed(4, [shared[:7], shared[6:13]]),
        "shared gradient": changed(3, arguments[2][0], 0),
        "row": [*window, np.array([1.0, np.inf, 4, *numbers]), 0],
    }


def test_errors_are_those_of_the_cpu(cuda, rng):
    for name, arguments in unfitting(rng).items():
        with pytest.raises(KilterError) as wanted:
            _kilter.step(*arguments)
        bases = {}  # what shares memory here shares it there

        def there(a, bases=bases):
            base = a if a.base is None else a.base
            copy = bases.setdefault(id(base), cuda.array(base.copy()))
            start = (a.ctypes.data - base.ctypes.data) // a.itemsize
            step = a.strides[0] // a.itemsize if a.ndim == 1 else 1
            return copy if a is base else copy[start : start + a.size * step : step]

        copies = [*arguments[:2], *([there(a) for a in some] for some in arguments[2:5]), *arguments[5:]]
        copies[5] = None if copies[5] is None else there(copies[5])
        before = read(cuda, copies[2])
        with pytest.raises(type(wanted.value)) as got:
            cuda.ops.step(*copies)
        assert str(got.value).replace("(4,)", "[4]").replace("(5,)", "[5]") == str(wanted.value), name
        assert same(cuda, copies[2], before)


def test_check_only_changes_nothing(cuda, rng):
    arguments, numbers = given(rng, "adam")
    params, grads, state = placed(cuda, arguments)
    cuda.ops.step("adam", NAMES, params, grads, state, None, np.array([1, 1, 0, *numbers]), _kilter.CHECK_ONLY)
    assert same(cuda, params, arguments[2]) and same(cuda, state, arguments[4])


def test_the_yardstick(cuda, rng):
    for inputs, arrays in ((1, 1), (3, 4)):
        reads, writes = (list(rng.normal(size=(n, 1001)).astype(FLOAT32)) for n in (inputs, arrays))
        there = on(cuda, writes)
        cuda.ops.probe_update(on(cuda, reads), there)
        for a, b in zip(there, writes, strict=True):
            np.testing.assert_allclose(a.get(), b + sum(reads), rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------- steps


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
@rules
def test_optimizers_have_the_bits_of_the_cpu(cuda, rng, rule, dtype):
    """With schedules, a scaler and skipped steps: parameters, state, clocks, scale and reports."""
    kind, options, _ = RULES[rule]
    start = {"w": rng.normal(size=(5, 7)).astype(dtype), "b": rng.normal(size=3).astype(dtype), "e": np.zeros(0, dtype)}
    here, there = {name: p.copy() for name, p in start.items()}, on(cuda, start)
    lr = linear(0.1, 0.01, 10)
    opt, other = (kind(ps, lr, **options) for ps in (here, there))
    scaler, other_scaler = (LossScaler(init=8.0, interval=3) for _ in range(2))
    for call in range(9):
        grads = {name: rng.normal(size=p.shape).astype(dtype) for name, p in start.items()}
        if call in (0, 3, 4):
            grads["w"][1, 1] = np.inf if call == 3 else np.nan
        reports = opt.step(grads, scaler=scaler), other.step(on(cuda, grads), scaler=other_scaler)
        assert reports[0] == reports[1]
    assert all(same_bits(here[name], there[name].get()) for name in here)
    states = opt.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert same_bits(value, states[1][key]) if isinstance(value, np.ndarray) else value == states[1][key], key
    assert scaler.state_dict() == other_scaler.state_dict() and opt.applied == other.applied == 6


@contextmanager
def nothing_waits(monkeypatch):
    """What would wait for the device fails."""

    def waited(self, *_):
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        for name in ("get", "item", "tolist", "__float__", "__bool__", "__int__", "__index__"):
            patch.setattr(cudasim.SimArray, name, waited)
        yield


def kernels_of(cuda, call):
    """The kernels that a call launches."""
    before = len(cuda.runtime.log)
    call()
    return [launch.kernel for launch in cuda.runtime.log[before:]]


EVERYTHING = {"clip_norm": 1.0, "skip_nonfinite": True, "track_norm": True}


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_step_waits_for_nothing_and_has_few_launches(cuda, rng, monkeypatch, options):
    """One launch for all tensors, of all groups; the tables stay as long as the arrays do."""
    ps = on(cuda, {name: rng.normal(size=size) for name, size in (("w", (40, 30)), ("b", 7), ("c", ()), ("d", 3000))})
    groups = [{"params": {"w": ps["w"], "d": ps["d"]}}, {"params": {"b": ps["b"]}, "weight_decay": 0.0}]
    groups += [{"params": {"c": ps["c"]}, "lr": linear(0.1, 0.0, 5)}]
    opt = AdamW(groups, linear(0.1, 0.01, 10), **options)
    scaler = LossScaler(init=4.0) if options else None
    grads = on(cuda, {name: rng.normal(size=p.shape) for name, p in ps.items()})
    opt.step(grads, scaler=scaler)
    uploads, asarray = [], cudasim.xp.asarray
    monkeypatch.setattr(type(cudasim.xp), "asarray", lambda _, values: uploads.append(values) or asarray(values))
    with nothing_waits(monkeypatch):
        for g in (grads, dict(grads), {name: g[...] for name, g in grads.items()}):

            def step(g=g):
                g["w"] *= 1 if scaler is None else scaler.scale
                opt.step(g, scaler=scaler)

            assert kernels_of(cuda, step) == (["scan"] if options else []) + ["tick", "step"]
    assert not uploads
    assert opt.applied == 4


def test_tables_are_made_anew_where_something_moved(cuda, rng):
    p = cuda.array(np.zeros(10))
    opt, want = SGD([p], 1.0), np.zeros(10)
    for _ in range(5):
        g = rng.normal(size=10)
        opt.step([cuda.array(g)])
        want -= g
    np.testing.assert_allclose(p.get(), want, rtol=1e-14)
    memory = cuda.array(rng.normal(size=20))
    for g in (memory[:10], memory[10:], memory[::2], memory[:10]):
        opt.step([g])
        want -= g.get()
    np.testing.assert_allclose(p.get(), want, rtol=1e-14)


def test_many_groups(cuda, rng):
    """More than a launch has room for."""
    start, grads = rng.normal(size=(70, 5)), on(cuda, list(rng.normal(size=(70, 5))))
    ps = on(cuda, list(start))
    opt = SGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(ps)])
    assert kernels_of(cuda, lambda: opt.step([[g] for g in grads])) == ["tick", "step", "step"]
    for i, (p, g) in enumerate(zip(ps, grads, strict=True)):
        np.testing.assert_allclose(p.get(), start[i] - 0.01 * i * g.get(), rtol=1e-14)


def test_reports_keep_their_numbers(cuda, monkeypatch):
    """Each step has its own, however many there are, and whenever it is read."""
    monkeypatch.setattr(device, "_REPORTS", 5)
    p, one, bad = on(cuda, [np.zeros(3), np.ones(3), np.full(3, np.nan)])
    opt = SGD([p], 0.0, skip_nonfinite=True, track_norm=True)
    reports = [opt.step([bad if call % 3 == 1 else one]) for call in range(12)]
    for call, report in enumerate(reports):
        assert report.calls == call + 1 and report.skipped == (call % 3 == 1)
        assert report.applied == call + 1 - (call + 2) // 3
        np.testing.assert_equal(report.grad_norm, np.nan if report.skipped else np.sqrt(3))


def test_a_step_that_cannot_be_skipped_is_known_to_the_host(cuda, monkeypatch):
    p = cuda.array(np.ones(3))
    report = Adam([p]).step([cuda.array(np.ones(3))])
    with nothing_waits(monkeypatch):
        assert not report.skipped and report.grad_norm is None and report.calls == 1


def test_arrays_on_another_device(cuda, rng):
    with cudasim.Device(1):
        p, g = on(cuda, [np.ones(3, FLOAT16), np.ones(3, FLOAT16)])
    opt, ema, acc = Adam([p], clip_norm=1.0), WeightEMA([p]), GradAccumulator([p])
    for _ in range(2):
        acc.add([g])
        opt.step(acc.finish(), scaler=LossScaler(init=2.0))
        ema.update()
    assert opt.applied == 2 and (p != 1).all()


def test_averages_are_one_launch(cuda, rng):
    ps = on(cuda, [rng.normal(size=n).astype(FLOAT32) for n in (3, 500, 64)])
    ema, acc = WeightEMA(ps, 0.5), GradAccumulator(ps)
    assert kernels_of(cuda, ema.update) == ["step"]
    for _ in range(2):
        assert kernels_of(cuda, lambda: acc.add(ps)) == ["step"]


def test_a_scaler_moves_to_the_device_and_is_edited_there(cuda):
    p, g = on(cuda, [np.zeros(2, FLOAT32), np.ones(2, FLOAT32)])
    scaler = LossScaler(init=16.0, interval=2)
    opt = SGD([p], 1.0)
    opt.step([g], scaler=scaler)
    assert isinstance(scaler.scale, cudasim.SimArray) and scaler.scale.dtype == FLOAT32 and scaler.scale.shape == ()
    assert scaler.state_dict() == {"scale": 16.0, "clean": 1}
    scaler.update(True)
    assert scaler.state_dict() == {"scale": 32.0, "clean": 0}
    scaler.scale = 4.0
    opt.step([g], scaler=scaler)
    np.testing.assert_array_equal(p.get(), -1 / 16 - 1 / 4)
    scaler.load_state_dict({"scale": 64.0, "clean": 1})
    q = np.zeros(2, FLOAT32)
    SGD([q], 1.0).step([np.ones(2, FLOAT32)], scaler=scaler)  # of an optimizer on the host
    assert (q == -1 / 64).all() and scaler.state_dict() == {"scale": 128.0, "clean": 0}


# --------------------------------------------------------------------------- CUDA graphs


GRAPHS = {
    "adamw": (AdamW, {"weight_decay": linear(0.1, 0.2, 5)}),
    "sgd": (SGD, {"momentum": linear(0.9, 0.5, 9), "dampening": 0.5}),
    "window": (RMSprop, {"window": 3, "momentum": 0.9}),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_replays_steps(cuda, rng, recorder, case):
    """With everything that depends on the call or on the gradients: bits of the CPU, a skipped step included."""
    kind, options = GRAPHS[case]
    lr = linear(0.1, 0.0, 12)
    start, grads = rng.normal(size=(2, 50)).astype(FLOAT32), rng.normal(size=(9, 2, 50)).astype(FLOAT32)
    grads[4, 1, 7] = np.inf
    here, there = [p.copy() for p in start], on(cuda, list(start))
    scaler, other_scaler = (LossScaler(init=4.0, interval=2) for _ in range(2))
    opt, other = (kind(ps, lr, **options, clip_value=0.5) for ps in (here, there))
    held = on(cuda, list(grads[0]))
    for call, g in enumerate(grads):
        want = opt.step(list(g), scaler=scaler)
        for own, value in zip(held, g, strict=True):
            own.set(value)
        if call == 0:
            other.step(held, scaler=other_scaler)
            with recorder.graph() as graph:
                report = other.step(held, scaler=other_scaler)
            assert other.calls == 1
            continue
        other.before_replay()
        recorder.replay(graph)
        assert (report.applied, report.skipped) == (want.applied, want.skipped)
    assert [launch[0].name for launch in graph] == ["scan", "tick", "step"]
    assert all(same_bits(a, b.get()) for a, b in zip(here, there, strict=True))
    assert scaler.state_dict() == other_scaler.state_dict()
    assert (other.calls, other.applied) == (9, 8) and other.state_dict().keys() == opt.state_dict().keys()


def test_a_graph_of_newton_with_and_without_curvature(cuda, rng, recorder):
    start, g, c = rng.normal(size=(3, 20))
    here, there = start.copy(), cuda.array(start.copy())
    opt, other = (DiagonalNewton([p], linear(0.1, 0.0, 12), beta=0.5) for p in (here, there))
    grads, curvature = [cuda.array(g)], [cuda.array(c)]
    other.step(grads, curvature)
    with recorder.graph() as graph:
        other.step(grads, curvature)
    for _ in range(3):
        other.before_replay()
        recorder.replay(graph)
    other.step(grads)
    for _ in range(4):
        opt.step([g], [c])
    opt.step([g])
    assert same_bits(here, there.get()) and opt.calls == other.calls


def test_what_a_capture_refuses(cuda, recorder):
    p, g, h = on(cuda, [np.ones(3), np.ones(3), np.ones(3)])
    opt = Adam([p])
    with pytest.raises(KilterError, match=r"^before_replay: expected a step that a CUDA graph has captured"):
        opt.before_replay()
    with recorder.graph(), pytest.raises(KilterError, match=r"^step: expected one such step before the capture"):
        opt.step([g])
    opt.step([g])
    with recorder.graph(), pytest.raises(KilterError, match=r"^step: expected a step with these very gradients"):
        opt.step([h])
    with pytest.raises(KilterError, match=r"^before_replay"):
        SGD([np.ones(3)]).before_replay()
    assert opt.calls == 1
