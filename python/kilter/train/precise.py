"""Batch norm's statistics of a whole data set."""

from __future__ import annotations

from typing import Any

from kilter import stats
from kilter._check import fail
from kilter.data import Batches
from kilter.nn import BatchNorm, Module
from kilter.train.metrics import EVALUATE_BATCH, Data, arrays


def recompute_batch_norm(model: Module, data: Data | tuple[Any, Any]) -> None:
    """Replace the running statistics of every BatchNorm by those of a data set ("precise BN").

    The data passes through the model once. Each BatchNorm normalises by its batch, as in training, while all other
    layers are in eval mode, so that the statistics are those that inference meets. The moments of the batches are
    merged, which weighs each by its count: the first layer's statistics are those of the data set, however it is cut.

    Parameters
    ----------
    model
        Its modes, parameters and momentum stay as they are. Frozen layers keep their statistics.
    data
        Batches, whose epoch 0 is read, or arrays (x, y), which are read in batches of 250 in their order. y is not
        used.

    Raises
    ------
    KilterError
        An argument is not as above, a batch does not fit, or there is no batch; the statistics have not changed then.

    Notes
    -----
    `running.count` and `running.updates` are those of this pass. Over ranks (`convert_sync_batchnorm`), all pass
    equally many batches. Running averages lag behind the weights and weigh the last batches most; use this before
    the evaluation of a model whose weights moved fast, were averaged, or were trained in small batches.

    References
    ----------
    Wu, Johnson, 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3.
    """
    if not isinstance(model, Module):
        fail("model", "a Module", type(model).__name__)
    batches = data if isinstance(data, Data) else Batches(*arrays(data), EVALUATE_BATCH, seed=0, shuffle=False)
    modes = [(module, module.training) for _, module in model.modules()]
    layers = [m for m, _ in modes if isinstance(m, BatchNorm) and not m.frozen]
    kept = [layer.running.state_dict() for layer in layers]
    model.eval()
    for layer in layers:
        layer.training = True
    try:
        merged, updates = _pass(model, layers, batches)
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, state in zip(layers, kept, strict=True):
            layer.running.load_state_dict(state)
    for layer, moments in zip(layers, merged, strict=True):
        if moments is not None:
            count = float(moments.count)
            var = moments.m2 / (count - 1 if layer.running.unbiased else count)
            layer.running.load_state_dict({"mean": moments.mean, "var": var, "count": count, "updates": updates})


def _pass(model: Module, layers: list[BatchNorm], batches: Data) -> tuple[list[stats.Moments | None], int]:
    """The moments of what each layer normalised (None where it took no part), and how many batches there were."""
    merged: list[stats.Moments | None] = [None] * len(layers)
    seen = [layer.running.updates for layer in layers]
    updates = 0
    for x, _ in batches.epoch(0):
        model(x)
        updates += 1
        for i, layer in enumerate(layers):
            now, before = layer.moments, merged[i]
            if now is not None and layer.running.updates > seen[i]:
                seen[i] = layer.running.updates
                now = stats.Moments(now.count, now.mean.copy(), now.m2.copy())  # the layer may reuse its buffers
                merged[i] = now if before is None else stats.merge(before, now)
    if not updates:
        fail("data", "at least one batch", "none")
    return merged, updates
