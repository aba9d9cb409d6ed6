"""Prompt tuning and P-tuning beside Hugging Face peft's: the same numbers, the same files, and where theirs differ."""

import copy
import json

import pytest
import torch
from torch import nn

from minillm.models import HeadConfig
from minillm.models.families.load import load_hf
from minillm.peft import flatten, load_adapter, save_adapter, tune
from minillm.peft.prompt import PromptConfig
from minillm.peft.ptuning import PTuningConfig

pytest.importorskip("peft")

P, T = 5, 9
DECODER = dict(vocab_size=61, hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40)
CASES = {  # name -> class in transformers, its config, peft's task
    "llama": ("Llama", "ForCausalLM", DECODER | dict(num_key_value_heads=2, rms_norm_eps=1e-3), "CAUSAL_LM"),
    "gpt2": ("GPT2", "LMHeadModel", dict(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=40), "CAUSAL_LM"),
    "bert": ("Bert", "Model", DECODER | dict(max_position_embeddings=40, pad_token_id=0), "FEATURE_EXTRACTION"),
    "roberta": ("Roberta", "Model", DECODER | dict(max_position_embeddings=42, pad_token_id=1), "FEATURE_EXTRACTION"),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        dict(vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
        | dict(relative_attention_num_buckets=8, relative_attention_max_distance=10),
        "SEQ_2_SEQ_LM",
    ),
    "mbart": (
        "MBart",
        "ForConditionalGeneration",
        dict(vocab_size=61, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
        | dict(decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=40)
        | dict(scale_embedding=True, decoder_start_token_id=4),
        "SEQ_2_SEQ_LM",
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)


def twins(name, folder):
    """(our model, theirs) with the same random weights, in float64 and eval mode; no weight is small, no norm is 1."""
    import transformers

    start, end, fields, _ = CASES[name]
    theirs = getattr(transformers, start + end)(getattr(transformers, start + "Config")(**fields)).eval()
    with torch.no_grad():
        for parameter_name, p in theirs.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1 and parameter_name.endswith("weight")))
    theirs.save_pretrained(folder)
    ours = load_hf(folder, dtype=torch.float64).eval()
    return (ours.body if end == "Model" else ours), doubled(theirs)  # without BERT's pooler


def doubled(theirs):
    """Their RMSNorms round to float32 whatever the dtype; torch's own does not."""
    theirs = theirs.double()
    for name, module in list(theirs.named_modules()):
        if type(module).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            theirs.set_submodule(name, norm)
    return theirs


def with_peft(theirs, name, vectors, submodules=1):
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type=CASES[name][3], num_virtual_tokens=P, num_transformer_submodules=submodules)
    model = get_peft_model(theirs, config).double().eval()
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight[:P] = vectors
    return model


def ours_computes(ours, tokens, target, **masks):
    if ours.config.kind == "encoder_decoder":
        return ours(tokens, target, **{"source_mask" if k == "mask" else k: v for k, v in masks.items()})
    return ours(tokens, **masks)


def theirs_computes(theirs, kind, tokens, target, mask=None):
    extra = {"decoder_input_ids": target} if kind == "encoder_decoder" else {}
    out = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask.long(), **extra)
    if kind == "encoder":
        return out.last_hidden_state[:, P:]
    return out.logits if kind == "encoder_decoder" else out.logits[:, P:]


@pytest.fixture
def tokens():
    return torch.randint(5, 61, (3, T))


@pytest.fixture
def target():
    return torch.randint(5, 61, (3, 6))


@EVERY
@pytest.mark.parametrize("padded", [False, True], ids=["full", "right padded"])
def test_outputs_and_gradients_are_peft_s(name, padded, tokens, target, tmp_path):
    ours, theirs = twins(name, tmp_path)
    kind, mask = ours.config.kind, None
    if padded:
        mask = torch.arange(T) < torch.tensor([[T], [4], [1]])
        tokens = tokens.masked_fill(~mask, 1 if name == "roberta" else 0)
    tune(ours, PromptConfig(length=P))
    peft_model = with_peft(theirs, name, ours.prompt.embeddings)
    outputs = ours_computes(ours, tokens, target, **({} if mask is None else {"mask": mask}))
    expected = theirs_computes(peft_model, kind, tokens, target, mask)
    real = mask if padded and kind != "encoder_decoder" else torch.ones(outputs.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(outputs[real], expected[real], rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(outputs) * real[..., None]
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient = peft_model.prompt_encoder.default.embedding.weight.grad
    torch.testing.assert_close(ours.prompt.embeddings.grad, gradient, rtol=1e-8, atol=1e-9)
    assert gradient.abs().amax() > 1e-3


def test_left_padding_moves_peft_s_prompt_away_from_the_text(tokens, tmp_path):
    """peft #1093, #54, PR #1212: prompt | pads | text. Without it the base is right (RoPE), and so is ours with it."""
    ours, theirs = twins("llama", tmp_path)
    left = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, T)], 1).bool()

    def moved(compute):
        return (compute(left, mask)[:, -T:] - compute(tokens, torch.ones(3, T, dtype=torch.bool))[:, -T:]).abs().max()

    with torch.no_grad():
        base = moved(lambda x, m: theirs(input_ids=x, attention_mask=m.long()).logits)
        tune(ours, PromptConfig(length=P))
        peft_model = with_peft(theirs, "llama", ours.prompt.embeddings)
        peft_moves = moved(lambda x, m: theirs_computes(peft_model, "decoder", x, None, m))
        ours_moves = moved(lambda x, m: ours(x, mask=m))
    # logits around 10; they turn in float32 whatever the dtype, which moves the base alone by 1e-6
    assert base < 1e-5 and ours_moves < 1e-12 and peft_moves > 1e-2, (base, ours_moves, peft_moves)


def test_half_of_peft_s_t5_prompt_is_dead(tokens, target, tmp_path):
    ours, theirs = twins("t5", tmp_path)
    tune(ours, PromptConfig(length=P))
    peft_model = with_peft(theirs, "t5", ours.prompt.embeddings, submodules=2)
    expected = theirs_computes(peft_model, "encoder_decoder", tokens, target)
    torch.testing.assert_close(ours(tokens, target), expected, rtol=1e-9, atol=1e-9)
    expected.square().sum().backward()
    gradient = peft_model.prompt_encoder.default.embedding.weight.grad
    assert gradient.shape == (2 * P, 24) and gradient[:P].abs().amin() > 0 and not gradient[P:].any()
    assert ours.prompt.embeddings.shape == (P, 24)


def test_peft_pools_a_virtual_token_of_bert_and_ours_cls(tokens, tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    theirs = BertForSequenceClassification(BertConfig(**CASES["bert"][2], num_labels=3)).double().eval()
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, dtype=torch.float64).eval()
    tune(ours, PromptConfig(length=P))
    peft_model = get_peft_model(theirs, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)).double().eval()
    with torch.no_grad():
        peft_model.prompt_encoder.default.embedding.weight.copy_(ours.body.prompt.embeddings)
        embeds = torch.cat([ours.body.prompt.embeddings.expand(3, -1, -1), ours.embed_tokens(tokens)], 1)
        states = theirs.bert(inputs_embeds=embeds).last_hidden_state

        def classify(position):
            return theirs.classifier(theirs.bert.pooler(states[:, position:]))

        logits = peft_model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(logits, classify(0))
    torch.testing.assert_close(ours(tokens), classify(P))
    assert not torch.allclose(classify(0), classify(P), atol=1e-4)


# files


@EVERY
def test_peft_reads_what_we_write(name, tokens, target, tmp_path):
    from peft import PeftModel

    ours, theirs = twins(name, tmp_path / "base")
    tune(ours, PromptConfig(length=P))
    with torch.no_grad():
        ours.prompt.embeddings.normal_()
    save_adapter(ours, tmp_path / "adapter", base="somewhere")
    peft_model = PeftModel.from_pretrained(theirs, tmp_path / "adapter").double().eval()
    expected = ours_computes(ours, tokens, target)
    # the file is float64, peft keeps prompts in float32
    torch.testing.assert_close(
        theirs_computes(peft_model, ours.config.kind, tokens, target), expected, rtol=1e-5, atol=1e-5
    )


@EVERY
@pytest.mark.parametrize("submodules", [1, 2])
def test_we_read_what_peft_writes(name, submodules, tokens, target, tmp_path):
    """Also an encoder-decoder's with its dead half, which is left out."""
    ours, theirs = twins(name, tmp_path / "base")
    if submodules == 2 and ours.config.kind != "encoder_decoder":
        submodules = None  # what peft finds out by itself
    peft_model = with_peft(theirs, name, torch.randn(P, 24), submodules)
    peft_model.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(
        ours_computes(ours.eval(), tokens, target),
        theirs_computes(peft_model, ours.config.kind, tokens, target),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("method", ["MLP", "LSTM"])
def test_we_read_peft_s_p_tuning_as_a_prompt(method, tokens, tmp_path):
    """The network is not in their file ("Cannot set a prompt learning adapter to trainable"); the prompt trains on."""
    from peft import PromptEncoderConfig, get_peft_model

    ours, theirs = twins("gpt2", tmp_path / "base")
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_hidden_size=10,
        encoder_reparameterization_type=method,
    )
    peft_model = get_peft_model(theirs, config).double().eval()
    peft_model.save_pretrained(tmp_path / "adapter")
    assert load_adapter(ours, tmp_path / "adapter").method == "prompt"
    expected = theirs_computes(peft_model, "decoder", tokens, None)
    outputs = ours.eval()(tokens)
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
    outputs.sum().backward()
    assert ours.prompt.embeddings.grad.abs().min() > 0


def test_a_flattened_p_tuning_is_read_by_peft(tokens, tmp_path):
    from peft import PeftModel

    ours, theirs = twins("llama", tmp_path / "base")
    tune(ours, PTuningConfig(length=P, hidden_size=7))
    expected = ours(tokens)
    save_adapter(ours, tmp_path / "network")
    with pytest.raises((ValueError, KeyError)):  # it has no such type, so it cannot read half of it
        PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "network")
    flatten(ours)
    save_adapter(ours, tmp_path / "flat")
    peft_model = PeftModel.from_pretrained(theirs, tmp_path / "flat").double().eval()
    torch.testing.assert_close(theirs_computes(peft_model, "decoder", tokens, None), expected, rtol=1e-5, atol=1e-5)


def test_a_tagger_s_prompt_and_head_are_read(tokens, tmp_path):
    """Each token's own state is read there, so it means the same here; the head stands one level higher in the file."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import BertConfig, BertForTokenClassification

    theirs = BertForTokenClassification(BertConfig(**CASES["bert"][2], num_labels=3)).double().eval()
    theirs.save_pretrained(tmp_path / "base")
    ours = load_hf(tmp_path / "base", dtype=torch.float64).eval()
    peft_model = get_peft_model(theirs, PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=P)).double().eval()
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.normal_()
    peft_model.save_pretrained(tmp_path / "adapter")
    assert load_adapter(ours, tmp_path / "adapter").trainable == P * 24 + 24 * 3 + 3
    expected = peft_model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, P:]
    torch.testing.assert_close(ours.eval()(tokens), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("task", ["SEQ_CLS", "QUESTION_ANS"])
def test_a_prompt_that_was_trained_under_a_head_wants_such_a_head(task, tiny_decoder, tmp_path):
    fields = {"peft_type": "PROMPT_TUNING", "task_type": task, "num_virtual_tokens": P}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"trained for peft's {task}, and this Decoder is for CAUSAL_LM"):
        load_adapter(tiny_decoder, tmp_path)


def test_on_a_classifier_peft_is_told_that_it_cannot_read_it(tmp_path):
    """It would pool a virtual token in place of [CLS], silently."""
    from peft import PeftConfig
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig(**CASES["bert"][2])).save_pretrained(tmp_path / "base")
    ours = load_hf(tmp_path / "base")
    assert ours.head_config.task == HeadConfig().task
    tune(ours, PromptConfig(length=P, trainable=("classifier",)))
    save_adapter(ours, tmp_path / "adapter")
    with pytest.raises((ValueError, KeyError)):
        PeftConfig.from_pretrained(tmp_path / "adapter")


@EVERY
def test_their_keys_and_fields(name, tmp_path):
    """As in a folder that peft wrote: one bare key, and what it needs to know of the model."""
    from safetensors.torch import load_file

    ours, _ = twins(name, tmp_path / "base")
    tune(ours, PromptConfig(length=P))
    save_adapter(ours, tmp_path / "adapter")
    assert {k: t.shape for k, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()} == {
        "prompt_embeddings": (P, 24)
    }
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    expected = {"peft_type": "PROMPT_TUNING", "task_type": CASES[name][3], "num_virtual_tokens": P, "token_dim": 24}
    expected |= {"num_transformer_submodules": 1, "num_attention_heads": 4, "num_layers": 2, "inference_mode": True}
    assert fields.items() >= expected.items()
