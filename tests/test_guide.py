"""The guide: its Python blocks run in order in one namespace; its methods and its error messages are the library's."""

import re
from pathlib import Path

import pytest

import qkernels as qk
from qkernels import quantizers

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()


def first_cells(section):
    text = re.search(rf"^## {section}\. .*?(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE)[0]
    return re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)


def test_python_blocks_in_order(tmp_path, monkeypatch):
    for extra in ("sklearn", "onnx", "onnxscript"):
        pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/guide.md", "exec"), space)


def test_the_table_lists_the_methods():
    assert first_cells(1) == list(quantizers.WEIGHT)


def test_the_messages_are_those_of_the_source():
    source = "\n".join(path.read_text() for path in Path(qk.__file__).parent.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    messages = first_cells(9)
    assert len(messages) > 10 and [m for m in messages if m not in source] == []
