"""Models that come with minillm: found by name in whatever way, and as good as their cards say."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import minillm
import minillm.shipped
from minillm.cli import main
from minillm.files import read_json
from minillm.models import Decoder, EncoderDecoder, MaskedLM, ModelConfig, build, save_model
from minillm.shipped import find_shipped, models_folder, shipped_models, shipped_name
from minillm.tokenizers import ByteTokenizer, load_tokenizer

TEXT = 'It was a dark night.\n\tNaïve  "quotes" – čšž ☃ <mask> </s>\r\n'


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A shipped model called toy-decoder, as the package would hold it, and an empty working folder."""
    monkeypatch.setattr(minillm.shipped, "_HERE", (tmp_path / "package").resolve())
    torch.manual_seed(0)
    model, tokenizer = build(ModelConfig(vocab_size=259, hidden_size=16, num_layers=2, num_heads=2)), ByteTokenizer()
    model.tokenizer_fingerprint = tokenizer.fingerprint
    folder = tmp_path / "package" / "models" / "toy-decoder"
    save_model(model.to(torch.bfloat16), folder)
    tokenizer.save(folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder.resolve()


def test_a_shipped_model_is_loaded_by_its_name(toy):
    assert shipped_models() == ["toy-decoder"] and shipped_name(toy) == "toy-decoder"
    model, there = minillm.load("toy-decoder"), minillm.load(str(toy))
    halves = minillm.load("toy-decoder", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32  # it is kept in bfloat16 and computes in float32
        assert torch.equal(parameter, halves.get_parameter(name).float())
        assert torch.equal(parameter, there.get_parameter(name))
    assert load_tokenizer("toy-decoder").fingerprint == model.tokenizer_fingerprint


def test_another_folder_keeps_its_own_dtype(toy):
    shutil.copytree(toy, "copy")
    assert {p.dtype for p in minillm.load("copy").parameters()} == {torch.bfloat16}


def test_every_command_takes_the_name(toy, tmp_path, capsys):
    (tmp_path / "notes.jsonl").write_text("\n".join(
        json.dumps({"prompt": f"{i} plus one is ", "completion": f"{i + 1}."}) for i in range(30)
    ))  # fmt: skip
    sizes = ("data.length=30", "data.batch_size=4", "train.steps=2", "train.device=cpu")
    assert main(["tune", "base=toy-decoder", f"data.train={tmp_path / 'notes.jsonl'}", "run=run", *sizes]) == 0
    assert read_json("run/adapter/adapter_config.json")["base_model_name_or_path"] == "toy-decoder"
    Path("elsewhere/deep").mkdir(parents=True)
    shutil.move("run", "elsewhere/deep/run")  # a relative path would lead nowhere from here
    capsys.readouterr()
    for words in (
        ["generate", "elsewhere/deep/run", "1 plus", "max_new_tokens=2"],
        ["generate", "toy-decoder", "1 plus", "max_new_tokens=2"],
        ["info", "toy-decoder"],
        ["methods", "toy-decoder"],
        ["tokenizer", "show", "toy-decoder", "a b"],
    ):
        assert main(words) == 0, words
    assert main(["info", "elsewhere/deep/run"]) == 0
    assert "base found" not in capsys.readouterr().out.rpartition("adapter ")[2]


def test_a_folder_of_the_same_name_must_be_told_apart(toy):
    shutil.copytree(toy, "toy-decoder")
    both = re.escape(f"{toy} or {Path('toy-decoder').resolve()}")
    with pytest.raises(ValueError, match=f"toy-decoder is a model that minillm ships, and also here, .*: .*{both}"):
        minillm.load("toy-decoder")
    with pytest.raises(ValueError, match=both):
        load_tokenizer("toy-decoder")
    for path in (toy, Path("toy-decoder").resolve(), "./toy-decoder"):
        assert minillm.load(path).tokenizer_fingerprint == load_tokenizer(path).fingerprint
    assert find_shipped("./toy-decoder") == Path("toy-decoder")


@pytest.mark.parametrize("name", ["toy-decodr", "toy_decoder"])
def test_a_name_that_is_nearly_right(toy, name, capsys):
    for call in (minillm.load, load_tokenizer):
        with pytest.raises(ValueError, match=r"minillm ships models too: did you mean toy-decoder\?"):
            call(name)
    for words in (["generate", name, "a"], ["tune", f"base={name}", "data.train=x"]):
        assert main(words) == 2
        assert "minillm ships models too: did you mean toy-decoder?" in capsys.readouterr().err


def test_a_path_is_never_a_name(toy):
    with pytest.raises(ValueError, match="no folder") as error:
        minillm.load("some/where/toy-decoder")
    assert "ships" not in str(error.value)


def test_without_models_nothing_is_offered(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(minillm.shipped, "_HERE", tmp_path / "a" / "b" / "c")
    assert shipped_models() == []
    with pytest.raises(ValueError, match="toy-decoder is no folder") as error:
        minillm.load("toy-decoder")
    assert "ships" not in str(error.value)


# --- those that are there

KINDS = {"decoder": Decoder, "encoder": MaskedLM, "encdec": EncoderDecoder}
NAMES = shipped_models() or [pytest.param("", marks=pytest.mark.skip("data/models holds no model yet"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_box_is_whole(name):
    model, tokenizer = minillm.load(name), load_tokenizer(name)
    assert isinstance(model, KINDS[name.split("-")[1]])
    assert model.tokenizer_fingerprint == tokenizer.fingerprint and model.config.vocab_size == tokenizer.vocab_size
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and not set(ids) & set(tokenizer.special_ids.values())
    assert {"<pad>", "<s>", "</s>", "<mask>", "<extra_id_0>", "<extra_id_31>"} <= set(tokenizer.special_ids)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    low, high = (3e6, 6e6) if name.startswith("tiny-") else (0.4e6, 0.8e6)
    assert low <= parameters <= high


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_box_beats_its_baselines(name):
    card = read_json(models_folder() / name / "card.json")
    own, found = card["held_out_in_bfloat16"]["bits_per_byte"], card["baselines_bits_per_byte"]
    assert abs(own - card["held_out"]["bits_per_byte"]) < 0.005
    to_beat = found.values() if name.startswith("tiny-") else [found["unigram"]]
    assert own < min(to_beat), f"{own:.3f} bits per byte, {found}"


@pytest.mark.parametrize("name", NAMES)
def test_a_card_names_every_work(name):
    folder = models_folder() / name
    lines = (folder / "works.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == ["side", "title", "source", "licence", "sha256", "bytes"]
    rows = [line.split("\t") for line in lines[1:]]
    assert {row[0] for row in rows} == {"train", "held_out"} and all(all(row) and len(row) == 6 for row in rows)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f'minillm.load("{name}")' in card and "commit" in card
