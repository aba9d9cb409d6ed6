"""The cards: each is the published model, parameter for parameter."""

import pytest
import torch

from minillm.models import build, count_parameters
from minillm.models.cards import CARDS, find_card
from minillm.models.size import model_size

PUBLISHED = {  # parameters of the checkpoints, as the Hub counts them in their safetensors files
    "llama-3.3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "phi-4": 14_659_507_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "mbert": 177_853_440,
    "distilbert": 66_362_880,
    "roberta-base": 124_645_632,
    "camembert-base": 110_621_952,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "flan-t5-base": 247_577_856,
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
    "mbart-cc25": 610_851_840,
    "mbart-50": 610_879_488,
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_the_published_number_of_parameters(name):
    if name == "sloberta":  # published without a count: CamemBERT's architecture and vocabulary size
        assert CARDS[name].config == CARDS["camembert-base"].config
    else:
        assert model_size(CARDS[name].config).total + CARDS[name].more == PUBLISHED[name]


@pytest.mark.parametrize("name", CARDS)
def test_a_card_counts_as_the_model_that_is_built_and_as_transformers(name):
    """Shapes only: both models are built on the meta device. `more` is what theirs has beside ours."""
    card = CARDS[name]
    with torch.device("meta"):
        ours, theirs = build(card.config), hub_model(name, card.config)
    counts = count_parameters(ours)
    assert counts.pop("other") == 0 and counts == model_size(card.config).parameters
    assert theirs.num_parameters() == counts["total"] + card.more


def test_what_a_position_table_has_more_is_what_the_hub_stores():
    """Both table sizes of the published configs: 514 rows for 512 positions, 1026 for 1024."""
    with torch.device("meta"):
        roberta = hub_model("roberta-base", CARDS["roberta-base"].config)
        bart = hub_model("bart-base", CARDS["bart-base"].config)
    assert roberta.embeddings.position_embeddings.weight.shape[0] == 514
    assert bart.model.decoder.embed_positions.weight.shape[0] == 1026


def test_an_unknown_card_is_answered_with_the_nearest_and_all():
    with pytest.raises(
        ValueError, match=r"'bert_base'; did you mean .*bert-base.*\nThere are llama-3.3-70b, .*mbart-50"
    ):
        find_card("bert_base")
    with pytest.raises(ValueError, match=r"did you mean one of llama-3.3-70b, (?!.*There are)"):
        find_card("???")
    assert find_card("GPT2") is CARDS["gpt2"]


def hub_model(name, c):
    """transformers' class for this card, with the card's sizes under transformers' names."""
    import transformers as hub

    sizes = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_embeddings}
    family = next(start for start in FAMILIES if name.startswith(start))
    config, model, fields = FAMILIES[family]
    theirs = getattr(hub, model)(getattr(hub, config)(**sizes, **fields(c)))
    if fields is _t5 and not c.tie_embeddings:  # which transformers 5 learns from the file, not from the config
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    return theirs


def _llama(c):
    return {
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "intermediate_size": c.intermediate_size,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "pad_token_id": None,
    }


def _gpt2(c):
    sizes = {"n_embd": c.hidden_size, "n_layer": c.num_layers, "n_head": c.num_heads, "n_positions": c.max_positions}
    return sizes | {"n_inner": c.intermediate_size}


def _bert(c, rows=0):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    values = (c.hidden_size, c.num_layers, c.num_heads, c.intermediate_size)
    more = {"max_position_embeddings": c.max_positions + rows, "type_vocab_size": c.token_types}
    return dict(zip(names, values, strict=True)) | more


def _roberta(c):
    return _bert(c, rows=2)


def _distilbert(c):
    sizes = {"dim": c.hidden_size, "hidden_dim": c.intermediate_size, "n_layers": c.num_layers, "n_heads": c.num_heads}
    return sizes | {"max_position_embeddings": c.max_positions}


def _t5(c):
    return {
        "d_model": c.hidden_size,
        "d_kv": c.head_dim,
        "d_ff": c.intermediate_size,
        "num_layers": c.num_layers,
        "num_decoder_layers": c.num_decoder_layers,
        "num_heads": c.num_heads,
        "feed_forward_proj": "gated-gelu" if c.mlp == "gated" else "relu",
    }


def _bart(c):
    sizes = {"d_model": c.hidden_size, "max_position_embeddings": c.max_positions}
    for side, layers in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": c.num_heads}
        sizes |= {f"{side}_ffn_dim": c.intermediate_size}
    return sizes


FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _llama),
    "phi": ("Phi3Config", "Phi3ForCausalLM", _llama),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _llama),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _llama),
    "mistral": ("MistralConfig", "MistralForCausalLM", _llama),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _gpt2),
    "bert": ("BertConfig", "BertModel", _bert),
    "mbert": ("BertConfig", "BertModel", _bert),
    "distilbert": ("DistilBertConfig", "DistilBertModel", _distilbert),
    "roberta": ("RobertaConfig", "RobertaModel", _roberta),
    "camembert": ("CamembertConfig", "CamembertModel", _roberta),
    "sloberta": ("CamembertConfig", "CamembertModel", _roberta),
    "t5": ("T5Config", "T5ForConditionalGeneration", _t5),
    "flan-t5": ("T5Config", "T5ForConditionalGeneration", _t5),
    "bart": ("BartConfig", "BartForConditionalGeneration", _bart),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _bart),
}
