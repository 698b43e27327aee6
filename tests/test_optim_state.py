"""kilter.optim: state dicts, the loss scaler, and what a step refuses."""

import numpy as np
import pytest

import reference
from kilter import KilterError
from kilter.optim import SGD, Adam, AdamW, LossScaler, decay_groups
from optimizers import KINDS, RULES, Newton, fewer, kinds, mapped, on, read, rules
from support import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, copied, plain, refused, same_bits

# --------------------------------------------------------------------------- state


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16, BFLOAT16], ids=str)
@rules
def test_resume_is_the_uninterrupted_run(backend, rng, rule, dtype):
    """State travels as NumPy arrays."""
    kind, options, _ = RULES[rule]
    start, grads = rng.normal(size=(2, 30)).astype(dtype), rng.normal(size=(8, 2, 30)).astype(dtype)

    def make():
        ps = on(backend, {"w": start[0], "b": start[1]})
        return ps, kind(ps, lambda k: 0.1 / (k + 1), **options, skip_nonfinite=True)

    whole, opt = make()
    for step, (w, b) in enumerate(grads):
        if step == 4:
            saved, middle = copied(opt.state_dict()), copied(read(backend, whole))
        opt.step(on(backend, {"w": w, "b": b if step != 1 else b * np.array(np.nan, dtype)}))
    assert all(isinstance(value, np.ndarray | int | float | str) for value in saved.values())
    resumed, second = make()
    for name, p in resumed.items():
        p[...] = backend.array(middle[name])
    second.load_state_dict(saved)
    for w, b in grads[4:]:
        second.step(on(backend, {"w": w, "b": b}))
    assert all(same_bits(backend.numpy(resumed[name]), backend.numpy(whole[name])) for name in whole)
    assert plain(second.state_dict()) == plain(opt.state_dict())


def stepped(kind=Adam, names=("w", "b"), shape=(3,), dtype=FLOAT32, backend=None, **options):
    ps, gs = ({name: np.ones(shape, dtype) for name in names} for _ in range(2))
    if backend is not None:
        ps, gs = on(backend, ps), on(backend, gs)
    opt = kind(ps, **options)
    opt.step(gs)
    return ps, opt


def test_state_is_flat():
    _, opt = stepped(dtype=BFLOAT16)
    for key, value in opt.state_dict().items():
        assert isinstance(key, str)
        assert isinstance(value, np.ndarray | int | float | str), key


@pytest.mark.parametrize(
    "other",
    [
        lambda: stepped(SGD, momentum=0.9)[1].state_dict(),
        lambda: stepped(AdamW)[1].state_dict(),
        lambda: stepped(Adam, amsgrad=True)[1].state_dict(),
        lambda: stepped(shape=(4,))[1].state_dict(),
        lambda: stepped(names=("w", "c"))[1].state_dict(),
        lambda: stepped(names=("w", "b", "c"))[1].state_dict(),
        lambda: stepped(names=("w",))[1].state_dict(),
        lambda: stepped(dtype=FLOAT64)[1].state_dict(),
        lambda: dict(list(stepped()[1].state_dict().items())[:-1]),
        lambda: {**stepped()[1].state_dict(), "extra": 1},
        lambda: {},
        lambda: None,
        lambda: {k: "text" if isinstance(v, np.ndarray) else v for k, v in stepped()[1].state_dict().items()},
        lambda: {k: -5 if k == "calls" else v for k, v in stepped()[1].state_dict().items()},
    ],
    ids=[
        "rule",
        "amsgrad-less",
        "amsgrad",
        "shape",
        "name",
        "more",
        "fewer",
        "dtype",
        "cut",
        "extra",
        "empty",
        "none",
        "text",
        "calls",
    ],
)
def test_foreign_state_is_refused(other):
    ps, opt = stepped()
    before, state = plain(opt.state_dict()), other()
    with refused("", ps, opt):
        opt.load_state_dict(state)
    assert plain(opt.state_dict()) == before and opt.calls == 1


# --------------------------------------------------------------------------- frozen, added, grouped


@rules
def test_freeze_and_thaw(backend, rng, rule):
    """A frozen parameter keeps its state, and its clock stands; schedules go on."""
    kind, options, ref = RULES[rule]
    start, grads = rng.normal(size=(2, 6)), rng.normal(size=(6, 2, 6))
    ps = on(backend, {"w": start[0], "b": start[1]})
    lr = [0.1, 0.09, 0.08, 0.07, 0.06, 0.05].__getitem__
    opt = kind(ps, lr, **options)
    for call, (w, b) in enumerate(grads):
        if call == 2:
            opt.freeze("b")
        if call == 4:
            opt.thaw("b")
        opt.step(on(backend, {"w": w} if call == 3 else {"w": w, "b": b}))  # a frozen one needs no gradient
    skipped = [None if call in (2, 3) else g for call, g in enumerate(grads[:, 1])]
    got = read(backend, ps)
    np.testing.assert_allclose(got["w"], ref(start[0], list(grads[:, 0]), lr, **options)[-1], rtol=1e-12)
    np.testing.assert_allclose(got["b"], ref(start[1], skipped, lr, **options)[-1], rtol=1e-12)
    for change in (opt.freeze, opt.thaw):
        with refused("none such", ps, opt):
            change("none such")


@rules
def test_added_parameters_start_at_their_first_step(backend, rng, rule):
    kind, options, ref = RULES[rule]
    start, grads = rng.normal(size=(2, 6)), rng.normal(size=(6, 2, 6))
    old, new = on(backend, list(start))
    opt = kind({"old": old}, 0.1, **options)
    for call, (g, h) in enumerate(grads):
        if call == 2:
            opt.add_params({"params": {"new": new}, "lr": 0.05})
        opt.step(on(backend, {"old": g} if call < 2 else {"old": g, "new": h}))
    for got, want in (
        (old, ref(start[0], list(grads[:, 0]), 0.1, **options)),
        (new, ref(start[1], list(grads[2:, 1]), 0.05, **options)),
    ):
        np.testing.assert_allclose(backend.numpy(got), want[-1], rtol=1e-12)
    for bad in (
        {"old": backend.array(np.ones(3))},
        {"more": backend.array(np.ones(3, int))},
        {"same memory": new},
        {"params": {"x": new[:2]}},
        5,
    ):
        with refused("", old, new, opt):
            opt.add_params(bad)
    assert len(opt.groups) == 2


def test_decay_groups(rng):
    ps = {
        "w": rng.normal(size=(3, 4)),
        "bias": rng.normal(size=4),
        "k": rng.normal(size=(2, 2, 2)),
        "g": np.ones(()),
    }
    start = copied(ps)
    opt = SGD(decay_groups(ps, 0.1), 1.0)
    opt.step({name: np.zeros(p.shape) for name, p in ps.items()})
    for name, p in ps.items():
        np.testing.assert_allclose(p, start[name] * (0.9 if p.ndim > 1 else 1), rtol=1e-15)
    for bad in (-0.1, float("nan"), "x"):
        with pytest.raises(KilterError, match="weight_decay"):
            decay_groups(ps, bad)


# --------------------------------------------------------------------------- loss scaler


def test_v18_scaler_defaults(backend):
    p, g, bad = on(backend, [np.zeros(1, FLOAT32), np.ones(1, FLOAT32), np.full(1, np.inf, FLOAT32)])
    opt, scaler = SGD([p]), LossScaler()
    assert float(scaler.scale) == 65536
    pattern = [True] * fewer(backend, 2001, 3) + [False, False] + [True] * 5
    scales = []
    for ok in pattern:
        opt.step([g if ok else bad], scaler=scaler)
        scales.append(float(scaler.scale))
    assert scales == reference.loss_scale(pattern)
    assert opt.calls == len(pattern)


def test_scaler_state_machine(backend, rng):
    pattern = (rng.random(200) < 0.8).tolist()
    settings = {"init": 8.0, "growth": 4.0, "backoff": 0.25, "interval": 3, "minimum": 0.5}
    p, scaler, scales = backend.array(np.zeros(2, FLOAT32)), LossScaler(**settings), []
    opt = SGD([p], 0.5)
    for step, ok in enumerate(pattern):
        if step == 100:
            saved, scaler = copied(scaler.state_dict()), LossScaler(**settings)
            scaler.load_state_dict(saved)
        report = opt.step([backend.array(np.array([1, 1 if ok else np.nan], FLOAT32))], scaler=scaler)
        assert report.skipped == (not ok)
        scales.append(float(scaler.scale))
    assert scales == reference.loss_scale(pattern, **settings)
    assert (report.calls, report.applied) == (200, sum(pattern))


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
@rules
def test_scaled_gradients_give_the_same_step(backend, rng, rule, dtype):
    """A power of two divides out exactly, before clipping and before the norm."""
    kind, options, _ = RULES[rule]
    start, grads = rng.normal(size=77).astype(dtype), rng.normal(size=(5, 77)).astype(dtype)
    a, b = on(backend, [start, start])
    extra = {"clip_norm": 0.5, "track_norm": True}
    scaler = LossScaler(init=1024.0)
    plainly, scaled = kind([a], **options, **extra), kind([b], **options, **extra)
    for g in grads:
        first = plainly.step([backend.array(g)])
        second = scaled.step([backend.array(g * np.array(1024, dtype))], scaler=scaler)
        assert first.grad_norm == second.grad_norm
    assert same_bits(backend.numpy(a), backend.numpy(b))


def test_skipped_by_the_scaler(backend):
    p, scaler = backend.array(np.ones(3, FLOAT32)), LossScaler()
    opt = Adam([p])
    opt.step([backend.array(np.ones(3, FLOAT32))], scaler=scaler)
    kept = backend.numpy(p).copy()
    report = opt.step([backend.array(np.array([1, np.inf, 1], FLOAT32))], scaler=scaler)
    assert (*report,) == (2, 1, None, True) and report == (2, 1, None, True) and report[1] == 1
    assert repr(report) == "StepReport(calls=2, applied=1, grad_norm=None, skipped=True)"
    assert same_bits(backend.numpy(p), kept) and float(scaler.scale) == 32768


def test_the_scaler_backs_off_even_if_the_step_is_taken(backend):
    p, scaler = backend.array(np.ones(2, FLOAT32)), LossScaler(init=8.0, minimum=6.0)
    report = SGD([p], 1.0, skip_nonfinite=False).step([backend.array(np.array([8, np.inf], FLOAT32))], scaler=scaler)
    assert (*report,) == (1, 1, None, False) and p.tolist() == [0.0, -np.inf] and scaler.scale == 6.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init", 0.0),
        ("init", float("nan")),
        ("init", float("inf")),
        ("growth", 0.5),
        ("backoff", 1.5),
        ("backoff", 0.0),
        ("interval", 0),
        ("interval", 2.5),
        ("minimum", -1.0),
        ("minimum", float("nan")),
    ],
)
def test_scaler_options_are_checked(name, value):
    with pytest.raises(KilterError, match=name):
        LossScaler(**{name: value})


def test_scaler_state_is_checked():
    scaler = LossScaler()
    good = copied(scaler.state_dict())
    for bad in ({}, None, {**good, "extra": 1}, dict.fromkeys(good, -1), dict.fromkeys(good, "x")):
        with pytest.raises(KilterError):
            scaler.load_state_dict(bad)
        assert plain(scaler.state_dict()) == plain(good)
    with refused("scaler"):
        SGD([np.ones(1)]).step([np.ones(1)], scaler=65536.0)


# --------------------------------------------------------------------------- refusals


def frozen(array):
    array.flags.writeable = False
    return array


def misaligned(n, dtype):
    return np.zeros(n * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype)


@pytest.mark.parametrize(
    "bad",
    [
        frozen(np.ones(3)),
        np.ones(6)[::2],
        np.asfortranarray(np.ones((3, 4))),
        np.ones((2, 3)).astype(">f8"),
        misaligned(3, np.float64),
        np.ones(3, int),
        np.ones(3, complex),
        np.ones(3, object),
        [1.0, 2.0],
        1.0,
        None,
    ],
    ids=[
        "readonly",
        "strided",
        "fortran",
        "swapped",
        "misaligned",
        "int",
        "complex",
        "object",
        "list",
        "number",
        "none",
    ],
)
def test_parameters_are_checked(bad):
    for kind in KINDS.values():
        with refused("second"):
            kind({"first": np.ones(2), "second": bad})


def test_parameters_may_not_overlap(backend):
    shared = backend.array(np.ones(8))
    for a, b in ((shared, shared), (shared[:5], shared[4:])):
        with refused("first|second"):
            SGD({"first": a, "second": b})
    SGD([shared[:4], shared[4:]]).step(on(backend, [np.zeros(4), np.zeros(4)]))


@pytest.mark.parametrize("params", [None, 5, "w", np.ones(3), [{"lr": 1.0}], [{"params": [np.ones(1)], "lrr": 1.0}]])
def test_params_must_be_a_list_a_dict_or_groups(params):
    with refused(""):
        SGD(params)


@pytest.mark.parametrize(
    ("name", "grads"),
    [
        ("b", {"w": np.ones(3, FLOAT32)}),
        ("c", {"w": np.ones(3, FLOAT32), "b": np.ones(3, FLOAT32), "c": np.ones(3, FLOAT32)}),
        ("b", {"w": np.ones(3, FLOAT32), "b": np.ones(4, FLOAT32)}),
        ("b", {"w": np.ones(3, FLOAT32), "b": np.ones((3, 1), FLOAT32)}),
        ("b", {"w": np.ones(3, FLOAT32), "b": np.ones(3, int)}),
        ("b", {"w": np.ones(3, FLOAT32), "b": np.ones(3, complex)}),
        ("b", {"w": np.ones(3, FLOAT32), "b": [1.0, 1.0, 1.0]}),
        ("b", {"w": np.ones(3, FLOAT32), "b": None}),
        ("grads", [np.ones(3, FLOAT32), np.ones(3, FLOAT32)]),
        ("grads", None),
    ],
    ids=["missing", "extra", "shape", "ndim", "int", "complex", "list", "none", "structure", "nothing"],
)
@kinds
def test_gradients_are_checked(backend, kind, name, grads):
    ps, opt = stepped(kind, backend=backend)
    with refused(rf"\b{name}\b", ps, opt):
        opt.step(mapped(lambda g: backend.array(g) if isinstance(g, np.ndarray) else g, grads))
    assert opt.calls == 1


def test_number_of_gradients_in_a_list():
    opt = SGD([np.ones(2), np.ones(2)])
    for count in (0, 1, 3):
        with refused("grads"):
            opt.step([np.ones(2)] * count)


@kinds
def test_a_gradient_may_not_overlap_a_parameter(backend, kind):
    memory, own, other = on(backend, [np.ones(8), np.ones(4), np.ones(4)])
    opt = kind({"w": memory[:4], "b": own})
    for w, b in ((memory[:4], other), (memory[2:6], other), (other, memory[1:5])):
        with refused(r"\bw\b|\bb\b", memory, opt):
            opt.step({"w": w, "b": b})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((kind, "lr", v) for kind in KINDS.values() for v in (float("nan"), -0.1, float("inf"), "0.1", None)),
        *((kind, "weight_decay", v) for kind in KINDS.values() if kind is not Newton for v in (float("nan"), -0.1)),
        *((SGD, "momentum", v) for v in (float("nan"), -0.1, "x")),
        (SGD, "dampening", float("nan")),
        *((kind, "betas", v) for kind in (Adam, AdamW) for v in ((0.9, 1.0), (1.0, 0.9), (-0.1, 0.9), 0.9, (0.9,))),
        (Adam, "betas", (float("nan"), 0.9)),
        *((kind, "eps", v) for kind in (Adam, AdamW) for v in (float("nan"), -1e-8)),
        (AdamW, "decay", "both"),
        (SGD, "clip_norm", -1.0),
        (SGD, "clip_norm", float("nan")),
        (SGD, "clip_value", -1.0),
        (SGD, "clip_value", float("nan")),
        (SGD, "master_dtype", "float8"),
        (SGD, "master_dtype", "int32"),
    ],
)
def test_options_are_checked(kind, name, value):
    p = np.ones(3)
    with refused(name, p):
        kind([p], **{name: value})


def test_nesterov_needs_momentum():
    with refused("nesterov"):
        SGD([np.ones(1)], nesterov=True)


@pytest.mark.parametrize("value", [float("nan"), -1.0, "x", None])
def test_schedules_and_changed_options_are_checked_before_the_step(value):
    ps, opt = stepped(Adam, lr=lambda call: 0.1 if call == 0 else value)
    with refused("lr", ps, opt):
        opt.step({"w": np.ones(3, FLOAT32), "b": np.ones(3, FLOAT32)})
    assert opt.calls == 1
    ps, opt = stepped(Adam)
    opt.groups[0]["lr"] = value
    with refused("lr", ps, opt):
        opt.step({"w": np.ones(3, FLOAT32), "b": np.ones(3, FLOAT32)})
    assert opt.calls == 1
