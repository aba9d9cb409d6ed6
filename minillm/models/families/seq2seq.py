"""Encoder-decoder families: T5 and BART, each with its relatives."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minillm.models.config import ModelConfig
from minillm.models.families.family import ACTIVATION_NAMES, BODY, LM, REQUIRED, Architecture, Family
from minillm.models.heads import HeadConfig

_CLASSIFIER = HeadConfig(task="classification", pool="last", dense="tanh", dropout=0.0)
_SPAN = HeadConfig(task="span", dense=None, dropout=0.0)
_HEAD = {"pooler.dense": "classification_head.dense", "classifier": "classification_head.out_proj"}


def _read_t5(theirs: dict[str, Any]) -> dict[str, Any]:
    """What T5 derives: gated or not, the scale of the logits, the decoder's first token.

    Whether the head is tied is seen from the file: configs of T5 v1.1 are not of one mind about it. They say
    `tie_word_embeddings: false` to mean that the head's input is not scaled by D^-0.5.
    """
    gate, _, activation = str(theirs.get("feed_forward_proj", "relu")).rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"feed_forward_proj={theirs['feed_forward_proj']!r}: expected an activation or gated-...")
    activation = "gelu_new" if gate and activation == "gelu" else activation
    if activation not in ACTIVATION_NAMES:
        raise ValueError(f"feed_forward_proj: {activation!r} is none of {', '.join(ACTIVATION_NAMES)}")
    scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
    start = theirs.get("decoder_start_token_id")
    return {
        "mlp": "gated" if gate else "plain",
        "activation": ACTIVATION_NAMES[activation],
        "tie_embeddings": True,
        "logit_scale": theirs["d_model"] ** -0.5 if scaled and theirs["d_model"] else 1.0,
        "decoder_start_id": start if start is not None else theirs.get("pad_token_id") or 0,
    }


def _write_t5(config: ModelConfig) -> dict[str, Any]:
    scaled = math.isclose(config.logit_scale, config.hidden_size**-0.5)
    if not scaled and config.logit_scale != 1.0:
        raise ValueError(f"logit_scale={config.logit_scale}: T5 has 1 or hidden_size^-0.5")
    activation = {"gelu_tanh": "gelu"}.get(config.activation, config.activation)
    if config.mlp == "plain":
        activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    elif config.activation == "gelu":
        raise ValueError("activation='gelu' in a gated MLP: T5's gated-gelu is the approximation, gelu_tanh")
    return {
        "feed_forward_proj": activation if config.mlp == "plain" else f"gated-{activation}",
        "scale_decoder_outputs": scaled,
        "tie_word_embeddings": scaled,
        "decoder_start_token_id": config.decoder_start_id,
        "is_encoder_decoder": True,
    }


def _t5_modules(mlp: Mapping[str, str]) -> dict[str | tuple[str, ...], str]:
    modules = {"encoder.embed_tokens": "shared"}
    for side, cross in (("encoder", False), ("decoder", True)):
        self_attn, last = f"{side}.block.*.layer.0", f"{side}.block.*.layer.{2 if cross else 1}"
        modules[f"{side}.relative_positions"] = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
        modules[f"{side}.layers.*.attn_norm"] = f"{self_attn}.layer_norm"
        for letter in "qkvo":
            modules[f"{side}.layers.*.self_attn.{letter}_proj"] = f"{self_attn}.SelfAttention.{letter}"
            if cross:
                modules[f"{side}.layers.*.cross_attn.{letter}_proj"] = (
                    f"{side}.block.*.layer.1.EncDecAttention.{letter}"
                )
        if cross:
            modules[f"{side}.layers.*.cross_attn_norm"] = f"{side}.block.*.layer.1.layer_norm"
        modules[f"{side}.layers.*.mlp_norm"] = f"{last}.layer_norm"
        for ours, theirs in mlp.items():
            modules[f"{side}.layers.*.mlp.{ours}"] = f"{last}.DenseReluDense.{theirs}"
        modules[f"{side}.norm"] = f"{side}.final_layer_norm"
    return modules


T5 = Family(
    name="T5",  # Raffel et al. 2020, arXiv:1910.10683
    model_types=("t5",),
    applies=lambda theirs: not str(theirs.get("feed_forward_proj", "relu")).startswith("gated"),
    fixed={
        "kind": "encoder_decoder",
        "positions": "relative",
        "norm": "rms",
        "norm_first": True,
        "mlp": "plain",
        "attention_bias": False,
        "mlp_bias": False,
        "max_positions": 2**20,  # its biases reach any distance: no limit but memory
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("d_model", REQUIRED),
        "head_dim": ("d_kv", 64),
        "intermediate_size": ("d_ff", REQUIRED),
        "num_layers": ("num_layers", REQUIRED),
        "num_decoder_layers": ("num_decoder_layers", None),
        "num_heads": ("num_heads", REQUIRED),
        "relative_buckets": ("relative_attention_num_buckets", 32),
        "relative_distance": ("relative_attention_max_distance", 128),
        "norm_eps": ("layer_norm_epsilon", 1e-6),
        "dropout": ("dropout_rate", 0.1),
    },
    read=_read_t5,
    write=_write_t5,
    modules=_t5_modules({"up_proj": "wi", "down_proj": "wo"}),
    token_ids={"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0},
    ignored=(r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    repeats={
        "{prefix}encoder.embed_tokens.weight": "{prefix}shared.weight",
        "{prefix}decoder.embed_tokens.weight": "{prefix}shared.weight",
    },
    architectures=(
        Architecture("T5ForConditionalGeneration", LM, "", {"decoder.lm_head": "lm_head"}),
        Architecture("T5Model", BODY),
        Architecture("T5ForSequenceClassification", "classification", "transformer.", _HEAD, _CLASSIFIER),
        Architecture("T5ForQuestionAnswering", "span", "", {"outputs": "qa_outputs"}, _SPAN),
        Architecture("T5WithLMHeadModel", LM, "", {"decoder.lm_head": "lm_head"}),  # the class's name before 2020
    ),
)

# T5 v1.1 (Shazeer 2020, arXiv:2002.05202) and Flan-T5 (Chung et al. 2022, arXiv:2210.11416)
T5_GATED = replace(
    T5,
    name="T5 v1.1",
    applies=lambda theirs: not T5.applies(theirs),
    fixed=T5.fixed | {"mlp": "gated"},
    modules=_t5_modules({"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}),
)


def _read_bart(theirs: dict[str, Any]) -> dict[str, Any]:
    for name in ("ffn_dim", "attention_heads"):
        both = [theirs.get(f"{side}_{name}") for side in ("encoder", "decoder")]
        if None not in both and both[0] != both[1]:
            raise ValueError(f"encoder_{name}={both[0]} and decoder_{name}={both[1]}: only equal ones are supported")
    start = theirs.get("decoder_start_token_id")
    return {"decoder_start_id": start if start is not None else theirs.get("eos_token_id", 2)}


def _read_mbart(theirs: dict[str, Any]) -> dict[str, Any]:
    """The first token is the language's, so old files name none; transformers then generates from bos."""
    if theirs.get("decoder_start_token_id") is None:
        theirs = theirs | {"decoder_start_token_id": theirs.get("bos_token_id", 0)}
    return _read_bart(theirs)


def _write_bart(config: ModelConfig) -> dict[str, Any]:
    return {
        "decoder_ffn_dim": config.intermediate_size,
        "decoder_attention_heads": config.num_heads,
        "decoder_start_token_id": config.decoder_start_id,
        "is_encoder_decoder": True,
    }


def _bart_modules(final_norm: bool) -> dict[str | tuple[str, ...], str]:
    modules = {"encoder.embed_tokens": "shared"}
    for side, cross in (("encoder", False), ("decoder", True)):
        ours, theirs = f"{side}.layers.*", f"{side}.layers.*"
        modules[f"{side}.embed_positions"] = f"{side}.embed_positions"
        modules[f"{side}.embed_norm"] = f"{side}.layernorm_embedding"
        for attention, name in (("self_attn", "self_attn"), *([("cross_attn", "encoder_attn")] if cross else [])):
            for letter in "qkv":
                modules[f"{ours}.{attention}.{letter}_proj"] = f"{theirs}.{name}.{letter}_proj"
            modules[f"{ours}.{attention}.o_proj"] = f"{theirs}.{name}.out_proj"
        modules[f"{ours}.attn_norm"] = f"{theirs}.self_attn_layer_norm"
        if cross:
            modules[f"{ours}.cross_attn_norm"] = f"{theirs}.encoder_attn_layer_norm"
        modules[f"{ours}.mlp.up_proj"], modules[f"{ours}.mlp.down_proj"] = f"{theirs}.fc1", f"{theirs}.fc2"
        modules[f"{ours}.mlp_norm"] = f"{theirs}.final_layer_norm"
        if final_norm:
            modules[f"{side}.norm"] = f"{side}.layer_norm"
    return modules


def _copies(prefix: str) -> dict[str, str]:
    return {f"{prefix}{side}.embed_tokens.weight": f"{prefix}shared.weight" for side in ("encoder", "decoder")}


def _like_bart(name: str) -> tuple[Architecture, ...]:
    copies = _copies("model.")
    return (
        Architecture(
            f"{name}ForConditionalGeneration",
            LM,
            "model.",
            {"decoder.lm_head": "lm_head"},
            zeros={"final_logits_bias": lambda config: (1, config.vocab_size)},
            untied=copies,
        ),
        Architecture(f"{name}Model", BODY, untied=_copies("")),
        Architecture(f"{name}ForSequenceClassification", "classification", "model.", _HEAD, _CLASSIFIER, untied=copies),
        Architecture(f"{name}ForQuestionAnswering", "span", "model.", {"outputs": "qa_outputs"}, _SPAN, untied=copies),
    )


BART = Family(
    name="BART",  # Lewis et al. 2019, arXiv:1910.13461
    model_types=("bart",),
    fixed={
        "kind": "encoder_decoder",
        "positions": "learned",
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_first": False,
        "embed_norm": True,
        "mlp": "plain",
        "attention_bias": True,
        "mlp_bias": True,
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("d_model", REQUIRED),
        "num_layers": ("encoder_layers", REQUIRED),
        "num_decoder_layers": ("decoder_layers", REQUIRED),
        "num_heads": ("encoder_attention_heads", REQUIRED),
        "intermediate_size": ("encoder_ffn_dim", REQUIRED),
        "max_positions": ("max_position_embeddings", 1024),
        "activation": ("activation_function", "gelu"),
        "scale_embeddings": ("scale_embedding", False),
        "tie_embeddings": ("tie_word_embeddings", True),
        "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.0),
        "init_std": ("init_std", 0.02),
    },
    demanded=dict.fromkeys(("normalize_before", "add_final_layer_norm", "static_position_embeddings"), (False, None)),
    read=_read_bart,
    write=_write_bart,
    modules=_bart_modules(final_norm=False),
    token_ids={"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    skipped_rows={"encoder.embed_positions": 2, "decoder.embed_positions": 2},
    ignored=(r"(model\.)?(encoder|decoder)\.version",),  # fairseq's
    repeats={
        "{prefix}encoder.embed_tokens.weight": "{prefix}shared.weight",
        "{prefix}decoder.embed_tokens.weight": "{prefix}shared.weight",
    },
    architectures=_like_bart("Bart"),
)

MBART = replace(
    BART,
    name="mBART",  # Liu et al. 2020, arXiv:2001.08210
    model_types=("mbart",),
    fixed=BART.fixed | {"norm_first": True},
    demanded={},
    read=_read_mbart,
    modules=_bart_modules(final_norm=True),
    # not its heads: they read the state at </s>, which stands before the language, after the language as first input
    architectures=_like_bart("MBart")[:2],
)
