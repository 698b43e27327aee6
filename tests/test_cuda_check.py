"""The compile check finds what is planted in a kernel's text."""

import re

import pytest

import cuda_check
from kilter.cuda import fill, flat, source, tick
from kilter.cuda.source import Limits

FLAT, FILL = {"T": "float32", "V": 4, "INDEX": 32}, {"T": "float32"}

MANY_VALUES = """
  KT_T many[64];
#pragma unroll
  for (int k = 0; k < 64; ++k) many[k] = source[k * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 64; ++k) target[k * n + threadIdx.x] = many[k] * many[63 - k];
"""

# Family, variant, what stands in its text, what is put there, and what is said of it.
PLANTED = {
    "a spill": (
        flat,
        FLAT,
        "KT_KERNEL(256) copy(const KT_T* source, KT_T* target, kt_index n) {",
        f"KT_KERNEL(1024, 2) copy(const KT_T* source, KT_T* target, kt_index n) {{{MANY_VALUES}",
        r"copy: \d+ bytes of stack, [1-9]\d* of spills",
    ),
    "a stack": (
        flat,
        FLAT,
        "    store<KT_V>(s + i, old);",
        "    kt_real many[32];\n    for (int k = 0; k < 32; ++k) many[k] = h[0] + k;\n"
        "    old.v[0] += many[(int)old.v[1] & 31];\n    store<KT_V>(s + i, old);",
        r"ema: (\d+ bytes of stack|local memory)",
    ),
    "a scalar store": (
        flat,
        FLAT,
        "    store<KT_V>(s + i, old);",
        "    for (int k = 0; k < KT_V; ++k) s[i + k] = old.v[k];",
        "ema: no words of 16 bytes",
    ),
    "a scalar store beside vectors": (
        flat,
        FLAT,
        "    store<KT_V>(s + i, old);",
        "    store<KT_V>(s + i, old);\n    s[0] = old.v[1];",
        "ema: 2 scalar stores, 1 are registered",
    ),
    "a scalar load": (
        flat,
        FLAT,
        "stream<KT_V>(target + i, load<KT_V>(source + i));",
        "Vec<KT_T, KT_V> x;\n    for (int k = 0; k < KT_V; ++k) x.v[k] = source[i + k];\n"
        "    stream<KT_V>(target + i, x);",
        "copy: no words of 16 bytes",
    ),
    "a warning": (
        flat,
        FLAT,
        "  const bool whole = n - i >= KT_V;",
        "  const bool whole = n - i >= KT_V;\n  int nobody;",
        'warning: .*variable "nobody" was declared but never referenced',
    ),
    "an error": (flat, FLAT, "if (i >= n) return;", "if (i >= m) return;", 'error: identifier "m" is undefined'),
    "a sum that is contracted": (
        fill,
        FILL,
        "out[k] = narrow<KT_T>(shift + scale * (kt_real)unit(w[k]));",
        "out[k] = narrow<KT_T>(fmaf(scale, (kt_real)unit(w[k]), shift));",
        "contracted or approximate arithmetic: .*'fma.rn",
    ),
    "an approximation": (
        fill,
        FILL,
        "float s = f / (2.0f + f);",
        "float s = __fdividef(f, 2.0f + f);",
        r"contracted or approximate arithmetic: .*'div.approx",
    ),
    "a kernel that nobody knows": (
        tick,
        {},
        "KT_KERNEL(256) tick(",
        "KT_KERNEL(32) other(double* y) { y[0] = 1.0; }\nKT_KERNEL(256) tick(",
        r"kernels \['other', 'tick'\], the registry has \['tick'\]",
    ),
    "a kernel that is not there": (
        tick,
        {},
        "KT_KERNEL(256) tick(",
        "KT_KERNEL(256) tock(",
        "tick: no report of its usage",
    ),
}


def faults(module, variant, text=None, **changes):
    return cuda_check.check(module.FAMILY._replace(**changes), variant, 90, text)[0]


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name):
    module, variant, old, new, message = PLANTED[name]
    text = source.text(module.FAMILY.name)
    assert old in text
    found = faults(module, variant, text.replace(old, new))
    assert any(re.search(message, one) for one in found), found


@pytest.mark.parametrize(("module", "variant"), [(flat, FLAT), (fill, FILL), (tick, {})])
def test_nothing_is_found_in_what_is_sound(module, variant):
    assert faults(module, variant) == []


def test_contraction_that_is_left_on_is_found():
    family = fill.FAMILY._replace(options=())
    ptx = cuda_check.compile_text(source.text("fill"), (*cuda_check.OPTIONS, *source.macros(FILL), "-arch=compute_90"))[
        1
    ]
    assert "fma.rn" in ptx and not list(cuda_check.faults_of_ptx(family, FILL, ptx))
    found = list(cuda_check.faults_of_ptx(fill.FAMILY, FILL, ptx))
    assert found and found[0].startswith("contracted or approximate arithmetic")


def test_registers_have_a_limit():
    used = cuda_check.check(tick.FAMILY, {}, 90)[1]["tick"][0]
    assert faults(tick, {}, kernels={"tick": Limits(used)}) == []
    found = faults(tick, {}, kernels={"tick": Limits(used - 1)})
    assert found == [f"tick: {used} registers, {used - 1} are allowed"]


def test_the_command_fails(monkeypatch, capsys):
    assert cuda_check.main(["tick"]) == 0
    old = "KT_SHARED(double, shared, 2);"
    planted = source.text("tick").replace(old, f"{old} int nobody;")
    monkeypatch.setattr(source, "text", lambda name: planted)
    assert cuda_check.main(["tick"]) == 1
    printed = capsys.readouterr().out
    assert "tick {} sm_75: warning: " in printed and "2 modules, 2 with faults" in printed
