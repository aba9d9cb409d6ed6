"""Tokenizers of checkpoints in tokenizer.json and the older files: ids, specials and decoding are transformers'."""

import importlib.util
import json
import random

import pytest
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minillm.tokenizers import StreamDecoder, encode_trusted, load_tokenizer
from minillm.tokenizers.base import fingerprint_of
from minillm.tokenizers.byte_pieces import BYTE_OF

TEXTS = ["The quick brown fox's jump, it isn't over (1234)!", "Čez cesto je šla žaba. Čebele žvečijo šipek.",
         "def area(r):\n    return 3.14 * r ** 2\n", "naïve café déjà vu", "中文 字",
         "Ana lives in Ljubljana now."] * 3  # fmt: skip
TRICKY = ["čšž ČŠŽ", "e\u0301a\u0308", "a\r\nb\r\n", "    many     spaces  ", "🙂👩‍👩‍👧🇸🇮", "\t\n", "", " ",
          "don't we're I'll", "中文字", "ﬁ½", "x" * 120, "\u2028 \xa0", "▁ under▁score",
          "hello, world. yes? no!"]  # fmt: skip
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
mixed = st.lists(st.sampled_from([*TRICKY, "fox", " The", "jump", "\n"]), max_size=8).map("".join)


def byte_level(specials, pre_tokenizer=None, normalizer=None, size=420):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def parts_of(tokenizer):
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def gpt2():
    return transformers.GPT2TokenizerFast(**parts_of(byte_level(["<|endoftext|>"])))


def roberta():
    parts = parts_of(byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    return transformers.RobertaTokenizerFast(**parts, mask_token=AddedToken("<mask>", lstrip=True, special=True))


def qwen():
    made = transformers.Qwen2TokenizerFast(
        **parts_of(byte_level([])), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return made


def llama3():
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    inner = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], split)
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", 0)],
    )  # fmt: skip
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )


def bert(lower=True):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return transformers.BertTokenizerFast(vocab=tokenizer.get_vocab(), do_lower_case=lower)


def bert_cased():
    return bert(lower=False)


MAKERS = [gpt2, roberta, qwen, llama3, bert, bert_cased]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> (transformers' tokenizer, ours read from its folder, the folder)"""
    found = {}
    for make in MAKERS:
        folder = tmp_path_factory.mktemp(make.__name__)
        theirs = make()
        theirs.save_pretrained(folder)
        found[make.__name__] = theirs, load_tokenizer(folder), folder
    return found


EVERY = pytest.mark.parametrize("name", [make.__name__ for make in MAKERS])


def ids_of(theirs, text):
    return theirs(text, add_special_tokens=False)["input_ids"]


@EVERY
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ids_specials_and_text_are_those_of_transformers(pairs, name, data):
    theirs, ours, _ = pairs[name]
    text = data.draw(any_text | mixed)
    other = data.draw(mixed.filter(bool))  # transformers takes an empty one for none
    assume(not any(t in text for t in theirs.all_special_tokens))  # where it finds tokens, ours finds text
    ids = ours.encode(text)
    assert ids == ids_of(theirs, text)
    assert ours.pieces(text) == theirs.convert_ids_to_tokens(ids)
    single, pair = theirs(text), theirs(text, other)
    assert ours.with_specials(ids)[0] == single["input_ids"]
    found, types = ours.with_specials(ids, ours.encode(other))
    assert found == pair["input_ids"] and len(types) == len(found)
    if "token_type_ids" in pair:
        assert types == pair["token_type_ids"] and ours.with_specials(ids)[1] == single["token_type_ids"]
    if ours.unk_id not in found:  # transformers drops <unk>, ours shows it as a replacement character
        assert ours.decode(found) == theirs.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@EVERY
@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts(pairs, name, text):
    theirs, ours, _ = pairs[name]
    assert ours.encode(text) == ids_of(theirs, text)
    if ours.lossless:
        assert ours.decode(ours.encode(text)) == text


@EVERY
def test_decoded_text_of_whole_sentences(pairs, name):
    """No token is unknown in the training texts; WordPiece's decoder takes away spaces before punctuation."""
    theirs, ours, _ = pairs[name]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.unk_id not in ids
        assert ours.decode(ids) == theirs.decode(ids)
    if name == "bert_cased":
        assert ours.decode(ours.encode("fox , jump ( over ) .")) == "fox, jump ( over )."


def test_lossless_says_which_ones_keep_text(pairs):
    """GPT-2's bytes lose nothing; Qwen composes accents (NFC); BERT lowers, strips and splits."""
    found = {name: ours.lossless for name, (_, ours, _) in pairs.items()}
    assert found == {
        "gpt2": True, "roberta": True, "qwen": False, "llama3": True, "bert": False, "bert_cased": False,
    }  # fmt: skip
    qwen = pairs["qwen"][1]
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"


@EVERY
def test_special_tokens(pairs, name):
    theirs, ours, _ = pairs[name]
    special = {i: str(t) for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert {i: t for t, i in ours.special_ids.items()} == special
    assert set(theirs.all_special_tokens) <= set(special.values())
    for role in ("bos", "eos", "pad", "mask"):
        theirs_id = getattr(theirs, f"{role}_token_id")
        if theirs_id is not None:
            assert getattr(ours, f"{role}_id") == theirs_id
    assert ours.vocab_size == len(theirs)


def test_roles_that_a_checkpoint_does_not_fill(pairs):
    gpt2, qwen, bert = (pairs[name][1] for name in ("gpt2", "qwen", "bert"))
    assert (gpt2.pad_id, gpt2.unk_id, gpt2.mask_id) == (gpt2.eos_id, None, None)
    assert gpt2.token_bytes(gpt2.eos_id) == b""
    assert qwen.bos_id == qwen.eos_id == qwen.special_ids["<|im_end|>"] and "bos" not in qwen.roles
    assert (bert.bos_id, bert.eos_id) == (bert.special_ids["[CLS]"], bert.special_ids["[SEP]"])


@EVERY
def test_special_names_in_text_are_only_text(pairs, name):
    theirs, ours, _ = pairs[name]
    for special in theirs.all_special_tokens:
        ids = ours.encode(f"say {special} now")
        assert ours.special_ids[special] not in ids or ours.special_ids[special] == ours.unk_id
        assert ours.special_ids[special] not in ours.spell(special)
        assert not ours.lossless or ours.decode(ids) == f"say {special} now"
        assert ours.special_ids[special] in encode_trusted(ours, f"say {special} now")


@pytest.mark.parametrize("text", ["say <mask> now.", "<mask>", "a<mask><mask> b", "</s> <s>x ", "no special"])
def test_trusted_text_gives_the_ids_of_transformers(pairs, text):
    """RoBERTa's <mask> swallows the space before it."""
    theirs, ours, _ = pairs["roberta"]
    assert encode_trusted(ours, text) == ids_of(theirs, text)


def test_added_tokens_that_are_text(pairs):
    theirs, ours, _ = pairs["qwen"]
    text = "a <tool_call>\n{}"
    ids = ours.encode(text)
    assert ids == ids_of(theirs, text) and ours.text_tokens["<tool_call>"] in ids
    assert ours.decode(ids) == text and "<tool_call>" not in ours.special_ids


@EVERY
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_stream_concatenates_to_decode(pairs, name, data):
    ours = pairs[name][1]
    encoded = mixed.map(ours.encode)
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30) | encoded)
    stream = StreamDecoder(ours)
    assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids)


@EVERY
def test_saved_with_a_model_it_loads_alone(pairs, name, tmp_path):
    _, ours, folder = pairs[name]
    ours.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(ours) and loaded.fingerprint == ours.fingerprint == load_tokenizer(folder).fingerprint
    fields = ["vocab_size", "bos_id", "eos_id", "pad_id", "unk_id", "mask_id", "special_ids", "roles", "lossless",
              "leading_space", "input_format", "text_tokens", "strips", "language"]  # fmt: skip
    assert [getattr(loaded, f) for f in fields] == [getattr(ours, f) for f in fields]
    assert all(loaded.encode(text) == ours.encode(text) for text in TRICKY)


def test_fingerprint_follows_content_and_not_layout(pairs, tmp_path):
    _, ours, folder = pairs["bert"]
    description = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def fingerprint(name, changed_config=config, **changes):
        target = tmp_path / name
        target.mkdir()
        items = list({**description, **changes}.items())
        random.Random(0).shuffle(items)
        (target / "tokenizer.json").write_text(json.dumps(dict(items), indent=3, ensure_ascii=True))
        (target / "tokenizer_config.json").write_text(json.dumps(changed_config))
        return load_tokenizer(target).fingerprint

    assert fingerprint("same") == ours.fingerprint
    truncated = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    assert fingerprint("shortened", truncation=truncated) == ours.fingerprint
    cased = {**description["normalizer"], "lowercase": False}
    others = [fingerprint("cased", normalizer=cased), fingerprint("roles", {**config, "pad_token": "[MASK]"})]
    assert len({*others, ours.fingerprint}) == 3


# --- words


def test_words_of_bert_are_those_of_transformers(pairs):
    theirs, ours, _ = pairs["bert_cased"]
    for text in (*TEXTS, *TRICKY):
        encoded = theirs(text)
        assert ours.word_ids(encoded["input_ids"]) == encoded.word_ids(), text


def test_words_of_byte_level_pieces_by_hand(pairs):
    ours = pairs["gpt2"][1]
    text = "The jumping fox\nČez"
    ids = ours.encode(text)
    assert "".join(ours.pieces(text)).count("Ġ") == 2
    words = {}
    for token, word in zip(ids, ours.word_ids(ids), strict=True):
        words[word] = words.get(word, b"") + ours.token_bytes(token)
    assert b"".join(words.values()).decode() == text
    assert list(words.values()) == [b"The", b" jumping", b" fox", b"\n", "Čez".encode()]


@pytest.mark.parametrize("name", ["bert", "bert_cased"])
def test_given_words_are_split_as_in_transformers(pairs, name):
    theirs, ours, _ = pairs[name]
    words = ["Ana", "(EU)", "lives", "in", "Ljubljana", ",", "isn't", "it", "?"]
    encoded = theirs(words, is_split_into_words=True, add_special_tokens=False)
    assert ours.encode_words(words) == (encoded["input_ids"], encoded.word_ids())


def test_given_words_give_the_ids_of_the_sentence(pairs):
    ours = pairs["gpt2"][1]
    words = ["Ana", "lives", "in", "Ljubljana", "now."]
    ids, at = ours.encode_words(words)
    assert ids == ours.encode(" ".join(words)) and at == sorted(at) and set(at) == {0, 1, 2, 3, 4}
    for n, word in enumerate(words):
        assert ours.decode(i for i, k in zip(ids, at, strict=True) if k == n).strip() == word
    with pytest.raises(ValueError, match="got the single string 'Ana lives'"):
        ours.encode_words("Ana lives")


# --- older folders


@pytest.mark.parametrize("make", [bert, bert_cased])
def test_vocab_txt(make, tmp_path):
    theirs = make()
    pieces = sorted(theirs.get_vocab(), key=theirs.get_vocab().__getitem__)
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    if make is bert_cased:  # BERT lowers unless told not to
        (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    check_equal(load_tokenizer(tmp_path), theirs)


@pytest.mark.parametrize("make", [gpt2, roberta])
def test_vocab_json_and_merges(make, tmp_path):
    theirs = make()
    theirs.backend_tokenizer.model.save(str(tmp_path))
    assert not (tmp_path / "tokenizer.json").exists()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": make.__name__}))
    check_equal(load_tokenizer(tmp_path), theirs)
    assert encode_trusted(load_tokenizer(tmp_path), "say <mask> now.") == ids_of(theirs, "say <mask> now.")


def check_equal(ours, theirs):
    for text in (*TEXTS, *TRICKY):
        assert ours.encode(text) == ids_of(theirs, text)
        pair = theirs(text, "fox")
        assert ours.with_specials(ours.encode(text), ours.encode("fox"))[0] == pair["input_ids"]
    assert set(ours.special_ids) == set(theirs.all_special_tokens)
    assert all(ours.special_ids[t] == theirs.convert_tokens_to_ids(t) for t in ours.special_ids)
    assert all(getattr(ours, f"{r}_id") == getattr(theirs, f"{r}_token_id") for r in ("eos", "mask") if r in ours.roles)


def test_folders_that_name_no_special_token(pairs, tmp_path):
    """The Hub's gpt2 and bert-base-uncased say little more than their model_type."""
    for name, model_type in (("gpt2", "gpt2"), ("bert", "bert"), ("roberta", "roberta")):
        _, ours, folder = pairs[name]
        target = tmp_path / name
        target.mkdir()
        (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (target / "config.json").write_text(json.dumps({"model_type": model_type}))
        loaded = load_tokenizer(target)
        assert loaded.fingerprint == ours.fingerprint and loaded.roles == ours.roles


def test_bos_and_eos_are_as_the_file_says(pairs, tmp_path):
    """add_bos_token and add_eos_token of tokenizer_config.json are for sentencepiece files, in transformers too."""
    _, ours, folder = pairs["llama3"]
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": True, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).with_specials(ours.encode("fox"))[0] == theirs("fox")["input_ids"]
    assert ours.with_specials([5], [6, 7]) == ([0, 5, 0, 6, 7], [0, 0, 1, 1, 1])


@pytest.mark.parametrize("bytes_listed", [False, True])
def test_llama2_json(tmp_path, bytes_listed):
    """The file of the first Llamas: a normaliser puts the space before each text, and the decoder strips it.

    Who trains such a tokenizer with the library gets the bytes into it as special tokens; they are bytes all the same.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "f", "o", "x", "▁f", "ox", "▁fox"]
    merges = [("▁", "f"), ("o", "x"), ("▁f", "ox")]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens(["<unk>", "<s>", "</s>", *(pieces[3:259] if bytes_listed else [])])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert ours.decode(ours.encode("<0x41>")) == "<0x41>" and ours.encode("<0x41>")[1:] != [68]
    for text in ("fox", " fox  fox", "č🙂\nfox", ""):
        assert ours.encode(text) == ids_of(theirs, text)
        assert ours.decode(ours.encode(text)) == theirs.decode(ids_of(theirs, text)) == text
    assert encode_trusted(ours, "fox</s>fox<s>") == ids_of(theirs, "fox</s>fox<s>")


def test_a_special_that_the_model_itself_would_find_in_text(tmp_path):
    """A word-level vocabulary splits at white space, so "</s>" is one of its words; the promise holds all the same."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "<": 3, "/": 4, "s": 5, ">": 6}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("a </s> a") == [2, 3, 4, 5, 6, 2]
    assert ours.decode([2, 2, 0]) == "a a \N{REPLACEMENT CHARACTER}"


def test_gpt2_bytes_are_those_of_transformers():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert {c: b for b, c in bytes_to_unicode().items()} == BYTE_OF


# --- bad folders


def damaged(pairs, tmp_path, name="bert", **changes):
    """A copy of a good folder whose tokenizer.json has other entries."""
    _, _, folder = pairs[name]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def token(content, i):
    return {"id": i, "content": content, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False}  # fmt: skip


def test_truncated_tokenizer_json(pairs, tmp_path):
    path = damaged(pairs, tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tokenizer\.json is not JSON: line"):
            load_tokenizer(tmp_path)
    path.write_bytes(b"\xff" + whole)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"type": "Magic"}}, "'tokenizers' cannot read it: .*Copy tokenizer.json again"),
        ({"model": {"type": "WordPiece", "vocab": {"a": -1}}}, "cannot read it"),
        ({"model": []}, "cannot read it"),
        ({"model": {"type": "BPE", "vocab": {"č": 0}, "merges": [], "continuing_subword_prefix": "x"}},
         "continuing_subword_prefix is not known here"),
        ({"added_tokens": {}}, "added_tokens is not a list of objects"),
        ({"added_tokens": [1]}, "added_tokens is not a list of objects"),
        ({"added_tokens": [token("[NEW]", 10**9)]}, r"added tokens \{'\[NEW\]': 1000000000\} have ids that do not"),
        ({"decoder": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}},
         "decoder .*CTC.* is not known here; known types: ByteLevel"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 9999], "cls": ["[CLS]", 2]}},
         r"have the ids \[9999\], which the vocabulary does not have"),
    ],
)  # fmt: skip
def test_damaged_tokenizer_json(pairs, tmp_path, changes, message):
    damaged(pairs, tmp_path, **changes)
    with pytest.raises(ValueError, match=f"tokenizer\\.json: .*(?:{message})"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_with_an_absurd_id(pairs, tmp_path):
    _, _, folder = pairs["bert"]
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    damaged(pairs, tmp_path, model={**model, "vocab": {**model["vocab"], "far": 4_000_000_000}})
    with pytest.raises(ValueError, match=r"a token has the id 4000000000, but there are only \d+ tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map", "added_tokens", "config"])
def test_json_files_that_are_no_objects(pairs, tmp_path, file):
    damaged(pairs, tmp_path)
    file = f"{file}.json"
    (tmp_path / file).write_text("[1, 2]")
    with pytest.raises(ValueError, match=rf"{file} holds a list, expected a JSON object .*copy the file again"):
        load_tokenizer(tmp_path)
    (tmp_path / file).write_text('{"a":')
    with pytest.raises(ValueError, match=f"{file} is not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"eos_token": 5}, "eos_token is 5; expected a string, an object with 'content', or null"),
        ({"eos_token": {"text": "x"}}, None),
        ({"pad_token": "<missing>"}, "name {'pad_token': '<missing>'}, which its vocabulary does not have"),
        ({"additional_special_tokens": "x"}, "additional_special_tokens is 'x'; expected a list"),
        ({"additional_special_tokens": ["<missing>"]}, r"does not have: \['<missing>'\]"),
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\], expected an object"),
        ({"added_tokens_decoder": {"7777": {"content": "[NEW]"}}}, "have ids that do not follow"),
        ({"added_tokens_decoder": {"x": "[NEW]"}}, "need a name and an id of 0"),
        ({"added_tokens_decoder": {"77777777777": {"content": "[NEW]"}}}, "need a name and an id of 0"),
        ({"added_tokens_decoder": {"3": {"content": "[PAD]"}}}, r"differ: \{'\[PAD\]': \(0, 3\)\}"),
        ({"chat_template": 7}, "chat_template is neither a string nor a list"),
        ({"chat_template": ["x"]}, "chat_template is neither a string nor a list"),
    ],
)
def test_damaged_tokenizer_config(pairs, tmp_path, config, message):
    damaged(pairs, tmp_path)
    good = {"model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**good, **config}))
    if message is None:  # an object without a name is no token: the role stays empty, and [SEP] stands in
        assert load_tokenizer(tmp_path).eos_id == load_tokenizer(tmp_path).special_ids["[SEP]"]
        return
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_an_added_token_that_only_the_config_knows(pairs, tmp_path):
    _, ours, _ = pairs["bert"]
    damaged(pairs, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(ours.vocab_size): {"content": "[NEW]", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_ids["[NEW]"] == ours.vocab_size == loaded.vocab_size - 1
    assert loaded.fingerprint != ours.fingerprint


def test_no_special_token_at_all(tmp_path):
    byte_level([]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"names no token for any of \['bos'.*name one in tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_old_files_without_a_family_or_damaged(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, and neither tokenizer_class nor model_type"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"needs tokens for \['cls', 'sep'\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is not UTF-8 text: byte 6"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist, nor another file"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match=r"vocab\.json is not an object of piece: id"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"merges\.txt: 1 lines are not pairs of pieces, e\.g\. \['a b c'\]"):
        load_tokenizer(tmp_path)


def test_damaged_copy_beside_our_model(pairs, tmp_path):
    pairs["gpt2"][1].save(tmp_path)
    path = tmp_path / "hub_tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"hub_tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"roles": 3}, {"special_ids": {}}, {"input_format": {}}, {"special_ids": {"<|endoftext|>": 10**12}}, {"kind": []}],
)
def test_a_crafted_description_with_a_right_fingerprint(pairs, tmp_path, change):
    """Whoever writes the file can compute its fingerprint too."""
    ours = pairs["gpt2"][1]
    ours.save(tmp_path)
    crafted = {**ours.description(), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"fingerprint": fingerprint_of(crafted), **crafted}))
    with pytest.raises(ValueError, match=r"json (does not describe a|is of kind)|special tokens have the ids"):
        load_tokenizer(tmp_path)


def test_without_the_library(pairs, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokenizers" else real(name))
    with pytest.raises(ValueError, match=r'needs the library \'tokenizers\': pip install "minillm\[hub\]"'):
        load_tokenizer(pairs["bert"][2])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=0)
def test_a_damaged_file_is_a_clear_error_or_a_whole_tokenizer(pairs, tmp_path_factory, seed):
    """Entries of tokenizer.json replaced at random by values of other types: nothing but ValueError may come."""
    chance = random.Random(seed)
    description = json.loads((pairs["bert"][2] / "tokenizer.json").read_text())
    place = description
    while isinstance(place, dict | list) and place:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or chance.random() < 0.3:
            place[key] = chance.choice([None, -1, 0, 3, "", "x", [], {}, [1], {"type": "x"}, True, 10**20])
            break
        place = place[key]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    try:
        ours = load_tokenizer(folder)
    except ValueError as error:
        assert "tokenizer.json" in str(error)
    else:
        assert all(0 <= i < ours.vocab_size for i in ours.with_specials(ours.encode("The fox"))[0])
