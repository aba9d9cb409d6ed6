"""The language models that the course speaks of, as configs: data only, no weights.

The values are those of each model's config.json on the Hugging Face Hub (`Card.source`), in our words. The tests build
the same models from transformers' classes and compare every count.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from minillm.config import nearest
from minillm.models.config import ModelConfig
from minillm.ops import RopeScaling


@dataclass(frozen=True)
class Card:
    """A published model, and where its config was published.

    `differs`: what the published checkpoint has beside what `build(config)` has, and `more`: how many parameters.
    """

    title: str
    config: ModelConfig
    source: str
    differs: str = ""
    more: int = 0

    @property
    def context(self) -> int:
        """The longest text it was made for, in tokens."""
        return self.config.max_positions


def find_card(name: str) -> Card:
    """The card of that name, in letters of either case; ValueError with the nearest names, and all."""
    if name.lower() in CARDS:
        return CARDS[name.lower()]
    near = nearest(name.lower(), CARDS)
    known = "" if near.startswith("one of") else f"\nThere are {', '.join(CARDS)}."
    raise ValueError(f"there is no model card called {name!r}; did you mean {near}?{known}")


def _card(title: str, page: str, family: dict[str, Any], **sizes: Any) -> Card:
    return Card(title, ModelConfig(**family | sizes), f"https://huggingface.co/{page}")


def _headless(title: str, page: str, family: dict[str, Any], **sizes: Any) -> Card:
    """An encoder published with BERT's pooler (a D x D layer with bias), which is one of our heads."""
    config = ModelConfig(**family | sizes)
    more = config.hidden_size * (config.hidden_size + 1)
    return Card(title, config, f"https://huggingface.co/{page}", "a pooler", more)


def _two_rows(title: str, page: str, family: dict[str, Any], **sizes: Any) -> Card:
    """Position tables with 2 rows before that of position 0, which no text reaches: ours has none of them."""
    config = ModelConfig(**family | sizes)
    rows = 2 * config.hidden_size * (2 if config.kind == "encoder_decoder" else 1)
    pooler = config.hidden_size * (config.hidden_size + 1) if config.kind == "encoder" else 0
    differs = "2 unused rows in each position table" + (", and a pooler" if pooler else "")
    return Card(title, config, f"https://huggingface.co/{page}", differs, rows + pooler)


def _sizes(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, int]:
    return {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "intermediate_size": intermediate}


# Llama and what follows it: RMSNorm, rotary positions, SwiGLU, no biases
LLAMA2 = {"vocab_size": 32000, "max_positions": 4096, "norm_eps": 1e-5, "tie_embeddings": False}
LLAMA3 = LLAMA2 | {"vocab_size": 128256, "max_positions": 131072, "rope_theta": 500000.0, "num_kv_heads": 8}
TIMES_8, TIMES_32 = RopeScaling("llama3", factor=8.0), RopeScaling("llama3", factor=32.0)
MISTRAL = LLAMA2 | _sizes(4096, 32, 32, 14336) | {"max_positions": 32768, "num_kv_heads": 8}
PHI4 = LLAMA2 | {"vocab_size": 100352, "max_positions": 16384, "rope_theta": 250000.0}
QWEN = {"vocab_size": 151936, "max_positions": 32768, "rope_theta": 1e6, "norm_eps": 1e-6, "attention_bias": "qkv"}
QWEN_LARGE = QWEN | {"vocab_size": 152064, "max_positions": 131072, "tie_embeddings": False}
QWEN3 = QWEN | {"attention_bias": False, "qk_norm": True, "max_positions": 40960}

# the families of GPT-2 and BERT: LayerNorm, learned positions, plain MLPs, biases everywhere
GPT2 = {
    "vocab_size": 50257, "max_positions": 1024, "positions": "learned", "norm": "layer", "norm_eps": 1e-5,
    "mlp": "plain", "activation": "gelu_tanh", "attention_bias": True, "mlp_bias": True, "dropout": 0.1,
}  # fmt: skip
BERT = GPT2 | {
    "kind": "encoder", "vocab_size": 30522, "max_positions": 512, "norm_eps": 1e-12, "activation": "gelu",
    "norm_first": False, "embed_norm": True, "token_types": 2,
}  # fmt: skip
ROBERTA = BERT | {"vocab_size": 50265, "norm_eps": 1e-5, "token_types": 1}
BART = ROBERTA | {"kind": "encoder_decoder", "max_positions": 1024, "token_types": 0, "decoder_start_id": 2}
MBART = BART | {"norm_first": True, "scale_embeddings": True, "attention_dropout": 0.0} | _sizes(1024, 12, 16, 4096)

# T5: RMSNorm, relative positions, no biases; version 1.1 has a gated MLP and a head of its own
T5 = {
    "kind": "encoder_decoder", "vocab_size": 32128, "max_positions": 512, "head_dim": 64, "positions": "relative",
    "mlp": "plain", "activation": "relu", "dropout": 0.1,
}  # fmt: skip
T5_1_1 = T5 | {"mlp": "gated", "activation": "gelu_tanh", "tie_embeddings": False}
BASE, LARGE = _sizes(768, 12, 12, 3072), _sizes(1024, 24, 16, 4096)

_CARDS = {
    "llama-3.3-70b": _card(
        "Llama 3.3 70B", "meta-llama/Llama-3.3-70B-Instruct", LLAMA3 | _sizes(8192, 80, 64, 28672), rope_scaling=TIMES_8
    ),
    "llama-3.1-8b": _card(
        "Llama 3.1 8B", "meta-llama/Llama-3.1-8B", LLAMA3 | _sizes(4096, 32, 32, 14336), rope_scaling=TIMES_8
    ),
    "llama-3.2-1b": _card(
        "Llama 3.2 1B", "meta-llama/Llama-3.2-1B", LLAMA3 | _sizes(2048, 16, 32, 8192), rope_scaling=TIMES_32,
        tie_embeddings=True,
    ),
    "llama-2-7b": _card("Llama 2 7B", "meta-llama/Llama-2-7b-hf", LLAMA2 | _sizes(4096, 32, 32, 11008)),
    "phi-4": _card("Phi 4 14B", "microsoft/phi-4", PHI4 | _sizes(5120, 40, 40, 17920), num_kv_heads=10),
    "qwen2.5-0.5b": _card("Qwen 2.5 0.5B", "Qwen/Qwen2.5-0.5B", QWEN | _sizes(896, 24, 14, 4864), num_kv_heads=2),
    "qwen2.5-1.5b": _card(
        "Qwen 2.5 1.5B", "Qwen/Qwen2.5-1.5B", QWEN | _sizes(1536, 28, 12, 8960), num_kv_heads=2, max_positions=131072
    ),
    "qwen2.5-3b": _card("Qwen 2.5 3B", "Qwen/Qwen2.5-3B", QWEN | _sizes(2048, 36, 16, 11008), num_kv_heads=2),
    "qwen2.5-7b": _card("Qwen 2.5 7B", "Qwen/Qwen2.5-7B", QWEN_LARGE | _sizes(3584, 28, 28, 18944), num_kv_heads=4),
    "qwen2.5-14b": _card(
        "Qwen 2.5 14B", "Qwen/Qwen2.5-14B", QWEN_LARGE | _sizes(5120, 48, 40, 13824), num_kv_heads=8, norm_eps=1e-5
    ),
    "qwen2.5-32b": _card(
        "Qwen 2.5 32B", "Qwen/Qwen2.5-32B", QWEN_LARGE | _sizes(5120, 64, 40, 27648), num_kv_heads=8, norm_eps=1e-5
    ),
    "qwen2.5-72b": _card(
        "Qwen 2.5 72B", "Qwen/Qwen2.5-72B", QWEN_LARGE | _sizes(8192, 80, 64, 29568), num_kv_heads=8, norm_eps=1e-5
    ),
    "qwen3-0.6b": _card(
        "Qwen3 0.6B", "Qwen/Qwen3-0.6B", QWEN3 | _sizes(1024, 28, 16, 3072), num_kv_heads=8, head_dim=128
    ),
    "mistral-7b-v0.1": _card("Mistral 7B v0.1", "mistralai/Mistral-7B-v0.1", MISTRAL, sliding_window=4096),
    "mistral-7b-v0.3": _card(
        "Mistral 7B v0.3", "mistralai/Mistral-7B-v0.3", MISTRAL, vocab_size=32768, rope_theta=1e6
    ),
    "gpt2": _card("GPT-2 small", "openai-community/gpt2", GPT2 | BASE),
    "gpt2-medium": _card("GPT-2 medium", "openai-community/gpt2-medium", GPT2 | LARGE),
    "gpt2-large": _card("GPT-2 large", "openai-community/gpt2-large", GPT2 | _sizes(1280, 36, 20, 5120)),
    "gpt2-xl": _card("GPT-2 XL", "openai-community/gpt2-xl", GPT2 | _sizes(1600, 48, 25, 6400)),
    "bert-base": _headless("BERT base", "google-bert/bert-base-uncased", BERT | BASE),
    "bert-large": _headless("BERT large", "google-bert/bert-large-uncased", BERT | LARGE),
    "mbert": _headless(
        "Multilingual BERT", "google-bert/bert-base-multilingual-cased", BERT | BASE, vocab_size=119547
    ),
    "distilbert": _card(
        "DistilBERT", "distilbert/distilbert-base-uncased", BERT | _sizes(768, 6, 12, 3072), token_types=0
    ),
    "roberta-base": _two_rows("RoBERTa base", "FacebookAI/roberta-base", ROBERTA | BASE),
    "camembert-base": _two_rows("CamemBERT base", "almanach/camembert-base", ROBERTA | BASE, vocab_size=32005),
    "sloberta": _two_rows("SloBERTa", "EMBEDDIA/sloberta", ROBERTA | BASE, vocab_size=32005),
    "t5-small": _card("T5 small", "google-t5/t5-small", T5 | _sizes(512, 6, 8, 2048), logit_scale=512**-0.5),
    "t5-base": _card("T5 base", "google-t5/t5-base", T5 | BASE, logit_scale=768**-0.5),
    "t5-large": _card("T5 large", "google-t5/t5-large", T5 | LARGE, logit_scale=1024**-0.5),
    "flan-t5-base": _card("Flan-T5 base", "google/flan-t5-base", T5_1_1 | _sizes(768, 12, 12, 2048)),
    "bart-base": _two_rows("BART base", "facebook/bart-base", BART | _sizes(768, 6, 12, 3072)),
    "bart-large": _two_rows("BART large", "facebook/bart-large", BART | _sizes(1024, 12, 16, 4096)),
    "mbart-cc25": _two_rows("mBART cc25", "facebook/mbart-large-cc25", MBART, vocab_size=250027),
    "mbart-50": _two_rows("mBART-50", "facebook/mbart-large-50", MBART, vocab_size=250054),
}  # fmt: skip
CARDS = MappingProxyType(_CARDS)
