"""Files as older versions of transformers and the first conversions wrote them: they load, and compute the same."""

import ast
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillm.models.families.load import load_hf


@pytest.fixture
def aged(checkpoint, member_named, tmp_path):
    """`aged(id, config=..., tensors=..., as_pickle=...)` -> (member, their model, a folder like theirs but changed).

    `config` and `tensors` change the dicts they are given.
    """

    def make(name, config=lambda described: None, tensors=lambda stored: None, as_pickle=False):
        member = member_named(name)
        theirs, folder = checkpoint(member)
        described = json.loads((folder / "config.json").read_text())
        stored = theirs.state_dict() if as_pickle else load_file(folder / "model.safetensors")
        config(described)
        tensors(stored)
        old = tmp_path / "old"
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
        (old / "config.json").write_text(json.dumps(described))
        if as_pickle:
            torch.save(stored, old / "pytorch_model.bin")
        else:
            save_file(stored, old / "model.safetensors")
        return member, theirs, old

    return make


@pytest.fixture
def same(batch_of, ask_theirs, error_of):
    """`same(member, theirs, folder, **how)`: what is loaded from the folder computes what theirs does; returns it."""

    def check(member, theirs, folder, **how):
        ours = load_hf(folder, **how)
        batch = batch_of(ours, member.task)
        with torch.no_grad():
            expected, _ = ask_theirs(theirs, member, batch)
            assert error_of(ours(**batch), expected) < 1e-5
        return ours

    return check


def renamed(stored: dict, *pairs: tuple[str, str]) -> None:
    for key in list(stored):
        new = key
        for old_part, new_part in pairs:
            new = new.replace(old_part, new_part)
        stored[new] = stored.pop(key)


@pytest.mark.parametrize("name", ["BERT-BertForMaskedLM", "BERT-BertForSequenceClassification"])
def test_gamma_and_beta(name, aged, same):
    """Norms as converted from TensorFlow, and the buffer that files had until version 4.31."""

    def older(stored):
        renamed(stored, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
        stored["bert.embeddings.position_ids"] = torch.arange(64)[None]

    same(*aged(name, tensors=older))


def test_gpt2_as_openai_published_it(aged, same):
    """No prefix, and the causal mask stored in each block."""

    def older(stored):
        renamed(stored, ("transformer.", ""))
        for i in range(2):
            stored[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
            stored[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    same(*aged("GPT-2-GPT2LMHeadModel", tensors=older))


@pytest.mark.parametrize("prefix", ["", "roberta."])
@pytest.mark.parametrize("name", ["RoBERTa-RobertaForMaskedLM", "DistilBERT-DistilBertForMaskedLM"])
def test_position_ids(name, prefix, aged, same):
    prefix = prefix and name.split("-")[0].lower() + "."
    same(
        *aged(name, tensors=lambda stored: stored.update({f"{prefix}embeddings.position_ids": torch.arange(64)[None]}))
    )


def test_rotary_buffers(aged, same):
    def older(stored):
        for i in range(2):
            stored[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    same(*aged("Llama 3-LlamaForCausalLM", tensors=older))


@pytest.mark.parametrize("kind", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["Llama 3-LlamaForCausalLM", "Llama, linear rope-LlamaForCausalLM"])
def test_rope_of_its_own_field(name, kind, aged, same):
    """Before version 5: rope_theta, and rope_scaling with the rest; before 4.43 its kind was called type."""

    def older(described):
        scaling = described.pop("rope_parameters")
        described["rope_theta"] = scaling.pop("rope_theta")
        scaling[kind] = scaling.pop("rope_type")
        described["rope_scaling"] = scaling

    same(*aged(name, config=older))


@pytest.mark.parametrize(
    "name, fields, dropout",
    [
        ("BERT-BertForSequenceClassification", {"classifier_dropout": 0.3}, 0.3),
        ("BERT-BertForSequenceClassification", {"hidden_dropout_prob": 0.4}, 0.4),
        ("BERT-BertForTokenClassification", {"hidden_dropout_prob": 0.4}, 0.4),
        ("DistilBERT-DistilBertForSequenceClassification", {"seq_classif_dropout": 0.3, "dropout": 0.4}, 0.3),
        ("DistilBERT-DistilBertForTokenClassification", {"seq_classif_dropout": 0.3, "dropout": 0.4}, 0.4),
    ],
)
def test_the_head_drops_out_as_theirs(name, fields, dropout, aged):
    _, _, folder = aged(name, config=lambda described: described.update(fields))
    theirs = getattr(transformers, name.partition("-")[2]).from_pretrained(folder)
    assert load_hf(folder).dropout.p == theirs.dropout.p == dropout


def test_mbart_starts_like_theirs_when_no_token_is_named(aged):
    _, _, folder = aged("mBART-MBartForConditionalGeneration", config=lambda d: d.update(decoder_start_token_id=None))
    theirs = transformers.MBartForConditionalGeneration.from_pretrained(folder)
    first = theirs.generate(torch.tensor([[5, 6, 7, 2]]), max_new_tokens=1, num_beams=1)[0, 0]
    assert load_hf(folder).config.decoder_start_id == first == 0


def test_rope_that_was_scaled_from_the_longest_text(aged, same):
    """Without a length of its own, llama3's scaling counts turns within max_position_embeddings."""

    def unsaid(described):
        described["max_position_embeddings"] = described["rope_parameters"].pop("original_max_position_embeddings")

    same(*aged("Llama 3-LlamaForCausalLM", config=unsaid))


@pytest.mark.parametrize(
    "name, absent",
    [
        (
            "Llama 2 MHA-LlamaForCausalLM",
            ["num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"],
        ),
        ("Mistral-MistralForCausalLM", ["head_dim", "tie_word_embeddings", "hidden_act"]),
        ("Qwen2, no window-Qwen2ForCausalLM", ["layer_types", "sliding_window", "use_sliding_window", "head_dim"]),
        ("Qwen2, tied, one sliding layer-Qwen2ForCausalLM", ["layer_types"]),
        ("GPT-2-GPT2LMHeadModel", ["n_inner", "activation_function", "tie_word_embeddings", "scale_attn_weights"]),
        ("BERT-BertForMaskedLM", ["is_decoder", "add_cross_attention", "tie_word_embeddings", "hidden_act"]),
        (
            "T5-T5ForConditionalGeneration",
            ["feed_forward_proj", "is_gated_act", "scale_decoder_outputs"],
        ),
        ("T5 v1.1 and Flan-T5ForConditionalGeneration", ["is_gated_act", "dense_act_fn"]),
        ("BART-BartForConditionalGeneration", ["tie_word_embeddings", "scale_embedding", "activation_function"]),
    ],
)
def test_fields_that_came_later(name, absent, aged, same):
    def older(described):
        for field in absent:
            described.pop(field, None)
        described["torch_dtype"] = described.pop("dtype")

    same(*aged(name, config=older))


@pytest.mark.parametrize(
    "name, start_id",  # of config.json files that do not say what the decoder begins with
    [("T5-T5ForConditionalGeneration", 0), ("BART-BartForConditionalGeneration", 2)],
)
def test_start_token_unless_given(name, start_id, aged):
    _, _, folder = aged(name, config=lambda described: described.pop("decoder_start_token_id"))
    assert load_hf(folder).config.decoder_start_id == start_id


def test_t5_v11_said_so_by_not_tying(aged, same):
    """tie_word_embeddings: false meant that logits are not scaled, before scale_decoder_outputs did."""

    def older(described):
        described["tie_word_embeddings"] = described.pop("scale_decoder_outputs")

    same(*aged("T5 v1.1 and Flan-T5ForConditionalGeneration", config=older))


def test_t5_with_what_it_never_reads(aged, same):
    def older(stored):
        for side in ("encoder", "decoder"):
            stored[f"{side}.embed_tokens.weight"] = stored["shared.weight"].clone()
        stored["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(8, 4)

    same(*aged("T5-T5ForConditionalGeneration", tensors=older))


def test_bart_as_converted_from_fairseq(aged, same):
    def older(stored):
        for side in ("encoder", "decoder"):
            stored[f"model.{side}.version"] = torch.tensor([3.0])

    same(*aged("BART-BartForConditionalGeneration", tensors=older))


@pytest.mark.parametrize(
    "name",
    [
        "GPT-2-GPT2LMHeadModel",
        "Qwen2, tied, one sliding layer-Qwen2ForCausalLM",
        "BERT-BertForMaskedLM",
        "RoBERTa-RobertaForMaskedLM",
        "DistilBERT-DistilBertForMaskedLM",
        "T5-T5ForConditionalGeneration",
        "BART-BartForConditionalGeneration",
        "mBART-MBartForConditionalGeneration",
    ],
)
def test_pickled_with_tied_weights_repeated(name, aged, same):
    member, theirs, folder = aged(name, as_pickle=True)
    tied = {key for key in theirs.state_dict()} - {key for key, _ in theirs.named_parameters()}
    assert tied  # or there is nothing to see
    same(member, theirs, folder)


def test_a_repeated_weight_that_differs(aged):
    def wrong(stored):
        stored["decoder.embed_tokens.weight"] = stored["decoder.embed_tokens.weight"] + 1

    _, _, folder = aged("T5-T5ForConditionalGeneration", tensors=wrong, as_pickle=True)
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens\.weight should repeat shared\.weight"):
        load_hf(folder)


@pytest.mark.parametrize(
    "name, task, num_labels, module",
    [
        ("BERT-BertModel", "classification", 4, "classifier"),  # with the pooler that the file holds
        ("BERT-BertForMaskedLM", "classification", 4, "pooler.dense, classifier"),
        ("BERT-BertForSequenceClassification", "classification", 4, "classifier"),  # the file's has three labels
        ("RoBERTa-RobertaForMaskedLM", "tagging", 5, "classifier"),
        ("DistilBERT-DistilBertForMaskedLM", "span", None, "outputs"),
        ("GPT-2-GPT2LMHeadModel", "classification", 3, "classifier"),
        ("Llama 3-LlamaForCausalLM", "regression", 1, "classifier"),
        ("BART-BartForConditionalGeneration", "multi_label", 3, "pooler.dense, classifier"),
    ],
)
def test_a_new_head_on_an_old_body(name, task, num_labels, module, aged, batch_of):
    _, _, folder = aged(name)
    with pytest.warns(UserWarning, match="start with random weights and must be trained") as caught:
        ours = load_hf(folder, task=task, num_labels=num_labels)
    assert [str(w.message).split(": ")[1].split(" start ")[0] for w in caught] == [module]
    advised = ast.literal_eval(str(caught[0].message).split("trainable=")[1].rstrip(")") + ")")
    assert {name.rpartition(".")[0] for name, _ in ours.named_parameters() if name.startswith(advised)} == {*advised}
    body = load_hf(folder, task="body").state_dict()
    assert all(torch.equal(ours.body.state_dict()[key], value) for key, value in body.items())
    assert ours.head_config.task == task
    if num_labels:
        assert ours(**batch_of(ours, task)).shape == ((3, 11, num_labels) if task == "tagging" else (3, num_labels))


@pytest.mark.parametrize("task, num_labels", [(None, 3), ("span", 2), ("body", 2), ("embedding", 2), ("tagging", 0)])
def test_labels_that_no_head_would_have(task, num_labels, aged):
    _, _, folder = aged("BERT-BertForMaskedLM")
    with pytest.raises(ValueError, match=f"num_labels={num_labels} for task .*leave num_labels out"):
        load_hf(folder, task=task, num_labels=num_labels)


def test_a_file_of_bert_pretraining(checkpoint, tmp_path, error_of):
    """Its second head, which told whether two sentences follow each other, is left out; its pooler too."""
    import transformers

    config = transformers.BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    tokens = torch.randint(5, 61, (2, 9))
    with torch.no_grad():
        assert error_of(ours(tokens), theirs(tokens).prediction_logits) < 1e-5
        pooled = load_hf(tmp_path, task="embedding")
        assert error_of(pooled(tokens), theirs.bert(tokens).pooler_output) < 1e-5


def test_pretrained_without_a_pooler(tmp_path, error_of):
    """A BertModel that was saved without one is a body."""
    import transformers

    config = transformers.BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(5, 61, (2, 9))
    with torch.no_grad():
        assert error_of(load_hf(tmp_path)(tokens), theirs(tokens).last_hidden_state) < 1e-5


@pytest.mark.parametrize(
    "name, field, value, message",
    [
        ("GPT-2-GPT2LMHeadModel", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True"),
        ("BERT-BertForMaskedLM", "position_embedding_type", "relative_key", "position_embedding_type='relative_key'"),
        ("RoBERTa-RobertaForMaskedLM", "pad_token_id", 0, "pad_token_id=0: only 1 is supported"),
        ("Llama 3-LlamaForCausalLM", "rope_parameters", {"rope_type": "yarn"}, "rope type 'yarn' is not supported"),
        ("Llama 3-LlamaForCausalLM", "hidden_act", "relu6", "hidden_act='relu6'"),
        ("BART-BartForConditionalGeneration", "decoder_ffn_dim", 41, "only equal ones are supported"),
        ("T5-T5ForConditionalGeneration", "feed_forward_proj", "gated-mish", "'mish' is none of"),
        ("Phi-3-Phi3ForCausalLM", "embd_pdrop", 0.1, "embd_pdrop=0.1"),
        ("Phi-3-Phi3ForCausalLM", "rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_would_change_the_computation_is_refused(name, field, value, message, aged):
    _, _, folder = aged(name, config=lambda described: described.update({field: value}))
    with pytest.raises(ValueError, match=message):
        load_hf(folder)


def test_heads_of_mbart_are_refused(aged):
    """They pool at the end token, which is not the last: numbers would be near and wrong."""
    _, _, folder = aged(
        "mBART-MBartForConditionalGeneration",
        config=lambda described: described.update(architectures=["MBartForSequenceClassification"]),
    )
    with pytest.raises(ValueError, match=r"architecture .*MBartForSequenceClassification.* is not supported"):
        load_hf(folder)
