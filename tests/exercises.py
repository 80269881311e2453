"""
The course: thirteen functions of CodeTalker for students to write, and how each is tested.

    python tests/exercises.py write student.py              signatures and docstrings, to be filled
    python tests/exercises.py assemble student.py mine      a copy of the project that uses them

The key is codetalker.py and support/metrics.py, without marks: a task is the body of one function.
Its test yields arguments, with which the function is called: here the key's, in another process
the student's (grading.py). From there numbers come back, and are compared with the key's.
"""
import ast
import inspect
import shutil
import sys
import textwrap
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import codetalker

# three functions of support/metrics.py; as a whole it imports scipy and matplotlib, for seconds
METRICS = ROOT / "support" / "metrics.py"
tree = ast.parse(METRICS.read_text(encoding="utf-8"))
names = ("perplexity", "lip_vertex_errors", "upper_face_std")
tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
metrics = types.ModuleType("metrics")
metrics.np = np
exec(compile(tree, METRICS, "exec"), vars(metrics))

# holder: the class or module that the function belongs to; attribute: its name there
Task = namedtuple("Task", "holder attribute points title test hints")
TASKS = {}


def task(holder, points, title, hint, attribute=None, **hints):
    """Decorator of a test. The hint is for the result, **hints for gradients and other parts."""
    def register(test):
        name = test.__name__
        all_hints = {"result": hint} | hints
        TASKS[name] = Task(holder, attribute or name, points, title, test, all_hints)
        return test
    return register


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape)).float()


def randomise(module):
    """Random values for all weights: some start as zeros or ones, which would hide mistakes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def small_model():
    vq_config = codetalker.VQConfig(5, dim=16, codes_per_frame=4, code_dim=4, codebook_size=16)
    config = codetalker.ARConfig(styles=3, period=4, context=5, dim=12, heads=3, temperature=0.7)
    return randomise(codetalker.CodeTalker(config, codetalker.MotionAutoencoder(vq_config)))


# -----------------------------------------------------------------------------
# the tasks: arguments, some random and some fixed, and hints for whoever gets a part wrong


@task(codetalker.Quantiser, 2, "The nearest code",
      "the smallest ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2 over the codes e; only ||z||^2 may be "
      "left out; int64, one index for each vector, so (..., C) becomes (...)")
def nearest(rng):
    quantiser = codetalker.Quantiser(12, 3, beta=0.25)
    quantiser.codebook.data = normal(rng, 12, 3) * torch.linspace(0.3, 2, 12)[:, None]
    for z in (normal(rng, 2, 10, 4, 3), normal(rng, 5, 3), torch.zeros(1, 3)):
        yield quantiser, z


@task(codetalker, 1, "The straight-through gradient", "forward: z_q",
      z_e="backward: as if the result were z_e", z_q="none: z_q is in detached terms only")
def straight_through(rng):
    yield normal(rng, 2, 3, 2, 4).requires_grad_(), normal(rng, 2, 3, 2, 4).requires_grad_()


@task(codetalker, 4, "The two losses of the codebook", "the value is (1 + beta) * MSE(z_e, z_q)",
      z_e="d/dz_e of beta * MSE(z_e, sg(z_q)), the commitment loss, and of nothing else",
      z_q="d/dz_q of MSE(sg(z_e), z_q), the codebook loss, without beta; of nothing else")
def vq_loss(rng):
    for beta in (0.25, round(2 + rng.random(), 2)):
        yield normal(rng, 2, 5, 3).requires_grad_(), normal(rng, 2, 5, 3).requires_grad_(), beta


@task(metrics, 1, "Perplexity of the codes",
      "p = counts / sum; entropy -sum p ln p, in nats, where 0 ln 0 is 0; exp of it")
def perplexity(rng):
    counts = rng.integers(1, 100, 30)
    unused = np.arange(30) % 3 > 0
    yield from ((counts,), (counts * unused,), (np.full(8, 5),), (np.array([0, 7]),))


@task(codetalker, 2, "Positions that repeat",
      "row t is sin, cos, sin, cos, ...; columns 2i and 2i + 1 share the angle t / 10000^(2i/dim); "
      "t starts at 0; float32")
def periodic_positions(rng):
    yield from ((3, 2), (7, 6), (int(rng.integers(8, 30)), 16))


@task(codetalker, 3, "The biased causal mask",
      "-inf in the future (j > i) and `context` or more frames back; elsewhere -4^-h * "
      "floor((i - j) / period) for head h = 1, 2, ...; float32")
def causal_mask(rng):
    drawn = rng.integers((12, 2, 2, 6), (20, 5, 6, 10)).tolist()
    yield from ((8, 2, 3, 5), (6, 4, 4, 9), (1, 30, 1, 90), drawn)


@task(codetalker.DecoderLayer, 3, "A decoder layer",
      "three times x = norm(x + dropout(y)), in train mode as well; the mask and the cache are for "
      "self-attention alone; x[:, t] attends to audio[:, t] and to no other frame", "forward")
def decoder_layer(rng):
    config = codetalker.ARConfig(styles=1, dim=12, heads=3, dropout=1.0)
    layer = randomise(codetalker.DecoderLayer(config))
    x, audio = normal(rng, 2, 6, 12), normal(rng, 2, 6, 12)
    future = torch.ones(6, 6).triu(diagonal=1) > 0
    mask = normal(rng, 3, 6, 6).masked_fill(future, -torch.inf)
    yield layer, x, audio, mask
    cache = codetalker.KVCache(4)
    for t in range(6):
        seen = slice(max(0, t - 3), t + 1)
        yield layer, x[:, t:t + 1], audio[:, t:t + 1], mask[:, t:t + 1, seen], cache
    yield layer.train(), x, audio, mask                     # dropout of p = 1: every y becomes 0


@task(codetalker.CodeTalker, 3, "Teacher forcing: shifted prediction",
      "prev[:, t] is past[:, t - 1]; then embed, all layers with the causal mask, head")
def predict(rng):
    model = small_model()
    for frames in (9, 1):
        yield model, normal(rng, 2, frames, 16), normal(rng, 2, 3), normal(rng, 2, frames, 12)


@task(codetalker.CodeTalker, 2, "The loss on codes",
      "-log softmax(self.logits(z_hat)) at the true codes, mean over all codes of all frames",
      z_hat="does it come from the logits?")
def code_loss(rng):
    model = small_model()
    for frames in (6, 1):
        codes = torch.from_numpy(rng.integers(0, 16, (3, frames, 4)))
        yield model, normal(rng, 3, frames, 16).requires_grad_(), codes


@task(codetalker.CodeTalker, 2, "The loss on motion",
      "z_hat as (B, T, H, C), then quantiser, decoder, mean squared error",
      z_hat="the quantiser's first result has the straight-through gradient")
def motion_loss(rng):
    model = small_model()
    for frames in (6, 1):
        yield model, normal(rng, 3, frames, 16).requires_grad_(), normal(rng, 3, frames, 15)


@task(codetalker.CodeTalker, 4, "The generation loop",
      "what self.sample returns for each frame, (B, T, H)",
      logits="first index: the frame. For each: embed, layers, head, self.logits, self.sample, "
             "once. From frame 1: prev is the vectors of the codes just sampled; start=t; audio of "
             "frame t; a cache for each layer; the last columns of the mask's last row",
      temperatures="config.temperature stands for None only")
def generate(rng):
    def sample(logits, temperature):
        """In place of the model's: records its arguments and returns the codes of frame t."""
        t = len(temperatures)
        temperatures.append(temperature)
        all_logits.append(logits.detach().reshape(2, 4, 16))
        return codes[:, t].view(logits.shape[:-1])

    for frames, temperature in ((9, None), (9, 1), (6, 0), (1, 0.3)):
        model = small_model()
        model.sample = sample
        codes = torch.from_numpy(rng.integers(0, 16, (2, frames, 4)))
        all_logits = []
        temperatures = []
        yield model, normal(rng, 2, frames, 12), normal(rng, 2, 3), temperature
        yield {"logits": all_logits, "temperatures": temperatures}


@task(metrics, 1, "Lip vertex error",
      "squared distance of lip vertices, no root; the largest of each frame")
def lip_vertex_errors(rng):
    for frames in (7, 1):
        pred, gt = rng.standard_normal((2, frames, 10, 3))
        yield pred, gt, rng.permutation(10)[:4].tolist()


@task(metrics, 1, "Upper-face dynamics, for FDD",
      "squared length of displacements, std over frames (no n - 1), mean over vertices")
def upper_face_std(rng):
    for scale in (1, 0.2):
        motion = rng.standard_normal((9, 10, 3)) * np.linspace(scale, 2, 10)[:, None]
        yield motion, rng.permutation(10)[:4].tolist()


def run_test(name, seed, parts):
    """Append descriptions of all parts to a list; an exception leaves those before it."""
    def record(what, value, hint):
        parts.append(describe(value) | {"call": call, "what": what, "hint": hint})

    task = TASKS[name]
    torch.manual_seed(seed)
    for arguments in task.test(np.random.default_rng([seed, *name.encode()])):
        if isinstance(arguments, dict):                     # further parts of the call before
            for what, value in arguments.items():
                record(what, value, task.hints[what])
            continue
        call = f"{name}({', '.join(map(brief, arguments))})"
        arrays = [argument for argument in arguments if hasattr(argument, "shape")]
        copies = [array + 0 for array in arrays]
        result = getattr(task.holder, task.attribute)(*arguments)
        record("result", result, task.hints["result"])
        inputs = [array for array in arrays if getattr(array, "requires_grad", False)]
        for what, tensor in zip(list(task.hints)[1:], inputs):
            record(f"gradient of {what}", gradient(result, tensor), task.hints[what])
        changed = sum(not bool((a == b).all()) for a, b in zip(arrays, copies))
        record("changed arguments", changed, "x += y and masked_fill_() change the caller's tensor")


def brief(argument):
    if hasattr(argument, "shape"):
        return f"{type(argument).__name__}{tuple(argument.shape)}"
    return type(argument).__name__ if hasattr(argument, "__dict__") else repr(argument)


def gradient(result, tensor):
    """Of a weighted sum of the result; zeros where it does not depend on the tensor."""
    if torch.is_tensor(result):
        weights = torch.linspace(1, 2, result.numel()).view_as(result)
        scalar = (weights * result).sum() + 0 * tensor.sum()
        return torch.autograd.grad(scalar, tensor, retain_graph=True)[0]


def describe(value):
    """What is compared; NaN for what is no number."""
    kind = "None" if value is None else "numbers"
    if torch.is_tensor(value):
        kind = f"{value.dtype} tensor"
        value = value.detach().numpy()
    try:
        array = np.array(value, float)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    return {"type": kind, "shape": list(array.shape), "numbers": array.ravel().tolist()}


# -----------------------------------------------------------------------------
# the student's file

HEADER = '''"""
Functions of CodeTalker for you to write; notebooks/assignment.ipynb explains them.

The docstring is the task: what goes in, what comes out, in which shape (B batch, T frames, V
vertices, D model dimension, H codes per frame, C code dimension, N codebook size, K styles).
Methods stand here as functions; `self` is the object they will belong to. Keep names and
arguments. `python tests/grading.py student.py` prints your points, and what is wrong.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from codetalker import {imports}
'''


def definition(name):
    """The key's function, as it stands in a student's file."""
    holder, attribute, *_ = TASKS[name]
    text = textwrap.dedent(inspect.getsource(getattr(holder, attribute)))
    return text.replace(f"def {attribute}(", f"def {name}(", 1)


def skeleton(name):
    """Its decorators, signature and docstring."""
    text = definition(name)
    docstring = ast.parse(text).body[0].body[0]
    lines = text.splitlines()[:docstring.end_lineno]
    return "\n".join([*lines, "    raise NotImplementedError", ""])


def students_file(names=TASKS, function_text=skeleton):
    """The text of student.py; with function_text=definition that of the key."""
    points = sum(TASKS[name].points for name in names)
    imports = "KVCache" if "causal_mask" in names else "KVCache, causal_mask"
    text = HEADER.format(imports=imports)
    for number, (name, task) in enumerate(TASKS.items(), 1):
        if name in names:
            title = f"{number}. {task.title}, {task.points} of {points} points"
            place = f"{task.holder.__name__}.{task.attribute}"
            text += f"\n\n# {'-' * 77}\n# {title:55} {place}\n\n\n{function_text(name)}"
    return text


def assemble(path, folder):
    """Copy the project; the student's functions replace the key's where they have a body."""
    source = Path(path).read_text(encoding="utf-8-sig")
    if Path(folder).exists():
        raise ValueError(f"{folder} exists already: delete it, or give another name")
    Path(folder, "support").mkdir(parents=True)
    for script in [*ROOT.glob("*.py"), *ROOT.glob("support/*.*")]:
        shutil.copyfile(script, Path(folder, script.relative_to(ROOT)))     # it may be read-only
    Path(folder, "student.py").write_text(source, encoding="utf-8")
    for name, task in TASKS.items():
        place = f"{task.holder.__name__}.{task.attribute}"
        sides = [place.removeprefix("codetalker.").removeprefix("metrics."), f"student.{name}"]
        if skeleton(name) in source or f"def {name}(" not in source:
            sides.reverse()                 # the student's other functions can call the key's
        script = "support/metrics.py" if task.holder is metrics else "codetalker.py"
        with open(Path(folder, script), "a", encoding="utf-8") as file:
            file.write(f"\nimport student\n{' = '.join(sides)}\n")


def main():
    from support.command import ArgumentParser, one_line_errors
    parser = ArgumentParser(description="See the docstring of tests/exercises.py.")
    parser.add_argument("command", choices=["write", "assemble"])
    parser.add_argument("file", help="the student's file")
    parser.add_argument("folder", nargs="?", default="mine", help="assemble: the folder to make")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="NAME",
                        help="write: these alone")
    with one_line_errors():
        args = parser.parse_args()
        if args.command == "assemble":
            assemble(args.file, args.folder)
        else:
            with open(args.file, "x", encoding="utf-8") as file:        # never over a file
                file.write(students_file(args.tasks))


if __name__ == "__main__":
    main()
