"""Equal weights on all ranks: handed out at the start, and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from kilter import _backend, _check
from kilter._check import KilterError, fail
from kilter.dist.communicator import Communicator, of_rank, writable


def broadcast_state(target: Any, comm: Communicator, root: int = 0) -> Any:
    """Gives every rank the state of rank `root`; all ranks call it together.

    Args:
        target: a model, an optimizer, or anything else with `state_dict` and `load_state_dict`; or a dict of arrays,
            which are written to. Names, shapes and dtypes are the same on all ranks.
        comm: this rank's communicator.
        root: whose state it is.

    Returns:
        `target`.

    Raises:
        KilterError: an argument is not as above, or names, shapes or dtypes differ between the ranks, on all of which
            it is raised then, before anything has changed.
    """
    root = of_rank(root, comm.size)
    state = _state(target)
    arrays = {name: writable(value, f"target[{name}]") for name, value in state.items() if hasattr(value, "shape")}
    _agree({name: f"{a.dtype} {a.shape}" for name, a in arrays.items()}, comm)
    numbers = _numbers({name: value for name, value in state.items() if name not in arrays}, comm, root)
    for array in arrays.values():
        comm.broadcast(array, root)
    if not isinstance(target, Mapping):
        target.load_state_dict({**arrays, **numbers})
    return target


def check_equal(target: Any, comm: Communicator) -> None:
    """Raises a KilterError on all ranks, with the names, unless the state is equal on all of them, bit for bit.

    Args:
        target: as for `broadcast_state`. It is only read.
        comm: this rank's communicator.

    Notes:
        The ranks exchange 8 bytes for each array or number.
    """
    _agree({name: _content(value) for name, value in _state(target).items()}, comm)


def _state(target: Any) -> dict[str, Any]:
    """The arrays and numbers by name: those of a dict themselves."""
    if isinstance(target, Mapping):
        for name, value in target.items():
            _check.array(f"target[{name}]", value)
        return dict(target)
    if not callable(getattr(target, "state_dict", None)):
        fail("target", "a model, an optimizer or a dict of arrays", type(target).__name__)
    return {name: v.item() if isinstance(v, np.generic) else v for name, v in target.state_dict().items()}


def _content(value: Any) -> str:
    if not hasattr(value, "shape"):
        return repr(value)
    digest = hashlib.blake2b(_backend.host(value).tobytes(), digest_size=16).hexdigest()
    return f"{value.dtype} {value.shape} {digest}"


def _agree(entries: Mapping[str, str], comm: Communicator) -> None:
    """Refuses entries that differ between the ranks."""
    digests = [hashlib.blake2b(f"{name}={what}".encode(), digest_size=8).digest() for name, what in entries.items()]
    mine = np.frombuffer(b"".join(digests), np.uint64)
    counts = comm.all_gather(np.array(len(mine)))
    if (counts != counts[0]).any():
        raise KilterError(f"state: expected as many entries on all ranks, got {', '.join(map(str, counts.tolist()))}")
    different = (comm.all_gather(mine) != mine).any(axis=0)
    # Every rank sees different bits at the same places, so all raise.
    names = [name for name, differs in zip(entries, different, strict=True) if differs]
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise KilterError(f"state: expected the same on all ranks, got different {shown}")


def _numbers(numbers: Mapping[str, Any], comm: Communicator, root: int) -> dict[str, Any]:
    """The plain numbers of rank `root`, as JSON, which keeps them exactly."""
    text = json.dumps(dict(numbers)).encode()
    size = comm.broadcast(np.array(len(text)), root)
    mine = np.frombuffer(text, np.uint8).copy() if comm.rank == root else np.zeros(int(size), np.uint8)
    received: dict[str, Any] = json.loads(comm.broadcast(mine, root).tobytes())
    return received
