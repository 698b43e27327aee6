"""The reader of machine code sees what it must; check_assembly.py reads the code itself, on its own."""

import pytest

import check_assembly as assembly

DOOR = "kilter_core::simd::avx2::<kilter_core::ema::Ema<f32>>"
WIDE = ["vaddps %ymm0,%ymm1,%ymm2"] * assembly.WIDE


def read(functions, slots=None):
    lines = []
    for address, (name, body) in enumerate(functions.items(), 1):
        lines += [f"{address * 4096:016x} <{name}>:"]
        lines += [f"  {address * 4096 + 8 * i:x}:\t{instruction}" for i, instruction in enumerate(body)] + [""]
    return assembly.read(lines, slots=slots)


def faults(body, others=(), slots=None, level="avx2"):
    functions = read({DOOR: body, **dict(others)}, slots)
    ((kernel, door),) = assembly.doors(functions, "avx2").items()
    assert kernel == "ema::Ema<f32>"
    return list(assembly.faults(functions, kernel, door, level))


def test_a_good_kernel_passes():
    calls = [
        "call   2000 <__rust_alloc>",
        "jmp    1010 <whatever+0x10>",
        "call   3000 <core::panicking::panic>",
    ]
    panics = {"core::panicking::panic": ["mulss  %xmm0,%xmm1"]}
    guarded = ["vfpclassps $0x20,%zmm0,%k0", "vcvtneps2bf16 %zmm0,%ymm0"]
    assert faults([*WIDE, "vaddss %xmm0,%xmm1,%xmm2", *guarded, *calls], panics) == []


def test_counts():
    functions = read(
        {DOOR: [*WIDE, "vmulpd %xmm0,%xmm1,%xmm2", "vdivsd %xmm0,%xmm1,%xmm2", "vpaddd %ymm0,%ymm1,%ymm2"]}
    )
    assert +functions[DOOR].count == {"ymm": assembly.WIDE, "xmm": 1, "scalar": 1, "integer": 1}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (WIDE[:-1], "only"),
        (["vpaddd %ymm0,%ymm1,%ymm2"] * 50, "only 0"),
        ([*WIDE, "vfmadd213ps %ymm0,%ymm1,%ymm2"], "fused"),
        ([*WIDE, "vrsqrtps %ymm0,%ymm1"], "approximate"),
        ([*WIDE, "vdpbf16ps %zmm0,%zmm1,%zmm2"], "hardware bfloat16"),
        ([*WIDE, "vfpclassps $0x20,%zmm0,%k0", *["vcvtneps2bf16 %zmm0,%ymm0"] * 2], "unguarded bfloat16"),
        ([*WIDE, "call   2000 <fmaf@plt>"], "fmaf of libm"),
        ([*WIDE, "jmp    2000 <exp>"], "exp of libm"),
        ([*WIDE, "call   *0x10(%rip)        # 9000 <_DYNAMIC+0x8>"], "floor of libm"),
    ],
)
def test_faults_are_seen(body, match):
    (found,) = faults(body, slots={0x9000: "floor@GLIBC_2.2.5"})
    assert match in found


def test_what_was_not_inlined_is_seen_through_calls():
    outlined = "core::array::try_from_fn::<kilter_core::lanes::edge<f32>::{closure#0}>"
    others = {"helper": [f"call   3000 <{outlined}>"], outlined: ["mulps  %xmm0,%xmm1"]}
    (found,) = faults([*WIDE, "call   2000 <helper>"], others)
    assert outlined in found


def test_what_the_sources_keep_outside_may_compute():
    (name,) = sorted(assembly.outside() - {"avx2", "avx512", "baseline"})[:1]
    outside = f"kilter_core::lanes::{name}::<f32, fn() -> f32>"
    assert faults([*WIDE, f"call   2000 <{outside}>"], {outside: ["mulss  %xmm0,%xmm1"]}) == []


def test_every_kernel_of_the_sources_is_wanted():
    wanted = assembly.wanted()
    for kernel in ("ema::Ema<f32>", "norm::planes::Train<bf16>", "init::Fill<f64, Normal>", "init::Words"):
        assert kernel in wanted, sorted(wanted)
    assert sum(kernel.startswith("optim::update::Update") for kernel in wanted) >= 2 * 14
    assert {"optim::Step<f32>", "stored::Load<f32, bf16>"} <= wanted.keys()
