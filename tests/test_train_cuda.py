"""Training on the simulated device: the arrays stay there, and what is saved is plain."""

import numpy as np
import pytest

from kilter import train
from kilter._backend import NUMPY, Backend
from kilter.dist import Single
from kilter.train import checkpoint
from small import blobs


@pytest.fixture
def device(cuda, monkeypatch):
    """What "cuda" stands for."""
    known = {"cpu": NUMPY, "cuda": Backend(cuda.xp, cuda.ops)}
    for module in ("kilter.nn.module", "kilter.train.build"):
        monkeypatch.setattr(f"{module}.backend_named", known.get)
    return cuda


def job(folder, out, **options):
    x, y = blobs(40)
    np.savez(folder / "d.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    config = {"data": str(folder / "d.npz"), "hidden": (4,), "epochs": 2, "batch_size": 16, "lr": 0.02} | options
    return train.Job(train.Config(**config), folder / out, comm=Single())


@pytest.mark.parametrize("options", [{}, {"norm": "layer", "ema": 0.9, "accumulate": 2, "monitor": True}])
def test_a_run_on_the_device_is_that_on_the_host(device, tmp_path, options):
    want = job(tmp_path, "host", **options).run()
    there = job(tmp_path, "device", device="cuda", **options)
    assert {type(a) for a in (*there.model.params().values(), there.data.x_train, there.data.y_test)} == {
        type(device.array(np.zeros(1)))
    }
    for row, own in zip(there.run(), want, strict=True):
        assert abs(row["loss"] - own["loss"]) < 1e-5
        assert row["valid_accuracy"] == own["valid_accuracy"]
    for name in ("last", "last.previous", "model"):
        one, other = (checkpoint.read(tmp_path / at / f"{name}.safetensors")[0] for at in ("host", "device"))
        assert one.keys() == other.keys()
        for key, value in one["model"].items():
            np.testing.assert_allclose(other["model"][key], value, rtol=1e-4, atol=1e-5)


def test_a_run_on_the_device_goes_on(device, tmp_path):
    there = job(tmp_path, "r", device="cuda", epochs=3, checkpoint_every=1)
    want = there.run()
    (tmp_path / "r" / "last.safetensors").unlink()  # the one before lies within the last epoch
    again = train.Job.resumed(tmp_path / "r")
    timeless = [[v for k, v in row.items() if "second" not in k] for row in (*want, *again.run())]
    assert timeless[:3] == timeless[3:]
    for name, value in there.model.params().items():
        np.testing.assert_array_equal(device.numpy(again.model.params()[name]), device.numpy(value))
