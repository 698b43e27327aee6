"""The table of optimizers that tests go through: every rule with every kind of state, and its reference."""

import numpy as np
import pytest

import reference_optim as reference
from kilter._backend import host
from kilter.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, DiagonalNewton, Lion, NAdam, RMSprop


def mapped(function, tree):
    """The structure with `function` of each array."""
    if isinstance(tree, dict):
        return {key: mapped(function, value) for key, value in tree.items()}
    return [mapped(function, one) for one in tree] if isinstance(tree, (list, tuple)) else function(tree)


def on(backend, tree):
    """The structure with copies of its arrays on a backend."""
    return mapped(lambda a: backend.array(a.copy()), tree)


def read(backend, tree):
    """The structure with NumPy arrays."""
    return mapped(backend.numpy, tree)


def fewer(backend, many, few):
    """How much of a table is gone through: all of it where a step takes microseconds."""
    return many if backend.xp is np else few


class Newton(DiagonalNewton):
    """With a curvature of 2 at every step, so that it can be called as the others are."""

    def step(self, grads, *, scaler=None):
        def two(g):
            if isinstance(g, np.ndarray):
                g = g.copy()
                g[...] = 2
            return g

        return super().step(grads, mapped(two, grads), scaler=scaler)


RULES = {  # name: class, its options, the reference with the same options
    "sgd": (SGD, {}, reference.sgd),
    "sgd decay": (SGD, {"weight_decay": 0.1}, reference.sgd),
    "sgd momentum": (SGD, {"momentum": 0.9}, reference.sgd),
    "sgd momentum inside": (SGD, {"momentum": 0.9, "lr_inside": True}, reference.sgd),
    "sgd dampening": (SGD, {"momentum": 0.9, "dampening": 0.9, "weight_decay": 0.1}, reference.sgd),
    "sgd nesterov": (SGD, {"momentum": 0.9, "nesterov": True}, reference.sgd),
    "sgd nesterov inside": (SGD, {"momentum": 0.9, "nesterov": True, "lr_inside": True}, reference.sgd),
    "sgd maximize": (SGD, {"momentum": 0.9, "weight_decay": 0.1, "maximize": True}, reference.sgd),
    "adagrad": (Adagrad, {}, reference.adagrad),
    "adagrad decay": (Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3}, reference.adagrad),
    "adagrad start": (Adagrad, {"initial_accumulator_value": 0.1, "maximize": True}, reference.adagrad),
    "adagrad lagged": (Adagrad, {"initial_accumulator_value": 0.1, "lagged": True}, reference.adagrad),
    "rmsprop": (RMSprop, {}, reference.rmsprop),
    "rmsprop decay": (RMSprop, {"alpha": 0.9, "weight_decay": 0.1, "eps": 1e-3}, reference.rmsprop),
    "rmsprop momentum": (RMSprop, {"momentum": 0.9, "maximize": True}, reference.rmsprop),
    "rmsprop centered": (RMSprop, {"centered": True, "alpha": 0.9}, reference.rmsprop),
    "rmsprop centered momentum": (RMSprop, {"centered": True, "momentum": 0.5}, reference.rmsprop),
    "rmsprop window": (RMSprop, {"window": 5, "alpha": 0.8, "weight_decay": 0.1}, reference.rmsprop),
    "rmsprop window of one": (RMSprop, {"window": 1, "alpha": 0.8}, reference.rmsprop),
    "rmsprop window momentum": (RMSprop, {"window": 3, "alpha": 0.8, "momentum": 0.9}, reference.rmsprop),
    "adadelta": (Adadelta, {}, reference.adadelta),
    "adadelta decay": (Adadelta, {"rho": 0.8, "weight_decay": 0.1, "maximize": True}, reference.adadelta),
    "adadelta window": (Adadelta, {"window": 4, "weight_decay": 0.1}, reference.adadelta),
    "adadelta window of one": (Adadelta, {"window": 1}, reference.adadelta),
    "adadelta window of two": (Adadelta, {"window": 2}, reference.adadelta),
    "adam": (Adam, {}, reference.adam),
    "adam eps": (Adam, {"eps": 1e-3, "betas": (0.8, 0.95)}, reference.adam),
    "adam decay": (Adam, {"weight_decay": 0.1}, reference.adam),
    "adam amsgrad": (Adam, {"amsgrad": True}, reference.adam),
    "adam maximize": (Adam, {"maximize": True}, reference.adam),
    "adamw": (AdamW, {"weight_decay": 0.1}, reference.adamw),
    "adamw amsgrad": (AdamW, {"weight_decay": 0.1, "amsgrad": True}, reference.adamw),
    "adamw independent": (AdamW, {"weight_decay": 1e-3, "decay": "independent"}, reference.adamw),
    "adamax": (Adamax, {}, reference.adamax),
    "adamax decay": (Adamax, {"betas": (0.8, 0.95), "weight_decay": 0.1, "maximize": True}, reference.adamax),
    "nadam": (NAdam, {}, reference.nadam),
    "nadam decay": (NAdam, {"momentum_decay": 1.0, "weight_decay": 0.1}, reference.nadam),
    "lion": (Lion, {}, reference.lion),
    "lion decay": (Lion, {"betas": (0.95, 0.98), "weight_decay": 0.1, "maximize": True}, reference.lion),
    "newton": (Newton, {}, reference.newton),
    "newton clip": (Newton, {"damping": 0.5, "clip": 0.3, "maximize": True}, reference.newton),
}
rules = pytest.mark.parametrize("rule", RULES)

KINDS = {kind.__name__: kind for kind in (SGD, Adagrad, RMSprop, Adadelta, Adam, AdamW, Adamax, NAdam, Lion, Newton)}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

G = [0.5, -0.25, 1.0]
HALVED = [0.1, 0.05, 0.025].__getitem__


def walk(kind, p, grads, **options):
    """The parameter after each step."""
    path, opt = [], kind([p], **options)
    for g in grads:
        opt.step([g])
        path.append(host(p).astype(np.float64))
    return np.array(path)
