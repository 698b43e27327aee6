"""What is measured on a device: the shapes, the bytes that must move, and kilter's calls."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from gpu_machine import COLD
from kilter import nn, norm, optim, stats

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Case(NamedTuple):
    """One line of a table. `make(machine, sets)` returns calls, each on its own arrays; `peer` is how peers make it."""

    part: str
    name: str
    dtype: str
    floor: int  # bytes if each input is read once and each output written once
    path: int  # bytes if what does not fit on the chip is read twice
    held: int  # bytes of one set of arrays
    make: Callable[..., list[Callable[[], Any]]]
    peer: tuple[Any, ...]
    count: int = 1  # how often a network has it

    @property
    def sets(self):
        """How many sets of arrays are cold together; very large ones are so alone."""
        return 1 if self.held > 4 << 30 else max(3, min(64, -(-COLD // max(self.held, 1))))


# C, H, W of the 53 batch norms of ResNet-50 (He et al. 2015, arXiv:1512.03385), and how many there are of each
RESNET50 = (
    (64, 112, 1),
    (64, 56, 6),
    (256, 56, 4),
    (128, 56, 1),
    (128, 28, 7),
    (512, 28, 5),
    (256, 28, 1),
    (256, 14, 11),
    (1024, 14, 7),
    (512, 14, 1),
    (512, 7, 5),
    (2048, 7, 4),
)
BATCH_SHAPES = (  # beside ResNet-50's: fully connected, few channels, volumes, odd sizes, one sample
    (4096, 1024),
    (128, 4096),
    (65536, 64),
    (64, 3, 224, 224),
    (8, 64, 32, 64, 64),
    (64, 37, 13, 17),
    (1, 64, 112, 112),
)
ROWS = (
    (4096, 4096, "bfloat16"),
    (4096, 4096, "float32"),
    (8192, 1024, "bfloat16"),
    (16384, 768, "bfloat16"),
    (65536, 256, "bfloat16"),
    (8192, 8192, "bfloat16"),
    (4096, 16384, "bfloat16"),
    (32768, 4096, "bfloat16"),
    (2048, 65536, "bfloat16"),
    (1024, 262144, "bfloat16"),
)
GROUPS = (  # shape, groups; instance norm has one for each channel
    ((32, 320, 64, 64), 32),
    ((32, 640, 32, 32), 32),
    ((32, 1280, 16, 16), 32),
    ((16, 256, 128, 128), 32),
    ((16, 64, 256, 256), 64),
    ((8, 256, 64, 64), 256),
)


def small(shape):
    """A shape of the same kind that a simulator can walk through."""
    limits = (6, 96) if len(shape) == 2 else (2, 16, *(6,) * (len(shape) - 2))
    return tuple(min(n, most) for n, most in zip(shape, limits, strict=True))


def channels_last(shape):
    return (shape[0], *shape[2:], shape[1])


# --------------------------------------------------------------------------- norms


def _passes(part, name, dtype, shape, forward, backward, peer, count=1):
    """The cases of a norm's two passes."""
    size = prod(shape) * SIZES[dtype]
    yield Case(part, f"{name} forward", dtype, 2 * size, 3 * size, 2 * size, forward, (*peer, "forward"), count)
    yield Case(part, f"{name} backward", dtype, 3 * size, 5 * size, 4 * size, backward, (*peer, "backward"), count)


def _norm(call, back, shape, dtype, affine):
    """How to make the calls of both passes; `affine` is the shape of gamma."""

    def arrays(machine, sets):
        real = "float64" if dtype == "float64" else "float32"
        gamma, beta = (machine.random(affine, real, seed, mean) for seed, mean in ((1, 1.0), (2, 0.0)))
        for turn in range(sets):
            yield machine.random(shape, dtype, 10 + turn), gamma, beta, machine.xp.empty(shape, dtype)

    def forward(machine, sets):
        return [lambda a=a: call(*a[:3], out=a[3]) for a in arrays(machine, sets)]

    def backward(machine, sets):
        calls = []
        for x, gamma, beta, y in arrays(machine, sets):
            cache = call(x, gamma, beta, out=y)[1]
            dy = machine.random(shape, dtype, 99 + len(calls))
            calls.append(lambda dy=dy, cache=cache, y=y: back(dy, cache, out=y))
        return calls

    return forward, backward


def batch_norm(shape, dtype, last=False, activation=None, part="bn", count=1):
    """Batch norm in training, with running statistics."""
    channels, axis = shape[1], -1 if last else 1
    memory = channels_last(shape) if last else shape
    running = {}

    def call(x, gamma, beta, out):
        if x.shape not in running:
            running[x.shape] = stats.RunningStats(channels, xp=_module_of(x))
        options = {"axis": axis, "activation": activation, "running": running[x.shape], "out": out}
        return norm.batch_norm(x, gamma, beta, **options)

    forward, backward = _norm(call, norm.batch_norm_backward, memory, dtype, (channels,))
    name = f"{memory}{' relu' if activation else ''}"
    peer = ("batch_norm", shape, dtype, last, activation)
    yield from _passes(part, name, dtype, memory, forward, backward, peer, count)


def _module_of(array):
    from kilter._backend import backend_of

    return backend_of(array).xp


def row_norm(shape, dtype, centred=True):
    def call(x, gamma, beta, out):
        return norm.layer_norm(x, gamma, beta, out=out) if centred else norm.rms_norm(x, gamma, out=out)

    back = norm.layer_norm_backward if centred else norm.rms_norm_backward
    name = f"{'layer' if centred else 'rms'} norm {shape}"
    peer = ("row_norm", shape, dtype, centred)
    yield from _passes("norms", name, dtype, shape, *_norm(call, back, shape, dtype, shape[1:]), peer)


def group_norm(shape, groups, dtype, last=False):
    axis, memory = -1 if last else 1, channels_last(shape) if last else shape

    def call(x, gamma, beta, out):
        return norm.group_norm(x, groups, gamma, beta, axis=axis, out=out)

    name = f"{'instance' if groups == shape[1] else 'group'} norm {memory}"
    forward, backward = _norm(call, norm.group_norm_backward, memory, dtype, (shape[1],))
    yield from _passes("groups", name, dtype, memory, forward, backward, ("group_norm", shape, groups, dtype, last))


def norms(simulated):
    """The cases of all norms."""
    fit = small if simulated else tuple
    for last in (False, True):
        for channels, side, count in RESNET50[:3] if simulated else RESNET50:
            where = "bn resnet50 nhwc" if last else "bn resnet50 nchw"
            yield from batch_norm(fit((256, channels, side, side)), "bfloat16", last, part=where, count=count)
    for channels, side, count in RESNET50[-1:] if simulated else RESNET50:
        yield from batch_norm(fit((32, channels, side, side)), "float32", part="bn resnet50 n=32", count=count)
    for shape in BATCH_SHAPES[::3] if simulated else BATCH_SHAPES:
        yield from batch_norm(fit(shape), "bfloat16")
    yield from batch_norm(fit((256, 256, 56, 56)), "bfloat16", activation="relu")
    for *shape, dtype in ROWS[:2] if simulated else ROWS:
        yield from row_norm(fit(tuple(shape)), dtype)
    for *shape, dtype in ROWS[:1] if simulated else ROWS[::2]:
        yield from row_norm(fit(tuple(shape)), dtype, centred=False)
    for shape, groups in GROUPS[::4] if simulated else GROUPS:
        tiny = fit(shape)
        groups = tiny[1] if groups == shape[1] else min(groups, tiny[1] // 2)
        yield from group_norm(tiny, groups, "bfloat16")
        yield from group_norm(tiny, groups, "bfloat16", last=True)


# --------------------------------------------------------------------------- losses


def losses(simulated):
    """Softmax with cross-entropy against labels: its number is waited for."""
    for shape in [(6, 10), (4, 300)] if simulated else [(1024, 10), (4096, 1000), (8192, 50_304)]:

        def make(machine, sets, shape=shape):
            labels = machine.there(np.arange(shape[0]) % shape[1])
            logits = [machine.random(shape, "float32", 10 + turn) for turn in range(sets)]
            return [lambda z=z: nn.softmax_cross_entropy(z, labels) for z in logits]

        moved = 2 * prod(shape) * SIZES["float32"]
        peer = ("loss", shape, "float32")
        yield Case("losses", f"cross-entropy {shape}", "float32", moved, moved, moved, make, peer)


# --------------------------------------------------------------------------- optimizers


def resnet50():
    """The shapes of ResNet-50's 161 parameters."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt(layers, d, vocabulary, context):
    """The shapes of a GPT-2's parameters (Radford et al. 2019), the output's being the embedding's."""
    layer = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(vocabulary, d), (context, d), *layer * layers, (d,), (d,)]


LISTS = {
    "resnet-50": resnet50(),
    "gpt 124M": gpt(12, 768, 50304, 1024),
    "gpt 1B": gpt(18, 2048, 50304, 2048),
    "2000 x 1024": [(1024,)] * 2000,
    "10000 x 64": [(64,)] * 10_000,
}
RULES = {  # class, options, bytes of float32 for each parameter
    "sgd": (optim.SGD, {"lr": 1e-3}, 12),
    "momentum": (optim.SGD, {"lr": 1e-3, "momentum": 0.9}, 20),
    "adam": (optim.Adam, {}, 28),
    "adamw": (optim.AdamW, {}, 28),
    "lion": (optim.Lion, {}, 20),
}
STEPS = (
    ("adamw", "resnet-50", "float32", {}),
    ("adam", "resnet-50", "float32", {}),
    ("momentum", "resnet-50", "float32", {}),
    ("sgd", "resnet-50", "float32", {}),
    ("lion", "resnet-50", "float32", {}),
    ("adamw", "resnet-50", "float32", {"clip_norm": 1.0}),
    ("adamw", "gpt 124M", "float32", {}),
    ("adamw", "gpt 124M", "bfloat16", {}),  # float32 masters: 28 bytes as well
    ("adamw", "gpt 1B", "float32", {}),
    ("adamw", "2000 x 1024", "float32", {}),
    ("adamw", "10000 x 64", "float32", {}),
)


def cut(machine, shapes, dtype, seed):
    """Random arrays of these shapes, each at a multiple of 256 bytes in one piece of memory."""
    starts = np.cumsum([0, *(-(-prod(shape) // 128) * 128 for shape in shapes)])
    flat = machine.random((int(starts[-1]),), dtype, seed, scale=0.02)
    return [flat[a : a + prod(shape)].reshape(shape) for a, shape in zip(starts.tolist(), shapes, strict=False)]


def step(rule, name, dtype, options, shapes):
    kind, own, each = RULES[rule]
    size = sum(map(prod, shapes))
    path = size * (each + (SIZES[dtype] if "clip_norm" in options else 0))

    def make(machine, sets):
        calls = []
        for turn in range(sets):
            params, grads = (cut(machine, shapes, dtype, seed + 2 * turn) for seed in (1, 2))
            optimizer = kind(params, **own, **options)
            calls.append(lambda optimizer=optimizer, grads=grads: optimizer.step(grads))
        return calls

    clipped = " clipped" if options else ""
    peer = ("step", rule, shapes, dtype, options)
    return Case("optim", f"{rule}{clipped} {name}", dtype, path, path, path, make, peer)


def steps(simulated):
    """The cases of optimizers."""
    for rule, name, dtype, options in STEPS:
        shapes = LISTS[name]
        if simulated:
            shapes = [tuple(min(n, 5) for n in shape) for shape in shapes[:12]]
        yield step(rule, name, dtype, options, shapes)


# --------------------------------------------------------------------------- fills


def fills(simulated):
    """The cases of random numbers: written, not read."""
    size = 4000 if simulated else 256 << 20
    for kind in ("normal", "uniform"):
        for dtype in ("float32", "bfloat16"):

            def make(machine, sets, kind=kind, dtype=dtype):
                outs = [machine.xp.empty(size, dtype) for _ in range(sets)]
                fill = getattr(machine.ops, f"fill_{kind}")
                return [lambda out=out: fill(out, 7, 0, np.array([0.0, 1.0])) for out in outs]

            moved = size * SIZES[dtype]
            yield Case("init", f"{kind} fill", dtype, moved, moved, moved, make, ("fill", kind, (size,), dtype))
