"""kilter.dist.NCCL against a stand-in for CuPy and NCCL, which reads memory by address as the library does."""

import ctypes
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from kilter import KilterError, _backend
from kilter.dist import NCCL, Communicator, GradientReducer, Single, Threads, check_equal, together
from support import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, ulp

pytestmark = pytest.mark.timeout(60)
NUMBERS = {"INT8": 0, "UINT8": 1, "INT32": 2, "UINT32": 3, "INT64": 4, "UINT64": 5, "FLOAT32": 7, "FLOAT64": 8}
current = threading.local()  # the device and the stream of a rank


class DeviceArray(np.ndarray):
    """Has what CuPy's arrays have and NumPy's have not."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])

    @property
    def device(self):
        return SimpleNamespace(id=getattr(self, "where", current.device))


def on_device(a):
    return np.array(a).view(DeviceArray)


XP = SimpleNamespace(
    __name__="cupy",
    empty=lambda shape, dtype: np.full(shape, 77, dtype).view(DeviceArray),
    zeros=lambda shape, dtype: np.zeros(shape, dtype).view(DeviceArray),
    where=np.where,
    ascontiguousarray=lambda a: a if a.flags.c_contiguous and a.ndim else np.ascontiguousarray(a).view(DeviceArray),
)


class NcclCommunicator:
    """The calls that kilter makes of it, with the types that CuPy's binding takes, over the ranks of `Threads`."""

    calls: list[tuple[str, int]]  # of the run: name and stream

    def __init__(self, ndev, identity, rank):
        assert type(identity) is bytes and identity == bytes(range(128)), "that of rank 0"
        self.ranks, self.rank = current.comm, rank
        assert (ndev, rank) == (self.ranks.size, self.ranks.rank)

    def memory(self, address, count, number):
        name = next(name for name, known in NUMBERS.items() if known == number)
        dtype = np.dtype(name.lower())
        assert type(address) is type(count) is int and address % dtype.itemsize == 0 and count > 0
        return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)

    def note(self, name, stream):
        assert type(stream) is int and stream == 1000 + self.rank, "the current stream"
        self.calls.append((name, self.rank))

    def allReduce(self, sent, received, count, datatype, op, stream):  # noqa: N802
        self.note("allReduce", stream)
        assert op == 0
        self.memory(received, count, datatype)[:] = self.ranks.all_gather(self.memory(sent, count, datatype)).sum(0)

    def broadcast(self, sent, received, count, datatype, root, stream):
        self.note("broadcast", stream)
        self.memory(received, count, datatype)[:] = self.ranks.broadcast(
            self.memory(sent, count, datatype).copy(), root
        )

    def allGather(self, sent, received, count, datatype, stream):  # noqa: N802
        self.note("allGather", stream)
        gathered = self.ranks.all_gather(self.memory(sent, count, datatype))
        self.memory(received, count * self.ranks.size, datatype)[:] = gathered.reshape(-1)


@pytest.fixture
def cupy(monkeypatch):
    """A module with the names that kilter takes from CuPy."""
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cupy.cuda = cuda
    cuda.runtime = SimpleNamespace(getDevice=lambda: current.device)
    cuda.get_current_stream = lambda: SimpleNamespace(ptr=1000 + current.comm.rank)
    cuda.nccl = SimpleNamespace(
        available=True,
        NCCL_SUM=0,
        NcclCommunicator=NcclCommunicator,
        get_unique_id=lambda: bytes(range(128)),
        **{f"NCCL_{name}": number for name, number in NUMBERS.items()},
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setitem(_backend._registered, DeviceArray, _backend.Backend(XP, None))
    NcclCommunicator.calls = []
    return cupy


def over_gpus(function, size=3):
    def work(host):
        current.comm, current.device = host, 4 + host.rank
        return function(NCCL(host))

    return Threads(size).run(work)


# --------------------------------------------------------------------------- calls


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16, BFLOAT16, np.dtype("i8"), np.dtype("u1")], ids=str)
@pytest.mark.usefixtures("cupy")
def test_collective_calls(rng, dtype):
    parts = [(10 * rng.random((4, 5))).astype(dtype) for _ in range(3)]

    def work(comm):
        assert isinstance(comm, Communicator)
        total, last, mine = (on_device(parts[comm.rank]) for _ in range(3))
        assert comm.all_reduce(total) is total and comm.broadcast(last, root=2) is last
        gathered = comm.all_gather(mine)
        comm.barrier()
        assert type(gathered) is DeviceArray and gathered.shape == (3, 4, 5) and gathered.dtype == dtype
        return comm.rank, comm.size, np.array(total), np.array(last), np.array(gathered)

    want = np.sum([part.astype(np.float64) for part in parts], axis=0)
    for rank, (number, size, total, last, gathered) in enumerate(over_gpus(work)):
        assert (number, size) == (rank, 3)
        if dtype.kind in "iu":
            assert (total == want).all()
        else:
            assert (np.abs(total.astype(np.float64) - want) <= ulp(want, dtype)).all()
        assert last.tobytes() == parts[2].tobytes()
        assert gathered.tobytes() == b"".join(part.tobytes() for part in parts)
    assert sorted(NcclCommunicator.calls) == sorted(
        (name, rank) for name in ("allReduce", "broadcast", "allGather") for rank in range(3)
    )


@pytest.mark.usefixtures("cupy")
def test_16_bit_sums_are_taken_in_float32():
    """2048 + 1 + 1 + ... in float16 stays 2048."""

    def work(comm):
        a = on_device(np.array([1.0 if comm.rank else 2048.0], np.float16))
        return comm.all_reduce(a).item()

    assert over_gpus(work, 5) == [2052.0] * 5


@pytest.mark.parametrize("view", [np.s_[:, ::2], np.s_[::-1], np.s_[1:, 1:-1]], ids=str)
@pytest.mark.usefixtures("cupy")
def test_layouts(view):
    """What lies between the elements stays."""
    whole = np.arange(24.0).reshape(4, 6)

    def work(comm):
        memory, other = on_device(whole), on_device(whole * 0 + comm.rank)
        untouched = np.ones((4, 6), bool)
        untouched[view] = False
        comm.all_reduce(memory[view])
        comm.broadcast(other[view], root=1)
        gathered = comm.all_gather(on_device(whole)[view])
        return (
            (np.array(memory)[view] == 2 * whole[view]).all()
            and (np.array(memory) == whole)[untouched].all()
            and (np.array(other)[view] == 1).all()
            and (np.array(other) == comm.rank)[untouched].all()
            and (np.array(gathered) == whole[view]).all()
        )

    assert all(over_gpus(work, 2))


@pytest.mark.usefixtures("cupy")
def test_nothing_to_send():
    def work(comm):
        empty, scalar = on_device(np.zeros((0, 3))), on_device(np.array(2.0))
        assert comm.all_reduce(empty) is empty and comm.broadcast(empty) is empty
        assert comm.all_gather(empty).shape == (2, 0, 3)
        assert comm.all_reduce(scalar) == 4.0
        return comm.all_gather(scalar).tolist()

    assert over_gpus(work, 2) == [[4.0, 4.0]] * 2


@pytest.mark.usefixtures("cupy")
def test_gradients_and_equal_states():
    def work(comm):
        grads = {"w": on_device(np.full((2, 3), comm.rank, np.float32)), "b": on_device(np.full(3, 1.0, np.float16))}
        GradientReducer(grads, comm).reduce(grads, comm.rank)
        check_equal({"host": np.ones(3)}, comm)  # arrays of the host go by the host
        with together(comm):
            return grads["w"].tolist(), grads["b"].tolist()

    mean = np.float32(5) / np.float32(3)
    for w, b in over_gpus(work):
        assert w == [[mean] * 3] * 2 and b == [1.0] * 3


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "^a: expected floating-point numbers, or whole",
            lambda c: c.all_reduce(on_device(np.zeros(3, bool))),
        ),
        (
            "^a: expected floating-point numbers, or whole",
            lambda c: c.all_reduce(on_device(np.zeros(3, np.int16))),
        ),
        ("^root: expected a rank from 0 to 0", lambda c: c.broadcast(on_device(np.zeros(3)), 1)),
        ("^a: expected an array", lambda c: c.all_gather(None)),
        ("^a: expected a NumPy array, got list", lambda c: c.all_reduce([1.0])),
    ],
)
@pytest.mark.usefixtures("cupy")
def test_arguments_are_checked(message, call):
    with pytest.raises(KilterError, match=message):
        over_gpus(call, 1)
    assert not NcclCommunicator.calls


@pytest.mark.parametrize("call", ["all_reduce", "broadcast", "all_gather"])
@pytest.mark.usefixtures("cupy")
def test_an_array_of_another_gpu_is_refused(call):
    def work(comm):
        a = on_device(np.zeros(3))
        a.where = 9
        getattr(comm, call)(a)

    with pytest.raises(KilterError, match=r"^a: expected an array of GPU 4, got one of GPU 9$"):
        over_gpus(work, 1)


def test_missing_libraries_are_named(cupy, monkeypatch):
    current.comm, current.device = Single(), 0
    cupy.cuda.nccl.available = False
    with pytest.raises(KilterError, match=r"^NCCL is not installed: pip install 'kilter\[nccl\]'"):
        NCCL(Single())
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(KilterError, match=r"^CuPy is not installed: pip install 'kilter\[cuda13\]'"):
        NCCL(Single())
