"""What the repository and the wheel carry of models: little, and no text that anybody else wrote."""

from minillm.shipped import models_folder

MOST = 50_000_000  # bytes
FILES = {"README.md", "card.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "works.tsv"}


def test_shipped_models_are_small_and_hold_nothing_else():
    files = [file for file in models_folder().rglob("*") if file.is_file()]
    assert {file.name for file in files} <= FILES
    assert sum(file.stat().st_size for file in files) <= MOST
