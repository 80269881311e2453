"""
Points and feedback for one student's file, or for a folder of them.

    python tests/grading.py student.py [--seed 2027] [--tasks vq_loss perplexity]
    python tests/grading.py FOLDER grades.csv       a row for each, and NAME.points.txt to hand back
    python tests/grading.py student.py --gradescope /autograder/results/results.json

A submission runs in a process of its own, in an empty folder, with a fork for each task. Numbers
come back, which are compared here with the key's. This stops endless loops and accidents, not
theft: the key is public, and a submission can read what its user can. Needs os.fork (not Windows).
"""
import ast
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from exercises import ROOT, TASKS, run_test

SECONDS = 10                # of CPU time, for each task
MEMORY = 2 ** 31            # bytes, beside what PyTorch takes
FILE_SIZE = 2 ** 22         # bytes, of each file that is written
TORCH = str(Path(torch.__file__).parent)

# -----------------------------------------------------------------------------
# the submission's process, in a folder with student.py


def run_submission(names, seed):
    """A fork for each task, after one that only loads: NAME.json for numbers, NAME.txt for prints."""
    for name in ["load", *names]:
        if os.fork() == 0:
            run_fork(name, seed)
        _, status = os.wait()
        if name == "load" and status != 0:
            break


def run_fork(name, seed):
    result = {"parts": [], "error": ""}
    limit_resources(output=os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    try:
        task = TASKS.get(name)
        if task:
            delattr(task.holder, task.attribute)            # the key's
        student = load(Path("student.py").read_text(encoding="utf-8"))
        if task:
            os.truncate(1, 0)                               # what loading prints is in load.txt
            setattr(task.holder, task.attribute, getattr(student, name))
            for other, (holder, attribute, *_) in TASKS.items():        # the key's
                setattr(student, other, getattr(holder, attribute))
            run_test(name, seed, result["parts"])
    except BaseException as error:                          # SystemExit, KeyboardInterrupt as well
        result["error"] = repr(error)
        print_traceback(error)
    Path(f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    os._exit(1 if result["error"] else 0)


def limit_resources(output):
    import resource
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGPROF, signal.default_int_handler)           # KeyboardInterrupt
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    sys.addaudithook(refuse)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def refuse(event, arguments, realpath=os.path.realpath, libraries=os.path.realpath(sys.prefix)):
    """An audit hook: no files of the repository, no other processes."""
    if event.startswith(("subprocess.", "os.system", "os.exec", "os.posix", "os.fork", "os.kill")):
        raise PermissionError(f"{event} is not allowed in a solution")
    if event == "open" and not isinstance(arguments[0], int):
        path = os.fsdecode(realpath(arguments[0])) + os.sep
        if path.startswith(f"{ROOT}{os.sep}") and not path.startswith(libraries + os.sep):
            raise PermissionError(f"{path} is not open to a solution")


def load(source):
    """The module student. A statement that fails, such as an import, does not stop the others."""
    student = sys.modules["student"] = types.ModuleType("student")
    for statement in ast.parse(source, "student.py").body:
        code = compile(ast.Module([statement], []), "student.py", "exec")
        try:
            exec(code, vars(student))
        except Exception as error:
            print_traceback(error)
    return student


def print_traceback(error):
    """From the first line of student.py on, without PyTorch's lines; otherwise the error alone."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename != "student.py":
        frames = frames.tb_next
    trace = traceback.TracebackException(type(error), error, frames)
    own = [frame for frame in trace.stack if not frame.filename.startswith(TORCH)]
    trace.stack = traceback.StackSummary.from_list(own)
    with suppress(OSError):
        os.truncate(2, min(os.fstat(2).st_size, FILE_SIZE // 2))    # room, if prints have filled it
    print("".join(trace.format(chain=False)), end="", file=sys.stderr)


# -----------------------------------------------------------------------------
# the grader's process


@lru_cache
def right_parts(name, seed):
    parts = []
    run_test(name, seed, parts)
    return parts


def compare(right, found):
    """What is wrong with a part, "" if nothing."""
    for what in ("type", "shape"):
        if found[what] != right[what]:
            return f": {what} {right[what]} expected, found {found[what]}"
    expected = np.array(right["numbers"])
    numbers = np.array(found["numbers"], float)
    tolerance = 1e-5 + 1e-4 * np.abs(expected[np.isfinite(expected)]).max(initial=0)
    wrong = ~np.isclose(numbers, expected, rtol=1e-3, atol=tolerance)
    if not wrong.any():
        return ""
    first = wrong.argmax()
    index = [int(i) for i in np.unravel_index(first, right["shape"])]
    return (f"{index or ''}: {expected[first]:.5g} expected, found {numbers[first]:.5g} "
            f"({wrong.sum()} of {wrong.size} differ)")


def judge(name, seed, parts):
    """Is everything right? And a line for each part."""
    lines = []
    passed = True
    for right, found in zip_longest(right_parts(name, seed), parts):
        if right["what"] == "result":
            lines.append(right["call"])
        if found is None:
            hint = f"           hint: {right['hint']}"
            return False, [*lines, "    not reached", *[hint] * (hint not in lines)]
        fault = compare(right, found)
        lines.append(f"    {'wrong' if fault else 'ok   '}  {right['what']}{fault}")
        passed = passed and not fault
        hint = f"           hint: {right['hint']}"
        if fault and hint not in lines:
            lines.append(hint)
    return passed, lines


def read_prints(path):
    """The last lines that a fork has printed."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [f"| {line[:400]}" for line in text.splitlines()[-25:]]


def feedback(name, seed, folder):
    """Points and lines of text, from what the submission's process has left in the folder."""
    prints = read_prints(folder / f"{name}.txt")
    try:
        result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        passed, lines = judge(name, seed, result["parts"])
    except Exception:                                       # the file may hold anything
        return 0, ["no result", *prints]
    if passed:
        return TASKS[name].points, ["ok", *prints]
    if result["error"] == "NotImplementedError()":
        return 0, ["not yet"]
    summary = "wrong"
    if result["error"] == "KeyboardInterrupt()":
        summary = f"stopped after {SECONDS} s, an endless loop? The traceback shows where"
    return 0, [summary, *lines, *prints]


def grade(path, names=TASKS, seed=0):
    """{task name: (points, lines of feedback)}, and lines about the file itself."""
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        return {name: (0, ["no result"]) for name in names}, [str(error)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, "student.py").write_text(source, encoding="utf-8")
        script = str(Path(__file__).resolve())
        command = [sys.executable, "-u", script, "--submission", str(seed), *names]
        with suppress(subprocess.TimeoutExpired):           # of one that sleeps; loops end earlier
            environment = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
            subprocess.run(command, cwd=folder, env=os.environ | environment,
                           stdin=subprocess.DEVNULL, timeout=600)
        grades = {name: feedback(name, seed, Path(folder)) for name in names}
        return grades, read_prints(Path(folder, "load.txt"))


def total(grades):
    return sum(points for points, _ in grades.values())


def report(grades, notes):
    """The feedback as a text."""
    lines = [f"{total(grades)} of {sum(TASKS[name].points for name in grades)} points", *notes]
    for name, (points, (summary, *details)) in grades.items():
        lines.append(f"{points} of {TASKS[name].points}  {name}: {summary}")
        lines += [f"        {line}" for line in details]
    return "\n".join(lines)


def gradescope(grades, notes):
    """Gradescope's results.json."""
    tests = [{"name": name, "score": points, "max_score": TASKS[name].points,
              "output": "\n".join(lines)} for name, (points, lines) in grades.items()]
    return json.dumps({"score": total(grades), "output": "\n".join(notes), "tests": tests})


def grade_folder(folder, table, names=TASKS, seed=0):
    """Grade every .py, also in sub-folders, several at once: the table, a NAME.points.txt each."""
    files = [path for path in sorted(Path(folder).rglob("[!._]*")) if path.is_file()]
    paths = [path for path in files if path.suffix == ".py"]
    if not paths:
        raise ValueError(f"{folder}: a folder with submissions, .py, expected; found none")
    for name in names:
        right_parts(name, seed)             # not in threads, which share PyTorch's random state
    contents = [path.read_bytes().split() for path in paths]
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda path: grade(path, names, seed), paths)
        for path, content, (grades, notes) in zip(paths, contents, results):
            path.with_suffix(".points.txt").write_text(report(grades, notes), encoding="utf-8")
            twins = [str(twin) for twin, other in zip(paths, contents)
                     if other == content and twin != path]
            row = {"file": str(path), "points": total(grades), "same file as": ", ".join(twins),
                   "note": " ".join(notes[-1:])}
            rows.append(row | {name: points for name, (points, _) in grades.items()})
            print(f"{path}: {row['points']} points", flush=True)
    graded = {Path(table), *paths, *(path.with_suffix(".points.txt") for path in paths)}
    for path in files:
        if path not in graded:
            rows.append({"file": str(path), "note": "skipped, .py expected"})
            print(f"{path}: skipped, .py expected")
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "points", *names, "same file as", "note"])
        writer.writeheader()
        writer.writerows(rows)


def main():
    from support.command import ArgumentParser, number, one_line_errors
    parser = ArgumentParser(description="See the docstring of tests/grading.py.")
    parser.add_argument("path", help="a student's file, or a folder of them")
    parser.add_argument("table", nargs="?", default="grades.csv", help="for a folder: the table")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME",
                        help="these alone")
    parser.add_argument("--seed", type=number(0, 10 ** 6, int), default=0, help="of the inputs")
    parser.add_argument("--gradescope", metavar="FILE", help="one student: Gradescope's results.json")
    with one_line_errors():
        args = parser.parse_args()
        if not hasattr(os, "fork"):
            raise ValueError("os.fork is missing here: grade on Linux, on macOS or in WSL")
        if Path(args.path).is_dir():
            return grade_folder(args.path, args.table, args.tasks, args.seed)
        grades, notes = grade(args.path, args.tasks, args.seed)
        print(report(grades, notes))
        if args.gradescope:
            Path(args.gradescope).write_text(gradescope(grades, notes), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--submission"]:
        run_submission(sys.argv[3:], int(sys.argv[2]))
    else:
        main()
