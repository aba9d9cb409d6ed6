"""How much memory does a training step need? An account of what minillm holds, from a config alone.

Counted is what lives in tensors, which `benchmarks/memory_estimate.py` measures. Libraries add their own, and so does
an allocator that keeps freed blocks for later: with glibc's, a process on a CPU can hold half as much again, or more.
"""

from dataclasses import dataclass
from typing import Literal

from minillm.config import nearest
from minillm.models.activations import Keeping
from minillm.models.config import ModelConfig
from minillm.models.size import ModelSize, lora_targets, model_size

CHOICES = {"method": ("full", "lora", "qlora"), "precision": ("float32", "bfloat16"), "device": ("cpu", "cuda")}
LOGIT_ROWS = 256  # whose logits exist at once: `training/losses`


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step, as `training_memory` estimates them.

    weights: the model's, adapters included, and the half-precision copies that autocast makes.
    gradients, optimizer: of the `trained` values, 4 bytes each and 8 (AdamW's two moments).
    activations: what the forward pass keeps for the backward pass.
    workspace: what comes and goes beside them at the worst moment of the two passes.
    peak: at most the sum of these, and less where gradients grow while activations are freed.
    """

    method: str
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    peak: int


def training_memory(
    model: ModelConfig | str,
    method: Literal["full", "lora", "qlora"] = "full",
    *,
    batch_size: int = 1,
    length: int = 512,
    source_length: int | None = None,
    checkpointing: bool = False,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    rank: int = 8,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    device: Literal["cpu", "cuda"] = "cuda",
) -> TrainingMemory:
    """Estimate a step (forward, backward, AdamW) on `batch_size` rows of `length` tokens without padding.

    model: a config, or the name of a card.
    method: "full" trains float32 weights, with bfloat16 under autocast; "lora" trains float32 adapters of `rank` on the
    linear layers `targets` of a frozen base in `precision`; "qlora" on a base in NF4 that computes in bfloat16
    (`ModelSize.bytes`). A decoder has its loss on top; an encoder is bare, as the heads on it weigh little.
    checkpointing: each block keeps its input only, and makes the rest again.
    device: see `activations.Keeping.cpu`.
    An encoder-decoder reads `source_length` tokens (`length` unless given) and writes `length`.
    """
    size, full, half = model_size(model), method == "full", precision == "bfloat16" or method == "qlora"
    config, shape = size.config, (batch_size, length, length if source_length is None else source_length)
    _check({"method": method, "precision": precision, "device": device}, shape, rank, config)
    keeping = Keeping(
        config,
        readers=tuple(size.matrices) if full else lora_targets(size, targets),
        trains_bias=full,
        adapter_rank=0 if full else rank,
        wide=2 if half and not full else 4,
        narrow=2 if half else 4,
        cpu=device == "cpu",
    )
    trained = size.total if full else size.lora_parameters(rank, targets)
    stored = 4 * size.total if full else size.bytes("nf4" if method == "qlora" else precision) + 4 * trained
    copies = 2 * size.quantised if full and half else 0  # autocast's, of each matrix that trains
    activations, workspace, first_block = _passes(size, keeping, shape, full, checkpointing)
    if method == "qlora":  # the largest matrix in bfloat16, while it is used
        workspace += 2 * max(matrix.inputs * matrix.outputs for matrix in size.matrices.values())
    first_block += 0 if full else 4 * trained
    moments = (copies + activations + workspace, first_block, _all_gradients(size, full, trained))
    return TrainingMemory(
        method=method,
        trained=trained,
        weights=stored + copies,
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=activations,
        workspace=workspace,
        peak=stored + 8 * trained + max(moments),
    )


def _passes(
    size: ModelSize, keeping: Keeping, shape: tuple[int, int, int], full: bool, checkpointing: bool
) -> tuple[int, int, int]:
    """Bytes of the activations, of what comes and goes when all are there, and of all when one block is left."""
    rows, length, source_length = shape
    blocks = keeping.blocks(*shape)
    activations = keeping.around(*shape) + (keeping.inputs(*shape) if checkpointing else sum(blocks))
    stream = keeping.wide * rows * length * size.config.hidden_size
    passing = keeping.passing(rows, max(length, source_length))
    in_loss, of_loss = _loss(size.config, rows * length, full, keeping)
    again = max(blocks) - stream if checkpointing else 0  # the block's input is there already
    top = of_loss + again + passing - 2 * stream  # what the final norm and the head kept is gone
    return activations, max(in_loss, top), _last_gradients(size, full) + blocks[0] + passing + stream


def _loss(config: ModelConfig, tokens: int, full: bool, keeping: Keeping) -> tuple[int, int]:
    """Bytes within the head's loss, and of the gradients it leaves for the backward pass: see `ops/cross_entropy`."""
    if config.kind == "encoder":
        return 0, keeping.wide * tokens * config.hidden_size
    matrix, half = config.vocab_size * config.hidden_size, keeping.narrow == 2
    gradients = 4 * tokens * config.hidden_size + (4 * matrix if full else 0)
    logits = min(LOGIT_ROWS, tokens) * config.vocab_size * (2 + 4 + 2 if half else 4)  # as made, wide, as multiplied
    casts = 4 * matrix if full and half else 0  # of the head's weight, and one chunk's part of its gradient
    return gradients + logits + casts, gradients


def _last_gradients(size: ModelSize, full: bool) -> int:
    """Bytes of the model's gradients at the first block: its own are to come, and the embeddings' unless tied."""
    if not full:
        return 0
    c, parameters = size.config, size.parameters
    blocks = c.num_layers + (c.num_decoder_layers or 0)
    first = (parameters["attention"] + parameters["mlp"]) // blocks
    embeds = parameters["embedding"] if parameters["head"] or c.kind == "encoder" else 0
    return 4 * (size.total - first - embeds)


def _all_gradients(size: ModelSize, full: bool, trained: int) -> int:
    """Bytes of all gradients at the end; a tied matrix then has two, the head's and the embedding's, to be added."""
    tied = full and size.config.kind != "encoder" and not size.parameters["head"]
    return 4 * trained + (4 * size.config.vocab_size * size.config.hidden_size if tied else 0)


def _check(choices: dict[str, str], shape: tuple[int, ...], rank: int, config: ModelConfig) -> None:
    wrong = [
        f"{name}={value!r}: did you mean {nearest(str(value), CHOICES[name])}?"
        for name, value in choices.items()
        if value not in CHOICES[name]
    ]
    if min(*shape, rank) < 1:
        wrong.append(f"batch_size, length, source_length, rank: {', '.join(map(str, (*shape, rank)))}; at least 1 each")
    if max(shape[1:]) > config.max_positions:
        wrong.append(f"length={max(shape[1:])}: the model reads at most max_positions={config.max_positions}")
    if wrong:
        raise ValueError("no memory can be estimated: " + "; ".join(wrong))
