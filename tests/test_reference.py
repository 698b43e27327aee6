"""The specification against published and worked numbers, before anything is tested against it."""

import numpy as np
import pytest

import reference

X = np.array([[2.0], [4.0], [6.0], [8.0]])


def test_v1_forward():
    y, mean, var = reference.batch_norm(X, [2], [1])
    assert (mean, var) == (5, 5)
    np.testing.assert_allclose(y[:, 0], [-1.683278889722, 0.105573703426, 1.894426296574, 3.683278889722], atol=1e-12)
    y, _, _ = reference.batch_norm(X, [2], [1], eps=1e-8)
    np.testing.assert_allclose(y[:, 0], [-1.683281570316, 0.105572809895, 1.894427190105, 3.683281570316], atol=1e-12)


def test_v2_backward():
    dy = np.array([[1.0], [2.0], [-1.0], [0.5]])
    dx, dgamma, dbeta, _ = reference.batch_norm_backward(dy, X, [2])
    np.testing.assert_allclose(dx[:, 0], [-0.268326681499, 1.028590643551, -1.252197217695, 0.491933255643], atol=1e-12)
    np.testing.assert_allclose([dgamma[0], dbeta[0]], [-2.012459167292, 2.5], atol=1e-12)
    mean, var = reference.running([(5, 5, 4)])
    y, _, _ = reference.batch_norm(X, [2], [1], mean=[mean], var=[var])
    np.testing.assert_allclose(y[:, 0], [3.396798736465, 6.592530385086, 9.788262033707, 12.983993682327], atol=1e-12)
    dx, dgamma, dbeta, _ = reference.batch_norm_backward(dy, X, [2], mean=[mean], var=[var])
    np.testing.assert_allclose(dx[:, 0], [1.597865824310, 3.195731648621, -1.597865824310, 0.798932912155], atol=1e-12)
    np.testing.assert_allclose([dgamma[0], dbeta[0]], [5.392797157047, 2.5], atol=1e-12)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("weights", [None, "sample", "position"])
def test_batch_norm_gradients_are_central_differences(rng, relu, axis, weights):
    x, residual, dy = rng.normal(size=(3, 3, 4, 2, 4))
    c = x.shape[axis]
    spatial = tuple(np.delete(x.shape, axis))
    gamma, beta = rng.normal(size=(2, c))
    weights = {None: None, "sample": [1.0, 0.0, 2.0], "position": rng.integers(0, 3, spatial)}[weights]

    def loss():
        out, _, _ = reference.batch_norm(x, gamma, beta, axis=axis, residual=residual, relu=relu, weights=weights)
        return (out * dy).sum()

    y, _, _ = reference.batch_norm(x, gamma, beta, axis=axis, residual=residual, relu=relu, weights=weights)
    grads = reference.batch_norm_backward(dy, x, gamma, axis=axis, y=y if relu else None, weights=weights)
    for array, grad in zip((x, gamma, beta, residual), grads, strict=True):
        np.testing.assert_allclose(grad, differences(loss, array), atol=1e-7)


def test_v6_groups():
    x = np.array([[2.0, 4.0, 6.0, 8.0]])
    np.testing.assert_allclose(reference.group_norm(x, 2)[0][0], [-0.999995000038, 0.999995000038] * 2, atol=1e-12)
    whole = [-1.341639444861, -0.447213148287, 0.447213148287, 1.341639444861]
    np.testing.assert_allclose(reference.group_norm(x, 1)[0][0], whole, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("axis", [1, -1])
def test_group_norm_gradients_are_central_differences(rng, axis, groups):
    x, dy = rng.normal(size=(2, 3, 4, 2, 4))
    gamma, beta = rng.normal(size=(2, 4))
    grads = reference.group_norm_backward(dy, x, groups, gamma, axis=axis)

    def loss():
        return (reference.group_norm(x, groups, gamma, beta, axis=axis)[0] * dy).sum()

    for array, grad in zip((x, gamma, beta), grads, strict=True):
        np.testing.assert_allclose(grad, differences(loss, array), atol=1e-7)


def test_v6_layer_norm():
    x = np.array([[2.0, 4.0, 6.0, 8.0]])
    want = [-1.341639444861, -0.447213148287, 0.447213148287, 1.341639444861]
    np.testing.assert_allclose(reference.layer_norm(x)[0][0], want, atol=1e-12)
    np.testing.assert_allclose(reference.layer_norm(x, eps=0, centred=False)[0], x / np.sqrt(30), rtol=1e-15)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ndim", [1, 2])
def test_layer_norm_gradients_are_central_differences(rng, ndim, centred):
    x, dy = rng.normal(size=(2, 3, 2, 4))
    gamma, beta = rng.normal(size=(2, *x.shape[-ndim:]))
    grads = reference.layer_norm_backward(dy, x, gamma, ndim=ndim, centred=centred)

    def loss():
        return (reference.layer_norm(x, gamma, beta, ndim=ndim, centred=centred)[0] * dy).sum()

    for array, grad in zip((x, gamma, beta), grads, strict=True):
        np.testing.assert_allclose(grad, differences(loss, array), atol=1e-7)


def differences(loss, array, h=1e-6):
    """Central differences of loss() in every element of array, which loss reads."""
    grad = np.zeros_like(array)
    for i in np.ndindex(array.shape):
        kept = array[i]
        array[i] = kept + h
        up = loss()
        array[i] = kept - h
        grad[i] = (up - loss()) / (2 * h)
        array[i] = kept
    return grad


def test_v3_v4_running_statistics():
    batches = [(mean, 1.0, 2) for mean in (5, 6, 7)]

    def means(momentum):
        return [reference.running(batches[:k], momentum=momentum)[0] for k in (1, 2, 3)]

    np.testing.assert_allclose(means(0.9), [4.5, 5.85, 6.885])
    np.testing.assert_allclose(means(0.1), [0.5, 1.05, 1.645])
    np.testing.assert_allclose(means(None), [5, 5.5, 6])
    np.testing.assert_allclose([reference.running(batches, momentum=m)[1] for m in (0.9, 0.1, None)], [1.999, 1.271, 2])
    assert reference.running(batches, unbiased=False)[1] == 1


def test_v8_merge():
    parts = [reference.moments(np.array(v, np.float64).reshape(-1, 1)) for v in ([1, 3], [2, 4, 6], [], [10])]
    for order in (parts, parts[::-1]):
        count, mean, m2 = reference.merge(*order)
        np.testing.assert_allclose([count[0], mean[0], m2[0] / 6, m2[0] / 5], [6, 13 / 3, 80 / 9, 32 / 3])
    count, mean, m2 = reference.merge(*(reference.moments(np.array(v).reshape(-1, 1)) for v in ([1, 2, 3], [10])))
    np.testing.assert_allclose([mean[0], m2[0] / 4], [4, 12.5])


def test_v18_loss_scale():
    path = reference.loss_scale([True] * 2000 + [False, False] + [True] * 2000)
    assert path[1998:2002] == [65536, 131072, 65536, 32768]
    assert path[-2:] == [32768, 65536]


def test_philox_vectors():
    for counter, key, expected in [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]:
        assert " ".join(f"{w:08x}" for w in reference.philox(counter, key)) == expected


def test_philox_agrees_with_randomgen():
    randomgen = pytest.importorskip("randomgen")
    seed = 0x0123456789ABCDEF
    generator = randomgen.Philox(key=seed, counter=0, number=4, width=32)  # its first draw is counter 1
    expected = generator.random_raw(4 * 31).astype(np.uint32).reshape(31, 4)
    filled = reference.words(128, seed=seed).reshape(2, 4, 16)  # group, word, lane
    np.testing.assert_array_equal(np.moveaxis(filled, 1, 2).reshape(32, 4)[1:], expected)


def test_fill_mapping_is_a_function_of_the_index():
    whole = reference.words(300, seed=7, stream=3)
    np.testing.assert_array_equal(reference.words(50, seed=7, stream=3, start=129), whole[129:179])
    assert reference.words(1, seed=7, start=2**36)[0] == reference.philox([0, 4, 0, 0], [7, 0])[0]


def test_variates_have_the_right_moments():
    u, z = reference.uniform(200_000, seed=1), reference.normal(200_000, seed=1)
    assert u.min() >= 0 and u.max() < 1
    np.testing.assert_allclose([u.mean(), u.var()], [1 / 2, 1 / 12], atol=2e-3)
    np.testing.assert_allclose([z.mean(), z.var(), (z**4).mean()], [0, 1, 3], atol=5e-2)


@pytest.mark.parametrize(
    ("shape", "xavier_bound", "xavier_var", "xavier_in", "he_std", "he_bound", "torch_bound"),
    [
        (
            (784, 512),
            0.068041381744,
            1.543210e-3,
            1.275510e-3,
            0.050507627227,
            0.087481776528,
            0.035714285714,
        ),
        ((512, 256), 0.088388347648, 2.604167e-3, 1.953125e-3, 0.0625, 0.108253175473, 0.044194173824),
        ((256, 10), 0.150187852297, 7.518797e-3, 3.906250e-3, 0.088388347648, 0.153093108924, 0.0625),
    ],
)
def test_v12_scales(shape, xavier_bound, xavier_var, xavier_in, he_std, he_bound, torch_bound):
    std = reference.deviation
    np.testing.assert_allclose(reference.bound(std("xavier", shape)), xavier_bound, rtol=1e-10)
    np.testing.assert_allclose(std("xavier", shape) ** 2, xavier_var, rtol=1e-6)
    np.testing.assert_allclose(std("xavier", shape, mode="fan_in") ** 2, xavier_in, rtol=1e-6)
    np.testing.assert_allclose([std("he", shape), reference.bound(std("he", shape))], [he_std, he_bound], rtol=1e-10)
    np.testing.assert_allclose(reference.bound(std("torch_default", shape)), torch_bound, rtol=1e-10)
