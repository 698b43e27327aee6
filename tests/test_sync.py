"""Batch norm of whole models: over ranks, and over a whole data set."""

import copy

import numpy as np
import pytest

from kilter import KilterError, nn, optim, train
from kilter.data import Batches
from kilter.dist import Single, Threads, check_equal
from small import blobs
from support import plain, same_bits

pytestmark = pytest.mark.timeout(60)
SPLITS = {"equal": (32, 64), "unequal": (50, 53), "an empty rank": (0, 40)}


def network(**options):
    return nn.mlp(4, 3, hidden=(8, 6), seed=0, dtype=np.float64, **options)


def one_step(model, x, y, total, comm=None):
    """Logits, gradients summed over the ranks, and the model after one step of SGD."""
    logits = model(x)
    _, dlogits = nn.softmax_cross_entropy(logits, y) if len(y) else (0.0, np.zeros_like(logits))
    model.backward(dlogits * (len(y) / total))
    grads = model.grads()
    for grad in grads.values() if comm else ():
        comm.all_reduce(grad)
    grads = copy.deepcopy(grads)
    optim.SGD(model.params(), 0.1).step(grads)
    return logits, grads, model.state_dict()


@pytest.mark.parametrize("ends", SPLITS.values(), ids=SPLITS)
def test_a_synchronised_model_trains_as_on_one_rank(ends):
    x, y = blobs(96, dtype=np.float64)
    logits, grads, state = one_step(network(), x, y, 96)
    xs, ys = np.split(x, ends), np.split(y, ends)

    def work(comm):
        model = nn.convert_sync_batchnorm(network(), comm)
        return one_step(model, xs[comm.rank], ys[comm.rank], 96, comm)

    results = Threads(3).run(work)
    np.testing.assert_allclose(np.concatenate([r[0] for r in results]), logits, rtol=1e-11, atol=1e-12)
    for _, rank_grads, rank_state in results:
        for name, grad in grads.items():
            np.testing.assert_allclose(rank_grads[name], grad, rtol=1e-9, atol=1e-12, err_msg=name)
        for name, value in state.items():
            np.testing.assert_allclose(rank_state[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        assert plain(rank_state) == plain(results[0][2]), "ranks differ"


def test_all_ranks_skip_the_same_steps():
    """A scale that overflows float16 on one rank's share backs off on all: the same steps, scale and bits."""
    x, y = blobs(96, dtype=np.float16)
    x[5] *= 500  # in the share of one rank

    def work(comm):
        model = nn.convert_sync_batchnorm(nn.mlp(4, 3, hidden=(8,), seed=0, dtype="float16"), comm)
        optimizer, scaler = optim.AdamW(model.params(), 1e-2), optim.LossScaler(2.0**24, interval=3)
        batches = Batches(x, y, 32, seed=0)
        train.fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=4, scaler=scaler, comm=comm)
        check_equal(model, comm)
        check_equal(optimizer, comm)
        check_equal(scaler, comm)
        return scaler.scale

    assert Threads(3).run(work)[0] < 2.0**24, "some steps were skipped"


def test_conversion_reaches_every_layer_and_can_be_undone():
    model, comm = network(), Single()
    before = model.state_dict()
    layers = [m for _, m in model.modules() if isinstance(m, nn.BatchNorm)]
    assert len(layers) == 2
    assert nn.convert_sync_batchnorm(model, comm) is model
    assert all(layer.comm is comm for layer in layers)
    assert plain(model.state_dict()) == plain(before)
    nn.convert_sync_batchnorm(model, None)
    assert all(layer.comm is None for layer in layers)
    assert nn.convert_sync_batchnorm(nn.Sequential(nn.ReLU()), comm).layers


def test_the_copy_of_a_synchronised_model_has_its_communicator():
    def work(comm):
        model = nn.convert_sync_batchnorm(network(), comm)
        return copy.deepcopy(model)[2].comm is comm

    assert Threads(2).run(work) == [True, True]


def test_conversion_is_checked():
    model = network()
    with pytest.raises(KilterError, match=r"^comm: expected a communicator, got Threads"):
        nn.convert_sync_batchnorm(model, Threads(2))
    with pytest.raises(KilterError, match=r"^model: "):
        nn.convert_sync_batchnorm([model], Single())
    assert model[2].comm is None


def test_learnables_of_three_layers():
    """Each layer has its own gamma and beta of length k: 3 layers of 4 features have 24; statistics do not count."""
    model = nn.Sequential(*(nn.BatchNorm(4) for _ in range(3)))
    assert sum(p.size for p in model.params().values()) == 24
    assert len({id(p) for p in model.params().values()}) == 6
    assert sum(np.size(v) for v in model.state_dict().values()) > 24


def test_the_layer_may_be_the_identity(rng):
    layer = nn.BatchNorm(3, dtype=np.float64)
    x = rng.normal(3, 2, (50, 3))
    layer.params()["gamma"][:] = np.sqrt(x.var(0) + 1e-5)
    layer.params()["beta"][:] = x.mean(0)
    np.testing.assert_allclose(layer(x), x, rtol=1e-12)


# --------------------------------------------------------------------------- the statistics of a data set


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("batch", [10, 11, 64, 200])
def test_the_first_layer_gets_the_statistics_of_the_data(batch, unbiased):
    """Sorted samples, so batches of unequal size and unlike means: still the population's mean and variance."""
    x = np.sort(np.random.default_rng(0).normal(5, 2, (64, 3)), axis=0)
    model = nn.Sequential(nn.BatchNorm(3, dtype=np.float64, unbiased=unbiased))
    train.recompute_batch_norm(model, Batches(x, np.zeros(64), batch, seed=0, shuffle=False))
    running = model[0].running
    np.testing.assert_allclose(running.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(running.var, x.var(0, ddof=int(unbiased)), rtol=1e-13)
    assert (running.count, running.updates) == (64, -(-64 // batch))


@pytest.mark.parametrize("batch", [16, 24])
def test_recomputed_with_kept_buffers(batch):
    x, y = blobs(64, dtype=np.float64)
    fresh, kept = network(), network().reuse_buffers()
    for model in (fresh, kept):
        train.recompute_batch_norm(model, Batches(x, y, batch, seed=0))
    for name, value in fresh.state_dict().items():
        np.testing.assert_array_equal(value, kept.state_dict()[name])


def test_v5_weighs_batches_by_their_count():
    """{1, 2, 3} and {10, 10}: neither the mean of means (6) nor the mean of variances (0.33)."""
    model = nn.Sequential(nn.BatchNorm(1, dtype=np.float64, unbiased=False))
    x = np.array([[1.0], [2.0], [3.0], [10.0], [10.0]])
    train.recompute_batch_norm(model, Batches(x, x, 3, seed=0, shuffle=False))
    np.testing.assert_allclose([model[0].running.mean[0], model[0].running.var[0]], [5.2, x.var()], rtol=1e-14)


def test_layers_behind_see_normalised_batches():
    """In one batch, the training and the eval output of the whole model then agree."""
    x, y = blobs(200, dtype=np.float64)
    model = network()
    for _, layer in model.modules():
        if isinstance(layer, nn.BatchNorm):
            layer.running.unbiased = False
    before = model.state_dict()
    want = model(x).copy()
    model.load_state_dict(before)
    assert np.abs(model.eval()(x) - want).max() > 0.1
    train.recompute_batch_norm(model, (x, y))
    np.testing.assert_allclose(model(x), want, rtol=1e-9, atol=1e-9)
    changed = {name for name, value in model.state_dict().items() if not np.array_equal(value, before[name])}
    assert changed == {f"{i}.running.{name}" for i in (2, 4) for name in ("mean", "var", "count", "updates")}


def gap(model, x, y):
    """How far the loss in eval mode is from that by the statistics of the data themselves."""
    state = model.state_dict()
    evaluated = train.evaluate(model, (x, y)).loss
    model.train()
    trained = nn.softmax_cross_entropy(model(x), y)[0]
    model.eval().load_state_dict(state)
    return abs(evaluated - trained)


def test_the_gap_between_training_and_inference_closes():
    """Running averages start far away and come closer with the steps; one pass over the data closes the rest."""
    x, y = blobs(256)
    model = nn.mlp(4, 3, hidden=(8,), seed=0)
    optimizer = optim.AdamW(model.params(), 1e-3)
    gaps = []
    for epoch in range(4):
        gaps.append(gap(model, x, y))
        train.fit(model, optimizer, nn.softmax_cross_entropy, Batches(x, y, 32, seed=epoch), epochs=1)
    assert gaps[0] > 5 * gaps[-1] > 0
    train.recompute_batch_norm(model, (x, y))
    assert gap(model, x, y) < min(gaps) / 5


def test_modes_momentum_and_other_layers_stay_as_they_are():
    x, y = blobs(40)
    model = nn.mlp(4, 3, hidden=(8,), seed=0, dropout=0.5)
    twin = copy.deepcopy(model)
    model.eval()
    model[0].train()
    momentum, modes = model[2].running.momentum, [m.training for _, m in model.modules()]
    train.recompute_batch_norm(model, (x, y))
    assert [m.training for _, m in model.modules()] == modes
    assert model[2].running.momentum == momentum
    for name, value in model.state_dict().items():
        assert "running" in name or np.array_equal(value, twin.state_dict()[name]), name
    again = model.state_dict()
    train.recompute_batch_norm(model, (x, y))  # dropout draws nothing: the same again
    assert plain(model.state_dict()) == plain(again)


def test_frozen_layers_keep_their_statistics():
    x, y = blobs(40)
    model = nn.mlp(4, 3, hidden=(8, 6), seed=0)
    model[2].freeze()
    before = copy.deepcopy(model[2].running.state_dict())
    train.recompute_batch_norm(model, (x, y))
    assert plain(model[2].running.state_dict()) == plain(before)
    assert model[4].running.count == 40


class Broken:
    def epoch(self, epoch):
        x, y = blobs(20)
        yield x, y
        yield x[:1], y[:1]  # one value per channel

    def __len__(self):
        return 2


class Empty:
    def epoch(self, epoch):
        return iter(())

    def __len__(self):
        return 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Broken(), "more than one value"),
        (Empty(), "^data: expected at least one batch"),
        (3, "^data: "),
        (blobs(20)[0], "^data: "),
    ],
    ids=["batch", "empty", "number", "x alone"],
)
def test_an_error_changes_nothing(data, message):
    model = nn.mlp(4, 3, hidden=(8,), seed=0)
    model(blobs(30)[0])
    before = model.eval().state_dict()
    with pytest.raises(KilterError, match=message):
        train.recompute_batch_norm(model, data)
    assert plain(model.state_dict()) == plain(before)
    assert not any(m.training for _, m in model.modules())


def test_recomputed_over_ranks():
    """Every rank passes its own part, and all get the statistics of the whole."""
    x, y = blobs(100, dtype=np.float64)
    parts = np.array_split(np.arange(100), [30, 70])

    def work(comm):
        model = nn.convert_sync_batchnorm(network(), comm)
        mine = parts[comm.rank]
        train.recompute_batch_norm(model, (x[mine], y[mine]))
        return model[2].running

    alone = network()
    train.recompute_batch_norm(alone, (x, y))
    for running in Threads(3).run(work):
        np.testing.assert_allclose(running.mean, alone[2].running.mean, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(running.var, alone[2].running.var, rtol=1e-12)
        assert running.count == 100
    assert same_bits(alone[2].running.mean, alone.state_dict()["2.running.mean"])
