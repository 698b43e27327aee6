"""An epoch of an MLP with batch norm, beside the time of its matrix products alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from kilter import init
from kilter._check import KilterError
from kilter.bench.peers import Peer, Torch
from kilter.bench.timing import Work, by_turns
from kilter.data import Batches, fashion_mnist
from kilter.nn import BatchNorm, Linear, Sequential, mlp, softmax_cross_entropy
from kilter.optim import AdamW
from kilter.train import fit

SIZES = (784, 256, 128, 10)
BATCHES = (32, 128, 1024)
SAMPLES = 60_000
ROUNDS = 3


def samples(count: int) -> tuple[Any, Any, str]:
    """Returns images, labels and the name of the data: Fashion-MNIST where it is found, otherwise noise."""
    try:
        data = fashion_mnist()
        return data.x_train[:count].reshape(-1, SIZES[0]), data.y_train[:count], "Fashion-MNIST"
    except KilterError:
        x, words = init.normal((count, SIZES[0]), seed=1), init.uniform(count, 0, SIZES[-1], seed=2)
        return x, words.astype(np.int64) % SIZES[-1], "noise"


def rows(peers: Sequence[Peer] = ()) -> Iterator[dict[str, Any]]:
    """Yields, for each batch size, the seconds of an epoch, of its matrix products, of peers and of parts."""
    x, y, name = samples(SAMPLES)
    return ({"data": name, "batch": batch, **measured(x, y, batch, peers)} for batch in BATCHES)


def measured(x: Any, y: Any, batch: int, peers: Sequence[Peer]) -> dict[str, Any]:
    """Times epochs by turns; `parts` are those of an epoch that is interrupted by a clock."""
    model = mlp(SIZES[0], SIZES[-1], hidden=SIZES[1:-1], seed=0)
    model.reuse_buffers(True)
    optimizer, batches = AdamW(model.params()), Batches(x, y, batch, seed=0)
    splits: list[dict[str, float]] = []

    def epoch() -> None:
        fit(model, optimizer, softmax_cross_entropy, batches, epochs=1, progress=False)

    def clocked() -> None:
        splits.append(split(model, optimizer, batches))

    beside = {peer.name: peer.epoch(x, y, SIZES, batch) for peer in peers if isinstance(peer, Torch)}
    works = [epoch, products(len(x), batch), clocked, *beside.values()]
    (own, alone, _, *others), _ = by_turns(works, 0.0, ROUNDS, sample=0.0)
    parts = {part: median(one[part] for one in splits) for part in splits[0]}
    parts["loop and accuracy"] = own - sum(parts.values())
    return {
        "seconds": own,
        "products": alone,
        "peers": dict(zip(beside, others, strict=True)),
        "parts": parts,
    }


def products(count: int, batch: int) -> Work:
    """Returns the matrix products of an epoch, forward and backward, into arrays that are reused."""
    x, *ys = (np.full((batch, size), 0.5, np.float32) for size in SIZES)
    weights = [np.full(shape, 0.5, np.float32) for shape in pairwise(SIZES)]
    grads, inputs = [np.empty_like(w) for w in weights], [x, *ys]
    upstream = [np.full_like(a, 0.5) for a in inputs]

    def step(n: int) -> None:
        for i, w in enumerate(weights):
            np.dot(inputs[i][:n], w, out=inputs[i + 1][:n])
        for i in reversed(range(len(weights))):
            np.dot(inputs[i][:n].T, upstream[i + 1][:n], out=grads[i])
            if i:
                np.dot(upstream[i + 1][:n], weights[i].T, out=upstream[i][:n])

    def epoch() -> None:
        for start in range(0, count, batch):
            step(min(batch, count - start))

    return epoch


def split(model: Sequential, optimizer: Any, batches: Batches) -> dict[str, float]:
    """Trains for one epoch with a clock between the parts, and returns the seconds of each."""
    names = {Linear: "linear layers", BatchNorm: "batch norm and relu"}
    kinds = [names.get(type(layer), "flatten") for layer in model]
    spent: dict[str, float] = defaultdict(float)
    grads = model.grads()
    model.train()
    mark = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        spent[part] += now - mark
        mark = now

    for x, y in batches.epoch(0):
        lap("batches")
        for layer, kind in zip(model, kinds, strict=True):
            x = layer(x)
            lap(kind)
        _, dy = softmax_cross_entropy(x, y)
        lap("loss")
        for i in range(len(model) - 1, 0, -1):  # layer 0 flattens, layer 1 needs no gradient of its input
            dy = model[i].backward(dy, need_dx=i > 1)
            lap(kinds[i])
        optimizer.step(grads)
        lap("optimizer")
    return dict(spent)


def lines(row: dict[str, Any]) -> list[str]:
    """What to print of a row."""
    own, alone = row["seconds"], row["products"]
    peers = "".join(f", {name} {s:.2f} s {s / own:.1f}x" for name, s in row["peers"].items())
    parts = ", ".join(f"{name} {s:.3f}" for name, s in row["parts"].items())
    head = f"batch {row['batch']:<5} epoch {own:.2f} s, matrix products alone {alone:.2f} s = {own / alone:.2f}x"
    return [head + peers, f"            seconds in: {parts}"]
