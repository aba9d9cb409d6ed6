"""Text to token ids and back: sentencepiece, bytes, characters, and the tokenizers of checkpoints. Floor 1."""

from minillm.later import later
from minillm.tokenizers.base import Tokenizer, check_same
from minillm.tokenizers.formats import InputFormat
from minillm.tokenizers.simple import ByteTokenizer, CharTokenizer

__getattr__ = later(
    __name__,
    {
        "HubTokenizer": "hub",
        "SentencePieceTokenizer": "subword",
        "StreamDecoder": "stream",
        "encode_chat": "chat",
        "encode_trusted": "chat",
        "load_tokenizer": "folder",
        "render_chat": "chat",
    },
)

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
