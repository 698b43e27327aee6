"""What a step did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kilter._backend import host


class StepReport(NamedTuple):
    """What a step did.

    `calls` counts the calls of `step` so far, `applied` those that changed the parameters, `grad_norm` is the Euclidean
    norm of all gradients before clipping (None unless it was asked for), `skipped` says that this step changed nothing.
    Of arrays on a GPU they are read when they are asked for: all but `calls` then wait for the step.
    """

    calls: int
    applied: int
    grad_norm: float | None
    skipped: bool


class DeviceReport(StepReport):
    """A report whose numbers lie on the device; that of a captured step tells of the last replay."""

    def __new__(cls, *_: Any) -> DeviceReport:
        """Returns a tuple whose own entries nobody reads."""
        return super().__new__(cls, 0, 0, None, False)

    def __init__(self, calls: int, row: Any, measured: bool, skips: bool, captured: bool) -> None:
        self._calls, self._row = calls, row  # (applied, norm, skipped)
        self._measured, self._skips, self._captured = measured, skips, captured
        self._known: list[float] | None = None

    def _read(self) -> list[float]:
        if self._known is None or self._captured:
            self._known = host(self._row).tolist()
        return self._known

    @property
    def calls(self) -> int:
        """How many calls of `step` there have been."""
        return self._calls

    @property
    def applied(self) -> int:
        """How many of them changed the parameters."""
        return int(self._read()[0])

    @property
    def grad_norm(self) -> float | None:
        """The norm of all gradients before clipping, if it was asked for."""
        return self._read()[1] if self._measured else None

    @property
    def skipped(self) -> bool:
        """Whether this step changed nothing."""
        return self._skips and self._read()[2] != 0.0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.calls, self.applied, self.grad_norm, self.skipped))

    def __getitem__(self, index: Any) -> Any:
        return (*self,)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and (*self,) == (*other,)

    def __hash__(self) -> int:
        return hash((*self,))

    def __repr__(self) -> str:
        return repr(StepReport(*self))
