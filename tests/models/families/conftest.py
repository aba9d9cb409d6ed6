"""One table of tiny random transformers models, and what all tests of the families ask of them and of ours.

A new family is a new line in CASES. With MINILLM_PARITY=<file> what the tests measured is written there as JSON, from
which `benchmarks/models_table.py` makes the README's table of models.
"""

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.families.load import load_hf

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest value
FIRST_WORD, VOCAB = 5, 61  # ids below are special: tokens are drawn from the rest
LENGTH = 11

LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters=dict(rope_type="default", rope_theta=50.0),
)
BERT = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=64,
    layer_norm_eps=1e-3,
    pad_token_id=0,
)
ROBERTA = BERT | dict(max_position_embeddings=66, pad_token_id=1)
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
T5 = dict(
    vocab_size=VOCAB,
    d_model=24,
    d_kv=5,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    layer_norm_epsilon=1e-3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    decoder_start_token_id=0,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=50.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
DECODER_CLASSES = ("ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification")
WITH_SPANS = (*DECODER_CLASSES, "ForQuestionAnswering")
ENCODER_CLASSES = (
    "ForMaskedLM",
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
SEQ2SEQ_CLASSES = ("ForConditionalGeneration", "Model", "ForSequenceClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class Case:
    """A tiny config of a family, `theirs` the start of its classes' names in transformers."""

    name: str
    family: str
    theirs: str
    config: Mapping[str, Any]
    classes: tuple[str, ...]


CASES = [
    Case(
        "GPT-2",
        "GPT-2",
        "GPT2",
        dict(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64, layer_norm_epsilon=1e-3, pad_token_id=0),
        ("LMHeadModel", *WITH_SPANS[1:]),
    ),
    Case("Llama 2 MHA", "Llama", "Llama", LLAMA | dict(num_key_value_heads=4), ("ForCausalLM",)),
    Case(
        "Llama 2 GQA, tied, all biases, other head_dim, no pad",
        "Llama",
        "Llama",
        LLAMA | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=8, pad_token_id=None),
        ("ForCausalLM",),
    ),
    Case("Llama 3", "Llama", "Llama", LLAMA | dict(rope_parameters=LLAMA3_ROPE), WITH_SPANS),
    Case(
        "Llama, linear rope",
        "Llama",
        "Llama",
        LLAMA | dict(rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=3.0)),
        ("ForCausalLM",),
    ),
    Case(
        "Qwen2, tied, one sliding layer",
        "Qwen 2",
        "Qwen2",
        LLAMA | dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        WITH_SPANS,
    ),
    Case("Qwen2, no window", "Qwen 2", "Qwen2", LLAMA, ("ForCausalLM",)),
    Case("Qwen3", "Qwen 3", "Qwen3", LLAMA | dict(head_dim=8, tie_word_embeddings=True), WITH_SPANS),
    Case("Mistral", "Mistral", "Mistral", LLAMA | dict(sliding_window=4), WITH_SPANS),
    Case("Mistral, no window", "Mistral", "Mistral", LLAMA | dict(sliding_window=None), ("ForCausalLM",)),
    Case("Phi-3", "Phi-3", "Phi3", LLAMA | dict(sliding_window=5), DECODER_CLASSES),
    Case("BERT", "BERT", "Bert", BERT, ENCODER_CLASSES),
    Case("BERT, untied", "BERT", "Bert", BERT | dict(tie_word_embeddings=False), ("ForMaskedLM",)),
    Case("RoBERTa", "RoBERTa", "Roberta", ROBERTA | dict(type_vocab_size=1), ENCODER_CLASSES),
    Case("CamemBERT", "CamemBERT", "Camembert", ROBERTA | dict(type_vocab_size=1), ENCODER_CLASSES),
    Case("XLM-R", "XLM-RoBERTa", "XLMRoberta", ROBERTA | dict(type_vocab_size=2), ENCODER_CLASSES),
    Case(
        "DistilBERT",
        "DistilBERT",
        "DistilBert",
        dict(vocab_size=VOCAB, dim=24, n_heads=4, hidden_dim=40, n_layers=2, max_position_embeddings=64),
        ENCODER_CLASSES,
    ),
    Case("T5", "T5", "T5", T5, SEQ2SEQ_CLASSES),
    Case(
        "T5 v1.1 and Flan",
        "T5 v1.1",
        "T5",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        SEQ2SEQ_CLASSES,
    ),
    Case("BART", "BART", "Bart", BART, SEQ2SEQ_CLASSES),
    Case("mBART", "mBART", "MBart", BART | dict(scale_embedding=True, decoder_start_token_id=4), SEQ2SEQ_CLASSES[:2]),
]

LABELLED = dict(num_labels=3)
TASKS = {  # of a class: what it may be asked, and what its config says then
    "LMHeadModel": {"lm": {}},
    "ForCausalLM": {"lm": {}},
    "ForConditionalGeneration": {"lm": {}},
    "ForMaskedLM": {"masked_lm": {}},
    "Model": {"body": {}},
    "ForSequenceClassification": {
        "classification": LABELLED,
        "multi_label": LABELLED | dict(problem_type="multi_label_classification"),
        "regression": dict(num_labels=1, problem_type="regression"),
    },
    "ForTokenClassification": {"tagging": LABELLED},
    "ForQuestionAnswering": {"span": {}},
    "ForMultipleChoice": {"choice": {}},
}


@dataclass(frozen=True, eq=False)
class Member:
    """One class of a case, asked for one task."""

    case: Case
    class_name: str
    task: str
    config: Mapping[str, Any] = field(repr=False)

    @property
    def id(self) -> str:
        return f"{self.case.name}-{self.class_name}" + (f"-{self.task}" if self.task in REFINED else "")


REFINED = ("multi_label", "regression")
POOLED = ("BERT", "RoBERTa", "CamemBERT", "XLM-RoBERTa")  # their bare models end in a pooler


def _members(case: Case) -> list[Member]:
    members = []
    for ending in case.classes:
        for task, extra in TASKS[ending].items():
            task = "embedding" if task == "body" and case.family in POOLED else task
            members.append(Member(case, case.theirs + ending, task, {**case.config, **extra}))
    return members


MEMBERS = [member for case in CASES for member in _members(case)]
SELECTIONS = {  # an argument of a test -> the members it goes through
    "member": lambda member: True,
    "answering": lambda member: member.task not in REFINED,  # those compute what classification does
    "language_model": lambda member: member.task == "lm",
    "learner": lambda member: member.task in ("lm", "masked_lm"),
    "encoder_head": lambda member: member.case.classes is ENCODER_CLASSES,
    "seq2seq_model": lambda member: member.class_name.endswith("ForConditionalGeneration"),
    "shifting": lambda member: member.class_name in ("T5ForConditionalGeneration", "BartForConditionalGeneration"),
    "pooled": lambda member: member.task == "embedding",
}


def pytest_generate_tests(metafunc):
    for name, wanted in SELECTIONS.items():
        if name in metafunc.fixturenames:
            members = [member for member in MEMBERS if wanted(member)]
            metafunc.parametrize(name, members, ids=[member.id for member in members])


SPREAD = {  # of the values of their matrices, so that attention is sharp and yet the residual stream keeps the words
    r"relative_attention_bias": 0.5,
    r"DenseReluDense": 0.12,
    r"(wpe|embed_positions|position_embeddings)\.weight": 1.0,
    r"(wte|shared|embed_tokens|word_embeddings)\.weight": 0.5,
    r"Attention\.(q|k)\.weight": 0.2,  # T5 does not divide scores by sqrt(K)
    r"\b(q|k|query|key)(_proj|_lin)?\.weight|(c_attn|qkv_proj)\.weight": 0.3,
    r"": 0.2,
}


def oracle(member: Member) -> nn.Module:
    """Their model in eval mode, with weights that leave nothing out: no bias is 0, no norm 1, no attention flat."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = getattr(transformers, f"{member.case.theirs}Config")(**member.config)
        model = getattr(transformers, member.class_name)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(std=0.2).add_(1.0 if name.endswith("weight") else 0.0)
                else:
                    parameter.normal_(std=next(std for part, std in SPREAD.items() if re.search(part, name)))
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """A copy that computes in float64 everywhere: their RMSNorms round to float32, torch's own does not."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) and not isinstance(module, nn.RMSNorm):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(member)` -> (their model, the folder where it saved itself); made once, not to be changed."""
    made: dict[str, tuple[nn.Module, Path]] = {}

    def make(member: Member) -> tuple[nn.Module, Path]:
        if member.id not in made:
            model, folder = oracle(member), tmp_path_factory.mktemp("theirs")
            model.save_pretrained(folder)
            made[member.id] = model, folder
        return made[member.id]

    return make


@pytest.fixture(scope="session")
def member_named():
    """`member_named(id)` -> the member."""
    return {member.id: member for member in MEMBERS}.__getitem__


@pytest.fixture(scope="session")
def twins(checkpoint):
    """`twins(member, dtype)` -> (ours, loaded from their folder; theirs); made once, not to be changed."""
    made: dict[tuple[str, torch.dtype], tuple[nn.Module, nn.Module]] = {}

    def make(member: Member, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
        if (member.id, dtype) not in made:
            theirs, folder = checkpoint(member)
            ours = load_hf(folder, dtype=dtype)
            made[member.id, dtype] = ours, in_float64(theirs) if dtype == torch.float64 else theirs
        return made[member.id, dtype]

    return make


@pytest.fixture
def batch_of():
    """`batch_of(ours, task)` -> random inputs under our names, without padding."""
    return _batch


def _batch(ours: nn.Module, task: str, length: int = LENGTH, rows: int = 3) -> dict[str, Tensor]:
    config, generator = ours.config, torch.Generator().manual_seed(length)
    shape = (rows, 2, length) if task == "choice" else (rows, length)
    tokens = torch.randint(FIRST_WORD, VOCAB, shape, generator=generator)
    batch = {"tokens": tokens}
    if config.token_types > 1:
        batch["token_types"] = torch.randint(0, config.token_types, shape, generator=generator)
    if config.kind != "encoder_decoder":
        return batch
    if task in ("lm", "body"):
        start = torch.full((rows, 1), config.decoder_start_id)
        words = torch.randint(FIRST_WORD, VOCAB, (rows, length - 3), generator=generator)
        return {"source": tokens, "tokens": torch.cat([start, words], dim=1)}
    tokens[:, -1] = 1 if config.positions == "relative" else 2  # their classifiers read the state at the end token
    return batch


@pytest.fixture
def padded():
    """`padded(rows, side)` -> one batch of several with one row each, and their masks; pads are token 0."""
    return _padded


def _padded(rows: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    batch = {}
    for name in rows[0]:
        longest = max(row[name].shape[-1] for row in rows)
        pads = [longest - row[name].shape[-1] for row in rows]
        pads = [(pad, 0) if side == "left" else (0, pad) for pad in pads]
        batch[name] = torch.cat([F.pad(row[name], pad) for row, pad in zip(rows, pads, strict=True)])
        if name != "token_types":
            real = [F.pad(torch.ones_like(row[name]), pad) for row, pad in zip(rows, pads, strict=True)]
            batch["source_mask" if name == "source" else "mask"] = torch.cat(real).bool()
    return batch


@pytest.fixture
def ask_theirs():
    """`ask_theirs(model, member, batch, **labels)` -> the same of theirs, and the loss if there are labels."""
    return _ask_theirs


def _ask_theirs(model: nn.Module, member: Member, batch: dict[str, Tensor], **labels: Tensor):
    names = {"tokens": "input_ids", "token_types": "token_type_ids", "mask": "attention_mask"}
    if "source" in batch:
        names |= {"source": "input_ids", "tokens": "decoder_input_ids"}  # "mask" is then the source's
    given = {names[name]: value for name, value in batch.items()}
    out = model(**given, **labels)
    if member.task == "embedding":
        return out.pooler_output, None
    if member.task == "body":
        return out.last_hidden_state, None
    scores = torch.stack([out.start_logits, out.end_logits], -1) if member.task == "span" else out.logits
    return scores, out.loss


@pytest.fixture
def error_of():
    """`error_of(ours, theirs)`: the largest difference, relative to the largest value of theirs."""
    return _error


def _error(ours: Tensor, theirs: Tensor, scale: float | None = None) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / (scale or theirs.abs().max())).item()


MEASURED: dict[tuple[Member, str], dict[str, float]] = {}  # the largest error of each kind, by dtype


@pytest.fixture
def agree():
    """`agree(member, what, dtype, error)`: the error is within the tolerance; it is kept for the README's table."""

    def check(member: Member, what: str, dtype: torch.dtype, error: float) -> None:
        errors, name = MEASURED.setdefault((member, what), {}), str(dtype).removeprefix("torch.")
        errors[name] = max(errors.get(name, 0.0), error)
        assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.1e}"

    return check


def pytest_sessionfinish(session):
    """Keep what was measured, if asked to."""
    if path := os.environ.get("MINILLM_PARITY"):
        _write_results(Path(path))


def _write_results(path: Path) -> None:
    """{environment, versions, results: [{case, family, model_type, class, task, errors: {what: {dtype: error}}}]}."""
    import transformers

    from minillm.training.run_folder import environment

    results: dict[str, dict[str, Any]] = {}
    for member, what in MEASURED:
        case = member.case
        result = results.setdefault(member.id, {"case": case.name, "family": case.family})
        result["model_type"] = getattr(transformers, f"{case.theirs}Config").model_type
        result |= {"class": member.class_name, "task": member.task}
        result.setdefault("errors", {})[what] = MEASURED[member, what]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path.write_text(
        json.dumps({"environment": environment(), "versions": versions, "results": list(results.values())}, indent=1),
        encoding="utf-8",
    )
