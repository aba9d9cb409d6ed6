"""Text in, batches of token ids out. Floor 2."""

from minillm.data.documents import Document, corpus_summary, split_documents
from minillm.data.packing import PackedLoader, sequential_batches
from minillm.data.padding import PaddedLoader
from minillm.data.tokens import TokenFile, write_tokens
from minillm.later import later

__getattr__ = later(
    __name__,
    {
        "Example": "examples",
        "ExampleLoader": "examples",
        "MaskedLanguageModeling": "masking",
        "MixedLoader": "mixing",
        "Objective": "objective",
        "ObjectiveLoader": "objective",
        "Pair": "examples",
        "Sentences": "contrastive",
        "SpanCorruption": "spans",
        "TEXT_EXTENSIONS": "reading",
        "TextInfilling": "infilling",
        "WordBoundaries": "masking",
        "encoder_decoder_batch": "encoder_decoder",
        "example_batches": "examples",
        "pair_examples": "examples",
        "read_documents": "reading",
        "restore_spans": "spans",
        "sampling_probabilities": "mixing",
        "sentence_groups": "contrastive",
        "sentinel_ids": "spans",
        "tagged_examples": "examples",
        "text_examples": "examples",
        "text_length": "spans",
    },
)

__all__ = [
    "TEXT_EXTENSIONS",
    "Document",
    "Example",
    "ExampleLoader",
    "MaskedLanguageModeling",
    "MixedLoader",
    "Objective",
    "ObjectiveLoader",
    "PackedLoader",
    "PaddedLoader",
    "Pair",
    "Sentences",
    "SpanCorruption",
    "TextInfilling",
    "TokenFile",
    "WordBoundaries",
    "corpus_summary",
    "encoder_decoder_batch",
    "example_batches",
    "pair_examples",
    "read_documents",
    "restore_spans",
    "sampling_probabilities",
    "sentence_groups",
    "sentinel_ids",
    "sequential_batches",
    "split_documents",
    "tagged_examples",
    "text_examples",
    "text_length",
    "write_tokens",
]
