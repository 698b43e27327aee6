"""Training: the loop, run folders and checkpoints."""

from kilter.train.checkpoint import Checkpoint, load, save
from kilter.train.folder import RunFolder
from kilter.train.job import Config, Job
from kilter.train.loop import fit
from kilter.train.lr_find import Found, lr_find
from kilter.train.metrics import Metrics, evaluate
from kilter.train.monitors import FollowPlateau, Monitor, count_nonfinite, update_ratio
from kilter.train.precise import recompute_batch_norm
from kilter.train.resume import Checkpoints
from kilter.train.state import Callback, Row, State

__all__ = [
    "Callback",
    "Checkpoint",
    "Checkpoints",
    "Config",
    "FollowPlateau",
    "Found",
    "Job",
    "Metrics",
    "Monitor",
    "Row",
    "RunFolder",
    "State",
    "count_nonfinite",
    "evaluate",
    "fit",
    "load",
    "lr_find",
    "recompute_batch_norm",
    "save",
    "update_ratio",
]
