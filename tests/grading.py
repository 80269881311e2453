"""
Points and feedback for one student's file, or for a folder of them.

    python tests/grading.py student.py [--tasks vq_loss,perplexity] [--seed 2027]
    python tests/grading.py FOLDER grades.csv       a row for each file, and NAME.txt to hand back
    python tests/grading.py student.py --gradescope /autograder/results/results.json

A submission runs in a process of its own, in an empty folder, with a fork for each task. Numbers
come back, which are compared here with the key's. This stops endless loops and accidents, not
theft: the key is public, and a submission can read what its user can. Needs os.fork (not Windows).
"""
import argparse
import ast
import csv
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from exercises import ROOT, TASKS, chosen, read, run_test

SECONDS = 10                # for each task
MEMORY = 2 ** 31            # bytes, beside what PyTorch takes
OUTPUT = 2 ** 22            # bytes, for each file that is written

# -----------------------------------------------------------------------------
# the submission's process


def run_submission(names, seed):
    """Fork for each task: numbers go to NAME.json, what it prints to NAME.txt.

    The first fork only loads student.py, and keeps what that prints.
    """
    for name in ["load", *names]:
        if os.fork() == 0:
            run_fork(name, seed)
        _, status = os.wait()
        if name == "load" and status != 0:
            break


def run_fork(name, seed):
    task = next((task for task in TASKS if task.name == name), None)
    result = {"parts": {}, "error": ""}
    output = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        redirect_prints(null if task else output)
        limit_resources()
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=output)
        if task:
            delattr(task.holder, task.attribute)            # the key's
        student = load("student.py")
        if task:
            redirect_prints(output)
            install(student, task)
            run_test(task, seed, result["parts"])
    except BaseException as error:                          # SystemExit as well
        result["error"] = type(error).__name__
        print_traceback(error)
    Path(f"{name}.json").write_text(json.dumps(result))
    os._exit(1 if result["error"] else 0)


def redirect_prints(file):
    sys.stdout.reconfigure(line_buffering=True)             # nothing is lost in an endless loop
    os.dup2(file, 1)
    os.dup2(file, 2)


def limit_resources():
    import resource
    sys.addaudithook(refuse)
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT, OUTPUT))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def refuse(event, arguments, realpath=os.path.realpath, libraries=os.path.realpath(sys.prefix)):
    """An audit hook: no files of the repository, no other processes."""
    if event.startswith(("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
                         "os.kill")):
        raise PermissionError(f"{event} is not allowed in a solution")
    if event == "open" and not isinstance(arguments[0], int):
        path = os.fsdecode(realpath(arguments[0])) + os.sep
        if path.startswith(f"{ROOT}{os.sep}") and not path.startswith(libraries + os.sep):
            raise PermissionError(f"{path} is not open to a solution")


def load(path):
    """The module student. A statement that fails, such as an import, does not stop the others."""
    student = sys.modules["student"] = types.ModuleType("student")
    for statement in ast.parse(Path(path).read_text(encoding="utf-8"), "student.py").body:
        code = compile(ast.Module([statement], []), "student.py", "exec")
        try:
            exec(code, vars(student))
        except Exception as error:
            print_traceback(error)
    return student


def install(student, task):
    """Put the student's function in its place; all other functions are the key's."""
    setattr(task.holder, task.attribute, getattr(student, task.name))
    for other in TASKS:
        setattr(student, other.name, getattr(other.holder, other.attribute))


def print_traceback(error):
    """From the first line of student.py on; if it does not come from there, the error alone."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename != "student.py":
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames, chain=False)


# -----------------------------------------------------------------------------
# the grader's process


@lru_cache
def right_parts(task, seed):
    parts = {}
    run_test(task, seed, parts)
    return parts


def compare(right, found):
    """What is wrong with a part, "" if nothing."""
    if found is None:
        return ": not reached"
    if found["type"] != right["type"]:
        return f": {right['type']} expected, found {found['type']}"
    if found["shape"] != right["shape"]:
        return f": shape {right['shape']} expected, found {found['shape']}"
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


def judge(task, seed, folder):
    """Points and feedback, from what the submission's process has left in the folder."""
    right = right_parts(task, seed)
    prints = read_prints(folder / f"{task.name}.txt")
    try:
        result = json.loads((folder / f"{task.name}.json").read_text())
        if result["error"] == "NotImplementedError":
            return 0, ["not yet"]
        faults = {what: compare(right[what], result["parts"].get(what)) for what in right}
    except Exception:                                       # the file may hold anything
        return 0, ["no result", *prints]
    if not any(faults.values()):
        return task.points, ["ok", *prints]
    lines = ["wrong"]
    for what, fault in faults.items():
        lines.append(f"wrong  {what}{fault}" if fault else f"ok     {what}")
        if fault and what in result["parts"]:
            lines.append(f"       hint: {right[what]['hint']}")
    return 0, lines + prints


def read_prints(path):
    """The last lines that a fork has printed, with a timeout's traceback as one line."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    loop = re.search(r'Timeout \(.*?File "student.py", (line \d+ in \w+)', text, re.DOTALL)
    if loop:
        text = f"{text[:loop.start()]}stopped after {SECONDS} s at {loop[1]}: an endless loop?"
    return [f"| {line[:200]}" for line in text.splitlines()[-25:]]


def grade(path, tasks=TASKS, seed=0):
    """{task: (points, lines of feedback)}, and lines about the file itself."""
    try:
        source = read(path)
    except (OSError, ValueError) as error:
        return {task: (0, ["no result"]) for task in tasks}, [str(error)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, "student.py").write_text(source, encoding="utf-8")
        names = ",".join(task.name for task in tasks)
        process = subprocess.Popen([sys.executable, __file__, "--submission", names, str(seed)],
                                   cwd=folder, start_new_session=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        with suppress(subprocess.TimeoutExpired):
            process.wait(60 + (SECONDS + 2) * len(tasks))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)          # with its forks
        process.wait()
        grades = {task: judge(task, seed, Path(folder)) for task in tasks}
        return grades, read_prints(Path(folder, "load.txt"))


def total(grades):
    return sum(points for points, _ in grades.values())


def report(grades, notes):
    """The feedback as a text."""
    lines = [f"{total(grades)} of {sum(task.points for task in grades)} points", *notes]
    for task, (points, feedback) in grades.items():
        lines.append(f"\n{points} of {task.points}  {task.name}: {feedback[0]}")
        lines += [f"        {line}" for line in feedback[1:]]
    return "\n".join(lines) + "\n"


def check(*names, path="student.py"):
    """Print the feedback on these tasks, for the notebook."""
    print(report(*grade(path, [task for task in TASKS if task.name in names])))


def write_gradescope(path, grades, notes):
    tests = [{"name": task.title, "score": points, "max_score": task.points,
              "output": "\n".join(feedback)} for task, (points, feedback) in grades.items()]
    result = {"score": total(grades), "output": "\n".join(notes), "tests": tests}
    Path(path).write_text(json.dumps(result, indent=1), encoding="utf-8")


def grade_folder(folder, table, tasks=TASKS, seed=0):
    """Grade every .py, also in sub-folders, several at a time: the table, and NAME.txt for each."""
    folder = Path(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()
             and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)]
    paths = [path for path in files if path.suffix == ".py"]
    if not paths:
        raise ValueError(f"{folder}: a folder with submissions, .py, expected; found none")
    for task in tasks:
        right_parts(task, seed)             # not in threads, which share PyTorch's random state
    rows = []
    contents = [path.read_bytes().split() for path in paths]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda path: grade(path, tasks, seed), paths)
        for path, content, (grades, notes) in zip(paths, contents, results):
            path.with_suffix(".txt").write_text(report(grades, notes), encoding="utf-8")
            twins = [str(paths[i]) for i in range(len(paths)) if contents[i] == content]
            row = {"student": student_name(path, folder), "points": total(grades),
                   "same file as": ", ".join(name for name in twins if name != str(path)),
                   "note": " ".join(notes[-1:])}
            rows.append(row | {task.name: points for task, (points, _) in grades.items()})
            print(f"{row['student']}: {row['points']} points", flush=True)
    written = [Path(table), *(path.with_suffix(".txt") for path in paths)]
    for path in files:
        if path not in paths + written:
            print(f"{path}: skipped, .py expected")
            rows.append({"student": student_name(path, folder), "note": f"skipped: {path.name}"})
    with open(table, "w", newline="", encoding="utf-8") as file:
        names = [task.name for task in tasks]
        writer = csv.DictWriter(file, ["student", "points", *names, "same file as", "note"])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def student_name(path, folder):
    """FOLDER/ada.py and FOLDER/ada/student.py are ada's."""
    name = path.relative_to(folder).with_suffix("")
    return str(name.parent if name.name == "student" and len(name.parts) > 1 else name)


def main():
    from support.command import ArgumentParser, number, one_line_errors
    parser = ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a student's file, or a folder of them")
    parser.add_argument("table", nargs="?", default="grades.csv", help="for a folder: the table")
    parser.add_argument("--tasks", type=chosen, default=TASKS,
                        help="these alone, separated by commas (default: all)")
    parser.add_argument("--seed", type=number(0, 10 ** 6, int), default=0,
                        help="of the random inputs (default: %(default)s)")
    parser.add_argument("--gradescope", metavar="FILE", help="one student: Gradescope's results.json")
    with one_line_errors():
        args = parser.parse_args()
        if Path(args.path).is_dir():
            rows = grade_folder(args.path, args.table, args.tasks, args.seed)
            print(f"{args.table}: {len(rows)} rows")
            return
        grades, notes = grade(args.path, args.tasks, args.seed)
        print(report(grades, notes), end="")
        if args.gradescope:
            write_gradescope(args.gradescope, grades, notes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--submission"]:
        run_submission(sys.argv[2].split(","), int(sys.argv[3]))
    else:
        main()
