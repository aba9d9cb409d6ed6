"""Every method's file is short: at most 150 lines of code, so that it can be read alone beside its paper."""

import ast
import inspect
import io
import tokenize

import pytest

from minillm.peft import METHODS

NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def code_lines(source: str) -> int:
    """Lines with code: not empty, no comment, no docstring."""
    used = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            used |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            used -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(used)


def test_lines_are_counted():
    source = '"""A\nmodule."""\n\n# comment\nx = (\n    1\n)\n\n\ndef f():\n    """Doc."""\n    return "text"  # why\n'
    assert code_lines(source) == 5


@pytest.mark.parametrize("name", METHODS)
def test_at_most_150_lines_of_code(name):
    source = inspect.getsource(inspect.getmodule(METHODS[name]))
    assert code_lines(source) <= 150
