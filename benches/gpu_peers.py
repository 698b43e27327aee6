"""The same work in PyTorch and JAX, as their users call it: dtypes, layouts and what is saved are kilter's."""

import os

from gpu_cases import cut
from gpu_machine import Jax, Torch

EPS = 1e-5
AXES = {2: (0,), 3: (0, 2), 4: (0, 2, 3), 5: (0, 2, 3, 4)}


def peers(simulated):
    """The libraries that are there, and what is said of the others."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found, missing = [], []
    for peer in (TorchPeer, JaxPeer):
        try:
            found.append(peer(simulated))
        except Exception as error:
            missing.append(f"{peer.name}: left out, as {type(error).__name__}: {error}")
    return found, missing


class TorchPeer(Torch):
    """Eager PyTorch; `ways` yields its ways to do what a case does, and their calls, one after the other."""

    def ways(self, case, sets):
        return getattr(self, case.peer[0])(*case.peer[1:], sets)

    def _passes(self, shape, dtype, real, affine, forward, which, sets, memory_format=None):
        """The calls of a pass of y = forward(x, gamma, beta); gamma and beta of dtype `real`."""
        torch = self.torch
        memory_format = memory_format or torch.contiguous_format
        gamma, beta = (self.random(affine, real, seed).requires_grad_() for seed in (1, 2))

        def data(seed):
            return self.random(shape, dtype, seed).to(memory_format=memory_format)

        xs = [data(10 + turn).requires_grad_() for turn in range(sets)]
        if which == "forward":
            return [lambda x=x: forward(x, gamma, beta) for x in xs]
        calls = []
        for x in xs:
            with self.beside():
                y, dy = forward(x, gamma, beta), data(99 + len(calls))

            def backward(x=x, y=y, dy=dy):
                return torch.autograd.grad(y, (x, gamma, beta), dy, retain_graph=True, allow_unused=True)

            calls.append(backward)
        return calls

    def batch_norm(self, shape, dtype, last, activation, which, sets):
        torch = self.torch
        mean, var = (torch.full(shape[1:2], value, device=self.place) for value in (0.0, 1.0))
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}

        def calls(native):
            def forward(x, gamma, beta):
                with torch.backends.cudnn.flags(enabled=not native):
                    y = torch.nn.functional.batch_norm(x, mean, var, gamma, beta, True, 0.1, EPS)
                return torch.relu(y) if activation else y

            how = formats.get(len(shape)) if last else None
            return self._passes(shape, dtype, "float32", shape[1:2], forward, which, sets, how)

        yield "torch", calls(native=False)
        if not self.simulated:
            yield "torch native", calls(native=True)

    def row_norm(self, shape, dtype, centred, which, sets):
        functional, width = self.torch.nn.functional, shape[1:]

        def forward(x, gamma, beta):
            if centred:
                return functional.layer_norm(x, width, gamma, beta, EPS)
            return functional.rms_norm(x, width, gamma, 1e-6)

        yield "torch", self._passes(shape, dtype, dtype, width, forward, which, sets)

    def group_norm(self, shape, groups, dtype, last, which, sets):
        def forward(x, gamma, beta):
            return self.torch.nn.functional.group_norm(x, groups, gamma, beta, EPS)

        how = self.torch.channels_last if last else None
        yield "torch", self._passes(shape, dtype, dtype, shape[1:2], forward, which, sets, how)

    def loss(self, shape, dtype, sets):
        """The loss, and the gradient of the logits."""
        torch, calls = self.torch, []
        labels = torch.arange(shape[0], device=self.place) % shape[1]
        for turn in range(sets):
            logits = self.random(shape, dtype, 10 + turn).requires_grad_()

            def both(z=logits):
                return torch.autograd.grad(torch.nn.functional.cross_entropy(z, labels), z)

            calls.append(both)
        yield "torch", calls

    def step(self, rule, shapes, dtype, options, sets):
        """The fused and the foreach form; none with float32 masters of 16-bit parameters."""
        torch = self.torch
        kinds = {
            "sgd": (torch.optim.SGD, {"lr": 1e-3}),
            "momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
            "adam": (torch.optim.Adam, {"capturable": not self.simulated}),
            "adamw": (torch.optim.AdamW, {"capturable": not self.simulated}),
        }
        if rule in kinds and dtype == "float32":
            kind, own = kinds[rule]
            for way in ("fused", "foreach"):
                yield f"torch {way}", self._steps(kind, {**own, way: True}, shapes, options, sets)

    def _steps(self, kind, own, shapes, options, sets):
        calls = []
        for turn in range(sets):
            params, grads = (cut(self, shapes, "float32", 2 * turn + k) for k in (0, 1))
            for p, g in zip(params, grads, strict=True):
                p.requires_grad_().grad = g
            optimizer = kind(params, **own)

            def step(params=params, optimizer=optimizer):
                if "clip_norm" in options:
                    self.torch.nn.utils.clip_grad_norm_(params, options["clip_norm"], foreach=True)
                optimizer.step()

            calls.append(step)
        return calls

    def fill(self, kind, shape, dtype, sets):
        outs = [self.random((1,), dtype, 0).new_empty(shape) for _ in range(sets)]
        yield "torch", [getattr(out, f"{kind}_") for out in outs]


class JaxPeer(Jax):
    """JAX under jit; a backward takes what the forward saved. As it compiles every shape, it does not make all."""

    parts = ("bn resnet50 nchw", "norms", "optim")

    def ways(self, case, sets):
        made = getattr(self, case.peer[0]) if case.part in self.parts else None
        if made and (calls := made(*case.peer[1:], sets)):
            yield "jax", calls

    def _passes(self, shape, dtype, affine, forward, which, sets):
        jax = self.jax
        gamma, beta = (self.random(affine, "float32", seed) for seed in (1, 2))
        xs = [self.random(shape, dtype, 10 + turn) for turn in range(sets)]
        if which == "forward":
            jitted = jax.jit(forward)
            return [lambda x=x: jitted(x, gamma, beta) for x in xs]
        saving, pulled = jax.jit(lambda *a: jax.vjp(forward, *a)), jax.jit(lambda pull, dy: pull(dy))
        saved = [saving(x, gamma, beta)[1] for x in xs]
        pairs = [(s, self.random(shape, dtype, 99 + i)) for i, s in enumerate(saved)]
        return [lambda s=s, dy=dy: pulled(s, dy) for s, dy in pairs]

    def _normalised(self, x, axes, eps, centred=True):
        jnp = self.jax.numpy
        wide = x.astype("float32")
        mean = wide.mean(axes, keepdims=True) if centred else 0.0
        var = jnp.square(wide - mean).mean(axes, keepdims=True)
        return (wide - mean) * self.jax.lax.rsqrt(var + eps)

    def batch_norm(self, shape, dtype, last, activation, which, sets):
        axes = AXES[len(shape)]
        if last:
            shape, axes = (shape[0], *shape[2:], shape[1]), tuple(range(len(shape) - 1))
        channels = shape[-1] if last else shape[1]
        around = (1,) * (len(shape) - 1) + (channels,) if last else (1, channels) + (1,) * (len(shape) - 2)

        def forward(x, gamma, beta):
            y = self._normalised(x, axes, EPS) * gamma.reshape(around) + beta.reshape(around)
            return (self.jax.nn.relu(y) if activation else y).astype(dtype)

        return self._passes(shape, dtype, (channels,), forward, which, sets)

    def row_norm(self, shape, dtype, centred, which, sets):
        def forward(x, gamma, beta):
            y = self._normalised(x, (1,), EPS if centred else 1e-6, centred) * gamma
            return (y + beta if centred else y).astype(dtype)

        return self._passes(shape, dtype, shape[1:], forward, which, sets)

    def step(self, rule, shapes, dtype, options, sets):
        import optax

        made = {"adamw": optax.adamw, "adam": optax.adam, "lion": optax.lion}.get(rule)
        if made is None or dtype != "float32" or options or len(shapes) > 1000:
            return None  # thousands of arrays take minutes to compile
        rules, jnp, jax = made(1e-3), self.jax.numpy, self.jax

        def move(params, state, grads):
            updates, state = rules.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted, calls = jax.jit(move, donate_argnums=(0, 1)), []
        for _ in range(sets):
            params = [jnp.ones(shape) for shape in shapes]
            held, grads = [params, rules.init(params)], [jnp.full(shape, 0.01) for shape in shapes]

            def step(held=held, grads=grads):
                held[:] = jitted(*held, grads)
                return held

            calls.append(step)
        return calls
