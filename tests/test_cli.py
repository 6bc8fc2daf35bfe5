"""The command line itself: help, usage, laziness."""

import importlib
import subprocess
import sys

import pytest

from fw_train.cli import COMMANDS, Group, main


def every_command():
    for name, entry in COMMANDS.items():
        if isinstance(entry, Group):
            yield from (([name, inner], command) for inner, command in entry.commands.items())
        else:
            yield [name], entry


@pytest.mark.parametrize(("words", "command"), every_command(), ids=lambda value: str(value)[:30])
def test_every_command_has_help_worth_reading(words, command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert importlib.import_module(command.module).__doc__.splitlines()[0] in out
    assert f"fw {' '.join(words)} " in out, "an example to copy"


@pytest.mark.parametrize("arguments", [[], ["bench"], ["bench", "everything"], ["nothing"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_help_imports_no_command():
    code = """
import sys
from fw_train.cli import main
try:
    main(["--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_overrides_may_stand_behind_options(capsys):
    assert main(["parity", "tests/fixtures/bicross.safetensors", "--tolerance", "1e-3"]) == 0
    with pytest.raises(SystemExit):
        main(["parity", "tests/fixtures/bicross.safetensors", "--tolerance", "1e-3", "model.dim=3"])
    assert "unrecognized arguments: model.dim=3" in capsys.readouterr().err


def test_an_error_of_the_input_is_one_line_that_names_the_command(capsys):
    assert main(["params", "none.yaml"]) == 1
    assert capsys.readouterr().err == "fw params: no configuration file none.yaml\n"
