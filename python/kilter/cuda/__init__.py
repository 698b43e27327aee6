"""CUDA kernels for CuPy arrays, and the host code that launches them.

The layers, from below: `common.cuh` is the beginning of every kernel's text; `source` knows the text of a module and
what its kernels take; `launch` is the one way to launch; `fill`, `flat`, ... are families of kernels, each a .cu file
and the operations on it; `tensors` makes tables of tensors, by which one launch works on all of them; `ops` is the
table of all operations, with the names and arguments of `kilter._kilter`. A `Runtime` is what launches need of an array
library: CuPy (`runtime`), or the simulator in tests/cudasim, which runs the very same text on the CPU.

To add a family `thing`:

1.  thing.cu. A kernel is `KT_KERNEL(256) name(KT_T* y, const KT_T* x, kt_index n, Scalars<2> h) {`, on one or more
    lines; clusters are declared `KT_KERNEL(256) KT_CLUSTER(4) name(...`. Parameters are pointers (`KT_T*`, any `KT_X*`
    of the family's types, `kt_real*`, `float*`, `double*`, `int*`, `unsigned*`, `long long*`, `unsigned char*`, or a
    struct's: a table), numbers (`int`, `unsigned`, `long long`, `unsigned long long`, `kt_index`, `kt_real`, `float`,
    `double`) and `Scalars<N>`. Pointers to what is only read are `const`: the simulator takes the others for written.
    Variants are macros of the module, never of the name: read `KT_T`, `KT_V` (elements that move together),
    `KT_INDEX`, `KT_RELU`, ... and nothing else tells dtypes apart. Shared memory is declared by
    `KT_SHARED(type, name, count)` and `KT_DYN_SHARED(type, name)`. Data move by `load<V>`, `load_wide<V>`, `store<V>`,
    `stream<V>`; sums go through `block_sums`, `block_merge` or a fixed order of your own. No atomics on floats, no
    header, no printf.
2.  thing.py. `FAMILY = Family("thing", {"name": Limits(registers, vectorised, scalar_stores)}, ...)`; operations
    `def op(cuda: Launcher, ...)`, which pick a variant by `cuda.module(FAMILY, T=x.dtype, V=..., INDEX=...)`
    and launch by `module.launch("name", grid, block, *arguments, shared=0)`; `FAMILIES = (FAMILY,)`;
    `OPS = {"op": op}`. Shapes, dtypes and layouts were checked by the public modules; the launch checks each argument
    against the declaration. A vector `h` may lie on the host (it travels by value) or on the device; operations
    pass it on and never read it.
3.  Add the module to `ops.MODULES`.
4.  Tests take their arrays from the `backend` fixture: `backend.array(a)` and `backend.numpy(a)`. Every launch on the
    simulator runs in four orders of its threads and fails if the bits differ, if a barrier or a warp operation is not
    met by all, if memory beside an array is written, or if an argument's type is not exactly the kernel's.
5.  `python tests/cuda_check.py thing` compiles every variant by NVRTC and compares it with its limits.
"""
