"""Adapter folders: both ways with Hugging Face peft, and strict about everything that does not fit."""

import copy
import dataclasses
import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minillm.peft import FullConfig, LoraConfig, PartialConfig, load_adapter, save_adapter, tune
from minillm.peft.fingerprint import fingerprint
from minillm.peft.method import Plan
from minillm.peft.record import Tuning

CONFIG = LoraConfig(
    rank=2,
    alpha=6.0,
    targets=("q_proj", "mlp.up_proj"),
    rank_pattern=(("q_proj", 3),),
    alpha_pattern=(("layers.1.self_attn.q_proj", 5.0),),
    rslora=True,
    trainable=("norm",),
)
PEFT_CONFIG = peft.LoraConfig(
    r=2,
    lora_alpha=6,
    target_modules=["q_proj", "mlp.up_proj"],
    rank_pattern={"q_proj": 3},
    alpha_pattern={"layers.1.self_attn.q_proj": 5},
    use_rslora=True,
    modules_to_save=["norm"],  # to peft the end of the text: every layer's norms as well
)


@pytest.fixture
def saved(decoder, perturb, tmp_path):
    """(a fresh base, the folder of an adapter trained on it)"""
    base = copy.deepcopy(decoder)
    tune(decoder, LoraConfig(rank=2, alpha=6.0))
    save_adapter(perturb(decoder), tmp_path / "adapter")
    return base, tmp_path / "adapter"


def refused(model, folder, *lines, **options):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        load_adapter(model, folder, **options)
    for line in lines:
        assert line in str(error.value), str(error.value)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in model.parameters()] == flags


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_peft_reads_ours(llama, tokens, perturb, tmp_path):
    fresh = copy.deepcopy(llama)
    tune(llama, CONFIG)
    save_adapter(perturb(llama), tmp_path / "adapter", base="tiny-llama")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(tokens).logits, llama(tokens).logits, rtol=1e-5, atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "tiny-llama"


def test_ours_reads_peft(llama, tokens, perturb, tmp_path):
    fresh = copy.deepcopy(llama)
    theirs = peft.get_peft_model(llama, PEFT_CONFIG).eval()
    perturb(theirs).save_pretrained(tmp_path / "adapter")
    report = load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert report.trainable == theirs.get_nb_trainable_parameters()[0]


def test_keys_are_those_that_peft_writes(llama, perturb, tmp_path):
    twin = copy.deepcopy(llama)
    norms = ("norm", "input_layernorm", "post_attention_layernorm")
    tune(llama, dataclasses.replace(CONFIG, trainable=norms))
    save_adapter(llama, tmp_path / "ours")
    peft.get_peft_model(twin, PEFT_CONFIG).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}


def test_regular_expression_and_all_linear_targets(llama, tokens, perturb, tmp_path):
    """peft reads a text as a regular expression; "all-linear" is written out, as full paths."""
    fresh, third = copy.deepcopy(llama), copy.deepcopy(llama)
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(r=2, target_modules=r".*\.1\..*(q|k)_proj"))
    perturb(theirs).eval().save_pretrained(tmp_path / "regex")
    assert load_adapter(fresh, tmp_path / "regex").modules == tuple(
        f"model.layers.1.self_attn.{x}_proj" for x in ("q", "k")
    )
    torch.testing.assert_close(fresh(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    report = tune(llama, LoraConfig(rank=2, targets=("all-linear",)))
    save_adapter(perturb(llama), tmp_path / "all")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(third), tmp_path / "all").eval()
    assert load_adapter(third, tmp_path / "all") == report
    torch.testing.assert_close(third(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_what_peft_can_and_we_cannot_is_refused(saved, change):
    base, folder = saved
    edit(folder / "adapter_config.json", **change)
    (folder / "minillm.json").unlink()
    ((name, value),) = change.items()
    refused(base, folder, "needs what this LoRA cannot do", f"{name} = {value!r}")


@pytest.mark.parametrize("config", [FullConfig(), PartialConfig(("lm_head",), untie=True)])
def test_tied_models(tied_decoder, tokens, perturb, tmp_path, config):
    fresh = copy.deepcopy(tied_decoder)
    tune(tied_decoder, config)
    save_adapter(perturb(tied_decoder), tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(tokens), tied_decoder(tokens))


def test_peft_fails_loudly_on_what_it_does_not_know(decoder, tmp_path):
    tune(decoder, PartialConfig())
    save_adapter(decoder, tmp_path / "adapter")
    with pytest.raises(Exception, match="MINILLM_PARTIAL"):
        peft.PeftModel.from_pretrained(decoder, tmp_path / "adapter")


def test_another_base(saved):
    base, folder = saved
    with torch.no_grad():
        base.layers[0].self_attn.k_proj.weight[0, 0] += 1e-6
    refused(base, folder, "trained on a base with other weights: give that one (in Python, check_base=False uses this)")
    load_adapter(base, folder, check_base=False)


def test_everything_that_does_not_fit_in_one_error(saved):
    base, folder = saved
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.layers.0.self_attn."
    del tensors[prefix + "q_proj.lora_A.weight"]
    tensors[prefix + "q_proj.lora_B.weight"] = torch.zeros(16, 5)
    tensors[prefix + "v_proj.lora_A.weight"] = tensors[prefix + "v_proj.lora_A.weight"].double()
    tensors[prefix + "k_proj.lora_A.weight"] = torch.zeros(2, 16)
    save_file(tensors, path)
    (folder / "minillm.json").unlink()  # as if by peft, so that no checksum speaks first
    refused(
        base,
        folder,
        "does not fit this Decoder, which is unchanged:",
        "missing:    layers.0.self_attn.q_proj.lora_A (2, 16)",
        "unexpected: layers.0.self_attn.k_proj.lora_A (2, 16)",
        "mis-shaped: layers.0.self_attn.q_proj.lora_B: the file has (16, 5), the model (16, 2)",
        "mis-typed:  layers.0.self_attn.v_proj.lora_A: torch.float64 in the file would be rounded to torch.float32",
    )


def test_targets_that_the_model_has_not(saved):
    _, folder = saved
    refused(nn.Sequential(nn.Linear(4, 4)), folder, "'q_proj' matches no module", "its linear or embedding layers are:")


def test_damaged_files(saved):
    base, folder = saved
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    said = "adapter_model.safetensors is damaged: its checksum is not the one in minillm.json"
    refused(base, folder, f"the adapter in {folder} is damaged, so nothing was loaded:\n  {said}")
    path.write_bytes(data[:-100])
    refused(base, folder, "adapter_model.safetensors is damaged:")
    path.unlink()
    refused(base, folder, "adapter_model.safetensors is missing")
    (folder / "minillm.json").write_text("{")
    refused(base, folder, "minillm.json is not JSON")
    (folder / "minillm.json").unlink()
    (folder / "adapter_config.json").unlink()
    refused(base, folder, "adapter_config.json does not exist")


def test_other_formats(saved):
    base, folder = saved
    edit(folder / "minillm.json", format=99)
    refused(base, folder, "minillm.json has format 99; this minillm reads 1")
    edit(folder / "minillm.json", format=1, method="lore")
    refused(base, folder, "minillm.json has method 'lore'; this minillm reads lora, ")
    edit(folder / "minillm.json", method="lora", config={"rank": 0, "rnk": 1})
    refused(base, folder, "minillm.json: config.rnk: LoraConfig has no 'rnk'; did you mean rank?")
    edit(folder / "minillm.json", config={"rank": 0})
    refused(base, folder, "rank: a rank is a whole number, at least 1, not 0")
    (folder / "minillm.json").unlink()
    edit(folder / "adapter_config.json", peft_type="LOHA")
    refused(base, folder, "has peft_type 'LOHA'; this minillm reads")
    edit(folder / "adapter_config.json", peft_type="MINILLM_FULL")
    refused(base, folder, "adapter_config.json: MINILLM_FULL is no method of peft's")


def test_another_tokenizer(decoder, tmp_path):
    base = copy.deepcopy(decoder)
    decoder.tokenizer_fingerprint = "a" * 64
    tune(decoder, LoraConfig(rank=2))
    save_adapter(decoder, tmp_path / "adapter")
    base.tokenizer_fingerprint = "b" * 64
    refused(base, tmp_path / "adapter", "trained with another tokenizer than this model's")


def test_a_tuned_model_takes_no_second_adapter(saved):
    base, folder = saved
    tune(base, LoraConfig(rank=2, alpha=6.0))
    refused(base, folder, "it has an adapter 'default': LoraConfig")


def test_saving_what_was_not_planned(decoder, tmp_path):
    with pytest.raises(ValueError, match="nothing to save: this Decoder is not tuned"):
        save_adapter(decoder, tmp_path / "adapter")
    tune(decoder, LoraConfig(rank=2))
    decoder.norm.weight.requires_grad_(True)
    decoder.layers[0].self_attn.q_proj.lora_A.requires_grad_(False)
    with pytest.raises(ValueError) as error:
        save_adapter(decoder, tmp_path / "adapter")
    assert "norm.weight trains, but not by the config" in str(error.value)
    assert "layers.0.self_attn.q_proj.lora_A should train, but is frozen" in str(error.value)
    assert not os.path.exists(tmp_path / "adapter")


def test_fingerprint_sees_names_shapes_dtypes_bytes_and_saved_buffers():
    def model(name="a", shape=(2, 3), dtype=torch.float32, value=0.0, buffer=0.0, unsaved=0.0):
        module = nn.Module()
        module.register_parameter(name, nn.Parameter(torch.full(shape, value, dtype=dtype)))
        module.register_buffer("mean", torch.tensor(buffer))
        module.register_buffer("scratch", torch.tensor(unsaved), persistent=False)
        return fingerprint(module, Tuning("", FullConfig(), Plan((), (), {}), ()))

    changed = [dict(name="b"), dict(shape=(3, 2)), dict(dtype=torch.bfloat16), dict(value=1.0), dict(buffer=1.0)]
    assert len({model(), *(model(**change) for change in changed)}) == 6
    assert model(unsaved=1.0) == model()
