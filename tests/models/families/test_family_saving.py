"""What we save loads in transformers with no key missing or left over, and computes the same; shards load both ways."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from minillm.models import ModelConfig, RecurrentConfig, RecurrentLM, build, build_with_head
from minillm.models.build import build_body
from minillm.models.families.load import load_hf
from minillm.models.families.save import save_hf
from minillm.peft import LoraConfig, merge, tune


def read_back(folder, class_name=None) -> nn.Module:
    """transformers' model of a folder, of the class that config.json names; every key must be accounted for."""
    import transformers

    described = json.loads((folder / "config.json").read_text())
    (named,) = described["architectures"]
    assert class_name is None or named == class_name
    model, report = getattr(transformers, named).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def test_saved_as_it_was_loaded(member, checkpoint, twins, tmp_path, batch_of, ask_theirs, error_of):
    (_, folder), (ours, theirs) = checkpoint(member), twins(member)
    save_hf(ours, tmp_path / "ours")
    again = read_back(tmp_path / "ours", member.class_name)
    kept, found = used_values(theirs), used_values(again)
    assert found.keys() == kept.keys()
    assert [key for key in kept if not torch.equal(found[key], kept[key])] == []
    batch = batch_of(ours, member.task)
    with torch.no_grad():
        expected, _ = ask_theirs(theirs, member, batch)
        assert error_of(ask_theirs(again, member, batch)[0], expected) < 1e-6
    before, after = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "ours"))
    assert {name: after.get(name) for name in before if after.get(name) != before[name]} == {}


def used_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors without those it never reads.

    These are the first rows of RoBERTa's and BART's position tables and, beside an LM head that is not tied, the bias
    that a tied one would have.
    """
    values = model.state_dict()
    rows = 2 if model.config.model_type in ("roberta", "camembert", "xlm-roberta", "bart", "mbart") else 0
    tables = [key for key in values if re.search("embed_positions|position_embeddings", key)]
    values |= {key: values[key][rows:] for key in tables}
    if not model.config.tie_word_embeddings:
        values.pop("cls.predictions.bias", None)
    return values


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(parameter.dim() == 1)
    return model.eval()


def test_built_here(member, twins, tmp_path, batch_of, ask_theirs, error_of):
    """A model that never was a checkpoint, of the same config: saved under its family it is theirs."""
    loaded, _ = twins(member)
    head = getattr(loaded, "head_config", None)
    make = build_body if member.task == "body" else build
    ours = randomised(make(loaded.config) if head is None else build_with_head(loaded.config, head))
    save_hf(ours, tmp_path / "ours", family=member.case.family)
    theirs = read_back(tmp_path / "ours")
    if head is not None and head.task in ("multi_label", "regression"):
        assert theirs.config.problem_type.startswith(head.task)
    theirs.config.pad_token_id = 0  # no tokenizer told us one, and theirs classifies no batch without
    batch = batch_of(ours, member.task)
    with torch.no_grad():
        expected, _ = ask_theirs(theirs, member, batch)
        assert error_of(ours(**batch), expected) < 1e-5


def test_shards_in_both_directions(language_model, checkpoint, twins, tmp_path):
    """The same tensors, however many files they are in."""
    ours, theirs = twins(language_model)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    save_hf(ours, tmp_path / "ours", max_shard_bytes=4000)
    assert min(len([*(tmp_path / name).glob("*.safetensors")]) for name in ("theirs", "ours")) > 3
    read, again = load_hf(tmp_path / "theirs").state_dict(), read_back(tmp_path / "ours")
    assert read.keys() == ours.state_dict().keys()
    assert all(torch.equal(read[key], value) for key, value in ours.state_dict().items())
    kept, found = used_values(theirs), used_values(again)
    assert found.keys() == kept.keys() and all(torch.equal(found[key], kept[key]) for key in kept)


def test_bfloat16_files(language_model, twins, tmp_path, batch_of):
    """Read in the file's type or another, and saved in it again; the config says which."""
    _, theirs = twins(language_model)
    theirs = copy.deepcopy(theirs).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    wide = load_hf(tmp_path / "theirs", dtype=torch.float32)
    assert all(torch.equal(p.bfloat16(), q) for p, q in zip(wide.parameters(), ours.parameters(), strict=True))
    save_hf(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    again = read_back(tmp_path / "ours")
    kept, found = used_values(theirs), used_values(again)
    assert all(found[key].dtype == torch.bfloat16 and torch.equal(found[key], kept[key]) for key in kept)


def test_a_tied_head_of_its_own(seq2seq_model, twins, tmp_path, batch_of, ask_theirs, error_of):
    """T5 v1.1 has a head in its file, different from the embedding, whatever its config says about tying."""
    import safetensors.torch as st

    _, theirs = twins(seq2seq_model)
    theirs.save_pretrained(tmp_path)
    tensors = st.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(61, 24) * 0.2
    st.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_hf(tmp_path)
    assert torch.equal(ours.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(ours.embed_tokens.weight, theirs.get_input_embeddings().weight)
    theirs = copy.deepcopy(theirs)
    theirs.lm_head.weight = nn.Parameter(tensors["lm_head.weight"])
    batch = batch_of(ours, "lm")
    with torch.no_grad():
        expected, _ = ask_theirs(theirs, seq2seq_model, batch)
        assert error_of(ours(**batch), expected) < 1e-5
        save_hf(ours, tmp_path / "ours")
        assert error_of(ask_theirs(read_back(tmp_path / "ours"), seq2seq_model, batch)[0], expected) < 1e-6


def test_a_family_is_found(language_model, twins, tmp_path, batch_of, ask_theirs, error_of):
    """Without being told one: whichever it is, it computes what the model does."""
    loaded, _ = twins(language_model)
    ours = randomised(build(loaded.config))
    save_hf(ours, tmp_path / "ours")
    batch = batch_of(ours, "lm")
    with torch.no_grad():
        expected, _ = ask_theirs(read_back(tmp_path / "ours"), language_model, batch)
        assert error_of(ours(**batch), expected) < 1e-5


def test_a_model_that_no_family_computes(tmp_path):
    model = build(ModelConfig(vocab_size=61, hidden_size=24, num_layers=1, num_heads=4, positions="sinusoidal"))
    with pytest.raises(ValueError, match=r"no model family.*\n.*Llama: positions='sinusoidal', not 'rope'"):
        save_hf(model, tmp_path / "ours")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="family 'Gemma' is not one of Llama, GPT-2"):
        save_hf(model, tmp_path / "ours", family="Gemma")


def test_a_recurrent_model(tmp_path):
    with pytest.raises(ValueError, match=r"no family for a RecurrentLM: keep it with minillm\.models\.save_model"):
        save_hf(RecurrentLM(RecurrentConfig(vocab_size=61, hidden_size=8)), tmp_path / "ours")


def test_a_model_with_an_adapter_in_it(tmp_path):
    model = build(ModelConfig(vocab_size=61, hidden_size=24, num_layers=1, num_heads=4))
    tune(model, LoraConfig(rank=2, targets=("q_proj",)))
    with pytest.raises(ValueError, match=r"no place for 1 .*self_attn\.q_proj\.base\.weight.*minillm\.peft\.merge"):
        save_hf(model, tmp_path / "ours")
    assert not [*tmp_path.iterdir()]
    save_hf(merge(model) or model, tmp_path / "ours")


def test_t5_says_in_both_ways_whether_logits_are_scaled(tmp_path, twins, member_named):
    """transformers reads scale_decoder_outputs since version 5, and read tie_word_embeddings before."""
    for name, scaled in (("T5", True), ("T5 v1.1 and Flan", False)):
        loaded, _ = twins(member_named(f"{name}-T5ForConditionalGeneration"))
        save_hf(build(loaded.config), tmp_path / name)
        described = json.loads((tmp_path / name / "config.json").read_text())
        assert described["tie_word_embeddings"] is described["scale_decoder_outputs"] is scaled
