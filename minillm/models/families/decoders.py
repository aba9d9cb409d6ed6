"""Decoder families: GPT-2, and Llama with those that follow it."""

from dataclasses import replace
from typing import Any

from minillm.models.config import ModelConfig
from minillm.models.families.family import BODY, LM, REQUIRED, Architecture, Family
from minillm.models.heads import HeadConfig

_CLASSIFIER = HeadConfig(task="classification", pool="last", dense=None, bias=False, dropout=0.0)
_TAGGER = HeadConfig(task="tagging", dense=None)
_SPAN = HeadConfig(task="span", dense=None, dropout=0.0)


GPT2 = Family(
    name="GPT-2",  # Radford et al. 2019
    model_types=("gpt2",),
    fixed={
        "kind": "decoder",
        "positions": "learned",
        "norm": "layer",
        "norm_first": True,
        "mlp": "plain",
        "attention_bias": True,
        "mlp_bias": True,
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("n_embd", REQUIRED),
        "num_layers": ("n_layer", REQUIRED),
        "num_heads": ("n_head", REQUIRED),
        "intermediate_size": ("n_inner", None),
        "max_positions": ("n_positions", 1024),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "activation": ("activation_function", "gelu_new"),
        "tie_embeddings": ("tie_word_embeddings", True),
        "dropout": ("resid_pdrop", 0.1),
        "attention_dropout": ("attn_pdrop", 0.1),
        "init_std": ("initializer_range", 0.02),
    },
    write=lambda config: {"embd_pdrop": config.dropout},
    demanded={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    modules={
        "embed_tokens": "wte",
        "embed_positions": "wpe",
        "layers.*.attn_norm": "h.*.ln_1",
        ("layers.*.self_attn.q_proj", "layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj"): "h.*.attn.c_attn",
        "layers.*.self_attn.o_proj": "h.*.attn.c_proj",
        "layers.*.mlp_norm": "h.*.ln_2",
        "layers.*.mlp.up_proj": "h.*.mlp.c_fc",
        "layers.*.mlp.down_proj": "h.*.mlp.c_proj",
        "norm": "ln_f",
    },
    transposed=("c_attn", "c_proj", "c_fc"),
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    architectures=(
        Architecture("GPT2LMHeadModel", LM, "transformer.", {"lm_head": "lm_head"}),
        Architecture("GPT2Model", BODY),
        Architecture(
            "GPT2ForSequenceClassification", "classification", "transformer.", {"classifier": "score"}, _CLASSIFIER
        ),
        Architecture("GPT2ForTokenClassification", "tagging", "transformer.", {"classifier": "classifier"}, _TAGGER),
        Architecture("GPT2ForQuestionAnswering", "span", "transformer.", {"outputs": "qa_outputs"}, _SPAN),
    ),
)


def _read_rope(theirs: dict[str, Any]) -> dict[str, Any]:
    """Old files have `rope_theta` and `rope_scaling` (or nothing), newer ones both in `rope_parameters`."""
    if not isinstance(theirs.get("attention_bias", False), bool):
        raise ValueError(f"attention_bias={theirs['attention_bias']!r}: expected true or false, for all projections")
    rope = theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict) or not isinstance(theirs.get("rope_scaling") or {}, dict):
        raise ValueError("rope_parameters and rope_scaling: expected an object")
    scaling = {**(theirs.get("rope_scaling") or {}), **rope}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta", theirs.get("rope_theta", 10000.0))
    fraction = scaling.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise ValueError(f"partial_rotary_factor={fraction}: only 1.0 is supported, every feature of a head turns")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope type {kind!r} is not supported: it is one of default, linear, llama3")
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
    }
    if kind == "linear":
        names = {"factor": "factor"}
    elif "max_position_embeddings" in theirs:
        scaling = {"original_max_position_embeddings": theirs["max_position_embeddings"]} | scaling
    if missing := [name for name in names if name not in scaling]:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)}")
    given = {ours: scaling[name] for name, ours in names.items()}
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **given}}


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """The older form, which older and newer versions of transformers read."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    described: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        described |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {"rope_theta": config.rope_theta, "rope_scaling": described}


def _like_llama(name: str, span_prefix: str | None = "transformer.") -> tuple[Architecture, ...]:
    """`span_prefix`: of the class for question answering, which alone has another; None if there is no such class."""
    head = {"classifier": "score"}
    architectures = (
        Architecture(f"{name}ForCausalLM", LM, "model.", {"lm_head": "lm_head"}),
        Architecture(f"{name}Model", BODY),
        Architecture(f"{name}ForSequenceClassification", "classification", "model.", head, _CLASSIFIER),
        Architecture(f"{name}ForTokenClassification", "tagging", "model.", head, _TAGGER),
    )
    if span_prefix is None:
        return architectures
    spans = Architecture(f"{name}ForQuestionAnswering", "span", span_prefix, {"outputs": "qa_outputs"}, _SPAN)
    return (*architectures, spans)


LLAMA = Family(
    name="Llama",  # Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783
    model_types=("llama",),
    fixed={
        "kind": "decoder",
        "positions": "rope",
        "norm": "rms",
        "norm_first": True,
        "mlp": "gated",
        "qk_norm": False,
        "sliding_window": None,
        "dropout": 0.0,
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("hidden_size", REQUIRED),
        "num_layers": ("num_hidden_layers", REQUIRED),
        "num_heads": ("num_attention_heads", REQUIRED),
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "intermediate_size": ("intermediate_size", REQUIRED),
        "max_positions": ("max_position_embeddings", 2048),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "activation": ("hidden_act", "silu"),
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "tie_embeddings": ("tie_word_embeddings", False),
        "attention_dropout": ("attention_dropout", 0.0),
        "init_std": ("initializer_range", 0.02),
    },
    read=_read_rope,
    write=_write_rope,
    modules={
        "embed_tokens": "embed_tokens",
        "layers.*.attn_norm": "layers.*.input_layernorm",
        "layers.*.self_attn.q_proj": "layers.*.self_attn.q_proj",
        "layers.*.self_attn.k_proj": "layers.*.self_attn.k_proj",
        "layers.*.self_attn.v_proj": "layers.*.self_attn.v_proj",
        "layers.*.self_attn.o_proj": "layers.*.self_attn.o_proj",
        "layers.*.mlp_norm": "layers.*.post_attention_layernorm",
        "layers.*.mlp.gate_proj": "layers.*.mlp.gate_proj",
        "layers.*.mlp.up_proj": "layers.*.mlp.up_proj",
        "layers.*.mlp.down_proj": "layers.*.mlp.down_proj",
        "norm": "norm",
    },
    ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"(model\.)?rotary_emb\.inv_freq"),
    architectures=_like_llama("Llama"),
)


def _without(family: Family, *names: str) -> dict[str, tuple[str, Any]]:
    return {ours: theirs for ours, theirs in family.fields.items() if ours not in names}


def _read_window(theirs: dict[str, Any]) -> dict[str, Any]:
    """Mistral: one window for all layers."""
    return _read_rope(theirs) | {"sliding_window": theirs.get("sliding_window")}


def _write_window(config: ModelConfig) -> dict[str, Any]:
    if isinstance(config.sliding_window, tuple):
        raise ValueError("this family has one sliding_window for all layers")
    return _write_rope(config) | {"sliding_window": config.sliding_window or None}


def _read_some_windows(theirs: dict[str, Any]) -> dict[str, Any]:
    """Qwen: a window in those layers that `layer_types` names, or from `max_window_layers` on in older files."""
    window, layers = theirs.get("sliding_window"), theirs.get("num_hidden_layers")
    if not theirs.get("use_sliding_window", False) or window is None:
        return _read_rope(theirs) | {"sliding_window": None}
    types = theirs.get("layer_types")
    if types is None:
        first = theirs.get("max_window_layers", 28)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(types, list) or not set(types) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types={types!r}: expected a list of full_attention and sliding_attention")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return _read_rope(theirs) | {"sliding_window": windows if any(windows) else None}


def _write_some_windows(config: ModelConfig) -> dict[str, Any]:
    windows = [config.window(i) for i in range(config.num_layers)]
    if len(set(windows) - {0}) > 1:
        raise ValueError(f"sliding_window={config.sliding_window}: this family has one size for all layers with one")
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    full = next((i for i, window in enumerate(windows) if window), len(windows))
    return _write_rope(config) | {
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "layer_types": types,
        "max_window_layers": full,
    }


_NO_WINDOW = {name: value for name, value in LLAMA.fixed.items() if name != "sliding_window"}

QWEN2 = replace(
    LLAMA,
    name="Qwen 2",  # Yang et al. 2024, arXiv:2407.10671
    model_types=("qwen2",),
    fixed=_NO_WINDOW | {"attention_bias": "qkv", "mlp_bias": False},
    fields=_without(LLAMA, "attention_bias", "mlp_bias") | {"max_positions": ("max_position_embeddings", 32768)},
    read=_read_some_windows,
    write=_write_some_windows,
    architectures=_like_llama("Qwen2"),
)

QWEN3 = replace(
    QWEN2,
    name="Qwen 3",  # Yang et al. 2025, arXiv:2505.09388
    model_types=("qwen3",),
    fixed=_NO_WINDOW | {"qk_norm": True, "mlp_bias": False},
    fields=_without(LLAMA, "mlp_bias")
    | {"max_positions": ("max_position_embeddings", 32768), "head_dim": ("head_dim", 128)},
    modules=LLAMA.modules
    | {
        "layers.*.self_attn.q_norm": "layers.*.self_attn.q_norm",
        "layers.*.self_attn.k_norm": "layers.*.self_attn.k_norm",
    },
    architectures=_like_llama("Qwen3"),
)

MISTRAL = replace(
    LLAMA,
    name="Mistral",  # Jiang et al. 2023, arXiv:2310.06825
    model_types=("mistral",),
    fixed=_NO_WINDOW | {"attention_bias": False, "mlp_bias": False},
    fields=_without(LLAMA, "attention_bias", "mlp_bias")
    | {"max_positions": ("max_position_embeddings", 131072), "num_kv_heads": ("num_key_value_heads", 8)},
    read=lambda theirs: _read_window({"sliding_window": 4096} | theirs),
    write=_write_window,
    architectures=_like_llama("Mistral", span_prefix="model."),
)

PHI3 = replace(
    LLAMA,
    name="Phi-3",  # Abdin et al. 2024, arXiv:2404.14219; Phi-4, arXiv:2412.08905, has the same shape
    model_types=("phi3",),
    fixed={name: value for name, value in MISTRAL.fixed.items() if name != "dropout"},
    fields=_without(LLAMA, "attention_bias", "mlp_bias", "head_dim")
    | {
        "max_positions": ("max_position_embeddings", 4096),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "dropout": ("resid_pdrop", 0.0),
    },
    demanded={"embd_pdrop": (0.0, 0)},
    read=_read_window,
    write=_write_window,
    modules={
        "embed_tokens": "embed_tokens",
        "layers.*.attn_norm": "layers.*.input_layernorm",
        (
            "layers.*.self_attn.q_proj",
            "layers.*.self_attn.k_proj",
            "layers.*.self_attn.v_proj",
        ): "layers.*.self_attn.qkv_proj",
        "layers.*.self_attn.o_proj": "layers.*.self_attn.o_proj",
        "layers.*.mlp_norm": "layers.*.post_attention_layernorm",
        ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"): "layers.*.mlp.gate_up_proj",
        "layers.*.mlp.down_proj": "layers.*.mlp.down_proj",
        "norm": "norm",
    },
    architectures=_like_llama("Phi3", span_prefix=None),
)
