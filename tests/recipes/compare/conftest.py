"""A tiny base of each kind with its tokenizer, and tasks that a tiny base learns."""

import pytest
import torch
from tiny_tasks import make_task

from minillm.models import HeadConfig, ModelConfig, build, build_with_head, save_model
from minillm.recipes.compare import CompareConfig
from minillm.tokenizers import ByteTokenizer

SYMBOLS = ("<mask>", *(f"<extra_id_{i}>" for i in range(32)))
SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 96, "intermediate_size": 32}
LLAMA = dict(SHAPE, kind="decoder")
BERT = dict(
    SHAPE, kind="encoder", positions="learned", norm="layer", mlp="plain", activation="gelu", attention_bias=True,
    mlp_bias=True, norm_first=False, embed_norm=True, token_types=2,
)  # fmt: skip
T5 = dict(SHAPE, kind="encoder_decoder", positions="relative", mlp="plain", activation="relu", decoder_start_id=256)
SHAPES = {"decoder": LLAMA, "encoder": BERT, "encoder_decoder": T5}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """kind -> the folder of a tiny random base of that kind."""
    folders, tokenizer = {}, ByteTokenizer(SYMBOLS)
    for kind, shape in SHAPES.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        config = ModelConfig(**shape, vocab_size=tokenizer.vocab_size, init_std=0.2)
        model = build_with_head(config, HeadConfig("masked_lm")) if kind == "encoder" else build(config)
        model.tokenizer_fingerprint = tokenizer.fingerprint
        save_model(model, folders[kind])
        tokenizer.save(folders[kind])
    return folders


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("the cat sat on the mat and saw a red hat. " * 40)
    return path


@pytest.fixture
def task():
    """kind -> a task of that kind."""
    return make_task


@pytest.fixture
def config(bases, tmp_path):
    """A study that takes a second; keywords change it."""

    def make(kind="encoder", **changes):
        values = {
            "base": str(bases[kind]), "task": "colours", "methods": ("head", "lora"), "run": str(tmp_path / "study"),
            "seeds": 2, "rates": 2, "steps": 4, "batch_size": 4, "length": 48, "points": 2,
        }  # fmt: skip
        return CompareConfig(**{**values, **changes})

    return make


@pytest.fixture
def no_costs(monkeypatch):
    """They take seconds for each row, and have tests of their own."""
    monkeypatch.setattr("minillm.recipes.compare.costs.memory_added", lambda problem, row: 1_000_000)
    monkeypatch.setattr(
        "minillm.recipes.compare.costs.overhead", lambda problem, row: {"unmerged": 1.5, "merged": None}
    )
