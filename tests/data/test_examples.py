"""Labelled examples: inputs as transformers makes them, labels where they belong, batches that resume exactly."""

import itertools

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minillm.data import ExampleLoader, example_batches, pair_examples, tagged_examples, text_examples
from minillm.evaluation import evaluate
from minillm.models import HeadConfig, ModelConfig, build, build_with_head
from minillm.tokenizers import ByteTokenizer, load_tokenizer
from minillm.training import TrainConfig, Trainer, classification_loss, seq2seq_loss, tagging_loss

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s", "a", "very", "play", "##ing"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(our tokenizer, transformers'), of BERT's kind with a few words."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special)
    theirs.save_pretrained(folder)
    return load_tokenizer(folder), theirs


TEXTS = ["good films", "a very bad film", "playing", "very very very very very very good"]


@pytest.mark.parametrize("seconds", [None, ["a play", "bad", "good good good good good good", "film"]])
@pytest.mark.parametrize("max_length", [512, 7])
def test_texts_and_pairs_are_what_transformers_makes_of_them(bert, seconds, max_length):
    ours, theirs = bert
    examples = text_examples(ours, TEXTS, [0, 1, 2, 1], seconds=seconds, max_length=max_length)
    for i, example in enumerate(examples):
        pair = () if seconds is None else (seconds[i],)
        expected = theirs(TEXTS[i], *pair, truncation=True, max_length=max_length, return_token_type_ids=True)
        assert list(example.tokens) == expected["input_ids"]
        assert list(example.token_types or [0] * len(example.tokens)) == expected["token_type_ids"]
    assert [example.labels for example in examples] == [0, 1, 2, 1]


def test_a_batch_is_padded_and_labelled(bert):
    (batch,) = example_batches(text_examples(bert[0], TEXTS[:3], [0, 1, 2]), 8, pad_id=0)
    assert batch["tokens"].tolist()[2] == [2, 11, 12, 3, 0, 0] and batch["mask"].sum(1).tolist() == [5, 6, 4]
    assert batch["labels"].tolist() == [0, 1, 2] and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    "labels, expected", [([0.5, 2.0], [0.5, 2.0]), ([[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]])]
)
def test_numbers_and_several_labels(bert, labels, expected):
    (batch,) = example_batches(text_examples(bert[0], TEXTS[:2], labels), 2, pad_id=0)
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == expected


def test_a_words_tag_stands_at_its_first_piece(bert):
    (example,) = tagged_examples(bert[0], [["very", "good", "films", "playing"]], [[7, 8, 9, 6]])
    assert [WORDS[i] for i in example.tokens] == [
        "[CLS]", "very", "good", "film", "##s", "play", "##ing", "[SEP]"
    ]  # fmt: skip
    assert example.labels == (-100, 7, 8, 9, -100, 6, -100, -100)
    (short,) = tagged_examples(bert[0], [["very", "good", "films", "playing"]], [[7, 8, 9, 6]], max_length=5)
    assert short.labels == (-100, 7, 8, 9, -100)


def test_pairs_begin_with_the_decoders_start_and_end_with_its_end():
    tokenizer = ByteTokenizer()
    (pair,) = pair_examples(tokenizer, ["ab"], ["c"])
    (batch,) = example_batches([pair], 1, tokenizer.pad_id, decoder_start_id=7)
    assert batch["source"].tolist() == [tokenizer.with_specials(tokenizer.encode("ab"))[0]]
    target = tokenizer.with_specials(tokenizer.encode("c"))[0]
    assert batch["labels"].tolist() == [target] and batch["tokens"].tolist() == [[7, *target[:-1]]]


def test_the_loader_resumes_and_shares_rows(bert):
    examples = text_examples(bert[0], TEXTS * 3, list(range(12)))
    whole = ExampleLoader(examples, 4, 0, seed=3)
    seen = [batch["labels"].tolist() for batch in itertools.islice(whole, 9)]
    epochs = [sorted(itertools.chain(*seen[i : i + 3])) for i in (0, 3, 6)]
    assert epochs == [list(range(12))] * 3  # every example once in each
    first = ExampleLoader(examples, 4, 0, seed=3)
    for _ in range(4):
        next(first)
    again = ExampleLoader(examples, 4, 0, seed=3)
    again.load_state_dict(first.state_dict())
    assert [next(again)["labels"].tolist() for _ in range(5)] == seen[4:]
    halves = [ExampleLoader(examples, 4, 0, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    left, right = (next(half)["labels"].tolist() for half in halves)
    assert sorted(left + right) == sorted(seen[0])
    with pytest.raises(ValueError, match="examples_sha256"):
        ExampleLoader(examples[1:], 4, 0, seed=3).load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", ["text", "tags", "pairs"])
def test_a_head_learns_them_and_is_evaluated(bert, kind, tmp_path):
    tokenizer, start = bert[0], 0
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    if kind == "text":
        examples, loss_fn = text_examples(tokenizer, TEXTS, [0, 1, 2, 1]), classification_loss
        model = build_with_head(ModelConfig(**sizes, kind="encoder"), HeadConfig(num_labels=3, dropout=0.0))
    elif kind == "tags":
        sentences = [text.split() for text in TEXTS]
        examples = tagged_examples(tokenizer, sentences, [[len(word) for word in words] for words in sentences])
        model = build_with_head(ModelConfig(**sizes, kind="encoder"), HeadConfig("tagging", num_labels=9, dropout=0.0))
        loss_fn = tagging_loss
    else:
        examples, loss_fn, start = pair_examples(tokenizer, TEXTS, TEXTS[::-1]), seq2seq_loss, 4
        model = build(ModelConfig(**sizes, kind="encoder_decoder", decoder_start_id=start))
    loader = ExampleLoader(examples, 4, tokenizer.pad_id, decoder_start_id=start)
    Trainer(model, loss_fn, loader, TrainConfig(steps=120, lr=0.02), tmp_path / "run").fit()
    result = evaluate(model, example_batches(examples, 3, tokenizer.pad_id, start), loss_fn)
    assert result["loss"] < 0.1 and result.get("accuracy", 1.0) == 1.0
    other = evaluate(model, example_batches(examples, 1, tokenizer.pad_id, start), loss_fn)
    assert other == pytest.approx(result, rel=1e-4)  # however the batches are cut


def test_bad_examples(bert):
    tokenizer = bert[0]
    with pytest.raises(ValueError, match="2 and 3 of what should be equally many"):
        text_examples(tokenizer, TEXTS[:3], [0, 1])
    with pytest.raises(ValueError, match="max_length=2: the special tokens and one of the text need 3"):
        text_examples(tokenizer, TEXTS[:2], [0, 1], max_length=2)
    with pytest.raises(ValueError, match="label 'positive': expected a class number"):
        text_examples(tokenizer, TEXTS[:1], ["positive"])
    with pytest.raises(ValueError, match=r"sentences \[1\] have another number of tags than of words"):
        tagged_examples(tokenizer, [["a"], ["a", "film"]], [[1], [1]])
    with pytest.raises(ValueError, match="2 examples, fewer than batch_size 3"):
        ExampleLoader(text_examples(tokenizer, TEXTS[:2], [0, 1]), 3, 0)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(build(ModelConfig(vocab_size=9, hidden_size=8, num_heads=2)), [], classification_loss)
