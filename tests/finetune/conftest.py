"""Tiny random models of transformers, the folders they saved themselves to, and the same inputs for them and ours."""

import copy
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

VOCAB = 61
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=64,
    pad_token_id=None,
)
BERT = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=66,
    pad_token_id=1,
)
BART = dict(
    vocab_size=VOCAB,
    d_model=24,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    max_position_embeddings=64,
)
GPT2 = dict(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
T5 = dict(
    vocab_size=VOCAB,
    d_model=24,
    d_kv=5,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    decoder_start_token_id=0,
)
DISTILBERT = dict(vocab_size=VOCAB, dim=24, n_heads=4, hidden_dim=40, n_layers=2)
LABELS = dict(num_labels=3)
MODELS = {  # name -> class in transformers, the fields of its config
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-classifier": ("GPT2ForSequenceClassification", GPT2 | LABELS),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-classifier": ("LlamaForSequenceClassification", LLAMA | LABELS | dict(pad_token_id=0)),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | dict(tie_word_embeddings=True)),
    "qwen2-sliding": (
        "Qwen2ForCausalLM",
        LLAMA | dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "phi3": ("Phi3ForCausalLM", LLAMA | dict(pad_token_id=0)),
    "bert-masked-lm": ("BertForMaskedLM", BERT | dict(pad_token_id=0)),
    "bert-classifier": ("BertForSequenceClassification", BERT | LABELS | dict(pad_token_id=0)),
    "bert-span": ("BertForQuestionAnswering", BERT | dict(pad_token_id=0)),
    "roberta-classifier": ("RobertaForSequenceClassification", BERT | LABELS | dict(type_vocab_size=1)),
    "roberta-choice": ("RobertaForMultipleChoice", BERT | dict(type_vocab_size=1)),
    "camembert-tagger": ("CamembertForTokenClassification", BERT | LABELS | dict(type_vocab_size=1)),
    "distilbert": ("DistilBertModel", DISTILBERT),
    "distilbert-classifier": ("DistilBertForSequenceClassification", DISTILBERT | LABELS),
    "distilbert-tagger": ("DistilBertForTokenClassification", DISTILBERT | LABELS),
    "bert-body": ("BertModel", BERT | dict(pad_token_id=0)),
    "bert-tagger": ("BertForTokenClassification", BERT | LABELS | dict(pad_token_id=0)),
    "bert-choice": ("BertForMultipleChoice", BERT | dict(pad_token_id=0)),
    "roberta-span": ("RobertaForQuestionAnswering", BERT | dict(type_vocab_size=1)),
    "gpt2-body": ("GPT2Model", GPT2),
    "gpt2-tagger": ("GPT2ForTokenClassification", GPT2 | LABELS),
    "llama-span": ("LlamaForQuestionAnswering", LLAMA | dict(pad_token_id=0)),
    "t5-even": ("T5ForConditionalGeneration", T5 | dict(num_decoder_layers=2)),
    "t5-classifier": ("T5ForSequenceClassification", T5 | LABELS),
    "bart-even": ("BartForConditionalGeneration", BART | dict(decoder_layers=2)),
    "bart-span": ("BartForQuestionAnswering", BART),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-body": ("T5Model", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "bart-classifier": ("BartForSequenceClassification", BART | LABELS),
    "mbart-body": ("MBartModel", BART | dict(scale_embedding=True, decoder_start_token_id=4)),
}


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """`theirs(name)` -> (a transformers model of one's own, the folder where its weights are)."""
    made: dict[str, tuple[nn.Module, Path]] = {}

    def make(name: str) -> tuple[nn.Module, Path]:
        if name not in made:
            model, folder = _random(name), tmp_path_factory.mktemp("theirs")
            model.save_pretrained(folder)
            made[name] = model, folder
        return copy.deepcopy(made[name][0]), made[name][1]

    return make


def _random(name: str) -> nn.Module:
    """In eval mode, with weights that leave nothing out: no bias is 0, no norm 1, no attention flat."""
    import transformers

    class_name, fields = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        cls = getattr(transformers, class_name)
        model = cls(cls.config_class(**fields)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(std=0.2).add_(1.0 if key.endswith("weight") else 0.0)
                else:
                    parameter.normal_(std=0.2)
    return model


@pytest.fixture
def both_answer():
    """`both_answer(name, ours, theirs)` -> what the two models answer to the same random tokens."""

    @torch.no_grad()
    def answers(name: str, ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
        batch, theirs_too = _inputs(name)
        out = theirs(**theirs_too)
        if "start_logits" in out:
            return ours(**batch), torch.stack([out.start_logits, out.end_logits], dim=-1)
        return ours(**batch), out["logits" if "logits" in out else "last_hidden_state"]

    return answers


def _inputs(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same under our names and under theirs."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, VOCAB, (3, 2, 9) if "choice" in name else (3, 9), generator=generator)
    if name == "bart-classifier":
        tokens[:, -1] = 2  # its head reads the state at the end token
    if name in ("t5", "t5-body", "bart", "mbart-body"):
        target = torch.randint(5, VOCAB, (3, 6), generator=generator)
        return {"source": tokens, "tokens": target}, {"input_ids": tokens, "decoder_input_ids": target}
    if name.startswith("bert"):
        types = torch.randint(0, 2, tokens.shape, generator=generator)
        return {"tokens": tokens, "token_types": types}, {"input_ids": tokens, "token_type_ids": types}
    return {"tokens": tokens}, {"input_ids": tokens}


@pytest.fixture
def perturb():
    """Move everything that trains off its start, as training would: no B is zero, no factor one."""

    def move(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return move


@pytest.fixture
def close():
    """`close(one, other)`: equal but for the rounding of float32, relative to the largest value."""

    def check(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()

    return check
