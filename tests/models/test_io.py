"""Model folders: whole, exact, and refused with one clear error when they are not."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import minillm
from minillm.files import sha256_file
from minillm.models import (
    HeadConfig,
    ModelConfig,
    build,
    build_with_head,
    load_model,
    save_hf,
    save_model,
    weights_fingerprint,
)
from minillm.models.build import build_body
from minillm.models.recurrent import RecurrentConfig, RecurrentLM
from minillm.models.recurrent_seq2seq import RecurrentEncoderDecoder
from minillm.ops import RopeScaling
from minillm.peft import LoraConfig, merge, tune

SMALL = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 4}


@pytest.fixture
def folder(tiny_decoder, tmp_path):
    tiny_decoder.tokenizer_fingerprint = "abc"
    save_model(tiny_decoder, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change) -> None:
    """Change the tensors and make the checksum fit again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit(folder, weights_sha256=sha256_file(folder / "model.safetensors"))


def edit(folder, **fields) -> None:
    """Change the description and make its hash fit again."""
    described = json.loads((folder / "config.json").read_text()) | fields
    del described["sha256"]
    sha256 = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(described | {"sha256": sha256}))


def test_loaded_equals_saved(folder, tiny_decoder, tokens):
    loaded = load_model(folder)
    assert torch.equal(loaded(tokens), tiny_decoder(tokens))
    assert weights_fingerprint(loaded) == weights_fingerprint(tiny_decoder)
    assert loaded.config == tiny_decoder.config and loaded.tokenizer_fingerprint == "abc" and not loaded.training
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


def test_a_tied_matrix_is_stored_once(folder, tiny_decoder):
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in tiny_decoder.parameters())


def test_untied_and_other_dtype(tmp_path, tokens):
    config = ModelConfig(vocab_size=61, hidden_size=24, num_layers=1, num_heads=4, tie_embeddings=False)
    model = build(config).to(torch.bfloat16).eval()
    save_model(model, tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m")(tokens), model(tokens))
    assert load_model(tmp_path / "m", dtype=torch.float64).lm_head.weight.dtype == torch.float64


def test_the_fingerprint_sees_every_bit(tiny_decoder):
    before = weights_fingerprint(tiny_decoder)
    with torch.no_grad():
        weight = tiny_decoder.layers[1].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert weights_fingerprint(tiny_decoder) != before


def test_misfits_are_listed_together(folder):
    def change(tensors):
        del tensors["norm.weight"]
        tensors["extra"] = torch.zeros(2)
        tensors["layers.0.self_attn.k_proj.weight"] = torch.zeros(3, 24)

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for part in (
        "3 tensors do not fit",
        "missing:    norm.weight (24,)",
        "unexpected: extra (2,)",
        "mis-shaped: layers.0.self_attn.k_proj.weight: the file has (3, 24), the model (12, 24)",
    ):
        assert part in str(error.value)


def test_a_flipped_bit_and_a_truncated_file_are_noticed(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-7] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its checksum"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(data[:-50])
    edit(folder, weights_sha256=sha256_file(folder / "model.safetensors"))
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_model(folder)


def test_other_format_unknown_field_and_missing_files(folder, tmp_path):
    edit(folder, format=7)
    with pytest.raises(ValueError, match="has format 7, this minillm reads format 1"):
        load_model(folder)
    edit(folder, format=1, model={"hiden_size": 24})
    with pytest.raises(ValueError, match="no 'hiden_size'; did you mean hidden_size"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="has format 'list'"):
        load_model(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nowhere")


def test_an_edited_description_is_noticed(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 90000.0'))
    with pytest.raises(ValueError, match=r"config.json is damaged or was edited: its content does not fit its sha256"):
        load_model(folder)


def test_missing_weights_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has a config.json but no model.safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    "config, head",
    [
        (ModelConfig(**SMALL, kind="encoder", token_types=2, positions="learned"), None),
        (ModelConfig(**SMALL, kind="encoder_decoder", positions="relative", num_decoder_layers=1), None),
        (ModelConfig(**SMALL, kind="encoder_decoder", tie_embeddings=False), HeadConfig(task="classification")),
        (ModelConfig(**SMALL, sliding_window=(3, 0), rope_scaling=RopeScaling(factor=4.0)), None),
        (ModelConfig(**SMALL, attention_bias="qkv", qk_norm=True), HeadConfig(task="tagging", num_labels=5)),
        (ModelConfig(**SMALL, kind="encoder"), HeadConfig(task="masked_lm")),
    ],
)
def test_every_kind_of_model_and_head_comes_back(config, head, tmp_path, tokens):
    model = (build(config) if head is None else build_with_head(config, head)).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    inputs = (tokens, tokens[:, :4]) if config.kind == "encoder_decoder" and head is None else (tokens,)
    assert torch.equal(loaded(*inputs), model(*inputs))
    assert type(loaded) is type(model) and loaded.config == config and getattr(loaded, "head_config", None) == head
    assert len(list(loaded.parameters())) == len(list(model.parameters())), "what was tied is tied"


def test_a_body_without_its_lm_head_comes_back_without(tmp_path, tokens):
    model = build_body(ModelConfig(**SMALL)).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.lm_head is None and torch.equal(loaded(tokens), model(tokens))


def test_recurrent_models_come_back(tmp_path, tokens):
    for i, model in enumerate(
        (
            RecurrentLM(RecurrentConfig(vocab_size=61, hidden_size=12)).eval(),
            RecurrentEncoderDecoder(RecurrentConfig(vocab_size=61, hidden_size=12, cell="rnn")).eval(),
        )
    ):
        save_model(model, tmp_path / str(i))
        loaded = load_model(tmp_path / str(i))
        inputs = (tokens, tokens[:, :4]) if i else (tokens,)
        assert torch.equal(loaded(*inputs), model(*inputs)) and loaded.config == model.config


def test_what_the_hub_said_survives_our_own_format(tmp_path, tokens):
    save_hf(build(ModelConfig(**SMALL)), tmp_path / "hub")
    described = json.loads((tmp_path / "hub" / "config.json").read_text()) | {"eos_token_id": 7, "somebody": "else's"}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(described))
    model = minillm.load(tmp_path / "hub")
    save_model(model, tmp_path / "ours")
    again = minillm.load(tmp_path / "ours")
    save_hf(again, tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["eos_token_id"] == 7 and back["somebody"] == "else's" and torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("head", [None, HeadConfig("classification", pool="last")])
def test_a_model_that_its_config_does_not_describe_is_not_saved(head, tmp_path):
    """Its folder could never be loaded; merged it is a plain model again."""
    model = build(ModelConfig(**SMALL)) if head is None else build_with_head(ModelConfig(**SMALL), head)
    tune(model, LoraConfig(rank=2, targets=("q_proj",)))
    with pytest.raises(ValueError, match=r"does not describe .*q_proj\.weight.*minillm\.peft\.merge"):
        save_model(model, tmp_path / "model")
    assert not [*tmp_path.iterdir()]
    merge(model)
    save_model(model, tmp_path / "model")
    assert weights_fingerprint(load_model(tmp_path / "model")) == weights_fingerprint(model)


def test_our_models_keep_the_head_they_have(folder):
    with pytest.raises(ValueError, match="has the head it was saved with: leave out task and num_labels"):
        minillm.load(folder, task="tagging")
