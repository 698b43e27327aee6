"""Ranks that are threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from threading import Condition, Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kilter import _check
from kilter._backend import backend_of
from kilter._check import fail
from kilter.dist.communicator import Communicator, LeftError, add_up, check_alike, of_rank, writable

T = TypeVar("T")


class Threads:
    """A group of n ranks in this process, for tests and demonstrations.

    `run` calls a function once per rank, each in a thread of its own with its own communicator:

    >>> Threads(3).run(lambda comm: comm.all_gather(np.array(comm.rank)).tolist())
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]

    Args:
        n: how many ranks, at least 1.

    Raises:
        KilterError: `n` is no such number.
    """

    def __init__(self, n: int) -> None:
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
            fail("n", "a whole number of at least 1", repr(n))
        self.size = int(n)

    def run(self, function: Callable[[Communicator], T]) -> list[T]:
        """Calls `function(comm)` on all ranks and waits for them.

        Args:
            function: gets its rank's communicator. Runs under the caller's context (`np.errstate`, for one).

        Returns:
            What the ranks returned, in rank order.

        Raises:
            Exception: what the lowest of the failing ranks raised. The other ranks get a KilterError in the call
                where they wait for it, or in their next.
            KilterError: a rank returned while another waited for it, or ranks made calls that do not belong together.
        """
        meeting = _Meeting(self.size)
        results: dict[int, T] = {}
        errors: dict[int, BaseException] = {}

        def work(rank: int) -> None:
            try:
                results[rank] = function(_Rank(meeting, rank))
            except BaseException as error:  # handed to the caller
                errors[rank] = error
            finally:
                meeting.leave(rank)

        threads = [Thread(target=copy_context().run, args=(work, rank), daemon=True) for rank in range(self.size)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C, or no thread to be had: ranks that wait must not wait on
            meeting.leave(self.size)
            raise
        if errors:
            raise min(errors.items(), key=lambda item: (isinstance(item[1], LeftError), item[0]))[1]
        return [results[rank] for rank in range(self.size)]


class _Offer(NamedTuple):
    """What a rank brings to a meeting."""

    call: str
    array: Any  # a copy: its owner may go on before others have read it

    def __str__(self) -> str:
        return self.call if self.array is None else f"{self.call} of {self.array.dtype} {self.array.shape}"


class _Meeting:
    """Where all ranks put something down, wait for each other, and see what everyone put down."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.condition = Condition()
        self.offers: dict[int, _Offer] = {}
        self.met: list[_Offer] = []
        self.rounds = 0
        self.left: list[int] = []

    def leave(self, rank: int) -> None:
        """Says that a rank takes no further part."""
        with self.condition:
            self.left.append(rank)
            self.condition.notify_all()

    def exchange(self, rank: int, offer: _Offer) -> list[Any]:
        """Returns the arrays of all ranks, which must have made the same call."""
        with self.condition:
            self.offers[rank] = offer
            now = self.rounds
            if len(self.offers) == self.size:
                # The next round needs every rank, so nobody overwrites this before all have taken it.
                self.met = [self.offers[r] for r in range(self.size)]
                self.offers = {}
                self.rounds += 1
                self.condition.notify_all()
            self.condition.wait_for(lambda: self.rounds > now or self.left)
            if self.rounds == now:
                raise LeftError(f"{offer.call}: expected all {self.size} ranks, rank {self.left[0]} has left")
            met = self.met
        check_alike([str(theirs) for theirs in met])
        return [theirs.array for theirs in met]


class _Rank:
    """The communicator of one rank of `Threads`."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.size
        self._meeting = meeting

    def __deepcopy__(self, memo: object) -> _Rank:
        return self  # the copy of a model speaks for the same rank

    def all_reduce(self, a: Any) -> Any:
        first, *rest = self._exchange("all_reduce", writable(a))
        a[...] = add_up([first.copy(), *rest])
        return a

    def broadcast(self, a: Any, root: int = 0) -> Any:
        root = of_rank(root, self.size)
        a[...] = self._exchange(f"broadcast from {root}", writable(a))[root]
        return a

    def all_gather(self, a: Any) -> Any:
        return backend_of(_check.array("a", a)).xp.stack(self._exchange("all_gather", a))

    def barrier(self) -> None:
        self._meeting.exchange(self.rank, _Offer("barrier", None))

    def _exchange(self, call: str, a: Any) -> list[Any]:
        return self._meeting.exchange(self.rank, _Offer(call, a.copy()))
