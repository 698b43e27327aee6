"""Communicators: what the processes of a training run, or the threads of a test, exchange arrays with."""

from kilter.dist.communicator import Communicator, Single
from kilter.dist.threads import Threads

__all__ = ["Communicator", "Single", "Threads"]
