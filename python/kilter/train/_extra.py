"""Optional packages, imported where they are used."""

from importlib import import_module
from typing import Any

from kilter._check import KilterError

EXTRA = ("safetensors", "matplotlib", "tqdm")


def extra(name: str) -> Any:
    """Import a module of the extra `train`, or raise a KilterError that says how to get it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise KilterError(f"{package} is not installed: pip install 'kilter[train]'") from None
