"""`--help` of a command with a config is an overview; it lists a section or everything on request."""

import re

import pytest

from nextllm_jax.cli.main import doctor_command, train_command
from nextllm_jax.cli.plan import plan_command
from nextllm_jax.errors import InputError
from tests.conftest import ROOT

SECTIONS = ["model", "data", "optimizer", "training", "lora", "checkpoint", "mesh"]
TINY = ["--config", str(ROOT / "configs" / "tiny.py")]


def shown(capsys, run, *arguments):
    with pytest.raises(SystemExit) as exited:
        run(list(arguments))
    assert exited.value.code == 0
    return capsys.readouterr().out


def options(text):
    return re.findall(r"--[a-z][\w.-]+", text)


def test_the_overview_fits_on_a_screen_or_two_and_names_the_sections(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, train_command, "--help")
    assert text.count("\n") < 60
    assert {"--config", "--allow-change", "--workdir", "--init-from"} <= set(options(text))
    assert not any("." in option for option in options(text))
    for section in SECTIONS:
        assert re.search(rf"^  {section} +\w", text, flags=re.MULTILINE)
    assert "May be repeated. The new value" in text, "a line break of the source is no line break of the help"


@pytest.mark.parametrize("run", [train_command, plan_command, doctor_command])
def test_a_section_has_its_options_with_the_values_of_the_config(capsys, run):
    text = shown(capsys, run, *TINY, "--help", "model")
    assert "Query heads" in text
    assert "(default: 128)" in text  # of configs/tiny.py
    listed = [option for option in options(text) if option != "--help"]
    assert all(option.startswith("--model.") for option in listed)
    assert listed.index("--model.remat") < listed.index("--model.rope-long-factors"), "rare settings come last"


def test_everything_and_an_unknown_section(capsys):
    listed = options(shown(capsys, train_command, "--help", "all"))
    assert set(SECTIONS) <= {option.removeprefix("--").partition(".")[0] for option in listed}
    with pytest.raises(InputError, match="--help optimiser: no such section; the sections are model, data, optimizer"):
        train_command(["--help", "optimiser"])
