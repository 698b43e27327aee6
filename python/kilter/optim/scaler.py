"""Loss scaling for 16-bit gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import Backend, host
from kilter._check import fail

__all__ = ["LossScaler"]


class LossScaler:
    """A factor on the loss that keeps small gradients above the 16-bit types' smallest value, adjusted as it goes.

    Multiply the loss (or dlogits) by `scale`; hand the scaler to `opt.step`, which divides the gradients by it. After
    `interval` clean steps the scale grows; a step with a non-finite gradient is skipped and the scale backs off. From
    the first step of an optimizer on a GPU, the scale lies there.

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
        self._scale: float = _check.number("init", init, self.minimum, 2.0**127)
        self.growth = _check.number("growth", growth, 1.0)
        self.backoff = _check.number("backoff", backoff, 0.0, 1.0, open_low=True)
        if not isinstance(interval, int) or interval < 1:
            fail("interval", "a whole number of at least 1", repr(interval))
        self.interval = interval
        self._clean = 0
        self._there: Any = None  # (scale, clean steps) on a device, once an optimizer there has taken it

    @property
    def scale(self) -> Any:
        """What to multiply the loss with; on a GPU a float32 array without axes, for which nothing waits."""
        return self._scale if self._there is None else self._there[0].astype("float32")

    @scale.setter
    def scale(self, value: float) -> None:
        self._set(value, self.clean)

    @property
    def clean(self) -> int:
        """How many clean steps there have been since the scale changed."""
        return self.here()[1]

    def here(self) -> tuple[float, int]:
        """Returns the scale and the clean steps, for which the host waits if they are on a device."""
        if self._there is None:
            return self._scale, self._clean
        scale, clean = host(self._there).tolist()
        return scale, int(clean)

    def there(self, backend: Backend) -> Any:
        """Returns the array (scale, clean steps) on the device, where they are from now on."""
        if self._there is None:
            self._there = backend.xp.asarray(np.array([self._scale, self._clean], "float64"))
        return self._there

    def _set(self, scale: float, clean: int) -> None:
        if self._there is None:
            self._scale, self._clean = scale, clean
        else:
            self._there.set(np.array([scale, clean], "float64"))

    def update(self, finite: bool) -> None:
        """Counts a step whose gradients were all finite, or backs off."""
        scale, clean = self.here()
        if not finite:
            self._set(max(scale * self.backoff, self.minimum), 0)
        elif clean + 1 == self.interval:
            # 2^127 is the largest power of two whose product with 1 is a float32.
            self._set(min(scale * self.growth, 2.0**127), 0)
        else:
            self._set(scale, clean + 1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and the clean steps since it changed."""
        return dict(zip(("scale", "clean"), self.here(), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            KilterError: an entry is missing or does not fit; nothing has changed then.
        """
        _check.entries(state, {"scale", "clean"})
        scale = _check.number("state[scale]", state["scale"], 0.0, 2.0**127, open_low=True)
        clean = int(_check.number("state[clean]", state["clean"], 0.0, self.interval - 1))
        self._set(scale, clean)
