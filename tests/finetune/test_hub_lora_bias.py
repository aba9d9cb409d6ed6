"""Biases that train beside a LoRA, in transformers' names: both ways with Hugging Face peft, in float64."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.finetune.hub_adapters import load_hf_adapter, save_hf_adapter
from minillm.models.families.load import load_hf
from minillm.peft import LoraConfig, tune, tunings_of
from minillm.peft.bitfit import BitFitConfig, deltas

TARGETS = {"c_attn", "q_proj", "v_proj", "query", "value", "q_lin", "v_lin"}
TASKS = {"bert-classifier": "SEQ_CLS", "camembert-tagger": "TOKEN_CLS"}
FAMILIES = (
    *("gpt2", "qwen2", "bert-masked-lm", "bert-classifier", "bert-span", "roberta-classifier", "camembert-tagger"),
    *("distilbert-classifier", "bart"),
)
TOLERANCE = {"qwen2": 1e-6, "llama": 1e-6}  # transformers' RMSNorm rounds to float32 whatever the dtype
EVERY = pytest.mark.parametrize("name", FAMILIES)
BOTH = pytest.mark.parametrize("bias", ["all", "lora_only"])


def written(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def peft_s(name, base, bias):
    targets = {path.rpartition(".")[2] for path, _ in base.named_modules()} & TARGETS
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=targets, bias=bias, task_type=TASKS.get(name))
    return peft.get_peft_model(base.double(), config).eval()


def double(folder):
    return load_hf(folder, dtype=torch.float64)


@EVERY
@BOTH
def test_we_read_and_write_again_what_peft_trained(name, bias, theirs, both_answer, perturb, close, tmp_path):
    base, base_folder = theirs(name)
    model = perturb(peft_s(name, base, bias))
    model.save_pretrained(tmp_path / "theirs")
    ours = double(base_folder)
    before, _ = both_answer(name, ours, model)
    report = load_hf_adapter(ours, tmp_path / "theirs", "new")
    mine, answer = both_answer(name, ours, model)
    close(mine, answer, TOLERANCE.get(name, 1e-12))
    assert (mine - before).abs().max() > 0.01 * before.abs().max()
    assert tunings_of(ours)["new"].config.bias == bias
    assert report.trainable == _values(model)
    save_hf_adapter(ours, tmp_path / "ours")
    (_, others), (fields, tensors) = written(tmp_path / "theirs"), written(tmp_path / "ours")
    repeats = {key for key in others if ".original_module." in key or ".modules_to_save." in key}
    fresh, _ = theirs(name)
    assert tensors.keys() - others.keys() <= {f"base_model.model.{key}" for key in fresh.state_dict()}  # heads
    assert others.keys() - repeats <= tensors.keys() | _second_names(tensors, fresh)
    assert fields["bias"] == bias and all(torch.equal(tensors[k], others[k]) for k in tensors.keys() & others.keys())
    again = peft.PeftModel.from_pretrained(fresh.double(), tmp_path / "ours").eval()
    close(both_answer(name, ours, again)[1], answer, 1e-12)


def _values(model):
    """How many values peft trains, when it trains each part's own A of a fused matrix as ours do."""
    count = model.get_nb_trainable_parameters()[0]
    return count + sum(2 * p.numel() for n, p in model.named_parameters() if "c_attn.lora_A" in n)


def _second_names(tensors, base):
    """Keys of parameters in the file under another key, such as the bias of a decoder and its model's."""
    parameters = dict(base.named_parameters(remove_duplicate=False))
    parameters = {f"base_model.model.{name}": p for name, p in parameters.items()}
    there = {id(parameters[key.replace(".base_layer", "")]) for key in tensors if "lora_" not in key}
    return {key for key, p in parameters.items() if id(p) in there}


@EVERY
@BOTH
def test_peft_reads_ours(name, bias, theirs, both_answer, perturb, close, tmp_path):
    base, base_folder = theirs(name)
    ours = double(base_folder)
    targets = ("q_proj", "v_proj")
    tune(ours, LoraConfig(rank=2, alpha=6.0, targets=targets, bias=bias), "new")
    save_hf_adapter(perturb(ours), tmp_path / "adapter")
    assert all(delta.abs().max() > 0.01 for delta in deltas(ours, "new").values())
    model = peft.PeftModel.from_pretrained(base.double(), tmp_path / "adapter").eval()
    mine, answer = both_answer(name, ours, model)
    close(mine, answer, TOLERANCE.get(name, 1e-12))
    again = double(base_folder)
    load_hf_adapter(again, tmp_path / "adapter", "new")
    assert torch.equal(both_answer(name, again, model)[0], mine)
    assert tunings_of(again)["new"].config == tunings_of(ours)["new"].config


def test_some_biases_of_a_fused_matrix(theirs, perturb, tmp_path):
    """The keys have no adapter, so theirs stays the base's within c_attn's one bias."""
    base, base_folder = theirs("gpt2")
    ours = double(base_folder)
    tune(ours, LoraConfig(rank=2, targets=("q_proj", "v_proj"), bias="lora_only"))
    save_hf_adapter(perturb(ours), tmp_path / "adapter")
    fused = written(tmp_path / "adapter")[1]["base_model.model.transformer.h.0.attn.c_attn.base_layer.bias"]
    moved = fused != base.transformer.h[0].attn.c_attn.bias.double()
    assert moved[:24].all() and not moved[24:48].any() and moved[48:].all()


def test_bitfit_s_folder_without_our_record_is_a_lora(theirs, both_answer, perturb, tmp_path):
    base, base_folder = theirs("gpt2")
    ours = double(base_folder)
    tune(ours, BitFitConfig())
    save_hf_adapter(perturb(ours), tmp_path / "adapter")
    (tmp_path / "adapter" / "minillm.json").unlink()
    again = double(base_folder)
    load_hf_adapter(again, tmp_path / "adapter", "new")
    assert tunings_of(again)["new"].config.bias == "all"
    assert torch.equal(both_answer("gpt2", again, base)[0], both_answer("gpt2", ours, base)[0])


@BOTH
def test_where_the_base_has_no_biases(bias, theirs, both_answer, perturb, close, tmp_path):
    base, base_folder = theirs("llama")
    model = perturb(peft_s("llama", base, bias))
    model.save_pretrained(tmp_path / "theirs")
    ours = double(base_folder)
    load_hf_adapter(ours, tmp_path / "theirs", "new")
    assert tunings_of(ours)["new"].config.bias == "none"
    close(*both_answer("llama", ours, model), TOLERANCE["llama"])


def test_what_the_words_do_not_let_train(theirs, perturb, tmp_path):
    base, base_folder = theirs("bert-masked-lm")
    perturb(peft_s("bert-masked-lm", base, "all")).save_pretrained(tmp_path)
    path, key = tmp_path / "adapter_config.json", "base_model.model.bert.encoder.layer.0.output.LayerNorm.bias"
    fields, tensors = written(tmp_path)
    for bias, name in (("lora_only", "layers.{0..1}.mlp_norm.bias"), ("none", "layers.{0..1}.self_attn.q_proj.bias")):
        path.write_text(json.dumps(fields | {"bias": bias}))
        with pytest.raises(ValueError) as error:
            load_hf_adapter(double(base_folder), tmp_path)
        assert "yet neither `bias` nor `modules_to_save` lets it train" in str(error.value)
        assert name in str(error.value), str(error.value)
    path.write_text(json.dumps(fields))
    save_file({k: tensor for k, tensor in tensors.items() if k != key}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"missing: +\S*layers\.0\.mlp_norm\.bias"):
        load_hf_adapter(double(base_folder), tmp_path)


def test_where_only_the_trained_head_has_biases(theirs, perturb, close, tmp_path):
    base, base_folder = theirs("t5-classifier")
    config = peft.LoraConfig(r=2, target_modules=["q"], bias="all", modules_to_save=["classification_head"])
    model = perturb(peft.get_peft_model(base, config)).eval()
    model.save_pretrained(tmp_path)
    ours = load_hf(base_folder)
    load_hf_adapter(ours, tmp_path, "new")
    assert tunings_of(ours)["new"].config.bias == "none"
    tokens = torch.randint(5, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 1  # the head reads the state at the end token
    with torch.no_grad():
        close(ours(tokens), model(input_ids=tokens).logits)
