"""What `fit` can do besides: accumulate, average, share the work with other ranks, monitor."""

import math

import numpy as np
import pytest

import kilter
from kilter import nn, optim, schedule, train
from kilter.data import Batches
from kilter.dist import Single, Threads
from small import Notes, blobs, run, small

# ---- accumulation


@pytest.mark.parametrize(("samples", "micro", "k"), [(64, 16, 4), (70, 16, 4), (77, 10, 3), (5, 2, 9)])
def test_micro_batches_give_the_steps_of_whole_batches(samples, micro, k):
    x, y = blobs(samples, dtype=np.float64)
    trained = []
    for size, accumulate in ((micro * k, 1), (micro, k)):
        model = nn.mlp(4, 3, hidden=(8,), norm="none", dtype="float64")
        optimizer = optim.SGD(model.params(), 0.1, momentum=0.9)
        batches = Batches(x, y, size, seed=0)
        notes = Notes()
        history = train.fit(
            model, optimizer, nn.softmax_cross_entropy, batches, epochs=3, accumulate=accumulate, callbacks=[notes]
        )
        assert optimizer.calls == notes.calls.count("step") == 3 * -(-samples // (micro * k))
        trained.append((model.state_dict(), history[-1]["loss"]))
    (one, loss), (other, same) = trained
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-12, atol=1e-13, err_msg=name)
    assert loss == pytest.approx(same, rel=1e-12)


def test_accumulation_under_a_scaler_skips_the_whole_step():
    x, y = blobs(64, dtype=np.float16)
    model = nn.mlp(4, 3, hidden=(8,), norm="none", dtype="float16")
    x[17] = 60000  # one micro-batch overflows
    optimizer = optim.SGD(model.params(), 1e-3)
    before = model.state_dict()
    scaler = optim.LossScaler(init=2.0**15)
    batches = Batches(x, y, 16, seed=0, shuffle=False)
    train.fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=1, accumulate=4, scaler=scaler)
    assert (optimizer.calls, optimizer.applied, scaler.scale) == (1, 0, 2.0**14)
    for name, value in model.params().items():
        np.testing.assert_array_equal(value, before[name])


# ---- averaged weights


class Weights(train.Callback):
    """Notes the weights after each step, and what model.params() holds during the validation."""

    def __init__(self):
        self.steps = []

    def on_step(self, state):
        self.steps.append({name: p.astype(np.float64) for name, p in state.model.params().items()})


def test_averages_follow_the_steps_and_are_what_is_evaluated():
    x, y = blobs()
    model, optimizer = small(norm="none")
    average = {name: p.astype(np.float64) for name, p in model.params().items()}
    ema, weights = optim.WeightEMA(model.params(), 0.9), Weights()
    valid = blobs(50, seed=1)
    history = train.fit(
        model, optimizer, nn.softmax_cross_entropy, (x, y), epochs=2, valid=valid, ema=ema, callbacks=[weights]
    )
    for after in weights.steps:
        for name, p in after.items():
            average[name] += 0.1 * (p - average[name])
    for name, p in model.params().items():
        np.testing.assert_array_equal(p, weights.steps[-1][name].astype(np.float32))  # the trained ones again
    trained = train.evaluate(model, valid).loss
    ema.swap()
    for name, p in model.params().items():
        np.testing.assert_allclose(p, average[name], rtol=1e-5, atol=1e-6)
    assert train.evaluate(model, valid).loss == history[-1]["valid_loss"] != trained


def test_a_skipped_step_is_not_averaged():
    x, y = blobs(64, dtype=np.float16)
    model = nn.mlp(4, 3, hidden=(8,), dtype="float16")
    ema = optim.WeightEMA(model.params(), 0.9)
    optimizer = optim.SGD(model.params(), 1e-3)
    scaler = optim.LossScaler(init=2.0**40)
    train.fit(model, optimizer, nn.softmax_cross_entropy, Batches(x, y, 8, seed=0), epochs=1, scaler=scaler, ema=ema)
    assert ema.updates == optimizer.applied < optimizer.calls == 8


def test_swapped_averages_are_refused():
    model, optimizer = small()
    ema = optim.WeightEMA(model.params())
    ema.swap()
    with pytest.raises(kilter.KilterError, match="ema: expected the trained weights"):
        train.fit(model, optimizer, nn.softmax_cross_entropy, blobs(), epochs=1, ema=ema)


# ---- ranks


def shared(size, *, sync=True, samples=200, accumulate=1, folder=None, resume=False, callbacks=lambda comm: ()):
    """Train on so many ranks; what each has in the end."""
    x, y = blobs(samples, dtype=np.float64)

    def work(comm):
        model = nn.mlp(4, 3, hidden=(8,), dtype="float64")
        if sync:
            nn.convert_sync_batchnorm(model, comm)
        optimizer = optim.SGD(model.params(), 0.05, momentum=0.9)
        history = train.fit(
            model,
            optimizer,
            nn.softmax_cross_entropy,
            Batches(x, y, 30, seed=0),
            epochs=3,
            valid=blobs(41, seed=1, dtype=np.float64),
            accumulate=accumulate,
            comm=comm,
            checkpoint=folder,
            resume=resume,
            callbacks=callbacks(comm),
        )
        return model.state_dict(), history

    return Threads(size).run(work) if size else [work(None), work(Single())]


@pytest.mark.parametrize(("samples", "accumulate"), [(200, 1), (200, 3), (182, 1)])
def test_ranks_do_what_one_process_does(samples, accumulate):
    """A last batch of 20, and one of 2 samples for 1 to 4 ranks: some have none."""
    (state, history), same = shared(0, samples=samples, accumulate=accumulate)
    for name, value in same[0].items():
        np.testing.assert_array_equal(value, state[name])
    for size in (2, 3, 4):
        results = shared(size, samples=samples, accumulate=accumulate)
        for found, rows in results:
            for name, value in state.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-11, err_msg=name)
                np.testing.assert_array_equal(found[name], results[0][0][name])
            for row, own in zip(rows, history, strict=True):
                assert row["loss"] == pytest.approx(own["loss"], rel=1e-9)
                assert row["valid_loss"] == pytest.approx(own["valid_loss"], rel=1e-9)
                assert (row["accuracy"], row["valid_accuracy"]) == (own["accuracy"], own["valid_accuracy"])


def test_local_batch_norm_takes_the_statistics_of_rank_0():
    results = shared(3, sync=False)
    for found, rows in results:
        assert timeless(rows) == timeless(results[0][1])
        for name, value in found.items():
            np.testing.assert_array_equal(value, results[0][0][name], err_msg=name)


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def test_one_rank_writes_and_any_rank_stops(tmp_path):
    results = shared(3, folder=tmp_path, callbacks=lambda comm: [Notes(stop_after=2 if comm.rank == 2 else None)])
    assert [len(rows) for _, rows in results] == [2, 2, 2]
    states = train.load(tmp_path / "last.safetensors").model
    for name, value in results[2][0].items():
        np.testing.assert_array_equal(value, states[name])


def test_ranks_go_on_together_and_one_warns(tmp_path):
    whole = shared(2)
    with pytest.raises(KeyboardInterrupt):
        shared(2, folder=train.Checkpoints(tmp_path, every=2), callbacks=lambda comm: [Notes(fail_at=15)])
    (tmp_path / "last.safetensors").write_bytes(b"")  # the one before lies within the second epoch
    for size in (3, None):
        with pytest.raises(kilter.KilterError, match=f"a run with ranks {size or 1}, got 2"):
            shared(size, folder=tmp_path, resume=True)
    with pytest.warns(UserWarning, match="continuing from") as said:
        again = shared(2, folder=tmp_path, resume=True)
    assert len(said) == 1
    for (state, rows), (want, history) in zip(again, whole, strict=True):
        assert timeless(rows) == timeless(history)
        for name, value in want.items():
            np.testing.assert_array_equal(state[name], value)


def test_ranks_that_start_from_different_weights_are_refused():
    def work(comm):
        model, optimizer = small(seed=comm.rank)
        train.fit(model, optimizer, nn.softmax_cross_entropy, blobs(), epochs=1, comm=comm)

    with pytest.raises(kilter.KilterError, match="expected the same on all ranks"):
        Threads(2).run(work)


def test_a_rank_whose_loss_is_not_finite_ends_all():
    x, y = blobs(64)
    x[40] = np.inf

    def work(comm):
        model, optimizer = small(norm="none")
        train.fit(
            model, optimizer, nn.softmax_cross_entropy, Batches(x, y, 64, seed=0, shuffle=False), epochs=1, comm=comm
        )

    with pytest.raises(kilter.KilterError, match="loss: expected a finite number"):
        Threads(4).run(work)


# ---- monitors


def test_the_monitor_adds_what_was_measured():
    weights = Weights()
    x, y = blobs()
    model, optimizer = small()
    first = {name: p.astype(np.float64) for name, p in model.params().items()}
    norms = []

    class Norms(train.Callback):
        def on_step(self, state):
            norms.append(math.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in state.grads.values())))

    callbacks = [train.Monitor(every=3), weights, Norms()]
    batches = Batches(x, y, 32, seed=0)
    history = train.fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=2, callbacks=callbacks)
    steps = [first, *weights.steps]
    for epoch, row in enumerate(history):
        assert row["grad_norm"] == pytest.approx(np.mean(norms[7 * epoch : 7 * epoch + 7]), rel=1e-6)
        compared = [s for s in range(7 * epoch + 1, 7 * epoch + 8) if s % 3 == 0]
        ratios = [train.update_ratio(steps[s - 1], steps[s]) for s in compared]
        assert row["update_ratio"] == pytest.approx(np.mean(ratios), rel=1e-5)
        assert row["nonfinite"] == 0


def test_the_monitor_counts_steps_that_were_skipped():
    model = nn.mlp(4, 3, hidden=(8,), dtype="float16")
    optimizer = optim.SGD(model.params(), 1e-3)
    (row,) = train.fit(
        model,
        optimizer,
        nn.softmax_cross_entropy,
        Batches(*blobs(64, dtype=np.float16), 8, seed=0),
        epochs=1,
        scaler=optim.LossScaler(init=2.0**40),
        callbacks=[train.Monitor()],
    )
    assert row["nonfinite"] == optimizer.calls - optimizer.applied > 0


def test_monitors_by_hand():
    before = {"w": np.array([3.0, 4.0], np.float32), "b": np.zeros(2, np.float16)}
    after = {"w": np.array([3.0, 4.5], np.float32), "b": np.zeros(2, np.float16)}
    assert train.update_ratio(before, after) == pytest.approx(0.1)
    zero = {"w": np.zeros(2)}
    assert train.update_ratio(zero, zero) == 0
    assert train.update_ratio(zero, {"w": np.ones(2)}) == math.inf
    assert train.count_nonfinite({"a": np.array([1, np.nan, np.inf]), "b": np.array([-np.inf, 0.0], np.float16)}) == 3
    for wrong in ({"v": np.ones(2)}, {"w": np.ones(3)}):
        with pytest.raises(kilter.KilterError, match="after"):
            train.update_ratio(zero, wrong)
    with pytest.raises(kilter.KilterError, match="every: expected"):
        train.Monitor(every=0)


def test_a_plateau_lowers_the_rate_of_a_run():
    lr = schedule.Plateau(1e-3, patience=0, threshold=0.9)
    _, _, history = run(4, lr=lr, callbacks=[train.FollowPlateau(lr)])
    assert [row["lr"] for row in history] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    with pytest.raises(kilter.KilterError, match="metric"):
        run(1, lr=lr, callbacks=[train.FollowPlateau(lr, "valid_loss")])


@pytest.mark.parametrize("accumulate", [0, 1.5, True])
def test_accumulate_is_a_whole_number(accumulate):
    model, optimizer = small()
    with pytest.raises(kilter.KilterError, match="accumulate: expected a whole number"):
        train.fit(model, optimizer, nn.softmax_cross_entropy, blobs(), epochs=1, accumulate=accumulate)
