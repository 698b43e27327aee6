"""The arithmetic of the experiments: known numbers, and what makes a claim hold."""

import numpy as np
import pytest

from kilter import data, nn
from kilter.experiments import (
    batchnorm,
    inference,
    momentum,
    optimizers,
    parallel,
    pipeline,
    precision,
    preconditioning,
    schedules,
    softlabels,
    sync,
    task,
    transfer,
    tricks,
    weights,
)


def verdicts(claims):
    return [claim.held for claim in claims]


# ---- what is exact


def test_v8_statistics_of_three_devices():
    rules = sync._rules()
    assert rules == {
        "all samples on one device": pytest.approx((13 / 3, 80 / 9)),
        "weighted by samples": pytest.approx((13 / 3, 80 / 9)),
        "batch_norm(comm=...)": pytest.approx((13 / 3, 80 / 9)),
        "sums over total samples": pytest.approx((8 / 3, 11 / 18)),
        "mean of the devices": pytest.approx((16 / 3, 11 / 9)),
    }
    assert verdicts(sync._claims_on_rules(rules)) == [True, True, False, True]


def test_v9_sums_of_gradients():
    constant, alternating = momentum.sums(np.ones(50)), momentum.sums((-1.0) ** np.arange(50))
    steps = [0, 1, 2, 9, 49]
    np.testing.assert_allclose(constant[steps], [1, 1.9, 2.71, 6.513215599, 9.948462248])
    np.testing.assert_allclose(np.abs(alternating[steps]), [1, 0.1, 0.91, 0.342800821, 0.523603276], rtol=1e-8)
    assert verdicts(momentum._claims_on_sums(constant, alternating)) == [True, False, True, True]


def test_v17_steps_on_quadratics():
    assert preconditioning.count(1e4, "gradient descent") == 70_811
    assert preconditioning.count(1e4, "diagonal Newton") == 1
    assert preconditioning.count(100.0, "diagonal Newton", turned=True) == 709
    assert preconditioning.count(100.0, "gradient descent", turned=True) == 709


def test_v18_one_weight_through_the_loop():
    found = precision.loop()
    assert found.lost == 0
    assert found.scaled == 2.0**-15
    assert found.unscaled == 2.0**-25
    assert found.master == found.copy == float(np.float16(0.1))
    assert found.after == np.float32(found.master) - np.float32(2.0**-25)
    assert precision._loop_claim(found).held
    assert not precision._loop_claim(found._replace(after=found.master)).held


def test_v16_targets():
    assert softlabels._target("uniform", 0.1, 4) == pytest.approx((0.925, 0.025))
    assert softlabels._target("rest", 0.1, 4) == pytest.approx((0.9, 0.1 / 3))
    assert softlabels._entropy(1.0, 0.0) == 0
    assert softlabels._entropy(0.1, 0.1) == pytest.approx(np.log(10))
    assert verdicts(softlabels._claims_on_targets()) == [False, True, True, False]
    assert softlabels._claim_on_mixing(0).held


def test_v12_variances():
    given = {name: start.variance(784, 512) for name, start in weights.STARTS.items()}
    assert given["Xavier uniform"] == given["Xavier normal"] == pytest.approx(1.543210e-3, rel=1e-6)
    assert given["He normal"] == pytest.approx(0.050507627227**2)
    assert given["PyTorch default"] == pytest.approx(4.251701e-4, rel=1e-6)
    drawn = {name: start.fill((784, 512), seed=1) for name, start in weights.STARTS.items()}
    assert verdicts(weights._claims_on_weights(drawn, "1")) == [True, False, True]


def test_a_signal_through_thirty_layers():
    depth = {name: weights._signal(weights.STARTS[name], 1) for name in ("He normal", "Xavier normal")}
    assert depth["He normal"][21] == pytest.approx(1, rel=0.8)
    assert depth["Xavier normal"][21] == pytest.approx(2.0**-11, rel=0.8)


def test_the_loss_of_the_sketch_has_its_slope():
    w = np.linspace(-1, 4, 11)
    slope = (momentum._loss(w + 1e-6) - momentum._loss(w - 1e-6)) / 2e-6
    np.testing.assert_allclose(momentum._slope(w), slope, atol=1e-8)
    assert momentum.largest_rate(0.0) == pytest.approx(2, abs=0.02)
    assert momentum.largest_rate(0.9) == pytest.approx(3.8, abs=0.02)


@pytest.mark.parametrize(
    ("module", "held"),
    [
        (momentum, [True, False, True, True, True, False, True, True]),
        (schedules, [False, False, True, True, False, True]),
    ],
)
def test_what_holds_where_nothing_is_random(module, held):
    assert verdicts(module.run(0).claims) == held


def test_rules_to_the_letter():
    assert verdicts(optimizers._first_steps()) == [False, True]
    claims = optimizers._to_the_letter()
    assert verdicts(claims) == [False, False, False]
    assert "-4,999,999" in claims[0].numbers


def test_of_batch_norm_step_by_step():
    gradients = pipeline._gradients(1)
    assert not gradients.held
    assert float(gradients.numbers.split()[-1]) < 1e-7, "summed over the batch"
    assert not pipeline._not_normal(1).held
    assert all(verdicts([pipeline._identity(1), pipeline._count(), *pipeline._relatives(1)]))


def test_of_devices():
    assert all(verdicts([parallel._shares(), parallel._gradients(1), parallel._accumulated(1), sync._equal_parts(1)]))
    assert not sync._exchanged(1).held, "statistics do"
    assert parallel._ranks(task.rows(data.digits(), 640), 1).held


def test_of_inference():
    assert inference._alone(1).held
    assert inference._pooled().held
    noise = [inference._noise(norm, 16, 1) for norm in ("batch", "layer", "group")]
    assert noise == [pytest.approx(np.sqrt(1.5 / 16), rel=0.1), 0, 0]


# ---- what is measured


def test_a_look_along_the_gradient_leaves_the_model():
    model = nn.mlp(6, 3, hidden=(4,), norm="none", seed=1)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((9, 6)).astype("float32"), rng.integers(0, 3, 9)
    model.backward(nn.softmax_cross_entropy(model(x), y)[1])
    before = [{name: a.copy() for name, a in some.items()} for some in (model.params(), model.grads())]
    reach, turn = batchnorm._look(model, x, y)
    assert reach > 0
    assert turn > 0
    for old, now in zip(before, (model.params(), model.grads()), strict=True):
        for name, a in old.items():
            np.testing.assert_array_equal(now[name], a)


def test_the_labels_of_the_two_tasks():
    for name in batchnorm.TASKS:
        found = batchnorm._data(name, 500, 1)
        assert [a.shape for a in found] == [(500, 10), (500, 1), (500, 10), (500, 1)]
        assert found.y_train.mean() == pytest.approx(0.5, abs=0.1)
    again = batchnorm._data("learnable labels", 500, 1)
    np.testing.assert_array_equal(again.x_train, found.x_train)


def a_run(last, held_out, seconds):
    epochs = np.linspace(1, 0, 20)
    return batchnorm.Run(last + epochs, np.full(20, held_out), np.full(20, seconds))


def test_batch_norm_is_judged_by_epochs_and_by_time():
    rng = np.random.default_rng(0)
    fast = [a_run(0.5 + 0.01 * z, 0.8, 1.0) for z in rng.standard_normal(8)]
    slow = [run._replace(loss=run.loss[:10] - 0.01, seconds=np.full(10, 2.0)) for run in fast]
    runs = {
        (name, kind): some for name in batchnorm.TASKS for kind, some in zip(batchnorm.KINDS, (slow, fast), strict=True)
    }
    by_epochs, by_time = batchnorm._claims("random labels", runs, "0 to 7")
    assert by_epochs.held, "lower by 0.01 after ten epochs"
    assert "lower with 8 of 8 seeds" in by_epochs.numbers
    assert not by_time.held, "but not after the time of twenty of the other"
    memory, better = batchnorm._held_out(runs, "0 to 7")
    assert memory.held
    assert not better.held


def test_the_tasks_of_transfer_share_no_image():
    found = task.rows(data.digits(), 300)
    size = transfer.QUICK
    for name, (known, wanted) in {"new classes": (6, 4), "finer classes": (5, 10)}.items():
        old, new = transfer._tasks(found, name, size, np.random.default_rng(0).permutation(10))
        assert sorted(set(old.y_train)) == list(range(known))
        assert sorted(set(new.y_train)) == list(range(wanted))
        assert not {x.tobytes() for x in old.x_train} & {x.tobytes() for x in new.x_train}
    pairs = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    old, _ = transfer._tasks(found, "finer classes", size, pairs)
    share = len(old.y_train)
    np.testing.assert_array_equal(old.y_train == 0, np.isin(found.y_train[:share], (3, 1)))


@pytest.mark.parametrize(("way", "learns"), [("from scratch", 8), ("new last layer", 2), ("all layers", 8)])
def test_what_learns_in_each_way_of_transfer(way, learns):
    model = nn.mlp(64, 4, hidden=transfer.HIDDEN)
    if way == "new last layer":
        for layer in model.layers[:-1]:
            layer.freeze()
    optimizer = transfer._optimizer(model, way)
    rates = [group["lr"] for group in optimizer.groups for _ in group["params"]]
    assert len(rates) == learns
    assert rates.count(transfer.RATES[way]) == (2 if way == "all layers" else learns)


def a_race(accuracy, seconds, seeds=4):
    rng = np.random.default_rng(1)
    steps = np.arange(1.0, 5.0)
    curves = [
        task.Curve(steps, steps * seconds * (1 + 0.01 * z), np.array([0.3, 0.5, 0.9, accuracy + 0.001 * z]), steps)
        for z in rng.standard_normal(seeds)
    ]
    return tricks.Race(curves, 0.85)


def test_a_race_is_judged_by_seconds_and_accuracy():
    base = a_race(0.90, 2.0)
    races = dict.fromkeys(tricks.VARIANTS, base) | {
        "2 large batch, scaled rate, warm-up": a_race(0.90, 1.0),
        "4 mixup": a_race(0.95, 4.0),
        "1 data parallel": a_race(0.88, 2.0),
        "7 mixed precision": base._replace(target=0.99),
    }
    claims = {claim.claim: claim for claim in tricks._claims(races, "85 %", "0 to 3")}
    held = [text for text, claim in claims.items() if claim.held]
    assert held == [
        "2 large batch, scaled rate, warm-up: sooner at 85 % test accuracy",
        "2 large batch, scaled rate, warm-up: loses less than a point of test accuracy",
        "4 mixup: a higher test accuracy in the end",
        "7 mixed precision: loses less than a point of test accuracy",
    ]
    numbers = claims["7 mixed precision: sooner at 85 % test accuracy"].numbers
    assert numbers == "it arrives with 0 of 4 seeds, the baseline arrives with 4 of 4 seeds"
    assert tricks._numbers(races["7 mixed precision"])[2:4] == (None, None)
    assert tricks._numbers(base)[2] == 3
    assert tricks._finite(races["7 mixed precision"], 1) == []


def test_three_looks_are_averaged():
    np.testing.assert_allclose(tricks.averaged(np.array([3.0, 5.0, 1.0, 6.0])), [3, 4, 3, 4])
    assert tricks.averaged(np.array([])).size == 0


def test_rates_of_the_tricks():
    lr, beta = tricks._rates(tricks.Trick(), 100, 5)
    assert (lr(0), beta) == (tricks.LR, tricks.MOMENTUM)
    lr, _ = tricks._rates(tricks.Trick(large=True), 100, 5)
    assert (lr(0), lr(100)) == pytest.approx((0, 4 * tricks.LR))
    for rate in ("cyclic", "one cycle"):
        lr, beta = tricks._rates(tricks.Trick(rate=rate), 100, 5)
        steps = np.arange(500)
        assert np.argmax(lr(steps)) == np.argmin(beta(steps))
        assert lr(steps).max() == pytest.approx(tricks.PEAK * tricks.LR, rel=0.02)


def test_rates_of_large_batches():
    size = parallel.FULL
    same, scaled, warm, both = (parallel._rate(size, 16, *how) for how in parallel.WAYS.values())
    steps = parallel._warm_steps(size, 16)
    assert steps == 25
    assert (same(0), scaled(0), warm(0), both(0)) == pytest.approx((0.01, 0.16, 0, 0))
    assert (same(steps), scaled(steps), warm(steps), both(steps)) == pytest.approx((0.01, 0.16, 0.01, 0.16))
    assert parallel._falling(size, 16)(0) == pytest.approx(0.32)
    assert parallel._falling(size, 16)(steps) == pytest.approx(0.16)
