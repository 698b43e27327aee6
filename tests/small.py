"""A small network on small data, for the tests of training."""

import numpy as np

from kilter import nn, optim, train
from kilter.data import Batches


def blobs(n=200, seed=0, dtype=np.float32):
    """Three groups of points that a small network tells apart."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = rng.standard_normal((n, 4)) + 3 * np.eye(3, 4)[y]
    return x.astype(dtype), y


def small(seed=0, **kwargs):
    model = nn.mlp(4, 3, hidden=(8,), seed=seed, **kwargs)
    return model, optim.AdamW(model.params(), 1e-2)


def run(epochs=3, callbacks=(), lr=1e-2, **kwargs):
    x, y = blobs()
    model = nn.mlp(4, 3, hidden=(8,))
    optimizer = optim.AdamW(model.params(), lr)
    batches = Batches(x, y, 32, seed=0)
    history = train.fit(
        model, optimizer, nn.softmax_cross_entropy, batches, epochs=epochs, callbacks=callbacks, **kwargs
    )
    return model, optimizer, history


class Notes(train.Callback):
    def __init__(self, stop_after=None, fail_at=None):
        self.calls, self.stop_after, self.fail_at = [], stop_after, fail_at

    def on_start(self, state):
        self.calls.append("start")

    def on_step(self, state):
        self.calls.append("step")
        if state.step == self.fail_at:
            raise KeyboardInterrupt

    def on_epoch(self, state):
        self.calls.append(f"epoch {len(state.history)} of {state.epochs}")
        state.stop = len(state.history) == self.stop_after

    def on_end(self, state):
        self.calls.append("end")
