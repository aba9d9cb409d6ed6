"""Text to token ids and back, exactly: sentencepiece, bytes, characters. Floor 1."""

from minillm.tokenizers.base import Tokenizer, check_same
from minillm.tokenizers.folder import load_tokenizer
from minillm.tokenizers.simple import ByteTokenizer, CharTokenizer
from minillm.tokenizers.stream import StreamDecoder
from minillm.tokenizers.subword import SentencePieceTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "check_same",
    "load_tokenizer",
]
