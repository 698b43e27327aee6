"""From a configuration to what `fit` takes: data, batches, network, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilter import data as _data
from kilter import nn
from kilter._backend import backend_named
from kilter._check import KilterError, dtype_of
from kilter.data import Batches, Dataset
from kilter.data.npz import read_npz
from kilter.dist import NCCL, Communicator
from kilter.nn.models import MODELS
from kilter.schedule import scale_lr
from kilter.train import choices
from kilter.train.checkpoint import load
from kilter.train.choices import PRECISIONS, Rates
from kilter.train.config import Config
from kilter.train.folder import MODEL

_RANK_STREAMS = 2**20  # of dropout, for each rank


def communicator(config: Config, comm: Communicator | None) -> Communicator | None:
    """What the ranks exchange arrays with: on GPUs NCCL, each rank with a GPU of its own."""
    if config.device == "cpu" or comm is None or comm.size == 1:
        return comm
    gpus = backend_named(config.device).xp.cuda
    gpus.Device(comm.rank % gpus.runtime.getDeviceCount()).use()
    return NCCL(comm)


def dataset(config: Config) -> tuple[Dataset, int]:
    """The data in the precision and on the device of the run, and the number of classes."""
    own = {"digits": _data.digits, "fashion-mnist": _data.fashion_mnist}.get(config.data)
    found = own() if own is not None else read_npz(config.data)
    classes = int(max(found.y_train.max(), found.y_test.max())) + 1
    if classes > max(len(found.y_train), 1000):
        raise KilterError(f"y_train: expected labels 0, 1, 2, ..., got {classes - 1}")
    xp = backend_named(config.device).xp
    dtype = dtype_of("precision", PRECISIONS[config.precision])
    x_train, x_test = (xp.asarray(x.astype(dtype, copy=False)) for x in (found.x_train, found.x_test))
    return Dataset(x_train, xp.asarray(found.y_train), x_test, xp.asarray(found.y_test)), classes


def batches(config: Config, data: Dataset, classes: int) -> Batches:
    """The training batches."""
    x, y = data.x_train, data.y_train
    # a last batch of one sample has no variance
    drop_last = config.norm == "batch" and len(x) % config.batch_size == 1
    change = choices.transforms(config.augment, config.mixup, config.cutmix, x.shape[1:], classes)
    return Batches(x, y, config.batch_size, seed=config.seed, drop_last=drop_last, transform=change or None)


def model(config: Config, shape: Sequence[int], classes: int, comm: Communicator | None) -> nn.Sequential:
    """The network, untrained, on its device."""
    found = MODELS[config.model](
        shape,
        classes,
        hidden=config.hidden or (),
        norm=config.norm,
        dropout=config.dropout,
        seed=config.seed,
        dtype=PRECISIONS[config.precision],
    )
    if comm is not None and comm.size > 1:
        nn.convert_sync_batchnorm(found, comm)
        for _, module in found.modules():
            if isinstance(module, nn.Dropout):
                module.stream += _RANK_STREAMS * comm.rank
    return found if config.device == "cpu" else found.to(config.device)


def start(network: nn.Module, folder: str) -> str:
    """Load the weights of a run where names and shapes agree, and say which those are.

    Raises
    ------
    KilterError
        There is no such run, or nothing agrees.
    """
    state = load(Path(folder) / MODEL).model
    report = network.load_state_dict(state, strict=False)
    params = network.params()
    new = [name for name in params if name in report.missing]
    if len(new) == len(params):
        raise KilterError(f"from: expected a run with arrays of the names and shapes of this network, got {folder}")
    return f"{len(params) - len(new)} of {len(params)} arrays of {folder}; new: {', '.join(new) or 'none'}"


def rates(config: Config, lr: float, steps: int) -> Rates:
    """Learning rate and momentum, for so many steps per epoch."""
    if config.base_batch is not None:
        lr = scale_lr(lr, config.batch_size * config.accumulate, config.base_batch)
    return choices.schedules(config.schedule, lr, (config.epochs or 1) * steps, round((config.warmup or 0.0) * steps))


def optimizer(config: Config, network: nn.Module, found: Rates) -> Any:
    """The optimizer of what is not frozen.

    Raises
    ------
    KilterError
        All is frozen.
    """
    params = network.params()
    if not params:
        raise KilterError(f"freeze: expected something left to train, got {','.join(config.freeze)}")
    return choices.optimizer(
        config.optimizer, params, found.lr, found.momentum, config.weight_decay, clip_norm=config.clip_norm
    )
