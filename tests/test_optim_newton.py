"""kilter.optim.DiagonalNewton: curvatures that come, stay away, do not fit; and preconditioning as such."""

import numpy as np
import pytest

import reference_optim as reference
from kilter.optim import SGD, DiagonalNewton, LossScaler
from optimizers import mapped
from support import BFLOAT16, DTYPES, FLOAT32, FLOAT64, copied, plain, refused, relative_error, same_bits

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
def test_against_the_reference(rng, dtype, missing):
    start, grads, curvatures = (rng.normal(size=shape).astype(dtype) for shape in (99, (20, 99), (20, 99)))
    given = [None if step in missing else c for step, c in enumerate(curvatures)]
    options = {"damping": 0.1, "beta": 0.9, "clip": 0.5}
    want = reference.newton(start, list(grads), 0.05, curvatures=given, **options)[-1]
    p = start.copy()
    opt = DiagonalNewton({"w": p}, 0.05, **options)
    for g, c in zip(grads, given, strict=True):
        opt.step({"w": g}, None if c is None else {"w": c})
    master = p if dtype in (FLOAT64, FLOAT32) else opt.state_dict()["state.w.master"]
    assert relative_error(master, want) < (1e-13 if dtype == FLOAT64 else 1e-5)
    assert same_bits(p, master.astype(dtype))


def test_a_float32_curvature_of_16_bit_parameters(rng):
    p, c = rng.normal(size=50).astype(BFLOAT16), rng.normal(size=50).astype(FLOAT32)
    opt = DiagonalNewton([p], beta=0.5)
    opt.step([np.zeros(50, BFLOAT16)], [c])
    np.testing.assert_array_equal(opt.state_dict()["state.0.curvature"], np.abs(c) * np.float32(0.5))


def test_structures(rng):
    a, b, c = rng.normal(size=(3, 4))
    start = [{"params": {"a": a}}, {"params": [b], "beta": 0.5}, {"params": [c], "clip": 1e-3}]
    opt = DiagonalNewton(start)
    before = copied({"a": a, "b": b, "c": c})
    opt.step([[np.ones(4)]] * 3, [[np.full(4, 2.0)], [np.full(4, 4.0)], [np.full(4, 5.0)]])
    np.testing.assert_allclose(before["a"] - a, 1 / (2 + 1e-4))
    np.testing.assert_allclose(before["b"] - b, 1 / (4 + 1e-4))
    np.testing.assert_allclose(before["c"] - c, 1e-3)


def test_the_first_step_needs_a_curvature():
    p, late = np.ones(3), np.ones(3)
    opt = DiagonalNewton({"w": p})
    with refused(r"curvature.*\bw\b", p, opt):
        opt.step({"w": np.ones(3)})
    assert opt.calls == 0
    opt.step({"w": np.ones(3)}, {"w": np.ones(3)})
    opt.add_params({"late": late})
    both = {"w": np.ones(3), "late": np.ones(3)}
    with refused(r"curvature.*\blate\b", p, late, opt):
        opt.step(both)
    opt.step(both, both)
    opt.step(both)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "curvature"])
def test_a_skipped_step_takes_no_curvature_over(where, bad):
    p, scaler = np.ones(3), LossScaler()
    opt = DiagonalNewton([p])
    opt.step([np.ones(3)], [np.ones(3)], scaler=scaler)
    kept, state = p.copy(), plain(opt.state_dict())
    ruined = {"gradient": np.ones(3), "curvature": np.ones(3)}
    ruined[where][1] = bad
    report = opt.step([ruined["gradient"]], [ruined["curvature"]], scaler=scaler)
    assert report.skipped and same_bits(p, kept) and scaler.scale == 32768
    assert {**plain(opt.state_dict()), "calls": 1} == state


def test_the_norm_is_that_of_the_gradients(rng):
    g = rng.normal(size=100)
    report = DiagonalNewton([np.zeros(100)], clip_norm=1.0).step([g], [g * 1e3])
    np.testing.assert_allclose(report.grad_norm, np.linalg.norm(g))


def test_the_curvature_is_neither_scaled_nor_clipped(rng):
    g, c = rng.normal(size=(2, 30))
    a, b = np.zeros(30), np.zeros(30)
    one = DiagonalNewton([a], clip_value=0.5, maximize=True)
    two = DiagonalNewton([b])
    one.step([g * 1024], [c], scaler=LossScaler(init=1024.0))
    two.step([-np.clip(g, -0.5, 0.5)], [c])
    assert same_bits(a, b)


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
def test_curvatures_are_checked(curvature):
    ps = {"w": np.ones(3), "b": np.ones(2)}
    opt = DiagonalNewton(ps)
    good = mapped(np.ones_like, ps)
    opt.step(good, good)
    with refused("curvature", ps, opt):
        opt.step(good, curvature)
    assert opt.calls == 1


def test_curvatures_in_any_layout(rng):
    p, q, c = np.zeros((4, 6)), np.zeros((4, 6)), rng.normal(size=(4, 6))
    DiagonalNewton([p]).step([np.ones((4, 6))], [np.asfortranarray(c)])
    DiagonalNewton([q]).step([np.ones((4, 6))], [c])
    assert same_bits(p, q)


def test_frozen_parameters_need_none():
    ps = {"w": np.ones(3), "b": np.ones(3)}
    opt = DiagonalNewton(ps)
    opt.freeze("b")
    opt.step({"w": np.ones(3)}, {"w": np.ones(3)})
    assert (ps["b"] == 1).all() and (ps["w"] != 1).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("damping", -1e-4), ("beta", 1.0), ("beta", -0.1), ("clip", 0.0), ("clip", np.nan), ("damping", lambda k: 1.0)],
)
def test_options_are_checked(name, value):
    with refused(name):
        DiagonalNewton([np.ones(1)], **{name: value})
