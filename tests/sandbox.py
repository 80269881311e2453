"""A process in which a student's file may run: it can disturb nobody and learns nothing of what is right.

Sandbox is the near end: it sends a program (source text), a task and a seed, and gets back numbers or a line that
says why there are none. The far end, this file as a script, holds PyTorch and the tasks but neither key nor results;
for each program it forks a process that has

    a time limit, a memory limit, a limit on what it writes, and no terminal
    an empty folder; outside it, it may open the libraries to read and nothing else
    no way to start processes, to send signals or to use the network

The forbidden ways are refused by Python itself (sys.addaudithook). That stops accidents and the usual tricks; native
code is not asked, so a determined attacker gets through, as by functions of PyTorch that open files. Against such
people put the grading into a container. Needs os.fork: Linux, macOS (never tried), Windows's WSL; the memory limit
works on Linux alone.
"""
import json
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

FORBIDDEN = ("subprocess.", "socket.", "ctypes.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system",
             "os.kill", "os.chdir", "os.fchdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link",
             "os.symlink", "os.truncate", "os.chmod", "os.chown", "pty.", "gc.get")
MEMORY, WRITTEN, ANSWER = 2 ** 31, 2 ** 24, 2 ** 22     # bytes: beyond PyTorch's own, in files, of the answer's file


class Sandbox:
    """seconds: the limit of one program; total: of all that this sandbox runs. close() ends it."""

    def __init__(self, seconds=10.0, total=60.0):
        self.seconds, self.left, self.process = seconds, total, None

    def run(self, name, seed, program):
        """What the task `name` gets from the program: {what: nested lists of numbers}, or a line why there is none."""
        if self.left <= 0:
            return "no time is left: the tasks before took all of it"
        if self.process is None:
            self.start()
        start = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            Path(folder, "student.py").write_text(program, encoding="utf-8")
            seconds = min(self.seconds, self.left)
            ended = self.ask(json.dumps([folder, name, seed, seconds]), seconds)
            self.left -= time.monotonic() - start
            if ended == "late":
                return f"it was not ready within {seconds:.0f} s"
            return read_answer(Path(folder, "answer.json"))

    def start(self):
        if not hasattr(os, "fork"):
            raise OSError("a system with os.fork expected, Linux, macOS or Windows's WSL; this one has none")
        wanted = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            stderr=subprocess.DEVNULL, env=wanted | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        if not self.process.stdout.readline():                          # "ready": it has imported PyTorch
            raise OSError("the sandbox does not start; `python -I tests/sandbox.py` says why")

    def ask(self, request, seconds):
        """One line there, one line back; a far end that says nothing is given up."""
        try:
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
            heard, _, _ = select.select([self.process.stdout], [], [], seconds + 10)
            reply = self.process.stdout.readline().decode().strip() if heard else ""
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.close()
        return reply

    def close(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)                 # with what it has forked
            self.process.communicate()
            self.process = None


def read_answer(path):
    """The file is the student's: it is measured before it is read, and nothing in it but numbers is believed."""
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > ANSWER:
            return "its answer is larger than any right one"
        answer = json.loads(path.read_bytes())
        if isinstance(answer, dict):
            return answer
        return "".join(letter if letter.isprintable() else " " for letter in str(answer)[:200])
    except FileNotFoundError:
        return "its process ended before there was an answer"
    except (ValueError, RecursionError):
        return "its answer cannot be read"


# --------------------------------------------------------------------------------------------------------- the far end


def serve():
    """A program a line, until standard input ends."""
    libraries = list(sys.path)
    sys.path.append(str(Path(__file__).parent))
    import torch
    from exercises import TASKS, numbers_of
    sys.path[:] = libraries
    torch.set_num_threads(1)
    tasks = {task.name: task for task in TASKS}
    print("ready", flush=True)
    for line in sys.stdin:
        folder, name, seed, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            answer(folder, seconds, lambda code: numbers_of(tasks[name], code, seed))
        end = time.monotonic() + seconds
        while (ended := os.waitpid(child, os.WNOHANG)[0]) == 0 and time.monotonic() < end:
            time.sleep(0.005)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print("ended" if ended else "late", flush=True)


def answer(folder, seconds, ask):
    """In the fork: run student.py, ask it, write what it says to answer.json. Does not return."""
    try:
        confine(os.path.realpath(folder), seconds)
        code = sys.modules["student"] = types.ModuleType("student")
        with open("student.py", encoding="utf-8") as file:
            exec(compile(file.read(), "student.py", "exec"), code.__dict__)
        said = ask(code)
    except NotImplementedError:
        said = "not yet"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    try:
        with open("answer.json", "w") as file:
            json.dump(said, file)
    finally:
        os._exit(0)


def confine(folder, seconds):
    """Take from this process what a solution does not need."""
    import resource                                         # not on Windows
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDWR)
    for terminal in (0, 1, 2):
        os.dup2(nothing, terminal)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2, int(seconds) + 2))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    # Names of this function alone: what the program puts into os, builtins or this module changes nothing below.
    forbidden, text, kind, refused = FORBIDDEN, str, type, PermissionError
    libraries = tuple(place + os.sep for place in sys.path if place)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def refuse(event, arguments):
        if event.startswith(forbidden) or event == "object.__setattr__" and arguments[1] == "__code__":
            raise refused(f"{event} is not allowed here")
        if event == "open" or event == "os.listdir" or event == "os.scandir":
            path = arguments[0]
            if kind(path) is kind(0) or path is None:               # a file that is open; the empty folder
                return
            if kind(path) is text and ".." not in path:
                if "/" not in path:                                 # in the empty folder: there is no way out of it
                    return
                reads = event != "open" or not (arguments[2] or 0) & writing
                if reads and path.startswith(libraries):
                    return
            raise refused(f"{path} is not open to a solution")

    sys.addaudithook(refuse)


if __name__ == "__main__":
    serve()
