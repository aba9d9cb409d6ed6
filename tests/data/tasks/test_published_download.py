"""Downloads from a server in this process: right, wrong, broken off, and never unasked."""

import gzip
import hashlib
import io
import json
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minillm.data.tasks.published import PUBLISHED, download, load
from minillm.data.tasks.published.fetching import PINS, SETS, left_out

TRAIN = b"a fine film\t1\na dull one\t0\n"
DEV = b"so so\t0\n"
TEST = b"grand\t1\n"


def archive(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            packed.writestr(f"inside/{name}", content)
    return buffer.getvalue()


@pytest.fixture
def server():
    """An address, what it serves, and what it was asked for."""
    served, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in served:
                self.send_error(404)
                return
            content = served[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + (5 if self.path.endswith("short") else 0)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", served, asked
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def pins(tmp_path, monkeypatch):
    def write(**sets):
        (tmp_path / "pins.json").write_text(json.dumps(sets))
        monkeypatch.setattr("minillm.data.tasks.published.fetching.PINS", tmp_path / "pins.json")

    return write


def pin(url, content, **more):
    return {"url": url, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **more}


def sst2():
    files = {"train.tsv": pin("o/r/c/train.tsv", TRAIN), "dev.tsv": pin("o/r/c/d.tsv.gz", DEV)}
    return {"files": {**files, "test.tsv": pin("o/r/c/t.zip", TEST, member="inside/t.tsv")}}


def serve(served):
    served["/o/r/c/train.tsv"] = TRAIN
    served["/o/r/c/d.tsv.gz"] = gzip.compress(DEV)
    served["/o/r/c/t.zip"] = archive(**{"t.tsv": TEST})


def test_plain_compressed_and_archived_files(tmp_path, server, pins):
    address, served, asked = server
    serve(served)
    pins(sst2=sst2())
    found = download("sst2", tmp_path, address=address)
    assert found == tmp_path / "sst2"
    assert {p.name: p.read_bytes() for p in found.iterdir()} == {"train.tsv": TRAIN, "dev.tsv": DEV, "test.tsv": TEST}
    assert len(load("sst2", found)["train"]) == 2 and len(asked) == 3
    download("sst2", tmp_path, address=address)
    assert len(asked) == 3  # nothing is fetched twice


def test_an_archive_is_fetched_once(tmp_path, server, pins):
    address, served, asked = server
    served["/z.zip"] = archive(a="A", b="B")
    pins(mr={"files": {n: pin("z.zip", n.upper().encode(), member=f"inside/{n}") for n in ("a", "b")}})
    download("mr", tmp_path, address=address)
    assert asked == ["/z.zip"] and (tmp_path / "mr" / "b").read_bytes() == b"B"


def test_what_has_another_hash_is_refused(tmp_path, server, pins):
    address, served, _ = server
    serve(served)
    served["/o/r/c/d.tsv.gz"] = gzip.compress(DEV + b"x")
    pins(sst2=sst2())
    both = (
        f"dev.tsv has the SHA-256 {hashlib.sha256(DEV + b'x').hexdigest()}, expected {hashlib.sha256(DEV).hexdigest()}"
    )
    with pytest.raises(ValueError, match=both):
        download("sst2", tmp_path, address=address)
    assert [path.name for path in (tmp_path / "sst2").iterdir()] == ["train.tsv"]  # what was right is kept
    serve(served)
    download("sst2", tmp_path, address=address)
    assert len(list((tmp_path / "sst2").iterdir())) == 3


def test_a_users_file_is_not_overwritten(tmp_path, server, pins):
    address, _, asked = server
    pins(sst2=sst2())
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "test.tsv").write_bytes(b"mine")
    ours, theirs = (hashlib.sha256(b).hexdigest() for b in (b"mine", TEST))
    with pytest.raises(ValueError, match=rf"test.tsv has the SHA-256 {ours}, expected {theirs}: move it away"):
        download("sst2", tmp_path, address=address)
    assert not asked and (tmp_path / "sst2" / "test.tsv").read_bytes() == b"mine"


def test_a_huge_file_in_an_archive_is_not_unpacked_whole(tmp_path, server, pins):
    address, served, _ = server
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a", bytes(50_000_000))
    served["/bomb.gz"], served["/bomb.zip"] = gzip.compress(bytes(50_000_000)), buffer.getvalue()
    six_zeros = hashlib.sha256(bytes(len(b"small") + 1)).hexdigest()
    for url, more in (("bomb.gz", {}), ("bomb.zip", {"member": "a"})):
        pins(sst2={"files": {"a": pin(url, b"small", **more)}})
        with pytest.raises(ValueError, match=six_zeros):
            download("sst2", tmp_path, address=address)


def test_servers_that_fail(tmp_path, server, pins, monkeypatch):
    address, served, _ = server
    pins(sst2=sst2())
    with pytest.raises(OSError, match=r"/o/r/c/train.tsv cannot be fetched: the server says 404 Not Found"):
        download("sst2", tmp_path, address=address)
    with pytest.raises(OSError, match=r"cannot be fetched: .*refused. What is complete is kept; call download again"):
        download("sst2", tmp_path, address="http://127.0.0.1:9")
    served["/short"] = b"half"
    pins(sst2={"files": {"a": pin("short", b"half of it")}})
    with pytest.raises(OSError, match=r"/short cannot be fetched: it broke off after 4 of 9 bytes. What is complete"):
        download("sst2", tmp_path, address=address)
    served["/x.gz"] = served["/x.zip"] = b"no archive"
    for url, more in (("x.gz", {}), ("x.zip", {"member": "a"})):
        pins(sst2={"files": {"a": pin(url, b"x", **more)}})
        with pytest.raises(ValueError, match=rf"/{re.escape(url)} cannot be unpacked"):
            download("sst2", tmp_path, address=address)
    monkeypatch.setattr("minillm.data.tasks.published.fetching.LARGEST", 3)
    with pytest.raises(ValueError, match="is larger than 3 bytes"):
        download("sst2", tmp_path, address=address)
    assert not (tmp_path / "sst2").exists()


def test_what_cannot_be_pinned_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"en_sl cannot be downloaded: \*.tsv: they are not published"):
        download("en_sl", tmp_path)
    with pytest.raises(ValueError, match="no published set 'sst': one of acl_arc"):
        download("sst", tmp_path)
    assert "joined by its users" in left_out("slo_boolq")["GoogleMT/BoolQ/train.jsonl"]
    assert left_out("sst2") == {}


def test_every_set_has_its_pins():
    sets = json.loads(PINS.read_text())
    assert {SETS.get(name, name) for name in PUBLISHED} | {"crows_pairs"} == set(sets)
    for name, content in sets.items():
        for file, values in content["files"].items():
            owner, repository, commit, *path = values["url"].split("/")
            assert owner and repository and path and re.fullmatch("[0-9a-f]{8}|[0-9a-f]{40}", commit), (name, file)
            assert re.fullmatch("[0-9a-f]{64}", values["sha256"]) and values["bytes"] > 0
