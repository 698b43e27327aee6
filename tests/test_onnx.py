"""The ONNX reference evaluator agrees with kilter's norms."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from kilter.norm import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from kilter.stats import RunningStats
from support import FLOAT16, FLOAT32, FLOAT64, arithmetic, assert_close, relative_error

EPS = 2.0**-10  # attributes are float32 there
ELEMENT = {
    FLOAT64: TensorProto.DOUBLE,
    FLOAT32: TensorProto.FLOAT,
    FLOAT16: TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
}


def evaluate(op, arrays, outputs=1, *, opset, domain="", **attributes):
    """The outputs of one ONNX node on arrays."""
    names, results = [f"in{i}" for i in range(len(arrays))], [f"out{i}" for i in range(outputs)]
    node = helper.make_node(op, names, results, domain=domain, **attributes)
    inputs = [helper.make_tensor_value_info(n, ELEMENT[a.dtype], a.shape) for n, a in zip(names, arrays, strict=True)]
    ends = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in results]
    graph = helper.make_graph([node], op, inputs, ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)])
    return ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))


SHAPES = [(8, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16], ids=str)
def test_batch_norm_inference(rng, dtype, shape):
    x, small = rng.normal(2, 3, shape).astype(dtype), arithmetic(dtype)
    gamma, beta = rng.normal(size=(2, 3)).astype(small)
    running = RunningStats(3, dtype=small)
    running.mean[:], running.var[:] = rng.normal(2, 1, 3), rng.uniform(4, 9, 3)
    y, _ = batch_norm(x, gamma, beta, eps=EPS, running=running, training=False)
    wide = [a.astype(small) for a in (x, gamma, beta, running.mean, running.var)]
    (want,) = evaluate("BatchNormalization", wide, opset=15, epsilon=EPS)
    assert_close(y, want, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=str)
@pytest.mark.parametrize("momentum", [0.875, 0.5])
def test_batch_norm_training(rng, momentum, dtype, shape):
    """There momentum weighs the old value and the running variance is the biased one."""
    x = rng.normal(2, 3, shape).astype(dtype)
    gamma, beta, mean = rng.normal(size=(3, 3)).astype(dtype)
    var = rng.uniform(4, 9, 3).astype(dtype)
    running = RunningStats(3, momentum=1 - momentum, unbiased=False, dtype=dtype)
    running.mean[:], running.var[:] = mean, var
    y, _ = batch_norm(x, gamma, beta, eps=EPS, running=running)
    inputs = (x, gamma, beta, mean, var)
    wants = evaluate("BatchNormalization", inputs, 3, opset=15, epsilon=EPS, momentum=momentum, training_mode=1)
    assert_close(y, wants[0], dtype)
    for got, want in zip((running.mean, running.var), wants[1:], strict=True):
        assert relative_error(got, want) < (1e-6 if dtype == FLOAT32 else 1e-13)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 2), (2, 6, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16], ids=str)
def test_group_norm(rng, dtype, shape, groups):
    x = rng.normal(2, 3, shape).astype(dtype)
    gamma, beta = rng.normal(size=(2, 6)).astype(arithmetic(dtype))
    wide = [a.astype(arithmetic(dtype)) for a in (x, gamma, beta)]
    stash = ELEMENT[arithmetic(dtype)]  # what it takes the statistics in
    (want,) = evaluate("GroupNormalization", wide, opset=21, epsilon=EPS, num_groups=groups, stash_type=stash)
    assert_close(group_norm(x, groups, gamma, beta, eps=EPS)[0], want, dtype)


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 2), (2, 6, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16], ids=str)
def test_instance_norm(rng, dtype, shape):
    x = rng.normal(2, 3, shape).astype(dtype)
    gamma, beta = rng.normal(size=(2, 6)).astype(arithmetic(dtype))
    wide = [a.astype(arithmetic(dtype)) for a in (x, gamma, beta)]
    (want,) = evaluate("InstanceNormalization", wide, opset=6, epsilon=EPS)
    assert_close(instance_norm(x, gamma, beta, eps=EPS)[0], want, dtype)


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (4, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16], ids=str)
def test_layer_norm(rng, dtype, shape, ndim):
    x, small = rng.normal(2, 3, shape).astype(dtype), arithmetic(dtype)
    gamma, beta = rng.normal(size=(2, *shape[-ndim:])).astype(small)
    y, cache = layer_norm(x, gamma, beta, ndim=ndim, eps=EPS)
    wide = [a.astype(small) for a in (x, gamma, beta)]
    wants = evaluate("LayerNormalization", wide, 3, opset=17, axis=-ndim, epsilon=EPS)
    assert_close(y, wants[0], dtype)
    close = 1e-6 if small == FLOAT32 else 1e-13
    assert relative_error(cache.mean.ravel(), wants[1].ravel()) < close
    assert relative_error(cache.rstd.ravel(), wants[2].ravel()) < close


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (4, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16], ids=str)
def test_rms_norm(rng, dtype, shape, ndim):
    x, small = rng.normal(2, 3, shape).astype(dtype), arithmetic(dtype)
    gamma = rng.normal(size=shape[-ndim:]).astype(small)
    (want,) = evaluate("RMSNormalization", [x.astype(small), gamma], opset=23, axis=-ndim, epsilon=EPS)
    assert_close(rms_norm(x, gamma, ndim=ndim, eps=EPS)[0], want, dtype)
