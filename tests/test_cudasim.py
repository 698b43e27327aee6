"""The simulator itself: it sees what a device would suffer in silence. And every path of a launch."""

import numpy as np
import pytest

import cudasim
from cudasim import SimError, SimRuntime
from kilter import KilterError
from kilter.cuda import flat, source
from kilter.cuda.launch import Launcher, index_bits
from kilter.cuda.source import Family
from support import DTYPES, FLOAT32, same_bits

# Kernels with one fault each, what is said of it, and threads, blocks and shared memory of the launch.
FAULTY = {
    "missing_barrier": (
        """KT_KERNEL(256) missing_barrier(float* y, const float* x, int n) {
             KT_SHARED(float, shared, 256);
             shared[threadIdx.x] = x[threadIdx.x];
             y[threadIdx.x] = shared[n - 1 - threadIdx.x]; }""",
        "other bits with threads in order",
    ),
    "reused_too_early": (
        """KT_KERNEL(256) reused_too_early(float* y, const float* x, int n) {
             KT_SHARED(float, shared, 256);
             for (int turn = 0; turn < 2; ++turn) {
               shared[threadIdx.x] = x[threadIdx.x] + turn;
               __syncthreads();
               if (turn == 0) y[threadIdx.x] = shared[n - 1 - threadIdx.x];
             } }""",
        "other bits with threads in order",
    ),
    "lockstep": (
        """KT_KERNEL(256) lockstep(float* y, const float* x, int n) {
             KT_SHARED(float, shared, 256);
             shared[threadIdx.x] = x[threadIdx.x];
             y[threadIdx.x] = shared[threadIdx.x ^ 1]; }""",
        "other bits with threads in order",
    ),
    "sum_of_floats": (
        """KT_KERNEL(256) sum_of_floats(float* y, const float* x, int n) {
             KT_SHARED(float, sum, 1);
             sum[0] = 0.0f;
             __syncthreads();
             sum[0] += x[threadIdx.x];
             __syncthreads();
             y[threadIdx.x] = sum[0]; }""",
        "other bits with threads in order",
    ),
    "racing_blocks": (
        "KT_KERNEL(256) racing_blocks(float* y, const float* x, int n) { y[threadIdx.x] = blockIdx.x; }",
        "other bits with threads in order",
    ),
    "two_barriers": (
        """KT_KERNEL(256) two_barriers(float* y, const float* x, int n) {
             if (threadIdx.x % 2) __syncthreads();
             else
               __syncthreads(); }""",
        "threads wait at two barriers, two_barriers.cu:[24] and two_barriers.cu:[24]",
    ),
    "leaves_early": (
        """KT_KERNEL(256) leaves_early(float* y, const float* x, int n) {
             if (threadIdx.x == n - 1) return;
             __syncthreads(); }""",
        "leaves_early.cu:3: a barrier after 1 threads of the block have ended",
    ),
    "not_in_its_mask": (
        """KT_KERNEL(256) not_in_its_mask(float* y, const float* x, int n) {
             y[threadIdx.x] = __shfl_sync(0x7fffffffu, x[threadIdx.x], 0); }""",
        "not_in_its_mask.cu:2: thread (31|63) is not in its own mask 7fffffff",
    ),
    "two_masks": (
        """KT_KERNEL(256) two_masks(float* y, const float* x, int n) {
             const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffffffffu;
             y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1); }""",
        "lanes of a warp meet at two_masks.cu:3 .mask .* and two_masks.cu:3 .mask|which has ended",
    ),
    "beyond_its_mask": (
        """KT_KERNEL(256) beyond_its_mask(float* y, const float* x, int n) {
             if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 16); }""",
        "beyond_its_mask.cu:2: lane .* is read, which mask 0000ffff leaves out",
    ),
    "no_such_lanes": (
        """KT_KERNEL(256) no_such_lanes(float* y, const float* x, int n) {
             y[threadIdx.x] = __shfl_xor_sync(KT_WARP, x[threadIdx.x], 1); }""",
        "mask ffffffff names lanes beyond the block's 40 threads",
        {"threads": 40},
    ),
    "a_lane_that_left": (
        """KT_KERNEL(256) a_lane_that_left(float* y, const float* x, int n) {
             if (threadIdx.x == 3) return;
             y[threadIdx.x] = __shfl_down_sync(KT_WARP, x[threadIdx.x], 1); }""",
        "names lane 3, which has ended",
    ),
    "two_operations": (
        """KT_KERNEL(256) two_operations(float* y, const float* x, int n) {
             if (threadIdx.x % 2) y[threadIdx.x] = __shfl_down_sync(KT_WARP, x[threadIdx.x], 1);
             else y[threadIdx.x] = __shfl_up_sync(KT_WARP, x[threadIdx.x], 1); }""",
        "lanes of a warp meet at two_operations.cu:[23] .* and two_operations.cu:[23]",
    ),
    "writes_behind": (
        "KT_KERNEL(256) writes_behind(float* y, const float* x, int n) { y[threadIdx.x + 1] = x[threadIdx.x]; }",
        "written outside of an array",
    ),
    "writes_before": (
        "KT_KERNEL(256) writes_before(float* y, const float* x, int n) { y[(int)threadIdx.x - 1] = x[threadIdx.x]; }",
        "written outside of an array",
    ),
    "writes_nan_behind": (
        """KT_KERNEL(256) writes_nan_behind(float* y, const float* x, int n) {
             y[threadIdx.x + 1] = __uint_as_float(~0u); }""",
        "written outside of an array",
    ),
    "reads_behind": (
        "KT_KERNEL(256) reads_behind(float* y, const float* x, int n) { y[threadIdx.x] = x[threadIdx.x + 1]; }",
        "other bits with threads in order",
    ),
    "unwritten_memory": (
        """KT_KERNEL(256) unwritten_memory(float* y, const float* x, int n) {
             KT_SHARED(float, shared, 256);
             y[threadIdx.x] = shared[threadIdx.x]; }""",
        "other bits with threads in order",
    ),
    "beyond_shared_memory": (
        """KT_KERNEL(256) beyond_shared_memory(float* y, const float* x, int n) {
             KT_SHARED(float, shared, 63);
             shared[threadIdx.x] = x[threadIdx.x]; }""",
        "shared memory is written beyond its arrays",
    ),
    "beyond_dynamic_memory": (
        """KT_KERNEL(256) beyond_dynamic_memory(float* y, const float* x, int n) {
             KT_DYN_SHARED(float, shared);
             shared[threadIdx.x] = x[threadIdx.x]; }""",
        "shared memory is written beyond its arrays",
    ),
    "waits_in_vain": (
        """KT_KERNEL(256) waits_in_vain(float* y, const float* x, int n) {
             if (threadIdx.x % 32 < 16) __syncwarp();
             else __syncthreads(); }""",
        "deadlock: thread 0 waits at waits_in_vain.cu:2",
    ),
    "waits_for_a_flag": (
        """KT_KERNEL(256) waits_for_a_flag(float* y, const float* x, int n) {
             while (x[0] == x[0]) kt_pause(); }""",
        "deadlock: threads wait in a loop",
        {"threads": 1},
    ),
    "leaves_its_cluster": (
        """KT_KERNEL(256) KT_CLUSTER(2) leaves_its_cluster(float* y, const float* x, int n) {
             KT_SHARED(double, own, 1);
             own[0] = x[0];
             kt_cluster_sync();
             if (kt_cluster_rank()) y[threadIdx.x] = kt_peer(own, 0); }""",
        "shared memory of block 0 of the cluster is read, which is not there any more",
    ),
    "misses_its_cluster": (
        """KT_KERNEL(256) KT_CLUSTER(2) misses_its_cluster(float* y, const float* x, int n) {
             if (kt_cluster_rank()) return;
             kt_cluster_sync(); }""",
        "misses_its_cluster.cu:3: a wide barrier after 64 threads have ended",
    ),
    "writes_while_others_read": (
        """KT_KERNEL(256) KT_CLUSTER(2) writes_while_others_read(float* y, const float* x, int n) {
             KT_SHARED(double, own, 1);
             own[0] = x[kt_cluster_rank()];
             kt_cluster_sync();
             const double sum = kt_peer(own, 0) + kt_peer(own, 1);
             __syncthreads();
             own[0] = sum;
             kt_cluster_sync();
             if (!kt_cluster_rank()) y[threadIdx.x] = (float)sum; }""",
        "other bits with threads in order 1",
    ),
    "much_shared_memory": (
        """KT_KERNEL(256) much_shared_memory(float* y, const float* x, int n) {
             KT_SHARED(float, shared, 12289);
             shared[threadIdx.x] = y[threadIdx.x]; }""",
        "49156 bytes of static shared memory",
        {"alone": True},
    ),
}
TOGETHER = [name for name, found in FAULTY.items() if not found[2:] or "alone" not in found[2]]

SOUND = """
KT_KERNEL(256) ramp(float* y, kt_index n, Scalars<1> h) {
  const kt_index i = (kt_index)grid_thread();
  if (i < n) y[i] = (float)h[0] + (float)sizeof(i);
}
KT_KERNEL(64) last_one(unsigned* y, unsigned* ticket) {
  const bool last = kt_last_block(ticket, gridDim.x);
  if (threadIdx.x == 0) atomicAdd(y, last ? 100u : 1u);
}
KT_KERNEL(64) whole_grid(float* y, const float* x, unsigned* counter, double* parts) {
  if (threadIdx.x == 0) parts[blockIdx.x] = x[blockIdx.x];
  kt_grid_sync(counter);
  double sum = 0.0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];
  if (threadIdx.x == 0) y[blockIdx.x] = (float)sum;
}
KT_KERNEL(64) KT_CLUSTER(KT_SIZE) cluster(float* y, const float* x) {
#if defined(KT_CPU_SIM) || __CUDA_ARCH__ >= 900
  KT_SHARED(double, own, 1);
  if (threadIdx.x == 0) own[0] = x[blockIdx.x];
  kt_cluster_sync();
  double sum = 0.0;
  for (unsigned rank = 0; rank < KT_SIZE; ++rank) sum += kt_peer(own, rank);
  if (threadIdx.x == 0) y[blockIdx.x] = (float)sum;
  kt_cluster_sync();
#endif
}
KT_KERNEL(128) dynamic(float* y, int n) {
  KT_DYN_SHARED(float, space);
  for (int i = threadIdx.x; i < n; i += blockDim.x) space[i] = (float)i;
  __syncthreads();
  if (threadIdx.x == 0) y[0] = space[n - 1];
}
"""


class Watched(SimRuntime):
    """A simulator with streams, which notes for what device and stream launches come."""

    stream, broken = 0, False

    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.allowed = [], []

    def current_stream(self):
        return self.stream

    def allow_shared(self, function, size):
        super().allow_shared(function, size)
        self.allowed.append((self.current_device(), size))

    def launch(self, *arguments):
        self.seen.append((self.current_device(), self.stream))
        super().launch(*arguments)

    def synchronize(self):
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")


@pytest.fixture
def private(monkeypatch):
    """Makes modules of texts that belong to no family."""
    texts, known = {}, source.text
    monkeypatch.setattr(source, "text", lambda name: texts[name] if name in texts else known(name))

    def module(name, text, launcher=None, **variant):
        texts[name] = f'{source._file("common.cuh")}\n#line 1 "{name}.cu"\n{text}'
        return (launcher or Launcher(Watched())).module(Family(name, {}), **variant)

    return module


def zeros(*shape, dtype=FLOAT32, device=0):
    with cudasim.Device(device):
        return cudasim.xp.zeros(shape, dtype)


# --------------------------------------------------------------------------- what the simulator sees


@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_seen(private, rng, name):
    _, message, options = (*FAULTY[name], {})[:3]
    threads, texts = options.get("threads", 64), [name] if "alone" in options else TOGETHER
    x, y = cudasim.to_device(rng.normal(size=threads).astype(FLOAT32)), zeros(threads)
    module = private(texts[0], "\n".join(f'#line 1 "{one}.cu"\n{FAULTY[one][0]}' for one in texts))
    with pytest.raises(SimError, match=f"{name}: .*({message})"):
        module.launch(name, 2, threads, y, x, threads)


def test_the_same_kernels_without_a_fault(private, rng):
    x, y = cudasim.to_device(rng.normal(size=64).astype(FLOAT32)), zeros(64)
    text = FAULTY["missing_barrier"][0].replace("y[", "__syncthreads(); y[")
    private("mended", text).launch("missing_barrier", 2, 64, y, x, 64)
    assert same_bits(y.get(), x.get()[::-1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((zeros(8), np.int64(8), np.zeros(2)), "argument 1 is int64, the kernel takes int32"),
        ((zeros(8), 8, np.zeros(2)), "argument 1 is int, the kernel takes int32"),
        ((zeros(8, dtype=np.float64), np.int32(8), np.zeros(2)), r"argument 0 is float64, the kernel takes float32\*"),
        ((np.zeros(8, FLOAT32), np.int32(8), np.zeros(2)), r"argument 0 is float32, the kernel takes float32\*"),
        ((zeros(8), np.int32(8), np.zeros(1)), "argument 2 is float64, the kernel takes struct 16"),
    ],
)
def test_arguments_are_exactly_the_kernels(private, given, message):
    module = private("sound", SOUND, SIZE=4)
    function = module.runtime.function(module.built, "ramp")
    with pytest.raises(SimError, match=message):
        module.runtime.launch(function, (1,), (8,), given, 0, 1, False)


def test_arrays_keep_away_from_the_host():
    there, here = zeros(3), np.zeros(3, FLOAT32)
    for mixed in (lambda: there + here, lambda: here + there, lambda: np.add(here, 1, out=there)):
        with pytest.raises(TypeError):
            mixed()
    with pytest.raises(TypeError):
        there[...] = here
    assert isinstance(there[1], cudasim.SimArray) and isinstance(there.sum(), cudasim.SimArray)
    assert np.isnan(cudasim.xp.empty(3, FLOAT32).get()).all()


# --------------------------------------------------------------------------- the launcher


def test_indices_have_64_bits_where_they_must():
    assert [index_bits(n) for n in (0, 2**31 - 2**20 - 1, 2**31 - 2**20, 2**31)] == [32, 32, 64, 64]
    assert index_bits(3, 2**40) == 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 1027])
def test_64_bit_indices_give_the_same_bits(cuda, rng, monkeypatch, dtype, size):
    s, x = rng.normal(size=size).astype("f8" if dtype == np.float64 else "f4"), rng.normal(size=size).astype(dtype)

    def results():
        average, copied, updated = cuda.array(s.copy()), cuda.xp.zeros(size, dtype), cuda.array(x.copy())
        cuda.ops.ema(average, cuda.array(x), np.array([0.3]))
        cuda.ops.probe_copy(cuda.array(x), copied)
        cuda.ops.probe_update([copied], [updated])
        return [cuda.numpy(a) for a in (average, copied, updated)]

    narrow = results()
    monkeypatch.setattr(flat, "index_bits", lambda *sizes: 64)
    assert all(map(same_bits, narrow, results()))


def test_the_width_of_indices_is_the_modules(private):
    for bits in (32, 64):
        y = zeros(5)
        private("sound", SOUND, SIZE=4, INDEX=bits).launch("ramp", 1, 8, y, 5, np.array([0.25]))
        assert (y.get() == 0.25 + bits // 8).all()


def test_cooperative_grids_meet(private, rng):
    x, y = cudasim.to_device(rng.normal(size=7).astype(FLOAT32)), zeros(7)
    module = private("sound", SOUND, SIZE=4)
    arguments = (y, x, zeros(1, dtype=np.uint32), zeros(7, dtype=np.float64))
    module.launch("whole_grid", 7, 64, *arguments, cooperative=True)
    np.testing.assert_allclose(y.get(), x.get().astype(np.float64).sum(), rtol=1e-6)
    with pytest.raises(SimError, match="a barrier of a grid that is not resident"):
        module.launch("whole_grid", 7, 64, *arguments)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_clusters_see_each_other(private, rng, size):
    x, y = cudasim.to_device(rng.normal(size=16).astype(FLOAT32)), zeros(16)
    module = private("sound", SOUND, SIZE=size)
    module.launch("cluster", 16, 64, y, x)
    want = x.get().reshape(-1, size).sum(axis=1, keepdims=True) * np.ones(size, FLOAT32)
    np.testing.assert_allclose(y.get(), want.ravel(), rtol=1e-6, atol=1e-6)
    with pytest.raises(KilterError, match=f"expected a multiple of {size} blocks, got"):
        module.launch("cluster", size + 1, 64, y, x)


def test_the_last_block_is_one(private):
    launcher = Launcher(Watched())
    module, y = private("sound", SOUND, launcher, SIZE=4), zeros(1, dtype=np.uint32)
    for turn in range(1, 4):  # the tickets are zero again after each launch
        module.launch("last_one", 9, 64, y, launcher.tickets(y, 1))
        assert y.get() == turn * 108
    assert not launcher.tickets(y, 1).get().any()


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((2**31,), 32, "expected a grid of at most .*, got .2147483648,"),
        ((1, 65536), 32, "expected a grid of at most"),
        ((1, 1, 65536), 32, "expected a grid of at most"),
        ((1,), 257, "expected at most 256 threads, got .257,"),
        ((1,), (16, 17), "expected at most 256 threads, got .16, 17."),
    ],
)
def test_sizes_are_checked(private, grid, block, message):
    with pytest.raises(KilterError, match=f"kernel ramp of sound SIZE=4: {message}"):
        private("sound", SOUND, SIZE=4).launch("ramp", grid, block, zeros(1), 1, np.zeros(1))


def test_arguments_are_counted(private):
    with pytest.raises(KilterError, match="expected 3 arguments, got 2"):
        private("sound", SOUND, SIZE=4).launch("ramp", 1, 32, zeros(1), 1)


def test_nothing_is_launched_for_nothing(private):
    launcher = Launcher(Watched())
    for grid in (0, (3, 0), (0, 1, 1)):
        private("sound", SOUND, launcher, SIZE=4).launch("ramp", grid, 32, zeros(0), 0, np.zeros(1))
    assert launcher.runtime.log == []


def test_shared_memory_beyond_48_kb_is_asked_for_once_on_each_device(private):
    launcher = Launcher(Watched())
    module = private("sound", SOUND, launcher, SIZE=4)
    for device, n in ((0, 12_000), (0, 20_000), (0, 20_000), (1, 20_000), (1, 12_289), (0, 58_112)):
        y = zeros(1, device=device)
        module.launch("dynamic", 1, 128, y, n, shared=4 * n)
        assert y.get() == n - 1
    assert launcher.runtime.allowed == [(0, 80_000), (1, 80_000), (0, 232_448)]
    with pytest.raises(SimError, match="232452 bytes of shared memory"):
        module.launch("dynamic", 1, 128, y, 58_113, shared=4 * 58_113)


def test_waiting_names_the_kernel_that_failed(private, monkeypatch):
    y = zeros(1)
    for waits in (False, True):
        monkeypatch.setenv("KILTER_CUDA_SYNC", str(int(waits)))
        launcher = Launcher(Watched())
        module = private("sound", SOUND, launcher, SIZE=4)
        module.launch("ramp", 1, 32, y, 1, np.zeros(1))
        launcher.runtime.broken = True
        if waits:
            with pytest.raises(KilterError, match="kernel ramp of sound SIZE=4: an illegal memory access"):
                module.launch("ramp", 1, 32, y, 1, np.zeros(1))
        else:
            module.launch("ramp", 1, 32, y, 1, np.zeros(1))


def test_launches_go_to_the_device_of_their_arrays(private):
    launcher = Launcher(Watched())
    module = private("sound", SOUND, launcher, SIZE=4)
    for device in (0, 1, 0):
        module.launch("ramp", 1, 32, zeros(1, device=device), 1, np.zeros(1))
    with cudasim.Device(1):
        module.launch("ramp", 1, 32, zeros(1, device=0), 1, np.zeros(1))
    assert [device for device, _ in launcher.runtime.seen] == [0, 1, 0, 0]
    with pytest.raises(KilterError, match=r"expected all arrays on one device, got \[0, 1\]"):
        module.launch("cluster", 4, 64, zeros(4), zeros(4, device=1))


def test_a_workspace_for_each_device_and_stream():
    launcher = Launcher(Watched())

    def places(*streams):
        for device in (0, 1):
            for stream in streams:
                launcher.runtime.stream = stream
                space = launcher.workspace(zeros(1, device=device), 100)
                assert space.device.id == device and space.shape == (100,) and space.dtype == np.float64
                yield launcher.runtime.address(space)

    first = list(places(5, 6))
    assert len(set(first)) == 4
    assert list(places(5, 6)) == first


def test_a_workspace_grows_and_holds_nothing(rng):
    launcher, like = Launcher(Watched()), zeros(1)
    space = launcher.workspace(like, 100)
    space[...] = 1.0
    assert np.isnan(launcher.workspace(like, 100).get()).all()  # what an operation left is not there for the next
    large = launcher.workspace(like, 50_000, "float32")
    assert large.nbytes == 200_000 and np.isnan(large.get()).all()
    assert launcher.runtime.address(large) != launcher.runtime.address(space)
    assert launcher.runtime.address(launcher.workspace(like, 10, "uint8")) == launcher.runtime.address(large)
    space[...] = 2.0  # a graph that knows the old one can still run
    assert (space.get() == 2.0).all()


def test_a_workspace_ends_where_its_use_does(private, rng):
    """Although more was allocated, for other uses."""
    module = private("writes_behind", FAULTY["writes_behind"][0])
    space = module.launcher.workspace(zeros(1), 64, "float32")
    with pytest.raises(SimError, match="writes_behind: written outside of an array"):
        module.launch("writes_behind", 1, 64, space, cudasim.to_device(rng.normal(size=64).astype(FLOAT32)), 64)


def test_tickets_are_zero_and_belong_to_a_stream():
    launcher, like = Launcher(Watched()), zeros(1)
    one = launcher.tickets(like, 10)
    assert launcher.tickets(like, 4096) is one
    launcher.runtime.stream = 7
    assert launcher.tickets(like, 10) is not one
    assert launcher.tickets(like, 10_000).size >= 10_000 and not launcher.tickets(like, 10_000).get().any()
