"""Optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kilter import init
from kilter.bench.peers import Peer
from kilter.bench.timing import Case, update_yard
from kilter.optim import SGD, AdamW

Spec = tuple[str, int, int]  # rule, number of tensors, parameters in each

SPECS: tuple[Spec, ...] = (("adamw", 1, 25_000_000), ("adamw", 200, 1_000), ("momentum", 1, 25_000_000))


def cases(peers: Sequence[Peer] = ()) -> Iterator[Case]:
    """Every case, one at a time: the arrays of some are large."""
    return (case(spec, peers) for spec in SPECS)


def case(spec: Spec, peers: Sequence[Peer] = ()) -> Case:
    """One step over all tensors."""
    rule, count, size = spec
    params, grads = ([init.normal(size, seed=i, stream=s) for i in range(count)] for s in (0, 1))
    beside = {name: work for peer in peers for name, work in peer.steps(rule, params, grads).items()}
    optimizer = AdamW(params) if rule == "adamw" else SGD(params, momentum=0.9)
    yard, path = update_yard(count * size, 3 if rule == "adamw" else 2)
    name = f"{'AdamW' if rule == 'adamw' else 'SGD with momentum'}, {count} x {size:,} parameters"
    return Case(name, lambda: optimizer.step(grads), path, path, yard, path, beside)
