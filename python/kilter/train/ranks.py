"""What the ranks of a run agree on, beside the gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter.dist import Communicator, broadcast_state, check_equal
from kilter.nn import Module


def leads(comm: Communicator | None) -> bool:
    """Whether this rank prints and writes."""
    return comm is None or comm.rank == 0


def total(comm: Communicator | None, values: list[float]) -> list[float]:
    """The sums of some numbers over all ranks."""
    if comm is None or comm.size == 1:
        return values
    found: list[float] = comm.all_reduce(np.array(values, np.float64)).tolist()
    return found


def even_share(comm: Communicator | None, samples: int) -> float:
    """The samples of a batch on each rank, were they spread evenly.

    Gradients by the logits are to be those of the mean over this many on every rank: the backward pass of synchronised
    batch norm adds them up over the ranks.
    """
    return total(comm, [samples])[0] / comm.size if comm is not None else samples


def each(comm: Communicator | None, values: list[float]) -> list[list[float]]:
    """Some numbers of every rank."""
    if comm is None or comm.size == 1:
        return [values]
    found: list[list[float]] = comm.all_gather(np.array(values, np.float64)).tolist()
    return found


def mean(comm: Communicator | None, value: float, weight: float) -> float:
    """The mean of a number over all ranks, each with its weight."""
    if comm is None or comm.size == 1:
        return value
    summed, weights = total(comm, [value * weight, weight])
    return summed / weights


def expect_equal(comm: Communicator | None, *targets: Any) -> None:
    """Refuse models and optimizers whose state differs between the ranks."""
    if comm is not None and comm.size > 1:
        for target in targets:
            check_equal(target, comm)


def share_statistics(model: Module, comm: Communicator | None) -> None:
    """Give every rank the running statistics of rank 0, where each has its own."""
    if comm is not None and comm.size > 1:
        broadcast_state(_Extra(model), comm)


class _Extra:
    """The state of a model that is not trained."""

    def __init__(self, model: Module) -> None:
        self.modules = dict(model.modules())

    def state_dict(self) -> dict[str, Any]:
        return {prefix + name: v for prefix, module in self.modules.items() for name, v in module.extra_state().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for prefix, module in self.modules.items():
            if own := {name: state[prefix + name] for name in module.extra_state()}:
                module.load_extra_state(own)
