"""The text of kernels: what a module is made of, and what its kernels take.

A kernel is declared `KT_KERNEL(threads) name(parameters) {`; the host reads the types of its parameters there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

C_NAMES = {"float64": "double", "float32": "float", "float16": "half", "bfloat16": "bfloat16"}
DTYPES = tuple(C_NAMES)

_DECLARED = re.compile(
    r"^KT_KERNEL\((?P<bounds>[^)]*)\)\s+(?:KT_CLUSTER\((?P<cluster>\w+)\)\s+)?"
    r"(?P<name>\w+)\((?P<parameters>[^)]*)\)\s*\{",
    re.MULTILINE,
)
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_SCALARS = re.compile(r"Scalars<(\w+)>")
_NUMBERS = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
    "unsigned char": np.uint8,
}


class Limits(NamedTuple):
    """What a compiled kernel may cost; tests/cuda_check.py compiles it and looks."""

    registers: int
    vectorised: bool = False  # at full width its data move in 16-byte words ...
    # ... but for so many stores to global memory: tails, results of a reduction; of a variant, where that differs.
    scalar_stores: int | Callable[[dict[str, Any]], int] = 0
    reduces: bool = False  # it writes such results alone
    newer: int = 0  # registers on sm_100 and later, where those are more

    def most(self, arch: int) -> int:
        """Returns how many registers a kernel may have on sm_<arch>."""
        return max(self.registers, self.newer if arch >= 100 else 0)


class Family(NamedTuple):
    """The kernels of one .cu file."""

    name: str
    kernels: Mapping[str, Limits]
    types: Mapping[str, tuple[str, ...]] = {"T": DTYPES}
    macros: Mapping[str, tuple[int, ...]] = {}
    options: tuple[str, ...] = ()
    built: Callable[[dict[str, Any]], bool] = lambda variant: True  # whether operations ask for a set of macros
    rare: Callable[[dict[str, Any]], bool] = lambda variant: False  # whether only the full check compiles it
    least: int = 0  # the compute capability that it needs: 90 for sm_90

    def variants(self) -> Iterator[dict[str, Any]]:
        """Yields the macros of every module that can be built; V is at most a word of 16 bytes of T."""
        names = [*self.types, *self.macros]
        for values in itertools.product(*self.types.values(), *self.macros.values()):
            found: dict[str, Any] = dict(zip(names, values, strict=True))
            if found.get("V", 1) <= widest(found.get("T", "float32")) and self.built(found):
                yield found


class Parameter(NamedTuple):
    """What a kernel takes: a number of `dtype`, a vector of `length` scalars, or a pointer to elements of `dtype`."""

    name: str
    kind: str  # "number", "scalars" or "pointer"
    dtype: Any  # None: a pointer to structs
    length: int = 0


class Declaration(NamedTuple):
    """A kernel's parameters, the most threads of a block, and how many blocks are a cluster."""

    parameters: tuple[Parameter, ...]
    threads: int
    cluster: int


def widest(dtype: str) -> int:
    """Returns how many elements of a dtype fill a word of 16 bytes."""
    return {"float64": 2, "float32": 4}.get(dtype, 8)


@cache
def text(family: str) -> str:
    """Returns the text of a family's module, with the lines of each file numbered from one.

    Lines `#include "name.cuh"` stand for that file: CuPy's cache of compiled modules does not look into included ones.
    """
    return "\n".join(_file(name) for name in ("common.cuh", f"{family}.cu"))


def _file(name: str) -> str:
    found = (files("kilter.cuda") / name).read_text()

    def inlined(line: re.Match[str]) -> str:
        return f'{_file(line[1])}\n#line {found.count(chr(10), 0, line.start()) + 2} "{name}"'

    return f'#line 1 "{name}"\n' + _INCLUDE.sub(inlined, found)


def dtype_of(name: str) -> Any:
    """Returns the dtype of that name."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def macros(variant: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a variant as options of a compiler: T="float16" is -DKT_T=half."""
    return tuple(f"-DKT_{name}={C_NAMES.get(value, value)}" for name, value in variant.items())


@cache
def names(family: str) -> tuple[str, ...]:
    """Returns the kernels that a family's text declares."""
    return tuple(found["name"] for found in _DECLARED.finditer(text(family)))


@cache
def parameters_text(family: str, kernel: str) -> str:
    """Returns a kernel's parameters as its text declares them."""
    return next(found["parameters"] for found in _DECLARED.finditer(text(family)) if found["name"] == kernel)


def declarations(family: str, variant: Mapping[str, Any]) -> dict[str, Declaration]:
    """Returns what each kernel of a variant takes."""
    types: dict[str, Any] = dict(_NUMBERS)
    types |= {f"KT_{name}": dtype_of(value) for name, value in variant.items() if value in C_NAMES}
    data = types.setdefault("KT_T", np.dtype(np.float32))
    types["kt_real"] = np.dtype(np.float64) if data == np.float64 else np.dtype(np.float32)
    types["kt_index"] = np.int64 if variant.get("INDEX") == 64 else np.int32
    types |= {"half": dtype_of("float16")}
    numbers = {f"KT_{name}": value for name, value in variant.items() if isinstance(value, int)}
    return {
        found["name"]: Declaration(
            tuple(_parameter(one, types, numbers) for one in found["parameters"].split(",")),
            _number(found["bounds"].split(",")[0].strip(), numbers),
            _number(found["cluster"] or "1", numbers),
        )
        for found in _DECLARED.finditer(text(family))
    }


def _number(declared: str, numbers: Mapping[str, int]) -> int:
    return numbers[declared] if declared in numbers else int(declared)


def _parameter(declared: str, types: Mapping[str, Any], numbers: Mapping[str, int]) -> Parameter:
    words = [word for word in declared.replace("*", " * ").split() if word not in ("const", "__restrict__")]
    name, kind = words.pop(), " ".join(words)
    if kind.endswith("*"):
        found = types.get(kind.removesuffix("*").strip())
        return Parameter(name, "pointer", None if found is None else np.dtype(found))
    if scalars := _SCALARS.fullmatch(kind):
        count = scalars[1]
        return Parameter(name, "scalars", None, numbers[count] if count in numbers else int(count))
    return Parameter(name, "number", np.dtype(types[kind]).type)
