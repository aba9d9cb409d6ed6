"""What the README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest

from minillm.cli import main
from minillm.config import override
from minillm.peft import tunings_of
from minillm.recipes.commands import COMMANDS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMAND_LINES = [line for line in README.splitlines() if line.startswith("minillm ")]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_its_commands_exist_with_their_keys(line):
    words = shlex.split(line, comments=True)[1:]
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
        assert {"folder", "name"} & set(command.arguments) or name.startswith("kernels ")


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
    exec(compile(PYTHON[0], "README.md", "exec"), scope := {})
    assert "values train" in capsys.readouterr().out
    assert (tmp_path / "my_adapter" / "adapter_model.safetensors").is_file()
    assert not [name for name, _ in scope["model"].named_parameters() if "lora" in name]
    exec(compile(PYTHON[1], "README.md", "exec"), scope)
    assert "'both' (concat)" in capsys.readouterr().out
    assert [name for name, tuning in tunings_of(scope["model"]).items() if tuning.active] == ["mine"]


@pytest.mark.slow
def test_its_python_loads_real_models(tmp_path, monkeypatch, capsys):
    """On tiny folders of the two kinds it names, with transformers' tokenizer and weights."""
    import transformers
    from tokenizers import Tokenizer, models

    monkeypatch.chdir(tmp_path)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "Good", "morning"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    t5 = transformers.T5Config(vocab_size=5, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(t5).save_pretrained("models/t5-small")
    wrapped.save_pretrained("models/t5-small")
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = transformers.CamembertConfig(**sizes, intermediate_size=16)
    transformers.CamembertForMaskedLM(config).save_pretrained("models/sloberta")
    wrapped.save_pretrained("models/sloberta")
    with pytest.warns(UserWarning, match="no head for task 'classification'"):
        exec(compile(PYTHON[2], "README.md", "exec"), scope := {})
    assert (
        scope["classifier"].classifier.out_features == 2
        and (tmp_path / "runs" / "classifier" / "metrics.jsonl").is_file()
    )
    back = transformers.T5ForConditionalGeneration.from_pretrained("models/mine")
    assert back.config.d_model == 16 and capsys.readouterr().out


def test_all_its_python_is_run_here():
    assert len(PYTHON) == 3
