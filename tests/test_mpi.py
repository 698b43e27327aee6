"""kilter.dist.MPI: real processes under mpiexec, which end together."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ranks
from kilter import KilterError, dist
from kilter.cli import main
from kilter.dist import Single, Threads, letters

pytestmark = pytest.mark.timeout(150)
MPIEXEC = Path(sys.executable).with_name("mpiexec")
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1", "KILTER_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
SECONDS = 100  # in which a job ends, however busy the machine is: ranks that wait for ever take longer


def mpiexec(size, *command, interrupt=False):
    """Runs a command on some ranks: (exit status, stdout, stderr)."""
    command = [MPIEXEC, "-n", str(size), sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes) as process:
        try:
            if interrupt:
                process.stdout.readline()
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def scenario(size, names, folder="", **options):
    return mpiexec(size, Path(__file__).with_name("ranks.py"), names, folder, **options)


# --------------------------------------------------------------------------- what all ranks finish


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank trains."""
    folder = tmp_path_factory.mktemp("alone")
    ranks.training(Single(), folder)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_as_threads_and_train_as_one(size, alone, tmp_path):
    """Calls, statistics, and 1 x 4B, 2 x 2B, 4 x B samples: equal within rounding, on all ranks equal in bits."""
    status, out, err = scenario(size, "collective,statistics,training", tmp_path)
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"{name} done on {size}" for name in ("collective", "statistics", "training")]
    for batch in (32, 31):
        got, want = (np.load(Path(path)) for path in (tmp_path / f"{size}-{batch}.npz", alone / f"1-{batch}.npz"))
        assert got.files == want.files and len(got.files) > 10
        for name in want.files:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-8, atol=1e-10, err_msg=name)


def test_the_scenarios_fail_where_they_should(alone):
    """Without an exchange of statistics, or with plain means of unequal shares, the numbers would differ."""
    one, two = (np.load(alone / f"1-{batch}.npz") for batch in (32, 31))
    assert np.abs(one["row"] - two["row"]).max() > 1e-6


# --------------------------------------------------------------------------- what ends early

TRACE = "Traceback (most recent call last)"


@pytest.mark.parametrize(
    ("name", "message", "calm"),
    [
        ("raises", "LookupError: of rank 1", True),
        ("raises_in_training", "LookupError: in step 3", True),
        ("all_raise", "KilterError: lr: expected a number", True),
        ("busy", "LookupError: of rank 1", False),
        ("differ", r"\(3,\) on rank 0, all_reduce of float64 \(4,\) on rank 1", True),
        ("returns", "all_gather: expected all 3 ranks, rank 1 has left", True),
        ("exits_well", "barrier: expected all 3 ranks, rank 1 has left", True),
    ],
)
def test_an_error_on_one_rank_ends_all_and_is_printed_once(name, message, calm):
    """Calmly where the others take notice; by MPI's Abort where they do not."""
    status, out, err = scenario(3, name)
    assert status not in (0, None)
    assert len(re.findall(message, err)) == 1 and err.count(TRACE) == 1, err
    assert "done" not in out and ("Abort" in err) != calm


def test_an_error_outside_a_block_ends_all():
    """Each rank prints its own there."""
    status, _, err = scenario(3, "no block")
    assert status not in (0, None)
    assert err.count("LookupError: of rank 1") == 1
    assert err.count("all_reduce: expected all 3 ranks, rank 1 has failed") == 2


def test_the_exit_status_of_one_rank_is_that_of_all():
    assert scenario(3, "exits") == (3, "", "")


def test_a_killed_rank_ends_all(tmp_path):
    """SIGKILL in the third step: nothing on that rank can say so. The checkpoint continues, bit for bit."""
    status, out, err = scenario(2, "killed", tmp_path)
    assert status not in (0, None) and "done" not in out
    assert "Killed" in out + err
    assert scenario(2, "training,resumed", tmp_path)[::2] == (0, "")
    got, want = np.load(tmp_path / "resumed.npz"), np.load(tmp_path / "2-32.npz")
    assert {name: got[name].tobytes() for name in got.files} == {name: want[name].tobytes() for name in got.files}
    assert len(got.files) > 10


def test_ctrl_c_ends_all():
    status, out, _ = scenario(3, "waits", interrupt=True)
    assert status not in (0, None) and "done" not in out


# --------------------------------------------------------------------------- how a program starts


@pytest.mark.parametrize(
    "environment",
    [{}, {"PMI_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": ""}, {"PMI_SIZE": "two"}, {"PMI_RANK": "1"}],
    ids=str,
)
def test_a_program_alone_has_one_rank(environment):
    assert isinstance(dist.from_environment(environment), Single)


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_mpi4py_is_asked_for_where_it_is_missing(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    with pytest.raises(KilterError, match=r"^mpi4py is not installed: pip install 'kilter\[mpi\]'$"):
        dist.from_environment({name: "2"})


def test_a_missing_library_is_named(monkeypatch):
    def fails(name):
        raise RuntimeError("cannot load MPI library")

    monkeypatch.setattr(dist.mpi, "import_module", fails)
    with pytest.raises(KilterError, match=r"cannot load MPI library\): pip install 'kilter\[mpi\]' brings MPICH"):
        dist.MPI()


def test_a_block_without_other_processes_just_runs(capsys):
    with dist.together(Single(), quiet=True):
        print("heard")
    with pytest.raises(LookupError), dist.together(Single()):
        raise LookupError

    def work(comm):
        with dist.together(comm):
            return comm.all_gather(np.array(comm.rank)).tolist()

    assert Threads(2).run(work) == [[0, 1]] * 2
    assert capsys.readouterr().out == "heard\n"


def test_other_ranks_are_silent_in_a_quiet_block(capsys):
    with dist.together(SimpleNamespace(rank=1, size=2), quiet=True):
        print("unheard")
    print("heard")
    assert capsys.readouterr().out == "heard\n"


class Deaf:
    """A communicator of mpi4py whose other ranks never answer."""

    aborted = None

    def Get_rank(self):  # noqa: N802
        return 0

    def Get_size(self):  # noqa: N802
        return 2

    def Iallgather(self, sent, received):  # noqa: N802
        return SimpleNamespace(Test=lambda: False)

    def Abort(self, status):  # noqa: N802
        self.aborted = status


def test_ranks_that_do_not_answer_are_given_up(monkeypatch, capsys):
    monkeypatch.setattr(letters, "_GRACE", 0.01)
    comm = Deaf()
    ours, error = letters.Letters(comm), KilterError("x: wrong")
    assert not ours.leave(error)
    with pytest.raises(KilterError, match="a call after others that ended"), ours.exchange("barrier"):
        raise AssertionError
    with pytest.raises(KilterError, match="x: wrong"):
        ours.abort(error)
    assert comm.aborted == 1 and capsys.readouterr().err == "kilter: rank 0: x: wrong\n"


def test_an_error_in_the_middle_of_an_exchange_cannot_be_told():
    ours = letters.Letters(SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, Iallgather=answered))
    with pytest.raises(MemoryError), ours.exchange("all_gather", np.zeros(letters.ROOM)):
        raise MemoryError
    assert not ours.leave(MemoryError())


def answered(sent, received):
    received[...] = sent
    return SimpleNamespace(Test=lambda: True)


# --------------------------------------------------------------------------- kilter train

TRAIN = ("-m", "kilter", "train", "--epochs", 2, "--hidden", "32,16", "--batch-size", 200, "--dropout", 0.0)


@pytest.mark.parametrize("size", [2, 4])
def test_kilter_train(size, tmp_path, capsys):
    """Prints once, writes one folder, and trains as one process does; 1,437 samples leave a remainder."""
    status, out, err = mpiexec(size, *TRAIN, "--out", tmp_path / "ranks")
    assert (status, err) == (0, "")
    assert main([*map(str, TRAIN[2:]), "--out", str(tmp_path / "one")]) == 0
    alone = capsys.readouterr().out
    assert len(out.splitlines()) == len(alone.splitlines()) and f", {size} ranks" in out
    got, want = (np.genfromtxt(tmp_path / name / "metrics.csv", delimiter=",")[1:, :6] for name in ("ranks", "one"))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert {p.name for p in (tmp_path / "ranks").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", "fast"), "kilter: argument --lr: expected a number or 'find', got 'fast' (see kilter train --help)"),
        (("--lr", "1e30", "--optimizer", "sgd", "--norm", "none"), "kilter: loss: expected a finite number, got nan"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(options, message, tmp_path):
    status, out, err = mpiexec(3, *TRAIN, *options, "--out", tmp_path / "run")
    assert (status, out) == (2, "")
    assert err.startswith(message) and len(err.splitlines()) == 1
