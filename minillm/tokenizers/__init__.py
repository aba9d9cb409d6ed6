"""Text to token ids and back: sentencepiece, bytes, characters, and the tokenizers of checkpoints. Floor 1."""

from minillm.tokenizers.base import Tokenizer, check_same
from minillm.tokenizers.chat import encode_chat, encode_trusted, render_chat
from minillm.tokenizers.folder import load_tokenizer
from minillm.tokenizers.formats import InputFormat
from minillm.tokenizers.hub import HubTokenizer
from minillm.tokenizers.simple import ByteTokenizer, CharTokenizer
from minillm.tokenizers.stream import StreamDecoder
from minillm.tokenizers.subword import SentencePieceTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "HubTokenizer",
    "InputFormat",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "check_same",
    "encode_chat",
    "encode_trusted",
    "load_tokenizer",
    "render_chat",
]
