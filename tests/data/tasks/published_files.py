"""Published sets of a few lines, for the tests of their parsers."""

import json

from minillm.data.tasks import published
from minillm.evaluation import METRICS


def load(name, folder, **options):
    task = published.load(name, folder, **options)
    assert set(task.metrics) <= set(METRICS) and task.licence and "\n" not in task.description
    return task


def write(folder, files):
    """name -> text, rows of cells (joined by tabs), or JSON objects, one a line."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            lines = [
                json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else "\t".join(row) for row in content
            ]
            content = "".join(f"{line}\n" for line in lines)
        path.write_text(content, encoding="utf-8")
    return folder


def conllu(*sentences, misc="_"):
    """A sentence is words and tags "the/DET cat/NOUN"."""
    blocks = []
    for i, sentence in enumerate(sentences):
        words = [word.rsplit("/", 1) for word in sentence.split()]
        rows = [f"{n}\t{w}\t_\t{tag}\t_\t_\t0\t_\t_\t{misc}" for n, (w, tag) in enumerate(words, start=1)]
        blocks.append(f"# newdoc id = d{i}\n# text = x\n" + "\n".join(rows) + "\n\n")
    return "".join(blocks)
