"""Generation from encoder-decoders: their `condition` makes them decoders, and all that holds for those holds here."""

import itertools
import math

import pytest
import torch

from minillm import load
from minillm.generation import (
    beam_search,
    beam_search_text,
    encode_sources,
    forced_first,
    forced_last,
    generate_text,
    generate_tokens,
    min_new_tokens,
    no_repeat_ngram,
    static_cache,
    stream_text,
)
from minillm.layers.cache import MemoryCache
from minillm.models import ModelConfig, build
from minillm.models.recurrent import RecurrentConfig, RecurrentLM
from minillm.models.recurrent_seq2seq import RecurrentEncoderDecoder
from minillm.tokenizers import ByteTokenizer

START, STOP, NEW = 1, 2, 8
KINDS = {
    "T5": {"positions": "relative", "relative_buckets": 8, "relative_distance": 16, "activation": "relu"},
    "BART": {
        "positions": "learned",
        "norm": "layer",
        "norm_first": False,
        "embed_norm": True,
        "mlp": "plain",
        "activation": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "original": {"positions": "sinusoidal", "norm": "layer", "norm_first": False, "mlp": "plain", "activation": "relu"},
}


def tiny(kind, vocab_size=19):
    """Weights large enough that the source matters and no token is repeated for ever."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "max_positions": 40}
    sizes |= {"vocab_size": vocab_size, "decoder_start_id": START, "tie_embeddings": False}
    model = build(ModelConfig(kind="encoder_decoder", init_std=0.3, **sizes, **KINDS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross_attn." in name or name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            elif "embed_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def sources(vocab_size=19):
    """Source ids (B, S) padded on the right, and their mask: 7, 4 and 1 real tokens."""
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    ids = torch.randint(3, vocab_size, (3, 7), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(~mask, 0), mask


def start(batch_size=3):
    return torch.full((batch_size, 1), START)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["growing", "static"])
def test_cached_steps_are_one_whole_pass(kind, cache):
    """Random tokens are drawn; the logits from which each was drawn are those of one uncached pass over all."""
    model, (source, mask), seen = tiny(kind), sources(), []
    decoder = model.condition(source, mask)
    cache = None if cache == "growing" else static_cache(decoder, 3, 1 + NEW)

    def draw(logits):
        seen.append(logits)
        return torch.randint(0, 19, (3,))

    made = generate_tokens(decoder, start(), max_new_tokens=NEW, sampler=draw, cache=cache)
    with torch.no_grad():
        want = model(source, torch.cat([start(), made[:, :-1]], dim=1), source_mask=mask)
    torch.testing.assert_close(torch.stack(seen, dim=1), want, atol=1e-4, rtol=1e-4)
    assert (want[0] - want[1]).abs().mean() > 0.1  # what is read matters


@pytest.mark.parametrize("kind", KINDS)
def test_padded_sources_get_what_they_get_alone(kind):
    model, (source, mask) = tiny(kind), sources()
    together = model.condition(source, mask)
    greedy = generate_tokens(together, start(), max_new_tokens=NEW)
    beams = beam_search(together, start(), num_beams=3, num_return=3, max_new_tokens=NEW, stop_ids=[STOP, 5], pad_id=-1)
    for row in range(3):
        alone = model.condition(source[row : row + 1, mask[row]])
        assert torch.equal(generate_tokens(alone, start(1), max_new_tokens=NEW), greedy[row : row + 1])
        got = beam_search(alone, start(1), num_beams=3, num_return=3, max_new_tokens=NEW, stop_ids=[STOP, 5], pad_id=-1)
        length = got.tokens.shape[-1]
        assert torch.equal(got.tokens[0], beams.tokens[row, :, :length])
        assert (beams.tokens[row, :, length:] == -1).all()
        torch.testing.assert_close(got.scores[0], beams.scores[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_with_enough_beams_it_is_exhaustive(kind, length_penalty):
    """V ** (steps - 1) beams drop nothing; all continuations are scored by uncached passes in float64, one batch."""
    vocab_size, steps = 4, 4
    model, (source, mask) = tiny(kind, vocab_size), (torch.tensor([[3, 0, 3, 1, 0]]), torch.arange(5)[None] < 4)
    got = beam_search(
        model.condition(source, mask),
        start(1),
        num_beams=vocab_size ** (steps - 1),
        max_new_tokens=steps,
        stop_ids=[STOP],
        length_penalty=length_penalty,
        early_stopping="never",
        num_return=8,
        pad_id=-1,
    )
    every = torch.tensor(list(itertools.product(range(vocab_size), repeat=steps)))
    whole = torch.cat([start(len(every)), every], dim=1)
    with torch.no_grad():
        log_probs = model.double()(
            source.expand(len(every), -1), whole[:, :-1], source_mask=mask.expand(len(every), -1)
        ).log_softmax(-1)
    each = log_probs.gather(-1, every[:, :, None])[:, :, 0]
    found = {}
    for ids, log_prob in zip(every.tolist(), each, strict=True):
        length = ids.index(STOP) + 1 if STOP in ids else steps
        found[tuple(ids[:length])] = log_prob[:length].sum().item() / length**length_penalty
    best = sorted(found.items(), key=lambda item: -item[1])[:8]
    assert [tuple(i for i in ids if i >= 0) for ids in got.tokens[0].tolist()] == [ids for ids, _ in best]
    want = torch.tensor([score for _, score in best])
    torch.testing.assert_close(got.scores[0], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("search", [generate_tokens, beam_search])
def test_the_source_is_read_once_without_dropout(search):
    model, (source, mask) = tiny("T5").train(), sources()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    seen = []
    model.encoder.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    options = {"num_beams": 4} if search is beam_search else {}
    got = search(model.condition(source, mask), start(), max_new_tokens=4, **options)
    want = search(model.eval().condition(source, mask), start(), max_new_tokens=4, **options)
    assert torch.equal(got[0], want[0])
    assert seen == [3, 3]  # once in each search, and not for every beam


def test_what_was_read_is_not_copied_when_beams_move(monkeypatch):
    copies, reorder = [], MemoryCache.reorder

    def count(self, rows):
        copies.extend([len(rows)] * self.filled)
        reorder(self, rows)

    monkeypatch.setattr(MemoryCache, "reorder", count)
    model, (source, mask) = tiny("T5"), sources()
    beam_search(model.condition(source, mask), start(), num_beams=4, max_new_tokens=NEW)
    assert copies == [12] * 3  # three layers, when each row becomes four


def test_filters_see_the_start_and_what_was_written():
    model, (source, mask) = tiny("BART"), sources()
    options = {"max_new_tokens": NEW, "filters": [no_repeat_ngram(1), forced_first(7)]}
    for ids in generate_tokens(model.condition(source, mask), start(), **options).tolist():
        assert ids[0] == 7 and len({START, *ids}) == 1 + NEW


def test_a_broken_encoder_is_named():
    model, (source, mask) = tiny("T5"), sources()
    model.encoder.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    decoder = model.condition(source, mask)
    for search in (generate_tokens, lambda *a, **b: beam_search(*a, **b, num_beams=2)):
        with pytest.raises(ValueError, match=r"is model\.encoder\.layers\.1\.mlp\.up_proj \(Linear\): its parameters"):
            search(decoder, start(), max_new_tokens=2)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_recurrent_models_too(cell):
    """Both kinds: every hypothesis's score is that of one pass over it alone."""
    config = RecurrentConfig(
        vocab_size=19, hidden_size=16, num_layers=2, cell=cell, init_std=1.0, decoder_start_id=START
    )
    decoder, encoder_decoder = RecurrentLM(config).eval(), RecurrentEncoderDecoder(config).eval()
    source, mask = sources()
    prompt, prompt_mask = source.flip(1), mask.flip(1)
    options = {"num_beams": 4, "num_return": 4, "max_new_tokens": NEW, "stop_ids": [STOP, 5], "pad_id": -1}
    from_prompt = beam_search(decoder, prompt, mask=prompt_mask, **options)
    from_source = beam_search(encoder_decoder.condition(source, mask), start(), **options)
    for row, n in itertools.product(range(3), range(4)):
        real, ids = prompt[row : row + 1, prompt_mask[row]], from_prompt.tokens[row, n][None]
        logits = decoder(torch.cat([real, ids[ids >= 0][None]], dim=1))[0, real.shape[1] - 1 : -1]
        torch.testing.assert_close(from_prompt.scores[row, n], mean_log_prob(logits, ids), atol=1e-5, rtol=1e-5)
        ids = from_source.tokens[row, n][None]
        written = torch.cat([start(1), ids[ids >= 0][None]], dim=1)
        logits = encoder_decoder(source[row : row + 1, mask[row]], written)[0, :-1]
        torch.testing.assert_close(from_source.scores[row, n], mean_log_prob(logits, ids), atol=1e-5, rtol=1e-5)


def mean_log_prob(logits, ids):
    return logits.log_softmax(-1).gather(1, ids[ids >= 0][:, None]).mean()


# ---- text

BYTES = ByteTokenizer()


@pytest.fixture
def model():
    model = tiny("BART", BYTES.vocab_size)
    model.tokenizer_fingerprint = BYTES.fingerprint
    return model


def test_text_is_what_tokens_are(model):
    """The source is `<s> text </s>`, as the tokenizer says; the batch's shorter one is padded on the right."""
    texts = ["ab", "čd efg"]
    source, mask = encode_sources(model, BYTES, texts)
    assert source.tolist() == [
        [BYTES.bos_id, *b"ab", BYTES.eos_id, *[BYTES.pad_id] * 5],
        [BYTES.bos_id, *"čd efg".encode(), BYTES.eos_id],
    ]
    assert mask.tolist() == [[True] * 4 + [False] * 5, [True] * 9]
    decoder = model.condition(source, mask)
    want = generate_tokens(decoder, start(2), max_new_tokens=NEW, stop_ids=[BYTES.eos_id], pad_id=BYTES.pad_id)
    got = generate_text(model, BYTES, texts, max_new_tokens=NEW)
    assert got == [BYTES.decode(ids) for ids in want.tolist()] and got[0] != got[1]
    assert got == [generate_text(model, BYTES, [text], max_new_tokens=NEW)[0] for text in texts]
    assert "".join(stream_text(model, BYTES, texts[1], max_new_tokens=NEW)) == got[1]

    likely_end = torch.zeros(BYTES.vocab_size).index_fill(0, torch.tensor([BYTES.eos_id]), 4.0)
    options = {"num_beams": 3, "num_return": 2, "max_new_tokens": NEW, "filters": [lambda x, *_: x + likely_end]}
    found = beam_search(decoder, start(2), **options, stop_ids=[BYTES.eos_id], pad_id=BYTES.eos_id)
    want = [[BYTES.decode(ids) for ids in row] for row in found.tokens.tolist()]
    assert beam_search_text(model, BYTES, texts, **options) == want and want[0] != want[1]
    assert len({(ids == BYTES.eos_id).sum().item() for ids in found.tokens.flatten(0, 1)}) > 1  # some end early


def test_beams_from_a_decoder_as_text():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "max_positions": 40, "init_std": 0.5}
    model = build(ModelConfig(vocab_size=BYTES.vocab_size, **sizes)).eval()
    options = {"num_beams": 3, "num_return": 3, "max_new_tokens": NEW}
    together = beam_search_text(model, BYTES, ["a", "bcd"], **options)
    alone = [beam_search_text(model, BYTES, [prompt], **options)[0] for prompt in ("a", "bcd")]
    assert together == alone and [len(row) for row in together] == [3, 3]
    assert beam_search_text(model, BYTES, ["a"], num_beams=1, max_new_tokens=NEW) == [
        generate_text(model, BYTES, ["a"], max_new_tokens=NEW)
    ]


def test_a_space_at_the_beginning(model):
    """The space that a tokenizer puts before a text's first word is no part of a text, but of what goes on with one."""

    class OwnSpace(ByteTokenizer):
        leading_space = True

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    decoder, tokenizer = build(ModelConfig(vocab_size=BYTES.vocab_size, **sizes)), OwnSpace()
    space = {"max_new_tokens": 2, "filters": [forced_first(ord(" ")), forced_last(ord("x"), 2)]}
    for writer, want in ((model, "x"), (decoder, " x")):
        assert generate_text(writer, tokenizer, ["a"], **space) == [want]
        assert "".join(stream_text(writer, tokenizer, "a", **space)) == want
        assert beam_search_text(writer, tokenizer, ["a"], num_beams=1, **space) == [[want]]


def test_sources_that_are_too_long_are_named(model):
    with pytest.raises(ValueError, match=r"max_positions=40 \(text: tokens\): \{1: 41\}\. Shorten them, or split them"):
        generate_text(model, BYTES, ["a", "x" * 39, "y" * 38], max_new_tokens=3)
    assert generate_text(model, BYTES, ["a", "y" * 38], max_new_tokens=3)


def test_a_string_or_nothing_instead_of_texts(model):
    for call in (generate_text, beam_search_text):
        with pytest.raises(ValueError, match=r"got one string: pass \[prompt\]"):
            call(model, BYTES, "hello", max_new_tokens=3)
        with pytest.raises(ValueError, match="there is no prompt"):
            call(model, BYTES, [], max_new_tokens=3)


def test_the_tokenizer_of_another_model(model):
    with pytest.raises(ValueError, match="cannot generate: use the model's tokenizer!"):
        beam_search_text(model, ByteTokenizer(["<extra>"]), ["a"], num_beams=2, max_new_tokens=3)


def test_too_many_new_tokens(model):
    with pytest.raises(ValueError, match=r"max_new_tokens=40 make 41, more .* lower max_new_tokens to 39"):
        generate_text(model, BYTES, ["a"], max_new_tokens=40)


# ---- checkpoints of transformers


def t5(**fields):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 31, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": STOP, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **special, relative_attention_num_buckets=8, **fields))


def bart(config_class, model_class):
    sizes = {"vocab_size": 31, "d_model": 24, "max_position_embeddings": 40}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 40}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": STOP, "decoder_start_token_id": STOP}
    return model_class(config_class(**sizes, **special, scale_embedding=True))


def theirs_of(name):
    """A random model of transformers, sharp enough that its hypotheses differ."""
    import transformers as hf

    torch.manual_seed(0)
    model = {
        "T5": lambda: t5(),
        "T5 v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "BART": lambda: bart(hf.BartConfig, hf.BartForConditionalGeneration),
        "mBART": lambda: bart(hf.MBartConfig, hf.MBartForConditionalGeneration),
    }[name]()
    model.generation_config = hf.GenerationConfig()  # what a search does is said by each test alone
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if "bias" in key else 0.3) + ("norm.weight" in key))
    return model.eval()


@pytest.mark.parametrize("name", ["T5", "T5 v1.1", "BART", "mBART"])
def test_checkpoints_write_what_they_write_in_transformers(name, tmp_path):
    """Greedy and beams, with the settings of summarisation and translation recipes."""
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    source, mask = sources(31)
    first = ours.config.decoder_start_id
    common = {"input_ids": source, "attention_mask": mask.long(), "pad_token_id": 30, "decoder_start_token_id": first}
    common |= {"do_sample": False, "max_new_tokens": NEW}
    decoder, tokens = ours.condition(source, mask), torch.full((3, 1), first)

    want = theirs.generate(**common, eos_token_id=STOP)[:, 1:]
    got = generate_tokens(decoder, tokens, max_new_tokens=NEW, stop_ids=[STOP], pad_id=30)
    assert torch.equal(got, want)

    recipes = [
        ({}, []),
        ({"no_repeat_ngram_size": 2, "min_length": 5}, [no_repeat_ngram(2), min_new_tokens(4, [STOP, 5])]),
        ({"forced_bos_token_id": 9, "forced_eos_token_id": STOP}, [forced_first(9), forced_last(STOP, NEW)]),
    ]
    searches = [
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},  # BART's summaries
        {"num_beams": 5, "length_penalty": 0.6, "early_stopping": False},
        {"num_beams": 3, "length_penalty": 1.0, "early_stopping": "never"},
    ]
    found = set()
    for (settings, filters), search in itertools.product(recipes, searches):
        out = theirs.generate(
            **common,
            **search,
            **settings,
            eos_token_id=[STOP, 5],
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_scores=True,
        )
        got = beam_search(
            decoder, tokens, **search, filters=filters, num_return=3, max_new_tokens=NEW, stop_ids=[STOP, 5], pad_id=30
        )
        assert torch.equal(got.tokens.flatten(0, 1), out.sequences[:, 1:])
        torch.testing.assert_close(got.scores.flatten(), out.sequences_scores, atol=1e-5, rtol=1e-5)
        found |= {tuple(ids) for ids in got.tokens.flatten(0, 1).tolist()}
    assert len(found) > 20
