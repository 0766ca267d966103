"""The lecture: the notebook is what lecture.py writes, its cells run, and so do its exercises."""
import ast

import lecture
import pytest

CELLS = lecture.cells_of_lecture()
CODE = [text for kind, text in CELLS if kind == "code"]


def test_the_notebook_is_what_lecture_py_writes():
    assert lecture.NOTEBOOK.read_text() == lecture.notebook(CELLS)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """What all cells define, run in their order, with a shorter training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("lecture"))
        names = {"display": lambda picture: None}
        lecture.run([text.replace("iters=60", "iters=2") for text in CODE], names)
        yield names


@pytest.mark.parametrize("exercise", lecture.EXERCISES, ids=lambda exercise: exercise[0])
def test_an_exercise(exercise, namespace, capsys):
    """What it changes is in the file once. Then the file is still Python, and its cell differs."""
    _, file, part, other, _, cell, _ = exercise
    source = (lecture.TOP / f"{file}.py").read_text()
    assert source.count(part) == 1
    ast.parse(source.replace(part, other))
    if cell:
        home, = [text for text in CODE if part in text]
        cell = cell.replace("in ()", "in (0,)").replace("iters=60", "iters=2")
        lecture.run([cell], namespace)
        before = capsys.readouterr().out
        lecture.run([home.replace(part, other), cell, home], namespace)
        assert capsys.readouterr().out != before
