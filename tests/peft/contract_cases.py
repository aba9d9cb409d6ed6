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
from minillm.peft import FullConfig, LoraConfig, Method, PartialConfig, activate, tune, tunings_of
from minillm.peft.bitfit import BitFitConfig
from minillm.peft.bottleneck_config import BottleneckConfig
from minillm.peft.fusion import FusionConfig
from minillm.peft.ia3 import Ia3Config
from minillm.peft.increlora import IncreLoraConfig
from minillm.peft.mola import MolaConfig
from minillm.peft.prefix import PrefixConfig
from minillm.peft.prompt import PromptConfig
from minillm.peft.ptuning import PTuningConfig
from minillm.peft.qalora import QaLoraConfig
from minillm.peft.qlora import QLoraConfig
from minillm.peft.sparse_bias import PrunedBitFitConfig

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
ROUNDED = {
    "unload_restores_the_base": "the float weights are gone; tests/peft: unload gives the quantized base bit for bit",
    "switching_off_and_on": "without the adapter the model is the quantized base, not the one from before",
}
KEY_BIAS = "softmax does not change when all scores of a query move by q.b_k, so key biases have no gradient"


def _give_biases(model: nn.Module, without: tuple[str, ...] = ("lm_head",)) -> None:
    """Every linear layer but the language model's head has a bias from here on."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is None and not name.endswith(without):
            layer.bias = nn.Parameter(0.1 * torch.randn(layer.out_features))


def _give_biases_but_to_keys(model: nn.Module) -> None:
    """The decoder's rotary positions would let key biases train, and in the other models they do not."""
    _give_biases(model, ("lm_head", "k_proj"))


def two_adapters(model: nn.Module) -> None:
    """Adapters "a" and "b" after the MLPs, each on the base alone, and then both active."""
    for size, name in ((2, "a"), (3, "b")):
        activate(model) if tunings_of(model) else None
        tune(model, BottleneckConfig("pfeiffer", size=size), name)
        with torch.no_grad():
            for parameter in tunings_of(model)[name].parameters().values():
                parameter.normal_(std=0.3)
    activate(model, "a", "b", train=())


CASES: dict[str, Case] = {  # by the method's name; a further case of it has a + and a word behind that
    "lora": Case(
        LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "mlp.up_proj")),
        {
            "decoder": 3 * 3 * ((16 + 16) + (16 + 20)),
            "encoder": 2 * 3 * ((12 + 12) + (12 + 18)),
            "encoder_decoder": 3 * (6 * (12 + 12) + 4 * (12 + 14)),
        },
    ),
    "lora+its_biases": Case(
        LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "mlp.up_proj"), bias="lora_only"),
        {
            "decoder": 3 * (3 * ((16 + 16) + (16 + 20)) + 16 + 20),
            "encoder": 2 * (3 * ((12 + 12) + (12 + 18)) + 12 + 18),
            "encoder_decoder": 6 * (3 * (12 + 12) + 12) + 4 * (3 * (12 + 14) + 14),
        },
        prepare=_give_biases,
    ),
    "lora+all_biases": Case(
        {
            "decoder": LoraConfig(rank=3, alpha=5.0, bias="all"),
            "encoder": LoraConfig(rank=3, alpha=5.0, bias="all", trainable=("classifier",)),
            "encoder_decoder": LoraConfig(rank=3, alpha=5.0, bias="all"),
        },
        {
            "decoder": 3 * (3 * ((16 + 16) + (16 + 8)) + 2 * 16 + 8 + 2 * 20 + 16),
            "encoder": 2 * (3 * 2 * (12 + 12) + 4 * 12 + 2 * 12 + 18 + 12) + 12 + 12 + (12 * 3 + 3),
            "encoder_decoder": 6 * 3 * 2 * (12 + 12) + 4 * (4 * 12 + 2 * 12 + 14 + 12) + 2 * (4 * 12 + 12) + 2 * 12,
        },
        dead={"k_proj.bias": KEY_BIAS},
        prepare=_give_biases_but_to_keys,
    ),
    "qlora": Case(
        QLoraConfig(rank=3, alpha=5.0, block=16),
        {
            "decoder": 3 * 3 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 20)),
            "encoder": 3 * (2 * (4 * (12 + 12) + 2 * (12 + 18)) + (12 + 12)),
            "encoder_decoder": 3 * (2 * (4 + 8) * (12 + 12) + 4 * 2 * (12 + 14)),
        },
        without=ROUNDED,
    ),
    "qalora": Case(
        {
            "decoder": QaLoraConfig(rank=3, alpha=5.0, group=4),
            "encoder": QaLoraConfig(rank=3, alpha=5.0, group=2, targets=("self_attn.q_proj", "up_proj")),
            "encoder_decoder": QaLoraConfig(rank=4, alpha=7.0, group=2),
        },
        {
            "decoder": 3 * 3 * (2 * (4 + 16) + 2 * (4 + 8) + 2 * (4 + 20) + (5 + 16)),
            "encoder": 2 * 3 * ((6 + 12) + (6 + 18)),
            "encoder_decoder": 4 * (2 * (4 + 8) * (6 + 12) + 4 * ((6 + 14) + (7 + 12))),
        },
        without=ROUNDED | {"merge_or_why_not": "the merged layers stay in 4 bits; tests/peft: codes unchanged, exact"},
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
    "ia3": Case(
        Ia3Config(),
        {
            "decoder": 3 * (8 + 8 + 20),
            "encoder": 2 * (12 + 12 + 18),
            "encoder_decoder": 6 * (12 + 12) + 4 * 14,
        },
        lr=0.1,
    ),
    "bitfit": Case(
        {  # the decoder's rotary positions let key biases train, so they are left out there
            "decoder": BitFitConfig(
                ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), create_missing=True
            ),
            "encoder": BitFitConfig(trainable=("classifier",)),
            "encoder_decoder": BitFitConfig(),
        },
        {
            "decoder": 3 * (16 + 8 + 16 + 20 + 20 + 16),
            "encoder": 2 * (4 * 12 + 2 * 12 + 18 + 12) + 12 + 12 + (12 * 3 + 3),
            "encoder_decoder": 4 * (4 * 12 + 2 * 12 + 14 + 12) + 2 * (4 * 12 + 12) + 2 * 12,
        },
        dead={"k_proj.bias": KEY_BIAS},
        without={
            "saved_file_weighs_what_its_parameters_weigh": "for peft there is a LoRA of zeros (see test_bitfit.py)"
        },
    ),
    "pruned_bitfit": Case(
        {
            "decoder": PrunedBitFitConfig(
                (("layers.0.mlp.up_proj.bias", (0, 19)), ("layers.2.self_attn.v_proj.bias", (3,)))
            ),
            "encoder": PrunedBitFitConfig(
                (
                    ("body.layers.1.mlp.up_proj.bias", (1, 17)),
                    ("body.embed_norm.bias", (0, 5)),
                    ("classifier.bias", (2,)),
                )
            ),
            "encoder_decoder": PrunedBitFitConfig(
                (("encoder.layers.0.mlp.down_proj.bias", (2,)), ("decoder.norm.bias", (0, 4, 11)))
            ),
        },
        {"decoder": 3, "encoder": 5, "encoder_decoder": 4},
        prepare=_give_biases,
        lr=0.3,
    ),
    "bottleneck": Case(
        {
            "decoder": BottleneckConfig("parallel", activation="gelu"),  # bfloat16 puts sums on a relu's other side
            "encoder": BottleneckConfig("pfeiffer", reduction=5, trainable=("classifier",)),
            "encoder_decoder": BottleneckConfig("houlsby", size=3, cross_attention=True),
        },
        {
            "decoder": 3 * (2 * 8 * 16 + 8 + 16),
            "encoder": 2 * (2 * 2 * 12 + 2 + 12) + 12 * 3 + 3,
            "encoder_decoder": (2 * 2 + 2 * 3) * (2 * 3 * 12 + 3 + 12),
        },
    ),
    "fusion": Case(
        FusionConfig(("a", "b")),
        {"decoder": 3 * (3 * 16**2 + 2 * 16), "encoder": 2 * (3 * 12**2 + 2 * 12), "encoder_decoder": 4 * 456},
        prepare=two_adapters,
        dead={"key.bias": "q.b is added to the scores of all adapters, and softmax does not change"},
    ),
    "prompt": Case(
        {
            "decoder": PromptConfig(length=5),
            "encoder": PromptConfig(length=4, init="random", trainable=("classifier",)),
            "encoder_decoder": PromptConfig(length=3, init="text", init_tokens=(5, 6)),
        },
        {"decoder": 5 * 16, "encoder": 4 * 12 + 12 * 3 + 3, "encoder_decoder": 3 * 12},
        lr=0.1,  # so few values move far: Lester et al. train with 0.3
    ),
    "ptuning": Case(
        {
            "decoder": PTuningConfig(length=3, encoder="mlp", hidden_size=6),
            "encoder": PTuningConfig(length=4, hidden_size=5, layers=1, trainable=("classifier",)),
            "encoder_decoder": PTuningConfig(length=3, hidden_size=4),
        },
        {
            "decoder": 3 * 16 + (16 + 1) * 6 + (6 + 1) * 6 + (6 + 1) * 16,
            "encoder": 4 * 12 + 2 * 4 * 5 * (12 + 5 + 1) + (10 * 10 + 10) + (10 * 12 + 12) + 12 * 3 + 3,
            "encoder_decoder": 3 * 12
            + 2 * 4 * 4 * (12 + 4 + 1)
            + 2 * 4 * 4 * (2 * 4 + 4 + 1)
            + (8 * 8 + 8)
            + (8 * 12 + 12),
        },
    ),
    "prefix": Case(
        {
            "decoder": PrefixConfig(length=3),
            "encoder": PrefixConfig(length=4, projection_size=5, trainable=("classifier",)),
            "encoder_decoder": PrefixConfig(length=3, gated=True),
        },
        {
            "decoder": 3 * 3 * 2 * 8,
            "encoder": 4 * 12 + (12 + 1) * 5 + (5 + 1) * 2 * 2 * 12 + 12 * 3 + 3,
            "encoder_decoder": 6 * (3 * 2 * 12 + 2),
        },
        lr=0.1,
    ),
    "increlora": Case(
        IncreLoraConfig(max_rank=4, alpha=5.0, targets=("q_proj", "mlp.up_proj")),
        {
            "decoder": 3 * 4 * ((16 + 16 + 1) + (16 + 20 + 1)),
            "encoder": 2 * 4 * ((12 + 12 + 1) + (12 + 18 + 1)),
            "encoder_decoder": 4 * (6 * (12 + 12 + 1) + 4 * (12 + 14 + 1)),
        },
        without={
            "save_then_load_into_a_fresh_base": "it is saved as the LoRA that it has become (see test_increlora.py)",
            "saved_file_weighs_what_its_parameters_weigh": "its file has only the components that speak",
        },
        lr=0.1,  # A, B and E all start small, so small steps move little
    ),
    "mola": Case(
        {
            "decoder": MolaConfig(per_layer=(2, 4, 3), rank=3, alpha=5.0),
            "encoder": MolaConfig(per_layer=(3, 2), rank=2, alpha=5.0, trainable=("classifier",)),
            "encoder_decoder": MolaConfig(4, "rectangle", rank=2, alpha=5.0),
        },
        {
            "decoder": (2 + 4 + 3) * (3 * (16 + 16) + 16 + 3 * (16 + 8) + 16),
            "encoder": (3 + 2) * 2 * (2 * (12 + 12) + 12) + 12 * 3 + 3,
            "encoder_decoder": 6 * 2 * 4 * (2 * (12 + 12) + 12),
        },
    ),
}
