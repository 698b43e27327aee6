"""Layers as a textbook writes them, in float64, one output at a time."""

import math

import numpy as np


def padded(x, padding, value=0.0):
    (top, left) = padding
    return np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (top, top), (left, left)), constant_values=value)


def places(x, kernel, stride):
    """(i, j, window of x (N, C, kernel height, kernel width)) for every output pixel."""
    height, width = ((n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True))
    for i in range(height):
        for j in range(width):
            top, left = i * stride[0], j * stride[1]
            yield i, j, x[:, :, top : top + kernel[0], left : left + kernel[1]]


def image(parts):
    """The outputs of `places` as (N, C, H, W)."""
    size = 1 + max(i for i, *_ in parts), 1 + max(j for _, j, _ in parts)
    y = np.empty((*parts[0][2].shape, *size))
    for i, j, value in parts:
        y[:, :, i, j] = value
    return y


def conv2d(x, weight, bias=None, stride=(1, 1), padding=(0, 0), groups=1):
    weight = np.asarray(weight, np.float64)
    outs, ins = weight.shape[0] // groups, weight.shape[1]
    parts = []
    for i, j, seen in places(padded(x, padding), weight.shape[2:], stride):
        by_group = [
            np.einsum("ncuv,ocuv->no", seen[:, g * ins : (g + 1) * ins], weight[g * outs : (g + 1) * outs])
            for g in range(groups)
        ]
        parts.append((i, j, np.concatenate(by_group, axis=1) + (0 if bias is None else np.asarray(bias, np.float64))))
    return image(parts)


def max_pool2d(x, kernel, stride, padding):
    seen = places(padded(x, padding, -np.inf), kernel, stride)
    return image([(i, j, part.max(axis=(2, 3))) for i, j, part in seen])


def avg_pool2d(x, kernel, stride, padding):
    seen = places(padded(x, padding), kernel, stride)
    return image([(i, j, part.mean(axis=(2, 3))) for i, j, part in seen])


def gelu(x):
    """x times the share of the normal distribution below x."""
    return np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in np.asarray(x, np.float64).flat]).reshape(x.shape)


def softmax_cross_entropy(logits, q, weights=None):
    """The weighted mean of log sum_k exp z_k - sum_k q_k z_k over the samples, and its gradient."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(1, keepdims=True)
    total = np.exp(z).sum(1, keepdims=True)
    w = np.full(len(z), 1 / len(z)) if weights is None else np.asarray(weights, np.float64) / np.sum(weights)
    loss = (w * (np.log(total)[:, 0] - (q * z).sum(1))).sum()
    return loss, w[:, None] * (np.exp(z) / total - q)


def smoothed(labels, classes, eps, others):
    """Soft targets of labels: eps is spread over all classes ("uniform") or over the others ("rest")."""
    hot = np.eye(classes)[labels]
    return (1 - eps) * hot + (eps / classes if others == "uniform" else eps * (1 - hot) / (classes - 1))
