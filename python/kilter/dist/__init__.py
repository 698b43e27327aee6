"""Communicators: what the processes of a training run, or the threads of a test, exchange arrays with.

`Single` is a run alone, `Threads` are ranks in one process, `MPI` those that mpiexec started, `NCCL` GPUs.
`from_environment` chooses, and `together` ends all ranks if one fails.
"""

from kilter.dist.communicator import Communicator, Single
from kilter.dist.gradients import GradientReducer, shard
from kilter.dist.launch import from_environment, together
from kilter.dist.mpi import MPI
from kilter.dist.nccl import NCCL
from kilter.dist.state import broadcast_state, check_equal
from kilter.dist.threads import Threads

__all__ = [
    "MPI",
    "NCCL",
    "Communicator",
    "GradientReducer",
    "Single",
    "Threads",
    "broadcast_state",
    "check_equal",
    "from_environment",
    "shard",
    "together",
]
