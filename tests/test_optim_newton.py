"""kilter.optim.DiagonalNewton: curvatures that come, stay away, do not fit; and preconditioning as such."""

import numpy as np
import pytest

import reference_optim as reference
from kilter.optim import SGD, DiagonalNewton, LossScaler
from optimizers import mapped, on, read
from support import BFLOAT16, DTYPES, FLOAT32, FLOAT64, plain, refused, relative_error, same_bits

H = np.array([1e4, 1.0])


def test_v17_one_step_against_many():
    p = np.ones(2)
    DiagonalNewton([p], damping=0.0).step([H * p], [H])
    np.testing.assert_allclose(p, 0, atol=1e-12)
    p = np.ones(2)
    opt = SGD([p], 2 / (1e4 + 1))
    while np.linalg.norm(p) >= 1e-6:
        opt.step([H * p])
    assert opt.calls == 70_811


def test_steps_go_downhill_where_the_curvature_is_negative():
    p = np.array([1.0, 1.0])
    DiagonalNewton([p], 0.5, damping=0.0).step([np.array([2.0, -2.0])], [np.array([2.0, -2.0])])
    np.testing.assert_allclose(p, [0.5, 1.5])


@pytest.mark.parametrize("missing", [(), (1, 2, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(backend, rng, dtype, missing):
    start, grads, curvatures = (rng.normal(size=shape).astype(dtype) for shape in (99, (20, 99), (20, 99)))
    given = [None if step in missing else c for step, c in enumerate(curvatures)]
    options = {"damping": 0.1, "beta": 0.9, "clip": 0.5}
    want = reference.newton(start, list(grads), 0.05, curvatures=given, **options)[-1]
    p = backend.array(start.copy())
    opt = DiagonalNewton({"w": p}, 0.05, **options)
    for g, c in zip(grads, given, strict=True):
        opt.step({"w": backend.array(g)}, None if c is None else {"w": backend.array(c)})
    p = backend.numpy(p)
    master = p if dtype in (FLOAT64, FLOAT32) else opt.state_dict()["state.w.master"]
    assert relative_error(master, want) < (1e-13 if dtype == FLOAT64 else 1e-5)
    assert same_bits(p, master.astype(dtype))


def test_a_float32_curvature_of_16_bit_parameters(rng):
    p, c = rng.normal(size=50).astype(BFLOAT16), rng.normal(size=50).astype(FLOAT32)
    opt = DiagonalNewton([p], beta=0.5)
    opt.step([np.zeros(50, BFLOAT16)], [c])
    np.testing.assert_array_equal(opt.state_dict()["state.0.curvature"], np.abs(c) * np.float32(0.5))


def test_structures(backend, rng):
    values = dict(zip("abc", rng.normal(size=(3, 4)), strict=True))
    a, b, c = on(backend, values).values()
    start = [{"params": {"a": a}}, {"params": [b], "beta": 0.5}, {"params": [c], "clip": 1e-3}]
    curvature = on(backend, [[np.full(4, 2.0)], [np.full(4, 4.0)], [np.full(4, 5.0)]])
    DiagonalNewton(start).step([[backend.array(np.ones(4))]] * 3, curvature)
    np.testing.assert_allclose(values["a"] - backend.numpy(a), 1 / (2 + 1e-4))
    np.testing.assert_allclose(values["b"] - backend.numpy(b), 1 / (4 + 1e-4))
    np.testing.assert_allclose(values["c"] - backend.numpy(c), 1e-3)


def test_the_first_step_needs_a_curvature(backend):
    p, late, g, bad = on(backend, [np.ones(3), np.ones(3), np.ones(3), np.full(3, np.nan)])
    opt = DiagonalNewton({"w": p}, skip_nonfinite=True)
    for calls in (0, 1):
        with refused(r"curvature.*\bw\b", p, opt):
            opt.step({"w": g})
        assert opt.calls == calls
        opt.step({"w": bad if calls == 0 else g}, {"w": g})  # a skipped step takes none over
    opt.add_params({"late": late})
    both = {"w": g, "late": g}
    with refused(r"curvature.*\blate\b", p, late, opt):
        opt.step(both)
    opt.step(both, both)
    opt.step(both)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "curvature"])
def test_a_skipped_step_takes_no_curvature_over(backend, where, bad):
    p, one, scaler = backend.array(np.ones(3)), backend.array(np.ones(3)), LossScaler()
    opt = DiagonalNewton([p])
    opt.step([one], [one], scaler=scaler)
    kept, state = p.copy(), plain(opt.state_dict())
    ruined = {"gradient": np.ones(3), "curvature": np.ones(3)}
    ruined[where][1] = bad
    ruined = on(backend, ruined)
    report = opt.step([ruined["gradient"]], [ruined["curvature"]], scaler=scaler)
    assert report.skipped and same_bits(*read(backend, [p, kept])) and scaler.scale == 32768
    assert {**plain(opt.state_dict()), "calls": 1} == state


def test_the_norm_is_that_of_the_gradients(backend, rng):
    g = rng.normal(size=100)
    opt = DiagonalNewton([backend.array(np.zeros(100))], clip_norm=1.0)
    report = opt.step([backend.array(g)], [backend.array(g * 1e3)])
    np.testing.assert_allclose(report.grad_norm, np.linalg.norm(g))


def test_the_curvature_is_neither_scaled_nor_clipped(backend, rng):
    g, c = rng.normal(size=(2, 30))
    a, b, c, scaled, clipped = on(backend, [np.zeros(30), np.zeros(30), c, g * 1024, -np.clip(g, -0.5, 0.5)])
    one = DiagonalNewton([a], clip_value=0.5, maximize=True)
    two = DiagonalNewton([b])
    one.step([scaled], [c], scaler=LossScaler(init=1024.0))
    two.step([clipped], [c])
    assert same_bits(*read(backend, [a, b]))


@pytest.mark.parametrize(
    "curvature",
    [
        {"w": np.ones(3)},
        {"w": np.ones(3), "b": np.ones(2), "c": np.ones(2)},
        {"w": np.ones(3), "b": np.ones(3)},
        {"w": np.ones(3), "b": np.ones(2, int)},
        {"w": np.ones(3), "b": np.ones(2, FLOAT32)},
        {"w": np.ones(3), "b": [1.0, 1.0]},
        {"w": np.ones(3), "b": None},
        [np.ones(3), np.ones(2)],
        5,
    ],
    ids=["missing", "extra", "shape", "int", "float32", "list", "none", "structure", "number"],
)
def test_curvatures_are_checked(backend, curvature):
    ps = on(backend, {"w": np.ones(3), "b": np.ones(2)})
    opt = DiagonalNewton(ps)
    good = mapped(lambda p: p.copy(), ps)
    opt.step(good, good)
    with refused("curvature", ps, opt):
        opt.step(good, mapped(lambda c: backend.array(c) if isinstance(c, np.ndarray) else c, curvature))
    assert opt.calls == 1


def test_curvatures_in_any_layout(backend, rng):
    p, q, g = on(backend, [np.zeros((4, 6)), np.zeros((4, 6)), np.ones((4, 6))])
    c = rng.normal(size=(4, 6))
    DiagonalNewton([p]).step([g], [backend.array(np.asfortranarray(c))])
    DiagonalNewton([q]).step([g], [backend.array(c)])
    assert same_bits(*read(backend, [p, q]))


def test_frozen_parameters_need_none(backend):
    ps = on(backend, {"w": np.ones(3), "b": np.ones(3)})
    one = backend.array(np.ones(3))
    opt = DiagonalNewton(ps)
    opt.freeze("b")
    opt.step({"w": one}, {"w": one})
    assert (ps["b"] == 1).all() and (ps["w"] != 1).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("damping", -1e-4), ("beta", 1.0), ("beta", -0.1), ("clip", 0.0), ("clip", np.nan), ("damping", lambda k: 1.0)],
)
def test_options_are_checked(name, value):
    with refused(name):
        DiagonalNewton([np.ones(1)], **{name: value})
