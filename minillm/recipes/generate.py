"""`minillm generate`: text from a run, a model or an adapter."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minillm.config import seed_flaw
from minillm.generation import sampler, stream_text
from minillm.models import EncoderDecoder
from minillm.peft import merge
from minillm.recipes.locate import load
from minillm.training.distributed import pick_device

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class GenerateConfig:
    """`minillm generate`: how to continue a prompt. The same seed gives the same text."""

    max_new_tokens: int | None = None  # none: 128, or as many as the model's positions leave room for
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int | None = None  # draw from this many most likely tokens only
    top_p: float | None = None  # or from the fewest whose probabilities reach this sum
    seed: int = 0
    stop: tuple[str, ...] = ()  # end before these texts: a,b or, where spaces count, '[" a", " b"]'; \n ends a line
    base: str = ""  # of an adapter whose base was moved
    merge: bool = False  # fold a LoRA into the weights first: faster, equal up to rounding
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self):
        if wrong := seed_flaw(self.seed):
            raise ValueError(*wrong)


def generate(folder: str | Path, prompt: str, config: GenerateConfig) -> Iterator[str]:
    """The continuation of `prompt`, piece by piece, by the run, model or adapter in `folder`.

    Everything is checked and loaded by the call; ValueError lists what cannot work.
    """
    device = pick_device(config.device)
    model, tokenizer, report, _ = load(folder, base=config.base, device=device)
    if config.merge:
        if report is None:
            raise ValueError(f"merge=true, but {folder} is no adapter: there is nothing to merge")
        merge(model)
    generator = torch.Generator(device).manual_seed(config.seed)
    size = model.config.vocab_size
    choose = sampler(config.temperature, config.top_k, config.top_p, generator, vocab_size=size)
    stop = [text.replace("\\n", "\n") for text in config.stop]
    written = 1 if isinstance(model, EncoderDecoder) else len(tokenizer.encode(prompt))  # by the decoder, at the start
    room = model.config.max_positions - written
    count = max(1, min(MAX_NEW_TOKENS, room)) if config.max_new_tokens is None else config.max_new_tokens
    return stream_text(model, tokenizer, prompt, max_new_tokens=count, sampler=choose, stop=stop)
