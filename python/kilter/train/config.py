"""What a run is made of: one field for each option, with its default, its values and what it means."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilter._check import KilterError, number
from kilter.nn.models import MODELS, NORMS
from kilter.train.choices import AUGMENTS, OPTIMIZERS, PRECISIONS, SCHEDULES

SETS = {"digits": (30, (256, 128)), "fashion-mnist": (10, (256, 128))}  # epochs, hidden layers of the mlp
FIND = "find"


def numbers(text: str) -> tuple[int, ...]:
    """Sizes such as "256,128"."""
    parts = text.replace("-", ",").split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"expected sizes such as 256,128, got {text!r}")
    return tuple(map(int, parts))


def names(text: str) -> tuple[str, ...]:
    """Names such as "flip,crop"."""
    return tuple(part for part in text.split(",") if part)


def rate(text: str) -> float | str:
    """A number, or the word "find"."""
    try:
        return text if text == FIND else float(text)
    except ValueError:
        raise ValueError(f"expected a number or {FIND!r}, got {text!r}") from None


def _option(
    default: Any,
    what: str,
    shown: str | None = None,
    *,
    metavar: str | None = None,
    known: Sequence[str] | Mapping[str, Any] | None = None,
    read: Callable[[str], Any] = str,
    flag: str | None = None,
) -> Any:
    """A field of `Config`.

    Parameters
    ----------
    default
        Its default; None and () stand for a default that depends on others, or for nothing.
    what, shown
        What it means; the default as a person should see it.
    metavar, known, read, flag
        Of its option on the command line: the name of its value, all values it may have, how text becomes a value, its
        own name.
    """
    meaning = {"what": what, "shown": shown, "metavar": metavar, "known": known, "read": read, "flag": flag}
    return dataclasses.field(default=default, metadata=meaning)


_RATES = ", ".join(f"{name} {choice.lr:g}" for name, choice in OPTIMIZERS.items())
_EPOCHS = "; ".join(f"{name} {epochs}" for name, (epochs, _) in SETS.items())


@dataclass(frozen=True)
class Config:
    """What a run is made of; None is filled in by `Job` from the data, the network and the optimizer."""

    data: str = _option(
        "digits", f"{', '.join(SETS)}, or an .npz file with x_train, y_train, x_test, y_test", metavar="DATA"
    )
    model: str = _option("mlp", "kind of network", known=MODELS)
    hidden: tuple[int, ...] | None = _option(
        None,
        "sizes of its hidden layers, or its channels, such as 256,128",
        "of the model",
        metavar="SIZES",
        read=numbers,
    )
    norm: str = _option("batch", "normalisation of the hidden layers", known=NORMS)
    dropout: float = _option(0.0, "probability of dropout", metavar="P", read=float)
    optimizer: str = _option("adamw", "update rule; sgd and nesterov have momentum 0.9", known=OPTIMIZERS)
    lr: float | str | None = _option(
        None, "peak learning rate; find: measure which is good", _RATES, metavar="LR|find", read=rate
    )
    weight_decay: float = _option(1e-2, "weight decay", metavar="W", read=float)
    clip_norm: float | None = _option(None, "limit the norm of the gradients", "off", metavar="NORM", read=float)
    schedule: str = _option("cosine", "of the learning rate; one_cycle moves momentum too", known=SCHEDULES)
    warmup: float | None = _option(
        None, "let the learning rate rise from 0 at first", "1, one_cycle 0", metavar="EPOCHS", read=float
    )
    batch_size: int = _option(64, "samples per batch, those of all ranks together", metavar="N", read=int)
    accumulate: int = _option(1, "batches per step of the optimizer", metavar="K", read=int)
    base_batch: int | None = _option(
        None, "the samples per step that --lr is meant for: it grows in proportion", "off", metavar="N", read=int
    )
    epochs: int | None = _option(None, "how often to go through the data", _EPOCHS, metavar="N", read=int)
    label_smoothing: float = _option(0.0, "part of each label to spread over the classes", metavar="EPS", read=float)
    smooth_others: str = _option("uniform", "over all classes, or over the rest", known=("uniform", "rest"))
    mixup: float = _option(
        0.0, "mix samples in pairs, with weights of Beta(ALPHA, ALPHA)", "off", metavar="ALPHA", read=float
    )
    cutmix: float = _option(0.0, "paste parts of other images, of such an area", "off", metavar="ALPHA", read=float)
    augment: tuple[str, ...] = _option((), f"any of {','.join(AUGMENTS)}", "none", metavar="NAMES", read=names)
    ema: float | None = _option(
        None,
        "evaluate and keep averages of the weights that decay by this per step",
        "off",
        metavar="DECAY",
        read=float,
    )
    precision: str = _option("fp32", "of weights, activations and gradients", known=PRECISIONS)
    device: str = _option("cpu", "where to train", known=("cpu", "cuda"))
    start: str | None = _option(
        None, "start from the weights of a run, where names and shapes agree", "none", metavar="RUN_DIR", flag="from"
    )
    freeze: tuple[str, ...] = _option(
        (), "layers to leave as they are, such as 0,1", "none", metavar="NAMES", read=names
    )
    monitor: bool = _option(False, "add gradient norm, update ratio and non-finite steps to the metrics")
    checkpoint_every: int | None = _option(
        None, "write a checkpoint after so many steps, besides after each epoch", "off", metavar="STEPS", read=int
    )
    seed: int = _option(0, "of weights, order of the data, augmentation and dropout", metavar="N", read=int)


def filled(config: Config) -> Config:
    """The configuration with nothing left open, checked where nobody below checks; `lr` may still be "find".

    Raises
    ------
    KilterError
        A value is unusable.
    """
    for field in dataclasses.fields(config):
        known, value = field.metadata["known"], getattr(config, field.name)
        if known is not None and value not in known:
            raise KilterError(f"{field.name}: expected {' or '.join(map(repr, known))}, got {value!r}")
    epochs, hidden = SETS.get(config.data, SETS["fashion-mnist"])
    if config.model != "mlp":
        hidden = tuple(inspect.signature(MODELS[config.model]).parameters["hidden"].default)
    config = replace(
        config,
        data=config.data if config.data in SETS else str(Path(config.data).absolute()),
        epochs=epochs if config.epochs is None else config.epochs,
        hidden=hidden if config.hidden is None else config.hidden,
        lr=OPTIMIZERS[config.optimizer].lr if config.lr is None else config.lr,
        warmup=float(config.schedule != "one_cycle") if config.warmup is None else config.warmup,
    )
    _check(config, config.epochs or 0, config.warmup or 0.0)
    return config


def _check(config: Config, epochs: int, warmup: float) -> None:
    least = 2 if config.norm == "batch" else 1
    for name, value, low in (
        ("batch_size", config.batch_size, least),
        ("epochs", epochs, 1),
        ("accumulate", config.accumulate, 1),
        ("base_batch", 1 if config.base_batch is None else config.base_batch, 1),
    ):
        if value < low:
            why = f" with norm {config.norm!r}" if low > 1 else ""
            raise KilterError(f"{name}: expected at least {low}{why}, got {value}")
    for name in ("label_smoothing", "dropout"):
        number(name, getattr(config, name), 0.0, 1.0)
    for name in ("mixup", "cutmix", "weight_decay"):
        number(name, getattr(config, name), 0.0, math.inf)
    for name in config.augment:
        if name not in AUGMENTS:
            raise KilterError(f"augment: expected {' or '.join(map(repr, AUGMENTS))}, got {name!r}")
    if config.lr != FIND:
        number("lr", config.lr, 0.0, open_low=True)
    elif config.base_batch is not None:
        raise KilterError("base_batch: expected a number as lr, got 'find', which measures at this batch size")
    most = 0 if config.schedule == "one_cycle" else epochs  # one_cycle rises by itself
    if not 0 <= warmup <= most:
        raise KilterError(f"warmup: expected 0 to {most} epochs with {config.schedule!r}, got {warmup:g}")


def from_json(values: Any) -> Config:
    """The configuration that `dataclasses.asdict` made these JSON values of.

    Raises
    ------
    KilterError
        They are not those of a run.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(values, dict) or values.keys() != known:
        odd = sorted(known ^ set(values if isinstance(values, dict) else ()))
        raise KilterError(f"config.json: expected the options of this version of kilter, got others: {', '.join(odd)}")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Config(**fields)
