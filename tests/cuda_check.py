"""Compiles every CUDA module without a device and looks at what came out.

    python tests/cuda_check.py [--all] [FAMILY ...]      sm_75 and sm_90; with --all every architecture

A module must compile without a warning; no kernel may spill, use a stack or more registers than its limit. Kernels that
are registered as vectorised move their data in words of 16 bytes, but for the scalar stores that the registry counts.
Modules built with -fmad=false hold no floating-point fma and no approximation. NVRTC comes from pip's wheels.
"""

import argparse
import ctypes
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import files

from kilter.cuda import source
from kilter.cuda.ops import MODULES

QUICK = (75, 90)
ALL = (75, 80, 86, 89, 90, 100, 103, 120)
OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space")  # as CuPy adds them

_REPORT = re.compile(r"(?:Function properties for|Compiling entry function) '?(\w+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_ENTRY = re.compile(r"\.visible \.entry (\w+)\(.*?\n\}", re.DOTALL)
_MOVE = re.compile(r"\b(ld|st)\.global\S*?((?:\.v[248])?)\.([a-z]+)(\d+)\s")


@cache
def nvrtc():
    """The compiler's library, from the wheel nvidia-cuda-nvrtc."""
    paths = [f for f in files("nvidia-cuda-nvrtc") if re.fullmatch(r"libnvrtc\.so\.\d+", f.name)]
    return ctypes.CDLL(str(paths[0].locate()))


def _text_of(program, size_name, name):
    size = ctypes.c_size_t()
    getattr(nvrtc(), size_name)(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc(), name)(program, buffer)
    return buffer.value.decode()


def compile_text(text, options):
    """(log, PTX) of a text; the log of a failed compilation is raised."""
    program, given = ctypes.c_void_p(), [option.encode() for option in options]
    nvrtc().nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"module.cu", 0, None, None)
    failed = nvrtc().nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    try:
        log = _text_of(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
        if failed:
            raise SyntaxError(log)
        return log, _text_of(program, "nvrtcGetPTXSize", "nvrtcGetPTX")
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


def usage(log):
    """{kernel: (registers, stack, spills)} from the assembler's report."""
    found, name, stack = {}, None, (0, 0)
    for line in log.splitlines():
        if match := _REPORT.search(line):
            name = match[1]
        if match := _STACK.search(line):
            stack = (int(match[1]), int(match[2]) + int(match[3]))
        if match := _USED.search(line):
            found[name] = (int(match[1]), *stack)
    return found


def warnings(log):
    """What the compiler's log says beside the report on usage."""
    harmless = ("ptxas info", "bytes stack frame", "bytes gmem")
    return [line for line in log.splitlines() if line.strip(" \0") and not any(word in line for word in harmless)]


def moves(body):
    """Counter-like lists of a kernel's accesses to global memory: [(ld or st, bytes)]."""
    return [(kind, int((vector or ".v1")[2:]) * int(bits) // 8) for kind, vector, _, bits in _MOVE.findall(body)]


def faults_of_ptx(family, variant, ptx, arch=0):
    """What is wrong with a module's PTX; for sm_100 and later the compiler may join scalar stores."""
    bodies = {match[1]: match[0] for match in _ENTRY.finditer(ptx)}
    if set(bodies) != set(family.kernels):
        yield f"kernels {sorted(bodies)}, the registry has {sorted(family.kernels)}"
    if "-fmad=false" in family.options:
        found = re.findall(r"\b(?:fma|mad)\.\S*f(?:16|32|64)|\b\w+\.\S*approx\S*", ptx)
        if found:
            yield f"contracted or approximate arithmetic: {sorted(set(found))}"
    widest = source.widest(variant.get("T", "float32"))
    for name, body in bodies.items():
        limits = family.kernels.get(name)
        if ".local" in body:
            yield f"{name}: local memory"
        if not limits or not limits.vectorised or variant.get("V", widest) != widest:
            continue
        found = moves(body)
        stores = [size for kind, size in found if kind == "st"]
        reads_data = "const KT_T*" in source.parameters_text(family.name, name)
        if (16 not in stores and not limits.reduces) or (reads_data and ("ld", 16) not in found):
            yield f"{name}: no words of 16 bytes: {found}"
        scalar = sum(size < 16 for size in stores)
        wanted = limits.scalar_stores(variant) if callable(limits.scalar_stores) else limits.scalar_stores
        if scalar > wanted or (scalar < wanted and arch < 100):
            yield f"{name}: {scalar} scalar stores, {wanted} are registered"


def check(family, variant, arch, text=None):
    """The faults of one module on one architecture, and its kernels' registers."""
    text = text or source.text(family.name)
    options = (*OPTIONS, *source.macros(variant), *family.options)
    try:
        log, ptx = compile_text(text, (*options, f"-arch=sm_{arch}", "--ptxas-options=-v"))
    except SyntaxError as error:
        return [str(error)], {}
    used = usage(log)
    found = [f"warning: {line}" for line in warnings(log)]
    for name, (registers, stack, spills) in used.items():
        limits = family.kernels.get(name)
        if limits and registers > limits.most(arch):
            found.append(f"{name}: {registers} registers, {limits.most(arch)} are allowed")
        if stack or spills:
            found.append(f"{name}: {stack} bytes of stack, {spills} of spills")
    found += [f"{name}: no report of its usage" for name in family.kernels if name not in used]
    return found + list(faults_of_ptx(family, variant, ptx, arch)), used


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--all", action="store_true", help="every architecture, not only sm_75 and sm_90")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)
    families = [f for module in MODULES for f in module.FAMILIES if not chosen.families or f.name in chosen.families]
    cases = [
        (f, v, a)
        for f in families
        for v in f.variants()
        for a in (ALL if chosen.all else QUICK)
        if a >= f.least and (chosen.all or not f.rare(v))
    ]
    start, most, failed = time.perf_counter(), {}, 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for (family, variant, arch), (found, used) in zip(
            cases, pool.map(check, *zip(*cases, strict=True)), strict=True
        ):
            for name, (registers, *_) in used.items():
                most[family.name, name] = max(most.get((family.name, name), 0), registers)
            failed += bool(found)
            for fault in found:
                print(f"{family.name} {variant} sm_{arch}: {fault}")
    for family, name in sorted(most):
        print(f"{family:12s} {name:28s} {most[family, name]:4d} registers")
    print(f"{len(cases)} modules, {failed} with faults, {time.perf_counter() - start:.1f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
