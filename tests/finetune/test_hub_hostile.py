"""An adapter_config.json with any field of any type: loaded, or refused in one ValueError, the model unchanged."""

import json

import peft
import pytest
import torch
from safetensors.torch import save_file

from minillm.finetune.hub_adapters import load_hf_adapter
from minillm.models.families.load import load_hf
from minillm.peft import load_adapter, peft_fields, tunings_of, unload

TARGETS = dict(target_modules=["k_proj", "down_proj"])
CONFIGS = {
    "LORA": peft.LoraConfig(r=2, lora_alpha=3, **TARGETS),
    "IA3": peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3),
    "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=5),
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=3),
}
VALUES = (0, -1, 3, 2.5, 10**30, float("inf"), float("nan"), True, None, "", "x", "(", "a{99999999999}")
VALUES += ([], [3], [None], ["("], [["x"]], {}, {"x": 3}, {"(": 3}, {"x": "y"}, {"x": {"y": [1]}})
READ = {name for names, _, _ in peft_fields._TYPES for name in names} | {"peft_type"}
MORE = ("modules_to_save", "layers_pattern", "layers_to_transform", "prefix_projection", "bias", "peft_type")


@pytest.mark.parametrize("load", [load_adapter, load_hf_adapter])
@pytest.mark.parametrize("peft_type", CONFIGS)
def test_every_field_of_every_type(peft_type, load, theirs, tmp_path):
    base, base_folder = theirs("llama")
    CONFIGS[peft_type].task_type = "CAUSAL_LM"
    peft.get_peft_model(base, CONFIGS[peft_type]).save_pretrained(tmp_path)
    path, ours = tmp_path / "adapter_config.json", load_hf(base_folder)
    fields, before = json.loads(path.read_text()), {name: t.clone() for name, t in ours.state_dict().items()}
    assert {"task_type", "peft_type"} < fields.keys()
    for name in dict.fromkeys((*fields, *MORE)):
        for value in VALUES if name in READ else VALUES[-1:]:
            path.write_text(json.dumps(fields | {name: value}))
            try:
                load(ours, tmp_path)
            except ValueError as error:
                assert str(error)
            if tunings_of(ours):
                unload(ours)
        after = ours.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before), name


@pytest.mark.parametrize("load", [load_adapter, load_hf_adapter])
@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("lora_alpha", [3], "a number above 0"),
        ("lora_alpha", None, "a number above 0"),
        ("lora_dropout", {}, r"a probability in \[0, 1\)"),
        ("r", "2", "a whole number, at least 1"),
        ("target_modules", 7, "names, or a regular expression"),
        ("target_modules", "(q", "names, or a regular expression"),
        ("modules_to_save", [["x"]], "a list of names"),
        ("task_type", ["CAUSAL_LM"], "a text"),
        ("use_rslora", "no", "true or false"),
        ("rank_pattern", {"q_proj": None}, "an object of ranks"),
        ("alpha_pattern", {"(": 3}, "an object of numbers"),
        ("num_layers", "2", "a whole number, at least 1"),
    ],
)
def test_the_field_is_named(field, value, expected, load, theirs, tmp_path):
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"adapter_config\.json:\n  {field}=.*: expected {expected}"):
        load(load_hf(theirs("llama")[1]), tmp_path)


@pytest.mark.parametrize("method", [[], {}, None, 3, "nothing"])
def test_a_record_of_ours_with_a_strange_method(method, theirs, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "minillm.json").write_text(json.dumps({"format": 1, "method": method}))
    for load in (load_adapter, load_hf_adapter):
        with pytest.raises(ValueError, match=r"minillm\.json (is of another minillm|has method)"):
            load(load_hf(theirs("llama")[1]), tmp_path)


def test_a_prefix_for_another_number_of_stacks(theirs, tmp_path):
    """With num_transformer_submodules=1 peft hands an encoder-decoder a cache that its cross-attention fills, too."""
    base, base_folder = theirs("bart")
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_layers=3, num_transformer_submodules=1
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_transformer_submodules=1: .* with 2"):
        load_hf_adapter(load_hf(base_folder), tmp_path)
