"""Data sets and batches whose order is a pure function of seed and epoch."""

from kilter.data.batches import Batches
from kilter.data.idx import read_idx
from kilter.data.sources import Dataset, digits, fashion_mnist

__all__ = ["Batches", "Dataset", "digits", "fashion_mnist", "read_idx"]
