"""Old checkpoints without tokenizer.json: the same description built from vocab.txt or vocab.json and merges.txt."""

from typing import Any

from minillm.files import read_json
from minillm.tokenizers.hub_folder import HubFolder, read_text

WORDPIECE, BPE = ("vocab.txt",), ("vocab.json", "merges.txt")


def describe_wordpiece(folder: HubFolder) -> dict[str, Any]:
    """BERT's tokenizer.json from vocab.txt, one piece a line, and the do_lower_case of tokenizer_config.json.

    Source: Devlin et al. 2019 (arXiv:1810.04805): clean, split at punctuation and Chinese characters, longest match.
    """
    lines = read_text(folder.path / "vocab.txt").split("\n")
    vocab = {piece.rstrip("\r"): i for i, piece in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    config = folder.tokenizer_config
    lower = bool(config.get("do_lower_case", True))
    return {
        **_common(folder, vocab),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
            "strip_accents": config.get("strip_accents"),
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": folder.roles(vocab).get("unk", "[UNK]"), "vocab": vocab,
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        },
    }  # fmt: skip


def describe_bpe(folder: HubFolder) -> dict[str, Any]:
    """GPT-2's and RoBERTa's tokenizer.json from vocab.json (piece -> id) and merges.txt (a pair a line)."""
    path = folder.path / "vocab.json"
    vocab = read_json(path)
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{path} is not an object of piece: id; copy it again from where the checkpoint came from")
    lines = read_text(folder.path / "merges.txt").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if wrong := [" ".join(merge) for merge in merges if len(merge) != 2]:
        raise ValueError(f"{folder.path / 'merges.txt'}: {len(wrong)} lines are not pairs of pieces, e.g. {wrong[:3]}")
    space = bool(folder.tokenizer_config.get("add_prefix_space", False))
    byte_level = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": True}
    return {
        **_common(folder, vocab),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


def _common(folder: HubFolder, vocab: dict[str, int]) -> dict[str, Any]:
    """The parts that do not depend on the algorithm; the input format is the family's."""
    if folder.family is None:
        raise ValueError(
            f"{folder.path} has no tokenizer.json, and neither tokenizer_class nor model_type in its JSON files says "
            "how its vocabulary is used. Make one with transformers: AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder)"
        )
    roles = folder.roles(vocab)
    specials = sorted({(vocab[name], name) for name in roles.values() if name in vocab})
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": name, "lstrip": name == "<mask>", **flags} for i, name in specials]
    return {"version": "1.0", "added_tokens": added, "post_processor": _template(folder, roles, vocab)}


def _template(folder: HubFolder, roles: dict[str, str], vocab: dict[str, int]) -> dict[str, Any]:
    form = folder.family_format(roles, vocab)
    names = {i: name for name, i in vocab.items()}
    used = sorted({what for what, _ in form.pair if isinstance(what, int)})
    single, pair = (
        [
            {"SpecialToken": {"id": names[what], "type_id": kind}}
            if isinstance(what, int)
            else {"Sequence": {"id": what, "type_id": kind}}
            for what, kind in items
        ]
        for items in (form.single, form.pair)
    )
    tokens = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in used}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
