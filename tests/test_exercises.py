"""Self-check and grader: points for each task of a student's file.

    pytest tests/test_exercises.py --impl student.py                    what have I got?
    pytest tests/test_exercises.py --impl student.py -k perplexity      one task
    pytest tests/test_exercises.py --impl student.py --seed 2027        other inputs

Each task is judged alone: the answer key stands in for all others. Without --impl the key itself is judged.
"""
from contextlib import closing

import pytest

from exercises import TASKS, key, read
from grading import judge
from sandbox import Sandbox


@pytest.fixture(scope="module")
def submission(request):
    path = request.config.getoption("--impl")
    try:
        return read(path) if path else key()
    except ValueError as error:
        pytest.exit(str(error), returncode=2)


@pytest.fixture(scope="module")
def sandbox():
    with closing(Sandbox()) as sandbox:
        yield sandbox


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_task(task, submission, sandbox, request, record_property):
    record_property("task", task)
    remark = judge(task, submission, request.config.getoption("--seed"), sandbox)
    if remark is not None:
        pytest.fail(remark, pytrace=False)
