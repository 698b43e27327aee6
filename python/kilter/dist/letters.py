"""What ranks say to each other before they exchange arrays, so that none waits for one that is gone."""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from kilter._check import KilterError, fail
from kilter._interrupt import ctrl_c_waits
from kilter.dist.communicator import LeftError, check_alike

HEAD = 128  # bytes of a letter that say what the rank calls
ROOM = 1920  # bytes of a letter for its data
_LEFT, _FAILED, _STOPPED = "has left", "has failed", "was interrupted"
_GONE = (_LEFT, _FAILED, _STOPPED)
_SPINS = 2000  # looks at a request before the core is left to others for longer
_NAP = 1e-4  # seconds
_GRACE = 2.0  # seconds in which the others are to make their next call after a rank failed


class Letters:
    """One letter from each rank to all, of one size: what it calls, and data where they fit in.

    Args:
        comm: a communicator of mpi4py, for this alone and for what follows a letter.
    """

    def __init__(self, comm: Any) -> None:
        self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())
        self._comm = comm
        self._sent = np.zeros(HEAD + ROOM, np.uint8)
        self._received = np.zeros((self.size, HEAD + ROOM), np.uint8)
        self._calls: list[str] = []  # of the last letters
        self._open = False  # in an exchange that has not come to its end, where the others cannot be told anything
        self._over = False  # a rank is gone, and all know

    @contextmanager
    def exchange(self, call: str, a: Any = None) -> Iterator[Any]:
        """Announces a call, with an array, and lets the block carry it out.

        All ranks come, or say that they are gone: Ctrl-C waits for the end of the block.

        Yields:
            What all ranks brought, (size, a.nbytes) of uint8; None if that is more than `ROOM` for each.

        Raises:
            KilterError: a rank has left or failed, or announced something else.
        """
        if self._open:
            fail(call, "a call after others that ended", "one after an error in the last")
        with ctrl_c_waits():
            if not self._over:
                self._send(call if a is None else f"{call} of {a.dtype} {a.shape}", a)
            if not self._over:
                check_alike(self._calls)
                size = 0 if a is None else a.nbytes
                self._open = True
                yield self._received[:, HEAD : HEAD + size].copy() if size <= ROOM else None
                self._open = False
                return
        gone = next(rank for rank, what in enumerate(self._calls) if what in _GONE)
        raise LeftError(f"{call}: expected all {self.size} ranks, rank {gone} {self._calls[gone]}")

    def leave(self, error: BaseException | None = None) -> bool:
        """Announces that this rank makes no more calls: all is done, or it has failed.

        Without an error it waits for the others; with one, only for as long as they may need to make their next call.
        A rank that calls something then gets a KilterError.

        Returns:
            Whether all ranks know how the others ended; if not, `abort` is left.
        """
        if self._open or self._over:
            return self._over
        if error is None:
            return self._send(_LEFT)
        what = _STOPPED if isinstance(error, KeyboardInterrupt) else _FAILED
        return self._send(what, deadline=time.monotonic() + _GRACE)

    def speaker(self) -> int | None:
        """After `leave`, the rank that is to report: the lowest that failed, was stopped or missed another, or None."""
        failed = [rank for rank, what in enumerate(self._calls) if what == _FAILED]
        failed += [rank for rank, what in enumerate(self._calls) if what != _LEFT]
        return failed[0] if failed else None

    def abort(self, error: BaseException) -> NoReturn:
        """Prints the error and ends all ranks, wherever they are."""
        time.sleep(0.05 * min(self.rank, 20))  # of several that failed, one gets to print
        sys.stdout.flush()
        if isinstance(error, KilterError):
            print(f"kilter: rank {self.rank}: {error}", file=sys.stderr)
        elif not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        sys.stderr.flush()
        self._comm.Abort(1)
        raise error

    def wait(self, request: Any, deadline: float = math.inf) -> bool:
        """Waits for a request, leaving the core to others; returns whether it has ended."""
        looks = 0
        while not request.Test():
            looks += 1
            if looks < _SPINS:
                os.sched_yield()
            elif time.monotonic() < deadline:
                time.sleep(_NAP)
            else:
                return False
        return True

    def _send(self, call: str, a: Any = None, deadline: float = math.inf) -> bool:
        text = call.encode()[:HEAD]
        self._sent[:HEAD] = 0
        self._sent[: len(text)] = np.frombuffer(text, np.uint8)
        if a is not None and a.nbytes <= ROOM:
            self._sent[HEAD : HEAD + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        self._open = True
        if not self.wait(self._comm.Iallgather(self._sent, self._received), deadline):
            return False
        self._open = False
        self._calls = [head.tobytes().rstrip(b"\0").decode(errors="replace") for head in self._received[:, :HEAD]]
        self._over = any(what in _GONE for what in self._calls) and set(self._calls) != {_LEFT}  # all may meet anew
        return True
