"""What the README shows: its examples run, its commands parse, its names exist."""

import importlib
import re
from pathlib import Path

import pytest

import kilter
from kilter import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^    (\S.*)$", PROSE, re.MULTILINE)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def commands():
    """The arguments of every `kilter` command, on lines of their own and within a sentence."""
    for line in SHELL + re.findall(r"`([^`\n]+)`", PROSE):
        for part in line.split("&&"):
            words = [word for word in part.split() if not ASSIGNMENT.fullmatch(word)]
            if words[:1] == ["kilter"] and len(words) > 1:
                yield tuple(words[1:])


COMMANDS = sorted(set(commands()))


def printed_by(example, capsys):
    exec(compile(example, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_the_loop_of_the_readme_learns(capsys):
    example = EXAMPLES[0]
    assert len(example.splitlines()) <= 22
    accuracy = re.fullmatch(r"test accuracy (.*)%\n", printed_by(example, capsys))
    assert float(accuracy[1]) > 95


def test_the_other_examples_print_what_they_say(capsys):
    assert len(EXAMPLES) > 1
    for example in EXAMPLES[1:]:
        said = re.findall(r"print\(.*?\)  # (.*)", example)
        assert said
        assert printed_by(example, capsys).splitlines() == said


def test_every_code_block_is_tested():
    assert len(re.findall("^```", README, re.MULTILINE)) == 2 * len(EXAMPLES)


@pytest.mark.parametrize("line", ["pip install '.[train]' && kilter train", "pip install '.[test]' && pytest"])
def test_the_two_commands_stand_word_for_word(line):
    assert line in SHELL


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command):
    if "--help" in command:
        with pytest.raises(SystemExit) as done:
            cli._parser().parse_args(command)
        assert done.value.code == 0
        return
    options = cli._parser().parse_args(command)
    assert set(getattr(options, "what", ())) <= set(cli.BENCHES)


def test_the_commands_are_found():
    assert {("train",), ("info",), ("bench", "norms", "optim", "init"), ("train", "--norm", "none")} <= set(COMMANDS)


def test_the_bandwidth_table_is_there():
    for row in (
        "(64, 256, 56, 56) forward",
        "(8192, 1024) backward",
        "adamw, 1 x 25,000,000",
        "layer norm (16384, 768) forward",
        "group norm (8, 320, 64, 64) backward",
        "normal fill",
    ):
        assert row in README


API = {
    module: re.findall(r"`(\w+)`", names)
    for module, names in re.findall(r"^\| `(kilter(?:\.\w+)?)` \| (`\w+`[,:; ]?.*) \|$", README, re.MULTILINE)
}


@pytest.mark.parametrize("module", API)
def test_the_names_of_the_api_exist(module):
    found = importlib.import_module(module)
    assert API[module]
    assert [name for name in API[module] if not hasattr(found, name)] == []


def test_no_module_is_left_out():
    modules = {f"kilter.{name}" for name in kilter.__all__ if name not in ("KilterError", "__version__")}
    assert set(API) == {"kilter", *modules}


@pytest.mark.parametrize("module", ["kilter.init", "kilter.data", "kilter.stats"])
def test_no_function_is_left_out(module):
    returned = {"Dataset"}
    assert set(importlib.import_module(module).__all__) - returned == set(API[module])
