"""Augmentation: what it does, that it depends on (seed, epoch, index) alone, and batches with transforms."""

from functools import partial

import numpy as np
import pytest

from kilter import KilterError, _kilter, dist
from kilter.data import Batches, crop, cutmix, flip, mixup, noise
from kilter.data import mixing as mixing_module
from support import BFLOAT16, DTYPES, FLOAT16, FLOAT64, ulp

SINGLE = [flip, crop, noise]
MIXING = [partial(mixup, classes=5), partial(cutmix, classes=5)]
ALL = [*SINGLE, *MIXING]
augmentations = pytest.mark.parametrize("augment", ALL, ids=lambda f: getattr(f, "func", f).__name__)


def images(n, channels=2, size=6, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, channels, size, size)).astype(dtype), rng.integers(0, 5, n)


def same(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)


# ---------------------------------------------------------------- what all have in common


@augmentations
def test_pure_functions_of_seed_epoch_index_and_stream(augment):
    x, y = images(40)
    first = augment(x, y, seed=3, epoch=2)[0]
    assert same(first, augment(x, y, seed=3, epoch=2, index=np.arange(40), stream=0)[0])
    for other in (
        {"seed": 4, "epoch": 2},
        {"seed": 3, "epoch": 3},
        {"seed": 3, "epoch": 2, "stream": 1},
        {"seed": 3, "epoch": 2, "index": np.arange(1, 41)},
    ):
        assert not same(first, augment(x, y, **other)[0])


@augmentations
def test_the_same_on_every_backend(backend, augment):
    x, y = images(9)
    new, labels = augment(backend.array(x), backend.array(y), seed=5, epoch=1)
    want = augment(x, y, seed=5, epoch=1)
    assert type(new) is type(backend.array(x))
    assert same(backend.numpy(new), want[0]) and same(backend.numpy(labels), want[1])


@pytest.mark.parametrize("augment", SINGLE)
def test_a_sample_fares_alike_in_any_batch(augment):
    x, y = images(40)
    everything, _ = augment(x, y, seed=3, epoch=2)
    some = np.array([7, 39, 0, 7])
    assert same(augment(x[some], seed=3, epoch=2, index=some)[0], everything[some])


@augmentations
def test_inputs_stay_as_they_are(augment):
    x, y = images(12)
    kept = x.copy(), y.copy()
    new, _ = augment(x, y, seed=0)
    assert not np.shares_memory(new, x)
    assert same(x, kept[0]) and same(y, kept[1])
    assert new.shape == x.shape and new.dtype == x.dtype


@augmentations
@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(augment, n):
    x, y = images(n)
    new, labels = augment(x, y, seed=0)
    assert new.shape == x.shape and len(labels) == n
    if n and augment in MIXING:  # its own partner
        np.testing.assert_array_equal(new, x)
        np.testing.assert_array_equal(labels, np.eye(5)[y])


@pytest.mark.parametrize("augment", SINGLE)
def test_targets_are_handed_through(augment):
    x, y = images(3)
    assert augment(x, y, seed=0)[1] is y
    assert augment(x, seed=0)[1] is None


# ---------------------------------------------------------------- flip, crop, noise


@pytest.mark.parametrize(("axis", "mirrored"), [(-1, np.s_[..., ::-1]), (-2, np.s_[..., ::-1, :])])
@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_flip(axis, mirrored, p):
    x = images(2000)[0]
    new, _ = flip(x, p=p, axis=axis, seed=1)
    flipped = (new == x[mirrored]).all((1, 2, 3))
    np.testing.assert_array_equal(new[~flipped], x[~flipped])
    assert abs(flipped.mean() - p) <= 4 * np.sqrt(p * (1 - p) / 2000)
    assert same(flip(x[:, 0], p=p, axis=axis, seed=1)[0], new[:, 0])


def test_two_flips_in_a_row_are_independent():
    x = images(4000, 1, 2)[0]
    moves = [(flip(x, seed=1, stream=k)[0] != x).any((1, 2, 3)) for k in (0, 1)]
    assert abs((moves[0] == moves[1]).mean() - 0.5) < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize("padding", [0, 1, 2, 6])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, BFLOAT16])
def test_crop_is_a_window_of_the_padded_image(padding, dtype):
    x = (np.arange(60 * 2 * 6 * 7).reshape(60, 2, 6, 7) % 97 + 1).astype(dtype)
    new, _ = crop(x, padding=padding, seed=2)
    wide = np.zeros((60, 2, 6 + 2 * padding, 7 + 2 * padding), dtype)
    wide[:, :, padding : padding + 6, padding : padding + 7] = x
    for image, source in zip(new, wide, strict=True):
        windows = (source[:, i : i + 6, j : j + 7] for i in range(2 * padding + 1) for j in range(2 * padding + 1))
        assert any(np.array_equal(image, window) for window in windows)
    assert same(crop(x[:, 1], padding=padding, seed=2)[0], new[:, 1])


def test_all_moves_of_crop_are_equally_likely():
    x = np.zeros((5000, 5, 5), np.uint8)
    x[:, 2, 2] = 1  # the middle shows where the image went
    places = np.argwhere(crop(x, padding=2, seed=0)[0])[:, 1:]
    counts = np.bincount(places @ [5, 1], minlength=25)
    assert ((counts - 200) ** 2 / 200).sum() < 24 + 6 * np.sqrt(2 * 24)


def test_noise():
    x = images(500, 4, 8)[0]
    z = (noise(x, std=0.5, seed=1)[0] - x).astype(np.float64) / 0.5
    np.testing.assert_allclose([z.mean(), z.std(), (z**3).mean(), (z**4).mean()], [0, 1, 0, 3], atol=0.05)
    flat = z.reshape(500, -1)
    correlations = np.corrcoef(flat[:100])
    assert abs(correlations - np.eye(100)).max() < 6 / np.sqrt(flat.shape[1])
    assert same(noise(x, std=0.0, seed=1)[0], x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("augment", [noise, partial(mixup, classes=5)], ids=["noise", "mixup"])
def test_arithmetic_is_rounded_once(augment, dtype):
    x, y = images(20, dtype=dtype)
    new, exact = augment(x, y, seed=0)[0], augment(x.astype(FLOAT64), y, seed=0)[0]
    assert new.dtype == dtype
    allowed = 0.51 if dtype in (FLOAT16, BFLOAT16) else 2
    wide = np.abs(new.astype(FLOAT64) - exact)
    assert (wide <= allowed * ulp(exact, dtype) + (dtype != FLOAT64) * 3e-7).all()


# ---------------------------------------------------------------- mixup, cutmix


def partners(labels):
    """The partner and the sample's own weight, from labels of one class per sample."""
    own = np.diag(labels).copy()
    rest = labels - np.diag(own)
    return rest.argmax(1), own


def test_v16_mixup(monkeypatch):
    monkeypatch.setattr(mixing_module.draws, "beta", lambda alpha, words: np.array([0.3, 0.3]))
    x, y = np.array([[0.0, 1, 2, 3], [4, 4, 0, -1]]), np.array([0, 2])
    mixed, labels = mixup(x, y, classes=3, seed=0)
    np.testing.assert_allclose(mixed[0], [2.8, 3.1, 0.6, 0.2], rtol=1e-15)
    np.testing.assert_allclose(labels[0], [0.3, 0, 0.7], rtol=1e-15)
    np.testing.assert_allclose(labels[1], [0.7, 0, 0.3], rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mixup_mixes_inputs_and_labels_alike(dtype):
    x = images(30, dtype=dtype)[0]
    mixed, labels = mixup(x, np.arange(30), 1.0, classes=30, seed=5)
    assert labels.dtype == dtype
    partner, own = partners(labels)
    assert sorted(partner) == list(range(30)) and (partner != np.arange(30)).all()
    own = own[:, None, None, None]
    np.testing.assert_allclose(mixed, own * x + (1 - own) * x[partner], atol=1e-6)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 4.0])
def test_weights_have_the_beta_distribution(alpha):
    n = 20_000
    words = np.random.default_rng(1).integers(0, 2**32, (n, 2), np.uint32)
    lam = mixing_module.draws.beta(alpha, words)
    for power in (1, 2, 4):
        moment = np.prod([(alpha + i) / (2 * alpha + i) for i in range(power)])
        assert abs((lam**power).mean() - moment) < 5 * (lam**power).std() / np.sqrt(n)
    assert lam.min() >= 0 and lam.max() <= 1
    assert abs((lam < 0.5).mean() - 0.5) < 5 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_weights_of_mixup_are_those_variates(alpha):
    y = np.arange(2000.0)
    own = np.diag(mixup(np.zeros((2000, 1)), y.astype(int), alpha, classes=2000, seed=7)[1])
    assert abs(own.mean() - 0.5) < 5 * own.std() / np.sqrt(2000)
    assert abs(own.var() - 1 / (4 * (2 * alpha + 1))) < 0.01


def test_targets_that_are_numbers_are_mixed_too():
    x = np.arange(8.0).reshape(8, 1)
    mixed, y = mixup(x, 3 * x + 1, 1.0, seed=0)
    np.testing.assert_allclose(y, 3 * mixed + 1)
    _, flat = mixup(x, 3 * x[:, 0] + 1, 1.0, seed=0)
    np.testing.assert_allclose(flat, y[:, 0])


@pytest.mark.parametrize("shape", [(40, 8, 5), (40, 3, 8, 5)])
def test_cutmix_labels_are_shares_of_the_area(shape):
    x = np.broadcast_to(np.arange(40).reshape(-1, *[1] * (len(shape) - 1)), shape).astype(np.uint8)
    mixed, labels = cutmix(x, np.arange(40), classes=40, seed=1)
    partner, own = partners(labels)
    kept = (mixed == x).reshape(40, -1)
    np.testing.assert_allclose(own, kept.mean(1), atol=1e-6)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-7)
    for image, source, other, pasted in zip(mixed, x, x[partner], ~kept.reshape(shape), strict=True):
        np.testing.assert_array_equal(image, np.where(pasted, other, source))
    plane = (mixed != x).reshape(40, -1, 8, 5)[:, 0]
    for mask in plane[plane.any((1, 2))]:  # a rectangle
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert 0.3 < own.mean() < 0.95 and plane.any((1, 2)).sum() > 25


def test_the_areas_of_cutmix_follow_beta():
    """A simulation with real numbers where pixels are counted."""
    _, labels = cutmix(np.zeros((2000, 60, 60), np.uint8), np.arange(2000), alpha=1.0, classes=2000, seed=2)
    share = 1 - np.diag(labels)
    rng = np.random.default_rng(0)
    side, middle = np.sqrt(rng.random(100_000)), rng.random((2, 100_000))
    sides = np.clip(middle + side / 2, 0, 1) - np.clip(middle - side / 2, 0, 1)
    want = sides.prod(0)
    for power in (1, 2):
        assert abs((share**power).mean() - (want**power).mean()) < 5 * want.std() / np.sqrt(2000) + 0.01


def test_mixing_twice_keeps_rows_that_sum_to_one():
    x, y = images(64)
    soft = cutmix(*mixup(x, y, classes=5, seed=0), seed=0, stream=1)[1]
    np.testing.assert_allclose(soft.sum(1), 1, atol=3e-7)
    assert soft.min() >= 0 and ((soft > 0).sum(1) > 2).any()


# ---------------------------------------------------------------- Batches


def collected(batches, epoch=0):
    parts = list(batches.epoch(epoch))
    return [np.concatenate(side) for side in zip(*parts, strict=True)]


CHAIN = [flip, partial(crop, padding=1), partial(flip, axis=-2), partial(noise, std=0.2)]


@pytest.mark.parametrize("shuffle", [True, False])
@augmentations
def test_batches_apply_one_transform(augment, shuffle):
    x, y = images(30)
    batches = Batches(x, y, 8, seed=9, shuffle=shuffle, transform=augment)
    order = batches.order(4)
    for start, (x_part, y_part) in zip(range(0, 30, 8), batches.epoch(4), strict=True):
        rows = order[start : start + 8]
        want = augment(x[rows], y[rows], seed=9, epoch=4, index=rows, stream=0)
        assert same(x_part, want[0]) and same(y_part, want[1])


def test_batches_apply_a_sequence_in_order():
    x, y = images(30)
    got = collected(Batches(x, y, 8, seed=9, transform=CHAIN), 2)
    order = Batches(x, y, 8, seed=9).order(2)
    want = x[order], y[order]
    for stream, transform in enumerate(CHAIN):
        want = transform(*want, seed=9, epoch=2, index=order, stream=stream)
    assert same(got[0], want[0]) and same(got[1], want[1])
    np.testing.assert_array_equal(x, images(30)[0])
    one_by_one = collected(Batches(x, y, 1, seed=9, transform=CHAIN), 2)
    assert same(got[0], one_by_one[0])


def test_batches_on_every_backend(backend):
    x, y = images(12)
    batches = Batches(backend.array(x), backend.array(y), 5, seed=1, transform=[flip, partial(mixup, classes=5)])
    want = Batches(x, y, 5, seed=1, transform=[flip, partial(mixup, classes=5)])
    for part, expected in zip(batches.shard(0, 2).epoch(1), want.shard(0, 2).epoch(1), strict=True):
        assert same(backend.numpy(part[0]), expected[0]) and same(backend.numpy(part[1]), expected[1])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("transform", [None, CHAIN, [flip, *MIXING[:1], partial(cutmix)]], ids=["none", "own", "mix"])
def test_the_shards_are_the_batches(size, drop_last, shuffle, transform):
    x, y = images(37)
    batches = Batches(x, y, 10, seed=2, shuffle=shuffle, drop_last=drop_last, transform=transform)
    shards = [batches.shard(rank, size) for rank in range(size)]
    assert {len(shard) for shard in shards} == {len(batches)}
    for (x_part, y_part), *parts in zip(batches.epoch(1), *(shard.epoch(1) for shard in shards), strict=True):
        assert same(np.concatenate([part[0] for part in parts]), x_part)
        assert same(np.concatenate([part[1] for part in parts]), y_part)
        own = [dist.shard(len(x_part), rank, size) for rank in range(size)]
        assert [len(part[0]) for part in parts] == [one.stop - one.start for one in own]
    assert batches.rank == 0 and batches.size == 1


def test_shards_gather_their_own_rows_only():
    x, y = images(20)
    seen = []

    def spy(x, y, *, seed, epoch, index, stream):
        seen.append(len(x))
        return x, y

    list(Batches(x, y, 10, seed=0, transform=flip).shard(1, 2).epoch(0))
    list(Batches(x, y, 10, seed=0, transform=[flip, spy]).shard(1, 2).epoch(0))
    assert seen == [10, 10]  # a transform of others may look at the whole batch
    bound = Batches(x, y, 10, seed=0, shuffle=False).shard(1, 2)
    assert [part.tolist() for _, part in bound.epoch(0)] == [y[5:10].tolist(), y[15:20].tolist()]


def test_representation_tells_transforms_and_ranks():
    batches = Batches(*images(5), 2, seed=0, transform=flip).shard(1, 3)
    assert "flip" in repr(batches) and repr(batches).endswith("rank=1, size=3)")


def test_words_belong_to_one_sample_one_epoch_one_purpose():
    """No words of the order, and none of another augmentation."""
    parts = [getattr(mixing_module.draws, name) for name in ("FLIP", "CROP", "NOISE", "MIXUP", "CUTMIX")]
    places = [place for part in parts for place in range(part.start, part.stop)]
    assert len(places) == len(set(places)) and max(places) < mixing_module.draws.WORDS
    words = np.empty(128, np.uint32)
    _kilter.philox(words, 8, 2**30 + 5, 1 + 12)
    for stream in (0, 1):
        got = mixing_module.draws.sample_words(slice(3, 9), 1, 8, 5, np.array([12]), stream)
        np.testing.assert_array_equal(got[0], words[64 * stream + 3 : 64 * stream + 9])


# ---------------------------------------------------------------- mistakes

X, Y = images(4)
BAD = {
    "flip p": ("p", lambda: flip(X, p=1.5, seed=0)),
    "flip axis": ("axis", lambda: flip(X, axis=1, seed=0)),
    "flip list": ("x", lambda: flip([1.0], seed=0)),
    "flip shape": ("x", lambda: flip(X[0, 0], seed=0)),
    "crop padding": ("padding", lambda: crop(X, padding=7, seed=0)),
    "crop padding 1.5": ("padding", lambda: crop(X, padding=1.5, seed=0)),
    "crop shape": ("x", lambda: crop(X[None], seed=0)),
    "noise std": ("std", lambda: noise(X, std=-1.0, seed=0)),
    "noise integers": ("x", lambda: noise(X.astype(int), seed=0)),
    "noise scalar": ("x", lambda: noise(np.float32(1)[()] + np.zeros(()), seed=0)),
    "mixup alpha": ("alpha", lambda: mixup(X, Y, 0.0, classes=5, seed=0)),
    "mixup without classes": ("classes", lambda: mixup(X, Y, seed=0)),
    "mixup classes": ("classes", lambda: mixup(X, Y, classes=0, seed=0)),
    "mixup labels": ("y", lambda: mixup(X, Y + 5, classes=5, seed=0)),
    "mixup negative labels": ("y", lambda: mixup(X, Y - 5, classes=5, seed=0)),
    "mixup wide labels": ("y", lambda: mixup(X, Y[:, None], classes=5, seed=0)),
    "mixup soft classes": ("y", lambda: mixup(X, np.ones((4, 3)), classes=5, seed=0)),
    "mixup short": ("y", lambda: mixup(X, Y[:3], classes=5, seed=0)),
    "mixup None": ("y", lambda: mixup(X, None, classes=5, seed=0)),
    "mixup integers": ("x", lambda: mixup(X.astype(np.uint8), Y, classes=5, seed=0)),
    "mixup bool": ("y", lambda: mixup(X, Y > 2, classes=5, seed=0)),
    "cutmix flat": ("x", lambda: cutmix(X.reshape(4, -1), Y, classes=5, seed=0)),
    "cutmix alpha": ("alpha", lambda: cutmix(X, Y, -1, classes=5, seed=0)),
    "seed": ("seed", lambda: flip(X, seed=-1)),
    "epoch": ("epoch", lambda: flip(X, seed=0, epoch=2**30)),
    "stream": ("stream", lambda: flip(X, seed=0, stream=64)),
    "index shape": ("index", lambda: flip(X, seed=0, index=np.arange(3))),
    "index dtype": ("index", lambda: flip(X, seed=0, index=np.arange(4.0))),
    "index list": ("index", lambda: flip(X, seed=0, index=[0, 1, 2, 3])),
    "index negative": ("index", lambda: flip(X, seed=0, index=np.array([0, -1, 2, 3]))),
    "transform": ("transform", lambda: Batches(X, Y, 2, seed=0, transform="flip")),
    "transforms": ("transform", lambda: Batches(X, Y, 2, seed=0, transform=[flip, 3])),
    "result": ("transform", lambda: next(Batches(X, Y, 2, seed=0, transform=lambda x, y, **_: x).epoch(0))),
    "results": ("transform", lambda: next(Batches(X, Y, 2, seed=0, transform=lambda x, y, **_: (x, y[:1])).epoch(0))),
    "rank": ("rank", lambda: Batches(X, Y, 2, seed=0).shard(2, 2)),
    "rank -1": ("rank", lambda: Batches(X, Y, 2, seed=0).shard(-1, 2)),
    "size": ("size", lambda: Batches(X, Y, 2, seed=0).shard(0, 0)),
    "shard of a shard": ("shard", lambda: Batches(X, Y, 2, seed=0).shard(0, 2).shard(0, 2)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case):
    name, call = BAD[case]
    with pytest.raises(KilterError, match=rf"^{name}: expected .*got "):
        call()
