"""Checkpoints: safetensors with metadata, written whole or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape, glob
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np

from kilter._backend import host
from kilter._check import KilterError
from kilter.nn import Module
from kilter.train._extra import extra

Path: TypeAlias = str | os.PathLike[str]
States: TypeAlias = dict[str, dict[str, Any]]  # of each part: names to arrays and plain numbers

_FORMAT, _VERSION = "kilter", 2


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
    write(path, states, dict(metadata or {}))


def load(path: Path, model: Module | None = None, optimizer: Any = None) -> Checkpoint:
    """Read a file of `save`, or a checkpoint of `fit`, and put its states into a model and an optimizer.

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
    states, metadata = read(path)
    if "model" not in states:
        raise KilterError(f"{path}: expected the state of a model, got {', '.join(states) or 'nothing'}")
    if optimizer is not None and "optimizer" not in states:
        raise KilterError(f"{path}: expected the state of an optimizer, got a file with a model alone")
    put({name: target for name, target in (("model", model), ("optimizer", optimizer)) if target is not None}, states)
    return Checkpoint(states["model"], states.get("optimizer"), metadata)


def put(targets: Mapping[str, Any], states: States) -> None:
    """Load the state of each part into its target, into all of them or into none.

    Raises
    ------
    KilterError
        A state does not fit.
    """
    before = {name: target.state_dict() for name, target in targets.items()}
    done: list[str] = []
    try:
        for name, target in targets.items():
            done.append(name)
            target.load_state_dict(states[name])
    except KilterError:
        for name in done:
            targets[name].load_state_dict(before[name])
        raise


def write(
    path: Path,
    states: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
    *,
    keep: Path | None = None,
    sync: bool = True,
) -> None:
    """Write the states of named parts to one file, as `save` does; see `replacing` for `keep` and `sync`."""
    flat = {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
    tensors = {name: np.asarray(host(value), order="C") for name, value in flat.items() if hasattr(value, "shape")}
    body: dict[str, Any] = {
        "version": _VERSION,
        "parts": list(states),
        "numbers": {name: value for name, value in flat.items() if name not in tensors},
        "metadata": dict(metadata),
    }
    try:
        header = {_FORMAT: json.dumps(body | {"crc32": _checksum(body, tensors)})}
    except TypeError as error:
        raise KilterError(f"metadata: expected JSON values, got {error}") from None
    data: bytes = extra("safetensors.numpy").save(tensors, metadata=header)
    with replacing(path, keep=keep, sync=sync) as file:
        file.write(data)


def read(path: Path) -> tuple[States, dict[str, Any]]:
    """The states of all parts, and the metadata, of a file of `write`.

    Raises
    ------
    KilterError
        The file is missing, damaged, or not from kilter.
    """
    body, tensors = _opened(os.fspath(path))
    try:
        version, crc32 = body["version"], body.pop("crc32", None)
        numbers, parts, metadata = body["numbers"], body["parts"], body["metadata"]
    except (KeyError, TypeError, AttributeError):
        raise KilterError(f"{path}: expected a kilter checkpoint, got a foreign safetensors file") from None
    if version != _VERSION:
        raise KilterError(f"{path}: expected checkpoint version {_VERSION}, got {version}")
    if crc32 != _checksum(body, tensors):
        raise KilterError(f"{path}: damaged, the checksum differs")
    states: States = {part: {} for part in parts}
    for name, value in (numbers | tensors).items():
        part, _, rest = name.partition(".")
        states[part][rest] = value
    return states, metadata


@contextmanager
def replacing(path: Path, *, keep: Path | None = None, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path` when the block ends, and vanishes if it fails.

    The file that was there moves to `keep`, if that is given. `sync=False` leaves it to the system when the content
    reaches the disk: after a crash of the machine, not of the program, the file may be empty.
    """
    path = os.fspath(path)
    fresh = f"{path}.{os.getpid()}.tmp"
    try:
        with open(fresh, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if keep is not None and os.path.exists(path):
            os.replace(path, keep)
        os.replace(fresh, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        raise


def sweep(path: Path) -> None:
    """Remove what a program that was killed inside `replacing(path)` has left."""
    for left in glob(f"{escape(os.fspath(path))}.*.tmp"):
        with suppress(FileNotFoundError):
            os.unlink(left)


def _opened(path: str) -> tuple[Any, dict[str, Any]]:
    """What stands in the header of a safetensors file under our name, and the tensors."""
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
        return json.loads(header or ""), tensors
    except ValueError:
        raise KilterError(f"{path}: expected a kilter checkpoint, got a foreign safetensors file") from None


def _checksum(body: Mapping[str, Any], tensors: Mapping[str, Any]) -> int:
    total = zlib.crc32(json.dumps(body).encode())
    for name in sorted(tensors):
        value = tensors[name]
        total = zlib.crc32(f"{name} {value.dtype.name} {value.shape}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(np.uint8), total)
    return total
