"""LoRA beside which biases train: the same ones as in Hugging Face peft, the same numbers, the same files."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minillm.config import from_dict, override, to_dict
from minillm.peft import (
    METHODS,
    LoraConfig,
    PartialConfig,
    activate,
    combine,
    load_adapter,
    merge,
    num_parameters,
    rows,
    save_adapter,
    tune,
    tunings_of,
    unload,
    unmerge,
)
from minillm.peft.bitfit import BitFitConfig, deltas
from minillm.peft.qlora import QLoraConfig
from minillm.peft.quantized_linear import QuantizedLinear

SIZES = dict(vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20)
GPT2 = dict(vocab_size=41, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
MODELS = {  # name -> class in transformers, its config, targets: one with a bias is among them
    "gpt2": ("GPT2LMHeadModel", GPT2, ("c_attn", "mlp.c_proj")),
    "qwen2": ("Qwen2ForCausalLM", SIZES | dict(num_key_value_heads=2), ("q_proj", "o_proj")),
    "bert": ("BertForSequenceClassification", SIZES | dict(num_labels=3), ("query", "word_embeddings")),
    "bert-tied": ("BertForMaskedLM", SIZES, ("query", "intermediate.dense")),
}
EVERY = pytest.mark.parametrize("name", MODELS)
BOTH = pytest.mark.parametrize("bias", ["all", "lora_only"])


def make(name):
    """In float64, with weights that leave nothing out: no bias is 0, no norm 1."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, MODELS[name][0])
    model = cls(cls.config_class(**MODELS[name][1])).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.dim() == 1 and key.endswith("weight") else 0.0)
    return model


def config_of(name, bias, **more):
    return LoraConfig(rank=2, alpha=6.0, targets=MODELS[name][2], bias=bias, **more)


def theirs_of(name, model, bias, **more):
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=list(MODELS[name][2]), bias=bias, **more)
    return peft.get_peft_model(model, config).eval()


def train(model, tokens, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, tokens).backward()
        optimizer.step()
    return model


def loss(model, tokens):
    """Something that depends on every number of every text's answer."""
    return model(tokens).logits.square().mean()


def exact(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def file_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def plain(name):
    """The base's name of a parameter in peft's model."""
    name = name.removeprefix("base_model.model.").replace(".default.weight", "").replace(".default", "")
    return name.replace(".base_layer.", ".")


@pytest.fixture
def biased(decoder):
    """The decoder, with biases in all of its linear layers but the head and one without."""
    torch.manual_seed(3)
    for name, layer in decoder.named_modules():
        if isinstance(layer, nn.Linear) and name not in ("lm_head", "layers.1.self_attn.q_proj"):
            layer.bias = nn.Parameter(0.3 * torch.randn(layer.out_features))
    return decoder


# what trains


@EVERY
@BOTH
def test_the_same_biases_train_as_in_peft(name, bias):
    model = make(name)
    theirs = theirs_of(name, copy.deepcopy(model), bias)
    expected = {plain(n) for n, p in theirs.named_parameters() if p.requires_grad}
    count = num_parameters(config_of(name, bias), model)
    report = tune(model, config_of(name, bias), "new")
    assert set(tunings_of(model)["new"].parameters()) == expected
    assert count == report.trainable == theirs.get_nb_trainable_parameters()[0]


def test_counts_by_hand(biased):
    base = 3 * 2 * ((16 + 16) + (16 + 20))
    targets = ("q_proj", "mlp.up_proj")
    for bias, more in (("none", 0), ("lora_only", 2 * 16 + 3 * 20), ("all", 2 * 16 + 3 * (2 * 8 + 16 + 2 * 20 + 16))):
        assert num_parameters(LoraConfig(2, 6.0, targets, bias=bias), biased) == base + more


def test_the_report_names_the_biases(biased):
    text = str(tune(biased, LoraConfig(2, 6.0, ("q_proj",), bias="lora_only")))
    assert text.splitlines()[1:] == [
        "  layers.{0..2}.self_attn.q_proj",
        "  layers.{0,2}.self_attn.q_proj.bias",
    ]


def test_only_what_is_called_bias():
    """nn.MultiheadAttention's in_proj_bias is none to peft; BitFit's own rule has it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    tune(model, LoraConfig(2, targets=("0",), bias="all"), "new")
    biases = [name for name in tunings_of(model)["new"].parameters() if "lora" not in name]
    assert biases == ["0.bias", "1.out_proj.bias"]


def test_a_module_that_trains_in_full_has_its_bias_once(biased):
    biased.lm_head.bias = nn.Parameter(torch.randn(41))
    config = LoraConfig(2, 6.0, ("q_proj",), bias="all", trainable=("lm_head", "layers.0.mlp"))
    report = tune(biased, config, "new")
    parameters = tunings_of(biased)["new"].parameters()
    assert len({id(p) for p in parameters.values()}) == len(parameters)
    assert report.trainable == sum(p.numel() for p in parameters.values())


def test_a_layer_in_two_places():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    report = tune(model, LoraConfig(2, 6.0, ("0", "2"), bias="lora_only"))
    assert report.trainable == 2 * (8 + 8) + 8 and model[0] is model[2]
    x = torch.randn(3, 8)
    with torch.no_grad():
        model[0].base.bias += 1.0
    model(x).sum().backward()
    assert model[2].base.bias.grad.abs().min() > 0


# numbers and files


@EVERY
@BOTH
def test_we_read_what_peft_trained(name, bias, tokens, tmp_path):
    ours = make(name)
    before = ours(tokens).logits
    theirs = train(theirs_of(name, copy.deepcopy(ours), bias), tokens)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    fresh = copy.deepcopy(ours)
    report = load_adapter(ours, tmp_path / "theirs", "new")
    assert report.trainable == theirs.get_nb_trainable_parameters()[0]
    assert all(delta.abs().max() > 1e-3 for n, delta in deltas(ours, "new").items() if "key.bias" not in n)
    exact(ours(tokens).logits, theirs(tokens).logits)
    assert (ours(tokens).logits - before).abs().max() > 0.1
    theirs.zero_grad(), loss(ours, tokens).backward(), loss(theirs, tokens).backward()
    gradients = {plain(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for key, parameter in tunings_of(ours)["new"].parameters().items():
        exact(parameter.grad, gradients[key])
    save_adapter(ours, tmp_path / "ours")
    mine, others = file_of(tmp_path / "ours"), file_of(tmp_path / "theirs")
    assert mine.keys() <= others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)
    assert {k for k in others.keys() - mine.keys()} == (  # the other name of a shared bias
        {"base_model.model.cls.predictions.decoder.bias"} if (name, bias) == ("bert-tied", "all") else set()
    )
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert fields["bias"] == bias
    back = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    exact(back(tokens).logits, ours(tokens).logits)


@EVERY
@BOTH
def test_peft_reads_what_we_trained(name, bias, tokens, tmp_path, recwarn):
    ours = make(name)
    fresh, again = copy.deepcopy(ours), copy.deepcopy(ours)
    tune(ours, config_of(name, bias))
    save_adapter(train(ours, tokens), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]
    exact(theirs(tokens).logits, ours(tokens).logits)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(tokens).logits, ours(tokens).logits)
    merge(ours)
    exact(ours(tokens).logits, theirs.merge_and_unload()(tokens).logits)


def test_a_head_beside_all_biases(tokens, tmp_path):
    """peft writes the bias of a module that trains in full three times, once as it was before training."""
    ours = make("bert")
    theirs = train(theirs_of("bert", copy.deepcopy(ours), "all", task_type="SEQ_CLS"), tokens)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    fresh, third = copy.deepcopy(ours), copy.deepcopy(ours)
    assert any(".original_module." in key for key in file_of(tmp_path / "theirs"))
    load_adapter(ours, tmp_path / "theirs")
    exact(ours(tokens).logits, theirs(tokens).logits)
    save_adapter(ours, tmp_path / "ours")
    exact(peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()(tokens).logits, ours(tokens).logits)
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.classifier.modules_to_save.bias"] += 1.0
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"unexpected: classifier\.modules_to_save\.bias"):
        load_adapter(third, tmp_path / "theirs")


def test_two_values_of_a_shared_bias(tokens, tmp_path):
    ours = make("bert-tied")
    theirs_of("bert-tied", copy.deepcopy(ours), "all").save_pretrained(tmp_path)
    tensors = file_of(tmp_path)
    tensors["base_model.model.cls.predictions.decoder.bias"] += 1.0
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: cls\.predictions\.decoder\.bias"):
        load_adapter(ours, tmp_path)


def test_files_are_strict_about_biases(biased, tmp_path):
    fresh = copy.deepcopy(biased)
    tune(biased, LoraConfig(2, 6.0, ("q_proj",), bias="all"))
    save_adapter(biased, tmp_path)
    (tmp_path / "minillm.json").unlink()
    tensors = file_of(tmp_path)
    prefix = "base_model.model.layers."
    del tensors[prefix + "0.self_attn.q_proj.base_layer.bias"]
    tensors[prefix + "2.self_attn.q_proj.base_layer.bias"] = torch.zeros(3)
    tensors[prefix + "1.self_attn.q_proj.base_layer.bias"] = torch.zeros(16)
    tensors[prefix + "1.mlp.up_proj.base_layer.bias"] = torch.zeros(20)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError) as error:
        load_adapter(fresh, tmp_path)
    for line in (
        "missing:    layers.0.self_attn.q_proj.bias (16,)",
        "mis-shaped: layers.2.self_attn.q_proj.bias: the file has (3,), the model (16,)",
        "unexpected: layers.1.self_attn.q_proj.base_layer.bias (16,)",
        "unexpected: layers.1.mlp.up_proj.base_layer.bias (20,)",
    ):
        assert line in str(error.value)
    assert not tunings_of(fresh)
    with pytest.raises(ValueError, match=r"^the adapter in .* does not fit this Sequential, which is unchanged"):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)


def test_bitfit_s_folder_is_a_lora_of_zeros_to_whoever_lacks_our_record(biased, tokens, perturb, tmp_path):
    fresh, again = copy.deepcopy(biased), copy.deepcopy(biased)
    tune(biased, BitFitConfig())
    save_adapter(perturb(biased), tmp_path)
    load_adapter(fresh, tmp_path, "record")
    assert isinstance(tunings_of(fresh)["record"].config, BitFitConfig)
    (tmp_path / "minillm.json").unlink()
    load_adapter(again, tmp_path, "none")
    config = tunings_of(again)["none"].config
    assert type(config) is LoraConfig and (config.bias, config.rank) == ("all", 1)
    assert torch.equal(fresh(tokens), biased(tokens)) and torch.equal(again(tokens), biased(tokens))


def test_a_folder_from_before_there_were_biases(biased, tokens, perturb, tmp_path):
    fresh = copy.deepcopy(biased)
    tune(biased, LoraConfig(2, 6.0))
    save_adapter(perturb(biased), tmp_path)
    own = json.loads((tmp_path / "minillm.json").read_text())
    assert own["config"].pop("bias") == "none"
    (tmp_path / "minillm.json").write_text(json.dumps(own))
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(tokens), biased(tokens))


# several adapters, merging, quantized bases


@BOTH
def test_each_adapter_has_its_own_biases(biased, tokens, perturb, bias):
    base, plain = copy.deepcopy(biased.state_dict()), biased(tokens)
    outputs = {}
    for seed, name in enumerate(("a", "b")):
        activate(biased) if tunings_of(biased) else None
        tune(biased, LoraConfig(2, 6.0, ("q_proj", "up_proj"), bias=bias), name)
        outputs[name] = perturb(biased, seed)(tokens)
    for name in ("a", "b", "a"):
        activate(biased, name)
        assert torch.equal(biased(tokens), outputs[name])
    with pytest.raises(ValueError, match=r"'a' and 'b' each have their own .*q_proj\.bias.*choose one of them"):
        activate(biased, "a", "b")
    activate(biased)
    assert torch.equal(biased(tokens), plain)
    unload(biased)
    assert all(torch.equal(tensor, base[name]) for name, tensor in biased.state_dict().items())
    assert biased.state_dict().keys() == base.keys() and all(p.requires_grad for p in biased.parameters())


@BOTH
def test_one_on_top_of_another(biased, tokens, perturb, bias):
    tune(biased, LoraConfig(2, 6.0, bias=bias), "below")
    below = perturb(biased)(tokens)
    tune(biased, LoraConfig(3, 5.0, bias=bias), "top")
    assert torch.equal(biased(tokens), below)
    top = perturb(biased, 8)(tokens)
    assert not torch.allclose(top, below, atol=1e-3)
    activate(biased, "below")
    assert torch.equal(biased(tokens), below)
    activate(biased, "below", "top")
    assert torch.equal(biased(tokens), top)


@BOTH
def test_merged_and_unmerged(biased, tokens, perturb, bias):
    fresh = copy.deepcopy(biased.state_dict())
    tune(biased, LoraConfig(2, 6.0, bias=bias))
    tuned = perturb(biased)(tokens)
    state = copy.deepcopy(biased.state_dict())
    merge(biased, keep=True)
    torch.testing.assert_close(biased(tokens), tuned, rtol=1e-4, atol=1e-4)
    assert biased.state_dict().keys() == fresh.keys()
    unmerge(biased)
    assert all(torch.equal(tensor, state[name]) for name, tensor in biased.state_dict().items())
    assert torch.equal(biased(tokens), tuned)
    merge(biased, keep=True)
    unload(biased)  # also from there
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in biased.state_dict().items())


@BOTH
def test_on_a_quantized_base(biased, tokens, perturb, bias, tmp_path):
    fresh = copy.deepcopy(biased)
    biases = {name: p.clone() for name, p in biased.named_parameters() if name.endswith("bias")}
    tune(biased, QLoraConfig(2, 6.0, ("q_proj", "up_proj"), block=16, bias=bias), "new")
    rounded = biased(tokens)
    tuned = perturb(biased)(tokens)
    assert set(deltas(biased, "new")) == {n for n in biases if bias == "all" or "q_proj" in n or "up_proj" in n}
    save_adapter(biased, tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(tokens), tuned)
    activate(biased)
    assert torch.equal(biased(tokens), rounded)
    unload(biased)
    assert isinstance(biased.layers[0].self_attn.q_proj, QuantizedLinear)
    assert torch.equal(biased(tokens), rounded)
    now = dict(biased.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in biases.items())
    merge(fresh)
    torch.testing.assert_close(fresh(tokens), tuned, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_base(biased, tokens):
    biased.bfloat16()
    tune(biased, LoraConfig(2, 6.0, bias="all"), "new")
    dtypes = {n.rpartition(".")[2]: p.dtype for n, p in tunings_of(biased)["new"].parameters().items()}
    assert dtypes == {"lora_A": torch.float32, "lora_B": torch.float32, "bias": torch.bfloat16}
    biased(tokens).float().square().mean().backward()
    assert all(p.grad is not None for n, p in tunings_of(biased)["new"].parameters().items() if n.endswith("bias"))


def test_dropout_leaves_biases_alone(biased, tokens):
    """In training the base and the update are computed apart, and the bias belongs to the base."""
    tune(biased, LoraConfig(2, 6.0, ("q_proj",), dropout=0.9, bias="lora_only"), "new")
    grads = []
    for mode in (True, False):  # B = 0: dropout has nothing to act on
        biased.train(mode).zero_grad()
        biased(tokens).square().mean().backward()
        grads.append({n: p.grad for n, p in tunings_of(biased)["new"].parameters().items() if n.endswith("bias")})
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    assert all(grad.norm() > 0 for grad in grads[0].values())


# refusals


@pytest.mark.parametrize("act", [lambda m: rows(m, ["a", None]).__enter__(), lambda m: combine(m, {"a": 1.0}, "mix")])
def test_what_cannot_hold_biases_refuses_by_name(biased, act):
    tune(biased, LoraConfig(2, 6.0, ("q_proj",), bias="lora_only"), "a")
    before = [(name, id(module)) for name, module in biased.named_modules()]
    with pytest.raises(ValueError, match=r"'a' has trained more than LoRA, weights of the base itself: .*q_proj\.bias"):
        act(biased)
    assert [(name, id(module)) for name, module in biased.named_modules()] == before


def test_models_without_biases_refuse(decoder, biased):
    with pytest.raises(ValueError, match=r'bias="lora_only" does not fit this Decoder, .* "all" would train those of'):
        tune(biased, LoraConfig(2, targets=("layers.1.self_attn.q_proj",), bias="lora_only"))
    for layer in decoder.modules():
        if isinstance(layer, nn.Linear):
            layer.bias = None
    for bias in ("all", "lora_only"):
        with pytest.raises(ValueError, match=f'bias="{bias}" .* is unchanged: it has no biases'):
            num_parameters(LoraConfig(2, bias=bias), decoder)
    decoder.lm_head.bias = nn.Parameter(torch.zeros(41))
    with pytest.raises(ValueError, match="it has no biases outside `trainable`"):
        num_parameters(LoraConfig(2, bias="all", trainable=("lm_head",)), decoder)
    decoder.lm_head.bias = None
    with pytest.raises(ValueError, match="it has no biases"):
        tune(decoder, QLoraConfig(2, bias="all", block=16))
    assert not tunings_of(decoder) and all(p.requires_grad for p in decoder.parameters())
    assert isinstance(decoder.layers[0].self_attn.q_proj, nn.Linear)


@BOTH
def test_peft_s_bias_where_the_base_has_none_is_no_bias(llama, tokens, perturb, bias, tmp_path):
    """peft says nothing of it, so such folders are around; their LoRA is as good as any."""
    fresh = copy.deepcopy(llama)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], bias=bias)
    theirs = perturb(peft.get_peft_model(llama, config)).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(fresh, tmp_path, "new")
    assert tunings_of(fresh)["new"].config.bias == "none"
    torch.testing.assert_close(fresh(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    biased = make("qwen2").float()  # and one with biases is not taken for it
    with pytest.raises(ValueError, match=r"missing:    model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_adapter(biased, tmp_path)


@pytest.mark.parametrize("bias", ["LORA_ONLY", "boft_only", True, None, ["all"]])
def test_bad_words(bias, llama, tmp_path):
    with pytest.raises(ValueError, match=r"LoraConfig:\n  bias: one of none, all, lora_only, not "):
        LoraConfig(bias=bias)
    peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": bias}))
    if bias is None:
        load_adapter(llama, tmp_path)
        return
    with pytest.raises(
        ValueError, match=r"adapter_config\.json:.*\n  bias(: one of none, all, lora_only|=.*: expected a text)"
    ):
        load_adapter(llama, tmp_path)


def test_config_on_the_command_line_and_in_json():
    for cls in (LoraConfig, QLoraConfig):
        for bias in ("none", "all", "lora_only"):
            config = override(cls(), [f"bias={bias}"])
            assert config == cls(bias=bias) == from_dict(cls, to_dict(config))
    with pytest.raises(ValueError, match="bias: expected one of none, all, lora_only, got 'some'"):
        override(LoraConfig(), ["bias=some"])
    assert "bias" not in to_dict(PartialConfig()) and "bias" not in to_dict(METHODS["increlora"]())
