"""Command lines whose mistakes are one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn, TypeAlias

from kilter._check import KilterError

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


class Parser(argparse.ArgumentParser):
    """A parser that raises a KilterError."""

    def error(self, message: str) -> NoReturn:
        """Raise the message, with where to read on."""
        raise KilterError(f"{message} (see {self.prog} --help)")
