"""The README's table of models says what the parity tests wrote, and the largest error of each family."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "models_table.py"


@pytest.fixture
def table():
    spec = importlib.util.spec_from_file_location("models_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.table


def result(family, model_type, class_name, task, **errors):
    return {"family": family, "model_type": model_type, "class": class_name, "task": task, "errors": errors}


def test_a_row_for_each_family(table, tmp_path):
    results = [
        result("BERT", "bert", "BertForMaskedLM", "masked_lm", outputs={"float32": 1e-7, "float64": 3e-16}),
        result("BERT", "bert", "BertModel", "embedding", gradients={"float32": 2.4e-6}),
        result("T5", "t5", "T5ForConditionalGeneration", "lm", outputs={"float32": 0.0, "float64": 1e-15}),
        result("BERT", "bert", "BertForQuestionAnswering", "span", outputs={"float64": 2e-14}),
    ]
    written = tmp_path / "parity.json"
    facts = {"environment": {"commit": "0123456789abcdef"}, "versions": {"torch": "2", "transformers": "5"}}
    written.write_text(json.dumps(facts | {"results": results}))
    lines = table(written).splitlines()
    assert lines[2:4] == [
        "| BERT | `bert` | masked tokens and words | question answering, pooled output | 2e-06 | 2e-14 |",
        "| T5 | `t5` | pairs of texts, span corruption, infilling | - | 0e+00 | 1e-15 |",
    ]
    assert lines[-1].endswith("(commit 0123456789ab, torch 2, transformers 5).")
