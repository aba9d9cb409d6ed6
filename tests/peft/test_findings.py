"""What users stumbled over: silent mistakes that now are said, or no longer happen."""

import copy

import pytest
import torch
from torch import nn

import minillm
from minillm.models import ModelConfig, build
from minillm.peft import (
    METHODS,
    BitFitConfig,
    FullConfig,
    Ia3Config,
    IncreLoraConfig,
    LoraConfig,
    PartialConfig,
    QaLoraConfig,
    activate,
    audit,
    load_adapter,
    merge,
    num_parameters,
    quantize,
    save_adapter,
    tune,
    tunings_of,
)


@pytest.mark.parametrize("way", ["quantize", "qalora"])
def test_a_quantized_model_is_not_saved_without_its_weights(decoder, way, tmp_path):
    """transformers would fill what is missing with random numbers."""
    if way == "quantize":
        quantize(decoder)
    else:
        tune(decoder, QaLoraConfig(rank=2, group=4, targets=("q_proj",)))
        merge(decoder)
    with pytest.raises(ValueError, match=r"q_proj.weight.*what is quantized has no weights to save"):
        minillm.save_hf(decoder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_last_layers_of_a_model_whose_blocks_hold_lists():
    """In transformers' T5 each block is a list of sublayers, and no stack of its own."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes))
    report = tune(model, PartialConfig((), last=1))
    assert report.modules == ("encoder.block.2", "decoder.block.2")


def test_a_classifier_that_peft_has_saved(tmp_path):
    """peft names "classifier" and "score" for every classifier; only one of them exists."""
    import peft
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).eval()
    ours, tokens = copy.deepcopy(base), torch.arange(5)[None]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["query"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(ours.eval()(tokens).logits, theirs(tokens).logits)


def test_full_tuning_of_codes_is_refused(decoder):
    quantize(decoder)
    with pytest.raises(ValueError, match=r"layers.{0..2}.self_attn.q_proj.*quantized weights cannot train"):
        tune(decoder, FullConfig())


def test_a_heads_bias_is_no_bias_of_the_base():
    """Else BitFit on a base without biases would be the head alone, by another name."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="it has no biases; create_missing=True"):
        tune(model, BitFitConfig(trainable=("1",)))
    tune(model, BitFitConfig(create_missing=True, trainable=("1",)))


@pytest.mark.parametrize("below", [LoraConfig(rank=2), Ia3Config()])
def test_the_audit_of_a_stack_finds_no_fault(decoder, tokens, loss_fn, below):
    tune(decoder, below, name="a")
    tune(decoder, LoraConfig(rank=2), name="b")
    found = audit(decoder, tokens, loss_fn)
    assert not found.diagnoses, str(found)
    assert {p.gradient for p in found.probes if p.name.endswith("lora_A@b")} == {"B = 0"}


def test_running_statistics_are_warned_about(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="^1: running statistics of the base, which training moves"):
        tune(model, LoraConfig(rank=2, targets=("0",)))
    fresh = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    fresh.load_state_dict({n.replace("0.base", "0"): t for n, t in model.state_dict().items() if "lora" not in n})
    model.train()[1].eval()  # as it says
    model(torch.randn(8, 4))
    save_adapter(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="running statistics"):
        load_adapter(fresh, tmp_path / "adapter")


@pytest.mark.parametrize(
    "call",
    [
        lambda model: tune(model, "lora"),
        lambda model: tune(model, LoraConfig),
        lambda model: tune(LoraConfig(), model),
        lambda model: num_parameters(model, LoraConfig()),
        lambda model: tune(model, LoraConfig(), "a.b"),
        lambda model: tune(model, LoraConfig(), ""),
        lambda model: tune(model, LoraConfig(), 3),
        lambda model: activate(tune(model, LoraConfig()) and model, ["default"]),
    ],
)
def test_slips_are_named(decoder, call):
    with pytest.raises(
        ValueError, match=r"takes a (model and a )?config|cannot name an adapter|takes names of adapters"
    ):
        call(decoder)


def test_an_unknown_method_is_guessed():
    with pytest.raises(KeyError, match=r"there is no method 'lorra'; did you mean .*lora"):
        METHODS["lorra"]
    assert METHODS.get("lorra") is None


def test_one_config_for_two_adapters_counts_each_penalty_once(decoder):
    from minillm.peft import auxiliary_loss

    config = IncreLoraConfig(rank=2, target_rank=2, targets=("q_proj",), orthogonality=0.3)
    tune(decoder, config, name="a")
    alone = auxiliary_loss(decoder).item()
    activate(decoder)
    tune(decoder, config, name="b")
    with torch.no_grad():
        for name, parameter in tunings_of(decoder)["b"].parameters().items():
            parameter.copy_(tunings_of(decoder)["a"].parameters()[name])
    assert auxiliary_loss(decoder).item() == pytest.approx(alone)
    activate(decoder, "a", "b")
    assert auxiliary_loss(decoder).item() == pytest.approx(2 * alone)


def test_a_lora_below_a_qalora_merges():
    torch.manual_seed(0)
    model = build(ModelConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, max_positions=16)).eval()
    tune(model, QaLoraConfig(rank=2, group=4, targets=("q_proj",)), name="first")
    merge(model)  # the base is in 4 bits now
    for name, config in {
        "lora": LoraConfig(rank=2, targets=("q_proj",)),
        "qa": QaLoraConfig(rank=2, group=4, targets=("q_proj",)),
    }.items():
        tune(model, config, name=name)
        with torch.no_grad():
            for parameter in tunings_of(model)[name].parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.arange(6)[None]
    expected = model(tokens)
    merge(model)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
