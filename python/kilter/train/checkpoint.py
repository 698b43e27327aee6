"""Checkpoints: safetensors with metadata, written whole or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np

from kilter._check import KilterError
from kilter.nn import Module
from kilter.train._extra import extra

Path: TypeAlias = str | os.PathLike[str]

_FORMAT, _VERSION = "kilter", 1


class Checkpoint(NamedTuple):
    """What a file holds."""

    model: dict[str, Any]
    optimizer: dict[str, Any] | None
    metadata: dict[str, Any]


def save(path: Path, model: Module, optimizer: Any = None, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model, and the state of its optimizer, to one safetensors file.

    Parameters
    ----------
    path
        The file. One that exists is replaced in a single step: it always holds the old or the new content.
    model, optimizer
        Their `state_dict()` is written: arrays as tensors "model.<name>" and "optimizer.<name>", numbers in
        the metadata.
    metadata
        Anything that JSON can hold.

    Raises
    ------
    KilterError
        safetensors is not installed, or the metadata is not JSON.
    OSError
        The folder cannot be written to, or the disk is full; an existing file stays as it was.
    """
    states = {"model": model.state_dict()} | ({} if optimizer is None else {"optimizer": optimizer.state_dict()})
    flat = {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
    tensors = {name: np.array(value, order="C") for name, value in flat.items() if hasattr(value, "shape")}
    body = {
        "version": _VERSION,
        "parts": list(states),
        "numbers": {name: value for name, value in flat.items() if name not in tensors},
        "metadata": dict(metadata or {}),
        "crc32": _checksum(tensors),
    }
    try:
        header = {_FORMAT: json.dumps(body)}
    except TypeError as error:
        raise KilterError(f"metadata: expected JSON values, got {error}") from None
    data: bytes = extra("safetensors.numpy").save(tensors, metadata=header)
    with replacing(path) as file:
        file.write(data)


def load(path: Path, model: Module | None = None, optimizer: Any = None) -> Checkpoint:
    """Read a file of `save`, and put its states into a model and an optimizer.

    Parameters
    ----------
    path
        The file.
    model, optimizer
        Take their state from the file (strictly: equal names and shapes), if given.

    Returns
    -------
    Checkpoint
        The states (`model`, `optimizer` or None) and the metadata.

    Raises
    ------
    KilterError
        The file is missing, damaged, not from kilter, or does not fit; model and optimizer are unchanged.
    """
    checkpoint = _read(os.fspath(path))
    if optimizer is not None and checkpoint.optimizer is None:
        raise KilterError(f"{path}: expected the state of an optimizer, got a file with a model alone")
    before = None if model is None else model.state_dict()
    if model is not None:
        model.load_state_dict(checkpoint.model)
    if optimizer is not None:
        try:
            optimizer.load_state_dict(checkpoint.optimizer)
        except KilterError:
            if model is not None and before is not None:
                model.load_state_dict(before)
            raise
    return checkpoint


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path` when the block ends, and vanishes if it fails."""
    path = os.fspath(path)
    fresh = f"{path}.{os.getpid()}.tmp"
    try:
        with open(fresh, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        if os.path.exists(fresh):
            os.unlink(fresh)
        raise


def _read(path: str) -> Checkpoint:
    safetensors = extra("safetensors")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(_FORMAT)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise KilterError(f"{path}: no such file") from None
    except OSError as error:
        raise KilterError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise KilterError(f"{path}: expected a kilter checkpoint, got a damaged or foreign file ({error})") from None
    try:
        body = json.loads(header or "")
        version, numbers, parts, crc32 = (body[key] for key in ("version", "numbers", "parts", "crc32"))
        metadata = body["metadata"]
    except (ValueError, KeyError, TypeError):
        raise KilterError(f"{path}: expected a kilter checkpoint, got a foreign safetensors file") from None
    if version != _VERSION:
        raise KilterError(f"{path}: expected checkpoint version {_VERSION}, got {version}")
    if crc32 != _checksum(tensors):
        raise KilterError(f"{path}: damaged, the checksum differs")
    states: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for name, value in (numbers | tensors).items():
        part, _, rest = name.partition(".")
        states[part][rest] = value
    return Checkpoint(states["model"], states.get("optimizer"), metadata)


def _checksum(tensors: Mapping[str, Any]) -> int:
    total = 0
    for name in sorted(tensors):
        value = tensors[name]
        total = zlib.crc32(f"{name} {value.dtype.name} {value.shape}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(np.uint8), total)
    return total
