"""kilter.dist: communicators, and batch norm over ranks."""

import warnings

import numpy as np
import pytest

import reference
from kilter import KilterError
from kilter.dist import Communicator, Single, Threads
from kilter.norm import batch_norm, batch_norm_backward
from kilter.stats import RunningStats
from support import DTYPES, arithmetic, assert_close, same_bits

pytestmark = pytest.mark.timeout(30)  # a rank that waits for ever fails, and soon


# --------------------------------------------------------------------------- communicators


@pytest.mark.parametrize("size", [1, 2, 5])
def test_collective_calls(size):
    def work(comm):
        assert isinstance(comm, Communicator)
        mine = np.array([[comm.rank, 1.5]])
        gathered = comm.all_gather(mine)
        comm.barrier()
        total, root = mine.copy(), mine.copy()
        assert comm.all_reduce(total) is total
        assert comm.broadcast(root, root=size - 1) is root
        scalar = comm.all_reduce(np.array(2))
        return comm.rank, comm.size, gathered, mine, total, root, scalar

    results = Threads(size).run(work)
    everyone = np.array([[[rank, 1.5]] for rank in range(size)])
    for rank, (number, count, gathered, mine, total, root, scalar) in enumerate(results):
        assert (number, count) == (rank, size)
        np.testing.assert_array_equal(gathered, everyone)
        np.testing.assert_array_equal(mine, everyone[rank])
        np.testing.assert_array_equal(total, everyone.sum(0))
        np.testing.assert_array_equal(root, everyone[-1])
        assert scalar == 2 * size


def test_single_is_one_rank():
    comm, a = Single(), np.arange(3.0)
    assert isinstance(comm, Communicator)
    assert (comm.rank, comm.size) == (0, 1)
    assert comm.all_reduce(a) is a and comm.broadcast(a) is a and comm.barrier() is None
    gathered = comm.all_gather(a)
    assert gathered.shape == (1, 3) and not np.shares_memory(gathered, a)
    np.testing.assert_array_equal(a, np.arange(3.0))


def test_sums_are_taken_in_rank_order():
    """1e100 - 1e100 + 1 is 1 if 1 comes last; every rank gets it, every time."""
    values = (1e100, -1e100, 1.0)
    for _ in range(20):
        sums = Threads(3).run(lambda comm: comm.all_reduce(np.array(values[comm.rank])).item())
        assert sums == [1.0, 1.0, 1.0]


def test_rounds_do_not_mix():
    """Ranks that run ahead neither see nor disturb the round before."""

    def work(comm):
        seen = []
        for step in range(200):
            a = np.array([step * 10 + comm.rank])
            gathered = comm.all_gather(a)
            a[:] = -1
            seen.append(gathered[:, 0].tolist())
        return seen

    for seen in Threads(4).run(work):
        assert seen == [[step * 10 + rank for rank in range(4)] for step in range(200)]


def test_a_run_leaves_no_trace():
    ranks = Threads(2)
    with pytest.raises(ZeroDivisionError):
        ranks.run(lambda comm: 1 / comm.rank or comm.barrier())
    assert ranks.run(lambda comm: comm.all_gather(np.array(comm.rank)).tolist()) == [[0, 1], [0, 1]]


def test_ranks_run_under_the_context_of_the_caller():
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        assert Threads(2).run(lambda comm: np.float64(1) / np.float64(0)) == [np.inf, np.inf]


# --------------------------------------------------------------------------- ranks that fail


@pytest.mark.parametrize("when", ["before", "between", "never joins"])
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_failing_rank_frees_the_others(culprit, when):
    freed = []

    def work(comm):
        if when == "between":
            comm.barrier()
        if comm.rank == culprit:
            if when == "never joins":
                return
            raise LookupError(f"rank {culprit}")
        try:
            comm.all_reduce(np.zeros(3))
        except KilterError as error:
            freed.append(str(error))
            raise

    expected = (KilterError, f"rank {culprit} has left") if when == "never joins" else (LookupError, f"rank {culprit}")
    with pytest.raises(expected[0], match=expected[1]):
        Threads(3).run(work)
    assert len(freed) == 2 and all("all_reduce: expected all 3 ranks" in text for text in freed)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"all_reduce of float64 \(3,\) on rank 0, all_reduce of float64 \(4,",
            lambda c: c.all_reduce(np.zeros(3 + c.rank)),
        ),
        (r"of float64 \(2,\) on rank 0, .* of float32", lambda c: c.all_gather(np.zeros(2, ("f8", "f4")[c.rank]))),
        ("barrier on rank 0, all_gather", lambda c: c.all_gather(np.zeros(2)) if c.rank else c.barrier()),
        ("broadcast from 0 .* broadcast from 1", lambda c: c.broadcast(np.zeros(2), root=c.rank)),
    ],
)
def test_calls_that_do_not_belong_together_fail_on_all_ranks(message, call):
    errors = []

    def work(comm):
        try:
            call(comm)
        except KilterError as error:
            errors.append(str(error))

    Threads(2).run(work)
    assert len(errors) == 2 and errors[0] == errors[1]
    with pytest.raises(KilterError, match=message):
        Threads(2).run(call)


@pytest.mark.parametrize("comm", ["single", "thread"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("a", lambda c: c.all_reduce([1.0])),
        ("a", lambda c: c.all_reduce(np.broadcast_to(1.0, 3))),
        ("a", lambda c: c.broadcast(np.broadcast_to(1.0, 3))),
        ("a", lambda c: c.all_gather(None)),
        ("root", lambda c: c.broadcast(np.zeros(1), root=1)),
        ("root", lambda c: c.broadcast(np.zeros(1), root=-1)),
        ("root", lambda c: c.broadcast(np.zeros(1), root=0.0)),
    ],
)
def test_arguments_are_checked(comm, name, call):
    with pytest.raises(KilterError, match=f"^{name}: "):
        call(Single()) if comm == "single" else Threads(1).run(call)


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "2", None])
def test_the_number_of_ranks_is_checked(n):
    with pytest.raises(KilterError, match=r"^n: "):
        Threads(n)


# --------------------------------------------------------------------------- batch norm over ranks

COUNTS = {"equal": (4, 4, 4), "unequal": (2, 7, 3), "one value on a rank": (1, 1, 8), "none on a rank": (0, 5, 0, 4)}


def over_ranks(parts, dys, *, residuals=None, weights=None, runnings=None, axis=1, gamma=None, beta=None, **options):
    """Training forward and backward with one rank per part: (y, cache, grads, running) of each."""

    def work(comm):
        r = comm.rank
        running = runnings[r] if runnings else None
        y, cache = batch_norm(
            parts[r],
            gamma,
            beta,
            axis=axis,
            running=running,
            residual=residuals[r] if residuals else None,
            weights=weights[r] if weights else None,
            comm=comm,
            **options,
        )
        return y, cache, batch_norm_backward(dys[r], cache), running

    return Threads(len(parts)).run(work)


@pytest.mark.parametrize("weighted", [None, "sample", "position"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_together_are_one_batch(rng, dtype, axis, counts, weighted):
    """32 on each of 3 ranks are 96 on one, and any other split too."""
    ends = np.cumsum(COUNTS[counts])[:-1]
    x, dy, r = (rng.normal(2, 3, (12 if counts != "none on a rank" else 9, 5, 4, 5)).astype(dtype) for _ in range(3))
    gamma, beta = rng.normal(size=(2, 5)).astype(arithmetic(dtype))
    shape = {None: None, "sample": x.shape[:1], "position": tuple(np.delete(x.shape, axis))}[weighted]
    w = None if shape is None else rng.integers(0, 3, shape).astype(np.float64)
    runnings = [RunningStats(5, dtype=arithmetic(dtype)) for _ in COUNTS[counts]]
    results = over_ranks(
        *(np.split(a, ends) for a in (x, dy)),
        residuals=np.split(r, ends),
        weights=None if w is None else np.split(w, ends),
        runnings=runnings,
        axis=axis,
        gamma=gamma,
        beta=beta,
        activation="relu",
    )
    y = np.concatenate([y for y, *_ in results])
    want, mean, var = reference.batch_norm(x, gamma, beta, axis=axis, residual=r, relu=True, weights=w)
    assert_close(y, want, dtype)
    wants = reference.batch_norm_backward(dy, x, gamma, axis=axis, y=y, weights=w)
    grads = [grads for _, _, grads, _ in results]
    assert_close(np.concatenate([g.dx for g in grads]), wants[0], dtype, scale=np.linalg.norm(gamma) * np.sqrt(x.size))
    for name, expected in zip(("dgamma", "dbeta"), wants[1:3], strict=True):  # each rank's own terms
        parts = [getattr(g, name) for g in grads]
        assert_close(np.sum(parts, 0, dtype=np.float64), expected, arithmetic(dtype), scale=np.sqrt(x.size))
    assert same_bits(np.concatenate([g.dresidual for g in grads]), wants[3].astype(dtype))

    n = x.size / 5 if w is None else reference.moments(x, axis, w).count[0]
    state = reference.running([(mean, var, n)])
    for _, cache, _, running in results:
        assert cache.moments.count == n == running.count
        assert same_bits(running.mean, runnings[0].mean) and same_bits(running.var, runnings[0].var)
        assert same_bits(cache.rstd, results[0][1].rstd)
    for got, expected in zip((runnings[0].mean, runnings[0].var), state, strict=True):
        assert_close(got, expected, arithmetic(dtype), 1e-13 if dtype == np.float64 else 1e-6)


def column(*values):
    return np.array(values, np.float64).reshape(-1, 1)


@pytest.mark.parametrize("empty", [False, True], ids=["", "and a rank without samples"])
@pytest.mark.parametrize(("unbiased", "var"), [(False, 1.788888888889), (True, 1.966666666667)])
def test_v8(unbiased, var, empty):
    """Counts 2, 3, 1: neither the mean of the ranks' means (5.33) nor their sum over the total count (2.67)."""
    parts = [column(1, 3), column(2, 4, 6), column(10)] + [column()] * empty
    runnings = [RunningStats(1, unbiased=unbiased, dtype="float64") for _ in parts]
    results = over_ranks(parts, parts, runnings=runnings)
    for _, cache, _, running in results:
        count, mean, m2 = cache.moments
        np.testing.assert_allclose([count, mean[0], m2[0] / count], [6, 4.333333333333, 8.888888888889], atol=1e-12)
        np.testing.assert_allclose([running.mean[0], running.var[0]], [0.4333333333333, var], atol=1e-12)


def test_ranks_by_themselves_disagree():
    """What is normalised without an exchange: each replica with statistics of its own."""
    parts = [column(1, 3), column(2, 4, 6)]
    alone = [batch_norm(part)[1].moments.mean[0] for part in parts]
    together = [cache.moments.mean[0] for _, cache, _, _ in over_ranks(parts, parts)]
    assert alone == [2, 4] and together == [3.2, 3.2]


def test_equal_batches_in_bits_for_one_rank(rng):
    """A communicator of one rank changes nothing."""
    x, dy = rng.normal(size=(2, 8, 3, 5)).astype(np.float32)
    y, cache = batch_norm(x)
    grads = batch_norm_backward(dy, cache)
    y1, cache = batch_norm(x, comm=Single())
    grads1 = batch_norm_backward(dy, cache)
    assert same_bits(y, y1) and same_bits(grads.dx, grads1.dx)


def test_the_exchange_is_small():
    """Forward: count, mean and m2 in float64. Backward: two vectors in float64. No activations."""
    sent = []

    class Listening(Single):
        def all_gather(self, a):
            sent.append((a.dtype.name, a.shape))
            return super().all_gather(a)

        def all_reduce(self, a):
            sent.append((a.dtype.name, a.shape))
            return super().all_reduce(a)

    x = np.ones((8, 3, 50), np.float32)
    _, cache = batch_norm(x, comm=Listening())
    batch_norm_backward(x, cache)
    assert sent == [("float64", (1 + 2 * 3,)), ("float64", (2, 3))]
    batch_norm(x, running=RunningStats(3), training=False, comm=Listening())
    assert len(sent) == 2


X = np.arange(24, dtype=np.float32).reshape(4, 3, 2)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gamma", {"gamma": np.ones(2, np.float32)}),
        ("weights", {"weights": np.full(4, -1.0)}),
        ("residual", {"residual": X[:2]}),
        ("running", {"running": RunningStats(2)}),
        ("momentum", {"running": RunningStats(3, momentum=lambda step: 2.0)}),
        ("out", {"out": X[:2]}),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_a_wrong_argument_on_one_rank_frees_the_others(name, wrong, size):
    others = [RunningStats(3) for _ in range(size)]

    def work(comm):
        options = wrong if comm.rank == 1 else {"running": others[comm.rank]}
        return batch_norm(X, comm=comm, **options)

    with pytest.raises(KilterError, match=f"^{name}: "):
        Threads(size).run(work)
    assert all(running.updates == 0 and (running.mean == 0).all() for running in others), "checked before the exchange"


def test_a_wrong_gradient_on_one_rank_frees_the_others():
    def work(comm):
        _, cache = batch_norm(X, comm=comm)
        return batch_norm_backward(X[: 4 - comm.rank], cache)

    with pytest.raises(KilterError, match=r"^dy: expected shape"):
        Threads(2).run(work)


def test_ranks_with_other_channels_are_refused():
    with pytest.raises(KilterError, match=r"float64 \(5,\) on rank 0, .* \(7,\) on rank 1"):
        Threads(2).run(lambda comm: batch_norm(np.ones((4, 2 + comm.rank)), comm=comm))


@pytest.mark.parametrize("rows", [(1, 0), (0, 0)], ids=["one value", "none"])
def test_too_few_values_on_all_ranks_together(rows):
    def work(comm):
        running = RunningStats(3)
        with pytest.raises(KilterError, match="more than one value per channel"):
            batch_norm(np.ones((rows[comm.rank], 3), np.float32), running=running, comm=comm)
        return running.updates

    assert Threads(2).run(work) == [0, 0]


def test_one_value_on_each_rank_is_enough():
    parts = [column(1), column(3)]
    results = over_ranks(parts, parts)
    np.testing.assert_allclose([y[0, 0] for y, *_ in results], [-1, 1], rtol=1e-5)


@pytest.mark.parametrize("comm", [Threads(2), "ranks", 3, object()], ids=str)
def test_the_communicator_is_checked(comm):
    with pytest.raises(KilterError, match=r"^comm: "):
        batch_norm(X, comm=comm)


@pytest.mark.parametrize("of", ["gamma", "beta", "running mean", "running var"])
@pytest.mark.parametrize("training", [True, False])
def test_out_keeps_off_the_arguments(of, training):
    memory = np.ones(24, np.float32)
    running, arguments = RunningStats(3), {}
    if of.startswith("running"):
        setattr(running, of.split()[1], memory[:3])
    else:
        arguments[of] = memory[:3]
    with pytest.raises(KilterError, match=r"^out: "):
        batch_norm(X, running=running, training=training, comm=Single(), out=memory.reshape(X.shape), **arguments)
    assert (memory == 1).all() and running.updates == 0
