"""The course in the default run: the key earns all points, a new file none, some wrong answers none.

All wrong answers, six seeds, and folders of submissions are in test_exercises_proof.py (slow).
"""
import pytest

from exercises import TASKS
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
