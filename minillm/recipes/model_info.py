"""What `minillm info` says of a model: how large it is, and what it takes to run and to tune it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm.models.cards import CARDS, Card
from minillm.models.config import ModelConfig
from minillm.models.memory import TrainingMemory, training_memory
from minillm.models.size import DTYPES, ModelSize, model_size
from minillm.recipes.common import format_table

NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}


@dataclass(frozen=True)
class InfoConfig:
    """`minillm info`: for which training its memory is estimated."""

    batch_size: int = 1
    length: int = 1024  # tokens in a row, or the model's context if that is shorter
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    rank: int = 8  # of LoRA and QLoRA
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # of LoRA and QLoRA; all-linear means every linear layer
    device: Literal["cpu", "cuda"] = "cuda"
    plot: str = ""  # a PNG file to draw the memory of the three methods into

    def __post_init__(self):
        least = ("batch_size", "length", "rank")
        if wrong := [f"{name}={getattr(self, name)}: at least 1" for name in least if getattr(self, name) < 1]:
            raise ValueError("nothing can be estimated: " + "; ".join(wrong))


def describe_card(card: Card, config: InfoConfig) -> str:
    """All that `minillm info NAME` prints."""
    facts = {"source": card.source}
    if card.differs:
        facts["published"] = f"{model_size(card.config).total + card.more:,} parameters, with {card.differs}"
    head = f"{card.title}\n" + _facts(_shape(card.config) | facts)
    return "\n\n".join([head, parts_table(model_size(card.config).parameters), describe_costs(card.config, config)])


def list_cards() -> str:
    """One line for each card."""
    rows = []
    for name, card in CARDS.items():
        size = model_size(card.config)
        cache = _bytes(size.kv_cache_bytes(1, source_length=1)) if card.config.kind != "encoder" else "-"
        rows.append((name, card.title, f"{size.total:,}", f"{card.context:,}", _bytes(size.bytes()), cache))
    header = ("name", "model", "parameters", "context", "in bfloat16", "cache per token")
    return format_table(header, _right(rows, 2)) + "\n\nminillm info NAME tells more of one"


def parts_table(counts: Mapping[str, int]) -> str:
    """Parameters by part, and their share."""
    rows = [(part, f"{count:,}", f"{100 * count / counts['total']:.1f} %") for part, count in counts.items()]
    return format_table(("part", "parameters", "share"), rows)


def describe_costs(config: ModelConfig, options: InfoConfig) -> str:
    """Bytes of the weights by dtype, the cache, arithmetic, and the memory that tuning takes."""
    size, length = model_size(config), min(options.length, config.max_positions)
    memory = {method: _memories(config, method, length, options) for method in NAMES}
    if options.plot:
        draw_memory(Path(options.plot), {NAMES[name]: plain for name, (plain, _) in memory.items()})
    weights = {dtype: _bytes(size.bytes(dtype)) for dtype in DTYPES}
    note = "int8 and nf4: attention and MLP matrices; embeddings, norms, biases and head stay bfloat16"
    return "\n\n".join(
        [
            "memory of the weights\n" + _facts(weights) + f"\n  ({note})",
            "to run\n" + _facts(_running(size, length)),
            f"memory to tune, batch {options.batch_size} x {length} tokens, {options.precision}, "
            f"rank {options.rank} on {', '.join(options.targets)}\n" + _memory_table(memory),
            "peak: weights, optimizer, and what is largest of gradients and activations together; the last column "
            "recomputes\nactivations (gradient checkpointing). An estimate of tensors: libraries add their own.",
        ]
    )


def _shape(c: ModelConfig) -> dict[str, Any]:
    grouped = f", {c.num_kv_heads} for keys and values" if c.num_kv_heads != c.num_heads else ""
    layers = f"{c.num_layers}"
    if c.kind == "encoder_decoder":
        layers += f" that read and {c.num_decoder_layers} that write"
    window = f", {c.sliding_window} seen by each" if isinstance(c.sliding_window, int) else ""
    return {
        "kind": c.kind.replace("_", "-"),
        "layers": layers,
        "hidden size": c.hidden_size,
        "heads": f"{c.num_heads} of {c.head_dim} features{grouped}",
        "MLP": f"{c.mlp}, {c.intermediate_size} wide, {c.activation}",
        "positions": c.positions,
        "vocabulary": f"{c.vocab_size:,}",
        "context": f"{c.max_positions:,} tokens{window}",
    }


def _running(size: ModelSize, length: int) -> dict[str, str]:
    c, facts = size.config, {}
    if c.kind != "encoder":
        per_token = _bytes(size.kv_cache_bytes(1))
        both = c.kind == "encoder_decoder"
        facts["cache per token"] = f"{per_token} (keys and values in bfloat16)" + (
            f", and {per_token} per token of the source" if both else ""
        )
        full = size.kv_cache_bytes(c.max_positions, source_length=c.max_positions if both else 0)
        facts["cache at full context"] = f"{_bytes(full)} for a row of {c.max_positions:,} tokens"
    facts["forward"] = f"{_flops(size.flops_per_token(length))} per token, in rows of {length:,}"
    facts["training"] = f"{_flops(size.flops_per_token(length, training=True))} per token"
    return facts


def _memories(
    config: ModelConfig, method: str, length: int, options: InfoConfig
) -> tuple[TrainingMemory, TrainingMemory]:
    """Without and with gradient checkpointing."""
    plain, checkpointed = (
        training_memory(
            config,
            method,
            batch_size=options.batch_size,
            length=length,
            checkpointing=checkpointing,
            precision=options.precision,
            rank=options.rank,
            targets=options.targets,
            device=options.device,
        )
        for checkpointing in (False, True)
    )
    return plain, checkpointed


def _memory_table(memory: Mapping[str, tuple[TrainingMemory, TrainingMemory]]) -> str:
    rows = [
        (
            NAMES[method],
            f"{plain.trained:,}",
            *map(_bytes, (plain.weights, plain.optimizer, plain.gradients, plain.activations, plain.peak)),
            _bytes(checkpointed.peak),
        )
        for method, (plain, checkpointed) in memory.items()
    ]
    header = ("method", "trained", "weights", "optimizer", "gradients", "activations", "peak", "recomputing")
    return format_table(header, _right(rows, 1))


def draw_memory(path: Path, memory: Mapping[str, TrainingMemory]) -> None:
    """A stacked bar for each method: where the memory of a training step goes; a tick marks the peak."""
    from minillm.recipes.plots import COLOURS, new_figure

    with new_figure(path, size=(8.0, 1.6 + 0.6 * len(memory))) as (axes,):
        left = [0.0] * len(memory)
        for colour, part in zip(COLOURS, ("weights", "optimizer", "gradients", "activations"), strict=False):
            widths = [getattr(item, part) / 2**30 for item in memory.values()]
            axes.barh(range(len(memory)), widths, left=left, color=colour, label=part, height=0.6)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        peaks = [item.peak / 2**30 for item in memory.values()]
        axes.plot(peaks, range(len(memory)), "|", color="black", markersize=22, label="peak")
        axes.set_yticks(range(len(memory)), list(memory))
        axes.set(xlabel="GiB")
        axes.set_title("Memory of a training step")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=5)


def _facts(facts: Mapping[str, Any]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in facts.items())


def _right(rows: list[tuple], start: int) -> list[tuple]:
    """Texts of columns `start` and later padded so that they stand on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [tuple(cell.rjust(widths[i]) if i >= start else cell for i, cell in enumerate(row)) for row in rows]


def _bytes(count: float) -> str:
    """In units of 1024: 12.3 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _flops(count: float) -> str:
    """12.3 GFLOP."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.1f} {unit}FLOP"
        count /= 1000
    return f"{count:,.1f} TFLOP"
