"""Data sets, the IDX reader and mini-batches."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilter import KilterError, _kilter
from kilter.data import Batches, digits, fashion_mnist, read_idx

FASHION = Path("/usr/share/datasets/fashion-mnist")
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array):
    """Write an array as the bytes of an IDX file."""
    code = CODES[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


# ---------------------------------------------------------------- digits


def test_digits_shapes_types_and_range():
    data = digits()
    assert (data.x_train.shape, data.y_train.shape) == ((1437, 1, 8, 8), (1437,))
    assert (data.x_test.shape, data.y_test.shape) == ((360, 1, 8, 8), (360,))
    assert data.x_train.dtype == data.x_test.dtype == np.float32
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert np.unique(data.y_test).tolist() == list(range(10))
    assert all(array.flags.c_contiguous and array.flags.writeable for array in data)
    assert np.shares_memory(data.x_train.reshape(1437, -1), data.x_train)


def test_digits_are_the_stratified_split_of_seed_0():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    data = digits()
    for ours, theirs in zip((data.x_train, data.x_test), parts[:2], strict=True):
        np.testing.assert_array_equal(ours.reshape(len(ours), -1), theirs / 16)
    np.testing.assert_array_equal(data.y_train, parts[2])
    np.testing.assert_array_equal(data.y_test, parts[3])


def test_digits_gives_arrays_of_ones_own():
    digits().x_train[:] = 7
    assert digits().x_train.max() == 1


def test_digits_carry_their_attribution():
    text = Path(digits.__code__.co_filename).with_name("digits.md").read_text()
    assert "CC BY 4.0" in text
    assert "Alpaydin" in text and "Kaynak" in text


# ---------------------------------------------------------------- read_idx


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (3, 0, 2), (2, 3, 4, 5)])
def test_read_idx_reads_every_type_and_shape(tmp_path, compress, dtype, shape):
    size = int(np.prod(shape))
    low = 0 if dtype[0] == "u" else -(size // 2)
    array = (np.arange(size) + low).astype(dtype).reshape(shape)
    if size and dtype[0] == "i":
        array.flat[0] = np.iinfo(dtype).min
    file = tmp_path / "array.bin"
    file.write_bytes(compress(idx(array)))
    for path in (file, str(file)):
        read = read_idx(path)
        assert read.dtype == np.dtype(dtype)
        assert read.dtype.isnative
        assert read.flags.writeable
        assert read.shape == shape
        np.testing.assert_array_equal(read, array)


def test_read_idx_reads_known_bytes(tmp_path):
    file = tmp_path / "short"
    file.write_bytes(bytes.fromhex("00000b02 00000002 00000001 0102 fffe"))
    assert read_idx(file).tolist() == [[258], [-2]]


GOOD = idx(np.arange(6, dtype=np.int16).reshape(2, 3))
DAMAGED = {
    "empty": b"",
    "three bytes": GOOD[:3],
    "first byte": b"\x01" + GOOD[1:],
    "second byte": b"\0\x01" + GOOD[2:],
    "unknown type": b"\0\0\x0a\x02" + GOOD[4:],
    "no dimensions": GOOD[:4],
    "half the dimensions": GOOD[:9],
    "no elements": GOOD[:12],
    "a byte short": GOOD[:-1],
    "a byte long": GOOD + b"\0",
    "too many dimensions": b"\0\0\x08\xff" + struct.pack(">255I", *[1] * 255) + b"\0",
    "more bytes than there are": b"\0\0\x0e\x04" + struct.pack(">4I", *[2**32 - 1] * 4) + b"\0",
    "text": b"label,pixel\n",
    "cut gzip": gzip.compress(GOOD)[:-9],
    "gzip with a wrong checksum": gzip.compress(GOOD)[:-8] + b"\0" * 8,
    "gzip with a wrong body": gzip.compress(GOOD)[:12] + b"\xff" * 30,
    "gzip with garbage behind": gzip.compress(GOOD) + b"garbage",
    "gzip of text": gzip.compress(b"label,pixel\n"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_read_idx_names_a_damaged_file(tmp_path, fault):
    file = tmp_path / "damaged.idx"
    file.write_bytes(DAMAGED[fault])
    with pytest.raises(KilterError, match=r"^path: expected .*got .*damaged\.idx"):
        read_idx(file)


def test_read_idx_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_idx(tmp_path / "nowhere")


# ---------------------------------------------------------------- fashion_mnist


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 28, 28), np.uint8) for n in (7, 3)]
    labels = [rng.integers(0, 10, n).astype(np.uint8) for n in (7, 3)]
    return [images[0], labels[0], images[1], labels[1]]


def write(folder, parts, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(NAMES, parts, strict=True):
        (folder / (name + suffix)).write_bytes(gzip.compress(idx(part)))
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Hide every copy of the data that the machine may have."""
    monkeypatch.delenv("KILTER_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("kilter.data.sources.SYSTEM_FOLDER", tmp_path / "system")
    return tmp_path


def test_fashion_mnist_reads_a_folder(nowhere, parts):
    folder = write(nowhere / "here", parts)
    for path in (folder, str(folder)):
        data = fashion_mnist(path)
        assert (data.x_train.shape, data.x_test.shape) == ((7, 1, 28, 28), (3, 1, 28, 28))
        assert data.x_train.dtype == np.float32
        assert data.y_train.dtype == np.int64
        np.testing.assert_array_equal(data.x_train[:, 0], parts[0] / np.float32(255))
        np.testing.assert_array_equal(data.y_train, parts[1])
        np.testing.assert_array_equal(data.x_test[:, 0], parts[2] / np.float32(255))
        np.testing.assert_array_equal(data.y_test, parts[3])


def test_fashion_mnist_looks_in_order(nowhere, parts, monkeypatch):
    places = ["own", "own/fashion-mnist", "system", "cache/kilter/fashion-mnist"]
    monkeypatch.setenv("KILTER_DATA", str(nowhere / "own"))
    for label, place in reversed(list(enumerate(places))):
        write(nowhere / place, [parts[0], np.full(7, label, np.uint8), *parts[2:]])
        assert (fashion_mnist().y_train == label).all()
    elsewhere = write(nowhere / "elsewhere", [parts[0], np.full(7, 9, np.uint8), *parts[2:]])
    assert (fashion_mnist(elsewhere).y_train == 9).all()


def test_fashion_mnist_uses_the_home_cache_by_default(nowhere, parts, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(nowhere))
    write(nowhere / ".cache" / "kilter" / "fashion-mnist", parts)
    assert len(fashion_mnist().x_train) == 7


def test_fashion_mnist_says_how_to_get_the_data(nowhere, parts):
    with pytest.raises(KilterError, match=r"^path: expected .*got none") as caught:
        fashion_mnist()
    for hint in (
        "apt-get install dataset-fashion-mnist",
        "KILTER_DATA",
        "path=",
        *NAMES,
        str(nowhere / "cache"),
    ):
        assert hint in str(caught.value)
    folder = write(nowhere / "system", parts)
    with pytest.raises(KilterError, match=r"^path: expected .*not-there"):
        fashion_mnist(nowhere / "not-there")
    (folder / f"{NAMES[3]}.gz").unlink()
    with pytest.raises(KilterError, match=r"^path: expected "):
        fashion_mnist()


@pytest.mark.parametrize(
    ("position", "part"),
    [
        (0, np.zeros((7, 28), np.uint8)),
        (0, np.zeros((7, 27, 28), np.uint8)),
        (0, np.zeros((7, 28, 28), np.float32)),
        (1, np.zeros(6, np.uint8)),
        (1, np.zeros((7, 1), np.uint8)),
        (1, np.zeros(7, np.int32)),
        (3, np.array([0, 10, 1], np.uint8)),
    ],
)
def test_fashion_mnist_refuses_other_content(nowhere, parts, position, part):
    parts[position] = part
    with pytest.raises(KilterError, match=rf"^path: expected .*got .*{NAMES[position]}"):
        fashion_mnist(write(nowhere / "here", parts))


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    data = fashion_mnist()
    assert (data.x_train.shape, data.x_test.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert np.bincount(data.y_train).tolist() == [6000] * 10
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert data.x_train.mean(dtype=np.float64) == pytest.approx(0.2860, abs=5e-5)  # the usual normalisation


# ---------------------------------------------------------------- Batches


def samples(n, width=3):
    """Make inputs whose rows tell their index."""
    return np.arange(n * width, dtype=np.float32).reshape(n, width), np.arange(n)


def seen(batches, epoch):
    return np.concatenate([y for _, y in batches.epoch(epoch)])


@given(
    n=st.integers(1, 200),
    size=st.integers(1, 250),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**30 - 1),
)
def test_an_epoch_has_each_sample_once(n, size, seed, epoch):
    x, y = samples(n)
    batches = Batches(x, y, size, seed=seed)
    parts = list(batches.epoch(epoch))
    assert len(parts) == len(batches) == -(-n // size)
    assert [len(part) for _, part in parts[:-1]] == [size] * (len(parts) - 1)
    assert sorted(seen(batches, epoch)) == list(range(n))
    for x_part, y_part in parts:
        np.testing.assert_array_equal(x_part, x[y_part])
        assert (x_part.dtype, y_part.dtype) == (x.dtype, y.dtype)


@given(n=st.integers(1, 200), size=st.integers(1, 250))
def test_drop_last_keeps_full_batches_only(n, size):
    x, y = samples(n)
    if size > n:
        with pytest.raises(KilterError, match=rf"^batch_size: expected at most {n} .*got {size}"):
            Batches(x, y, size, seed=0, drop_last=True)
        return
    batches = Batches(x, y, size, seed=0, drop_last=True)
    sizes = [len(part) for _, part in batches.epoch(0)]
    assert sizes == [size] * (n // size)
    assert len(batches) == len(sizes)
    kept = seen(batches, 0)
    assert len(set(kept)) == len(kept)
    np.testing.assert_array_equal(kept, seen(Batches(x, y, size, seed=0), 0)[: len(kept)])


def test_the_order_is_a_function_of_seed_and_epoch():
    x, y = samples(100)
    batches = Batches(x, y, 7, seed=5)
    later = seen(batches, 3)
    orders = [seen(batches, epoch) for epoch in range(4)]
    np.testing.assert_array_equal(orders[3], later)
    np.testing.assert_array_equal(seen(Batches(x, y, 7, seed=5), 3), later)
    np.testing.assert_array_equal(seen(Batches(x, y, 64, seed=5), 3), later)
    others = [seen(Batches(x, y, 7, seed=6), epoch) for epoch in range(4)]
    assert len({tuple(order) for order in [*orders, *others]}) == 8


def test_the_order_sorts_two_words_per_sample():
    batches = Batches(*samples(100), 8, seed=2**63 + 9)
    words = np.empty(200, np.uint32)
    _kilter.philox(words, 2**63 + 9, 2**30 + 4)
    keys = [(int(words[2 * i]) << 32) + int(words[2 * i + 1]) for i in range(100)]
    assert batches.order(4).tolist() == sorted(range(100), key=keys.__getitem__)
    assert batches.order(4).dtype == np.int64


def test_every_place_is_equally_likely():
    batches = Batches(*samples(8), 8, seed=0)
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), batches.order(epoch)] += 1
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 49 + 6 * np.sqrt(2 * 49)  # 49 degrees of freedom


def test_two_epochs_can_be_open_at_once():
    batches = Batches(*samples(50), 8, seed=0)
    together = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    np.testing.assert_array_equal(np.concatenate([a[1] for a, _ in together]), seen(batches, 0))
    np.testing.assert_array_equal(np.concatenate([b[1] for _, b in together]), seen(batches, 1))


def test_batches_may_be_kept_and_changed():
    x, y = samples(20)
    kept = list(Batches(x, y, 6, seed=0).epoch(0))
    for x_part, y_part in kept:
        np.testing.assert_array_equal(x_part, x[y_part])
        x_part[:] = -1
        y_part[:] = -1
    np.testing.assert_array_equal(x, samples(20)[0])
    np.testing.assert_array_equal(y, samples(20)[1])


def test_without_shuffle_batches_are_views_in_order():
    x, y = samples(20)
    batches = Batches(x, y, 6, seed=0, shuffle=False)
    for epoch in (0, 5):
        assert seen(batches, epoch).tolist() == list(range(20))
        assert all(np.shares_memory(part, x) and np.shares_memory(label, y) for part, label in batches.epoch(epoch))
    assert batches.order(3).tolist() == list(range(20))


def test_inputs_of_any_shape_and_layout():
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float16).reshape(2, 3, 4, 5).transpose(3, 1, 0, 2)[::-1]
    y = np.arange(10, dtype=np.float64).reshape(5, 2)[:, ::-1]
    batches = Batches(x, y, 2, seed=1)
    order = batches.order(0)
    np.testing.assert_array_equal(np.concatenate([part for part, _ in batches.epoch(0)]), x[order])
    np.testing.assert_array_equal(np.concatenate([part for _, part in batches.epoch(0)]), y[order])


def test_one_sample_and_properties():
    x, y = samples(1)
    batches = Batches(x, y, np.int64(10), seed=np.uint64(3))
    assert (len(batches), batches.samples, batches.batch_size) == (1, 1, 10)
    ((x_part, y_part),) = batches.epoch(np.int32(0))
    assert (x_part.tolist(), y_part.tolist()) == (x.tolist(), y.tolist())
    assert repr(batches) == "Batches(samples=1, batch_size=10, seed=3, shuffle=True, drop_last=False)"


X, Y = samples(5)
BAD = {
    "x list": ("x", lambda: Batches([1, 2], np.arange(2), 1, seed=0)),
    "y list": ("y", lambda: Batches(X, [0] * 5, 1, seed=0)),
    "y None": ("y", lambda: Batches(X, None, 1, seed=0)),
    "x scalar": ("x", lambda: Batches(np.array(1.0), Y, 1, seed=0)),
    "y scalar": ("y", lambda: Batches(X, np.array(1), 1, seed=0)),
    "x empty": ("x", lambda: Batches(X[:0], Y[:0], 1, seed=0)),
    "y short": ("y", lambda: Batches(X, Y[:4], 1, seed=0)),
    "size 0": ("batch_size", lambda: Batches(X, Y, 0, seed=0)),
    "size -1": ("batch_size", lambda: Batches(X, Y, -1, seed=0)),
    "size 1.5": ("batch_size", lambda: Batches(X, Y, 1.5, seed=0)),
    "size True": ("batch_size", lambda: Batches(X, Y, True, seed=0)),
    "size None": ("batch_size", lambda: Batches(X, Y, None, seed=0)),
    "seed -1": ("seed", lambda: Batches(X, Y, 1, seed=-1)),
    "seed 2**64": ("seed", lambda: Batches(X, Y, 1, seed=2**64)),
    "seed None": ("seed", lambda: Batches(X, Y, 1, seed=None)),
    "epoch -1": ("epoch", lambda: Batches(X, Y, 1, seed=0).epoch(-1)),
    "epoch 2**30": ("epoch", lambda: Batches(X, Y, 1, seed=0).epoch(2**30)),
    "epoch 0.0": ("epoch", lambda: Batches(X, Y, 1, seed=0).epoch(0.0)),
    "epoch -1 in order": ("epoch", lambda: Batches(X, Y, 1, seed=0, shuffle=False).epoch(-1)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case):
    name, call = BAD[case]
    with pytest.raises(KilterError, match=rf"^{name}: expected .*got "):
        call()
