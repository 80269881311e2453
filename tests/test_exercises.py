"""The course in the default run: the key earns all points, a new file none, some wrong answers none.

All wrong answers, six seeds, and folders of submissions are in test_exercises_proof.py (slow).
"""
import subprocess
import sys

import pytest

from exercises import TASKS, assemble, definition, students_file
from grading import load
from test_exercises_proof import KEY, SKELETON, WRONG, change, passes

# one wrong answer for each task
FIRST = {name: (what, old, new) for name, what, old, new in reversed(WRONG)}


@pytest.mark.parametrize("name", TASKS)
def test_key_is_right_and_a_wrong_answer_is_not(name):
    what, old, new = FIRST[name]
    assert passes(name, KEY, seed=0)
    assert not passes(name, SKELETON, seed=0)
    assert not passes(name, change(KEY, name, old, new), seed=0), what


def test_students_file_holds_little_but_the_tasks():
    assert len(SKELETON.splitlines()) < 250
    assert SKELETON.count("raise NotImplementedError") == len(TASKS) == 13
    load(SKELETON)                                  # it can be imported as it is


def test_assemble_keeps_what_was_not_handed_out(tmp_path):
    """With --tasks a file lacks the other functions; a folder that exists is refused."""
    (tmp_path / "student.py").write_text(students_file(["nearest"], definition), "utf-8")
    assemble(tmp_path / "student.py", tmp_path / "mine")
    command = [sys.executable, "-c", "import codetalker as c; print(c.Quantiser.nearest.__module__, "
                                     "c.vq_loss.__module__)"]
    printed = subprocess.run(command, cwd=tmp_path / "mine", capture_output=True, encoding="utf-8")
    assert printed.stdout.split() == ["student", "codetalker"], printed.stderr
    with pytest.raises(ValueError, match="exists already"):
        assemble(tmp_path / "student.py", tmp_path / "mine")
