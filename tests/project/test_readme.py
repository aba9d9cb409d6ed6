"""What the README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest

from minillm.cli import main
from minillm.config import override
from minillm.recipes.commands import COMMANDS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMAND_LINES = [line for line in README.splitlines() if line.startswith("minillm ")]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_its_commands_exist_with_their_keys(line):
    words = shlex.split(line)[1:]
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    command, rest = COMMANDS[name], words[len(name.split()) :]
    assert all(option in command.arguments for option in rest if option.startswith("--"))
    assignments = [word for word in rest if "=" in word]
    if assignments:
        module, _, config = command.config.partition(":")
        default = getattr(__import__(module, fromlist=[config]), config)()
        changed = override(default, assignments)
        assert changed != default
    else:
        assert "folder" in command.arguments


def test_there_are_commands_to_check():
    assert len(COMMAND_LINES) >= 5


@pytest.mark.slow
def test_its_python_runs(tmp_path, monkeypatch, capsys):
    """After `minillm pretrain` into runs/base, as the lines above it do; at a tiny size."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of a text to learn, {i * i}" for i in range(400)))
    tiny = "model.hidden_size=16 model.num_layers=1 model.num_heads=2 data.length=32 data.batch_size=4 train.steps=2"
    pretrain = ["pretrain", "data.train=text.txt", "run=runs/base", "tokenizer.kind=bytes", *tiny.split()]
    assert main(pretrain) == 0
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), scope := {})
    assert "values train" in capsys.readouterr().out
    assert (tmp_path / "my_adapter" / "adapter_model.safetensors").is_file()
    assert not [name for name, _ in scope["model"].named_parameters() if "lora" in name]
