"""The command line itself: help, lazy imports, names that are nearly right."""

import dataclasses
import os
import subprocess
import sys

import pytest

from minillm import __version__
from minillm.cli import main
from minillm.config import given, override
from minillm.models import ModelConfig
from minillm.recipes.commands import COMMANDS
from minillm.recipes.pretrain import PretrainConfig
from minillm.tokenizers import ByteTokenizer, CharTokenizer


def test_help_and_version_do_without_torch():
    code = """
import sys
from minillm.cli import main
assert main(["--help"]) == main(["--version"]) == main(["tokenizer", "--help"]) == 0
assert main(["tokenizer", "tran"]) == 2
print(sorted({"torch", "numpy", "sentencepiece", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"minillm {__version__}\n" in done.stdout
    for name, command in COMMANDS.items():
        assert f"minillm {name}" in done.stdout and command.summary in done.stdout


def test_python_m_minillm_is_the_command():
    done = subprocess.run([sys.executable, "-m", "minillm", "pretran"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "minillm: error: minillm has no command 'pretran'; did you mean pretrain? See minillm --help\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"minillm {name}" in out.partition("example:")[2]


def test_help_lists_every_key_with_its_default_and_comment(capsys):
    main(["pretrain", "--help"])
    lines = {line.split("=")[0].strip(): line for line in capsys.readouterr().out.splitlines() if "=" in line}
    config = PretrainConfig()
    for section in ("data", "tokenizer", "model", "train"):
        for field in dataclasses.fields(getattr(config, section)):
            assert f"{section}.{field.name}" in lines
    assert lines["train.clip"].endswith("gradients are scaled down to this norm; 0: never")
    assert lines["train.clip"].split()[0] == "train.clip=1.0"
    main(["generate", "--help"])
    assert "end before these texts: a,b or" in capsys.readouterr().out
    assert lines["model.head_dim"].split() == ["model.head_dim=none"]  # follows from the others
    assert " ".join(lines["tokenizer.kind"].split()) == "tokenizer.kind=bpe bpe | unigram | bytes | characters"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["tokenizer", "tran"], "minillm tokenizer has no 'tran'; did you mean tokenizer train"),
        (["fly"], "minillm has no command 'fly'; did you mean one of demo, tokenizer, pretrain"),
        (["demo", "stepz=3"], "DemoConfig has no 'stepz'"),
        (["pretrain", "qqqqq=3"], "PretrainConfig has no 'qqqqq'; did you mean one of run, seed, objective, "),
        (["pretrain", "qqqqq=3"], " more?\n(minillm COMMAND --help lists all keys)"),
        (["demo", "pretrain.eval_every=3"], "pretrain.eval_every has no effect: the demo measures when a training is"),
        (["demo", "seed=-1"], "seed=-1: a whole number from 0"),
        (["generate", "folder", "-x"], 'a text that begins with "-" stands after "--"'),
        (["demo", "nothing"], "nothing: expected section.key=value"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(words, match, capsys):
    assert main(words) == 2
    assert match in capsys.readouterr().err


def test_options_are_not_guessed(capsys):
    assert main(["pretrain", "--resum"]) == 2
    assert "unrecognized arguments: --resum" in capsys.readouterr().err


def test_ctrl_c_is_130_and_says_so(monkeypatch, capsys):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("minillm.recipes.info.info", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\nminillm: interrupted\n"


def test_a_reader_that_has_enough_is_no_error():
    script = f"set -o pipefail; {sys.executable} -m minillm --help | true"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # as usual: the text leaves when the command ends
    done = subprocess.run(["bash", "-c", script], env=buffered, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")  # 128 + SIGPIPE, as cat and others end


def test_what_a_config_filled_in_follows_an_override():
    """head_dim = 16 / 2 and num_kv_heads = 2 by ModelConfig's own rules; what was given stays."""
    assert override(ModelConfig(), ["hidden_size=16", "num_heads=2"]) == ModelConfig(hidden_size=16, num_heads=2)
    asked = ModelConfig(hidden_size=16, num_heads=2, head_dim=4, num_kv_heads=1)
    assert override(asked, ["num_heads=4"]) == ModelConfig(hidden_size=16, num_heads=4, head_dim=4, num_kv_heads=1)
    assert given(asked)["intermediate_size"] is None


def test_a_terminal_of_ascii_and_other_input(tmp_path):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    (tmp_path / "tokenizer").mkdir()
    ByteTokenizer().save(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "minillm", "tokenizer", "show", str(tmp_path)]
    done = subprocess.run([*command, "-"], input="é".encode(), env=ascii_only, capture_output=True)
    assert done.returncode == 0 and b"2 tokens for 1 characters, 2 bytes" in done.stdout
    done = subprocess.run([*command, "-"], input=b"ab\xff", env=ascii_only, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"minillm: error: standard input is not UTF-8 text: byte 2 is 0xFF. Convert it")
    CharTokenizer("čšž").save(tmp_path / "tokenizer")
    done = subprocess.run([*command, "čš"], env=ascii_only, capture_output=True)
    assert done.returncode == 0 and b"1   5  ?" in done.stdout and done.stdout.isascii()


def test_os_errors_are_one_line_with_the_path(monkeypatch, capsys):
    def fail(*_args):
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr("minillm.recipes.info.info", fail)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "minillm: error: /some/where: Permission denied\n"


def test_waiting_threads_soon_sleep(monkeypatch, capsys):
    """Unless the user has said otherwise; it must stand before torch is imported."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert main(["--version"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert main(["--version"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == "5"
