"""Write tests/lecture.ipynb, the lessons of the four files as a notebook. Its text and the cells to
try are those of tests/lecture.md. There a line <!-- ... --> stands for something of the files, so
that the notebook and the files never differ:

    docstring of FILE         the text at the head of a file
    imports                   a cell: what the lessons import, besides each other
    cut out of FILE: NAMES    a cell: these functions, classes and constants
    in FILE: PART -> OTHER    in an exercise: the line that has PART, and what becomes of it

    python tests/lecture.py          # writes it
    python tests/lecture.py --run    # also runs its cells here; pictures go to runs/lecture
"""
import ast
import json
import os
import re
import symtable
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
NOTEBOOK, LESSONS = TOP / "tests/lecture.ipynb", ("pspnet", "cityscapes", "evaluate", "train")
TEXT = (TOP / "tests/lecture.md").read_text()
CELLS = re.compile(r"^```python\n(.*?)\n```$|^<!-- (imports|cut out of .+?) -->$", re.M | re.S)
CHANGE = r"<!-- in (\S+): (.+) -> (.+) -->"  # file, a part that is in it once, what becomes of it
EXERCISES = re.findall(rf"### \d+\. (.+)\n{CHANGE}", TEXT)  # title, and those three


def source_of(file):
    return (TOP / f"{file}.py").read_text()


def lesson_of(file):
    return source_of(file).partition("# Here the lesson ends")[0]


def cut_out(file, names):
    """These functions, classes and constants, with the comments above them."""
    lines, statements = source_of(file).splitlines(), ast.parse(source_of(file)).body
    blocks = []
    for name in names.split():
        i = next(i for i, node in enumerate(statements)
                 if re.match(rf"(def |class |){name}\b", lines[node.lineno - 1]))
        first, last = statements[i - 1].end_lineno, statements[i].end_lineno
        blocks.append("\n".join(lines[first:last]).strip())
    return "\n\n\n".join(blocks)


def imports():
    """What the lessons import, besides each other."""
    lines = {line for file in LESSONS
             for line in re.findall(r"^(?:import|from) .+", lesson_of(file), re.M)}
    return "\n".join(sorted(line for line in lines if line.split()[1] not in LESSONS))


def docstring_of(file):
    """In Markdown __ makes letters bold, and code begins after an empty line."""
    text = ast.get_docstring(ast.parse(source_of(file))).replace("__", r"\_\_")
    return re.sub(r"(\n\S.*\n)(?=    )", r"\1\n", text)


def change_of(file, part, other):
    """The line of a file that has this part, where it stands, and what becomes of it."""
    source, where = source_of(file), f"`{file}.py`"
    if file in LESSONS:
        statement = next(node for node in ast.parse(source).body
                         if part in ast.get_source_segment(source, node))
        where = f"the cell of `{statement.name}`, in chapter {1 + LESSONS.index(file)}"
    line = re.search(f".*{re.escape(part)}.*", source)[0].strip()
    return (f"In {where}\n```python\n{line}\n```\nbecomes\n"
            f"```python\n{line.replace(part, other)}\n```")


def names_in(code):
    """The names that a module defines."""
    symbols = symtable.symtable(code, "", "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()}


def cells_of_lecture():
    """(kind, text) of all cells. Raises AssertionError if a name of a lesson is missing."""
    cells, shown = [], set()
    # Text, the code of a cell or None, what is to be cut out or None, text, and so on
    *pieces, last = CELLS.split(TEXT)
    for text, code, cutting in [*zip(*[iter(pieces)] * 3), (last, None, None)]:
        text = re.sub("<!-- docstring of (.+) -->", lambda mark: docstring_of(mark[1]), text)
        text = re.sub(CHANGE, lambda mark: change_of(*mark.groups()), text)
        if cutting == "imports":
            code = imports()
        elif cutting:
            code = cut_out(*cutting.removeprefix("cut out of ").split(": "))
            shown |= names_in(code)
        cells += [("markdown", text.strip()), ("code", code)]
    missing = set().union(*(names_in(lesson_of(file)) for file in LESSONS)) - shown - {"main"}
    assert not missing, f"not in the notebook: {missing}"
    return [(kind, text) for kind, text in cells if text]


def notebook(cells):
    """The text of the file: nbformat 4, without outputs."""
    more = {"markdown": {}, "code": {"execution_count": None, "outputs": []}}
    entries = [{"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
               | more[kind] for kind, text in cells]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": entries, "metadata": {"kernelspec": kernel}, "nbformat": 4,
                       "nbformat_minor": 4}, indent=1, ensure_ascii=False) + "\n"


def run(texts, namespace):
    """Run cells as Jupyter does: a picture as the last expression of one is displayed."""
    for text in texts:
        tree = ast.parse(text)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), namespace)
        value = last and eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
        if hasattr(value, "save"):
            namespace["display"](value)


if __name__ == "__main__":
    cells, pictures = cells_of_lecture(), []
    NOTEBOOK.write_text(notebook(cells))
    if "--run" in sys.argv:
        os.chdir(TOP)
        run([text for kind, text in cells if kind == "code"], {"display": pictures.append})
        os.makedirs("runs/lecture", exist_ok=True)
        for number, picture in enumerate(pictures):
            picture.save(f"runs/lecture/{number:02}.png")
