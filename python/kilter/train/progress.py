"""A progress bar for a whole run."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from kilter.train._extra import extra
from kilter.train.state import Callback, State

_REFRESH = 0.1  # seconds


class Progress(Callback):
    """One line on stderr: epoch, share done, time left, loss, accuracy and images per second."""

    bar: Any = None

    def on_start(self, state: State) -> None:
        """Open the bar."""
        self.drawn = self.since = time.perf_counter()
        self.done, self.rate = 0, 0.0
        self.bar = extra("tqdm").tqdm(
            total=state.epochs * state.steps,
            initial=state.step,
            desc=f"epoch {state.epoch + 1}/{state.epochs}",
            bar_format="{desc} |{bar}| {remaining} left{postfix}",
            **_size(),
            mininterval=0,
            miniters=1,
        )

    def on_step(self, state: State) -> None:
        """Redraw, at most ten times a second."""
        self.done += 1
        now = time.perf_counter()
        if now - self.drawn < _REFRESH:
            return
        self.rate = state.running.samples / (now - self.since)
        self._draw(state, now)

    def on_epoch(self, state: State) -> None:
        """Take the speed of the whole epoch, without its validation."""
        self.rate = state.history[-1]["images_per_second"] or 0.0
        self.since = time.perf_counter()

    def on_end(self, state: State) -> None:
        """Leave the last figures."""
        if self.bar is not None:
            self._draw(state, 0.0)
            self.bar.close()

    def _draw(self, state: State, now: float) -> None:
        self.drawn = now
        parts = [f"loss {state.running.loss:.4f}"]
        if state.running.accuracy is not None:
            parts.append(f"acc {state.running.accuracy:.1%}")
        last = state.history[-1] if state.history else {}
        if last.get("valid_accuracy") is not None:
            parts.append(f"valid {last['valid_accuracy']:.1%}")
        parts.append(f"{self.rate:,.0f} img/s")
        self.bar.set_description_str(f"epoch {state.epoch + 1}/{state.epochs}", refresh=False)
        self.bar.set_postfix_str(" ".join(parts), refresh=False)
        self.bar.update(self.done)
        self.done = 0


def _size() -> dict[str, Any]:
    """Follow the size of the terminal, unless it does not know it (0 columns)."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, AttributeError):
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
