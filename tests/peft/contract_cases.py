"""What the contract (test_contract.py) must know of each method: one entry, with every exception and its reason.

The three models have different sizes everywhere, so that a swapped one shows. Letters as in the library:
  decoder          D 16, F 20 (gated), V 41, H 4, G 2, K 4, L 3; RMSNorm, RoPE, no biases, untied head
  encoder          D 12, F 18, V 43, H 3, K 4, L 2; post-norm LayerNorm, biases, learned positions, a norm on the
                   embeddings; a classifier of 3 labels on the first token
  encoder_decoder  D 12, F 14, V 37, H 2, K 6, 2 + 2 layers; pre-norm LayerNorm, biases, learned positions, tied head
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minillm.models import HeadConfig, ModelConfig, build, build_with_head
from minillm.peft import FullConfig, LoraConfig, Method, PartialConfig

CONFIGS = {
    "decoder": ModelConfig(
        vocab_size=41,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=20,
        max_positions=32,
        tie_embeddings=False,
        init_std=0.2,
    ),
    "encoder": ModelConfig(
        kind="encoder",
        vocab_size=43,
        hidden_size=12,
        num_layers=2,
        num_heads=3,
        intermediate_size=18,
        max_positions=32,
        positions="learned",
        norm="layer",
        norm_first=False,
        mlp="plain",
        activation="gelu",
        attention_bias=True,
        mlp_bias=True,
        embed_norm=True,
        token_types=2,
        init_std=0.2,
    ),
    "encoder_decoder": ModelConfig(
        kind="encoder_decoder",
        vocab_size=37,
        hidden_size=12,
        num_layers=2,
        num_heads=2,
        intermediate_size=14,
        max_positions=32,
        positions="learned",
        norm="layer",
        mlp="plain",
        activation="relu",
        attention_bias=True,
        mlp_bias=True,
        init_std=0.2,
    ),
}
KINDS = tuple(CONFIGS)
HEAD = HeadConfig(task="classification", num_labels=3, pool="first", dropout=0.0)


def make_model(kind: str) -> nn.Module:
    """A model with random weights, the same at every call."""
    torch.manual_seed(0)
    if kind == "encoder":
        return build_with_head(CONFIGS[kind], HEAD)
    return build(CONFIGS[kind])


def make_batch(kind: str, rows: int = 2) -> dict[str, Tensor]:
    """Token ids of `rows` texts of 9 tokens; the encoder-decoder's sources have 7."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> Tensor:
        return torch.randint(1, CONFIGS[kind].vocab_size, (rows, length), generator=generator)

    if kind == "encoder":
        return {"tokens": draw(9), "labels": torch.arange(rows) % 3}
    batch = {"tokens": draw(9), "labels": draw(9)}
    return batch | {"source": draw(7)} if kind == "encoder_decoder" else batch


def compute(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits: of the next token at each position, or of the text's label."""
    source = (batch["source"],) if "source" in batch else ()
    masks = {name: batch[name] for name in ("mask", "source_mask") if name in batch}
    return model(*source, batch["tokens"], **masks)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean cross entropy."""
    logits = compute(model, batch)
    return cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())


@dataclasses.dataclass(frozen=True)
class Case:
    """A config (or one for each kind of model) and the number of values it trains, by the paper's formula.

    `without`: name of a test -> why it does not apply to the method. `dead`: end of a parameter's name -> why no
    gradient reaches it. `prepare` puts on the model what the method needs first. `lr` is for the test that five steps
    lower the loss.
    """

    config: Method | Mapping[str, Method]
    count: Mapping[str, int]
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prepare: Callable[[nn.Module], None] = lambda model: None
    lr: float = 0.01

    def of(self, kind: str) -> Method:
        """The config for this kind of model."""
        return self.config[kind] if isinstance(self.config, Mapping) else self.config


# values of each whole model, by hand
ENCODER_BODY = 43 * 12 + 32 * 12 + 2 * 12 + 2 * 12 + 2 * (4 * (12 * 12 + 12) + 2 * 12 * 18 + 18 + 12 + 2 * 2 * 12)
CLASSIFIER = (12 * 12 + 12) + (12 * 3 + 3)
SEQ2SEQ_LAYER = 4 * (12 * 12 + 12) + 2 * 12 * 14 + 14 + 12 + 2 * 2 * 12
SEQ2SEQ = 37 * 12 + 2 * 32 * 12 + 2 * SEQ2SEQ_LAYER + 2 * (SEQ2SEQ_LAYER + 4 * (12 * 12 + 12) + 2 * 12) + 2 * 2 * 12
WHOLE = {
    "decoder": 41 * 16 + 3 * (2 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 20) + 16 + 16 * 41,
    "encoder": ENCODER_BODY + CLASSIFIER,
    "encoder_decoder": SEQ2SEQ,
}
KEY_BIAS = "softmax does not change when all scores of a query move by q.b_k, so key biases have no gradient"


CASES: dict[str, Case] = {
    "lora": Case(
        LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "mlp.up_proj")),
        {
            "decoder": 3 * 3 * ((16 + 16) + (16 + 20)),
            "encoder": 2 * 3 * ((12 + 12) + (12 + 18)),
            "encoder_decoder": 3 * (6 * (12 + 12) + 4 * (12 + 14)),
        },
    ),
    "full": Case(
        FullConfig(),
        WHOLE,
        dead={"k_proj.bias": KEY_BIAS},
        without={"another_base_is_refused": "nothing of the base stays, so any base of its shapes will do"},
    ),
    "partial": Case(
        {
            "decoder": PartialConfig(("norm", "lm_head")),
            "encoder": PartialConfig(("classifier",), last=1),
            "encoder_decoder": PartialConfig((), pattern=r".*norm\.(weight|bias)"),
        },
        {
            "decoder": 16 + 41 * 16,
            "encoder": 12 * 3 + 3 + 4 * (12 * 12 + 12) + 2 * 12 * 18 + 18 + 12 + 2 * 2 * 12,
            "encoder_decoder": 2 * 12 * (2 * 2 + 2 * 3 + 2),
        },
        dead={"k_proj.bias": KEY_BIAS},
    ),
}
