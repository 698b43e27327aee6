"""Data sets, and batches whose order and augmentation are pure functions of (seed, epoch, index)."""

from kilter.data.augment import crop, flip, noise
from kilter.data.batches import Batches
from kilter.data.idx import read_idx
from kilter.data.mixing import cutmix, mixup
from kilter.data.sources import Dataset, digits, fashion_mnist

__all__ = [
    "Batches",
    "Dataset",
    "crop",
    "cutmix",
    "digits",
    "fashion_mnist",
    "flip",
    "mixup",
    "noise",
    "read_idx",
]
