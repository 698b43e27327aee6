"""The rules of the house that a search can check."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("python", "rust", "tests", "benches")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".pyi", ".rs", ".cu", ".cuh") and "target" not in path.parts
)


def code(path):
    """The text without line comments, which may name what they explain."""
    marker = "#" if path.suffix in (".py", ".pyi") else "//"
    return "\n".join(line.split(marker)[0] for line in path.read_text().splitlines())


def users(pattern, folder):
    files = [p for p in SOURCES if p.is_relative_to(ROOT / folder)]
    assert files, f"nothing found under {folder}"
    return {str(p.relative_to(ROOT / folder)) for p in files if re.search(pattern, code(p))}


@pytest.mark.parametrize(
    ("pattern", "folder", "allowed"),
    [
        (r"\bunsafe\b(?!_)", "rust", {"core/src/simd.rs", "py/src/array.rs"}),
        (r"\brayon\b", "rust", {"core/src/kernel.rs"}),
        (r"\bpy\s*\.\s*detach\b", "rust", {"py/src/gate.rs"}),
        (r"\bmul_add\b", "rust/core", set()),
        (r"\bpyo3\b|\bnumpy::", "rust/core", set()),
        (r"\b(std|core)::arch::", "rust", {"core/src/simd.rs"}),
    ],
)
def test_one_home(pattern, folder, allowed):
    assert users(pattern, folder) <= allowed


def test_cupy_is_named_in_one_place():
    named = users(r"\bcupy\b", "python/kilter")
    assert {name for name in named if not name.startswith("cuda/")} <= {"_backend.py"}


def test_the_core_does_not_list_python():
    manifest = (ROOT / "rust/core/Cargo.toml").read_text()
    assert not re.search("pyo3|numpy", manifest)


def test_users_mistakes_are_not_asserted():
    assert not users(r"^\s*assert\b|\n\s*assert\b", "python/kilter")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    """About 400 lines of code: blank lines, comments and docstrings do not count."""
    text = path.read_text()
    if path.suffix == ".py":
        text = re.sub(r'^\s*"""(?:.|\n)*?"""', "", text, flags=re.MULTILINE)
    code = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", "//"))]
    assert len(code) <= 400


LAYERS = [
    {"cli", "__main__"},
    {"experiments", "bench"},
    {"train"},
    {"nn", "data", "dist", "interop"},
    {"norm", "optim", "init", "stats", "schedule"},
    {"_check"},
    {"_backend"},
    {"_kilter", "cuda"},
]


def layer(name):
    return next((depth for depth, names in enumerate(LAYERS) if name in names), None)


def test_imports_point_down():
    package, wrong = ROOT / "python/kilter", []
    for path in package.rglob("*.py"):
        home = layer(path.relative_to(package).with_suffix("").parts[0])
        if home is None:
            continue
        text = code(path)
        modules = re.findall(r"(?:from|import) kilter\.(\w+)", text)
        for names in re.findall(r"from kilter import (\([^)]*\)|[^\n]*)", text):
            modules += re.findall(r"\w+", names)
        wrong += [f"{path.name} imports {m}" for m in modules if layer(m) is not None and layer(m) < home]
    assert not wrong


def test_import_is_light():
    heavy = "matplotlib safetensors tqdm cupy torch sklearn scipy mpi4py"
    check = f"import sys, kilter; print(*[m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
