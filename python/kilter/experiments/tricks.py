"""Seven tricks that are to speed training up, one by one and together.

A network with batch norm learns Fashion-MNIST (or digits) for a few epochs by SGD with momentum at a constant rate: the
baseline. Each trick changes one thing of it. Times are those of this machine, of training alone; what a trained network
cost before, that transfer starts from, is not counted. It knows the classes in groups of three, from other images. An
accuracy is the mean of three looks, so that a lucky moment does not win the race.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kilter import nn, optim, schedule
from kilter.data import Batches, Dataset, mixup
from kilter.dist import Communicator, Single, Threads
from kilter.experiments import panels
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import TRICKS, Claim, Result, Table, seeds
from kilter.experiments.task import Curve, Watch, images
from kilter.train import fit, plot

HIDDEN, CLASSES, BATCH, LR, MOMENTUM = (256, 128), 10, 64, 0.02, 0.9
TARGET = {"Fashion-MNIST": 0.855, "digits": 0.95}  # test accuracy of the race
RANKS, TIMES, EPS, ALPHA, SCALE, PEAK = 2, 4, 0.1, 0.2, 1024.0, 4.0
TEST, LOOKS, MEAN = 2000, 30, 3  # test images; evaluations per run; those that are averaged
GROUP = 3  # classes in a group of the old task


class Trick(NamedTuple):
    """What a run does unlike the baseline, as options of `_train`."""

    ranks: int = 1
    large: bool = False  # a large batch, the rate scaled by it, behind a warm-up
    rate: str = "constant"
    mixed: bool = False  # mixup
    smooth: bool = False  # label smoothing
    stored: bool = False  # starts from stored weights
    half: bool = False  # float16 with float32 masters and a scaled loss


SINGLE = {
    "1 data parallel": Trick(ranks=RANKS),
    "2 large batch, scaled rate, warm-up": Trick(large=True),
    "3 cyclic rate": Trick(rate="cyclic"),
    "3 one cycle, momentum against it": Trick(rate="one cycle"),
    "4 mixup": Trick(mixed=True),
    "5 label smoothing": Trick(smooth=True),
    "6 transfer": Trick(stored=True),
    "7 mixed precision": Trick(half=True),
}
KEEPING = ("1 data parallel", "2 large batch, scaled rate, warm-up", "7 mixed precision")  # that are for speed alone
POINT = 1.0  # of test accuracy
BEST, ALL = "2, 3, 5, 6 together", "all seven together"
VARIANTS = {
    "baseline": Trick(),
    **SINGLE,
    BEST: Trick(large=True, rate="one cycle", smooth=True, stored=True),
    ALL: Trick(RANKS, large=True, rate="one cycle", mixed=True, smooth=True, stored=True, half=True),
}


class Size(NamedTuple):
    """Seeds, images, epochs."""

    seeds: int
    images: int
    epochs: int


FULL, QUICK = Size(7, 15_000, 6), Size(2, 256, 1)


class Race(NamedTuple):
    """The curves of one variant, one per seed, with epochs for steps, and the accuracy that is to be reached."""

    curves: list[Curve]
    target: float

    @property
    def accuracy(self) -> list[float]:
        """At the end, %."""
        return [float(100 * curve.accuracy[-1]) for curve in self.curves]

    @property
    def reached(self) -> list[tuple[float, float]]:
        """Epochs and seconds to the target; infinite where it was not reached."""
        return [curve.reached(self.target) or (np.inf, np.inf) for curve in self.curves]


def run(seed: int, quick: bool = False) -> Result:
    """Run the race of all variants."""
    size = QUICK if quick else FULL
    name, found = images(2 * size.images, test=TEST)
    half = len(found.y_train) // 2
    new, old = (
        found._replace(x_train=found.x_train[part], y_train=found.y_train[part])
        for part in (slice(half), slice(half, None))
    )
    stored = [_old_weights(old, size, seed + i) for i in range(size.seeds)]
    races = {variant: Race([], TARGET[name]) for variant in VARIANTS}
    for i in range(size.seeds):  # all variants side by side: a busy machine slows all of them
        for variant, trick in VARIANTS.items():
            races[variant].curves.append(_train(new, trick, size, stored[i], seed + i))
    table = [(variant, *_numbers(race)) for variant, race in races.items()]
    goal = f"{100 * TARGET[name]:g} %"
    columns = ("variant", "test accuracy %", "spread", f"epochs to {goal}", f"seconds to {goal}", "seconds in all")
    claims = _claims(races, goal, seeds(seed, size.seeds))
    return Result(Table(columns, table), claims, lambda figure: _paint(figure, races, name, goal), (17, 11))


def _numbers(race: Race) -> tuple[float | None, ...]:
    epochs, seconds = np.mean(race.reached, axis=0)
    there = bool(np.isfinite(seconds))
    return (
        float(np.mean(race.accuracy)),
        float(np.std(race.accuracy, ddof=1)),
        float(epochs) if there else None,
        float(seconds) if there else None,
        float(np.mean([curve.seconds[-1] for curve in race.curves])),
    )


def _old_weights(old: Dataset, size: Size, seed: int) -> dict[str, Any]:
    """The state of a network that knows groups of classes, from images of its own."""
    groups = -(-CLASSES // GROUP)
    model = nn.mlp(old.x_train.shape[1], groups, hidden=HIDDEN, seed=seed + 1000)
    batches = Batches(old.x_train, old.y_train // GROUP, BATCH, seed=seed, drop_last=True)
    optimizer = optim.SGD(model.params(), LR, momentum=MOMENTUM)
    fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=max(size.epochs // 2, 1), progress=False)
    return model.state_dict()


def _train(found: Dataset, trick: Trick, size: Size, stored: dict[str, Any], seed: int) -> Curve:
    """One run; the curve is that of rank 0, with epochs for steps."""
    if trick.half:
        found = found._replace(x_train=found.x_train.astype("float16"), x_test=found.x_test.astype("float16"))

    def rank(comm: Communicator) -> Curve:
        model = nn.mlp(found.x_train.shape[1], CLASSES, hidden=HIDDEN, seed=seed, dtype=found.x_train.dtype)
        if trick.stored:
            model.load_state_dict(stored, strict=False)
        nn.convert_sync_batchnorm(model, None if comm.size == 1 else comm)
        batch = min(BATCH * TIMES if trick.large else BATCH, len(found.y_train))
        mixing = partial(mixup, alpha=ALPHA, classes=CLASSES) if trick.mixed else None
        batches = Batches(found.x_train, found.y_train, batch, seed=seed, drop_last=True, transform=mixing)
        lr, momentum = _rates(trick, len(batches), size.epochs)
        watch = Watch(found.x_test, found.y_test, every=max(size.epochs * len(batches) // LOOKS, 1))
        fit(
            model,
            optim.SGD(model.params(), lr, momentum=momentum),
            partial(nn.softmax_cross_entropy, label_smoothing=EPS if trick.smooth else 0.0),
            batches,
            epochs=size.epochs,
            scaler=optim.LossScaler(SCALE) if trick.half else None,
            comm=None if comm.size == 1 else comm,
            callbacks=[watch] if comm.rank == 0 else [],
            progress=False,
        )
        curve = watch.curve()
        return curve._replace(steps=curve.steps / len(batches), accuracy=averaged(curve.accuracy))

    return rank(Single()) if trick.ranks == 1 else Threads(trick.ranks).run(rank)[0]


def averaged(values: Any) -> Any:
    """The mean of each value and the two before it, or of as many as there are."""
    sums = np.cumsum([0.0, *values])
    first = np.maximum(np.arange(len(values)) + 1 - MEAN, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def _rates(trick: Trick, batches: int, epochs: int) -> tuple[Any, Any]:
    """Learning rate and momentum by step."""
    lr = schedule.scale_lr(LR, BATCH * TIMES, BATCH) if trick.large else LR
    if trick.rate == "one cycle":
        return schedule.one_cycle(PEAK * lr, epochs * batches)  # a warm-up of its own
    if trick.rate == "cyclic":
        rise = max(batches // 2, 1)
        return (
            schedule.triangular(lr / PEAK, PEAK * lr, rise, mode="triangular2"),
            schedule.triangular(0.85, 0.95, rise, mode="triangular2", inverse=True),
        )
    return (schedule.warmup(schedule.constant(lr), batches) if trick.large else schedule.constant(lr)), MOMENTUM


def _claims(races: dict[str, Race], goal: str, drawn: str) -> tuple[Claim, ...]:
    base = races["baseline"]
    claims = []
    for variant in list(VARIANTS)[1:]:
        own = races[variant]
        (epochs, seconds), (slow, long) = (np.mean(race.reached, axis=0) for race in (own, base))
        if np.isfinite([seconds, long]).all():
            gap = difference([r[1] for r in own.reached], [r[1] for r in base.reached])
            sooner = gap.below
            numbers = f"{seconds:.2f} s, {epochs:.2f} epochs; baseline {long:.2f} s, {slow:.2f} epochs; {gap} s"
        else:
            missed = {"it": own, "the baseline": base}
            sooner = not np.isfinite(long) and bool(np.isfinite(seconds))
            numbers = ", ".join(
                f"{who} arrives with {np.isfinite(race.reached).all(axis=1).sum()} of {len(race.curves)} seeds"
                for who, race in missed.items()
            )
        claims.append(Claim(TRICKS, f"{variant}: sooner at {goal} test accuracy", sooner, numbers, drawn))
        higher = difference(own.accuracy, base.accuracy)
        numbers = f"{mean_and_spread(own.accuracy)} %, baseline {mean_and_spread(base.accuracy)} %, {higher}"
        if variant in KEEPING:
            text, held = f"{variant}: loses less than a point of test accuracy", higher.mean - higher.half > -POINT
        else:
            text, held = f"{variant}: a higher test accuracy in the end", higher.above
        claims.append(Claim(TRICKS, text, held, numbers, drawn))
    return tuple(claims)


def _paint(figure: Any, races: dict[str, Race], name: str, goal: str) -> None:
    figure.suptitle(f"{name}: test accuracy in %, by epochs; dotted: {goal}", fontsize=11, color=plot.INK)
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, 4))
    base, shown = races["baseline"], list(VARIANTS)[1:]
    top.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for axes, variant in zip(top.subplots(2, 5, sharex=True, sharey=True).flat, shown, strict=True):
        plot.style(axes, variant)
        for race, color, label in ((base, plot.COLORS[1], "baseline"), (races[variant], plot.COLORS[0], "with it")):
            accuracy = [100 * curve.accuracy for curve in race.curves]
            panels.band(axes, race.curves[0].steps, accuracy, color, label)
        axes.axhline(100 * base.target, color=plot.QUIET, linewidth=1, linestyle=":")
        if variant == shown[0]:
            panels.legend(axes, "lower right")
    low = float(np.median([curve.accuracy[:3] for curve in base.curves]))
    high = max(float(curve.accuracy.max()) for race in races.values() for curve in race.curves)
    axes.set_ylim(100 * low, 100 * high + 0.2)
    colors = [plot.COLORS[1] if variant == "baseline" else plot.COLORS[0] for variant in VARIANTS]
    found = {
        "test accuracy in the end, %": {variant: race.accuracy for variant, race in races.items()},
        f"epochs to {goal}": {variant: _finite(race, 0) for variant, race in races.items()},
        f"seconds to {goal}": {variant: _finite(race, 1) for variant, race in races.items()},
    }
    for axes, (title, groups) in zip(bottom.subplots(1, 3, sharey=True), found.items(), strict=True):
        plot.style(axes, title)
        panels.strips(axes, groups, colors, "{:.2f}")


def _finite(race: Race, place: int) -> list[float]:
    """Epochs (0) or seconds (1) to the target of those seeds that reach it."""
    return [reached[place] for reached in race.reached if np.isfinite(reached[place])]
