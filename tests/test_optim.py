"""kilter.optim: rules against worked numbers and the float64 reference, parameters in every form, masters."""

import numpy as np
import pytest

import reference_optim as reference
from kilter.optim import SGD, Adam, AdamW
from optimizers import RULES, Newton, fewer, on, read, rules, walk
from support import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    arrays_of,
    copied,
    plain,
    refused,
    relative_error,
    same_bits,
)

# --------------------------------------------------------------------------- clipping, norms, skipping


@pytest.mark.parametrize("limit", [{"clip_norm": 1.0}, {"clip_norm": 1e6}, {"clip_value": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
def test_clipping(backend, rng, dtype, limit):
    """The norm is that of all tensors together."""
    start = [rng.normal(size=n).astype(dtype) for n in (3, 500)]
    grads = [[rng.normal(size=n).astype(dtype) for n in (3, 500)] for _ in range(10)]
    ps = on(backend, start)
    opt = SGD(ps, 0.1, momentum=0.9, **limit)
    for g in grads:
        opt.step(on(backend, g))
    clipped = [np.concatenate(reference.clip(g, **limit)) for g in grads]
    want = reference.sgd(np.concatenate(start), clipped, 0.1, momentum=0.9)[-1]
    error = relative_error(np.concatenate(read(backend, ps)), want)
    assert error < {FLOAT64: 1e-6, FLOAT32: 1e-5, BFLOAT16: 4e-3}[dtype]  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_track_norm(backend, rng, dtype):
    grads = [rng.normal(size=n).astype(dtype) for n in (1, 0, 1000)]
    opt = Adam(on(backend, [np.zeros_like(g) for g in grads]), track_norm=True, clip_value=0.1)
    want = np.linalg.norm(np.concatenate(grads).astype(np.float64))
    np.testing.assert_allclose(opt.step(on(backend, grads)).grad_norm, want, rtol=1e-6)


def test_norm_does_not_overflow(backend):
    g = np.full(4, 1e30, FLOAT32)
    p = backend.array(np.zeros(4, FLOAT32))
    report = SGD([p], 1e-30, track_norm=True, skip_nonfinite=True).step([backend.array(g)])
    np.testing.assert_allclose(report.grad_norm, 2e30, rtol=1e-6)
    assert not report.skipped and (p != 0).all()


def test_skipping_reads_the_gradients_not_their_norm(backend):
    p = backend.array(np.zeros(4))
    report = SGD([p], 1e-200, skip_nonfinite=True).step([backend.array(np.full(4, 1e200))])
    assert not report.skipped
    np.testing.assert_allclose(backend.numpy(p), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@rules
def test_a_skipped_step_changes_nothing(backend, rng, rule, dtype):
    kind, options, _ = RULES[rule]
    cases = fewer(backend, [(at, bad) for at in (0, 17, -1) for bad in (np.nan, np.inf, -np.inf)], [(17, np.inf)])
    for where, bad in cases:
        ps = on(backend, [rng.normal(size=n).astype(dtype) for n in (1, 99)])
        opt = kind(ps, **options, skip_nonfinite=True)
        good = [rng.normal(size=p.size).astype(dtype) for p in ps]
        opt.step(on(backend, good))
        kept, state = [p.copy() for p in read(backend, ps)], copied(opt.state_dict())
        ruined = [good[0], good[1].copy()]
        ruined[1][where] = bad
        report = opt.step(on(backend, ruined))
        assert report.skipped and (report.calls, report.applied) == (2, 1)
        assert all(same_bits(a, b) for a, b in zip(read(backend, ps), kept, strict=True))
        after = opt.state_dict()
        changed = [k for k in state if plain({k: state[k]}) != plain({k: after[k]})]
        assert len(changed) == 1 and opt.calls == 2, changed  # the number of calls


def test_without_skipping_nan_reaches_the_weights(backend):
    p = backend.array(np.ones(3, FLOAT32))
    report = Adam([p]).step([backend.array(np.array([1, np.nan, 1], FLOAT32))])
    assert not report.skipped and np.isnan(backend.numpy(p)).tolist() == [False, True, False]


# --------------------------------------------------------------------------- forms of params


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@rules
def test_many_tensors_are_one(backend, rng, rule, dtype):
    kind, options, _ = RULES[rule]
    sizes = (0, 1, 7, 1000, 0, 5000, 33)
    start = [rng.normal(size=n).astype(dtype) for n in sizes]
    ps, whole = on(backend, start), backend.array(np.concatenate(start))
    many, one = kind(ps, 0.01, **options), kind([whole], 0.01, **options)
    for _ in range(fewer(backend, 5, 2)):
        gs = [rng.normal(size=n).astype(dtype) for n in sizes]
        many.step(on(backend, gs))
        one.step([backend.array(np.concatenate(gs))])
    assert same_bits(np.concatenate(read(backend, ps)), backend.numpy(whole))


def test_list_dict_and_groups_agree(backend, rng):
    start, grads = rng.normal(size=(2, 4, 3)), rng.normal(size=(5, 2, 4, 3))
    lists, dicts, groups = (on(backend, list(start)) for _ in range(3))
    as_list, as_dict = Adam(lists), Adam({"w": dicts[0], "b": dicts[1]})
    as_groups = Adam([{"params": {"w": groups[0]}}, {"params": [groups[1]]}])
    for g in grads:
        w, b = on(backend, list(g))
        as_list.step([w, b])
        as_dict.step({"b": b, "w": w})  # by name, not by order
        as_groups.step([{"w": w}, [b]])
    lists, dicts, groups = (read(backend, ps) for ps in (lists, dicts, groups))
    for a, b, c in zip(lists, dicts, groups, strict=True):
        assert same_bits(a, b) and same_bits(a, c)
    np.testing.assert_allclose(lists[0], reference.adam(start[0], list(grads[:, 0]))[-1], rtol=1e-12)


def test_tuples_are_lists(rng):
    p, g = rng.normal(size=(2, 5))
    want = p - 0.1 * g
    SGD((p,), 0.1).step((g,))
    np.testing.assert_allclose(p, want, rtol=1e-15)


def test_groups_have_their_own_options(backend, rng):
    start, grads = rng.normal(size=(3, 6)), rng.normal(size=(10, 3, 6))
    a, b, c = on(backend, list(start))
    opt = AdamW(
        [
            {"params": [a], "lr": 0.1},
            {"params": [b], "weight_decay": 0.0},
            {"params": [c], "betas": (0.5, 0.9)},
        ],
        lr=lambda k: 0.01 * (k + 1),
        weight_decay=0.2,
    )
    for g in grads:
        opt.step([[x] for x in on(backend, list(g))])
    ramp, rule = (lambda k: 0.01 * (k + 1)), RULES["adamw"][2]
    for got, want in (
        (a, rule(start[0], list(grads[:, 0]), 0.1, weight_decay=0.2)),
        (b, rule(start[1], list(grads[:, 1]), ramp, weight_decay=0.0)),
        (c, rule(start[2], list(grads[:, 2]), ramp, weight_decay=0.2, betas=(0.5, 0.9))),
    ):
        np.testing.assert_allclose(backend.numpy(got), want[-1], rtol=1e-12)


def test_group_options_may_change_between_steps(backend, rng):
    p, values = backend.array(np.ones(3)), rng.normal(size=(3, 3))
    grads = on(backend, list(values))
    opt = SGD([p], lr=0.1)
    assert opt.groups[0]["lr"] == 0.1
    opt.step([grads[0]])
    opt.groups[0]["lr"] = 0.5
    opt.step([grads[1]])
    opt.groups[0]["lr"] = lambda k: 0.25 if k == 2 else np.nan
    opt.step([grads[2]])
    np.testing.assert_allclose(backend.numpy(p), 1 - np.array([0.1, 0.5, 0.25]) @ values, rtol=1e-14)


def test_updated_in_place_whatever_the_shape(backend):
    ps = on(backend, [np.ones(()), np.ones((2, 3, 4)), np.ones((1, 0, 5))])
    gs = on(backend, [np.ones(p.shape) for p in ps])
    SGD(ps, 0.5).step(gs)
    assert all((p == 0.5).all() for p in ps)


@rules
def test_mixed_dtypes(backend, rng, rule):
    """Norm parameters often stay float32 beside 16-bit weights."""
    kind, options, _ = RULES[rule]
    dtypes = (FLOAT32, BFLOAT16, FLOAT16, FLOAT32)
    start = [rng.normal(size=40).astype(d) for d in dtypes]
    mixed, single = on(backend, start), on(backend, start)
    grads = on(backend, [rng.normal(size=40).astype(d) for d in dtypes])
    opt, alone = kind(mixed, **options), [kind([p], **options) for p in single]
    for _ in range(3):
        opt.step(grads)
        for one, g in zip(alone, grads, strict=True):
            one.step([g])
    assert all(same_bits(a, b) for a, b in zip(read(backend, mixed), read(backend, single), strict=True))


def test_broadcast_gradients(backend, rng):
    a, b = on(backend, [np.ones((6, 8)), np.ones((6, 8))])
    row = rng.normal(size=8)
    Adam([a]).step([backend.xp.broadcast_to(backend.array(row), (6, 8))])
    Adam([b]).step([backend.array(np.tile(row, (6, 1)))])
    assert same_bits(backend.numpy(a), backend.numpy(b))


# --------------------------------------------------------------------------- 16 bit, small numbers


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("other", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_gradients_of_another_dtype(backend, rng, dtype, other):
    """Each is widened exactly."""
    start, grads = rng.normal(size=600).astype(dtype), rng.normal(size=(5, 600)).astype(other)
    p, master = on(backend, [start, start.astype(FLOAT32)])
    walk(Adam, p, on(backend, list(grads)), lr=0.1, clip_norm=3.0)
    walk(Adam, master, on(backend, list(grads.astype(FLOAT32))), lr=0.1, clip_norm=3.0)
    assert same_bits(backend.numpy(p), backend.numpy(master).astype(dtype))


@pytest.mark.parametrize(("dtype", "other"), [(FLOAT64, FLOAT32), (FLOAT32, FLOAT64), (FLOAT64, BFLOAT16)], ids=str)
def test_float64_does_not_mix(backend, dtype, other):
    p = backend.array(np.ones(3, dtype))
    opt = SGD({"w": p})
    with refused(r"grads\[w\].*float", p):
        opt.step({"w": backend.array(np.ones(3, other))})


@pytest.mark.parametrize("masters", ["auto", None])
def test_v18_small_updates_need_masters(masters):
    p = np.ones(3, FLOAT16)
    opt = SGD([p], 1.0, master_dtype=masters)
    for _ in range(4096):
        opt.step([np.full(3, -(2.0**-12), FLOAT16)])
    assert (p == (2 if masters else 1)).all()


@pytest.mark.parametrize("masters", ["auto", None])
def test_bfloat16_decay_that_rounds_away(masters):
    p = np.full(3, 1.5, BFLOAT16)
    opt = AdamW([p], 1e-2, weight_decay=0.05, master_dtype=masters)
    for _ in range(400):
        opt.step([np.zeros(3, BFLOAT16)])
    want = reference.adam(1.5, [0.0] * 400, 1e-2, weight_decay=0.05, decay="lr")[-1]
    assert (p == (np.array(want).astype(BFLOAT16) if masters else 1.5)).all()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_without_masters_each_step_is_rounded(backend, rng, dtype):
    start, grads = rng.normal(size=50).astype(dtype), rng.normal(size=(20, 50)).astype(dtype)
    p, want = backend.array(start.copy()), start.astype(FLOAT32)
    opt = SGD([p], 0.25, master_dtype=None)
    for g in grads:
        opt.step([backend.array(g)])
        want = (want - np.float32(0.25) * g.astype(FLOAT32)).astype(dtype).astype(FLOAT32)
    assert same_bits(backend.numpy(p), want.astype(dtype))


@rules
def test_zero_gradients(backend, rule):
    kind, options, _ = RULES[rule]
    options = options if kind is Newton else options | {"weight_decay": 0.0}
    every = [(dtype, masters) for dtype in DTYPES for masters in ("auto", None)]
    for dtype, masters in fewer(backend, every, [(BFLOAT16, "auto"), (FLOAT16, None)]):
        p = backend.array(np.array([1.5, -3.0, 0.0], dtype))
        opt = kind([p], **options, master_dtype=masters)
        for _ in range(3):
            opt.step([backend.array(np.zeros(3, dtype))])
        assert p.tolist() == [1.5, -3.0, 0.0], (dtype, masters)


@pytest.mark.parametrize(
    ("dtype", "gradient", "eps", "expected"),
    [
        (FLOAT16, 2.0**-24, 0.0, 0.875),  # its square is kept: the arithmetic is float32
        (BFLOAT16, 1e-30, 1e-8, 1.0),  # its square is not, and eps keeps 0 / 0 away
    ],
)
def test_smallest_16_bit_gradients(backend, dtype, gradient, eps, expected):
    p = backend.array(np.ones(5, dtype))
    Adam([p], 0.125, eps=eps).step([backend.array(np.full(5, gradient).astype(dtype))])
    assert (p == expected).all()


@pytest.mark.parametrize(("kind", "options"), [(SGD, {"momentum": 0.9}), (Adam, {}), (Adam, {"amsgrad": True})])
def test_state_never_becomes_subnormal(kind, options):
    p = np.ones(40, FLOAT32)
    opt = kind([p], **options)
    opt.step([np.geomspace(1e-3, 1e-37, 40).astype(FLOAT32)])
    for _ in range(1500):
        opt.step([np.zeros(40, FLOAT32)])
    opt.step([np.geomspace(1e-20, 1e-42, 40).astype(FLOAT32)])
    state = np.concatenate([a.ravel() for a in arrays_of(opt) if a.dtype == FLOAT32]).astype(np.float64)
    assert state.size >= 40
    assert not ((state != 0) & (np.abs(state) < 1e-30)).any()
