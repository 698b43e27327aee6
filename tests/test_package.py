"""The package as it is installed: what it imports, what it ships, whose arrays it takes."""

import importlib
import subprocess
import sys
from importlib import metadata, resources

import numpy as np
import pytest

import kilter
from kilter import init, nn, norm, optim, stats
from kilter.data import Batches
from support import refused

HEAVY = ("cupy", "torch", "matplotlib", "safetensors", "tqdm", "ml_dtypes", "sklearn", "scipy", "mpi4py")
ON_DEMAND = ("kilter.nn", "kilter.data", "kilter.train", "kilter.cli")


def imported_by(code, modules):
    check = f"import sys; {code}; print(*[m for m in {modules} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


def test_import_loads_nothing_heavy():
    assert imported_by("import kilter", (*HEAVY, *ON_DEMAND)) == []


def test_layers_and_data_load_when_they_are_used():
    used = "import kilter; kilter.nn.mlp; kilter.data.digits"
    assert imported_by(used, (*HEAVY, *ON_DEMAND)) == ["kilter.nn", "kilter.data"]
    assert imported_by("import kilter; kilter.train.fit", HEAVY) == []


def test_version():
    assert kilter.__version__ == kilter._kilter.__version__
    try:
        installed = metadata.version("kilter")
    except metadata.PackageNotFoundError:
        pytest.skip("kilter is not installed here")
    assert kilter.__version__ == installed


MODULES = ("norm", "stats", "optim", "init", "schedule", "nn", "data", "train")
PUBLIC = ("kilter", *(f"kilter.{name}" for name in MODULES))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    assert names
    for public in names:
        assert getattr(module, public) is not None
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = module.nonesuch


def test_types_are_shipped():
    assert resources.files("kilter").joinpath("py.typed").is_file()


# ---- arrays of other libraries


def foreign(module, name):
    """A class that looks like an array of another library."""
    looks = {"shape": (4, 3), "ndim": 2, "dtype": np.dtype("f4"), "__len__": lambda self: 4}
    return type(name, (), {"__module__": module, **looks})()


CUPY, TORCH = foreign("cupy", "ndarray"), foreign("torch", "Tensor")
PARAMETER = foreign("torch.nn.parameter", "Parameter")
HOSTS = [
    pytest.param(CUPY, r"got cupy\.ndarray; .*cupy\.asnumpy\(a\) copies it", id="cupy"),
    pytest.param(TORCH, r"got torch\.Tensor; np\.asarray\(t\.detach\(\)\) shares", id="torch"),
    pytest.param(PARAMETER, r"got torch\.nn\.parameter\.Parameter; np\.asarray\(t\.detach\(\)\)", id="parameter"),
    pytest.param([[1.0, 2.0]], r"got list; np\.asarray\(a\) converts it", id="list"),
]
X = np.arange(12, dtype=np.float32).reshape(4, 3)
VECTOR = np.ones(3, np.float32)


def step(grad):
    optim.SGD([X.copy()], 0.1).step([grad])


TAKES = {
    "x": norm.batch_norm,
    "gamma": lambda a: norm.batch_norm(X, a),
    "residual": lambda a: norm.batch_norm(X, residual=a),
    "out": lambda a: norm.batch_norm(X, out=a),
    "dy": lambda a: norm.batch_norm_backward(a, norm.batch_norm(X)[1]),
    "weights": lambda a: stats.moments(X, weights=a),
    "mean": lambda a: stats.RunningStats(3).update(a, VECTOR, 4),
    "params": lambda a: optim.AdamW([a]),
    "grads": step,
    "out ": lambda a: init.normal((4, 3), seed=0, out=a),
    "x ": lambda a: nn.BatchNorm(3)(a),
}


@pytest.mark.parametrize(("array", "message"), HOSTS)
@pytest.mark.parametrize("argument", TAKES)
def test_arrays_of_other_libraries_are_refused(argument, array, message):
    with refused(rf"^{argument.strip()}(\[0\])?: expected a NumPy array, {message}", X, VECTOR):
        TAKES[argument](array)


@pytest.mark.parametrize("array", [CUPY, TORCH], ids=["cupy", "torch"])
def test_batches_of_other_libraries_are_refused(array):
    with refused("expected a NumPy array"):
        Batches(array, np.zeros(4, int), 2, seed=0)
