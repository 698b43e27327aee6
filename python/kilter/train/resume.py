"""The checkpoints that a run continues from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kilter._check import KilterError, fail
from kilter._interrupt import ctrl_c_waits
from kilter.train import checkpoint
from kilter.train._extra import extra
from kilter.train.checkpoint import States


class Checkpoints:
    """The last two checkpoints of a run: last.safetensors and last.previous.safetensors in a folder.

    Parameters
    ----------
    folder
        Made with its parents at the first checkpoint.
    every
        Write one after so many optimizer steps too; None after each epoch alone.

    Raises
    ------
    KilterError
        An argument is not as above, or safetensors is not installed.
    """

    def __init__(self, folder: checkpoint.Path, *, every: int | None = None) -> None:
        extra("safetensors.numpy")
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            fail("every", "None or a whole number of at least 1", repr(every))
        self.folder, self.every = Path(folder), every
        self.last, self.previous = self.folder / "last.safetensors", self.folder / "last.previous.safetensors"
        self._keep = True  # whether `last` is good enough to take the place of `previous`

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return self.last.exists() or self.previous.exists()

    def save(self, states: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]) -> None:
        """Write a checkpoint; the one before is kept.

        Raises
        ------
        OSError
            The folder cannot be written to, or the disk is full; the checkpoints that are there stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ctrl_c_waits():
            checkpoint.write(self.last, states, metadata, keep=self.previous if self._keep else None)
            self._keep = True

    def load(self, take: Callable[[States, dict[str, Any]], None], *, warn: bool = True) -> bool:
        """Hand the last checkpoint to `take`, or the one before if that is missing, damaged or does not fit.

        Parameters
        ----------
        take
            `take(states, metadata)` raises a KilterError, and changes nothing, if they do not fit.
        warn
            Say it by a UserWarning if the one before the last was taken.

        Returns
        -------
        Whether there was one.

        Raises
        ------
        KilterError
            None of those that are there can be used.
        """
        refused = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                take(*checkpoint.read(path))
            except KilterError as error:
                named = str(error) if str(path) in str(error) else f"{path}: {error}"
                refused.append(named)
                continue
            if refused:
                self._keep = False
                if warn:
                    warnings.warn(f"{refused[0]}; continuing from {path.name}", stacklevel=4)
            return True
        if refused:
            raise KilterError("; ".join(refused))
        return False

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run."""
        for path in (self.last, self.previous):
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a program that was killed while it wrote has left."""
        checkpoint.sweep(self.last)
