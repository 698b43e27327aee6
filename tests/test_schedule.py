"""Schedules against worked numbers, and what all of them have in common."""

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilter import KilterError, schedule

# One of each, with the arguments by name, so that a wrong one can be put in by name.
CURVES = {
    "constant": (schedule.constant, {"value": -0.5}),
    "step": (schedule.step, {"base": 0.1, "every": 10, "gamma": 0.5}),
    "multistep": (schedule.multistep, {"base": 0.1, "milestones": (3, 7), "gamma": 0.1}),
    "exponential": (schedule.exponential, {"base": 0.9, "gamma": 0.95}),
    "linear": (schedule.linear, {"start": 0.9, "end": 0.1, "steps": 50}),
    "polynomial": (schedule.polynomial, {"start": 1.0, "end": 0.1, "steps": 20, "power": 2.0}),
    "cosine": (schedule.cosine, {"base": 1.0, "steps": 30, "end": 0.1}),
    "cosine_restarts": (schedule.cosine_restarts, {"base": 1.0, "first": 3, "mult": 2, "end": 0.1}),
    "inverse_sqrt": (schedule.inverse_sqrt, {"base": 1.0, "warmup": 4}),
    "hold_linear_hold": (schedule.hold_linear_hold, {"start": 1.0, "end": 0.01, "steps": 100, "hold": 0.2}),
    "sawtooth": (schedule.sawtooth, {"start": 1.0, "end": 0.1, "period": 20}),
    "piecewise": (schedule.piecewise, {"points": ((0, 1.0), (5, 2.0), (5, 3.0), (9, 0.0)), "anneal": "cos"}),
    "triangular": (
        schedule.triangular,
        {"low": 0.1, "high": 1.0, "half_period": 4, "mode": "exp_range", "gamma": 0.9, "inverse": False},
    ),
    "warmup": (schedule.warmup, {"schedule": schedule.constant(3.2), "steps": 5, "start": 0.1}),
    "one_cycle.lr": (lambda **given: schedule.one_cycle(**given).lr, {"peak": 1.0, "steps": 10, "warm": 0.3}),
    "one_cycle.momentum": (lambda **given: schedule.one_cycle(**given).momentum, {"peak": 1.0, "steps": 10}),
}
JOINED = schedule.join((schedule.linear(0, 1, 4), 4), (schedule.constant(5), 6), (schedule.exponential(1, 0.5), 9))
ALL = {name: make(**arguments) for name, (make, arguments) in CURVES.items()} | {"join": JOINED}
LENGTHS = {
    (name, argument)
    for name, (_, arguments) in CURVES.items()
    for argument in {"every", "gamma", "steps", "power", "first", "mult", "warmup", "period", "half_period"}
    if argument in arguments
}
NUMBERS = {
    (name, argument)
    for name, (_, arguments) in CURVES.items()
    for argument, value in arguments.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
}


def test_linear_worked_numbers():  # V7
    curve = schedule.linear(0.9, 0.1, 50)
    np.testing.assert_allclose(curve([0, 10, 25, 49, 50]), [0.9, 0.74, 0.5, 0.116, 0.1], rtol=1e-14)


def test_linear_that_meets_its_floor_early():  # V7, the program's slope
    curve = schedule.linear(0.9, 0.1, 40)
    expected = [0.9, 0.88, 0.7, 0.4, 0.12, 0.1, 0.1]
    np.testing.assert_allclose(curve([0, 1, 10, 25, 39, 40, 49]), expected, rtol=1e-13)


def test_exponential_worked_numbers():  # V7
    expected = [0.9, 0.855, 0.6964028437, 0.5388632453, 0.3226373302]
    np.testing.assert_allclose(schedule.exponential(0.9, 0.95)([0, 1, 5, 10, 20]), expected, rtol=0, atol=5e-11)


def test_hold_linear_hold_worked_numbers():  # V13; list index i is epoch i + 1
    curve = schedule.hold_linear_hold(1, 0.01, 100)
    epochs = np.array([18, 19, 20, 48, 49, 78, 79, 99]) + 1
    np.testing.assert_allclose(curve(epochs), [1, 1, 0.9835, 0.5215, 0.505, 0.0265, 0.01, 0.01], rtol=1e-13)


@pytest.mark.parametrize(("total", "parts"), [(3, (0, 1, 2)), (7, (1, 4, 2)), (33, (6, 19, 8)), (49, (9, 29, 11))])
def test_hold_linear_hold_truncates_its_parts(total, parts):  # V13
    values = schedule.hold_linear_hold(1, 0, total)(np.arange(total + 1))
    first, middle, last = parts
    assert (values[: first + 1] == 1).all()
    assert (np.diff(values[first : first + middle + 1]) < 0).all()
    assert (values[first + middle :] == 0).all()
    assert len(values) == first + middle + last + 1


def test_hold_linear_hold_without_a_line_jumps():
    assert schedule.hold_linear_hold(1, 0, 10, hold=0.5)([4, 4.9, 5, 6]).tolist() == [1, 1, 0, 0]


def test_sawtooth_worked_numbers():  # V13; list index i is epoch i + 1
    curve = schedule.sawtooth(1, 0.1, 20)
    epochs = np.array([0, 1, 9, 18, 19, 20]) + 1
    np.testing.assert_allclose(curve(epochs), [0.955, 0.91, 0.55, 0.145, 1, 0.955], rtol=1e-14)
    values = curve(np.arange(200))
    np.testing.assert_allclose([values.min(), values.max()], [0.145, 1], rtol=1e-14)


def test_step_worked_numbers():  # V13
    curve = schedule.step(0.1, 10, 0.5)
    np.testing.assert_allclose(curve([0, 9, 10, 20, 30]), [0.1, 0.1, 0.05, 0.025, 0.0125], rtol=1e-15)
    np.testing.assert_allclose(schedule.step(0.1, 1, 0.95)(10), 0.05987369, rtol=0, atol=5e-9)


def test_multistep_counts_milestones_that_are_reached():
    curve = schedule.multistep(1, [3, 7], 0.5)
    assert curve(np.arange(9)).tolist() == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert schedule.multistep(1, [], 0.5)(100) == 1


def test_a_schedule_keeps_its_own_points():
    milestones = [3]
    curve = schedule.multistep(1, milestones, 0.5)
    milestones.append(4)
    assert curve(5) == 0.5


def test_scaling_and_warmup_worked_numbers():  # V14
    assert schedule.scale_lr(0.1, 8192, 256) == pytest.approx(3.2, rel=1e-15)
    assert schedule.scale_lr(0.1, 4 * 256, 256) == pytest.approx(0.4, rel=1e-15)
    curve = schedule.warmup(schedule.constant(3.2), 5, start=0.1)
    np.testing.assert_allclose(curve(np.arange(7)), [0.1, 0.72, 1.34, 1.96, 2.58, 3.2, 3.2], rtol=1e-14)


COSINE_LR = [
    *(
        0.04,
        0.52,
        1,
        0.950484632,
        0.8117456539,
        0.6112620219,
        0.3887419781,
        0.1882583461,
        0.049519368,
        0.000004,
    ),
]
COSINE_MOMENTUM = [
    *(
        0.95,
        0.9,
        0.85,
        0.8549515566,
        0.8688255099,
        0.8888739533,
        0.9111260467,
        0.9311744901,
        0.9450484434,
        0.95,
    ),
]
THREE_PHASE_LR = [0.04, 0.52, 1, 0.52, 0.04, 0.0320008, 0.0240016, 0.0160024, 0.0080032, 0.000004]
THREE_PHASE_MOMENTUM = [0.95, 0.9, 0.85, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95]


def test_one_cycle_worked_numbers():  # V15
    cycle = schedule.one_cycle(1, 10)
    np.testing.assert_allclose(cycle.lr(np.arange(10)), COSINE_LR, rtol=0, atol=5e-11)
    np.testing.assert_allclose(cycle.momentum(np.arange(10)), COSINE_MOMENTUM, rtol=0, atol=5e-11)
    assert cycle.lr(2) == 1
    assert cycle.lr(9) == cycle.lr(10) == cycle.lr(1000) == 0.04 / 1e4


def test_one_cycle_linear_three_phase_worked_numbers():  # V15
    cycle = schedule.one_cycle(1, 10, anneal="linear", three_phase=True)
    np.testing.assert_allclose(cycle.lr(np.arange(10)), THREE_PHASE_LR, rtol=1e-13)
    np.testing.assert_allclose(cycle.momentum(np.arange(10)), THREE_PHASE_MOMENTUM, rtol=1e-15)


def test_one_cycle_options():
    cycle = schedule.one_cycle(2, 101, momentum=(0.5, 0.9), warm=0.5, start_div=10, end_div=5)
    top = 0.5 * 101 - 1
    assert (cycle.lr(0), cycle.lr(top), cycle.lr(100)) == (0.2, 2, 0.2 / 5)
    assert (cycle.momentum(0), cycle.momentum(top), cycle.momentum(100)) == (0.9, 0.5, 0.9)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_one_cycle_of_a_few_steps_ends_at_the_end(steps, three_phase):
    cycle = schedule.one_cycle(1, steps, three_phase=three_phase)
    assert cycle.lr(steps - 1) == 0.04 / 1e4
    assert cycle.momentum(steps - 1) == 0.95


def test_triangular_worked_numbers():  # V15
    steps = np.arange(9)
    expected = [0.1, 0.325, 0.55, 0.775, 1, 0.775, 0.55, 0.325, 0.1]
    np.testing.assert_allclose(schedule.triangular(0.1, 1, 4)(steps), expected, rtol=1e-14)
    momentum = schedule.triangular(0.8, 0.9, 4, inverse=True)
    np.testing.assert_allclose(momentum(steps[:5]), [0.9, 0.875, 0.85, 0.825, 0.8], rtol=1e-14)
    second = schedule.triangular(0.1, 1, 4, mode="triangular2")(steps + 8)
    np.testing.assert_allclose([second.max(), second[4]], 0.55, rtol=1e-14)
    shrinking = schedule.triangular(0.1, 1, 4, mode="exp_range", gamma=0.9)
    expected = [0.1, 0.3025, 0.4645, 0.592075, 0.69049, 0.498581]
    np.testing.assert_allclose(shrinking(steps[:6]), expected, rtol=0, atol=5e-7)


def test_cosine_meets_its_ends_and_middle():
    curve = schedule.cosine(0.3, 10, end=0.1)
    assert (curve(0), curve(10), curve(11)) == (0.3, 0.1, 0.1)
    np.testing.assert_allclose(curve(np.arange(11)), 0.1 + 0.1 * (1 + np.cos(np.pi * np.arange(11) / 10)), rtol=1e-14)


def test_polynomial_of_power_one_is_linear():
    steps = np.arange(12)
    line = schedule.linear(1, 0.1, 10)(steps)
    np.testing.assert_allclose(schedule.polynomial(1, 0.1, 10)(steps), line, rtol=1e-14)
    square = 0.1 + 0.9 * (1 - np.minimum(steps / 10, 1)) ** 2
    np.testing.assert_allclose(schedule.polynomial(1, 0.1, 10, power=2)(steps), square, rtol=1e-13)


@pytest.mark.parametrize("mult", [1, 1.5, 2, 3, 10])
def test_cosine_restarts_follow_cosines_of_growing_length(mult):
    curve = schedule.cosine_restarts(1, 7, mult, end=0.1)
    begin, length = 0.0, 7.0
    for _ in range(5):
        clock = np.arange(math.ceil(length))
        np.testing.assert_allclose(curve(begin + clock), schedule.cosine(1, length, 0.1)(clock), rtol=0, atol=1e-9)
        assert curve(begin) == pytest.approx(1, abs=1e-12)
        begin, length = begin + length, length * mult


@pytest.mark.parametrize("mult", [2, 3, 7, 10])
def test_cosine_restarts_hit_every_boundary(mult):
    curve = schedule.cosine_restarts(1, 1, mult)
    boundaries = [(mult**cycle - 1) // (mult - 1) for cycle in range(1, 12)]
    assert curve(boundaries).tolist() == [1.0] * 11


def test_inverse_sqrt_rises_and_falls():
    np.testing.assert_allclose(schedule.inverse_sqrt(0.5, 4)([0, 2, 4, 16, 64]), [0, 0.25, 0.5, 0.25, 0.125])


def test_piecewise_passes_its_points_and_jumps_to_the_later_one():
    curve = schedule.piecewise([(2, 1.0), (4, 3.0), (4, 10.0), (8, 0.0)])
    assert curve([0, 2, 3, 3.5, 4, 6, 8, 9]).tolist() == [1, 1, 2, 2.5, 10, 5, 0, 0]
    assert schedule.piecewise([(3, 0.5)])([0, 3, 9]).tolist() == [0.5, 0.5, 0.5]
    smooth = schedule.piecewise([(0, 0.0), (4, 1.0)], anneal="cos")
    np.testing.assert_allclose(smooth([1, 2, 3]), (1 - np.cos(np.pi * np.array([0.25, 0.5, 0.75]))) / 2)


def test_warmup_starts_the_clock_of_its_schedule_afterwards():
    inner = schedule.exponential(1, 0.5)
    curve = schedule.warmup(inner, 4)
    assert curve(np.arange(7)).tolist() == [0, 0.25, 0.5, 0.75, 1, 0.5, 0.25]


def test_join_gives_each_part_its_own_clock():
    assert JOINED(np.arange(11)).tolist() == [0, 0.25, 0.5, 0.75, 5, 5, 1, 0.5, 0.25, 0.125, 0.125]
    endless = schedule.join((schedule.constant(5), 2), (schedule.exponential(1, 0.5), math.inf))
    assert endless([1, 2, 12]).tolist() == [5, 1, 2.0**-10]


@pytest.mark.parametrize("wrap", [lambda f: schedule.warmup(f, 2), lambda f: schedule.join((f, 50))])
def test_a_callable_of_scalars_can_be_wrapped(wrap):
    def scalar_only(step):
        return 1.0 if step < 3 else math.exp(-step)

    curve = wrap(scalar_only)
    steps = np.arange(20)
    assert curve(steps).tolist() == [curve(int(step)) for step in steps]
    assert curve(19) == pytest.approx(math.exp(-(17 if isinstance(curve, schedule.warmup) else 19)))


# ---- traps


def test_a_step_of_the_text_is_not_a_step_of_the_formula():
    """Decay every few iterations and decay at every iteration share their numbers only at the first."""
    every, each = schedule.step(0.1, 10, 0.5), schedule.exponential(0.1, 0.5)
    assert every(0) == each(0)
    np.testing.assert_allclose(every(10 * np.arange(5)), each(np.arange(5)), rtol=1e-15)
    assert (every(np.arange(1, 10)) == 0.1).all()


def test_warmup_rises():
    values = schedule.warmup(schedule.cosine(1.0, 50), 10)(np.arange(60))
    assert (np.diff(values[:11]) > 0).all()
    assert (np.diff(values[10:]) < 0).all()


def test_the_unit_of_the_step_is_the_callers():
    """A schedule meant for epochs but called for each batch is over after as many batches."""
    epochs, batches = 50, 7
    per_epoch, per_batch = schedule.linear(0.9, 0.1, epochs), schedule.linear(0.9, 0.1, epochs * batches)
    steps = np.arange(epochs * batches)
    np.testing.assert_allclose(per_epoch(steps / batches), per_batch(steps), rtol=1e-14)
    assert per_epoch(epochs) == 0.1
    assert per_batch(epochs) > 0.78


@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_moves_momentum_against_the_learning_rate(three_phase):
    cycle = schedule.one_cycle(0.5, 100, three_phase=three_phase)
    lr, momentum = cycle.lr(np.arange(100)), cycle.momentum(np.arange(100))
    assert lr.argmax() == momentum.argmin() == 29
    assert (np.diff(lr) * np.diff(momentum) <= 0).all()
    np.testing.assert_allclose((lr[:30] - 0.02) / 0.48, (0.95 - momentum[:30]) / 0.1, rtol=0, atol=1e-12)


def test_scaling_and_warmup_are_two_things():
    curve = schedule.warmup(schedule.cosine(schedule.scale_lr(0.1, 1024, 256), 100), 10)
    assert (curve(0), curve(10), curve(110)) == (0.0, 0.4, 0.0)


# ---- what all have in common


@pytest.mark.parametrize("name", ALL)
def test_scalars_give_floats_and_arrays_give_arrays_of_their_shape(name):
    curve = ALL[name]
    steps = np.arange(60).reshape(3, 4, 5)
    values = curve(steps)
    assert values.shape == steps.shape
    assert values.dtype == np.float64
    for step in (0, 7, 59):
        for scalar in (step, float(step), np.int64(step), np.float32(step), np.array(step)):
            assert type(curve(scalar)) is float
            assert curve(scalar) == values.flat[step]
    np.testing.assert_array_equal(curve(steps.tolist()), values)
    np.testing.assert_array_equal(curve(steps.astype(np.float16)[:, ::-2]), values[:, ::-2])
    assert curve(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_is_a_value(name):
    curve = ALL[name]
    for twin in (
        copy.deepcopy(curve),
        pickle.loads(pickle.dumps(curve)),
        eval(repr(curve), vars(schedule).copy()),
    ):
        assert twin == curve
        assert twin is not curve
        assert hash(twin) == hash(curve)
        np.testing.assert_array_equal(twin(np.arange(30)), curve(np.arange(30)))
    assert curve != schedule.constant(123)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "step",
    [-1, -1e-9, math.nan, math.inf, [0, -1], np.array([1, math.nan]), "3", None, True, 1j, [[1], [1, 2]]],
)
def test_a_bad_step_is_refused(name, step):
    with pytest.raises(KilterError, match=r"^step: expected "):
        ALL[name](step)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1", None, True, [1.0]])
@pytest.mark.parametrize(("name", "argument"), sorted(NUMBERS))
def test_a_bad_number_is_refused_by_name(name, argument, bad):
    make, arguments = CURVES[name]
    with pytest.raises(KilterError, match=rf"^{argument}: expected .*got "):
        make(**arguments | {argument: bad})


@pytest.mark.parametrize("bad", [0, -1, -0.5])
@pytest.mark.parametrize(("name", "argument"), sorted(LENGTHS))
def test_a_length_or_factor_is_above_zero(name, argument, bad):
    make, arguments = CURVES[name]
    with pytest.raises(KilterError, match=rf"^{argument}: expected .*got {bad}"):
        make(**arguments | {argument: bad})


BAD_CALLS = {
    "milestones": lambda: schedule.multistep(1, [3, 3], 0.5),
    "milestones ": lambda: schedule.multistep(1, [math.nan], 0.5),
    "mult": lambda: schedule.cosine_restarts(1, 10, 0.5),
    "points": lambda: schedule.piecewise([]),
    "points ": lambda: schedule.piecewise([(3, 1.0), (2, 1.0)]),
    "points  ": lambda: schedule.piecewise([(3, 1.0, 2)]),
    "points   ": lambda: schedule.piecewise([(math.inf, 1.0)]),
    "points    ": lambda: schedule.piecewise([(0, math.nan)]),
    "points     ": lambda: schedule.piecewise(3),
    "anneal": lambda: schedule.piecewise([(0, 1.0)], anneal="cosine"),
    "mode": lambda: schedule.triangular(0, 1, 4, mode="triangle"),
    "gamma": lambda: schedule.triangular(0, 1, 4, gamma=0.9),
    "schedule": lambda: schedule.warmup(0.1, 5),
    "parts": lambda: schedule.join(),
    "parts ": lambda: schedule.join(schedule.constant(1)),
    "parts  ": lambda: schedule.join((0.1, 4)),
    "parts   ": lambda: schedule.join((schedule.constant(1), 0)),
    "parts    ": lambda: schedule.join((schedule.constant(1), 4), (schedule.constant(1), 4)),
    "parts     ": lambda: schedule.join((schedule.constant(1), math.inf), (schedule.constant(1), math.inf)),
    "parts      ": lambda: schedule.join((schedule.constant(1), math.nan)),
    "hold": lambda: schedule.hold_linear_hold(1, 0, 10, hold=0.6),
    "warm": lambda: schedule.one_cycle(1, 10, warm=1.0),
    "warm ": lambda: schedule.one_cycle(1, 10, warm=0.6, three_phase=True),
    "anneal ": lambda: schedule.one_cycle(1, 10, anneal="exp"),
    "momentum": lambda: schedule.one_cycle(1, 10, momentum=0.9),
    "momentum ": lambda: schedule.one_cycle(1, 10, momentum=(0.9, 0.8)),
    "momentum  ": lambda: schedule.one_cycle(1, 10, momentum=(0.9, 1.0)),
    "momentum   ": lambda: schedule.one_cycle(1, 10, momentum=(-0.1, 0.5)),
    "momentum    ": lambda: schedule.one_cycle(1, 10, momentum=(0.8, 0.9, 0.95)),
    "momentum     ": lambda: schedule.one_cycle(1, 10, momentum=("a", "b")),
    "start_div": lambda: schedule.one_cycle(1, 10, start_div=0),
    "end_div": lambda: schedule.one_cycle(1, 10, end_div=-1),
    "base_lr": lambda: schedule.scale_lr(0, 256, 128),
    "batch": lambda: schedule.scale_lr(0.1, math.nan, 128),
    "base_batch": lambda: schedule.scale_lr(0.1, 256, 0),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_other_bad_arguments_are_refused_by_name(name):
    with pytest.raises(KilterError, match=rf"^{name.strip()}: expected .*got "):
        BAD_CALLS[name]()


finite = st.floats(-1e6, 1e6)
length = st.floats(1e-3, 1e6)


@given(a=finite, b=finite, steps=length, parts=st.lists(st.floats(0, 2), min_size=1, max_size=20))
def test_a_way_from_a_to_b_is_exact_at_its_ends_and_never_leaves_them(a, b, steps, parts):
    s = np.sort(parts) * steps
    for curve in (
        schedule.linear(a, b, steps),
        schedule.cosine(a, steps, b),
        schedule.polynomial(a, b, steps, 1.7),
        schedule.piecewise([(0, a), (steps, b)], anneal="cos"),
    ):
        values = curve(s)
        slack = 1e-12 * max(abs(a), abs(b))
        assert (curve(0), curve(steps), curve(3 * steps)) == (a, b, b)
        assert (values >= min(a, b) - slack).all()
        assert (values <= max(a, b) + slack).all()
        assert all((y - x) * (b - a) >= -slack * abs(b - a) for x, y in pairwise(values))


@given(value=finite, steps=length, at=st.floats(0, 1e7))
def test_a_way_from_a_value_to_itself_is_that_value(value, steps, at):
    assert schedule.linear(value, value, steps)(at) == value
    assert schedule.cosine(value, steps, value)(at) == value
    assert schedule.warmup(schedule.constant(value), steps, start=value)(at) == value
