"""The bases in the box, as configs of `minillm pretrain`: shapes, rows and rates. A longer run is `train.steps=N`.

Each is trained on the text and with the tokenizer that `minillm bases prepare LANGUAGE` wrote to a folder, here TEXT:

    minillm pretrain --preset NAME data.train=TEXT/train.jsonl data.held_out=TEXT/held_out.jsonl \\
        tokenizer.folder=TEXT run=RUN
    minillm bases export RUN NAME manifest=TEXT/manifest.json
"""

from collections.abc import Callable
from dataclasses import replace

from minillm.config import nearest
from minillm.models import ModelConfig
from minillm.models.cards import BERT, T5
from minillm.recipes.common import DataConfig
from minillm.recipes.pretrain import PretrainConfig
from minillm.training import TrainConfig

PLAIN = {"vocab_size": ModelConfig().vocab_size, "max_positions": 512, "dropout": 0.0}  # the tokenizer sets the size
# Hiding 15 % teaches too little a step for a short run; up to 40 % do as well (Wettig et al. 2023, arXiv:2202.08005).
HIDE = 0.3


def _train(steps: int, lr: float, **more) -> TrainConfig:
    """Down to a rate of 0, in bfloat16: half the time of float32 where the processor multiplies in it."""
    every = {"log_every": 10, "eval_every": 500, "save_every": 100, "keep_checkpoints": 1}
    return TrainConfig(steps, lr, min_lr_ratio=0.0, precision="bfloat16", **every | more)


def tiny_decoder() -> PretrainConfig:
    """Llama-shaped: grouped queries, rotary positions, SwiGLU, RMSNorm; 3.1 million parameters.

    Command: as at the head of this file, with --preset tiny-decoder. Cost: an hour of one CPU core, an epoch and a bit.
    Result: fewer bits per byte of the held-out books than a 5-gram model needs.
    """
    model = ModelConfig(hidden_size=192, num_layers=4, num_heads=6, num_kv_heads=2, max_positions=512)
    return PretrainConfig(data=DataConfig(length=256, batch_size=8), model=model, train=_train(10_000, 3e-3))


def tiny_encoder() -> PretrainConfig:
    """BERT's shape with RoBERTa's masking, drawn anew each time; 3.5 million parameters.

    Rows fill all positions, so that each of the learned ones is learned.
    Command: as at the head of this file, with --preset tiny-encoder. Cost: one and a half hours of one CPU core.
    Result: fewer bits per byte of the hidden pieces than a 5-gram model needs, which sees what is on their left.
    """
    shape = {"hidden_size": 192, "num_layers": 4, "num_heads": 6, "intermediate_size": 768}
    model = ModelConfig(**BERT | PLAIN | shape)
    train = _train(12_000, 2e-3, beta2=0.98)
    return PretrainConfig(data=DataConfig(length=510, batch_size=4), model=model, train=train, hide=HIDE)


def tiny_encdec() -> PretrainConfig:
    """T5-shaped: relative positions, no biases, ReLU; 3 + 3 layers, 4.7 million parameters.

    Command: as at the head of this file, with --preset tiny-encdec. Cost: one and a half hours of one CPU core.
    Result: fewer bits per byte of the pieces cut out than a 5-gram model needs, which sees what is on their left.
    """
    shape = {"hidden_size": 192, "num_layers": 3, "num_heads": 6, "head_dim": 32, "intermediate_size": 768}
    model = ModelConfig(**T5 | PLAIN | shape)
    train = _train(10_000, 3e-3)
    return PretrainConfig(data=DataConfig(length=128, batch_size=16), model=model, train=train, hide=HIDE)


def tiny_encoder_sl() -> PretrainConfig:
    """CamemBERT-shaped, as SloBERTa is, for Slovene and with a Slovene tokenizer; otherwise as tiny-encoder.

    Command: as at the head of this file, with --preset tiny-encoder-sl and the text of `prepare slovene`.
    Cost: one and a half hours of one CPU core. Result: as of tiny-encoder, on the Slovene held-out books.
    """
    return tiny_encoder()


def _nano(base: PretrainConfig, layers: int = 2, **shape) -> PretrainConfig:
    sizes = {"hidden_size": 64, "num_layers": layers, "num_heads": 4} | shape
    follows = dict.fromkeys(("num_kv_heads", "head_dim", "intermediate_size"))  # from the sizes
    model = replace(base.model, **follows | sizes)
    return replace(base, model=model, train=replace(base.train, steps=3000, lr=5e-3))


def nano_decoder() -> PretrainConfig:
    """tiny-decoder with 2 layers of 64 features, for tests; 0.6 million parameters, most of them the vocabulary.

    Command: as at the head of this file, with --preset nano-decoder. Cost: 5 minutes of one CPU core.
    Result: fewer bits per byte than a unigram model needs, more than a 5-gram model.
    """
    return _nano(tiny_decoder(), num_kv_heads=2)


def nano_encoder() -> PretrainConfig:
    """tiny-encoder with 2 layers of 64 features, for tests; 0.7 million parameters, most of them the vocabulary.

    Command: as at the head of this file, with --preset nano-encoder. Cost: 5 minutes of one CPU core.
    Result: fewer bits per byte than a unigram model needs, more than a 5-gram model.
    """
    return _nano(tiny_encoder())


def nano_encdec() -> PretrainConfig:
    """tiny-encdec with 1 + 1 layers of 64 features, for tests; 0.6 million parameters, most of them the vocabulary.

    Command: as at the head of this file, with --preset nano-encdec. Cost: 5 minutes of one CPU core.
    Result: fewer bits per byte than a unigram model needs, more than a 5-gram model.
    """
    return _nano(tiny_encdec(), 1, num_decoder_layers=1, head_dim=16)


_FUNCTIONS: tuple[Callable[[], PretrainConfig], ...] = (
    tiny_encoder, tiny_decoder, tiny_encdec, tiny_encoder_sl, nano_encoder, nano_decoder, nano_encdec,
)  # fmt: skip
PRESETS = {function.__name__.replace("_", "-"): function for function in _FUNCTIONS}


def preset(name: str) -> PretrainConfig:
    """The config of that name; ValueError with the nearest names."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; did you mean {nearest(name, PRESETS)}?")
    return PRESETS[name]()
