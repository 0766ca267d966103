"""The lecture: the notebook is what lecture.py writes, its cells run, and so do its exercises."""
import lecture
import pytest

CELLS = lecture.cells_of_lecture()
CODE = [text for kind, text in CELLS if kind == "code"]
SHORTER = {"iters=60": "iters=2", '24, "val": 4': '8, "val": 2', "(4)": "(2)", "in ()": "in (0,)",
           "range(32)": "range(4)", "range(16)": "range(4)"}


def test_the_notebook_is_what_lecture_py_writes():
    assert lecture.NOTEBOOK.read_text() == lecture.notebook(CELLS)


def run(texts, names):
    for long, short in SHORTER.items():
        texts = [text.replace(long, short) for text in texts]
    lecture.run(texts, names)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What all cells define, run in their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("lecture"))
        names = {"display": lambda picture: None}
        run(CODE, names)
        yield names


@pytest.mark.parametrize("exercise", lecture.EXERCISES, ids=lambda exercise: exercise[0])
def test_an_exercise(exercise, names, capsys):
    """What it changes is in the file once. Then the file is still Python, and the cell below the
    question, if there is one, differs."""
    title, file, part, other = exercise
    source = lecture.source_of(file)
    assert source.count(part) == 1
    compile(source.replace(part, other), file, "exec")
    question, = [i for i, (_, text) in enumerate(CELLS) if f". {title}\n" in text]
    kind, cell = [*CELLS, ("markdown", "")][question + 1]
    if kind == "code":
        home, = [text for text in CODE if part in text]
        run([cell], names)
        before = capsys.readouterr().out
        run([home.replace(part, other), cell, home], names)
        assert capsys.readouterr().out != before or title == "Noise"
