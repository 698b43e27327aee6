"""kilter.stats: moments, their merge, and running statistics."""

import numpy as np
import pytest

import reference
from kilter import KilterError, schedule
from kilter.norm import batch_norm
from kilter.stats import RunningStats, merge, moments
from support import DTYPES, FLOAT32, FLOAT64, copied, plain, refused, relative_error, same_bits


def quiet(*args, **options):
    """RunningStats with a momentum above 0.5, which warns once."""
    with pytest.warns(UserWarning, match="momentum") as record:
        running = RunningStats(*args, **options)
    assert len(record) == 1
    return running


def column(*values):
    return np.array(values, np.float64).reshape(-1, 1)


def assert_moments(backend, got, want, bound=1e-13):
    for a, b in zip(got, want, strict=True):
        a, b = backend.numpy(a), backend.numpy(b)
        a = np.broadcast_to(a, np.shape(b))
        assert a.dtype == FLOAT64
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


# --------------------------------------------------------------------------- moments and merge


@pytest.mark.parametrize("weighted", [None, "sample", "position"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(backend, rng, dtype, axis, weighted):
    x = rng.normal(1, 2, (9, 4, 5, 4)).astype(dtype)
    shape = {None: None, "sample": (9,), "position": tuple(np.delete(x.shape, axis))}[weighted]
    weights = None if shape is None else rng.integers(0, 3, shape).astype(np.float64)
    got = moments(backend.array(x), axis, None if weights is None else backend.array(weights))
    assert got._fields == ("count", "mean", "m2")
    assert_moments(backend, got, reference.moments(x, axis, weights), 1e-13 if dtype == FLOAT64 else 1e-6)


def test_mask_is_the_subset(backend, rng):
    x, mask = rng.normal(size=(50, 3)), rng.random(50) < 0.5
    masked = moments(backend.array(x), weights=backend.array(mask.astype(float)))
    assert_moments(backend, masked, moments(backend.array(x[mask])))


def test_moments_of_one_and_of_none(backend):
    count, mean, m2 = map(backend.numpy, moments(backend.array(np.full((1, 2), 7.0))))
    assert count == 1 and (mean == 7).all() and (m2 == 0).all()
    for shape in ((0, 2), (0, 2, 3), (3, 2, 0)):
        count, mean, m2 = map(backend.numpy, moments(backend.array(np.empty(shape))))
        assert count == 0 and (m2 == 0).all() and mean.shape == m2.shape == (2,)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=str)
def test_merge_is_the_whole(backend, rng, dtype):
    x = rng.normal(5, 1, (1000, 3)).astype(dtype)
    parts = [moments(backend.array(p)) for p in np.split(x, [1, 1, 17, 500])]  # of 1, 0, 16, 483 and 500 rows
    whole, tight = moments(backend.array(x)), 1e-13 if dtype == FLOAT64 else 1e-6
    assert_moments(backend, merge(*parts), whole, tight)
    assert_moments(backend, merge(*parts[::-1]), whole, tight)
    assert_moments(backend, merge(merge(*parts[:2]), merge(*parts[2:])), whole, tight)
    assert_moments(backend, merge(parts[3]), parts[3])


def test_merge_of_far_means(backend, rng):
    data = [rng.normal(m, 1e-3, (n, 2)) for m, n in ((1e6, 10), (-1e6, 3), (0, 100))]
    want = reference.merge(*map(reference.moments, data))
    assert_moments(backend, merge(*(moments(backend.array(x)) for x in data)), want)


def test_parts_without_values_change_nothing(backend):
    """Not even where the other part's mean or its square is past the largest number."""
    none = moments(backend.array(np.empty((0, 4))))
    wide = np.array([[1e200, np.inf, np.nan, 3.0], [1e200, 1.0, 2.0, 4.0]])
    for part in (moments(backend.array(wide)), none):
        for parts in ((part, none), (none, part), (none, none, part, none)):
            for got, want in zip(merge(*parts), part, strict=True):
                assert same_bits(backend.numpy(got), backend.numpy(want))


def test_v8_ranks_with_unequal_and_zero_counts(backend):
    parts = [moments(backend.array(column(*values))) for values in ((1, 3), (2, 4, 6), (10,))]
    none = moments(backend.array(np.empty((0, 1))))
    for ranks in (parts, [*parts, none], [none, *parts]):
        count, mean, m2 = merge(*ranks)
        assert backend.numpy(count) == 6
        got = np.ravel([backend.numpy(a) for a in (mean, m2 / 6, m2 / 5)])
        np.testing.assert_allclose(got, [13 / 3, 80 / 9, 32 / 3], rtol=1e-14)
        for unbiased, var in ((False, 1.788888888889), (True, 1.966666666667)):
            running = RunningStats(1, unbiased=unbiased, dtype="float64", xp=backend.xp)
            running.update(mean, m2 / 6, 6)
            np.testing.assert_allclose(backend.numpy(running.var), var, atol=1e-12)


def test_v5_population_with_unequal_batches():
    _, mean, m2 = merge(moments(column(1, 2, 3)), moments(column(10)))
    np.testing.assert_allclose([mean[0], m2[0] / 4], [4, 12.5], rtol=1e-15)


# --------------------------------------------------------------------------- running statistics

BATCHES = [column(m - 1, m + 1) for m in (5, 6, 7)]  # biased variance 1, unbiased 2


BOTH = ((quiet, 0.9), (RunningStats, 0.1))


def means_and_variance(backend, running):
    path = []
    for x in BATCHES:
        batch_norm(backend.array(x), running=running)
        path.append(float(running.mean[0]))
    return path, float(running.var[0])


@pytest.mark.parametrize(
    ("momentum", "means", "var"),
    [(0.9, [4.5, 5.85, 6.885], 1.999), (0.1, [0.5, 1.05, 1.645], 1.271), (None, [5, 5.5, 6], 2.0)],
)
def test_v3_v4(backend, momentum, means, var):
    make = quiet if momentum == 0.9 else RunningStats
    for unbiased, expected in ((True, var), (False, 1.0)):
        running = make(1, momentum=momentum, unbiased=unbiased, dtype="float64", xp=backend.xp)
        got, last = means_and_variance(backend, running)
        np.testing.assert_allclose(got, means, atol=1e-12)
        np.testing.assert_allclose(last, expected, atol=1e-12)


def test_v3_weights_decay_geometrically():
    """What is left of each batch, newest first: a (1 - a)^k."""
    running = quiet(3, momentum=0.9, dtype="float64")
    for batch in np.eye(3)[::-1]:  # the newest batch moves feature 0
        running.update(batch, np.ones(3), 2)
    np.testing.assert_allclose(running.mean, [0.9, 0.09, 0.009], rtol=1e-14)


@pytest.mark.parametrize(
    ("momentum", "steps", "expected"),
    [
        (schedule.linear(0.9, 0.1, 50), (0, 10, 25, 49, 50, 60), (0.9, 0.74, 0.5, 0.116, 0.1, 0.1)),
        (lambda step: max(0.9 - step / 50, 0.1), (0, 1, 10, 25, 39, 40, 49), (0.9, 0.88, 0.7, 0.4, 0.12, 0.1, 0.1)),
        (schedule.exponential(0.9, 0.95), (0, 1, 5, 10, 20), (0.9, 0.855, 0.6964028437, 0.5388632453, 0.3226373302)),
    ],
    ids=["linear", "program", "exponential"],
)
def test_v7_scheduled_momentum(momentum, steps, expected):
    """The clock is the number of updates, which are batches; a fall of momentum lengthens the average."""
    running, want = RunningStats(1, momentum=momentum, dtype="float64"), 0.0
    for step in range(max(steps) + 1):
        if step in steps:
            assert running.weight(2) == pytest.approx(expected[steps.index(step)], abs=5e-11)
        want = (1 - momentum(step)) * want + momentum(step) * step
        running.update(np.array([float(step)]), np.ones(1), 2)
        np.testing.assert_allclose(running.mean, want, rtol=1e-13)


@pytest.mark.parametrize(("momentum", "noise"), [(0.9, 0.22613), (0.1, 0.05735)])
def test_v19_noise_of_the_running_mean(rng, momentum, noise):
    """sqrt(a / (2 - a)) sigma / sqrt(batch) once the start is forgotten: the spread over 40,000 runs."""
    running = (quiet if momentum == 0.9 else RunningStats)(40_000, momentum=momentum)
    for _ in range(60):
        running.update(rng.normal(0, 1 / np.sqrt(16), 40_000).astype(FLOAT32), np.ones(40_000, FLOAT32), 16)
    assert running.mean.std() == pytest.approx(noise, rel=0.02)
    assert np.sqrt(momentum / (2 - momentum)) / 4 == pytest.approx(noise, abs=2e-5)


def test_v5_three_modes_for_inference():
    """{1, 2, 3} and {10}: the population, the average weighted by count, and the moving average."""
    batches = [column(1, 2, 3), column(10)]
    parts = [moments(x) for x in batches]
    _, mean, m2 = merge(*parts)
    cumulative, moving = (RunningStats(1, momentum=m, unbiased=False, dtype="float64") for m in (None, 0.5))
    for count, batch_mean, batch_m2 in parts:
        for running in (cumulative, moving):
            running.update(batch_mean, batch_m2 / count, count)
    np.testing.assert_allclose([mean[0], m2[0] / 4], [4, 12.5], rtol=1e-14)
    np.testing.assert_allclose([cumulative.mean[0], cumulative.var[0]], [4, 0.5], rtol=1e-14)
    np.testing.assert_allclose([moving.mean[0], moving.var[0]], [5.5, (1 / 2 + 1 / 3) / 2], rtol=1e-14)


def test_v4_cumulative_against_pooled():
    batches = [column(4, 6), column(6, 8), column(8, 10)]
    running = RunningStats(1, momentum=None, dtype="float64")
    for x in batches:
        batch_norm(x, running=running)
    _, _, m2 = merge(*(moments(x) for x in batches))
    np.testing.assert_allclose([running.var[0], m2[0] / 5, m2[0] / 6], [2.0, 4.4, 22 / 6], rtol=1e-14)


def test_cumulative_is_weighted_by_count():
    running = RunningStats(1, momentum=None, dtype="float64")
    for mean, n in ((5, 8), (8, 2)):
        running.update(np.array([float(mean)]), np.array([1.0]), n)
    np.testing.assert_allclose(running.mean, 5.6, rtol=1e-15)
    assert running.count == 10


def test_random_updates_follow_the_reference(backend, rng):
    batches = [(rng.normal(size=4), rng.random(4), n) for n in (2, 7, 100, 3)]
    for momentum in (0.3, None, lambda step: 0.5 * 0.9**step):
        for unbiased in (True, False):
            running = RunningStats(4, momentum=momentum, unbiased=unbiased, dtype="float64", xp=backend.xp)
            for batch_mean, batch_var, n in batches:
                running.update(backend.array(batch_mean), backend.array(batch_var), n)
            mean, var = reference.running(batches, momentum=momentum, unbiased=unbiased)
            np.testing.assert_allclose(backend.numpy(running.mean), mean, rtol=1e-13)
            np.testing.assert_allclose(backend.numpy(running.var), var, rtol=1e-13)


def test_schedule_sees_the_steps_and_acts_on_batch_norm(backend):
    steps = []

    def momentum(step):
        steps.append(step)
        return 0.1 if step < 2 else 0.5

    running = RunningStats(1, momentum=momentum, dtype="float64", xp=backend.xp)
    means, _ = means_and_variance(backend, running)
    assert sorted(set(steps)) == [0, 1, 2]
    np.testing.assert_allclose(means, [0.5, 1.05, 4.025], rtol=1e-14)


def test_same_number_opposite_convention(backend):
    """0.9 for the old value is 0.1 here: the warning says so, and the two differ by far."""
    for given, meant in ((0.9, "momentum=0.1"), (0.99, "momentum=0.01")):
        with pytest.warns(UserWarning, match=meant):
            RunningStats(1, momentum=given)
    RunningStats(1, momentum=0.5)  # warnings are errors here
    pair = [make(1, momentum=m, dtype="float64", xp=backend.xp) for make, m in BOTH]
    ends = [means_and_variance(backend, running)[0][-1] for running in pair]
    np.testing.assert_allclose(ends, [6.885, 1.645], atol=1e-12)


def test_start_reset_and_writable_arrays(backend):
    running = RunningStats(3, xp=backend.xp)
    assert running.mean.dtype == running.var.dtype == FLOAT32 and running.count == 0
    assert (running.mean == 0).all() and (running.var == 1).all()
    running.update(backend.array(np.ones(3)), backend.array(np.full(3, 4.0)), 2)
    np.testing.assert_allclose(backend.numpy(running.var), 0.9 + 0.1 * 8, rtol=1e-6)
    running.mean[1] = 8
    assert running.mean[1] == 8
    mean, var = running.mean, running.var
    running.reset()
    assert (running.mean == 0).all() and (running.var == 1).all() and running.count == 0
    assert running.mean is mean and running.var is var


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics_of_data(backend, rng, dtype):
    x = rng.normal(1, 2, (10, 4, 9)).astype(dtype)
    running = RunningStats(4, dtype="float64" if dtype == FLOAT64 else "float32", xp=backend.xp)
    mean, var = running.mean, running.var
    batch_norm(backend.array(x), running=running)
    m = reference.moments(x)
    want = reference.running([(m.mean, m.m2 / 90, 90)])
    assert running.mean is mean and running.var is var, "updated in place"
    for got, expected in zip((mean, var), want, strict=True):
        assert relative_error(backend.numpy(got), expected) < (1e-13 if dtype == FLOAT64 else 1e-6)


def test_functional_use_leaves_no_trace(backend, rng):
    x = rng.normal(size=(10, 2))
    _, cache = batch_norm(backend.array(x), running=None)
    assert_moments(backend, cache.moments, reference.moments(x))


# --------------------------------------------------------------------------- state


@pytest.mark.parametrize("momentum", [0.1, None, lambda step: 1 / (step + 2)], ids=["0.1", "None", "schedule"])
def test_state_round_trip(backend, rng, momentum):
    batches = [(*map(backend.array, rng.random((2, 3))), n) for n in (4, 6, 8, 2)]
    whole, first, second = (RunningStats(3, momentum=momentum, xp=backend.xp) for _ in range(3))
    for batch in batches:
        whole.update(*batch)
    for batch in batches[:2]:
        first.update(*batch)
    mean = second.mean
    second.load_state_dict(copied(first.state_dict()))
    assert second.mean is mean, "loaded in place"
    for batch in batches[2:]:
        second.update(*batch)
    assert plain(second.state_dict()) == plain(whole.state_dict())


def test_state_is_checked():
    running = RunningStats(3)
    running.update(np.ones(3), np.ones(3), 5)
    good = copied(running.state_dict())
    assert all(isinstance(v, np.ndarray | int | float | str) for v in good.values())
    bad = [
        RunningStats(4).state_dict(),
        {k: v for k, v in good.items() if k != "mean"},
        {**good, "extra": 1},
        {**good, "var": "one"},
        None,
    ]
    for state in bad:
        with refused("", running):
            running.load_state_dict(state)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("features", (-1,), {}),
        ("features", (2.5,), {}),
        ("momentum", (3,), {"momentum": -0.1}),
        ("momentum", (3,), {"momentum": 1.1}),
        ("momentum", (3,), {"momentum": float("nan")}),
        ("momentum", (3,), {"momentum": "0.1"}),
        ("dtype", (3,), {"dtype": "int32"}),
        ("dtype", (3,), {"dtype": "float16"}),
    ],
)
def test_construction_is_checked(name, args, options):
    with pytest.raises(KilterError, match=name):
        RunningStats(*args, **options)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mean", (np.ones(2), np.ones(3), 5)),
        ("mean", ([1.0, 1.0, 1.0], np.ones(3), 5)),
        ("var", (np.ones(3), np.ones((3, 1)), 5)),
        ("var", (np.ones(3), np.ones(3, np.complex64), 5)),
        ("n", (np.ones(3), np.ones(3), -1)),
        ("n", (np.ones(3), np.ones(3), float("nan"))),
        ("n", (np.ones(3), np.ones(3), 1)),  # n/(n-1) has no value
        ("n", (np.ones(3), np.ones(3), float("inf"))),
    ],
)
def test_update_is_checked(name, args):
    running = RunningStats(3)
    with refused(rf"\b{name}\b", running, running.mean, running.var):
        running.update(*args)
    assert running.count == 0


def test_a_schedule_that_fails_changes_nothing():
    x = np.arange(12.0).reshape(4, 3)
    out = np.zeros_like(x)
    for value in (float("nan"), 1.5, -0.5, "x"):
        running = RunningStats(3, momentum=lambda step, value=value: value, dtype="float64")
        with refused("momentum", out, running):
            batch_norm(x, running=running, out=out)


def test_moments_and_merge_are_checked():
    for x in ([1.0], np.ones((3, 2), int), np.ones((3, 2), complex), np.float64(1.0), np.array(1.0), None):
        with pytest.raises(KilterError, match=r"\bx\b"):
            moments(x)
    with pytest.raises(KilterError, match="axis"):
        moments(np.ones((3, 2)), 5)
    with pytest.raises(KilterError, match="weights"):
        moments(np.ones((3, 2)), 1, np.ones(2))
    with pytest.raises(KilterError):
        merge()
    with pytest.raises(KilterError):
        merge(moments(np.ones((3, 2))), moments(np.ones((3, 4))))
    with pytest.raises(KilterError):
        merge(moments(np.ones((3, 2))), "moments")
    assert same_bits(moments(np.ones((3, 2))).mean, np.ones(2))
