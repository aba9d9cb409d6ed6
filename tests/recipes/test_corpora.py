"""The corpora that every machine has: the same each time, one domain never inside the other."""

import ast

import pytest

from minillm.data import Document
from minillm.recipes.corpora import python_documentation, standard_library_source, without_docstrings

MODULE = '''"""The module's own text."""

import os

class Door:  # a comment stays
    """A door\f has a text of its own,
    over two lines.""" ; width = 3

    def open(self, šum="é"): "one line"; return šum

    async def close(self):
        """Only a docstring."""

    label = """an ordinary string"""
'''


def docstrings(source: str) -> list[str]:
    named = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        text for node in ast.walk(ast.parse(source)) if isinstance(node, named) and (text := ast.get_docstring(node))
    ]


def test_docstrings_are_cut_and_nothing_else():
    kept = without_docstrings(MODULE)
    assert docstrings(MODULE) and not docstrings(kept)
    for text in ("own text", "text of its own", "over two lines", "one line", "Only a docstring"):
        assert text not in kept
    for text in ("import os", "# a comment stays", "width = 3", "return šum", "...", '"""an ordinary string"""'):
        assert text in kept


@pytest.fixture
def library(tmp_path):
    """Three modules, one paragraph of them twice, and folders that are no library."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_a.py").write_text("SECRET = 1")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "b.py").write_text("SECRET = 2")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text('"""A package."""\n')
    repeated = "A paragraph that two modules share, long enough that this cannot be an accident of the language at all."
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            f'"""Module {name}.\n\n{repeated}\n"""\n\n{name} = 1\n\nmanual = """\n\n{repeated}\n\n"""\n'
        )
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    return tmp_path


def test_documents_are_whole_modules_without_repeats(library):
    texts = {document.name: document.text for document in python_documentation(folder=library)}
    assert texts.keys() == {"docstrings of one", "docstrings of two", "docstrings of package"}
    assert sum("A paragraph that two modules share" in text for text in texts.values()) == 1
    assert texts["docstrings of package"] == "package\nA package."


def test_source_holds_no_documentation(library):
    documentation = python_documentation(folder=library)
    texts = {
        document.name: document.text for document in standard_library_source(folder=library, without=documentation)
    }
    assert texts.keys() == {"one.py", "two.py", "latin.py"}  # nothing is left of the package
    assert "name = 'é'" in texts["latin.py"]
    assert not any("A paragraph" in text or "Module" in text or "SECRET" in text for text in texts.values())
    assert any("A paragraph" in document.text for document in standard_library_source(folder=library))


def test_the_real_library_is_the_same_twice_and_keeps_its_limit():
    limit = 300_000
    first, second = standard_library_source(limit), standard_library_source(limit)
    assert first == second
    assert 0.9 * limit < sum(len(document.text) for document in first) <= limit
    assert len({document.name for document in first}) == len(first)
    topics = python_documentation(limit)
    assert topics == python_documentation(limit)
    paragraphs = [p for document in topics for p in document.text.split("\n\n") if len(p) > 100]
    assert len(paragraphs) == len(set(paragraphs)) > 100


def test_a_python_without_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no Python source files"):
        standard_library_source(folder=tmp_path)
    with pytest.raises(ValueError, match="holds no Python source files"):
        python_documentation(folder=tmp_path)


def test_document_type():
    assert all(isinstance(document, Document) for document in standard_library_source(50_000))
