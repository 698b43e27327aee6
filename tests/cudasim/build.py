"""Builds kernels for the CPU: the very text that NVRTC compiles, below the simulator's header."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from kilter.cuda import source

HERE = Path(__file__).parent
# Where libraries are looked for; they are built in the first of these folders.
_OWN = f"{tempfile.gettempdir()}/kilter-cudasim-{os.getuid()}"
PLACES = [Path(place) for place in os.environ.get("KILTER_CUDASIM_CACHE", _OWN).split(os.pathsep)]
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-fno-gnu-unique", "-mf16c", "-w", f"-I{HERE}")
# With the sanitizers' libraries loaded before Python's; tests/cuda_asan.py does that.
SANITIZED = os.environ.get("KILTER_CUDASIM_ASAN") == "1"
if SANITIZED:
    FLAGS += ("-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")


def compiled(text, flags=(), name="module", using=()):
    """The path of a shared library made of C++ text, built once for the same text, flags and files that it uses."""
    flags = (*FLAGS, *flags)
    used = "".join(path.read_text() for path in using)
    key = hashlib.sha256("\0".join((text, used, *flags)).encode()).hexdigest()[:20]
    found = [place / f"{name}-{key}.so" for place in PLACES]
    library = next((path for path in found if path.exists()), found[0])
    if not library.exists():
        PLACES[0].mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PLACES[0]) as folder:
            path = Path(folder) / f"{name}.cpp"
            path.write_text(text)
            command = ["g++", *flags, str(path), "-o", f"{path}.so"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
            os.replace(f"{path}.so", library)  # whole, or not at all: another process may build the same
    return library


@cache
def device(flags=()):
    """The scheduler, which every module calls."""
    path = compiled((HERE / "device.cpp").read_text(), flags, "device", [HERE / "device.hpp"])
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def module(name, text, options, flags=()):
    """The library of a family's text; options of NVRTC that are no macros are left out."""
    device(flags)
    exports = "".join(f"SIM_EXPORT({kernel})\n" for kernel in source.names(name))
    macros = tuple(option for option in options if option.startswith("-D"))
    used = [HERE / "shim.hpp", HERE / "device.hpp"]
    options = (*flags, *macros, "-fvisibility=hidden")
    return ctypes.PyDLL(str(compiled(f'#include "shim.hpp"\n{text}\n{exports}', options, name, used)))
