"""Text in, batches of token ids out. Floor 2."""

from minillm.data.contrastive import Sentences, sentence_groups
from minillm.data.documents import Document, corpus_summary, split_documents
from minillm.data.encoder_decoder import encoder_decoder_batch
from minillm.data.examples import (
    Example,
    ExampleLoader,
    Pair,
    example_batches,
    pair_examples,
    tagged_examples,
    text_examples,
)
from minillm.data.infilling import TextInfilling
from minillm.data.masking import MaskedLanguageModeling, WordBoundaries
from minillm.data.mixing import MixedLoader, sampling_probabilities
from minillm.data.objective import Objective, ObjectiveLoader
from minillm.data.packing import PackedLoader, sequential_batches
from minillm.data.padding import PaddedLoader
from minillm.data.reading import TEXT_EXTENSIONS, read_documents
from minillm.data.spans import SpanCorruption, restore_spans, sentinel_ids, text_length
from minillm.data.tokens import TokenFile, write_tokens

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
