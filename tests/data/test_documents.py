"""Files to documents, and splitting them without leakage."""

import gzip
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import Document, corpus_summary, read_documents, split_documents


def texts(documents):
    return [document.text for document in documents]


def test_plain_file_is_one_document_unchanged(tmp_path):
    path = tmp_path / "notes.log"
    path.write_bytes("prvi\r\ndrugi \u2028 č\n".encode())
    assert read_documents(path) == [Document(str(path), "prvi\r\ndrugi \u2028 č\n")]


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(read_documents(tmp_path / "a.txt")) == ["hello"]


def test_folder_is_read_recursively_in_order_and_names_what_it_leaves_out(tmp_path):
    for name, content in {
        "b.txt": "B", "a/z.md": "Z", "a/y.PY": "Y", "c.jsonl": '{"text": "J"}', ".hidden.txt": "no", ".git/x.txt": "no",
        "d.txt.gz": None, "photo.png": "no", "b.bin": "no", "Makefile": "no", "empty.txt": " \n",
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b"G") if content is None else content.encode())
    with pytest.warns(
        UserWarning, match=r"left out 3 files of other kinds \(Makefile: 1, .bin: 1, .png: 1\) and 1 .*empty.txt"
    ):
        documents = read_documents(tmp_path)
    assert texts(documents) == ["Y", "Z", "B", "J", "G"]  # a/y.PY, a/z.md, b.txt, c.jsonl, d.txt.gz
    with pytest.warns(UserWarning):
        assert texts(read_documents(tmp_path, extensions=[".bin"])) == ["no", "J"]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    plain = {"text": "line\u2028separator", "id": 7}
    rows = [plain, {"prompt": "2+2=", "completion": "4"}, {"prompt": "x", "completion": ""}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_documents(path) == [
        Document(f"{path}:1", "line\u2028separator"),
        Document(f"{path}:3", "2+2=", "4"),
        Document(f"{path}:5", "x", ""),
    ]
    path.write_text('{"q": "a", "a": "b"}')
    assert read_documents(path, prompt="q", completion="a") == [Document(f"{path}:1", "a", "b")]


def test_every_broken_json_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "ok"}', "{oops", "[1]", '{"prompt": "x"}', '{"text": 5}', '{"text": "\\ud800"}']
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="5 records cannot be used; each needs either 'text' or both") as error:
        read_documents(path)
    for line in [
        "line 2: not JSON, column 2", "line 3: a JSON list instead of an object", "line 4: has ['prompt']",
        "line 5: 'text' is a int", "line 6: 'text' holds half of a surrogate pair",
    ]:  # fmt: skip
        assert line in str(error.value)


def test_a_json_list_is_read_like_json_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one", "id": 7}, {"prompt": "2+2=", "completion": "4"}, "three"]))
    assert read_documents(path) == [
        Document(f"{path}:1", "one"),
        Document(f"{path}:2", "2+2=", "4"),
        Document(f"{path}:3", "three"),
    ]
    (tmp_path / "b.txt").write_text("B")
    with pytest.warns(UserWarning, match=r"1 files of other kinds \(\.json: 1\)"):  # as often settings as text
        assert texts(read_documents(tmp_path)) == ["B"]
    with pytest.warns(UserWarning, match=r"1 files of other kinds \(\.txt: 1\)"):
        assert texts(read_documents(tmp_path, extensions=[".json"])) == ["one", "2+2=", "three"]


def test_tables(tmp_path):
    tsv, table = tmp_path / "a.tsv", tmp_path / "a.csv"
    tsv.write_text('id\ttext\r\n1\tsay "hi\n2\t"b" c\n')
    assert texts(read_documents(tsv)) == ['say "hi', '"b" c']  # quotes mean nothing in a TSV
    assert read_documents(tsv, text="id")[1].text == "2"
    assert texts(read_documents(tsv, text=1)) == ["text", 'say "hi', '"b" c']  # numbered: no header
    assert read_documents(tsv, prompt=0, completion=1)[2] == Document(f"{tsv}:3", "2", '"b" c')
    table.write_text('id,text\n1,"a, ""b""\nc"\n')
    assert texts(read_documents(table)) == ['a, "b"\nc']


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tsv", "id\tlabel\n1\t2\n", r"a\.tsv: 1 records cannot be used.*'text'.*\n  line 2: has \['id', 'label'\]"),
        ("a.tsv", "id\ttext\n1\n", r"line 2: 1 cells, the table has 2 columns"),
        ("a.csv", 'id,text\n1,"open', r"a\.csv, line 2: unexpected end of data"),
        ("a.json", '{"text": "a"}', r"a\.json holds a JSON dict; a list of records is needed, .* one object a line"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', r"a\.json is not JSON: line 2, column 1: Extra data.*\.jsonl"),
        ("a.json", '["", [1], {"text": 5}]', r"2 records .*\n  record 2: a JSON list .*\n  record 3: 'text' is a int"),
        ("a.txt", "", r"a\.txt holds no text: 1 files with 1 documents were read"),
        ("a.jsonl", "", r"a\.jsonl holds no text: 1 files with 0 documents"),
        ("a.txt", b"ab\xffcd", r"a\.txt is not UTF-8 text: byte 2 is 0xFF \(invalid start byte\)"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"byte 5 is 0xFF"),
        ("a.txt", "hi".encode("utf-16-le"), r"a\.txt is not text: byte 1 is 0x00 \(a binary file, or UTF-16\?\)"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"hello" * 99)[:-9], r"a\.txt\.gz cannot be read: Compressed file ended"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_every_bad_file_of_a_folder_is_named(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.txt").write_bytes(b"ok" if i == 3 else b"\xff")
    with pytest.raises(ValueError, match=r"(?s)00\.txt is not UTF-8.*04\.txt is not.*and 4 files more") as error:
        read_documents(tmp_path)
    assert "03.txt" not in str(error.value)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no text.*In folders these count: \.txt"):
        read_documents(tmp_path)


def test_summary_by_hand():
    documents = [Document("a", "é"), Document("b", "xy", "z")]
    digest = hashlib.sha256("2:é".encode() + b"-1:" + b"2:xy" + b"1:z").hexdigest()
    assert corpus_summary(documents) == {"documents": 2, "characters": 4, "bytes": 5, "sha256": digest}
    assert corpus_summary([Document("a", "ab"), Document("b", "c")]) != corpus_summary(
        [Document("a", "a"), Document("b", "bc")]
    )


lengths = st.lists(st.integers(1, 50), min_size=2, max_size=30)


@given(lengths=lengths, share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_split_is_whole_disjoint_and_honours_the_share(lengths, share, seed):
    documents = [Document(str(i), chr(0x100 + i) * n) for i, n in enumerate(lengths)]
    training, held = split_documents(documents, share, seed)
    assert training and held
    assert sorted(training + held, key=lambda d: int(d.name)) == documents
    assert [int(d.name) for d in held] == sorted(int(d.name) for d in held)
    held_characters = sum(len(d.text) for d in held)
    assert abs(held_characters - share * sum(lengths)) <= max(lengths)
    if len(held) > 1 and len(training) > 1:
        assert abs(held_characters - share * sum(lengths)) <= max(lengths) / 2 + 1e-6
    assert split_documents(documents, share, seed) == (training, held)


def test_seed_changes_the_split():
    documents = [Document(str(i), f"text {i}") for i in range(50)]
    assert len({tuple(texts(split_documents(documents, 0.2, seed)[1])) for seed in range(5)}) == 5


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30).filter(lambda ts: len(set(ts)) > 1))
def test_same_texts_stay_together(letters):
    training, held = split_documents([Document(str(i), t) for i, t in enumerate(letters)], 0.3)
    assert not set(texts(training)) & set(texts(held))


def test_a_single_text_is_cut_at_a_lines_end():
    lines = [f"line {i}\n" for i in range(100)]
    training, held = split_documents([Document("book.txt", "".join(lines))], 0.25)
    assert training == [Document("book.txt (beginning)", "".join(lines[: len(training[0].text.splitlines())]))]
    assert training[0].text + held[0].text == "".join(lines) and held[0].name == "book.txt (end)"
    assert 0.25 <= len(held[0].text) / len("".join(lines)) < 0.27
    with pytest.raises(ValueError, match="cannot hold anything out of 1 documents"):
        split_documents([Document("a", "a single line of text without an end")], 0.25)
    with pytest.raises(ValueError, match="cannot hold anything out of 1 documents"):
        split_documents([Document("a", "prompt\n" * 9, "completion")], 0.25)


def test_impossible_splits():
    for documents in ([], [Document("a", "x")], [Document("a", "x"), Document("b", "x")]):
        with pytest.raises(ValueError, match=rf"cannot hold anything out of {len(documents)} documents"):
            split_documents(documents)
    with pytest.raises(ValueError, match=r"held_out is a share between 0 and 1, got 1\.5"):
        split_documents([Document("a", "x"), Document("b", "y")], 1.5)
