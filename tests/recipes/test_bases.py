"""The corpora behind the bases, their preparation, and a base made of a run: files of the same form, and real ones."""

import gzip
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

import minillm
from minillm.cli import main
from minillm.data import TokenFile, read_documents
from minillm.evaluation.baselines import NGrams, bits_per_byte
from minillm.files import read_json, sha256_file
from minillm.models import count_parameters
from minillm.recipes.bases.corpora import (
    ENGLISH,
    SLOVENE,
    Work,
    read_addresses,
    read_books,
    read_botchan,
    read_masc,
    tidy,
    untagged,
    unwrapped,
)
from minillm.recipes.bases.prepare import without
from minillm.recipes.bases.presets import PRESETS, preset
from minillm.recipes.objective import new_model
from minillm.tokenizers import load_tokenizer

SENTENCE = "The {0} went to the {1} by the river , and {0} asked the {1} why it had never come back before ."
HEADER = "split\ttitle\tauthor\tyear\trepo\tpath\tcommit\tbytes\tlicence\n"


def write_books(folder: Path, train: list[str], valid: list[str]) -> None:
    """As the real ones: a paragraph on a line, a blank line between works, a table in another order."""
    folder.mkdir(parents=True)
    (folder / "train.txt.gz").write_bytes(gzip.compress(("\n\n".join(train) + "\n").encode()))
    (folder / "valid.txt").write_text("\n\n".join(valid) + "\n", encoding="utf-8")
    rows = [f"{split}\t{work[:9]}\tSomebody\t1900\ta/b\tc d.md\t0123456789ab\t{len(work.encode()) + 2}\tpublic domain\n"
            for split, works in (("train", train), ("valid", valid)) for work in reversed(works)]  # fmt: skip
    (folder / "SOURCES.tsv").write_text(HEADER + "".join(rows), encoding="utf-8")


def test_books_are_found_in_the_table_by_their_size(tmp_path):
    write_books(tmp_path / "books", ['First work.\nIt čuts "quotes".', "Second work."], ["Held out."])
    works = list(read_books(tmp_path / "books"))
    assert [work.text for work in works] == ['First work.\nIt čuts "quotes".', "Second work."]
    assert [work.title for work in works] == ["First wor (Somebody)", "Second wo (Somebody)"]
    assert works[0].source == "a/b@01234567 c d.md"
    assert works[1].record() == {
        "title": "Second wo (Somebody)", "source": "a/b@01234567 c d.md", "licence": "public domain", "bytes": 12,
        "sha256": "86aae11fce8ab160cefd642994dd00f10550c395c3b627a2149f0e7193f181b9",  # by sha256sum
    }  # fmt: skip
    assert [work.text for work in read_books(tmp_path / "books", held_out=True)] == ["Held out."]
    (tmp_path / "books" / "valid.txt").write_text("Held out!!!")
    with pytest.raises(ValueError, match=r"valid.txt has 1 works, whose sizes are not those of the 1 rows for valid"):
        list(read_books(tmp_path / "books", held_out=True))


def test_addresses_in_their_encodings(tmp_path):
    folder = tmp_path / "nltk_inaugural"
    folder.mkdir()
    (folder / "1.txt").write_bytes("Plain — naïve ‘quotes’.\n \n  Next.".encode())
    (folder / "2.txt").write_bytes(b"Costs 5\xbd cents.")  # Windows-1252
    (folder / "3.txt").write_bytes(b"It\xa1\xa6s \xa1\xa7so\xa1\xa8.")  # Big5: the quotes only
    assert [work.text for work in read_addresses(folder)] == [
        "Plain -- naïve 'quotes'.\nNext.", "Costs 5½ cents.", "It's \"so\".",
    ]  # fmt: skip
    assert next(read_addresses(folder)).source == "nltk_data inaugural.zip 1.txt"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("I_PRP would_MD n't_RB go_VB ,_, Anna_NNP 's_POS dog_NN ._.", "I wouldn't go, Anna's dog."),
        ('He_PRP said_VBD :_: "_" No_UH !_. "_" and_CC left_VBD', 'He said: "No!" and left'),
        ("``_`` Yes_UH ''_'' (_( $_$ 5_CD )_) we_PRP ’ll_MD see_VB", '"Yes" ($5) we\'ll see'),
        ("a_b_NN -_: c_NN", "a_b - c"),
        ("", ""),
    ],
)
def test_tags_are_taken_off_and_words_put_together(line, expected):
    assert untagged(line) == expected


def test_masc_leaves_the_e_mails_out(tmp_path):
    for name in ("written/a.txt", "spoken/b.txt", "written/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Hello_UH ,_, all_DT ._. \n\n Bye_UH ._.")
    (tmp_path / "categories.txt").write_text("written/a.txt email\nspoken/b.txt telephone\nwritten/c.txt spam\n")
    works = list(read_masc(tmp_path))
    assert [(work.title, work.text) for work in works] == [("MASC spoken/b.txt", "Hello, all.\nBye.")]


def test_botchan_without_notices_and_line_ends(tmp_path):
    long = "This is a line of a novel that is as long as lines of the file are,"
    notices = "\ufeffProject Gutenberg's Botchan\nwww\n*** START OF THIS BOOK ***\nProduced by A and B\n"
    end = "[A: tpyo]\nEnd of Project Gutenberg's Botchan\n*** END OF THIS BOOK ***\nDonate!"
    text = f"{notices}{long}\nand ends here.\n{long}\nand ends there.\n{end}"
    (tmp_path / "botchan.txt").write_text(text, encoding="utf-8")
    (work,) = read_botchan(tmp_path)
    assert work.text == f"{long} and ends here.\n{long} and ends there."
    (tmp_path / "botchan.txt").write_text("text")
    with pytest.raises(ValueError, match=r"lacks Project Gutenberg's lines \*\*\* START OF"):
        list(read_botchan(tmp_path))


def test_plain_parts():
    assert tidy(" a  b \r\n\r\n\tc\xad…\0 ") == "a b\nc..."
    assert unwrapped("x" * 60 + "\n" + "y" * 59 + "\nz") == "x" * 60 + " " + "y" * 59 + "\nz"


def test_what_is_held_out_is_not_learned():
    secret = "It was the best of times, it was the worst of times, it was the age of wisdom, 1859."
    work = Work("a", "b", "c", f"Before.\n{secret.upper().replace(',', ' --')}\nAfter.\nShort.")
    kept, dropped = without([work, Work("d", "e", "f", secret)], [Work("h", "i", "j", f"{secret}\nShort.")])
    assert ([w.text for w in kept], dropped) == (["Before.\nAfter.\nShort."], 2)


# --- prepare, pretrain, export


@pytest.fixture(scope="module")
def slovene(tmp_path_factory) -> Path:
    """What `bases prepare` makes of a corpus with the Slovene one's form."""
    folder, draw = tmp_path_factory.mktemp("slovene"), Random(0)
    vocabulary = ["".join(draw.choices("aeiouklmnprstvzčšž", k=draw.randint(2, 9))) for _ in range(6000)]

    def work(size: int) -> str:
        return "\n".join(" ".join(draw.choices(vocabulary, k=30)) + "." for _ in range(size))

    write_books(folder / "data" / "books_sl", [work(150 + i) for i in range(5)], [work(9), work(8)])
    out = folder / "text"
    assert main(["bases", "prepare", "language=slovene", f"data={folder / 'data'}", f"out={out}"]) == 0
    return out


def test_prepared_text(slovene):
    manifest = read_json(slovene / "manifest.json")
    training = read_documents(slovene / "train.jsonl")
    assert [work["bytes"] for work in manifest["train"]["works"]] == [len(d.text.encode()) for d in training]
    assert manifest["train"]["bytes"] == sum(len(d.text.encode()) for d in training)
    tokenizer = load_tokenizer(slovene)
    assert tokenizer.vocab_size == 8192 and tokenizer.mask_id == 4
    assert tokenizer.decode(tokenizer.encode(training[0].text)) == training[0].text
    sizes = manifest["compressed_bits_per_byte"]
    assert 0 < sizes["xz_after_the_training_text"] < sizes["xz"] < 8 and 0 < sizes["gzip"] < 8


SMALL = (
    "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "data.length=30", "data.batch_size=4",
    "train.steps=3", "train.precision=float32", "train.device=cpu",
)  # fmt: skip


@pytest.mark.parametrize("name", ["nano-decoder", "nano-encoder", "nano-encdec"])
def test_a_run_becomes_a_base(name, slovene, cli, tmp_path, held_out):
    text = [f"data.{side}={slovene / side}.jsonl" for side in ("train", "held_out")]
    sizes = [word for word in SMALL if name != "nano-encdec" or "num_layers" not in word]
    words = ["pretrain", "--preset", name, *text, f"tokenizer.folder={slovene}", *sizes, f"run={tmp_path / 'run'}"]
    export = ["bases", "export", f"run={tmp_path / 'run'}", f"manifest={slovene / 'manifest.json'}", f"name={name}"]
    code, _, error = cli(*words)
    assert code == 0, error
    code, out, error = cli(*export, f"out={tmp_path / 'models'}")
    assert code == 0, error
    folder = tmp_path / "models" / name
    exact, rounded = minillm.load(tmp_path / "run" / "model"), minillm.load(folder)
    for key, parameter in exact.named_parameters():
        assert torch.equal(parameter.to(torch.bfloat16), rounded.get_parameter(key))
    card = read_json(folder / "card.json")
    report = read_json(tmp_path / "run" / "report.json")
    assert card["held_out"] == pytest.approx(report["held_out"], rel=1e-6)
    rows, _, _ = held_out(tmp_path / "run")
    assert card["held_out_in_bfloat16"] == pytest.approx(rows.measure(rounded.float()), rel=1e-6)
    assert card["held_out_in_bfloat16"]["loss"] != card["held_out"]["loss"]
    found = card["baselines_bits_per_byte"]
    if name == "nano-decoder":
        training = TokenFile.open(tmp_path / "run" / "data" / "train")
        log_probs = NGrams(training.tokens, 8192, 5).log_probs(rows.file.tokens)[1:]
        assert found["5-gram (Kneser-Ney)"] == pytest.approx(bits_per_byte(log_probs, rows.file.meta.counted_bytes))
        assert {"gzip", "xz", "xz_after_the_training_text"} < set(found)
    else:
        assert set(found) == {"unigram", "5-gram (Kneser-Ney)"}
    readme = (folder / "README.md").read_text()
    for key, value in found.items():
        assert f"| {key} | {value:.3f} |" in readme and f"{key}: {value:.3f}" in out
    assert len((folder / "works.tsv").read_text().splitlines()) == 8
    again = sha256_file(folder / "model.safetensors")
    assert cli(*export, f"out={tmp_path / 'models'}")[0] == 0  # replaces its own folder
    assert sha256_file(folder / "model.safetensors") == again


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["prepare", "data={0}"], r"out=: which folder\?; data=.* lacks books_en, .*: english is made of"),
        (["prepare", "language=french"], "language: expected one of english, slovene"),
        (["export"], "run=: give it; manifest=: give it; name=: give it"),
        (["export", "run={0}", "manifest={0}/m.json", "name=x"], r"m\.json does not exist"),
        (["export", "run={base}", "manifest={text}/manifest.json", "name=x"],
         r"manifest.json is not of the text of .*: another train and another held_out"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(words, match, slovene, base, cli, tmp_path):
    words = [word.format(tmp_path, base=base, text=slovene) for word in words]
    code, _, error = cli("bases", *words)
    assert code == 2 and re.search(match, error), error
    assert "Traceback" not in error


def test_an_unfinished_run_is_no_base(slovene, base, cli, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    words = [f"run={tmp_path / 'run'}", f"manifest={slovene / 'manifest.json'}", "name=x"]
    code, _, error = cli("bases", "export", *words)
    assert code == 2 and "has not finished: minillm pretrain run=" in error


def test_presets_are_the_sizes_that_their_docstrings_say():
    for name, function in PRESETS.items():
        config = preset(name)
        with torch.device("meta"):
            total = count_parameters(new_model(replace(config.model, vocab_size=8192)))["total"]
        assert 3e6 <= total <= 6e6 if name.startswith("tiny") else 0.5e6 <= total < 0.7e6, (name, total)
        if name != "tiny-encoder-sl":
            assert f"{total / 1e6:.1f} million parameters" in " ".join(function.__doc__.split()), (name, total)
        assert all(word in function.__doc__ for word in ("Command:", "Cost:", "Result:"))


# --- the real ones

DATA = Path(os.environ.get("MINILLM_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
COUNTS = {  # works, and bytes of text: the table of the collection tells the works
    "books_en": 233, "nltk_state_union": 65, "nltk_inaugural": 59, "nltk_masc_tagged": 216, "tinyshakespeare": 1,
    "botchan": 1, "books_sl": 54,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_real_corpora(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there: set MINILLM_DATA to the folder of the corpora")
    works = list((ENGLISH | SLOVENE)[name](DATA / name))
    assert len(works) == COUNTS[name]
    text = "\n".join(work.text for work in works)
    assert "\n\n" not in text and "\ufeff" not in text and "\ufffd" not in text and "Gutenberg" not in text[:2000]
    assert all(work.text.strip() == work.text and work.licence and work.source for work in works)
    if name == "nltk_masc_tagged":
        assert "_NN" not in text and "I'm Jim Lehrer of the News Hour on PBS." in text
    if name == "nltk_state_union":
        assert "¡" not in text
