"""The commands on folders as the Hub has them: transformers wrote the weights, its tokenizers library the tokenizer."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SIZES = {
    "vocab_size": 290,  # the tokenizer's
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"max_position_embeddings": 64}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, **LLAMA)),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            **SIZES, d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4, decoder_start_token_id=0
        ),
    ),
    "bert": (
        transformers.BertForMaskedLM,
        transformers.BertConfig(**SIZES, **LLAMA),
    ),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """`hub / name`: a checkpoint folder of each kind; Llama's weights are in several files."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 50, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    for name, (make, config) in MODELS.items():
        torch.manual_seed(0)
        make(config).save_pretrained(root / name, max_shard_size="20KB" if name == "llama" else "5GB")
        wrapped.save_pretrained(root / name)
    assert (root / "llama" / "model.safetensors.index.json").is_file()
    return root


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_continues_as_transformers_does(hub, name, cli):
    theirs = MODELS[name][0].from_pretrained(hub / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub / name)
    ids = torch.tensor([tokenizer("the quick")["input_ids"]])
    made = theirs.generate(ids, max_new_tokens=8, do_sample=False, num_beams=1)
    expected = tokenizer.decode(made[0, ids.shape[1] if name == "llama" else 1 :], skip_special_tokens=True)
    code, printed, err = cli("generate", hub / name, "the quick", "max_new_tokens=8", "temperature=0")
    assert code == 0, err
    assert printed.rstrip("\n") == expected.rstrip("\n")


def test_ids_that_the_tokenizer_does_not_know_never_come(hub, cli, tmp_path):
    """Of 2000 rows the tokenizer names 290: a random model would soon choose another."""
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 2000}, **LLAMA)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "wide" / name).write_bytes((hub / "llama" / name).read_bytes())
    code, printed, err = cli("generate", tmp_path / "wide", "the", "max_new_tokens=30", "temperature=1")
    assert code == 0 and printed, err


def test_tune_and_generate_on_a_hub_folder(hub, cli, tmp_path):
    (tmp_path / "text.txt").write_text("the lazy dog jumps over the quick brown fox\n\n" * 30)
    run = tmp_path / "run"
    words = ("data.length=16", "data.batch_size=2", "train.steps=2", f"run={run}")
    code, _, err = cli("tune", f"base={hub / 'llama'}", f"data.train={tmp_path / 'text.txt'}", *words)
    assert code == 0, err
    assert cli("generate", run, "the", "max_new_tokens=4")[0] == 0
    code, printed, _ = cli("info", hub / "llama")
    assert code == 0 and "num_kv_heads" in printed and "to run" in printed and "tokenizers" in printed


def test_an_encoder_writes_no_text(hub, cli):
    code, _, err = cli("generate", hub / "bert", "the")
    assert code != 0 and "holds a MaskedLM, which writes no text" in err


def test_an_encoder_decoder_is_not_tuned_here(hub, cli, tmp_path):
    (tmp_path / "text.txt").write_text("the lazy dog\n\n" * 30)
    code, _, err = cli("tune", f"base={hub / 't5'}", f"data.train={tmp_path / 'text.txt'}", f"run={tmp_path / 'run'}")
    assert code != 0 and "is an encoder-decoder, which learns from pairs of texts: tune takes decoders" in err
    assert not (tmp_path / "run" / "data").exists()


def test_a_tokenizer_larger_than_the_model(hub, cli, tmp_path):
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 100}, **LLAMA)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((hub / "llama" / name).read_bytes())
    code, _, err = cli("generate", tmp_path / "small", "the")
    assert code != 0 and "the tokenizer has 290 ids, the model only 100: they do not belong together" in err
