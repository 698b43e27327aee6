"""An epoch of Fashion-MNIST, as `kilter train` does it and as PyTorch does: `python benches/epoch.py [MODEL ...]`.

The networks are `kilter.nn.mlp` and `kilter.nn.cnn`, in batches of 128 with AdamW, and label smoothing for the mlp.
Epochs of both take turns; both sum losses and count right answers.
"""

import argparse
from importlib.util import find_spec

from kilter import _kilter
from kilter.bench.timing import by_turns
from kilter.data import Batches, fashion_mnist
from kilter.nn import MODELS, softmax_cross_entropy
from kilter.optim import AdamW
from kilter.train import fit

BATCH, LR, ROUNDS = 128, 4e-3, 3
SMOOTHING = {"mlp": 0.1, "cnn": 0.0}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", choices=[[], *SMOOTHING], help=", ".join(SMOOTHING))
    parser.add_argument("--samples", type=int, default=60_000, help="of the training part")
    options = parser.parse_args(argv)
    data = fashion_mnist()
    x, y = data.x_train[: options.samples], data.y_train[: options.samples]
    for model in options.models or SMOOTHING:
        makers = [with_kilter, *([with_torch] if find_spec("torch") else [])]
        seconds, _ = by_turns([make(model, x, y) for make in makers], 0.0, ROUNDS, sample=0.0)
        print(model, *(f"{make.__name__} {s:.2f} s" for make, s in zip(makers, seconds, strict=True)), flush=True)


def with_kilter(name, x, y):
    model = MODELS[name](x.shape[1:], 10)
    optimizer, batches = AdamW(model.params(), LR), Batches(x, y, BATCH, seed=0)

    def loss(logits, labels):
        return softmax_cross_entropy(logits, labels, label_smoothing=SMOOTHING[name])

    return lambda: fit(model, optimizer, loss, batches, epochs=1, progress=False)


def with_torch(name, x, y):
    import torch

    torch.set_num_threads(_kilter.num_threads())
    model, x, y = network(torch.nn, name), torch.from_numpy(x), torch.from_numpy(y).long()
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING[name])

    def epoch():
        total, right = 0.0, 0
        for rows in torch.randperm(len(x)).split(BATCH):
            labels = y[rows]
            logits = model(x[rows])
            value = loss(logits, labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item() * len(rows)
            right += int((logits.argmax(1) == labels).sum())

    return epoch


def network(nn, name):
    """PyTorch's form of the network: the same layers."""
    layers, before = [], 1 if name == "cnn" else 784
    if name == "mlp":
        layers.append(nn.Flatten())
        for size in (256, 128):
            layers += [nn.Linear(before, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
            before = size
        return nn.Sequential(*layers, nn.Linear(before, 10))
    for size, pool in ((16, True), (32, True), (64, False)):
        layers += [nn.Conv2d(before, size, 3, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        before = size
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 7 * 7, 10))


if __name__ == "__main__":
    main()
