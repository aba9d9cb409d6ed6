"""Text-level generation: stop strings, half characters, batches, the wrong tokenizer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.generation import TextUntilStop, encode_prompts, generate_text, sampler, stream_text
from minillm.models import ModelConfig, build
from minillm.tokenizers import ByteTokenizer, CharTokenizer
from minillm.tokenizers.formats import InputFormat

BYTES = ByteTokenizer()


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 80, "init_std": 0.5}
    model = build(ModelConfig(vocab_size=BYTES.vocab_size, tie_embeddings=False, **sizes))
    model.tokenizer_fingerprint = BYTES.fingerprint
    return model


def saying(text, after):
    """A sampler that says `text` byte by byte whatever the model thinks, then ids from `after` for ever."""
    script = iter([*text.encode(), *after])
    return lambda logits: torch.full((len(logits),), next(script))


def shown(text, stop, tokenizer=BYTES):
    """What TextUntilStop shows of `text`, push by push, and whether it is done."""
    out = TextUntilStop(tokenizer, stop)
    pieces = [out.push(i) for i in tokenizer.encode(text)]
    return pieces, out


def test_a_beginning_of_a_stop_string_is_held_back():
    pieces, out = shown("a.b..c", ["..c"])
    assert pieces == ["a", "", ".b", "", "", ""] and out.done
    pieces, out = shown("a..", ["..c"])
    assert pieces == ["a", "", ""] and out.flush() == ".." and out.done


def test_half_characters_are_held_back():
    pieces, out = shown("é€", [])
    assert pieces == ["", "é", "", "", "€"]
    out = TextUntilStop(BYTES)
    assert [out.push(i) for i in "€".encode()[:2]] == ["", ""] and out.flush() == "\N{REPLACEMENT CHARACTER}"


def test_end_of_text_ends_and_shows_what_was_held():
    out = TextUntilStop(BYTES, ["xy"])
    assert [out.push(ord("x")), out.push(BYTES.eos_id), out.push(ord("z"))] == ["", "x", ""] and out.done


@given(
    st.text(alphabet="ab é", max_size=12),
    st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_shown_text_is_the_text_before_the_first_complete_stop_string(text, stop):
    """The definition: among the prefixes of the text take the shortest that contains a stop string."""
    pieces, out = shown(text, stop)
    got = "".join(pieces) + out.flush()
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in stop)]
    if not ends:
        assert got == text
    else:
        assert got == text[: min(text[: ends[0]].find(s) for s in stop if s in text[: ends[0]])]


def test_one_token_with_a_stop_string_inside():
    """Several characters in a token, as with sentencepiece: the result is as if they had come one by one."""

    class Words(CharTokenizer):
        def token_bytes(self, token):
            return {4: b"one E", 5: b"ND two", 6: b"x1 END y END"}[token]

    tokenizer = Words("abc")
    out = TextUntilStop(tokenizer, ["END"])
    assert (out.push(4), out.push(5), out.done) == ("one ", "", True)
    out = TextUntilStop(tokenizer, ["END"])
    assert (out.push(6), out.done) == ("x1 ", True)


def test_stream_joins_to_the_text(model):
    options = {"max_new_tokens": 30}
    text = generate_text(model, BYTES, ["hello"], **options)[0]
    assert len(set(text)) > 5 and "".join(stream_text(model, BYTES, "hello", **options)) == text


def test_stream_shows_pieces_as_they_come(model):
    pieces = stream_text(model, BYTES, "hi", max_new_tokens=20, stop=["\n\n"], sampler=saying("né\nx\n\nmore", []))
    assert list(pieces) == ["n", "é", "\nx"]


def test_end_of_text_stops_the_stream(model):
    says = saying("done", [BYTES.eos_id])  # one more step would exhaust the script and fail
    assert "".join(stream_text(model, BYTES, "hi", max_new_tokens=20, sampler=says)) == "done"


def test_a_batch_stops_when_every_row_has(model):
    says = saying("same.", [])
    assert generate_text(model, BYTES, ["a", "bcd"], max_new_tokens=20, stop=["."], sampler=says) == ["same", "same"]


def test_batch_is_each_prompt_alone(model):
    prompts = ["a", "a longer prompt", "é"]
    alone = [generate_text(model, BYTES, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert generate_text(model, BYTES, prompts, max_new_tokens=20) == alone
    stop = [alone[1][3:5]]
    want = [text.split(stop[0])[0] for text in alone]
    assert generate_text(model, BYTES, prompts, max_new_tokens=20, stop=stop) == want


def test_prompts_have_the_form_of_a_beginning():
    """`<s> text` where that is the tokenizer's whole format, as Llama's; but never `<s> text </s>`: that is an end."""
    torch.manual_seed(0)
    model, bos = (
        build(ModelConfig(vocab_size=BYTES.vocab_size, hidden_size=16, num_layers=1, num_heads=2)),
        BYTES.bos_id,
    )
    tokens, mask = encode_prompts(model, BYTES, ["ab", "c"])
    assert tokens.tolist() == [[97, 98], [BYTES.pad_id, 99]] and mask.tolist() == [[True, True], [False, True]]

    class Open(ByteTokenizer):
        input_format = InputFormat(single=((bos, 0), ("A", 0)), pair=((bos, 0), ("A", 0), ("B", 0)))

    tokens, mask = encode_prompts(model, Open(), ["ab", "c", ""])
    assert tokens.tolist() == [[bos, 97, 98], [BYTES.pad_id, bos, 99], [BYTES.pad_id, BYTES.pad_id, bos]]
    assert mask.sum(-1).tolist() == [3, 2, 1]


def test_seed_repeats_text(model):
    def sample(seed):
        draw = sampler(generator=torch.Generator().manual_seed(seed))
        return generate_text(model, BYTES, ["x"], max_new_tokens=9, sampler=draw)

    assert sample(3) == sample(3) != sample(4)


# ---- bad input


def test_the_tokenizer_of_another_model(model):
    other = CharTokenizer("abc")
    for call in (lambda: generate_text(model, other, ["a"], max_new_tokens=3), lambda: stream(model, other)):
        with pytest.raises(ValueError, match="cannot generate: use the model's tokenizer!"):
            call()


def stream(model, tokenizer):
    return stream_text(model, tokenizer, "a", max_new_tokens=3)  # refused at the call, not at the first piece


def test_a_model_without_fingerprint_takes_any_tokenizer_whose_ids_it_knows(model):
    model.tokenizer_fingerprint = None
    assert generate_text(model, ByteTokenizer(["<extra>"]), ["a"], max_new_tokens=3)[0]
    with pytest.raises(ValueError, match=r"token ids \[371\] are outside the vocabulary 0..258: use the model's tok"):
        generate_text(model, CharTokenizer([chr(i) for i in range(33, 500)]), [chr(400)], max_new_tokens=3)


def test_empty_prompts(model):
    with pytest.raises(
        ValueError, match=rf"prompts \[1, 2\] are empty: .*begin a new document.*tensor\(\[\[{BYTES.eos_id}\]\]\)"
    ):
        generate_text(model, BYTES, ["a", "", ""], max_new_tokens=3)
    with pytest.raises(ValueError, match="there is no prompt"):
        generate_text(model, BYTES, [], max_new_tokens=3)


def test_a_string_where_a_list_belongs(model):
    with pytest.raises(ValueError, match=r"prompts is a list of strings, got one string: pass \[prompt\]"):
        generate_text(model, BYTES, "hello", max_new_tokens=3)
    with pytest.raises(ValueError, match=r"stop is a list of strings, got one string: pass \['END'\]"):
        generate_text(model, BYTES, ["hello"], max_new_tokens=3, stop="END")


def test_empty_stop_string(model):
    with pytest.raises(ValueError, match="stop holds the empty string"):
        generate_text(model, BYTES, ["hello"], max_new_tokens=3, stop=["x", ""])


def test_prompt_longer_than_the_model_allows(model):
    with pytest.raises(ValueError, match=r"prompt of 79 tokens \+ max_new_tokens=3 make 82, more than .*=80"):
        generate_text(model, BYTES, ["x" * 79, "y"], max_new_tokens=3)
