"""Arrays of two libraries, or on two devices, in one call: refused by name, and nothing is written."""

import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import cudasim
from kilter import KilterError, cli, nn, norm, optim, stats
from kilter._backend import backend_of, beside
from kilter.data import Batches
from support import FLOAT32

X, VECTOR = np.ones((4, 3), FLOAT32), np.ones(3, FLOAT32)

# What is called, with what places arrays here and there, and the argument that is named.
CALLS = {
    "gamma": lambda here, there: norm.batch_norm(here(X), there(VECTOR)),
    "residual": lambda here, there: norm.batch_norm(here(X), residual=there(X)),
    "weights": lambda here, there: norm.batch_norm(here(X), weights=there(np.ones(4, FLOAT32))),
    "out": lambda here, there: norm.layer_norm(here(X), out=there(X)),
    "beta": lambda here, there: norm.group_norm(here(X), 3, here(VECTOR), there(VECTOR)),
    "x": lambda here, there: norm.batch_norm_backward(here(X), cached(there(X))),
    "weights ": lambda here, there: stats.moments(here(X), weights=there(np.ones(4, FLOAT32))),
    "mean": lambda here, there: running(here).update(there(VECTOR), here(VECTOR), 4),
    "params[1]": lambda here, there: optim.AdamW([here(X), there(VECTOR)]),
    "grads[0]": lambda here, there: optim.SGD([here(X)], 0.1).step([there(X)]),
    "grads[b]": lambda here, there: optim.SGD({"a": here(X), "b": here(X)}, 0.1).step({"b": there(X), "a": here(X)}),
    "grads[1]": lambda here, there: optim.clip_grad_norm([here(X), there(X)], 1.0),
    "targets": lambda here, there: nn.softmax_cross_entropy(here(X), there(np.zeros(4, np.int64))),
    "targets ": lambda here, there: nn.mse(here(X), there(X)),
    "weight": lambda here, there: moved(nn.Linear(3, 2, seed=0), there)(here(X)),
    "dy": lambda here, there: forward_and_back(nn.ReLU(), here(X), there(X)),
    "dy ": lambda here, there: forward_and_back(nn.Sigmoid(), here(X), there(X)),
    "dy  ": lambda here, there: forward_and_back(nn.LayerNorm(3), here(X), there(X)),
    "y": lambda here, there: Batches(here(X), there(np.zeros(4, np.int64)), 2, seed=0),
}


def running(place):
    found = stats.RunningStats(3)
    found.mean, found.var = place(found.mean), place(found.var)
    return found


def cached(x):
    with beside(x):
        return norm.batch_norm(x)[1]


def moved(module, place):
    module.own_params = {name: place(value) for name, value in module.own_params.items()}
    return module


def forward_and_back(layer, x, dy):
    moved(layer, cudasim.to_device if isinstance(x, cudasim.SimArray) else np.array)(x)
    return layer.backward(dy)


def on_the_other(array):
    with cudasim.Device(1):
        return cudasim.to_device(array)


PLACES = {
    "the host and a device": (np.array, cudasim.to_device, r"\b(numpy|cudasim)\b.*\b(numpy|cudasim)\b"),
    "a device and the host": (cudasim.to_device, np.array, r"\b(numpy|cudasim)\b.*\b(numpy|cudasim)\b"),
    "two devices": (cudasim.to_device, on_the_other, r"\bdevice [01]\b.*\bdevice [01]\b"),
}
CASES = [
    pytest.param(argument, place, id=f"{argument.strip()}-{place}")
    for argument in CALLS
    for place in PLACES
    # NumPy's kernels refuse CuPy's arrays as no arrays at all; the simulator's are a subclass of NumPy's.
    if not (place == "the host and a device" and argument in ("grads[0]", "grads[b]"))
]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("argument", "places"), CASES)
def test_mixed_arrays_are_refused_by_name(argument, places):
    here, there, said = PLACES[places]
    made = []

    def kept(place):
        def placed(array):
            made.append((place(array), np.array(array)))
            return made[-1][0]

        return placed

    with pytest.raises(KilterError) as caught:
        CALLS[argument](kept(here), kept(there))
    message, name = str(caught.value), re.escape(argument.strip())
    assert re.match(rf"{name}: expected|\S+: expected .*, as {name} is,", message) and re.search(said, message), message
    for array, before in made:
        np.testing.assert_array_equal(cudasim.xp.asnumpy(array), before)


def test_missing_arrays_are_of_any_library(cuda):
    one = cuda.array(X)
    assert backend_of(None, one, None, one).ops is cuda.ops
    assert backend_of(None, X).xp is backend_of(None).xp is np


# --------------------------------------------------------------------------- without CuPy, without a device

NO_CUPY = """
import sys
sys.modules["cupy"] = None  # as if it were not installed: to import it is an error
import numpy as np, kilter
from kilter import cli, data, init, nn, norm, optim, schedule, stats, train
x = init.normal((8, 3), seed=0)
optim.AdamW([x]).step([norm.batch_norm(x)[0]])
assert not [name for name in sys.modules if name.startswith("kilter.cuda")], "kernels are loaded"
"""


def test_nothing_needs_cupy():
    done = subprocess.run([sys.executable, "-W", "error", "-c", NO_CUPY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_arrays_of_cupy_without_what_its_kernels_need(monkeypatch):
    """Without the extra there is no compiler; the message says how to get it."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    array = type("ndarray", (), {"__module__": "cupy", "shape": (4, 3), "ndim": 2, "dtype": FLOAT32})()
    for call in (lambda: norm.batch_norm(X, gamma=array), lambda: norm.batch_norm(X, beta=array)):
        with pytest.raises(KilterError, match=r"^(gamma|beta): .*pip install 'kilter\[cuda13\]' or 'kilter\[cuda12\]'"):
            call()


class NoCompiler:
    """A CuPy whose compiler cannot be loaded."""

    @staticmethod
    def getVersion():  # noqa: N802
        raise RuntimeError("libnvrtc.so.13 not found")


def fake_cupy(monkeypatch, **cuda):
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(**cuda)
    monkeypatch.setitem(sys.modules, "cupy", cupy)


def test_cupy_without_a_compiler(monkeypatch):
    fake_cupy(monkeypatch, nvrtc=NoCompiler)
    array = type("ndarray", (), {"__module__": "cupy", "shape": (4, 3), "ndim": 2, "dtype": FLOAT32})()
    with pytest.raises(
        KilterError, match=r"expected the compiler NVRTC, got libnvrtc.*; pip install 'kilter\[cuda13\]'"
    ):
        norm.batch_norm(array)


@pytest.mark.parametrize("missing", ["CuPy", "a CUDA device and its driver"])
def test_training_without_a_device_is_one_line(monkeypatch, capsys, tmp_path, missing):
    monkeypatch.chdir(tmp_path)
    if missing == "CuPy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    else:
        fake_cupy(monkeypatch, is_available=lambda: False)
    assert cli.main(["train", "--device", "cuda", "--out", "run"]) == 2
    said, wanted = capsys.readouterr(), f"kilter: device: expected {missing} for 'cuda', "
    assert not said.out and not (tmp_path / "run").exists()
    assert re.fullmatch(rf"{wanted}(got none; pip install .*|found none)\n", said.err)
