"""kilter.interop.sklearn: the optimizers behind scikit-learn's perceptrons, and the perceptrons with them."""

import copy
import pickle

import numpy as np
import pytest

from kilter import KilterError

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn import neural_network
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.neural_network import _stochastic_optimizers as theirs

from kilter.interop import sklearn as ours

SHAPES = ((4, 3), (3, 2), (3,), (2,))
OPTIONS = {
    "sgd": ("SGDOptimizer", {}),
    "no momentum": ("SGDOptimizer", {"momentum": 0.0}),
    "no nesterov": ("SGDOptimizer", {"nesterov": False, "momentum": 0.5}),
    "invscaling": ("SGDOptimizer", {"lr_schedule": "invscaling", "power_t": 0.3}),
    "adaptive": ("SGDOptimizer", {"lr_schedule": "adaptive", "learning_rate_init": 1e-4}),
    "adam": ("AdamOptimizer", {}),
    "adam with a large epsilon": ("AdamOptimizer", {"epsilon": 0.1, "beta_1": 0.5, "beta_2": 0.8}),
}
options = pytest.mark.parametrize("case", OPTIONS)


def parameters(dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype) for shape in SHAPES]


def gradients(step, dtype=np.float64):
    rng = np.random.default_rng(1 + step)
    return [rng.normal(size=shape).astype(dtype) for shape in SHAPES]


def make(module, case, params):
    name, chosen = OPTIONS[case]
    return getattr(module, name)(params, **chosen)


def walk(optimizer, params, steps, first=0):
    """Epochs of three steps; training gets stuck every fourth."""
    seen = []
    for step in range(first, first + steps):
        optimizer.update_params(params, gradients(step, params[0].dtype))
        if step % 3 == 2:
            optimizer.iteration_ends(32 * (step + 1))
        if step % 12 == 11:
            seen.append(optimizer.trigger_stopping("Stuck.", verbose=True))
        seen.append(optimizer.learning_rate)
    return seen


@options
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-13), (np.float32, 2e-6)])
def test_trajectories_are_those_of_scikit_learn(case, dtype, bound, capsys):
    got, want = parameters(dtype), parameters(dtype)
    mine, other = make(ours, case, got), make(theirs, case, want)
    rates = walk(mine, got, 60)
    printed = capsys.readouterr().out
    np.testing.assert_allclose(rates, walk(other, want, 60), rtol=1e-14)
    assert printed == capsys.readouterr().out != ""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, atol=bound)
    for name in ("velocities", "ms", "vs"):
        if hasattr(other, name):
            for a, b in zip(getattr(mine, name), getattr(other, name), strict=True):
                np.testing.assert_allclose(a, 0 * b if case == "no momentum" else b, atol=bound)
    assert getattr(mine, "t", None) == getattr(other, "t", None)


def test_constructors_have_the_arguments_of_scikit_learn():
    import inspect

    for name in ("SGDOptimizer", "AdamOptimizer"):
        mine, other = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
        assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in other.values()]


@options
def test_other_arrays_take_over(case):
    whole, first = parameters(), parameters()
    walk(make(ours, case, whole), whole, 30)
    optimizer = make(ours, case, first)
    walk(optimizer, first, 15)
    second = [p.copy() for p in first]
    walk(optimizer, second, 15, 15)
    for a, b in zip(second, whole, strict=True):
        np.testing.assert_array_equal(a, b)


@options
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(case, copied):
    params = parameters()
    optimizer = make(ours, case, params)
    walk(optimizer, params, 14)
    others, again = [p.copy() for p in params], copied(optimizer)
    walk(optimizer, params, 14, 14)
    walk(again, others, 14, 14)
    for a, b in zip(others, params, strict=True):
        np.testing.assert_array_equal(a, b)


DIGITS = load_digits(return_X_y=True)
DIABETES = load_diabetes(return_X_y=True)
DIGITS, DIABETES = ((x[:300] / abs(x).max(), y[:300]) for x, y in (DIGITS, DIABETES))


@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_estimators_find_the_same_weights(solver, dtype, early_stopping):
    chosen = {"solver": solver, "hidden_layer_sizes": (16,), "early_stopping": early_stopping, "random_state": 0}
    if solver == "sgd":
        chosen["learning_rate"] = "adaptive"
    for name, (x, y) in (("MLPClassifier", DIGITS), ("MLPRegressor", DIABETES)):
        rate = 1e-4 if name == "MLPRegressor" else 1e-2
        pair = [getattr(module, name)(**chosen, learning_rate_init=rate) for module in (ours, neural_network)]
        for model in pair:
            model.set_params(max_iter=8)
            with pytest.warns(UserWarning, match="Maximum iterations"):
                model.fit(x.astype(dtype), y)
        mine, other = pair
        assert type(mine._optimizer).__module__ == "kilter.interop.sklearn"
        assert mine.loss_ == pytest.approx(other.loss_, rel=1e-9 if dtype == np.float64 else 1e-4)
        for a, b in zip(mine.coefs_ + mine.intercepts_, other.coefs_ + other.intercepts_, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10 if dtype == np.float64 else 2e-4)


def test_estimators_are_estimators():
    x, y = DIGITS
    model = ours.MLPClassifier((8,), random_state=1, max_iter=3)
    assert clone(model).get_params() == model.get_params()
    assert set(model.get_params()) == set(neural_network.MLPClassifier().get_params())
    other = neural_network.MLPClassifier((8,), random_state=1, max_iter=3)
    for one in (model, other):
        for part in range(3):
            one.partial_fit(x[part * 100 : part * 100 + 100], y[part * 100 : part * 100 + 100], classes=range(10))
    again = pickle.loads(pickle.dumps(model))
    for one in (model, other, again):
        one.partial_fit(x, y)
    for mine in (model, again):
        for a, b in zip(mine.coefs_, other.coefs_, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    assert not hasattr(ours.MLPClassifier(solver="lbfgs", max_iter=500).fit(x, y), "_optimizer")


P = [np.ones(3)]
BAD = {
    "learning_rate_init": lambda: ours.SGDOptimizer(P, 0.0),
    "lr_schedule": lambda: ours.SGDOptimizer(P, lr_schedule="cosine"),
    "momentum": lambda: ours.SGDOptimizer(P, momentum=1.5),
    "power_t": lambda: ours.SGDOptimizer(P, power_t="half"),
    "betas": lambda: ours.AdamOptimizer(P, beta_1=1.0),
    "epsilon": lambda: ours.AdamOptimizer(P, epsilon=-1e-8),
    "params": lambda: ours.AdamOptimizer([np.ones((4, 6)).T]),
    "grads long": lambda: ours.AdamOptimizer(P).update_params(P, [np.ones(3)] * 2),
    "grads": lambda: ours.AdamOptimizer(P).update_params(P, [np.ones(2)]),
    "state": lambda: ours.AdamOptimizer(P).update_params([np.ones(2)], [np.ones(2)]),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    with pytest.raises(KilterError, match=rf"^{name.split()[0]}.*: expected .*got "):
        BAD[name]()
    assert (P[0] == 1).all()
