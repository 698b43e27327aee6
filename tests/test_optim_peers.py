"""kilter.optim takes the steps of PyTorch, optax and the ONNX reference evaluator, where these are installed."""

import numpy as np
import pytest

from kilter.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, RMSprop
from support import FLOAT64
from test_onnx import evaluate

STEPS = 40


def trajectory(rng, kind, lr, options):
    """The start, the gradients, and kilter's parameters after each step; one gradient is zero in places."""
    start, grads = rng.normal(size=17), rng.normal(size=(STEPS, 17))
    grads[20, ::2] = 0
    p, path = start.copy(), []
    opt = kind([p], lr, **options)
    for g in grads:
        opt.step([g])
        path.append(p.copy())
    return start, grads, np.array(path)


TORCH = [  # class of the same name there, options of the same name
    (SGD, {}),
    (SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (Adagrad, {}),
    (Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
    (RMSprop, {}),
    (RMSprop, {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    (RMSprop, {"centered": True}),
    (RMSprop, {"centered": True, "momentum": 0.9}),
    (Adadelta, {}),
    (Adadelta, {"rho": 0.8, "eps": 1e-3, "weight_decay": 0.1}),
    (Adam, {}),
    (Adam, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    (Adam, {"amsgrad": True}),
    (AdamW, {}),
    (AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    (Adamax, {}),
    (Adamax, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    (NAdam, {}),
    (NAdam, {"momentum_decay": 0.5, "weight_decay": 0.1, "eps": 1e-3}),
]


def named(value):
    return value.__name__ if isinstance(value, type) else "-".join(value) or "default"


@pytest.mark.parametrize("lr", [None, 0.05])
@pytest.mark.parametrize(("kind", "options"), TORCH, ids=named)
def test_torch(rng, kind, options, lr):
    """Defaults too: with no lr given, both take their own."""
    torch = pytest.importorskip("torch")
    given = () if lr is None else (lr,)
    start, grads = rng.normal(size=17), rng.normal(size=(STEPS, 17))
    grads[20, ::2] = 0
    p, tensor = start.copy(), torch.tensor(start, requires_grad=True)
    opt, other = kind([p], *given, **options), getattr(torch.optim, kind.__name__)([tensor], *given, **options)
    for g in grads:
        opt.step([g])
        tensor.grad = torch.tensor(g)
        other.step()
        # torch keeps the product of NAdam in float32
        tolerance = 1e-7 if kind is NAdam else 1e-11
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=tolerance, atol=tolerance)


OPTAX = [  # kilter's class and options, the name and the options there
    (SGD, {"momentum": 0.9}, "sgd", {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True}, "sgd", {"momentum": 0.9, "nesterov": True}),
    (RMSprop, {"alpha": 0.9}, "rmsprop", {"eps_in_sqrt": False}),
    (RMSprop, {"alpha": 0.9, "momentum": 0.5}, "rmsprop", {"eps_in_sqrt": False, "momentum": 0.5}),
    (Adadelta, {}, "adadelta", {}),
    (Adam, {}, "adam", {}),
    (AdamW, {"weight_decay": 0.1}, "adamw", {"weight_decay": 0.1}),
    (Adamax, {}, "adamax", {}),
    (Lion, {"weight_decay": 0.1}, "lion", {"weight_decay": 0.1}),
]


@pytest.mark.parametrize(("kind", "options", "name", "theirs"), OPTAX, ids=named)
def test_optax(rng, kind, options, name, theirs):
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    start, grads, path = trajectory(rng, kind, 0.05, options)
    with jax.enable_x64(True):
        rule = getattr(optax, name)(0.05, **theirs)
        p = jax.numpy.asarray(start)
        state = rule.init(p)
        for g, want in zip(grads, path, strict=True):
            updates, state = rule.update(jax.numpy.asarray(g), state, p)
            p = optax.apply_updates(p, updates)
            assert p.dtype == FLOAT64
            np.testing.assert_allclose(np.asarray(p), want, rtol=1e-11, atol=1e-11)


ONNX = [  # attributes are float32 there: numbers that float32 holds exactly
    (
        Adam,
        {"betas": (0.875, 0.96875), "eps": 0.0, "weight_decay": 0.125},
        {"alpha": 0.875, "beta": 0.96875, "epsilon": 0.0, "norm_coefficient": 0.125, "norm_coefficient_post": 0.0},
        ("m", "v"),
    ),
    (
        Adagrad,
        {"lr_decay": 0.125, "eps": 2.0**-10, "weight_decay": 0.125},
        {"decay_factor": 0.125, "epsilon": 2.0**-10, "norm_coefficient": 0.125},
        ("sum",),
    ),
    (
        SGD,
        {"momentum": 0.875, "dampening": 0.25, "weight_decay": 0.125},
        {"alpha": 0.875, "beta": 0.75, "norm_coefficient": 0.125, "mode": "standard"},
        ("velocity",),
    ),
    (
        SGD,
        {"momentum": 0.875, "nesterov": True},
        {"alpha": 0.875, "beta": 1.0, "norm_coefficient": 0.0, "mode": "nesterov"},
        ("velocity",),
    ),
]


@pytest.mark.parametrize(("kind", "options", "attributes", "slots"), ONNX, ids=named)
def test_onnx(rng, kind, options, attributes, slots):
    start, grads, path = trajectory(rng, kind, 0.0625, options)
    op = "Momentum" if kind is SGD else kind.__name__
    x, state = start, [np.zeros(17) for _ in slots]
    for t, (g, want) in enumerate(zip(grads, path, strict=True)):
        # Adam's steps count from 1, those of the others from 0.
        now = np.array(t + (kind is Adam), np.int64)
        inputs = [np.array(0.0625), now, x, g, *state]
        x, *state = evaluate(op, inputs, 1 + len(slots), opset=1, domain="ai.onnx.preview.training", **attributes)
        np.testing.assert_allclose(x, want, rtol=1e-12, atol=1e-12)
