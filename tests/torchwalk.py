"""Optimizers of kilter.interop.torch and of torch.optim over the same parameters and gradients."""

import pytest
import torch

from kilter.interop import torch as ours

RULES = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop momentum": ("RMSprop", {"lr": 0.01, "momentum": 0.9}),
    "rmsprop centered": ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "alpha": 0.9}),
    "adadelta": ("Adadelta", {"weight_decay": 0.1}),
    "adam": ("Adam", {"lr": 0.1, "weight_decay": 0.1}),
    "amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True, "betas": (0.8, 0.9)}),
    "adamw": ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
    "adamax": ("Adamax", {"lr": 0.1}),
    "nadam": ("NAdam", {"lr": 0.1, "weight_decay": 0.1}),
    "maximize": ("AdamW", {"lr": 0.1, "maximize": True}),
}
rules = pytest.mark.parametrize("rule", RULES)
SHAPES = ((5, 3), (), (7,), (0, 2))


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES)
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def gradients(step, dtype=torch.float64):
    return [p.detach().to(dtype) for p in parameters(seed=step + 1)]


def optimizer(rule, params, **options):
    name, defaults = RULES[rule]
    return getattr(ours, name)(params, **{**defaults, **options})


def reference(rule, params, **options):
    name, defaults = RULES[rule]
    return getattr(torch.optim, name)(params, **{**defaults, **options})


def walk(optimizer, steps, first=0, after=lambda: None):
    """Steps with given gradients, then an lr scheduler or the like."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
        after()
    return [p.detach().clone() for p in params]


def assert_close(got, want, bound=1e-12):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= bound if a.numel() else True


def assert_same(got, want):
    """Two state dicts, or lists of tensors."""
    if isinstance(got, torch.Tensor):
        assert got.dtype == want.dtype and torch.equal(got, want)
    elif isinstance(got, dict):
        assert got.keys() == want.keys()
        for key in got:
            assert_same(got[key], want[key])
    elif isinstance(got, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    else:
        assert got == want


BOUND = {"nadam": 3e-7}  # whose product of the mu is float32 in PyTorch
