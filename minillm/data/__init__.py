"""Text in, batches of token ids out. Floor 2."""

from minillm.data.documents import Document, corpus_summary, split_documents
from minillm.data.packing import PackedLoader, sequential_batches
from minillm.data.padding import PaddedLoader
from minillm.data.reading import TEXT_EXTENSIONS, read_documents
from minillm.data.tokens import TokenFile, write_tokens

__all__ = [
    "TEXT_EXTENSIONS",
    "Document",
    "PackedLoader",
    "PaddedLoader",
    "TokenFile",
    "corpus_summary",
    "read_documents",
    "sequential_batches",
    "split_documents",
    "write_tokens",
]
