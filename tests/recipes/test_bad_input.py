"""What a user can get wrong: one clear message, exit code 2, and nothing half-made that stands in the way."""

import json
import re
import shutil

import pytest

from minillm.cli import main
from minillm.recipes.generate import GenerateConfig, generate
from minillm.recipes.locate import load
from minillm.recipes.pretrain import PretrainConfig, pretrain
from minillm.tokenizers import CharTokenizer

NOTES = ("base={1}", "data.train={0}/notes.jsonl")


@pytest.fixture
def refused(cli):
    """`refused(match, *words)`: the command ends with code 2 and a message, without a traceback."""

    def call(match: str, *words) -> None:
        code, _, error = cli(*words)
        assert code == 2 and re.search(match, error, re.DOTALL), error
        assert error.startswith("minillm: error: ") and "Traceback" not in error

    return call


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["data.train={0}/nowhere"], r"nowhere does not exist \(working folder: "),
        ([], r"data\.train: which text\? Name a file or a folder"),
        (["data.train={0}/latin.txt"], r"latin\.txt is not UTF-8 text: byte 3 is 0xE9"),
        (["data.train={0}/empty.txt"], r"empty\.txt holds no text"),
        (["data.train={0}/short.txt", "tokenizer.kind=bpe"], r"tokenizer\.vocab_size 4096 is more than .* supports"),
        (["data.train={0}/short.txt", "tokenizer.kind=bpe", "tokenizer.vocab_size=9"], "leaves no room: 256 bytes"),
        (["data.train={0}/short.txt"], r"rows of length 32 .* fewer than batch_size 4\. Lower batch_size"),
        (["data.train={0}/text", "data.length=99"], r"data\.length=99 is more than model\.max_positions=48"),
        (["data.train={0}/text", "model.vocab_size=100"], r"model\.vocab_size=100, but the tokenizer has 259 ids"),
        (["data.train={0}/text", "data.held_out={0}/text"], "12 of 12 held-out documents are also in data.train"),
        (
            ["data.train=a", "data.held_out=b", "data.held_out_share=0.5"],
            r"held_out_share=0\.5 has no effect beside",
        ),
        (["data.train={0}/text", "data.held_out_share=2"], r"data: .*held_out_share=2\.0: between 0 and 1"),
        (["data.train={0}/text", "data.batch_size=0", "seed=-1"], "batch_size=0: at least 1"),
        (
            ["data.train={0}/text", "tokenizer.folder={0}", "tokenizer.kind=bpe"],
            r"has no tokenizer; it holds \[",
        ),
        (["data.train={0}/text", "model.num_heads=3"], "hidden_size=16 must be a multiple of num_heads=3"),
        (["data.train={0}/text", f"seed={2**64}"], f"error: seed={2**64}: a whole number from 0 to"),
        (["data.train={0}/text", f"train.seed={2**64}"], f"train: .*seed={2**64}: a whole number from 0 to"),
        (["data.train={0}/text", f"data.seed={2**64}"], f"data: .*seed={2**64}: a whole number from 0 to"),
        (["data.train={0}/text", "tokenizer.vocab_size=9"], "tokenizer: kind=bytes has no vocab_size: leave it out"),
        (
            ["data.train={0}/text", "tokenizer.folder=x"],
            "tokenizer: folder=x uses a tokenizer as it is: leave kind out",
        ),
        (["data.train={0}/text", "tokenizer.character_coverage=2"], r"character_coverage=2\.0: above 0 and at most 1"),
        (["data.trian=x"], r"data\.trian: DataConfig has no 'trian'; did you mean train\?"),
        (["learning_rate=1"], r"learning_rate: PretrainConfig has no"),
        (
            ["train.steps=many", "train.lr=0.1.2"],
            r"steps: expected a whole number.*lr: expected a number",
        ),
        (
            ["data.train={0}/text", "run={0}/short.txt"],
            r"short\.txt cannot be the folder of a run: .*txt is a file; choose",
        ),
        (
            ["data.train={0}/text", "run={0}/short.txt/x"],
            r"txt.x cannot be the folder of a run: .*txt is a file; choose",
        ),
        (["--resume", "run={0}/short.txt"], r"no run to resume: .*short\.txt is a file; name the run's folder"),
        (
            ["data.train={0}/text", "tokenizer.folder={0}/short.txt", "tokenizer.kind=bpe"],
            r"short\.txt is a file; name the folder of a run",
        ),
        (["--resume"], r"which run\? Name it: minillm pretrain run=FOLDER --resume"),
        (["--resume", "run={0}/nowhere"], "there is no run to resume: .*nowhere does not exist"),
        (["--resume", "run={0}"], "has no config.json, so training never began there"),
    ],
)
def test_pretraining_refuses(words, match, texts, sizes, refused, tmp_path):
    words = [word.format(texts) for word in words]
    run = [] if any(word.startswith("run=") for word in words) or "--resume" in words else [f"run={tmp_path / 'run'}"]
    refused(match, "pretrain", *([] if "--resume" in words else sizes), *words, *run)
    assert not (tmp_path / "run" / "config.json").exists()  # the folder can be used again


def test_a_corrected_command_may_use_the_same_folder(texts, sizes, refused, cli, tmp_path):
    words = ("pretrain", f"run={tmp_path}", *sizes)
    refused("fewer than batch_size", *words, f"data.train={texts / 'short.txt'}")
    assert cli(*words, f"data.train={texts / 'text'}", "train.steps=1")[0] == 0
    corpus = (tmp_path / "data" / "corpus.json").read_bytes()
    refused("already holds a run .* choose another folder", *words, f"data.train={texts / 'notes.jsonl'}")
    assert (tmp_path / "data" / "corpus.json").read_bytes() == corpus


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], r"base: which model\? Name a run or a model folder"),
        (["base={1}/nowhere"], r"nowhere does not exist \(working folder: "),
        (["base={0}"], r"is no run, model or adapter; it holds \["),
        (
            [*NOTES, "data.length=64"],
            r"data\.length=64 is more than the base's max_pos",
        ),
        (
            [*NOTES, "lora.targets=q_prj"],
            r"'q_prj' matches no module; did you mean q_proj",
        ),
        ([*NOTES, "method=partial"], r"lm_head.*tied with.*untie=True"),
        (
            [*NOTES, "method=full", "lora.rank=4"],
            r"method=full uses no key of lora: leave lora\.\* out, or choose meth",
        ),
        ([*NOTES, "partial.untie=true"], r"method=lora uses no key of partial"),
        ([*NOTES, "seed=-1"], "seed=-1: a whole number"),
        ([*NOTES, "method=adapter"], "method: expected one of lora, .*, full, partial"),
        ([*NOTES, "data.length=8"], r"documents keep no label within length 8"),
        (
            [*NOTES, "data.prompt=question"],
            r"each needs either 'text' or both 'question'",
        ),
    ],
)
def test_tuning_refuses(words, match, texts, base, refused, tmp_path):
    small = ("data.batch_size=4", "data.length=40", "train.device=cpu", f"run={tmp_path / 'run'}")
    refused(match, "tune", *small, *(word.format(texts, base) for word in words))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["a " * 30], r"prompt of 60 tokens \+ max_new_tokens=8 make 68, more than the model's max_positions=48"),
        ([""], "prompts .* are empty"),
        (["a", "temperature=-1"], r"temperature=-1\.0: must be 0 \(greedy\) or a positive number"),
        (["a", "top_k=260", "top_p=1.5"], r"top_k=260: must be a whole number from 1 to 259.*top_p=1\.5: is a prob"),
        (["a", "top_k=0"], "top_k=0: must be a whole number"),
        (["a", "tempreature=1"], "GenerateConfig has no 'tempreature'; did you mean temperature"),
        (["a", "base=x"], "is a whole model and needs no base"),
        (["a", "merge=true"], "is no adapter: there is nothing to merge"),
        (["a", "seed=-1"], r"seed=-1: a whole number from 0 to 2\^63 - 1"),
        (["a", f"seed={2**64}"], f"seed={2**64}: a whole number"),
    ],
)
def test_generating_refuses(words, match, base, refused):
    refused(match, "generate", base, words[0], "max_new_tokens=8", *words[1:])


def test_a_model_refuses_another_tokenizer(base, cli, tmp_path):
    model = shutil.copytree(base / "model", tmp_path / "model")
    CharTokenizer("abc").save(model)
    with pytest.raises(ValueError, match="use the model's tokenizer! Its ids mean other text"):
        load(model)
    with pytest.raises(ValueError, match="use the model's tokenizer"):
        generate(model, "abc", GenerateConfig())


def test_damaged_folders_are_named(base, cli, refused, tmp_path):
    model = shutil.copytree(base / "model", tmp_path / "copy")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    refused("model.safetensors is damaged: its checksum is not the one", "generate", model, "a")
    refused(r"is no run, model or adapter; it holds \['copy'\]", "info", tmp_path)
    refused(r"bse does not exist .*; did you mean base\?", "info", base.with_name("bse"))


def test_a_folder_that_may_not_be_written(base, texts, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may do all
    words = ("pretrain", f"data.train={texts / 'text'}", f"run={tmp_path / 'run'}")
    refused(rf"cannot be the folder of a run: you may not write in {tmp_path}; choose another", *words)


def test_a_checkpoint_is_no_model(base, refused):
    refused(
        rf"is a checkpoint, to resume .* name it itself \({base}\)", "generate", base / "checkpoints/step-000006", "a"
    )


def test_hints_can_be_copied(base, texts, sizes, tune_sizes, cli, tmp_path):
    run = tmp_path / "my run"
    code, out, _ = cli("tune", f"base={base}", f"data.train={texts / 'notes.jsonl'}", f"run={run}", *tune_sizes)
    assert code == 0 and f"minillm generate '{run}' PROMPT --stream" in out
    shutil.rmtree(run / "adapter")
    assert f"minillm tune run='{run}' --resume" in cli("generate", run, "a")[2]


def test_a_file_is_no_folder(texts, refused):
    for words in (("generate", texts / "short.txt", "a"), ("tune", f"base={texts / 'short.txt'}")):
        refused(r"short\.txt is a file; name the folder of a run, model or adapter, such as .*texts", *words)


def test_a_run_of_another_recipe_is_not_resumed(base, refused):
    refused("is no run of minillm tune; its config.json names 'pretrain'", "tune", f"run={base}", "--resume")


def test_debug_shows_where(capsys):
    assert main(["generate", "nowhere", "a", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_python_callers_get_the_same_errors(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train: which text\?"):
        pretrain(PretrainConfig(run=str(tmp_path / "run")))


def test_broken_records_are_named(base, refused, tmp_path):
    notes = tmp_path / "notes.jsonl"
    notes.write_text(json.dumps({"prompt": "a", "completion": 3}) + "\n{oops\n")
    refused(
        "2 records cannot be used.*line 2: not JSON", "tune", f"base={base}", f"data.train={notes}", "data.length=40"
    )
