"""kilter.optim: every rule against worked numbers and the float64 reference, with schedules and on small problems."""

import numpy as np
import pytest

import reference_optim as reference
from kilter.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, RMSprop
from kilter.schedule import linear, one_cycle
from optimizers import HALVED, KINDS, RULES, G, Newton, fewer, on, rules, walk
from support import BFLOAT16, DTYPES, FLOAT32, FLOAT64, arrays_of, relative_error, same_bits, ulp

# --------------------------------------------------------------------------- worked numbers

V9 = [
    (SGD, {"momentum": 0.9}, [0.95, 0.93, 0.812]),
    (SGD, {"momentum": 0.9, "lr_inside": True}, [0.95, 0.93, 0.812]),
    (SGD, {"momentum": 0.9, "lr": HALVED}, [0.95, 0.94, 0.9105]),
    (SGD, {"momentum": 0.9, "lr": HALVED, "lr_inside": True}, [0.95, 0.9175, 0.86325]),
    (SGD, {"momentum": 0.9, "nesterov": True}, [0.905, 0.912, 0.7058]),
    (SGD, {"momentum": 0.9, "dampening": 0.9}, [0.95, 0.9075, 0.85925]),
    (SGD, {"momentum": 0.9, "weight_decay": 0.1}, [0.94, 0.9016, 0.758024]),
]
V10 = [
    (Adagrad, {}, [0.900000000020, 0.944721359562, 0.857434203475]),
    (RMSprop, {}, [0.000000200000, 0.449013374422, -0.425726216071]),
    (RMSprop, {"alpha": 0.9}, [0.683772253983, 0.831214201442, 0.549356279304]),
    (
        RMSprop,
        {"alpha": 0.9, "centered": True, "momentum": 0.9},
        [0.666666688889, 0.515145167800, 0.079903269898],
    ),
    (Adadelta, {"lr": 1.0}, [0.996837785583, 0.998922872611, 0.994616156999]),
    (Adam, {}, [0.900000002000, 0.873366298708, 0.807555139677]),
    (Adam, {"eps": 1e-3}, [0.900199600798, 0.873633115404, 0.807921273950]),
    (Adam, {"weight_decay": 0.1}, [0.900000001667, 0.854441367462, 0.781504399863]),
    (Adam, {"amsgrad": True}, [0.900000002000, 0.873366298708, 0.807555139677]),
    (AdamW, {"weight_decay": 0.1}, [0.890000002000, 0.854466298688, 0.780110476670]),
    (
        AdamW,
        {"weight_decay": 0.1, "decay": "independent"},
        [0.800000002000, 0.693366298508, 0.558218509626],
    ),
    (Adamax, {}, [0.900000002000, 0.878926297137, 0.835383862148]),
    (NAdam, {}, [0.894354824277, 0.935465796161, 0.835655586074]),
    (Lion, {}, [0.9, 1.0, 0.9]),
]
V11 = [
    (RMSprop, {"alpha": 0.8, "window": 3}, [0.900000002000, 0.967419986428, 0.832580015754, 0.753523075499]),
    (
        Adadelta,
        {"lr": 1.0, "rho": 0.8, "window": 3},
        [0.999000002000, 0.999953460169, 0.998055226687, 0.996809162069],
    ),
]


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=str)
@pytest.mark.parametrize(("kind", "options", "expected"), V9 + V10 + V11)
def test_v9_to_v11(backend, kind, options, expected, dtype):
    grads = on(backend, [np.array([g], dtype) for g in [*G, 0.5][: len(expected)]])
    path = walk(kind, backend.array(np.ones(1, dtype)), grads, **{"lr": 0.1, **options})
    # NAdam's numbers are of a product in float32.
    exact = 1e-8 if kind is NAdam else 1e-12
    np.testing.assert_allclose(path[:, 0], expected, atol=exact if dtype == FLOAT64 else 5e-7)


def test_v9_constant_and_alternating_gradients():
    for signs, sums in (
        (np.ones(50), [1, 1.9, 2.71, 6.513215599, 9.948462248]),
        ((-1.0) ** np.arange(50), [1, 0.1, 0.91, 0.342800821, 0.523603276]),
    ):
        p = np.zeros(1)
        path = walk(SGD, p, [np.array([g]) for g in signs], lr=1.0, momentum=0.9)
        velocity = -np.diff(path[:, 0], prepend=0)
        np.testing.assert_allclose(np.abs(velocity[[0, 1, 2, 9, 49]]), sums, atol=1e-8)
    path = walk(SGD, np.zeros(1), [np.ones(1)] * 5, lr=0.01, momentum=0.9)
    np.testing.assert_allclose(-path[:, 0], [0.01, 0.029, 0.0561, 0.09049, 0.131441], atol=1e-12)


@pytest.mark.parametrize(("older", "v"), [((0, 0), 0.466667), ((1, 0), 0.733333), ((0, 1), 0.733333)])
def test_v11_weights(older, v):
    """The present square counts twice: in the mean of the window and on its own."""
    p = np.zeros(1)
    opt = RMSprop([p], 0.0, alpha=0.8, window=3, eps=0.0)
    for g in (5.0, *older):  # the first falls out of the window
        opt.step([np.array([g + 1e-9])])
    opt.groups[0]["lr"] = 1.0
    opt.step([np.ones(1)])
    np.testing.assert_allclose(p**-2, v, rtol=1e-6)


def test_the_first_steps():
    """Adam corrects its start at t = 1, RMSprop does not correct, Adadelta starts at the root of eps."""
    for kind, options, size in (
        (Adam, {"eps": 0.0}, 1.0),
        (RMSprop, {"eps": 0.0}, 10.0),
        (Adadelta, {"eps": 1e-10}, np.sqrt(1e-10 / 0.1)),
        (Adadelta, {"eps": 1e-10, "window": 3}, 1e-5),
    ):
        (path,) = walk(kind, np.zeros(1), [np.ones(1)], **{"lr": 1.0, **options})
        np.testing.assert_allclose(path, -size, rtol=1e-8)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop, NAdam])
def test_v21_the_two_clocks(backend, kind, scheduled):
    """A skipped third step: the fourth call reads the fourth lr, and Adam corrects with t = 3."""
    cycle = one_cycle(1.0, 10)
    grads = [0.5, -0.25, np.inf, 1.0, 0.125]
    momentum = cycle.momentum if scheduled else 0.9
    options = {"momentum": momentum} if kind in (SGD, RMSprop) else {"betas": (momentum, 0.999)}
    rule = getattr(reference, kind.__name__.lower())
    wanted = rule(1.0, [g if np.isfinite(g) else None for g in grads], cycle.lr, **options)
    p = backend.array(np.ones(1))
    opt = kind([p], cycle.lr, **options, skip_nonfinite=True)
    for call, (g, want) in enumerate(zip(grads, wanted, strict=True), 1):
        report = opt.step([backend.array(np.array([g]))])
        np.testing.assert_allclose(backend.numpy(p)[0], want, rtol=1e-12)
        assert (report.calls, report.applied, report.skipped) == (call, call - (call > 2), call == 3)
        assert opt.calls == call
    np.testing.assert_allclose(cycle.lr(3), 0.950484632, atol=1e-9)


# --------------------------------------------------------------------------- against the reference


@rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hundred_steps(backend, rng, rule, dtype):
    """16-bit weights follow float32 masters and are these masters, rounded."""
    kind, options, ref = RULES[rule]
    steps = fewer(backend, 100, 12)
    start, grads = rng.normal(size=(3, 67)).astype(dtype), rng.normal(size=(steps, 3, 67)).astype(dtype)
    want = ref(start, list(grads), 1e-2, **options)[-1]
    p = backend.array(start.copy())
    walk(kind, p, on(backend, list(grads)), lr=1e-2, **options)
    p = backend.numpy(p)
    if dtype in (FLOAT64, FLOAT32):
        assert relative_error(p, want) < (1e-13 if dtype == FLOAT64 else 1e-5)
    else:
        master = start.astype(FLOAT32)
        walk(kind, master, grads.astype(FLOAT32), lr=1e-2, **options)
        assert relative_error(master, want) < 1e-5
        assert same_bits(p, master.astype(dtype))


def ramp(call):
    return 0.1 / (call + 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {"momentum": lambda k: 0.5 + 0.004 * k, "weight_decay": ramp}),
        (SGD, {"momentum": lambda k: 0.018 * k, "nesterov": True}),
        (Adagrad, {"weight_decay": ramp}),
        (RMSprop, {"momentum": lambda k: 0.018 * k, "weight_decay": ramp}),
        (RMSprop, {"momentum": lambda k: 0.9 - 0.01 * k, "window": 3}),
        (Adadelta, {"weight_decay": ramp, "window": 3}),
        (Adam, {"betas": (lambda k: 0.95 - 0.001 * k, 0.99)}),
        (AdamW, {"weight_decay": lambda k: 0.1 * 0.9**k}),
        (Adamax, {"betas": (lambda k: 0.95 - 0.001 * k, 0.99), "weight_decay": ramp}),
        (NAdam, {"betas": (lambda k: 0.95 - 0.001 * k, 0.99), "weight_decay": ramp}),
        (Lion, {"betas": (lambda k: 0.95 - 0.001 * k, 0.99), "weight_decay": ramp}),
        (Newton, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
def test_scheduled_options(backend, rng, kind, options):
    grads = rng.normal(size=(50, 5))
    path = walk(kind, backend.array(np.ones(5)), on(backend, list(grads)), lr=ramp, **options)
    want = getattr(reference, kind.__name__.lower())(np.ones(5), list(grads), ramp, **options)
    np.testing.assert_allclose(path, want, rtol=1e-10)


def test_windows_forget_completely(backend, rng):
    """Large squares leave nothing behind: a running sum would keep their rounding errors."""
    large = on(backend, list(np.full((4, 9), 1e6, FLOAT32)))
    small = on(backend, list(rng.normal(size=(8, 9)).astype(FLOAT32)))
    for kind in (RMSprop, Adadelta):
        p, fresh = on(backend, list(np.zeros((2, 9), FLOAT32)))
        opt, other = kind([p], 0.1, window=4), kind([fresh], 0.1, window=4)
        for g in (*large, *small[:4]):
            opt.step([g])
        for g in (*small[:4], *small[:4]):
            other.step([g])
        squares = [o.state_dict()["state.0.squares"] for o in (opt, other)]
        assert same_bits(np.sort(squares[0], 0), np.sort(squares[1], 0))
        if kind is RMSprop:
            p[...] = fresh[...] = 0
            for g in small[4:]:
                opt.step([g])
                other.step([g])
            np.testing.assert_allclose(backend.numpy(p), backend.numpy(fresh), rtol=1e-6)


def test_a_constant_gradient_has_no_variance():
    """Centred, the step grows as the variance falls; a difference of squares would end in noise or NaN."""
    p = np.zeros(5, FLOAT32)
    opt = RMSprop([p], 1.0, alpha=0.5, eps=1e-3, centered=True)
    for _ in range(200):
        opt.step([np.full(5, 0.3, FLOAT32)])
    before = p.astype(FLOAT64)
    opt.step([np.full(5, 0.3, FLOAT32)])
    np.testing.assert_allclose(before - p, 300, rtol=1e-3)


# --------------------------------------------------------------------------- state in 16 bit


def test_moments_in_bfloat16(backend, rng):
    """Stored in bfloat16, computed with in float32, rounded to nearest even at each step."""
    p, grads = rng.normal(size=1003).astype(FLOAT32), rng.normal(size=(20, 1003)).astype(FLOAT32)
    p = backend.array(p)
    opt = Adam([p], 1e-2, betas=(0.9, 0.99), state_dtype="bfloat16")
    m = v = np.zeros(1003, FLOAT32)
    rate1, rate2 = np.float32(1 - 0.9), np.float32(1 - 0.99)
    for g in grads:
        opt.step([backend.array(g)])
        m = (m + rate1 * (g - m)).astype(BFLOAT16).astype(FLOAT32)
        v = (v + rate2 * (g * g - v)).astype(BFLOAT16).astype(FLOAT32)
    state = opt.state_dict()
    assert same_bits(state["state.0.m"], m.astype(BFLOAT16)) and same_bits(state["state.0.v"], v.astype(BFLOAT16))


@rules
def test_state_in_bfloat16(backend, rng, rule):
    for dtype in fewer(backend, DTYPES[1:], (FLOAT32, BFLOAT16)):
        follow_with_state_in_bfloat16(backend, rng, rule, dtype)


def follow_with_state_in_bfloat16(backend, rng, rule, dtype):
    kind, options, ref = RULES[rule]
    start, grads = rng.normal(size=700).astype(dtype), rng.normal(size=(4, 700)).astype(dtype)
    want = ref(start, list(grads), 1e-2, **options)[-1]
    p, explicit, plain = on(backend, [start] * 3)
    opt = kind([p], 1e-2, **options, state_dtype="bfloat16")
    others = [kind([explicit], 1e-2, **options, state_dtype="float32"), kind([plain], 1e-2, **options)]
    for g in on(backend, list(grads)):
        for one in (opt, *others):
            one.step([g])
    p, explicit, plain = map(backend.numpy, (p, explicit, plain))
    state = {k: v for k, v in opt.state_dict().items() if isinstance(v, np.ndarray) and not k.endswith("master")}
    assert all(v.dtype == BFLOAT16 for v in state.values())
    assert same_bits(explicit, plain)
    # A state's rounding errors, of 1/256 each, are far smaller than the way.
    way = np.linalg.norm(want - start.astype(FLOAT64))
    rounding = np.linalg.norm(ulp(want, dtype)) if dtype != FLOAT32 else 0
    assert np.linalg.norm(p.astype(FLOAT64) - want) < 0.1 * way + rounding


def test_the_second_moment_in_bfloat16_falls_with_a_small_beta2():
    for beta2, falls in ((0.999, False), (0.99, True)):
        opt = Adam([np.ones(4, FLOAT32)], betas=(0.9, beta2), state_dtype="bfloat16")
        opt.step([np.ones(4, FLOAT32)])
        before = opt.state_dict()["state.0.v"].astype(FLOAT64)
        for _ in range(100):
            opt.step([np.zeros(4, FLOAT32)])
        after = opt.state_dict()["state.0.v"].astype(FLOAT64)
        assert (after < before).all() if falls else (after == before).all()


# --------------------------------------------------------------------------- small problems

STEPS = {  # enough for each kind, with a learning rate that falls to zero
    "SGD": {"lr": 2e-3, "momentum": 0.9},
    "Adagrad": {"lr": 0.3},
    "RMSprop": {"lr": 1e-2},
    "Adadelta": {"lr": 5.0, "rho": 0.95},
    "Adam": {"lr": 2e-2},
    "AdamW": {"lr": 2e-2, "weight_decay": 0.0},
    "Adamax": {"lr": 2e-2},
    "NAdam": {"lr": 1e-2},
    "Lion": {"lr": 1e-3},
}


def descend(kind, gradient, start, steps, **options):
    p = np.array(start)
    opt = kind([p], **{**options, "lr": linear(options["lr"], 0.0, steps)})
    for _ in range(steps):
        opt.step([gradient(p)])
    return p


@pytest.mark.parametrize("name", STEPS)
def test_parabola(name):
    p = descend(KINDS[name], lambda p: p - [3.0, -1.0], [0.0, 0.0], 6000, **STEPS[name])
    np.testing.assert_allclose(p, [3, -1], atol=1e-2)


@pytest.mark.parametrize("name", STEPS)
def test_rosenbrock(name):
    def gradient(p):
        x, y = p
        return np.array([2 * (x - 1) - 400 * x * (y - x * x), 200 * (y - x * x)])

    p = descend(KINDS[name], gradient, [-1.0, 1.5], 12_000, **STEPS[name])
    np.testing.assert_allclose(p, [1, 1], atol=5e-2)


# --------------------------------------------------------------------------- numbers close to zero


@rules
def test_state_never_becomes_subnormal(backend, rule):
    """Where gradients vanish, state decays to zero without passing numbers that make a step slow."""
    kind, options, _ = RULES[rule]
    p = backend.array(np.ones(40, FLOAT32))
    opt, zero = kind([p], **options), backend.array(np.zeros(40, FLOAT32))
    opt.step([backend.array(np.geomspace(1e-3, 1e-37, 40).astype(FLOAT32))])
    for _ in range(fewer(backend, 1500, 20)):
        opt.step([zero])
    opt.step([backend.array(np.geomspace(1e-20, 1e-42, 40).astype(FLOAT32))])
    state = [v for k, v in opt.state_dict().items() if isinstance(v, np.ndarray) and not k.endswith("master")]
    state = np.concatenate([np.zeros(0), *(a.ravel().astype(FLOAT64) for a in state)])
    assert not ((state != 0) & (np.abs(state) < 1e-30)).any()
    assert np.isfinite(p).all() and all(np.isfinite(a).all() for a in arrays_of(opt))
