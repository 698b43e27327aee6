"""How a program starts on several ranks, and ends on all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout

from kilter._check import KilterError
from kilter.dist.communicator import Communicator, Single
from kilter.dist.mpi import MPI
from kilter.dist.nccl import NCCL

# How many processes a launcher started: MPICH, Intel MPI and srun with PMI; Open MPI; MVAPICH; srun.
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def from_environment(environment: Mapping[str, str] = os.environ) -> Communicator:
    """Returns the communicator that fits how the program was started: `MPI()` under mpiexec, `Single()` otherwise.

    One rank under mpiexec is a `Single()`, too. mpi4py is imported for an `MPI()` alone.

    Args:
        environment: where the variables of a launcher stand.

    Raises:
        KilterError: started under mpiexec, and mpi4py is missing.
    """
    sizes = [environment.get(name, "") for name in _SIZES]
    return MPI() if any(size.isdecimal() and int(size) > 1 for size in sizes) else Single()


@contextmanager
def together(comm: Communicator, *, quiet: bool = False) -> Iterator[None]:
    """Runs a block on all ranks of `MPI` or `NCCL`, which end together: none waits for one that failed.

    An exception that leaves the block on any rank reaches the others as a KilterError in their next call. Where several
    ranks fail, one goes on with its exception, to be printed or handled once; the others get SystemExit(0), which says
    nothing: the exit status of mpiexec is that of the one. Ranks that make no further call within two seconds are
    ended by MPI's Abort, after the exception has been printed. A rank that reaches the end of the block waits for the
    others.

    With other communicators the block just runs: a `Single` has no others, and `Threads.run` does all this itself.

    Args:
        comm: this rank's communicator.
        quiet: let only rank 0 write to stdout in the block.

    Examples:
        >>> with together(comm := from_environment(), quiet=True):
        ...     print(comm.all_gather(np.array(comm.rank)))
    """
    with ExitStack() as stack:
        if quiet and comm.rank > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
        host = comm.host if isinstance(comm, NCCL) else comm
        if not isinstance(host, MPI):
            yield
            return
        letters, failure = host.letters, None
        try:
            yield
        except BaseException as error:
            failure = error
        exits_well = isinstance(failure, SystemExit) and not failure.code
        if not letters.leave(None if exits_well else failure):
            letters.abort(failure or KilterError("comm: expected exchanges that end, got an error in one"))
        speaker = letters.speaker()
        if speaker not in (None, comm.rank):
            raise SystemExit(0) from failure
        if failure is not None:
            raise failure
