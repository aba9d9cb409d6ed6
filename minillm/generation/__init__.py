"""Floor 3: text from a model. Filters and samplers on logits, the decoding loop, streaming."""

from minillm.generation.generate import generate, generate_tokens, static_cache
from minillm.generation.nonfinite import first_nonfinite
from minillm.generation.sampling import Sampler, greedy, sampler, temperature, top_k, top_p
from minillm.generation.text import TextUntilStop, encode_prompts, generate_text, stream_text

__all__ = [
    "Sampler",
    "TextUntilStop",
    "encode_prompts",
    "first_nonfinite",
    "generate",
    "generate_text",
    "generate_tokens",
    "greedy",
    "sampler",
    "static_cache",
    "stream_text",
    "temperature",
    "top_k",
    "top_p",
]
