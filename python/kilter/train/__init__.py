"""Training: the loop, run folders and checkpoints."""

from kilter.train.checkpoint import Checkpoint, load, save
from kilter.train.folder import RunFolder
from kilter.train.job import Config, Job
from kilter.train.loop import Callback, Row, State, fit
from kilter.train.metrics import Metrics, evaluate
from kilter.train.precise import recompute_batch_norm

__all__ = [
    "Callback",
    "Checkpoint",
    "Config",
    "Job",
    "Metrics",
    "Row",
    "RunFolder",
    "State",
    "evaluate",
    "fit",
    "load",
    "recompute_batch_norm",
    "save",
]
