"""Reads the machine code of every kernel: wide registers, nothing fused, nothing from libm, all inlined.

    python tests/check_assembly.py                  builds the extension with symbols into target/assembly
    python tests/check_assembly.py LIBRARY          reads a library that was built with symbols

A kernel is compiled once per CPU level behind a door of `kilter_core::simd`. The doors that must exist follow
from the sources: each `impl Kernel` times the dtypes, rules and variates that its parameters may be. What
a door calls was not inlined, so it has the registers of the baseline: it may allocate or panic, but
may compute only where the sources say `#[inline(never)]`. Needs cargo, objdump and nm.
"""

import os
import platform
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "rust/core/src"
DTYPES = {"f64": "f64", "f32": "f32", "f16": "half::binary16::f16", "bf16": "half::bfloat::bf16"}
LIBM = re.compile(
    r"(ceil|cos|exp|exp2|expm1|floor|fma|fmax|fmin|fmod|ldexp|log|log10|log1p|log2|nearbyint|pow|rint|round|roundeven"
    r"|sin|sincos|sqrt|tan|tanh|trunc)[fl]?$"
)

# Fewest instructions that compute in 256-bit registers; integer ones where a kernel has no others.
WIDE = 4
ADDS = {"stored::Sum"}  # one addition and no more: half as many
INTEGERS = {"init::Words"}
# They convert, add once per element, or hand on to a kernel with a door of its own.
MOVES = {"probe::Copy", "stored::Load", "stored::Store", "optim::Step"}
# They run other kernels, each through its own door, and what lies between.
DRIVERS = {
    "norm::groups::Forward",
    "norm::groups_backward::Backward",
    "norm::planes::Stats",
    "norm::planes_write::Apply",
    "norm::planes::Train",
    "norm::planes_backward::Reduce",
    "norm::planes_backward::Apply",
    "norm::planes_backward::Backward",
}
# One kernel alone runs them, and compilers put them inside its door.
INSIDE = {"exp::Exps", "exp::Lns"}
# Between these and what kernels compute in.
NARROW = ("f16", "bf16")

FLOAT = re.compile(r"v?(?:add|sub|mul|div|sqrt|min|max)(ps|pd|ss|sd)$")
INTEGER = re.compile(r"v?p(?:add|sub|mul|and|or|xor|sll|srl|sra)\w*$")
FORBIDDEN = {
    "fused": re.compile(r"vfn?m(?:add|sub)"),
    "approximate": re.compile(r"v?(?:rsqrt|rcp)(?:14)?(?:ps|ss|pd|sd)"),
    "hardware bfloat16": re.compile(r"vcvtne2\w*bf16|vdpbf16"),
}
# It takes denormals for zeros, so that none may be among its numbers.
ROUNDS, LOOKS = "vcvtneps2bf16", "vfpclassps $0x20,"
# They end the program: what they do on the way needs no speed.
ENDS = re.compile(r"panic|_fail\b|_failed\b|handle_error|handle_alloc_error|expect_failed|unwind|begin_unwind")


@dataclass
class Function:
    """What one function of the library consists of."""

    names: list[str]
    count: Counter = field(default_factory=Counter)
    forbidden: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)

    @property
    def faults(self):
        """Kinds of instructions that it must not have."""
        return sorted(
            self.forbidden | {"unguarded bfloat16"} if self.count["rounds"] > self.count["looks"] else self.forbidden
        )

    @property
    def computes(self):
        """How many floating-point operations it has, of any width."""
        return sum(self.count[kind] for kind in ("ymm", "xmm", "scalar"))


def note(function, mnemonic, operands, slots):
    """Adds one instruction to what is known of a function."""
    wide = "%ymm" in operands or "%zmm" in operands
    if found := FLOAT.match(mnemonic):
        kind = "scalar" if found[1] in ("ss", "sd") else "ymm" if wide else "xmm"
        function.count[kind] += 1
    elif wide and INTEGER.match(mnemonic):
        function.count["integer"] += 1
    elif wide:
        function.count["other"] += 1
    function.forbidden |= {name for name, pattern in FORBIDDEN.items() if pattern.match(mnemonic)}
    function.count["rounds"] += mnemonic == ROUNDS
    function.count["looks"] += f"{mnemonic} {operands}".startswith(LOOKS)
    if target := re.search(r"# ([0-9a-f]+) <", operands):
        function.calls |= {name for name in [slots.get(int(target[1], 16))] if name}
    elif mnemonic.startswith(("call", "jmp")) and (target := re.match(r"[0-9a-f]+ <(.*)>$", operands)):
        # A jump to a place inside a function has its offset in the name, which no function has.
        function.calls.add(target[1])


def read(disassembly, names=None, slots=None):
    """Returns every function by name, from the lines of `objdump -d -C --no-show-raw-insn`.

    `names` are all names at an address, of which objdump prints one; `slots` names what the cells of the
    offset table point to.
    """
    names, slots, functions, function = names or {}, slots or {}, {}, None
    for line in disassembly:
        if start := re.match(r"([0-9a-f]+) <(.*)>:$", line):
            function = Function(names.get(int(start[1], 16), [start[2]]))
            functions |= dict.fromkeys([start[2], *function.names], function)
        elif function and (found := re.match(r"\s+[0-9a-f]+:\t(?:(?:lock|rep|notrack|data16) )*(\S+)\s*(.*)", line)):
            note(function, found[1], found[2].rstrip(), slots)
    return functions


def doors(functions, level):
    """The functions through which kernels are entered at `level`, by the kernel's type."""
    found = {}
    for name, function in functions.items():
        if door := re.fullmatch(rf"kilter_core::simd::{level}::<kilter_core::(.*)>", name):
            found[door[1]] = function
    return found


@cache
def implementations(trait):
    """(generics, path of the type) of every `impl trait for` in the core."""
    found = []
    for path in sorted(SOURCES.rglob("*.rs")):
        module = "::".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix("::mod")
        pattern = rf"impl(?:<(?P<generics>[^{{]*?)>)?\s+{trait}(?:<[^{{]*?>)? for (?P<name>\w+)"
        for match in re.finditer(pattern, path.read_text()):
            found.append((match["generics"] or "", f"{module}::{match['name']}"))
    return found


def wanted():
    """Patterns of the kernels that must exist, by a short name."""
    dtypes = {short: re.escape(full) for short, full in DTYPES.items()}
    kinds = {
        ": Real": {short: dtypes[short] for short in ("f64", "f32")},
        ": Storage": dtypes,
        "Rule<": {path: re.escape(path) for _, path in implementations("Rule")},
        "Variate": {path: re.escape(path) for _, path in implementations("Variate")},
    }
    patterns = {}
    for generics, path in implementations("Kernel"):
        choices = [kind.items() for mark, kind in kinds.items() if mark in generics]
        for chosen in product(*choices):
            if path.startswith("stored::") and chosen[-1][0] not in NARROW:
                continue
            short = ", ".join(name.split("::")[-1] for name, _ in chosen)
            inside = r"\b.*\b".join(pattern for _, pattern in chosen)
            patterns[f"{path}<{short}>" if short else path] = rf"{path}<{inside}\b.*" if short else path
    return patterns


@cache
def outside():
    """Names of the functions that the sources keep outside the doors on purpose."""
    marked = re.compile(r"#\[inline\(never\)\]\s+(?:#\[.*\]\s+)*(?:pub(?:\(\w+\))? )?fn (\w+)")
    return {name for path in SOURCES.rglob("*.rs") for name in marked.findall(path.read_text())}


def last(name):
    """The function's own name in a symbol, without what is in angle brackets."""
    depth, kept = 0, []
    for character in name.replace("->", ""):
        depth += character == "<"
        if not depth:
            kept.append(character)
        depth -= character == ">"
    return "".join(kept).rstrip(":").split("::")[-1]


def reached(functions, door):
    """Names of what a door calls, and what that calls, and so on; not past a call that ends the program."""
    seen, todo = set(), sorted(door.calls)
    while todo:
        name = todo.pop()
        if name not in seen and not ENDS.search(name):
            seen.add(name)
            todo += functions[name].calls if name in functions else ()
    return sorted(seen)


def faults(functions, kernel, door, level):
    """What is wrong with a kernel's door, in words."""
    for name in door.faults:
        yield f"{name} instructions"
    driver = kernel.split("<")[0] in DRIVERS
    if level != "baseline" and not driver and kernel.split("<")[0] not in MOVES:
        wide = door.count["integer" if kernel in INTEGERS else "ymm"]
        if wide < (WIDE // 2 if kernel.split("<")[0] in ADDS else WIDE):
            yield f"only {wide} instructions compute in wide registers"
    for name in reached(functions, door):
        bare = name.split("@")[0]
        if LIBM.match(bare):
            yield f"calls {bare} of libm"
        elif name not in functions:
            continue
        elif functions[name].faults:
            yield f"{', '.join(functions[name].faults)} instructions in {name}"
        elif functions[name].computes and not (driver or ("kilter_core::" in name and last(name) in outside())):
            yield f"left outside the door: {name} ({functions[name].computes} floating-point operations)"


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def build():
    """Builds the extension with symbols and returns its path."""
    target = ROOT / "target/assembly"
    env = os.environ | {
        "CARGO_PROFILE_RELEASE_STRIP": "false",
        "RUSTFLAGS": "-C symbol-mangling-version=v0",
        "PYO3_PYTHON": sys.executable,
    }
    command = ["cargo", "build", "--release", "--locked", "-p", "kilter-py", "--target-dir", str(target)]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    return target / "release/lib_kilter.so"


def load(library):
    """Returns the functions of a library."""
    names, slots = {}, {}
    for line in output("nm", "-C", "--defined-only", library):
        address, kind, name = line.split(" ", 2)
        if kind in "tTwW":
            names.setdefault(int(address, 16), []).append(name)
    for line in output("objdump", "-R", library):
        if found := re.match(r"([0-9a-f]+) R_\S+\s+(\S+)", line):
            target = re.fullmatch(r"\*ABS\*\+0x([0-9a-f]+)", found[2])
            name = names.get(int(target[1], 16), [None])[0] if target else found[2]
            slots[int(found[1], 16)] = name
    return read(output("objdump", "-d", "-C", "--no-show-raw-insn", library), names, slots)


def main(arguments):
    if platform.machine() != "x86_64":
        print("no x86-64 machine code here: nothing checked")
        return 0
    functions = load(arguments[0] if arguments else build())
    failed = []
    for level in ("avx2", "baseline"):
        found = doors(functions, level)
        for short, pattern in wanted().items():
            if short not in INSIDE and not any(re.fullmatch(pattern, kernel) for kernel in found):
                failed.append(f"{level} {short}: no such function")
        for kernel, door in sorted(found.items()):
            wrong = [f"{level} {kernel}: {fault}" for fault in faults(functions, kernel, door, level)]
            counts = " ".join(f"{kind} {door.count[kind]:5}" for kind in ("ymm", "integer", "xmm", "scalar"))
            print(f"{'FAIL' if wrong else 'ok  '} {level:8} {counts}  {kernel}")
            failed += wrong
    print(
        *failed or ["every kernel has wide registers, no libm, nothing fused, nothing outside its door"],
        sep="\n",
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
