"""Floor 3: text from a model. Filters and samplers on logits, the decoding loop, beam search, streaming."""

from minillm.generation.filters import (
    LogitsFilter,
    forced_first,
    forced_last,
    known_ids,
    min_new_tokens,
    no_repeat_ngram,
    repetition_penalty,
)
from minillm.generation.generate import generate, generate_tokens, static_cache
from minillm.generation.next_logits import CausalModel, NextLogits, Seq2Seq
from minillm.generation.nonfinite import first_nonfinite
from minillm.generation.sampling import Sampler, greedy, sampler, temperature, top_k, top_p
from minillm.later import later

__getattr__ = later(
    __name__,
    {
        "Hypotheses": "beam",
        "TextUntilStop": "text",
        "beam_search": "beam",
        "beam_search_text": "text",
        "encode_prompts": "text",
        "encode_sources": "text",
        "generate_text": "text",
        "stream_text": "text",
    },
)

__all__ = [
    "CausalModel",
    "Hypotheses",
    "LogitsFilter",
    "NextLogits",
    "Sampler",
    "Seq2Seq",
    "TextUntilStop",
    "beam_search",
    "beam_search_text",
    "encode_prompts",
    "encode_sources",
    "first_nonfinite",
    "forced_first",
    "forced_last",
    "generate",
    "generate_text",
    "generate_tokens",
    "greedy",
    "known_ids",
    "min_new_tokens",
    "no_repeat_ngram",
    "repetition_penalty",
    "sampler",
    "static_cache",
    "stream_text",
    "temperature",
    "top_k",
    "top_p",
]
