"""Schedules: pure functions of the step, for learning rates, momentum and weight decay.

Every schedule is called with a step (0 is the first one) and returns a Python float, or with an array of
steps and returns a float64 array of its shape. Fractional steps are allowed. Any callable `step -> float`
serves where kilter takes a schedule; the ones here also compare, copy and pickle, and print as a call that
makes them. `Plateau` alone has state: it follows a metric, not the step.
"""

from kilter.schedule.compose import hold_linear_hold, join, piecewise, scale_lr, warmup
from kilter.schedule.curve import Curve, Schedule
from kilter.schedule.cycles import OneCycle, cosine_restarts, one_cycle, sawtooth, triangular
from kilter.schedule.decays import (
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    multistep,
    polynomial,
    step,
)
from kilter.schedule.plateau import Plateau

__all__ = [
    "Curve",
    "OneCycle",
    "Plateau",
    "Schedule",
    "constant",
    "cosine",
    "cosine_restarts",
    "exponential",
    "hold_linear_hold",
    "inverse_sqrt",
    "join",
    "linear",
    "multistep",
    "one_cycle",
    "piecewise",
    "polynomial",
    "sawtooth",
    "scale_lr",
    "step",
    "triangular",
    "warmup",
]
