"""kilter.dist: shares of a batch, one sum of all gradients, equal weights on all ranks."""

import copy
import math

import numpy as np
import pytest

from kilter import KilterError, nn, optim
from kilter.dist import GradientReducer, Single, Threads, broadcast_state, check_equal, shard
from support import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, assert_close, plain, refused, same_bits, ulp

pytestmark = pytest.mark.timeout(60)  # a rank that waits for ever fails, and soon


# --------------------------------------------------------------------------- shares


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("n", [0, 1, 5, 64, 1437])
def test_shares_are_the_whole(n, size):
    parts = [shard(n, rank, size) for rank in range(size)]
    assert np.concatenate([np.arange(n)[part] for part in parts]).tolist() == list(range(n))
    lengths = [part.stop - part.start for part in parts]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1, "the remainder is at the front"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("n", (-1, 0, 2)),
        ("n", (2.0, 0, 2)),
        ("size", (4, 0, 0)),
        ("size", (4, 0, True)),
        ("rank", (4, 2, 2)),
        ("rank", (4, -1, 2)),
    ],
)
def test_shares_are_checked(name, arguments):
    with pytest.raises(KilterError, match=f"^{name}: "):
        shard(*arguments)


# --------------------------------------------------------------------------- gradients

SHAPES = {"w": (7, 5), "b": (5,), "s": (), "none": (0, 3)}
WEIGHTS = {"equal": (4, 4, 4), "unequal": (5, 1, 9), "none on a rank": (0, 3, 8), "one rank alone": (0, 6, 0)}
FORMS = {
    "dict": lambda g: g,
    "list": lambda g: list(g.values()),
    "groups": lambda g: [{"params": {"w": g["w"]}, "lr": 0.1}, {"params": [g["b"], g["s"], g["none"]]}],
}


def gradients(rng, dtype):
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def reduced(parts, weights, form=FORMS["dict"]):
    """The gradients that each rank has afterwards."""

    def work(comm):
        grads = copy.deepcopy(parts[comm.rank])
        tree = form(grads)
        assert GradientReducer(tree, comm).reduce(tree, weights[comm.rank]) is tree
        return grads

    return Threads(len(parts)).run(work)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_over_all_samples(rng, dtype, weights, form):
    parts = [gradients(rng, dtype) for _ in weights]
    results = reduced(parts, weights, form)
    for name in SHAPES:
        want = sum(w * part[name].astype(np.float64) for w, part in zip(weights, parts, strict=True)) / sum(weights)
        assert results[0][name].dtype == dtype
        assert_close(results[0][name], want, dtype)
        assert all(same_bits(result[name], results[0][name]) for result in results)


def test_a_model_with_two_dtypes(rng):
    parts = [{"a": rng.normal(size=3).astype(FLOAT16), "b": rng.normal(size=3)} for _ in range(2)]
    for result in reduced(parts, (1, 2)):
        want = (parts[0]["b"] + 2 * parts[1]["b"]) / 3
        np.testing.assert_allclose(result["b"], want, rtol=1e-15)
        np.testing.assert_allclose(result["a"], (parts[0]["a"] + 2.0 * parts[1]["a"]) / 3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_16_bit_gradients_are_rounded_once(rng, dtype):
    """A sum in 16 bits over 16 ranks would be off by several units in the last place."""
    parts = [{"g": (1 + rng.random(200)).astype(dtype)} for _ in range(16)]
    want = np.mean([part["g"].astype(np.float64) for part in parts], axis=0)
    error = np.abs(reduced(parts, [3] * 16)[0]["g"].astype(np.float64) - want)
    assert (error <= 0.5001 * ulp(want, dtype)).all()


@pytest.mark.parametrize(
    "weights",
    [(2**24 + 1, 2**24 + 3, 1), (2**35 - 1, 4095, 4097), (0.5, 0.25, 1.75), (0, 0, 0)],
)
def test_the_weights_are_summed_exactly(weights):
    """A float32 number has no 2**24 + 1."""

    def work(comm):
        grads = [np.full(2, 3.0, np.float32)]
        reducer = GradientReducer(grads, comm)
        reducer.reduce(grads, weights[comm.rank])
        return reducer.total, grads[0].tolist()

    for total, grads in Threads(3).run(work):
        assert total == math.fsum(weights)
        np.testing.assert_allclose(grads, 3.0 if total else 0.0, rtol=2e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_every_rank(bad):
    """So that all skip the step, or none; but not from a rank without samples, whose gradients mean nothing."""
    parts = [{"g": np.array([1.0, bad if rank == 1 else 1.0], np.float32)} for rank in range(3)]
    for result in reduced(parts, (1, 1, 1)):
        assert np.isfinite(result["g"]).tolist() == [True, False]
    for result in reduced(parts, (1, 0, 1)):
        assert result["g"].tolist() == [1.0, 1.0]


def test_one_exchange_of_one_array():
    sent = []

    class Listening(Single):
        def all_reduce(self, a):
            sent.append(a)
            return super().all_reduce(a)

    grads = gradients(np.random.default_rng(0), FLOAT32)
    reducer = GradientReducer(grads, Listening())
    for _ in range(3):
        reducer.reduce(grads, 2)
    assert len(sent) == 3 and all(a is sent[0] for a in sent), "allocated once"
    assert sent[0].dtype == FLOAT32 and sent[0].size == sum(g.size for g in grads.values()) + 2


GRADS = {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float16)}
READ_ONLY = np.broadcast_to(np.float32(1), 3)


@pytest.mark.parametrize(
    ("name", "grads", "weight"),
    [
        (r"grads\[a\]: expected shape", GRADS | {"a": np.ones(4, np.float32)}, 1),
        (r"grads: expected one array", {"a": GRADS["a"]}, 1),
        (r"grads\[a\]: expected at most float32", GRADS | {"a": np.ones(3)}, 1),
        (r"grads\[a\]: expected a writable", GRADS | {"a": READ_ONLY}, 1),
        (r"grads\[b\]: expected an array of its own", [GRADS["b"], GRADS["b"]], 1),
        ("weight", GRADS, -1),
        ("weight", GRADS, math.nan),
        ("weight", GRADS, 2**36),
        ("weight", GRADS, "8"),
    ],
)
def test_arguments_are_checked_before_the_exchange(name, grads, weight):
    like = GRADS if isinstance(grads, dict) else {"a": GRADS["b"], "b": GRADS["b"].copy()}

    class Silent(Single):
        def all_reduce(self, a):
            raise AssertionError

    reducer = GradientReducer(like, Silent())
    given = grads if isinstance(grads, dict) else {"a": grads[0], "b": grads[1]}
    with refused(f"^{name}", given):
        reducer.reduce(given, weight)


@pytest.mark.parametrize(
    ("name", "like", "comm"),
    [
        ("comm", GRADS, None),
        ("comm", GRADS, Threads(2)),
        ("like", 3, Single()),
        (r"like\[a\]", {"a": np.ones(3, np.int32)}, Single()),
    ],
)
def test_the_reducer_is_checked(name, like, comm):
    with pytest.raises(KilterError, match=f"^{name}: "):
        GradientReducer(like, comm)


def test_a_wrong_gradient_on_one_rank_frees_the_others():
    def work(comm):
        grads = [np.ones(3, np.float32)]
        GradientReducer(grads, comm).reduce(grads, 1.0 if comm.rank else -1.0)

    with pytest.raises(KilterError, match=r"^weight: "):
        Threads(3).run(work)


# --------------------------------------------------------------------------- equal weights


def network(seed):
    model = nn.mlp(4, 3, hidden=(6,), seed=seed)
    model[2].running.update(np.full(6, seed, np.float32), np.ones(6, np.float32), 10)
    optimizer = optim.AdamW(model.params(), 1e-2)
    for _ in range(seed):
        optimizer.step({name: np.full_like(p, seed) for name, p in model.params().items()})
    return model, optimizer


@pytest.mark.parametrize("root", [0, 2])
def test_every_rank_gets_the_state_of_one(root):
    def work(comm):
        model, optimizer = network(comm.rank + 1)
        with pytest.raises(KilterError, match=r"^state: expected the same on all ranks, got different "):
            check_equal(model, comm)
        for target in (model, optimizer):
            assert broadcast_state(target, comm, root) is target
            check_equal(target, comm)
        return plain(model.state_dict()), plain(optimizer.state_dict())

    model, optimizer = network(root + 1)
    wanted = plain(model.state_dict()), plain(optimizer.state_dict())
    assert Threads(3).run(work) == [wanted] * 3


def test_a_dict_of_arrays_is_written_to():
    def work(comm):
        arrays = {name: np.full((2, 3), comm.rank, dtype) for name, dtype in (("a", FLOAT64), ("b", BFLOAT16))}
        held = dict(arrays)
        broadcast_state(arrays, comm, root=1)
        return all(arrays[name] is held[name] and (held[name] == 1).all() for name in held)

    assert Threads(2).run(work) == [True, True]


@pytest.mark.parametrize(
    ("message", "first", "second"),
    [
        ("as many entries on all ranks, got 2, 1", {"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2)}),
        ("got different b", {"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2), "b": np.ones(3)}),
        ("got different a", {"a": np.ones(2)}, {"a": np.ones(2, np.float32)}),
        ("got different a", {"a": np.ones(2)}, {"b": np.ones(2)}),
        ("got different 0, 1, 2, 3 and 2 more", *({str(i): np.ones(i + r) for i in range(6)} for r in (0, 1))),
    ],
)
@pytest.mark.parametrize("call", [broadcast_state, check_equal])
def test_other_names_shapes_and_dtypes_are_refused_on_all_ranks(call, message, first, second):
    errors = []

    def work(comm):
        mine = (first, second)[comm.rank]
        before = plain(mine)
        try:
            call(mine, comm)
        except KilterError as error:
            errors.append(str(error))
        return plain(mine) == before

    if "different a" in message:  # the name is each rank's own
        message = "got different"
    assert Threads(2).run(work) == [True, True]
    assert len(errors) == 2 and all(message in text for text in errors)


def test_equal_means_equal_in_bits():
    """0.0 and -0.0 are not the same; NaNs of one kind are."""

    def work(comm):
        check_equal({"nan": np.full(2, np.nan)}, comm)
        with pytest.raises(KilterError, match=r"got different zero$"):
            check_equal({"one": np.ones(1), "zero": np.array([0.0 if comm.rank else -0.0])}, comm)
        check_equal({}, comm)
        return True

    assert Threads(3).run(work) == [True] * 3


@pytest.mark.parametrize("target", [3, None, [np.ones(2)], {"a": 3.0}])
@pytest.mark.parametrize("call", [broadcast_state, check_equal])
def test_what_has_no_state_is_refused(call, target):
    with pytest.raises(KilterError, match=r"^target"):
        call(target, Single())


def test_read_only_arrays_are_refused_before_the_exchange():
    arrays = {"a": np.ones(3), "b": READ_ONLY}
    with refused(r"^target\[b\]: expected a writable array", arrays):
        broadcast_state(arrays, Single())
