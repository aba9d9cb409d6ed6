"""Fetching published sets: only when asked, from a fixed commit, and only what has the known SHA-256."""

import gzip
import hashlib
import http.client
import io
import urllib.error
import urllib.request
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from minillm.files import atomic_write, read_json, sha256_file

PINS = Path(__file__).with_name("pins.json")  # set -> file -> url, bytes and sha256; and what is left out, and why
ADDRESS = "https://raw.githubusercontent.com"
LARGEST = 64 << 20  # bytes of one answer
SECONDS = 60  # of silence, after which a server is given up
SETS = {  # the set of each task that is called otherwise
    **dict.fromkeys(("acl_arc", "chemprot", "scicite", "scierc"), "scibert_cls"),
    **{f"few_{task}": "fewglue" for task in ("boolq", "cb", "copa", "multirc", "rte", "wic", "wsc")},
    **{f"slo_{task}": "slo_superglue" for task in ("boolq", "cb", "copa", "multirc", "rte", "wsc")},
    "en_sl": "derived_en_sl",
    "ud_en_pos": "ud_en_ewt",
    "ud_sl_ner": "ud_sl_ssj",
    "ud_sl_pos": "ud_sl_ssj",
}


def download(name: str, folder: str | Path, *, address: str = ADDRESS) -> Path:
    """Fetch a published set into `folder`/its name, and return that folder, which `load` takes.

    name: of a task in PUBLISHED, or "crows_pairs"; tasks of one set share its files. Files that are there already are
    kept if they have the right SHA-256, so that an interrupted download goes on, and refused if not. What comes with
    another SHA-256 is never written. Mind the licence: `Task.licence`, and the set's own pages.
    """
    pins = read_json(PINS)
    found = SETS.get(name, name)
    if found not in pins:
        raise ValueError(f"no published set {name!r}: one of {', '.join(sorted({*pins, *SETS}))}")
    files, without = pins[found]["files"], pins[found].get("without", {})
    if not files:
        raise ValueError(f"{name} cannot be downloaded: " + "; ".join(f"{f}: {why}" for f, why in without.items()))
    target = Path(folder) / found
    missing = [file for file, pin in files.items() if not _is_there(target / file, pin)]
    fetch = lru_cache(maxsize=1)(_fetch)  # several files may come in one archive
    for file in missing:
        pin = files[file]
        url = f"{address}/{pin['url']}"
        content = _unpacked(fetch(url), url, file, pin)
        digest = hashlib.sha256(content).hexdigest()
        if digest != pin["sha256"]:
            raise ValueError(f"{url} is not what it was: {file} has the SHA-256 {digest}, expected {pin['sha256']}")
        atomic_write(target / file, content)
    return target


def left_out(name: str) -> dict[str, str]:
    """The files of a set that `download` does not fetch, each with the reason."""
    return read_json(PINS).get(SETS.get(name, name), {}).get("without", {})


def _is_there(path: Path, pin: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    if (digest := sha256_file(path)) != pin["sha256"]:
        raise ValueError(f"{path} has the SHA-256 {digest}, expected {pin['sha256']}: move it away to fetch it again")
    return True


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            content = answer.read(LARGEST + 1)
            wanted = int(answer.headers.get("Content-Length") or len(content))
            if len(content) < min(wanted, LARGEST):
                raise OSError(f"it broke off after {len(content)} of {wanted} bytes")
    except urllib.error.HTTPError as error:
        raise OSError(f"{url} cannot be fetched: the server says {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"{url} cannot be fetched: {reason}. What is complete is kept; call download again") from None
    if len(content) > LARGEST:
        raise ValueError(f"{url} is larger than {LARGEST} bytes")
    return content


def _unpacked(content: bytes, url: str, file: str, pin: dict[str, Any]) -> bytes:
    """The file out of its archive, at most a byte longer than it should be."""
    try:
        if "member" in pin:
            with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(pin["member"]) as member:
                return member.read(pin["bytes"] + 1)
        if url.endswith(".gz") and not file.endswith(".gz"):
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as unpacked:
                return unpacked.read(pin["bytes"] + 1)
    except (OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{url} cannot be unpacked: {error}") from None
    return content
