"""benches/gpu.py on the simulator: its shapes, its host code, and that nothing which fails stops or hides the rest."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

BENCHES = Path(__file__).parent.parent / "benches"


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    import gpu_cases

    return gpu_cases


def run(script, *arguments):
    """The exit status and the output of a script that begins where the bench is imported."""
    begin = f"import sys; sys.path.insert(0, {str(BENCHES)!r}); import gpu\n"
    command = [sys.executable, "-c", begin + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_lists_of_parameters(cases):
    found = {name: (len(shapes), sum(map(prod, shapes))) for name, shapes in cases.LISTS.items()}
    assert found == {
        "resnet-50": (161, 25_557_032),
        "gpt 124M": (148, 124_475_904),
        "gpt 1B": (220, 1_013_669_888),
        "2000 x 1024": (2000, 2_048_000),
        "10000 x 64": (10_000, 640_000),
    }


def test_the_layers_of_resnet50(cases):
    rows = [row for row in cases.norms(False) if row.part == "bn resnet50 nchw" and row.name.endswith("forward")]
    assert sum(row.count for row in rows) == 53
    assert sum(row.count * row.floor for row in rows) / 4.3e12 == pytest.approx(2.65e-3, rel=1e-2)
    assert all(row.sets * row.held > 180e6 for row in rows)


def test_everything_runs_on_the_simulator(tmp_path):
    status, said = run("sys.exit(gpu.main(['--simulate', '--out', sys.argv[1]]))", tmp_path)
    assert status == 0, said
    assert (tmp_path / "gpu.txt").read_text().endswith("no errors\n")
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["errors"] == []
    parts = {row["part"] for row in content["rows"]}
    assert parts >= {
        "ceilings",
        "bn resnet50 nchw",
        "bn resnet50 nhwc",
        "bn",
        "norms",
        "groups",
        "losses",
        "optim",
        "init",
    }
    assert all(row["timings"]["kilter"]["us"] > 0 for row in content["rows"])


def test_without_a_device_it_says_so_in_one_line(tmp_path):
    status, said = run("sys.modules['cupy'] = None; sys.exit(gpu.main(['--out', sys.argv[1]]))", tmp_path / "out")
    assert status == 2 and said.startswith("device: expected CuPy for 'cuda', got none") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_found_and_said():
    wrong = """
known = gpu.gpu_checks.reference.layer_norm
gpu.gpu_checks.reference.layer_norm = lambda *a, **k: (known(*a, **k)[0] * 1.01, None, None)
sys.exit(gpu.main(["--simulate", "--parts", "checks"]))
"""
    status, said = run(wrong)
    assert status == 1
    assert "FAILED row_norm (7, 40) True float32: AssertionError: relative error" in said
    assert "FAILED group_norm" not in said


def test_a_part_that_fails_does_not_stop_the_others():
    broken = """
def ceilings(bench):
    raise MemoryError("no room")
gpu.Bench.ceilings = ceilings
gpu.gpu_cases.fills = lambda simulated: [gpu.gpu_cases.Case("init", "x", "float32", 1, 1, 1, ceilings, ("fill", "y"))]
sys.exit(gpu.main(["--simulate", "--parts", "ceilings", "init", "clusters"]))
"""
    status, said = run(broken)
    assert status == 1
    assert "FAILED ceilings: MemoryError: no room" in said and "FAILED init x float32: TypeError" in said
    assert "clusters of  8, 100 KB: right" in said and "2 errors" in said
