"""Loss scaling for 16-bit gradients."""

from __future__ import annotations

import math
from typing import Any

from kilter import _check
from kilter._check import fail

__all__ = ["LossScaler"]


class LossScaler:
    """A factor on the loss that keeps small gradients above the 16-bit types' smallest value, adjusted as it goes.

    Multiply the loss (or dlogits) by `scale`; hand the scaler to `opt.step`, which divides the gradients by it. After
    `interval` clean steps the scale grows; a step with a non-finite gradient is skipped and the scale backs off.

    Args:
        init: the first scale.
        growth: the factor after `interval` clean steps in a row.
        backoff: the factor after a step that was skipped.
        interval: how many clean steps it takes to grow.
        minimum: the scale never falls below this.

    Raises:
        KilterError: an argument does not fit.

    References:
        Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    """

    def __init__(
        self,
        init: float = 65536.0,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        minimum: float = 1.0,
    ) -> None:
        self.minimum = _check.number("minimum", minimum, 0.0, math.inf, open_low=True)
        self.scale = _check.number("init", init, self.minimum, 2.0**127)
        self.growth = _check.number("growth", growth, 1.0)
        self.backoff = _check.number("backoff", backoff, 0.0, 1.0, open_low=True)
        if not isinstance(interval, int) or interval < 1:
            fail("interval", "a whole number of at least 1", repr(interval))
        self.interval = interval
        self.clean = 0

    def update(self, finite: bool) -> None:
        """Counts a step whose gradients were all finite, or backs off."""
        if not finite:
            self.scale = max(self.scale * self.backoff, self.minimum)
            self.clean = 0
            return
        self.clean += 1
        if self.clean == self.interval:
            # 2^127 is the largest power of two whose product with 1 is a float32.
            self.scale = min(self.scale * self.growth, 2.0**127)
            self.clean = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and the clean steps since it changed."""
        return {"scale": self.scale, "clean": self.clean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            KilterError: an entry is missing or does not fit; nothing has changed then.
        """
        _check.entries(state, {"scale", "clean"})
        scale = _check.number("state[scale]", state["scale"], 0.0, 2.0**127, open_low=True)
        self.clean = int(_check.number("state[clean]", state["clean"], 0.0, self.interval - 1))
        self.scale = scale
