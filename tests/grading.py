"""Grading: points of one student or of a folder of them.

    python tests/grading.py FOLDER grades.csv               each NAME.py a line: points of each task, and hints
    python tests/grading.py FOLDER grades.csv --seed 2027 --tasks perplexity,vq_loss

A student's code is never called here: sandbox.py runs it in a process of its own, and what comes back, numbers, is
compared with what the answer key gets from the same inputs.
"""
import argparse
import csv
import math
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from exercises import NAMES, TASKS, chosen, functions, key, numbers_of, program, read
from sandbox import Sandbox


@lru_cache
def right_answers(name, seed):
    code = sys.modules["key"] = types.ModuleType("key")
    exec(compile(key(), "key", "exec"), code.__dict__)
    return numbers_of(TASKS[NAMES.index(name)], code, seed)


def judge(task, submission, seed, sandbox):
    """None for a right solution, otherwise one line, which is not empty: what is wrong, and a hint."""
    if task.name not in functions(submission):
        return "the function is missing: keep its name, its class and its arguments"
    found = sandbox.run(task.name, seed, program(submission, task.name))
    if isinstance(found, str):
        return found or "an error without a text"
    for what, right in right_answers(task.name, seed).items():
        right = np.array(right, float)
        try:
            numbers = np.array(found.get(what), float)
        except (ValueError, TypeError, OverflowError):
            numbers = np.array(math.nan)
        if numbers.shape != right.shape:
            return f"{what}: shape {right.shape} expected, found {numbers.shape}"
        tolerance = 1e-5 + 1e-4 * np.abs(right[np.isfinite(right)]).max(initial=0)
        if not np.allclose(numbers, right, rtol=1e-3, atol=tolerance):
            return f"{what}: {task.hints[what]}"
    return None


def grade(path, tasks, seed):
    """A row of the table: points of each task, and the remarks."""
    points, remarks = {task.name: 0 for task in tasks}, []
    try:
        submission = read(path)
    except ValueError as error:
        submission, tasks, remarks = None, [], [str(error)]
    with closing(Sandbox()) as sandbox:
        for task in tasks:
            remark = judge(task, submission, seed, sandbox)
            if remark is None:
                points[task.name] = task.points
            else:
                remarks.append(f"{task.name}: {remark}")
    return {"student": Path(path).stem, "points": sum(points.values()), **points, "remarks": "; ".join(remarks)}


def grade_folder(folder, table, tasks=TASKS, seed=0, at_once=os.cpu_count()):
    """Grade every .py of a folder into one CSV, `at_once` of them at a time; returns the rows."""
    from data import whole, writable
    paths = sorted(Path(folder).glob("*.py"))
    if not paths:
        raise ValueError(f"{folder}: a folder of submissions, NAME.py each, expected; found no .py in it")
    writable(Path(table).parent)
    if Path(table).is_dir():
        raise ValueError(f"{table}: the name of a CSV file expected, found a folder; name another")
    for task in tasks:
        right_answers(task.name, seed)              # here, since threads share PyTorch's random numbers
    rows = []
    with ThreadPoolExecutor(at_once) as pool:
        for row in pool.map(lambda path: grade(path, tasks, seed), paths):
            print(f"{row['student']}: {row['points']} of {sum(task.points for task in tasks)} points", flush=True)
            rows.append(row)
    with whole(table) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


@contextmanager
def not_yet():
    """Around an example of the handout: an unsolved task does not stop it."""
    try:
        yield
    except NotImplementedError:
        print("not yet")


@lru_cache
def kept_sandbox():
    return Sandbox(total=math.inf)


def check(name, path="student.py", seed=0):
    """Print what a task earns: the same as `pytest tests/test_exercises.py --impl student.py -k NAME`."""
    task = TASKS[NAMES.index(name)]
    try:
        remark = judge(task, read(path), seed, kept_sandbox())
    except ValueError as error:
        remark = error
    print(f"{name}: " + (f"{task.points} points" if remark is None else f"0 of {task.points} points - {remark}"))


def main():
    from data import CommandLine, between, cannot
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with one NAME.py of each student")
    parser.add_argument("table", help="the CSV to make")
    parser.add_argument("--tasks", type=chosen, default=TASKS, help="only these, commas between (default: all)")
    parser.add_argument("--seed", type=between(0, 10 ** 6, int), default=0, help="of all inputs (default: %(default)s)")
    with cannot():
        args = parser.parse_args()
        rows = grade_folder(args.folder, args.table, args.tasks, args.seed)
        print(f"{args.table}: {len(rows)} submissions")


if __name__ == "__main__":
    main()
