"""What the ranks of tests/test_mpi.py do: mpiexec -n N python ranks.py SCENARIO [FOLDER]."""

import os
import signal
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from kilter import KilterError, nn, optim, train
from kilter.data import Batches
from kilter.dist import (
    MPI,
    GradientReducer,
    Threads,
    broadcast_state,
    check_equal,
    from_environment,
    shard,
    together,
)
from kilter.norm import batch_norm
from kilter.stats import RunningStats

# ---------------------------------------------------------------- what all ranks finish

LENGTHS = (0, 1, 7, 240, 241, 5000)  # of 8 bytes: 240 fit into a letter


def collective(comm, folder):
    """Every call gives what Threads gives, bit for bit."""
    rng, others = np.random.default_rng(0), Threads(comm.size)
    for dtype in ("f8", "f4", "f2", ml_dtypes.bfloat16, "i8", "u1", "?", "c16"):
        for length in (*LENGTHS, *([1_500_000] if dtype == "f4" else [])):  # more than one piece
            parts = [(10 * rng.normal(size=length)).astype(dtype) for _ in range(comm.size)]
            mine, total = parts[comm.rank], parts[comm.rank].copy()
            want = others.run(lambda c, parts=parts: c.all_reduce(parts[c.rank].copy()))[0]
            assert comm.all_reduce(total) is total and total.tobytes() == want.tobytes(), (dtype, length)
            gathered = comm.all_gather(mine)
            assert gathered.shape == (comm.size, length) and gathered.dtype == mine.dtype
            assert gathered.tobytes() == b"".join(part.tobytes() for part in parts), (dtype, length)
            last = mine.copy()
            assert comm.broadcast(last, comm.size - 1) is last and last.tobytes() == parts[-1].tobytes()
    layouts(comm)
    arguments(comm)


def layouts(comm):
    """0-d, strided, reversed, Fortran, read-only: what lies between the elements stays."""
    assert comm.all_reduce(np.array(2)) == 2 * comm.size
    assert comm.all_gather(np.array(comm.rank)).tolist() == list(range(comm.size))
    assert comm.all_gather(np.broadcast_to(np.float32(comm.rank), (2, 3)))[1, 1, 2] == 1
    for shape in ((4, 6), (100, 80)):  # in a letter, and after one
        whole = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        for view in (np.s_[:, ::2], np.s_[::-1], np.s_[1:, 1:-1]):
            for order in "CF":
                memory, untouched = whole.copy(order), np.ones(shape, bool)
                untouched[view] = False
                comm.all_reduce(memory[view])
                assert (memory[view] == comm.size * whole[view]).all() and (memory == whole)[untouched].all()
                memory[view] = comm.rank
                comm.broadcast(memory[view], 1)
                assert (memory[view] == 1).all() and (memory == whole)[untouched].all()
                gathered = comm.all_gather(whole.copy(order)[view] + comm.rank)
                assert (gathered[1] == whole[view] + 1).all() and gathered.flags.c_contiguous


def arguments(comm):
    """Refused on each rank by itself: nothing is sent."""
    for call in (
        lambda: comm.all_reduce([1.0]),
        lambda: comm.all_reduce(np.broadcast_to(1.0, 3)),
        lambda: comm.all_gather(np.array([None])),
        lambda: comm.all_gather(np.array(["text"])),
        lambda: comm.broadcast(np.zeros(3), comm.size),
        lambda: MPI(3),
    ):
        try:
            call()
        except KilterError:
            continue
        raise LookupError("not refused")
    comm.barrier()


def statistics(comm, folder):
    """V8: counts 2, 3, 1 and a rank without samples; on two ranks, the last have theirs together."""
    ends = {2: [2], 4: [2, 5, 6]}[comm.size]
    mine = np.split(np.array([1.0, 3, 2, 4, 6, 10]), ends)[comm.rank].reshape(-1, 1)
    for unbiased, var in ((False, 1.788888888889), (True, 1.966666666667)):
        running = RunningStats(1, unbiased=unbiased, dtype="float64")
        _, cache = batch_norm(mine, running=running, comm=comm)
        count, mean, m2 = cache.moments
        np.testing.assert_allclose([count, mean[0], m2[0] / count], [6, 4.333333333333, 8.888888888889], atol=1e-12)
        np.testing.assert_allclose([running.mean[0], running.var[0]], [0.4333333333333, var], atol=1e-12)


def data():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    return rng.standard_normal((90, 4)) + 3 * np.eye(3, 4)[y], y


def trained(comm, batch=32, callbacks=(), **options):
    """A network with synchronised batch norm after two epochs; 90 samples, so the last batch has 26."""
    x, y = data()
    model = nn.mlp(4, 3, hidden=(8, 6), seed=comm.rank, dtype=np.float64)
    broadcast_state(model, comm)
    nn.convert_sync_batchnorm(model, comm)
    optimizer = optim.AdamW(model.params(), 1e-2)
    history = train.fit(
        model,
        optimizer,
        nn.softmax_cross_entropy,
        Batches(x, y, batch, seed=0),
        epochs=2,
        valid=(x, y),
        comm=comm,
        callbacks=callbacks,
        progress=False,
        **options,
    )
    return model, optimizer, history


def training(comm, folder):
    """Ends with equal bits on all ranks; the caller compares the numbers with those of one rank."""
    for batch in (32, 31):  # equal shares, and unequal ones
        model, optimizer, history = trained(comm, batch)
        check_equal(model, comm)
        check_equal(optimizer, comm)
        if comm.rank == 0:
            row = [history[-1][name] for name in ("loss", "accuracy", "valid_loss", "valid_accuracy")]
            np.savez(Path(folder, f"{comm.size}-{batch}.npz"), row=row, **model.state_dict())
    mean = [np.full(3, comm.rank + 1.0)]
    GradientReducer(mean, comm).reduce(mean, shard(1, comm.rank, comm.size).stop - shard(1, comm.rank, comm.size).start)
    assert (mean[0] == 1).all(), "only rank 0 had a sample"


# ---------------------------------------------------------------- what ends early


def raises(comm, folder):
    comm.barrier()
    if comm.rank == 1:
        raise LookupError("of rank 1")
    comm.all_reduce(np.zeros(3))


def all_raise(comm, folder):
    raise KilterError("lr: expected a number")


def busy(comm, folder):
    if comm.rank == 1:
        raise LookupError("of rank 1")
    time.sleep(1000)


def differ(comm, folder):
    comm.all_reduce(np.zeros(3 + comm.rank))


def returns(comm, folder):
    if comm.rank != 1:
        comm.all_gather(np.zeros(10_000))


def exits(comm, folder):
    if comm.rank == 1:
        sys.exit(3)
    comm.barrier()


def exits_well(comm, folder):
    if comm.rank == 1:
        sys.exit()
    comm.barrier()


class Fault(train.Callback):
    def __init__(self, rank, what):
        self.rank, self.what = rank, what

    def on_step(self, state):
        if state.step == 3 and self.rank == 1:
            self.what()


def fail():
    raise LookupError("in step 3")


def killed(comm, folder):
    fault = Fault(comm.rank, lambda: os.kill(os.getpid(), signal.SIGKILL))
    trained(comm, callbacks=[fault], checkpoint=train.Checkpoints(folder, every=1))


def resumed(comm, folder):
    model, _, _ = trained(comm, checkpoint=folder, resume=True)
    check_equal(model, comm)
    if comm.rank == 0:
        np.savez(Path(folder, "resumed.npz"), **model.state_dict())


def raises_in_training(comm, folder):
    trained(comm, callbacks=[Fault(comm.rank, fail)])


def waits(comm, folder):
    """For a signal: rank 1 computes, the others wait for it."""
    print("ready", flush=True)
    if comm.rank == 1:
        time.sleep(1000)
    comm.barrier()


def main():
    scenarios, folder = sys.argv[1].split(","), sys.argv[2]
    comm = from_environment()
    assert isinstance(comm, MPI)
    if scenarios == ["no block"]:
        return raises(comm, folder)
    with together(comm, quiet=True):
        for name in scenarios:
            globals()[name](comm, folder)
            print(f"{name} done on {comm.size}")
    return None


if __name__ == "__main__":
    main()
