"""What does not fit is refused in one error, in both directions, and the model stays as it was."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minillm.finetune.hub_adapters import load_hf_adapter, save_hf_adapter
from minillm.models import RecurrentConfig, RecurrentLM, build
from minillm.models.families.load import load_hf
from minillm.peft import METHODS, LoraConfig, save_adapter, tune

LORA = LoraConfig(rank=2, alpha=6.0, targets=("q_proj", "v_proj"))
LAYER = "base_model.model.transformer.h.0.attn.c_attn."


@pytest.fixture
def saved(theirs, tmp_path):
    """`saved(name, config)` -> (a fresh base of ours, the folder of an adapter for it)"""

    def make(name="gpt2", config=LORA):
        ours = load_hf(theirs(name)[1])
        tune(ours, config)
        save_hf_adapter(ours, tmp_path / "adapter")
        return load_hf(theirs(name)[1]), tmp_path / "adapter"

    return make


def refused(model, folder, *lines):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_hf_adapter(model, folder)
    for line in lines:
        assert line in str(error.value), str(error.value)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def edit(folder, **changes):
    """Change fields of adapter_config.json, as if peft had written the folder."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "minillm.json").unlink(missing_ok=True)


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "minillm.json").unlink(missing_ok=True)


def test_models_of_no_family(saved, theirs):
    _, folder = saved()
    for model in (RecurrentLM(RecurrentConfig(vocab_size=61, hidden_size=8)), nn.Linear(3, 3), theirs("gpt2")[0]):
        with pytest.raises(ValueError, match=f"a {type(model).__name__} is no model of ours that transformers has too"):
            load_hf_adapter(model, folder)


def test_a_model_that_the_family_cannot_hold(theirs, tmp_path):
    config = dataclasses.replace(load_hf(theirs("llama")[1]).config, norm_first=False)
    model = build(config)
    tune(model, LORA)
    with pytest.raises(ValueError, match=r"no model family of the Hub computes.*\n.*Llama: norm_first=False"):
        save_hf_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("method", ["bottleneck", "partial", "ptuning"])
def test_methods_that_peft_has_not(theirs, tmp_path, method):
    ours = load_hf(theirs("llama")[1])
    tune(ours, METHODS[method]())
    with pytest.raises(ValueError, match=r"peft cannot read .*MINILLM_.*save_adapter"):
        save_hf_adapter(ours, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_on_top_of_another(theirs, tmp_path):
    ours = load_hf(theirs("gpt2")[1])
    tune(ours, LORA, "a")
    tune(ours, LORA, "b")
    with pytest.raises(ValueError, match="it stands on the adapter 'a': merge that into the base first"):
        save_hf_adapter(ours, tmp_path / "adapter", "b")


def test_biases_that_their_model_has_not(theirs, tmp_path):
    ours = load_hf(theirs("llama")[1])
    tune(ours, METHODS["bitfit"](create_missing=True))
    with pytest.raises(ValueError, match="peft cannot read Biases"):
        save_hf_adapter(ours, tmp_path / "adapter")


def test_factors_on_the_input_of_a_part(theirs, tmp_path):
    """Phi-3 has one matrix for gate_proj and up_proj, and so one input."""
    ours = load_hf(theirs("phi3")[1])
    tune(ours, METHODS["ia3"](targets=("up_proj",), feedforward=("up_proj",)))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: transformers has one layer for .*gate_proj"):
        save_hf_adapter(ours, tmp_path / "adapter")


@pytest.mark.parametrize("name, reason", [("qwen2-sliding", "slides out of the window"), ("distilbert", "no cache")])
def test_prefixes_that_they_read_otherwise(theirs, tmp_path, name, reason):
    ours = load_hf(theirs(name)[1])
    tune(ours, METHODS["prefix"](length=2))
    with pytest.raises(ValueError, match=reason):
        save_hf_adapter(ours, tmp_path / "adapter")


def test_everything_that_does_not_fit_in_one_error(saved):
    """A silent no-op, or a random adapter, is what peft would load: it only warns."""
    base, folder = saved()

    def change(tensors):
        del tensors[LAYER + "lora_A.weight"], tensors[LAYER + "lora_B.weight"]
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 24)
        tensors[LAYER.replace(".0.", ".1.") + "lora_B.weight"] = torch.zeros(24, 4)
        tensors["base_model.model.score.weight"] = torch.zeros(3, 24)
        tensors["base_model.model.transformer.ln_f.weight"] = torch.zeros(5)

    edit_tensors(folder, change)
    edit(folder)
    refused(
        base,
        folder,
        "does not fit this Decoder, which is unchanged:",
        "missing:    layers.0.self_attn.q_proj.lora_A (4, 24)",
        "unexpected: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (4, 24)",
        "unexpected: score.weight (3, 24)",
        "mis-shaped: transformer.h.1.attn.c_attn: lora_A (4, 24), lora_B (24, 4)",
        "mis-shaped: transformer.ln_f.weight: the file has (5,), the model (24,)",
    )


def test_half_an_adapter(saved):
    base, folder = saved()
    edit_tensors(folder, lambda tensors: tensors.pop(LAYER + "lora_B.weight"))
    refused(base, folder, "missing:    layers.0.self_attn.k_proj.lora_B (24, 4)")
    edit_tensors(
        folder, lambda tensors: tensors.update({LAYER + "ia3_l": torch.ones(3), LAYER + "lora_E": torch.ones(2)})
    )
    refused(base, folder, "unexpected: layers.0.self_attn.q_proj.ia3_l (3,)", "c_attn.lora_E (2,)")


def test_an_adapter_of_another_family(saved, theirs):
    _, folder = saved("bert-classifier")
    edit(folder)
    refused(
        load_hf(theirs("gpt2")[1]),
        folder,
        "target_modules: GPT2LMHeadModel has no module 'bert.encoder.layer.0.attention.self.query'",
        "unexpected: base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight",
    )


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"target_modules": ["c_attn", "q_proj"]}, "target_modules: GPT2LMHeadModel has no module 'q_proj'"),
        ({"target_modules": ["c_attn", "c.attn"]}, "target_modules: GPT2LMHeadModel has no module 'c.attn'"),
        ({"target_modules": ".*x_attn"}, "target_modules: GPT2LMHeadModel has no module '.*x_attn'"),
        ({"target_modules": "(c_attn"}, "target_modules='(c_attn': expected names, or a regular expression"),
        ({"use_dora": True}, "use_dora = True"),
        ({"r": 5}, "mis-shaped: layers.0.self_attn.q_proj.lora_A: the file has (4, 24)"),
        ({"peft_type": "VERA"}, "has peft_type 'VERA'; this minillm reads LORA, IA3, PROMPT_TUNING"),
        ({"r": "4"}, "r='4': expected a whole number, at least 1"),
        ({"target_modules": [3], "modules_to_save": "lm_head"}, "modules_to_save='lm_head': expected a list of names"),
        ({"rank_pattern": {"c_attn": 0}}, "rank_pattern={'c_attn': 0}: expected an object of ranks"),
        ({"layers_to_transform": "1"}, "layers_to_transform='1': expected numbers of layers"),
        ({"modules_to_save": ["lm_head"]}, None),  # of which the file holds nothing: no harm
    ],
)
def test_words_that_do_not_fit(saved, changes, line):
    base, folder = saved()
    edit(folder, **changes)
    if line is None:
        load_hf_adapter(base, folder)
    else:
        refused(base, folder, line)


def test_copies_of_an_embedding_that_differ(saved):
    """T5's two stacks share one matrix here, so they share its adapter."""
    base, folder = saved("t5-body", LoraConfig(rank=2, targets=("embed_tokens",)))
    key = "base_model.model.decoder.embed_tokens.lora_embedding_"
    edit_tensors(folder, lambda tensors: tensors[key + "B"].add_(1.0))
    refused(base, folder, "different:  encoder.embed_tokens and decoder.embed_tokens: one module here")
    edit_tensors(folder, lambda tensors: [tensors.pop(key + leaf) for leaf in "AB"])
    refused(base, folder, "missing:    decoder.embed_tokens: it repeats encoder.embed_tokens")


def test_copies_of_a_trained_embedding_that_differ(saved):
    base, folder = saved("t5-body", LoraConfig(rank=2, targets=("q_proj",), trainable=("embed_tokens",)))
    edit(folder)
    edit_tensors(folder, lambda tensors: tensors["base_model.model.decoder.embed_tokens.weight"].add_(1.0))
    refused(base, folder, "embed_tokens.weight: one parameter here, and the file has two values for it")


def test_an_embedding_that_was_resized(theirs, tmp_path):
    base, base_folder = theirs("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.base_layer.weight[0].add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    refused(
        load_hf(base_folder),
        tmp_path / "adapter",
        "embed_tokens.base_layer.weight: it was trained on a base with other",
    )


def test_another_base(saved):
    base, folder = saved()
    with torch.no_grad():
        base.norm.weight[0] += 1.0
    refused(base, folder, f"the adapter in {folder} does not fit", "trained on a base with other weights")
    load_hf_adapter(base, folder, check_base=False)


def test_damaged_and_foreign_folders(saved, tmp_path):
    base, folder = saved()
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    refused(base, folder, "its checksum is not the one in minillm.json")
    own = (folder / "minillm.json").read_text()
    (folder / "minillm.json").write_text(own.replace('"format": 1', '"format": 99'))
    refused(base, folder, "minillm.json is of another minillm: this one reads format 1")
    (folder / "minillm.json").unlink()
    path.write_bytes(whole[:-100])
    refused(base, folder, "adapter_model.safetensors is damaged")
    path.unlink()
    refused(base, folder, "adapter_model.safetensors is missing")
    (folder / "adapter_config.json").write_text("[]")
    refused(base, folder, "expected an object with a peft_type")
    tuned = copy.deepcopy(base)
    tune(tuned, LORA)
    save_adapter(tuned, tmp_path / "ours")
    refused(base, tmp_path / "ours", "has our names: load it with minillm.peft.load_adapter")


def test_an_older_adapter_is_replaced_and_a_foreign_file_is_not_lost(saved):
    base, folder = saved()
    tune(base, LORA)
    save_hf_adapter(base, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"files that would be lost: notes\.txt"):
        save_hf_adapter(base, folder)
    assert (folder / "notes.txt").exists()
