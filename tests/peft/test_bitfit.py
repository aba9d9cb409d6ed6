"""BitFit: which biases, how many, what they compute, and how they reach Hugging Face peft."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minillm.config import from_dict, override, to_dict
from minillm.models import HeadConfig, ModelConfig, build, build_with_head
from minillm.peft import (
    LoraConfig,
    activate,
    load_adapter,
    merge,
    num_parameters,
    save_adapter,
    tune,
    unload,
    unmerge,
)
from minillm.peft.bitfit import BitFitConfig, deltas

BIASED = dict(norm="layer", mlp="plain", activation="gelu", positions="learned", attention_bias=True, mlp_bias=True)
SIZES = dict(vocab_size=41, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, max_positions=32)


def config(kind="decoder", **fields):
    return ModelConfig(**{**SIZES, **BIASED, "kind": kind, "init_std": 0.3, **fields})


@pytest.fixture
def biased():
    """A decoder as GPT-2's: D = 16, F = 24, every layer has a bias but the head."""
    torch.manual_seed(0)
    return randomised(build(config()))


@pytest.fixture
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return randomised(BertModel(BertConfig(**sizes, max_position_embeddings=32, attn_implementation="eager")))


def randomised(model):
    """Biases away from zero, where a lost one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


def trains(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def same_state(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


# which biases


def test_counts_of_bert_are_the_papers(bert):
    """11 D for a layer, D for the embeddings' norm, D for the pooler; 102,912 of BERT-base, without its classifier."""
    assert tune(bert, BitFitConfig()).trainable == 2 * 11 * 16 + 16 + 16
    assert set(trains(bert)) == {name for name, _ in bert.named_parameters() if name.endswith("bias")}
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        base = BertModel(BertConfig())
    assert num_parameters(BitFitConfig(), base) == 12 * 11 * 768 + 768 + 768 == 102_912
    assert num_parameters(BitFitConfig("half"), base) == 12 * (768 + 3072)


def test_counts_of_our_models_follow_from_their_sizes():
    """A layer: norms 2 D, queries keys values outputs 4 D, MLP F + D; cross-attention 4 D and its norm D more."""
    layer, cross = 2 * 16 + 4 * 16 + 24 + 16, 5 * 16
    assert num_parameters(BitFitConfig(), build(config())) == 2 * layer + 16
    encoder = build(config("encoder", norm_first=False, embed_norm=True))
    assert num_parameters(BitFitConfig(), encoder) == 2 * layer + 16  # the embeddings' norm, and no final one
    both = build(config("encoder_decoder"))
    assert num_parameters(BitFitConfig(), both) == 2 * layer + 16 + 2 * (layer + cross) + 16
    assert num_parameters(BitFitConfig("half"), both) == 2 * (16 + 24) + 2 * (2 * 16 + 24)


def test_norms_biases_train_and_norms_weights_do_not(biased):
    """Toy mistakes: LayerNorm left out; all of LayerNorm trained."""
    tune(biased, BitFitConfig())
    assert {"norm.bias", "layers.0.attn_norm.bias", "layers.1.mlp_norm.bias"} <= set(trains(biased))
    assert not any(name.endswith("weight") for name in trains(biased))


def test_names_are_whole_segments_not_texts_anywhere(bert):
    """Toy mistake, and the paper's code: the text "output.dense.bias" is in attention.output.dense.bias too."""
    paths = [f"encoder.layer.{i}.{rest}" for i in range(2) for rest in ("attention.output.dense", "output.dense")]
    assert set(BitFitConfig(("output.dense",)).plan(bert).parameters) == {f"{path}.bias" for path in paths}
    one = BitFitConfig(("layer.0.output.dense", "layer.1.output.dense.bias"))
    assert set(one.plan(bert).parameters) == {"encoder.layer.0.output.dense.bias", "encoder.layer.1.output.dense.bias"}
    with pytest.raises(ValueError, match=r"'put.dense' matches no bias"):
        BitFitConfig(("put.dense",)).plan(bert)


def test_a_full_path_means_that_bias_alone():
    """The head's "norm.bias" is the end of "body.norm.bias" too: pruned names must not grow on the way back."""
    model = build_with_head(config("encoder"), HeadConfig("masked_lm"))
    assert set(BitFitConfig(("norm.bias",)).plan(model).parameters) == {"norm.bias"}
    assert set(BitFitConfig(("norm",)).plan(model).parameters) == {"norm.bias", "body.norm.bias"}


def test_a_table_of_relative_positions_is_no_bias():
    """Toy mistake: "bias" in name, which finds T5's relative_attention_bias.weight."""
    from transformers import T5Config, T5EncoderModel

    sizes = dict(vocab_size=41, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    t5 = T5EncoderModel(T5Config(**sizes))
    assert any("bias" in name for name, _ in t5.named_parameters())
    with pytest.raises(ValueError, match="it has no biases"):
        tune(t5, BitFitConfig())


def test_half_is_queries_and_the_mlps_inner_layer(biased):
    tune(biased, BitFitConfig("half"))
    assert trains(biased) == [f"layers.{i}.{x}.bias" for i in range(2) for x in ("self_attn.q_proj", "mlp.up_proj")]
    qwen = build(ModelConfig(**SIZES, attention_bias="qkv"))
    with pytest.raises(ValueError, match=r'"half": it has none of up_proj, gate_proj, .* with a bias; name the biases'):
        tune(qwen, BitFitConfig("half"))


def test_torchs_attention_and_recurrent_layers_have_biases_of_their_own_names():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "lstm": nn.LSTM(8, 6)})
    tune(model, BitFitConfig())
    names = ["attention.in_proj_bias", "attention.out_proj.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0"]
    assert trains(model) == names


def test_the_head_trains_in_full_beside_the_biases():
    model = build_with_head(config("encoder", norm_first=False, embed_norm=True), HeadConfig(num_labels=3))
    report = tune(model, BitFitConfig(trainable=("classifier",)))
    layer = 2 * 16 + 4 * 16 + 24 + 16
    assert report.trainable == 2 * layer + 16 + 16 + (3 * 16 + 3)  # embeddings' norm, pooler, classifier
    assert {"classifier.weight", "classifier.bias", "pooler.dense.bias"} <= set(trains(model))


def test_a_bias_under_two_names_trains_once_and_needs_both(perturb, tmp_path):
    """BERT's masked LM has its output bias under two names."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
    model = randomised(BertForMaskedLM(BertConfig(**sizes)))
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    fresh = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    report = tune(model, BitFitConfig())
    layer = 4 * 16 + 16 + 24 + 16 + 16
    assert report.trainable == layer + 16 + 16 + 16 + 41  # embeddings' norm, the head's dense layer, its norm, words
    perturb(model)
    assert head.bias is head.decoder.bias and not torch.equal(head.bias, before["cls.predictions.bias"])
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert same_state(fresh, model.state_dict())
    unload(model)
    assert head.bias is head.decoder.bias and same_state(model, before)
    with pytest.raises(ValueError, match=r"predictions.decoder.bias is also cls.predictions.bias, which would change"):
        tune(model, BitFitConfig(("decoder",)))


# models without biases


def test_a_model_without_biases_is_refused_by_name(decoder, llama):
    for model in (decoder, llama):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as error:
            tune(model, BitFitConfig())
        assert f"BitFit does not fit this {type(model).__name__}, which is unchanged" in str(error.value)
        assert "it has no biases; create_missing=True gives its linear layers zero biases" in str(error.value)
        assert "(an RMSNorm cannot have one)" in str(error.value)
        assert same_state(model, before)


def test_created_biases_start_at_zero_train_and_go_again(decoder, tokens, perturb, tmp_path):
    fresh, before, outputs = copy.deepcopy(decoder), copy.deepcopy(decoder.state_dict()), decoder(tokens)
    report = tune(decoder, BitFitConfig(create_missing=True))
    layer = 16 + 8 + 8 + 16 + 20 + 20 + 16  # queries, keys and values of 2 heads, outputs, gate, up, down
    assert report.trainable == 3 * layer + 41
    assert torch.equal(decoder(tokens), outputs)
    perturb(decoder)
    changed = decoder(tokens)
    assert not torch.allclose(changed, outputs, atol=1e-2)
    save_adapter(decoder, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(tokens), changed)
    unload(decoder)
    assert same_state(decoder, before) and decoder.layers[0].mlp.up_proj.bias is None
    assert torch.equal(decoder(tokens), outputs)


def test_only_the_named_biases_are_created(decoder):
    tune(decoder, BitFitConfig(("q_proj", "up_proj"), create_missing=True))
    assert trains(decoder) == [f"layers.{i}.{x}.bias" for i in range(3) for x in ("self_attn.q_proj", "mlp.up_proj")]
    assert decoder.layers[0].self_attn.k_proj.bias is None


def test_a_head_that_trains_in_full_gets_no_new_bias(decoder):
    report = tune(decoder, BitFitConfig(create_missing=True, trainable=("lm_head",)))
    assert report.trainable == 3 * (16 + 8 + 8 + 16 + 20 + 20 + 16) + 41 * 16 and decoder.lm_head.bias is None


def test_half_of_created_biases_counts_both_inner_layers_of_a_gated_mlp(decoder):
    assert num_parameters(BitFitConfig("half", create_missing=True), decoder) == 3 * (16 + 20 + 20)


def test_existing_biases_are_not_created_again():
    qwen = build(ModelConfig(**SIZES, attention_bias="qkv"))
    before = randomised(qwen).layers[0].self_attn.q_proj.bias.clone()
    assert num_parameters(BitFitConfig(), qwen) == 2 * 3 * 16
    tune(qwen, BitFitConfig(create_missing=True))
    assert torch.equal(qwen.layers[0].self_attn.q_proj.bias, before)
    assert not qwen.layers[0].self_attn.o_proj.bias.count_nonzero()


def test_created_on_bfloat16_and_quantized_layers(decoder, tokens):
    from minillm.peft.quantized_linear import quantize

    decoder.to(torch.bfloat16)
    quantize(decoder, ("up_proj", "q_proj"), block=16)
    outputs = decoder(tokens)
    tune(decoder, BitFitConfig(create_missing=True))
    assert torch.equal(decoder(tokens), outputs)
    up = decoder.layers[0].mlp.up_proj
    assert up.bias.dtype == torch.bfloat16
    decoder(tokens).float().square().mean().backward()
    assert up.bias.grad.count_nonzero()
    unload(decoder)
    assert up.bias is None and torch.equal(decoder(tokens), outputs)


# what they compute


def test_gradients_are_those_of_full_tuning(biased, tokens, loss_fn):
    """Freezing the rest changes no gradient of a bias: the oracle is the model with everything trainable."""
    twin = copy.deepcopy(biased)
    tune(biased, BitFitConfig())
    loss_fn(biased, tokens).value.backward()
    loss_fn(twin, tokens).value.backward()
    whole = dict(twin.named_parameters())
    for name, parameter in biased.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif "k_proj" not in name:
            torch.testing.assert_close(parameter.grad, whole[name].grad, rtol=1e-4, atol=1e-6)


def test_the_key_bias_gets_no_gradient_through_softmax():
    """q . (k + b) = q . k + q . b: the last term is one number for all keys of a query, which softmax takes out.

    With rotary positions the bias is turned by each key's position, so it differs from key to key and does train.
    """
    tokens = torch.randint(0, 41, (2, 9))
    gradients = {}
    for positions in ("learned", "rope"):
        model = randomised(build(config(positions=positions))).double()
        tune(model, BitFitConfig())
        model(tokens).square().mean().backward()
        attention = model.layers[0].self_attn
        gradients[positions] = (attention.k_proj.bias.grad.abs().max(), attention.q_proj.bias.grad.abs().max())
    key, query = gradients["learned"]
    assert key < 1e-12 * query
    key, query = gradients["rope"]
    assert key > 1e-3 * query


def test_unload_gives_the_base_back_bit_for_bit(biased, tokens, perturb):
    before, outputs = copy.deepcopy(biased.state_dict()), biased(tokens)
    tune(biased, BitFitConfig())
    perturb(biased)
    assert not torch.allclose(biased(tokens), outputs)
    unload(biased)
    assert same_state(biased, before) and all(p.requires_grad for p in biased.parameters())


def test_several_tasks_switch_on_one_base(biased, tokens, perturb):
    base = biased(tokens)
    tune(biased, BitFitConfig(), "first")
    first = perturb(biased, seed=1)(tokens)
    activate(biased)
    assert torch.equal(biased(tokens), base)
    tune(biased, BitFitConfig("half"), "second")
    second = perturb(biased, seed=2)(tokens)
    for _ in range(2):
        activate(biased, "first")
        assert torch.equal(biased(tokens), first)
        activate(biased, "second")
        assert torch.equal(biased(tokens), second)
    unload(biased, "first")
    assert torch.equal(biased(tokens), second)
    unload(biased)
    assert torch.equal(biased(tokens), base)


def test_deltas_are_trained_minus_pretrained(biased, decoder, perturb):
    before = copy.deepcopy(biased.state_dict())
    tune(biased, BitFitConfig("half"))
    assert not any(delta.count_nonzero() for delta in deltas(biased).values())
    perturb(biased)
    found = deltas(biased)
    assert found.keys() == set(trains(biased))
    for name, delta in found.items():
        assert torch.equal(delta, biased.state_dict()[name] - before[name])
    activate(biased)  # also of what is not in the model just now
    assert all(torch.equal(delta, found[name]) for name, delta in deltas(biased).items())
    tune(decoder, BitFitConfig(("up_proj",), create_missing=True))
    perturb(decoder)
    assert torch.equal(deltas(decoder)["layers.0.mlp.up_proj.bias"], decoder.layers[0].mlp.up_proj.bias)
    unload(decoder)
    with pytest.raises(ValueError, match="nothing to compare with its base: this Decoder is not tuned"):
        deltas(decoder)


def test_merging_folds_nothing_and_leaves_the_trained_biases(biased, tokens, perturb):
    keys = list(biased.state_dict())
    tune(biased, BitFitConfig())
    trained = perturb(biased)(tokens)
    assert merge(biased, keep=True) == 0.0
    unmerge(biased)
    merge(biased)
    assert torch.equal(biased(tokens), trained) and list(biased.state_dict()) == keys
    assert all(p.requires_grad for p in biased.parameters())


def test_stacked_with_lora(biased, tokens, perturb):
    tune(biased, LoraConfig(rank=2), "lora")
    below = perturb(biased)(tokens)
    tune(biased, BitFitConfig(), "biases")
    assert torch.equal(biased(tokens), below)
    both = perturb(biased, seed=3)(tokens)
    merge(biased, keep=True)
    torch.testing.assert_close(biased(tokens), both, rtol=1e-4, atol=1e-4)
    unmerge(biased)
    unload(biased, "biases")
    assert torch.equal(biased(tokens), below)


# files


def test_saved_and_loaded(biased, tokens, perturb, tmp_path):
    fresh = copy.deepcopy(biased)
    report = tune(biased, BitFitConfig())
    save_adapter(perturb(biased), tmp_path / "adapter")
    assert load_adapter(fresh, tmp_path / "adapter") == report
    assert torch.equal(fresh(tokens), biased(tokens))


@pytest.mark.parametrize("biases", ["all", "half"])
def test_peft_reads_biases_of_our_decoder(biased, tokens, perturb, tmp_path, biases, recwarn):
    """As a LoRA of zeros with biases beside it: the same outputs, and nothing left out or over."""
    fresh = copy.deepcopy(biased)
    tune(biased, BitFitConfig(biases))
    save_adapter(perturb(biased), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(tokens), biased(tokens), rtol=1e-6, atol=1e-6)
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]
    theirs.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(again[key], tensor) for key, tensor in ours.items())
    assert (again.keys() == ours.keys()) == (biases == "all")
    merged = theirs.merge_and_unload()
    assert same_state(merged, biased.state_dict())


def test_peft_reads_a_tuned_bert_with_its_head(tokens, perturb, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    model = randomised(BertForSequenceClassification(BertConfig(**sizes, num_labels=3)))
    fresh, third = copy.deepcopy(model), copy.deepcopy(model)
    tune(model, BitFitConfig(trainable=("classifier",)))
    save_adapter(perturb(model), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)
    theirs.save_pretrained(tmp_path / "again")  # peft knows what trains, not only what is in the file
    ours, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert again.keys() >= ours.keys() and "base_model.model.classifier.weight" in ours
    load_adapter(third, tmp_path / "adapter")
    assert torch.equal(third(tokens).logits, model(tokens).logits)


def test_peft_reads_gpt2_whose_layers_are_transposed(tokens, perturb, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = randomised(GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=4, n_positions=32)))
    fresh = copy.deepcopy(model)
    tune(model, BitFitConfig())
    save_adapter(perturb(model), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)


def test_the_lora_beside_the_biases_is_zero_and_the_smallest(biased, tmp_path):
    report = tune(biased, BitFitConfig())
    save_adapter(biased, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lora = {key: tensors.pop(key) for key in list(tensors) if "lora_" in key}
    prefix = "base_model.model.layers.0.self_attn.q_proj."
    assert {key: tuple(t.shape) for key, t in lora.items()} == {
        prefix + "lora_A.weight": (1, 16),
        prefix + "lora_B.weight": (16, 1),
    }
    assert not any(tensor.count_nonzero() for tensor in lora.values())
    assert prefix + "base_layer.bias" in tensors and "base_model.model.norm.bias" in tensors
    assert sum(tensor.numel() for tensor in tensors.values()) == report.trainable


def test_peft_reads_biases_of_a_model_with_quantized_layers(biased, tokens, perturb, tmp_path):
    """It can give none of them a LoRA, so the smallest of the others gets it."""
    from minillm.peft.quantized_linear import quantize

    quantize(biased, ("q_proj",), block=16)
    fresh = copy.deepcopy(biased)
    tune(biased, BitFitConfig())
    save_adapter(perturb(biased), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(tokens), biased(tokens), rtol=1e-6, atol=1e-6)


def test_a_lora_that_is_not_zero_is_no_bitfit(biased, perturb, tmp_path):
    """Someone trained the LoRA in peft and kept our minillm.json: it would be lost silently."""
    from safetensors.torch import save_file

    fresh = copy.deepcopy(biased)
    tune(biased, BitFitConfig())
    save_adapter(perturb(biased), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.layers.0.self_attn.q_proj.lora_B.weight"].fill_(0.1)
    save_file(tensors, path)
    own = json.loads((tmp_path / "minillm.json").read_text())
    from minillm.files import sha256_file

    (tmp_path / "minillm.json").write_text(json.dumps({**own, "weights_sha256": sha256_file(path)}))
    with pytest.raises(ValueError, match=r"unexpected: layers.0.self_attn.q_proj.lora_B.weight"):
        load_adapter(fresh, tmp_path)


def test_peft_fails_loudly_on_biases_that_its_base_has_not(decoder, tmp_path):
    fresh = copy.deepcopy(decoder)
    tune(decoder, BitFitConfig(create_missing=True))
    save_adapter(decoder, tmp_path / "adapter")
    with pytest.raises(Exception, match="MINILLM_BITFIT"):
        peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")


# configs


def test_bad_configs_and_names(biased):
    for wrong in ((), ("all", "q_proj"), ("half", "all")):
        with pytest.raises(ValueError, match='biases: "all" alone, "half" alone, or at least one name'):
            BitFitConfig(wrong)
    with pytest.raises(ValueError, match=r"(?s)biases: a tuple of names, not the text 'q_proj'.*create_missing: True"):
        BitFitConfig("q_proj", create_missing=1)
    with pytest.raises(ValueError) as error:
        tune(biased, BitFitConfig(("q_porj", "lm_head"), trainable=("head",)))
    assert "'q_porj' matches no bias; did you mean q_proj or " in str(error.value)
    assert "'lm_head' matches no bias" in str(error.value)
    assert "'head' matches no module (in trainable)" in str(error.value)
    assert "layers.{0..1}.mlp.down_proj.bias" in str(error.value)
    assert trains(biased) == [name for name, _ in biased.named_parameters()]


def test_config_survives_json_and_the_command_line():
    config = BitFitConfig(("q_proj", "norm.bias"), create_missing=True, trainable=("lm_head",))
    assert from_dict(BitFitConfig, to_dict(config)) == config
    assert override(BitFitConfig(), ["biases=half"]) == BitFitConfig("half")
    assert override(BitFitConfig(), ["biases=q_proj,norm"]) == BitFitConfig(("q_proj", "norm"))
