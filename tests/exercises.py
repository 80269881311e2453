"""
The course: thirteen functions of CodeTalker for students to write, and how each is tested.

    python tests/exercises.py write student.py              signatures and docstrings, to be filled
    python tests/grading.py student.py                      points, and what is wrong
    python tests/grading.py FOLDER grades.csv               the same for a folder of submissions
    python tests/exercises.py assemble student.py mine      a copy of the project that uses them

The key is codetalker.py and support/metrics.py, without marks: a task is the body of one function.
Its test draws inputs, calls the function in its place and yields parts: (what, value, hint). The
test runs with the key in this process, and with the student's function in another (grading.py).
That one returns numbers only, which are compared with the key's.
"""
import argparse
import ast
import copy
import inspect
import math
import shutil
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import codetalker

# support/metrics.py as a module of three functions: as a whole it imports scipy and matplotlib
METRICS = ROOT / "support" / "metrics.py"
tree = ast.parse(METRICS.read_text(encoding="utf-8"))
wanted = ("perplexity", "lip_vertex_errors", "upper_face_std")
tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
metrics = types.ModuleType("metrics")
metrics.np = np
exec(compile(tree, METRICS, "exec"), vars(metrics))

# -----------------------------------------------------------------------------
# what a test is made of


@dataclass(frozen=True)
class Task:
    test: Callable      # inputs -> parts
    holder: object      # class or module that the function belongs to
    attribute: str      # its name there
    points: int
    title: str
    given: str          # what the student may use

    @property
    def name(self):
        return self.test.__name__

    @property
    def place(self):
        return f"{self.holder.__name__}.{self.attribute}"

    @property
    def function(self):
        return getattr(self.holder, self.attribute)


TASKS = []


def task(holder, points, title, given="", attribute=None):
    """Decorator of a test; the function that it tests has the same name, or `attribute`."""
    def register(test):
        TASKS.append(Task(test, holder, attribute or test.__name__, points, title, given))
        return test
    return register


class Inputs:
    """Random inputs of a test. It keeps a copy of each, to see later which have been changed."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.kept = []

    def keep(self, value):
        self.kept.append((value, copy.deepcopy(value)))
        return value

    def normal(self, *shape):
        return self.keep(torch.from_numpy(self.rng.standard_normal(shape)).float())

    def integers(self, low, high, *shape):
        return self.keep(torch.from_numpy(self.rng.integers(low, high, shape)))

    def changed(self):
        return sum(not bool((value == before).all()) for value, before in self.kept)


def gradient(scalar, tensor):
    """d scalar / d tensor, zeros where it does not depend on it; None if scalar is no tensor."""
    if torch.is_tensor(scalar):
        scalar = scalar + 0 * tensor.sum()
        return torch.autograd.grad(scalar, tensor, retain_graph=True)[0]


def masked_loss(inputs, loss, predicted, target, hint):
    """The parts of a loss over the real frames of a batch, without and with padding."""
    predicted.requires_grad_()
    for padding in ("without", "with"):
        lengths = torch.from_numpy(inputs.rng.integers(1, 6, (3, 1)))
        lengths[0] = 6
        length_mask = inputs.keep((torch.arange(6) < lengths) | (padding == "without"))
        value = loss(predicted, target, length_mask)
        yield f"loss {padding} padding", value, f"{hint}, mean over all real frames together"
        yield f"gradient {padding} padding", gradient(value, predicted), "0 on padding"


def randomise(module):
    """Random values for all weights: some start as zeros or ones, which would hide mistakes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def small_model():
    """A CodeTalker of three heads, period 4, context 5; H = 4, C = 4, N = 16, K = 3, D = 12."""
    vq_config = codetalker.VQConfig(vertices=5, dim=16, layers=1, heads=2, ffn_dim=24,
                                    codes_per_frame=4, code_dim=4, codebook_size=16)
    config = codetalker.ARConfig(styles=3, period=4, context=5, dim=12, heads=3, mel_bands=6,
                                 audio_layers=1)
    return randomise(codetalker.CodeTalker(config, codetalker.MotionAutoencoder(vq_config)))


# -----------------------------------------------------------------------------
# the tasks


@task(codetalker.Quantiser, 2, "The nearest code", "self.codebook (N, C)")
def nearest(inputs):
    quantiser = codetalker.Quantiser(12, 3, beta=0.25)
    quantiser.codebook.data = inputs.normal(12, 3) * torch.linspace(0.3, 2, 12)[:, None]
    inputs.keep(quantiser.codebook.data)
    for z in (inputs.normal(2, 10, 4, 3), inputs.normal(5, 3), inputs.keep(torch.zeros(1, 3))):
        yield f"codes of z {tuple(z.shape)}", quantiser.nearest(z), (
            "the smallest ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2 of the N codes e; only ||z||^2 may "
            "be left out; int64, one index for each vector, so (..., C) becomes (...)")


@task(codetalker, 1, "The straight-through gradient", "tensor.detach(): same value, no gradient")
def straight_through(inputs):
    z_e = inputs.normal(2, 3, 2, 4).requires_grad_()
    z_q = inputs.normal(2, 3, 2, 4).requires_grad_()
    result = codetalker.straight_through(z_e, z_q)
    yield "value", result, "forward: z_q"
    scalar = (inputs.normal(2, 3, 2, 4) * result).sum()
    yield "gradient of z_e", gradient(scalar, z_e), "backward: as if the result were z_e"
    yield "gradient of z_q", gradient(scalar, z_q), "none: z_q is in detached terms only"


@task(codetalker, 4, "The two losses of the codebook", "F.mse_loss; tensor.detach() for sg")
def vq_loss(inputs):
    for beta in (0.25, 2 + inputs.rng.random()):
        z_e = inputs.normal(2, 5, 2, 3).requires_grad_()
        z_q = inputs.normal(2, 5, 2, 3).requires_grad_()
        loss = codetalker.vq_loss(z_e, z_q, beta)
        case = f" at beta {beta:.2f}: "
        yield "loss" + case, loss, "its value is (1 + beta) * mean((z_e - z_q)^2)"
        yield "gradient of z_e" + case, gradient(loss, z_e), (
            "d/dz_e of beta * mean((z_e - sg(z_q))^2), the commitment loss, and of nothing else")
        yield "gradient of z_q" + case, gradient(loss, z_q), (
            "d/dz_q of mean((sg(z_e) - z_q)^2), the codebook loss, without beta; of nothing else")


@task(metrics, 1, "Perplexity of the codes", "NumPy as np")
def perplexity(inputs):
    counts = inputs.rng.integers(1, 100, 30)
    unused = np.arange(30) % 3 > 0
    for what, counts in (("all codes used", counts), ("eight codes equally often", np.full(8, 5)),
                         ("some codes unused", counts * unused), ("one code", np.array([0, 7]))):
        yield what, metrics.perplexity(inputs.keep(counts)), (
            "p = counts / sum; entropy -sum p ln p, in nats, where 0 ln 0 is 0; exp of it")


@task(codetalker, 2, "Positions that repeat")
def periodic_positions(inputs):
    for period, dim in ((3, 2), (7, 6), (int(inputs.rng.integers(8, 30)), 16)):
        yield f"period {period}, dim {dim}: ", codetalker.periodic_positions(period, dim), (
            "row t is sin, cos, sin, cos, ...; columns 2i and 2i + 1 share the angle "
            "t / 10000^(2i/dim); t starts at 0; float32")


@task(codetalker, 3, "The biased causal mask", "the slope of head h = 1, 2, ... is 4^-h")
def causal_mask(inputs):
    drawn = inputs.rng.integers((12, 2, 2, 6), (20, 5, 6, 10)).tolist()
    for frames, period, heads, context in ((8, 2, 3, 5), (6, 4, 4, 9), (1, 30, 1, 90), drawn):
        mask = codetalker.causal_mask(frames, period, heads, context)
        yield f"{frames} frames, period {period}, {heads} heads, context {context}: ", mask, (
            "-inf in the future (j > i) and `context` or more frames back; elsewhere -4^-h * "
            "floor((i - j) / period); float32")


@task(codetalker.DecoderLayer, 3, "A decoder layer", """\
self.self_attention(x, mask=mask, kv_cache=kv_cache), self.cross_attention(x, context),
self.feed_forward(x), self.norm1, self.norm2, self.norm3, self.dropout. After each of the three:
norm(x + dropout(y)). Frame t attends to the audio feature of frame t and to no other.""", "forward")
def decoder_layer(inputs):
    config = codetalker.ARConfig(styles=1, dim=12, heads=3, dropout=1.0)
    layer = randomise(codetalker.DecoderLayer(config))
    x = inputs.normal(2, 6, 12)
    audio = inputs.normal(2, 6, 12)
    future = torch.ones(6, 6).triu(diagonal=1) > 0
    mask = inputs.keep(inputs.normal(3, 6, 6).masked_fill(future, -math.inf))
    yield "all frames at once", layer(x, audio, mask), (
        "three times x = norm(x + dropout(y)); the mask is for self-attention; x[:, t] attends to "
        "audio[:, t] alone")
    cache = codetalker.KVCache(4)
    steps = [layer(x[:, t:t + 1], audio[:, t:t + 1], None, cache) for t in range(6)]
    yield "frame 5, after five others with a kv_cache", steps[-1], (
        "self-attention takes the cache, cross-attention must not")
    yield "train mode, dropout of p = 1", layer.train()(x, audio, mask), (
        "self.dropout acts on y, all three times, and on nothing else: at p = 1, y becomes 0")


@task(codetalker.CodeTalker, 3, "Teacher forcing: shifted prediction", """\
self.embed(prev, style) -> (B, T, D), prev being code vectors of the frame before each (the first
frame has none: embed() ignores prev[:, 0]); self.layers, each called as layer(x, audio, mask);
self.head; causal_mask; self.config.{period, heads, context}""")
def predict(inputs):
    model = small_model()
    for frames in (9, 1):
        past = inputs.normal(2, frames, 16)
        z_hat = model.predict(past, inputs.normal(2, 3), inputs.normal(2, frames, 12))
        yield f"z_hat of {frames} frames", z_hat, (
            "prev[:, t] is past[:, t - 1]; then embed, all layers with the causal mask, head")


@task(codetalker, 2, "The loss on codes", "F.cross_entropy and its ignore_index")
def code_loss(inputs):
    logits = inputs.normal(3, 6, 4, 7)
    codes = inputs.integers(0, 7, 3, 6, 4)
    hint = "-log softmax(logits) at the true codes"
    yield from masked_loss(inputs, codetalker.code_loss, logits, codes, hint)


@task(codetalker, 2, "The loss on motion")
def motion_loss(inputs):
    predicted = inputs.normal(3, 6, 15)
    motion = inputs.normal(3, 6, 15)
    hint = "squared error, mean over V*3"
    yield from masked_loss(inputs, codetalker.motion_loss, predicted, motion, hint)


@task(codetalker.CodeTalker, 4, "The generation loop", """\
self.embed(prev, style, start=t); KVCache(size), one for each of self.layers, called as
layer(x, audio, mask, kv_cache); self.head; self.logits(z_hat); self.sample(logits, temperature);
self.code_vectors(codes); causal_mask; self.config.{temperature, period, heads, context}.
The mask needs as many columns as there are keys: t + 1, at most `context`.""")
def generate(inputs):
    def sample(logits, temperature):
        """In place of the model's: records its arguments and returns the codes of frame t."""
        by_frame = logits.detach().reshape(2, -1, 4, 16)
        sampled = codes[:, len(temperatures), None].expand(by_frame.shape[:-1])
        all_logits.append(by_frame[:, -1])
        temperatures.append(temperature)
        return sampled.reshape(logits.shape[:-1])

    model = small_model()
    model.sample = sample
    for frames, temperature in ((12, None), (7, 0), (1, 0.3)):
        codes = inputs.integers(0, 16, 2, frames, 4)
        all_logits = []
        temperatures = []
        generated = model.generate(inputs.normal(2, frames, 12), inputs.normal(2, 3), temperature)
        case = f" of {frames} frames at temperature {temperature}"
        yield "codes" + case, generated, "what self.sample returns for each frame, (B, T, H)"
        yield "logits" + case, all_logits[:1], (
            "frame 0: embed, layers, head, self.logits, then self.sample, once for each frame")
        yield "logits of frames 1 to 4" + case, all_logits[1:5], (
            "prev: vectors of the codes just sampled; start=t; audio[:, t:t + 1]; a cache for each "
            "layer; the last t + 1 columns of the mask's last row")
        yield "logits of later frames" + case, all_logits[5:], "`context` keys at most"
        yield "temperatures" + case, temperatures, "config.temperature stands for None only"


@task(metrics, 1, "Lip vertex error", "NumPy as np")
def lip_vertex_errors(inputs):
    for frames in (7, 1):
        pred = inputs.normal(frames, 10, 3).numpy()
        gt = inputs.normal(frames, 10, 3).numpy()
        lips = inputs.rng.permutation(10)[:4].tolist()
        yield f"errors of {frames} frames", metrics.lip_vertex_errors(pred, gt, lips), (
            "squared distance of lip vertices, no root; the largest of each frame")


@task(metrics, 1, "Upper-face dynamics, for FDD", "NumPy as np")
def upper_face_std(inputs):
    vertices = inputs.rng.permutation(10)[:4].tolist()
    for scale in (1, 0.2):
        motion = inputs.normal(9, 10, 3).numpy() * np.linspace(scale, 2, 10)[:, None]
        yield f"std, scale {scale}", metrics.upper_face_std(inputs.keep(motion), vertices), (
            "squared length of displacements, std over frames (no n - 1), mean over vertices")


NAMES = [task.name for task in TASKS]
UNCHANGED = "x += y and masked_fill_() change what belongs to the caller"


def describe(value):
    """What is known of a result: type, shape and numbers; NaN for what is no number."""
    kind = "None" if value is None else "numbers"
    if torch.is_tensor(value):
        kind = f"{value.dtype} tensor"
        value = value.detach()
    try:
        array = np.array(value, float)
    except (TypeError, ValueError):
        array = np.array(math.nan)
    return {"type": kind, "shape": list(array.shape), "numbers": array.ravel().tolist()}


def run_test(task, seed, parts):
    """Fill parts {what: description}; an exception leaves those before it."""
    inputs = Inputs([seed, *task.name.encode()])
    torch.manual_seed(seed)
    try:
        for what, value, hint in task.test(inputs):
            parts[what] = describe(value) | {"hint": hint}
    finally:
        parts["inputs changed"] = describe(inputs.changed()) | {"hint": UNCHANGED}


# -----------------------------------------------------------------------------
# the student's file

HEADER = '''"""
Functions of CodeTalker, to be written by you: {points} points.

Put the body of each function in place of its NotImplementedError. The docstring is the task: what
goes in, what comes out, in which shape. Methods stand here as functions; `self` is the object that
they will belong to, and "given" lists what there is to use. Keep names and arguments; add helpers
and imports as you like. notebooks/assignment.ipynb explains each task, with an example.

    python tests/grading.py student.py                          points, and what is wrong
    python tests/grading.py student.py --tasks {example}

B batch, T motion frames, V vertices, D model dimension, H codes per frame, C code dimension,
N codebook size, K speaking styles
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from codetalker import {imports}
'''


def definition(task):
    """The key's function, as it stands in a student's file."""
    text = textwrap.dedent(inspect.getsource(task.function))
    return text.replace(f"def {task.attribute}(", f"def {task.name}(", 1)


def skeleton(task):
    """Its decorators, signature and docstring."""
    text = definition(task)
    docstring = ast.parse(text).body[0].body[0]
    lines = text.splitlines()[:docstring.end_lineno]
    return "\n".join([*lines, "    raise NotImplementedError", ""])


def students_file(tasks=TASKS, write=skeleton):
    """The text of student.py; with write=definition that of the key."""
    names = [task.name for task in tasks]
    imports = "KVCache" if "causal_mask" in names else "KVCache, causal_mask"
    points = sum(task.points for task in tasks)
    parts = [HEADER.format(points=points, example=names[0], imports=imports)]
    for task in tasks:
        title = f"{NAMES.index(task.name) + 1}. {task.title} ({task.points} points)"
        given = textwrap.indent(f"given: {task.given}\n", "# ") if task.given else ""
        parts.append(f"\n# {'-' * 77}\n# {title:55} {task.place}\n{given}\n\n{write(task)}")
    return "\n".join(parts)


def write(path, tasks=TASKS):
    """Write the student's file, which must not exist yet."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(students_file(tasks))
    except FileExistsError:
        raise ValueError(f"{path}: it exists, and may be somebody's work; give a new name") from None


def read(path):
    """A submission's text. Raises ValueError for another file."""
    source = Path(path).read_text(encoding="utf-8-sig")
    if not any(f"\ndef {name}(" in f"\n{source}" for name in NAMES):
        raise ValueError(f"{path}: none of the tasks' functions is in it; submit the file that "
                         "`python tests/exercises.py write student.py` makes, with your functions")
    return source


def assemble(path, folder):
    """Copy the project; the student's functions replace the key's. Returns their names."""
    source, solved = read(path)
    shutil.copytree(ROOT / "support", Path(folder, "support"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    Path(folder, "student.py").write_text(source, encoding="utf-8")
    for task in TASKS:
        sides = [task.place.removeprefix("codetalker.").removeprefix("metrics."),
                 f"student.{task.name}"]
        if task.name not in solved:         # not written yet: the student's others use the key's
            sides.reverse()
        file = "support/metrics.py" if task.holder is metrics else "codetalker.py"
        with open(Path(folder, file), "a", encoding="utf-8") as file:
            file.write(f"\nimport student\n{' = '.join(sides)}\n")
    return solved


def chosen(text):
    """An argparse type: names of tasks, separated by commas -> the tasks."""
    names = text.split(",")
    if not set(names) <= set(NAMES):
        raise argparse.ArgumentTypeError(f"names out of {', '.join(NAMES)} expected, found {text}")
    return [task for task in TASKS if task.name in names]


def main():
    from support.command import ArgumentParser, one_line_errors
    parser = ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "assemble"])
    parser.add_argument("file", help="the student's file")
    parser.add_argument("folder", nargs="?", default="mine", help="assemble: the folder to make")
    parser.add_argument("--tasks", type=chosen, default=TASKS,
                        help="write: these alone, separated by commas (default: all)")
    with one_line_errors():
        args = parser.parse_args()
        if args.command == "write":
            write(args.file, args.tasks)
            print(f"{args.file}: {sum(task.points for task in args.tasks)} points to earn")
        else:
            solved = assemble(args.file, args.folder)
            print(f"yours: {', '.join(solved) or 'nothing yet'}; the rest is the repository's\n"
                  f"cd {args.folder} && python train_vq.py && python train_ar.py && python infer.py")


if __name__ == "__main__":
    main()
