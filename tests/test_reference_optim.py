"""The optimizers' specification against published and worked numbers, those of forms that kilter does not offer too."""

import numpy as np
import pytest

import reference_optim as reference
from optimizers import HALVED, G


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"momentum": 0.9}, [0.95, 0.93, 0.812]),
        ({"momentum": 0.9, "lr_inside": True}, [0.95, 0.93, 0.812]),
        ({"momentum": 0.9, "lr": HALVED}, [0.95, 0.94, 0.9105]),
        ({"momentum": 0.9, "lr": HALVED, "lr_inside": True}, [0.95, 0.9175, 0.86325]),
        ({"momentum": 0.9, "nesterov": True}, [0.905, 0.912, 0.7058]),
        ({"momentum": 0.9, "dampening": 0.9}, [0.95, 0.9075, 0.85925]),
        ({"momentum": 0.9, "weight_decay": 0.1}, [0.94, 0.9016, 0.758024]),
    ],
)
def test_v9(options, expected):
    np.testing.assert_allclose(reference.sgd(1.0, G, **{"lr": 0.1, **options}), expected, atol=1e-12)


def test_unrolled_momentum(rng):
    """dW(t) = -eta sum_k alpha^k G(t - k)."""
    grads = rng.normal(size=30)
    path = np.array(reference.sgd(0.0, grads, 0.1, momentum=0.9, lr_inside=True))
    sums = [sum(0.9**k * grads[t - k] for k in range(t + 1)) for t in range(30)]
    np.testing.assert_allclose(np.diff(path, prepend=0), -0.1 * np.array(sums), rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("adagrad", {}, [0.900000000020, 0.944721359562, 0.857434203475]),
        (
            "adagrad",
            {"initial_accumulator_value": 0.1, "eps": 1e-7, "inside": True},
            [0.915484586601, 0.954409529091, 0.870268899687],
        ),
        ("rmsprop", {}, [0.000000200000, 0.449013374422, -0.425726216071]),
        ("rmsprop", {"alpha": 0.9}, [0.683772253983, 0.831214201442, 0.549356279304]),
        (
            "rmsprop",
            {"alpha": 0.9, "centered": True, "momentum": 0.9},
            [0.666666688889, 0.515145167800, 0.079903269898],
        ),
        ("rmsprop", {"alpha": 0.9, "inside": True}, [0.683772297229, 0.831214227742, 0.549356308854]),
        ("adadelta", {"lr": 1.0}, [0.996837785583, 0.998922872611, 0.994616156999]),
        ("adam", {}, [0.900000002000, 0.873366298708, 0.807555139677]),
        ("adam", {"eps_hat": True, "eps": 1e-7}, [0.900000632452, 0.873367079208, 0.807556100877]),
        ("adam", {"eps": 1e-3}, [0.900199600798, 0.873633115404, 0.807921273950]),
        ("adam", {"eps_hat": True, "eps": 1e-3}, [0.905948348715, 0.880741149959, 0.816698124149]),
        ("adam", {"bias_correction": False}, [0.683772433983, 0.570590131039, 0.244809490369]),
        ("adam", {"weight_decay": 0.1}, [0.900000001667, 0.854441367462, 0.781504399863]),
        ("adamw", {"weight_decay": 0.1}, [0.890000002000, 0.854466298688, 0.780110476670]),
        (
            "adamw",
            {"weight_decay": 0.1, "decay": "independent"},
            [0.800000002000, 0.693366298508, 0.558218509626],
        ),
        ("adamax", {}, [0.900000002000, 0.878926297137, 0.835383862148]),
        ("yogi", {}, [0.900396415528, 0.873881739183, 0.808208522834]),
        ("lion", {}, [0.9, 1.0, 0.9]),
    ],
)
def test_v10(rule, options, expected):
    path = getattr(reference, rule)(1.0, G, **{"lr": 0.1, **options})
    np.testing.assert_allclose(path, expected, atol=1e-12)


def test_lagged_adagrad_explodes_from_zero():
    literal = reference.adagrad(1.0, G, 0.1, eps=1e-8, lagged=True)
    np.testing.assert_allclose(literal, [-4999999.0, -4999998.95, -4999999.128885436], rtol=1e-15)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.894354824277, 0.935465796161, 0.835655586074]),
        ({"momentum_decay": 1.0, "eps": 1e-7}, [0.893721240925, 0.932980757020, 0.838192615646]),
        ({"plain": True}, [0.852631581895, 0.869117942512, 0.766671328690]),
    ],
    ids=["torch", "keras", "optax"],
)
def test_three_nadams(options, expected):
    # torch keeps its product in float32
    np.testing.assert_allclose(reference.nadam(1.0, G, 0.1, **options), expected, atol=1e-8)


@pytest.mark.parametrize(
    ("amsgrad", "expected"),
    [
        (True, [0.900000002000, 0.873366298708, 0.807555139677]),
        ("corrected", [0.900000002000, 0.878947370842, 0.813136211811]),
    ],
    ids=["torch", "optax"],
)
def test_two_amsgrads(amsgrad, expected):
    np.testing.assert_allclose(reference.adam(1.0, G, 0.1, amsgrad=amsgrad), expected, atol=1e-12)


@pytest.mark.parametrize("first", [1, 2, 3], ids=["own steps", "flower", "joined at a group's third"])
def test_exponents_of_the_first_step(first):
    g, b1, b2 = 0.5, 0.9, 0.999
    path = reference.adam(1.0, G, 0.1, first=first)
    m, v = (1 - b1) * g / (1 - b1**first), (1 - b2) * g**2 / (1 - b2**first)
    np.testing.assert_allclose(path[0], 1 - 0.1 * m / (np.sqrt(v) + 1e-8), rtol=1e-14)
    # The forms differ at first, and agree in the end.
    long = [reference.adam(1.0, [0.5] * 12000, 1e-6, first=k) for k in (1, first)]
    assert first == 1 or abs(path[0] - 0.9) > 1e-2
    np.testing.assert_allclose(*(np.diff(one[-2:]) for one in long), rtol=1e-5)


def test_bias_without_correction():
    """RMSprop starts from zero: its first step is 1 / sqrt(1 - alpha) times too long."""
    (p,) = reference.rmsprop(0.0, [1.0], 1.0, alpha=0.99, eps=0.0)
    np.testing.assert_allclose(p, -10)
    (p,) = reference.adam(0.0, [1.0], 1.0, eps=0.0)
    np.testing.assert_allclose(p, -1)


FOUR = [*G, 0.5]


@pytest.mark.parametrize(
    ("always", "expected"),
    [
        (True, [0.853614993343, 0.934372276043, 0.799532305369, 0.720475365115]),
        (False, [0.900000002000, 0.967419986428, 0.832580015754, 0.753523075499]),
    ],
)
def test_v11_rmsprop(always, expected):
    path = reference.rmsprop(1.0, FOUR, 0.1, alpha=0.8, window=3, always=always)
    np.testing.assert_allclose(path, expected, atol=1e-12)


def test_v11_adadelta():
    path = reference.adadelta(1.0, FOUR, 1.0, rho=0.8, eps=1e-6, window=3)
    np.testing.assert_allclose(path, [0.999000002000, 0.999953460169, 0.998055226687, 0.996809162069], atol=1e-12)
    assert reference.adadelta(1.0, FOUR, 1.0, rho=0.8, eps=1e-8, window=3, literal=True) == [1.0] * 4


def test_skipped_steps_advance_schedules_only():
    lrs = [0.1, 0.2, 0.3, 0.4].__getitem__
    kept = [0.1, 0.2, 0.4].__getitem__
    for name in ("sgd", "adam", "adagrad", "rmsprop", "adadelta", "adamax", "nadam", "lion", "newton"):
        rule = getattr(reference, name)
        assert rule(1.0, [0.5, 1.0, None, -2.0], lrs)[-1] == rule(1.0, [0.5, 1.0, -2.0], kept)[-1]
