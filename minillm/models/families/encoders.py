"""Encoder families: BERT, RoBERTa with those that follow it, and DistilBERT."""

from dataclasses import replace
from typing import Any

from minillm.models.families.family import BODY, REQUIRED, Architecture, Family
from minillm.models.heads import HeadConfig

_CLASSIFIER = HeadConfig(task="classification", dense="tanh")
_TAGGER = HeadConfig(task="tagging", dense=None)
_SPAN = HeadConfig(task="span", dense=None, dropout=0.0)
_CHOICE = HeadConfig(task="choice", num_labels=1, dense="tanh")
_POOLED = HeadConfig(task="embedding", dense="tanh", dropout=0.0)
_MASKED_LM = HeadConfig(task="masked_lm", dense=None, dropout=0.0)
_FIXED = {
    "kind": "encoder",
    "positions": "learned",
    "norm": "layer",
    "norm_first": False,
    "embed_norm": True,
    "mlp": "plain",
    "attention_bias": True,
    "mlp_bias": True,
}

_BERT_MASKED_LM = Architecture(
    "BertForMaskedLM",
    "masked_lm",
    "bert.",
    {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "lm_head.bias": "cls.predictions.bias",
        "lm_head.weight": "cls.predictions.decoder.weight",
    },
    _MASKED_LM,
    unused=(r"cls\.seq_relationship\.(weight|bias)", r"bert\.pooler\.dense\.(weight|bias)"),
    untied={"cls.predictions.decoder.bias": "cls.predictions.bias"},
)

_POSITION_IDS = r"(\w+\.)?embeddings\.(position_ids|token_type_ids)"

BERT = Family(
    name="BERT",  # Devlin et al. 2018, arXiv:1810.04805
    model_types=("bert",),
    fixed=_FIXED,
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("hidden_size", REQUIRED),
        "num_layers": ("num_hidden_layers", REQUIRED),
        "num_heads": ("num_attention_heads", REQUIRED),
        "intermediate_size": ("intermediate_size", REQUIRED),
        "max_positions": ("max_position_embeddings", 512),
        "norm_eps": ("layer_norm_eps", 1e-12),
        "activation": ("hidden_act", "gelu"),
        "token_types": ("type_vocab_size", 2),
        "tie_embeddings": ("tie_word_embeddings", True),
        "dropout": ("hidden_dropout_prob", 0.1),
        "attention_dropout": ("attention_probs_dropout_prob", 0.1),
        "init_std": ("initializer_range", 0.02),
    },
    demanded={
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    modules={
        "embed_tokens": "embeddings.word_embeddings",
        "embed_positions": "embeddings.position_embeddings",
        "embed_types": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "layers.*.self_attn.q_proj": "encoder.layer.*.attention.self.query",
        "layers.*.self_attn.k_proj": "encoder.layer.*.attention.self.key",
        "layers.*.self_attn.v_proj": "encoder.layer.*.attention.self.value",
        "layers.*.self_attn.o_proj": "encoder.layer.*.attention.output.dense",
        "layers.*.attn_norm": "encoder.layer.*.attention.output.LayerNorm",
        "layers.*.mlp.up_proj": "encoder.layer.*.intermediate.dense",
        "layers.*.mlp.down_proj": "encoder.layer.*.output.dense",
        "layers.*.mlp_norm": "encoder.layer.*.output.LayerNorm",
    },
    token_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
    ignored=(_POSITION_IDS,),
    architectures=(
        _BERT_MASKED_LM,
        Architecture(
            "BertModel",
            "embedding",
            "",
            {"pooler.dense": "{prefix}pooler.dense"},
            _POOLED,
        ),
        Architecture("BertModel", BODY, unused=(r"(bert\.)?pooler\.dense\.(weight|bias)",)),
        Architecture(
            "BertForSequenceClassification",
            "classification",
            "bert.",
            {"pooler.dense": "{prefix}pooler.dense", "classifier": "classifier"},
            _CLASSIFIER,
        ),
        Architecture(
            "BertForTokenClassification",
            "tagging",
            "bert.",
            {"classifier": "classifier"},
            _TAGGER,
            unused=(r"bert\.pooler\.dense\.(weight|bias)",),
        ),
        Architecture(
            "BertForQuestionAnswering",
            "span",
            "bert.",
            {"outputs": "qa_outputs"},
            _SPAN,
            unused=(r"bert\.pooler\.dense\.(weight|bias)",),
        ),
        Architecture(
            "BertForMultipleChoice",
            "choice",
            "bert.",
            {"pooler.dense": "{prefix}pooler.dense", "classifier": "classifier"},
            _CHOICE,
        ),
        replace(_BERT_MASKED_LM, name="BertForPreTraining"),
    ),
)


def _like_roberta(name: str) -> tuple[Architecture, ...]:
    pooler = (r"roberta\.pooler\.dense\.(weight|bias)",)
    return (
        Architecture(
            f"{name}ForMaskedLM",
            "masked_lm",
            "roberta.",
            {
                "dense": "lm_head.dense",
                "norm": "lm_head.layer_norm",
                "lm_head.bias": "lm_head.bias",
                "lm_head.weight": "lm_head.decoder.weight",
            },
            _MASKED_LM,
            unused=pooler,
            untied={"lm_head.decoder.bias": "lm_head.bias"},
        ),
        Architecture(f"{name}Model", "embedding", "", {"pooler.dense": "{prefix}pooler.dense"}, _POOLED),
        Architecture(f"{name}Model", BODY, unused=(r"(roberta\.)?pooler\.dense\.(weight|bias)",)),
        Architecture(
            f"{name}ForSequenceClassification",
            "classification",
            "roberta.",
            {"pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
            _CLASSIFIER,
            unused=pooler,
        ),
        Architecture(
            f"{name}ForTokenClassification", "tagging", "roberta.", {"classifier": "classifier"}, _TAGGER, pooler
        ),
        Architecture(f"{name}ForQuestionAnswering", "span", "roberta.", {"outputs": "qa_outputs"}, _SPAN, pooler),
        Architecture(
            f"{name}ForMultipleChoice",
            "choice",
            "roberta.",
            {"pooler.dense": "{prefix}pooler.dense", "classifier": "classifier"},
            _CHOICE,
        ),
    )


def _read_positions(theirs: dict[str, Any]) -> dict[str, Any]:
    """The table counts from the padding's id, 1: its first two rows belong to no position."""
    if theirs.get("pad_token_id", 1) != 1:
        raise ValueError(f"pad_token_id={theirs['pad_token_id']}: only 1 is supported, positions count from it")
    return {"max_positions": theirs.get("max_position_embeddings", 512) - 2}


ROBERTA = replace(
    BERT,
    name="RoBERTa",  # Liu et al. 2019, arXiv:1907.11692
    model_types=("roberta",),
    fields={ours: theirs for ours, theirs in BERT.fields.items() if ours != "max_positions"},
    read=_read_positions,
    write=lambda config: {"max_position_embeddings": config.max_positions + 2},
    demanded=BERT.demanded | {"hidden_act": ("gelu",)},  # the masked-LM head has GELU whatever the blocks have
    token_ids={"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    skipped_rows={"embeddings.position_embeddings": 2},
    architectures=_like_roberta("Roberta"),
)

# Martin et al. 2019, arXiv:1911.03894; SloBERTa (Ulcar & Robnik-Sikonja 2021) is of this kind
CAMEMBERT = replace(ROBERTA, name="CamemBERT", model_types=("camembert",), architectures=_like_roberta("Camembert"))

# Conneau et al. 2019, arXiv:1911.02116
XLM_ROBERTA = replace(
    ROBERTA, name="XLM-RoBERTa", model_types=("xlm-roberta",), architectures=_like_roberta("XLMRoberta")
)

_HEAD = {"pooler.dense": "pre_classifier", "classifier": "classifier"}

DISTILBERT = Family(
    name="DistilBERT",  # Sanh et al. 2019, arXiv:1910.01108
    model_types=("distilbert",),
    fixed=_FIXED | {"token_types": 0},
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("dim", REQUIRED),
        "num_layers": ("n_layers", REQUIRED),
        "num_heads": ("n_heads", REQUIRED),
        "intermediate_size": ("hidden_dim", REQUIRED),
        "max_positions": ("max_position_embeddings", 512),
        "activation": ("activation", "gelu"),
        "tie_embeddings": ("tie_word_embeddings", True),
        "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.1),
        "init_std": ("initializer_range", 0.02),
    },
    read=lambda theirs: {"norm_eps": 1e-12},
    modules={
        "embed_tokens": "embeddings.word_embeddings",
        "embed_positions": "embeddings.position_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "layers.*.self_attn.q_proj": "transformer.layer.*.attention.q_lin",
        "layers.*.self_attn.k_proj": "transformer.layer.*.attention.k_lin",
        "layers.*.self_attn.v_proj": "transformer.layer.*.attention.v_lin",
        "layers.*.self_attn.o_proj": "transformer.layer.*.attention.out_lin",
        "layers.*.attn_norm": "transformer.layer.*.sa_layer_norm",
        "layers.*.mlp.up_proj": "transformer.layer.*.ffn.lin1",
        "layers.*.mlp.down_proj": "transformer.layer.*.ffn.lin2",
        "layers.*.mlp_norm": "transformer.layer.*.output_layer_norm",
    },
    token_ids=BERT.token_ids,
    ignored=(_POSITION_IDS,),
    architectures=(
        Architecture(
            "DistilBertForMaskedLM",
            "masked_lm",
            "distilbert.",
            {"dense": "vocab_transform", "norm": "vocab_layer_norm", "lm_head": "vocab_projector"},
            _MASKED_LM,
        ),
        Architecture("DistilBertModel", BODY),
        Architecture(
            "DistilBertForSequenceClassification",
            "classification",
            "distilbert.",
            _HEAD,
            replace(_CLASSIFIER, dense="relu", dropout=0.2),
        ),
        Architecture(
            "DistilBertForTokenClassification", "tagging", "distilbert.", {"classifier": "classifier"}, _TAGGER
        ),
        Architecture("DistilBertForQuestionAnswering", "span", "distilbert.", {"outputs": "qa_outputs"}, _SPAN),
        Architecture(
            "DistilBertForMultipleChoice",
            "choice",
            "distilbert.",
            _HEAD,
            replace(_CHOICE, dense="relu", dropout=0.2),
        ),
    ),
)
