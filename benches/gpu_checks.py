"""Whether what runs on a device is right: every operation against float64, or against the CPU's bits."""

import tempfile
from pathlib import Path

import numpy as np

import gpu_machine  # noqa: F401, it finds the modules of the tests
import reference
import reference_nn
from kilter import KilterError, _kilter, nn, norm, optim, stats
from support import DTYPES, FLOAT32, FLOAT64, arithmetic, assert_close, same_bits


def close(machine, got, want, scale=0.0, dtype=None):
    got = machine.numpy(got)
    assert_close(got, want, dtype or got.dtype, None, scale)


def data(rng, shape, dtype, mean=0.0):
    return (rng.standard_normal(shape) + mean).astype(dtype)


def batch_norm(machine, shape, last, relu, dtype, way):
    """Forward, running statistics and backward with a residual, in a way to read the data."""
    with machine.reading(way):
        _batch_norm(machine, shape, last, relu, dtype)


def _batch_norm(machine, shape, last, relu, dtype):
    rng, axis = np.random.default_rng(0), -1 if last else 1
    channels = shape[axis]
    x, dy, residual = (data(rng, shape, dtype) for _ in range(3))
    gamma, beta = data(rng, channels, arithmetic(dtype), 1.0), data(rng, channels, arithmetic(dtype))
    there = [machine.there(a) for a in (x, gamma, beta)]
    running = stats.RunningStats(channels, dtype=arithmetic(dtype).name, xp=machine.xp)
    options = {"axis": axis, "activation": "relu" if relu else None, "residual": machine.there(residual)}
    y, cache = norm.batch_norm(*there, running=running, **options)
    plain, mean, var = reference.batch_norm(x, gamma, beta, axis=axis)
    want = plain + residual.astype("f8")
    want = np.maximum(want, 0) if relu else want
    close(machine, y, want)
    n = x.size / channels
    close(machine, running.mean, 0.1 * mean, np.sqrt(channels))
    close(machine, running.var, 0.9 + 0.1 * var * n / max(n - 1, 1))
    grads = norm.batch_norm_backward(machine.there(dy), cache)
    # The mask is that of the rounded output where the exact one is at zero.
    mask = machine.numpy(y).astype("f8") if relu else None
    wanted = reference.batch_norm_backward(dy, x, gamma, axis=axis, y=mask)
    for name in ("dgamma", "dbeta"):
        close(machine, getattr(grads, name), wanted[("dx", "dgamma", "dbeta").index(name)], np.sqrt(x.size))
    close(machine, grads.dx, wanted[0], np.linalg.norm(wanted[3] if wanted[3] is not None else wanted[0]))


def weighted(machine, shape, dtype):
    """Statistics with a mask, and what is normalised by running ones."""
    rng = np.random.default_rng(1)
    x, mask = data(rng, shape, dtype, 3.0), rng.integers(0, 2, shape[0]).astype(arithmetic(dtype))
    mask[0] = 1
    y, _ = norm.batch_norm(machine.there(x), weights=machine.there(mask))
    close(machine, y, reference.batch_norm(x, weights=mask)[0])
    running = stats.RunningStats(shape[1], dtype=arithmetic(dtype).name, xp=machine.xp)
    frozen, _ = norm.batch_norm(machine.there(x), running=running, training=False)
    close(machine, frozen, x.astype("f8") / np.sqrt(1 + 1e-5))
    found = stats.moments(machine.there(x))
    want = reference.moments(x)
    np.testing.assert_allclose(machine.numpy(found.m2), want.m2, rtol=1e-6)


def row_norm(machine, shape, centred, dtype):
    rng = np.random.default_rng(2)
    x, dy = data(rng, shape, dtype, 2.0), data(rng, shape, dtype)
    gamma, beta = data(rng, shape[1], arithmetic(dtype), 1.0), data(rng, shape[1], arithmetic(dtype))
    call, back = (norm.layer_norm, norm.layer_norm_backward) if centred else (norm.rms_norm, norm.rms_norm_backward)
    affine = [machine.there(a) for a in ((gamma, beta) if centred else (gamma,))]
    y, cache = call(machine.there(x), *affine, eps=1e-5)
    close(machine, y, reference.layer_norm(x, gamma, beta if centred else None, centred=centred)[0])
    grads = back(machine.there(dy), cache)
    wanted = reference.layer_norm_backward(dy, x, gamma, centred=centred)
    for got, want in zip(grads, wanted, strict=False):
        close(machine, got, want, np.sqrt(x.size))


def group_norm(machine, shape, groups, last, dtype):
    rng, axis = np.random.default_rng(3), -1 if last else 1
    x, dy = data(rng, shape, dtype, 2.0), data(rng, shape, dtype)
    gamma, beta = data(rng, shape[axis], arithmetic(dtype), 1.0), data(rng, shape[axis], arithmetic(dtype))
    y, cache = norm.group_norm(*map(machine.there, (x,)), groups, *map(machine.there, (gamma, beta)), axis=axis)
    close(machine, y, reference.group_norm(x, groups, gamma, beta, axis=axis)[0])
    wanted = reference.group_norm_backward(dy, x, groups, gamma, axis=axis)
    for got, want in zip(norm.group_norm_backward(machine.there(dy), cache), wanted, strict=True):
        close(machine, got, want, np.sqrt(x.size))


def loss(machine, shape, soft, dtype):
    rng = np.random.default_rng(7)
    z, q = data(rng, shape, dtype), rng.dirichlet(np.ones(shape[1]), shape[0])
    q = q if soft else np.eye(shape[1])[q.argmax(axis=1)]
    weights = rng.random(shape[0])
    targets = machine.there(q if soft else q.argmax(axis=1))
    got, dz = nn.softmax_cross_entropy(machine.there(z), targets, weights=machine.there(weights))
    want, dwant = reference_nn.softmax_cross_entropy(z, q, weights)
    np.testing.assert_allclose(got, want, rtol=1e-12 if dtype == FLOAT64 else 1e-5)
    close(machine, dz, dwant)


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": optim.Adagrad,
    "rmsprop": lambda p: optim.RMSprop(p, centered=True, momentum=0.9),
    "rmsprop window": lambda p: optim.RMSprop(p, window=3),
    "adadelta": optim.Adadelta,
    "adadelta window": lambda p: optim.Adadelta(p, window=3),
    "adam": lambda p: optim.Adam(p, clip_norm=1.0),
    "amsgrad": lambda p: optim.Adam(p, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, skip_nonfinite=True),
    "adamax": optim.Adamax,
    "nadam": optim.NAdam,
    "lion": optim.Lion,
}


def steps(machine, rule, sizes, dtype):
    """Five steps beside the CPU's, one of them without finite gradients where such are skipped."""
    rng = np.random.default_rng(4)
    params, grads = ([data(rng, n, dtype) for n in sizes] for _ in range(2))
    bad = [g.copy() for g in grads]
    bad[-1][...] = np.inf
    found = []
    for place in (np.array, machine.there):
        own = [place(p.copy()) for p in params]
        optimizer = OPTIMIZERS[rule](own)
        for turn in range(5):
            given = bad if turn == 2 and rule == "adamw" else grads
            optimizer.step([place(g * np.array(1 + turn, dtype)) for g in given])
        found.append([np.asarray(a if place is np.array else machine.numpy(a), "f8") for a in own])
    one, other = (np.concatenate([a.ravel() for a in some]) for some in found)
    assert np.isfinite(other).all()
    assert_close(other.astype(dtype), one, dtype, 1e-12 if dtype == FLOAT64 else 1e-5)


def fills(machine, kind, size, dtype):
    """The bits of the CPU."""
    h, want, out = np.array([0.5, 2.0]), np.empty(size, dtype), machine.xp.empty(size, dtype)
    getattr(_kilter, kind)(want, 2**40 + 3, 5, h)
    getattr(machine.ops, kind)(out, 2**40 + 3, 5, h)
    assert same_bits(machine.numpy(out), want)


def large(machine, size):
    """More than 2**31 elements: the last ones are those that were copied and normalised."""
    x = machine.xp.zeros(size, "float16")
    x[-1000:] = machine.there(np.arange(1000, dtype="float16"))
    y = machine.xp.empty(size, "float16")
    machine.ops.probe_copy(x, y)
    assert same_bits(machine.numpy(y[-1000:]), np.arange(1000, dtype="float16"))
    rows = x.reshape(-1, 1000)
    out, _ = norm.layer_norm(rows, out=y.reshape(-1, 1000))
    want = reference.layer_norm(np.arange(1000, dtype="float16")[None])[0]
    close(machine, out[-1:], want)
    assert not machine.numpy(out[:-1].max()).any()


def refusals(machine):
    """Errors name what is wrong before anything runs."""
    x = machine.there(np.ones((4, 3), "f4"))
    for bad in ({"gamma": machine.there(np.ones(2, "f4"))}, {"gamma": np.ones(3, "f4")}):
        try:
            norm.batch_norm(x, **bad)
        except KilterError:
            continue
        raise AssertionError(f"accepted {bad}")


def captured_step(machine, width, batch):
    """A training step in a graph: replayed, it moves the weights as eager steps do."""
    rng = np.random.default_rng(6)
    x, targets = rng.standard_normal((batch, width)).astype("f4"), rng.integers(0, 10, batch)
    found = []
    for graph in (False, True):
        model = nn.mlp(width, (width,), 10, seed=0)
        model.to("cuda") if not machine.simulated else None
        model.reuse_buffers(True)
        optimizer = optim.AdamW(model.params(), 1e-2)
        there, labels = machine.there(x), machine.there(targets)
        losses = []

        def step(model=model, optimizer=optimizer, there=there, labels=labels, losses=losses):
            loss, dlogits = nn.softmax_cross_entropy(model(there), labels)
            model.backward(dlogits)
            optimizer.step(model.grads())
            losses.append(loss)

        step()
        step()
        replay = machine.captured([step]) if graph else step
        for _ in range(5):
            replay()
        machine.wait()
        found.append({name: machine.numpy(p) for name, p in model.params().items()})
    eager, replayed = found
    for name, value in eager.items():
        np.testing.assert_allclose(replayed[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def trained(machine, epochs):
    """A run of the command's job on the device ends as on the CPU."""
    from kilter import train

    losses = []
    for device in ("cpu", "cuda"):
        with tempfile.TemporaryDirectory() as folder:
            job = train.Job(train.Config(data="digits", epochs=epochs, seed=0, device=device), Path(folder) / "run")
            losses.append(job.run()[-1]["loss"])
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0] + 1e-3, losses


def checks(machine):
    """(name, call) of every check."""
    tiny = machine.simulated
    dtypes = DTYPES[1:4:2] if tiny else DTYPES
    planes = [(32, 64, 28, 28), (16, 256, 7, 7), (64, 3, 64, 64), (8, 37, 13, 17)]
    planes = [(4, 6, 5, 5), (3, 8, 7, 7)] if tiny else planes
    columns = [(64, 12)] if tiny else [(32, 28, 28, 64), (4096, 1024), (128, 4096), (9, 13, 37)]
    rows = [(7, 40), (3, 700)] if tiny else [(2048, 768), (4096, 64), (64, 4097), (16, 65536), (4, 400_000)]
    groups = [((3, 8, 5, 5), 4)] if tiny else [((8, 320, 32, 32), 32), ((8, 64, 64, 64), 64), ((4, 96, 7, 7), 8)]
    sizes = [5, 64, 300] if tiny else [5, 64, 1000, 2_000_003, 300_000]
    found = []

    def add(check, *arguments):
        found.append((f"{check.__name__} {' '.join(map(str, arguments))}", lambda: check(machine, *arguments)))

    for dtype in dtypes:
        for way in ("", "cluster", "resident"):
            for shape in planes:
                add(batch_norm, shape, False, way != "cluster", dtype, way)
            for shape in columns:
                add(batch_norm, shape, True, way == "cluster", dtype, way)
        add(weighted, planes[0], dtype)
        for shape in rows:
            for centred in (True, False):
                add(row_norm, shape, centred, dtype)
        for shape, count in groups:
            add(group_norm, shape, count, False, dtype)
            add(group_norm, (shape[0], *shape[2:], shape[1]), count, True, dtype)
        for shape in [(5, 7), (1030, 10), (3, 300)] if tiny else [(1024, 10), (100_003, 10), (256, 1000), (64, 50_304)]:
            add(loss, shape, False, dtype)
            add(loss, shape, True, dtype)
        for kind in ("fill_uniform", "fill_normal"):
            add(fills, kind, 5003 if tiny else 10_000_000, dtype)
    for rule in list(OPTIMIZERS)[7:10] if tiny else OPTIMIZERS:
        for dtype in (FLOAT32,) if tiny else DTYPES:
            add(steps, rule, sizes, dtype)
    add(refusals)
    if not tiny:
        add(large, 2_200_000_000)
        add(captured_step, 256, 128)
        add(trained, 3)
    return found
