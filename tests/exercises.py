"""The course: what is asked of students, and the file they work in.

    python tests/exercises.py write student.py              the student's file: the answer key without its tasks
    pytest tests/test_exercises.py --impl student.py        points per task, a hint for each that is wrong
    python tests/grading.py FOLDER grades.csv               the same for every .py of a folder
    python tests/exercises.py assemble student.py mine      a copy of this project in which that file is the model

The answer key is codetalker.py and the metrics of data.py, and has no marks: a task is the body of one function.
How a task is judged: its `ask` draws inputs from a seed, calls the function and returns numbers. It is called twice:
in a process of its own with the student's file (sandbox.py), and here with the key. Only numbers come back, and only
here is it known which are right.
"""
import argparse
import ast
import math
import os
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Callable

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# =================================================================================== the tasks, and how each is asked
# code: the student's file as a module; rng: numpy.random.Generator. Each returns {what: numbers}.


def normal(rng, *shape, scale=1.0):
    return torch.from_numpy(scale * rng.standard_normal(shape)).float()


def gradients(scalar, **tensors):
    """d(scalar) / d(tensor), zeros where it does not depend on the tensor: {"gradient of NAME": numbers}."""
    scalar = scalar + 0 * sum(tensor.sum() for tensor in tensors.values())
    found = torch.autograd.grad(scalar, list(tensors.values()))
    return {f"gradient of {name}": gradient for name, gradient in zip(tensors, found)}


def small_model(code, rng, frames):
    """A small CodeTalker whose codes differ, in eval mode, and what it may be told: history, style, audio, motion."""
    torch.manual_seed(int(rng.integers(2 ** 31)))
    stage1 = code.VQConfig(vertices=5, width=16, heads=2, hidden=24, slots=4, code_width=4, codes=16)
    stage2 = code.ARConfig(styles=3, period=4, width=16, heads=2, memory=5, mel_bands=6, audio_layers=1)
    model = code.CodeTalker(stage2, code.MotionAutoencoder(stage1)).eval()
    nn.init.normal_(model.autoencoder.quantiser.codebook)
    nn.init.normal_(model.query.weight)
    nn.init.normal_(model.autoencoder.decoder.leave.weight)
    return (model, normal(rng, 2, frames, 16), torch.eye(3)[rng.permutation(3)[:2]], normal(rng, 2, frames, 1, 16),
            normal(rng, 2, frames, 15))


def ask_log_mel(code, rng):
    frames, fps = int(rng.integers(40, 60)), int(rng.choice([25, 30, 60]))
    samples = code.SAMPLE_RATE * frames // fps - int(rng.integers(100, 300))
    loud = 0.01 + np.abs(np.sin(np.arange(samples) / rng.uniform(400, 900)))        # syllables, in noise
    return {"bands": code.log_mel(normal(rng, samples, scale=0.1) * torch.from_numpy(loud), fps, frames, 8)}


def ask_nearest(code, rng):
    quantiser = code.Quantiser(12, 3, beta=0.25)
    quantiser.codebook.data = normal(rng, 12, 3) * torch.linspace(0.3, 2, 12)[:, None]
    indices = quantiser.nearest(normal(rng, 2, 10, 4, 3))
    return {"indices": indices, "vectors": quantiser.codebook[indices]}


def ask_straight_through(code, rng):
    z_e, z_q, weight = normal(rng, 2, 3, 2, 4), normal(rng, 2, 3, 2, 4), normal(rng, 2, 3, 2, 4)
    result = code.straight_through(z_e.requires_grad_(), z_q.requires_grad_())
    return {"value": result} | gradients((weight * result).sum(), z_e=z_e, z_q=z_q)


def ask_vq_loss(code, rng):
    z_e, z_q = normal(rng, 2, 5, 2, 3).requires_grad_(), normal(rng, 2, 5, 2, 3).requires_grad_()
    beta = rng.uniform(2, 3)
    padded = code.vq_loss(z_e, z_q, beta, torch.tensor([5, int(rng.integers(1, 5))]))
    loss = code.vq_loss(z_e, z_q, beta)
    return {"loss": loss} | gradients(loss, z_e=z_e, z_q=z_q) | {"loss of padded sequences": padded}


def ask_perplexity(code, rng):
    counts = rng.integers(1, 100, 30)
    return {"all codes in use": code.perplexity(counts), "some codes unused": code.perplexity(counts * (counts > 40))}


def ask_periodic_positions(code, rng):
    period, width = int(rng.integers(5, 30)), 2 * int(rng.integers(3, 10))
    table = code.periodic_positions(period, width)
    return {"table": table, "kind": torch.tensor(float(table.dtype == torch.float32))}


def ask_causal_bias(code, rng):
    frames, period, heads = int(rng.integers(12, 20)), int(rng.integers(2, 5)), int(rng.integers(2, 5))
    memory = int(rng.integers(6, 10))
    bias = code.causal_bias(frames, period, heads, memory)
    return {"what is hidden": torch.isinf(bias), "bias": bias}


def ask_decoder_layer(code, rng):
    torch.manual_seed(int(rng.integers(2 ** 31)))
    layer = code.DecoderLayer(code.ARConfig(styles=1, width=16, heads=2)).eval()
    x, audio = normal(rng, 2, 6, 16), normal(rng, 2, 6, 3, 16)
    bias = normal(rng, 2, 6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, -math.inf)
    cache = {}
    by_one = [layer(x[:, t:t + 1], audio[:, t:t + 1], torch.zeros(2, 1, t + 1), cache) for t in range(3)]
    return {"all frames at once": layer(x, audio, bias), "frame by frame with a cache": torch.cat(by_one, 1)}


def ask_code_losses(code, rng):
    model, *_ = small_model(code, rng, 6)
    model.config.motion_every = 2
    nn.init.constant_(model.spread, rng.uniform(-1, 1))
    answers, motion = normal(rng, 5, 6, 16).requires_grad_(), normal(rng, 5, 6, 15)
    codes, lengths = torch.from_numpy(rng.integers(0, 16, (5, 6, 4))), torch.from_numpy(rng.integers(1, 7, 5))
    found = {}
    for squared, kind in ((False, "cross-entropy"), (True, "squared error")):
        model.config.squared = squared
        losses = model.code_losses(answers, codes, motion, lengths)
        found[kind] = losses["feature"]
    return found | {"motion": losses["motion"]} | gradients(losses["motion"], answers=answers)


def ask_step(code, rng):
    model, past, style, audio, _ = small_model(code, rng, 9)
    bias, caches = normal(rng, 2, 1, 5), [{} for _ in model.layers]
    steps = [model.step(t, past[:, t:t + 1], style, audio[:, t:t + 1], bias, caches) for t in range(9)]
    return {"frame 0": steps[0], "frames 1 to 4": torch.cat(steps[1:5], 1),
            "frames beyond the memory": torch.cat(steps[5:], 1)}


def ask_lip_vertex_errors(code, rng):
    made, true = rng.standard_normal((2, int(rng.integers(5, 9)), 10, 3))
    return {"errors": code.lip_vertex_errors(made, true, rng.permutation(10)[:4])}


def ask_dynamics(code, rng):
    motion = rng.standard_normal((int(rng.integers(8, 12)), 10, 3)) * rng.uniform(0.2, 2, (10, 1))
    return {"dynamics": code.dynamics(motion, rng.permutation(10)[:4])}


@dataclass(frozen=True)
class Task:
    name: str           # of the function, Class.method where it is one
    points: int
    ask: Callable
    hints: dict         # what -> one line for whoever gets it wrong


TASKS = [
    Task("log_mel", 4, ask_log_mel, {
        "bands": "window around (s + 1/2) / (4 fps) seconds, Hann, |FFT|^2, bank, floor, log10, less speech_level"}),
    Task("Quantiser.nearest", 2, ask_nearest, {
        "indices": "the smallest squared distance wins; long codes count too; one index a row, as in z.flatten(0, -2)",
        "vectors": "indices are whole numbers, int64"}),
    Task("straight_through", 2, ask_straight_through, {
        "value": "forward it must be z_q", "gradient of z_e": "backward the gradient must arrive at z_e unchanged",
        "gradient of z_q": "nothing may arrive at z_q: which part has to be detached?"}),
    Task("vq_loss", 4, ask_vq_loss, {
        "loss": "two mean squared errors; beta weighs the second", "gradient of z_e": "only beta's term may move z_e",
        "gradient of z_q": "only the first term, without beta, may move z_q",
        "loss of padded sequences": "padding must not count: masked_mean(x, lengths) takes (B, T, channels)"}),
    Task("perplexity", 2, ask_perplexity, {
        "all codes in use": "shares, entropy in nats, exp", "some codes unused": "0 log 0 is 0, not NaN"}),
    Task("periodic_positions", 2, ask_periodic_positions, {
        "table": "row t: sin, cos, sin, cos, ...; a pair shares its angle t / 10000^(2i / width); t from 0",
        "kind": "float32, as all the model computes with"}),
    Task("causal_bias", 3, ask_causal_bias, {
        "what is hidden": "frame i sees itself and the memory - 1 frames before it, -inf elsewhere",
        "bias": "-slope * floor((i - j) / period), slopes 1/4, 1/16, ... by head"}),
    Task("DecoderLayer.forward", 3, ask_decoder_layer, {
        "all frames at once": "three branches, norm(x + dropout(branch)) each; frame t hears audio[:, t] and no other",
        "frame by frame with a cache": "the self-attention needs the cache, the cross-attention must not have it"}),
    Task("CodeTalker.code_losses", 4, ask_code_losses, {
        "cross-entropy": "-log softmax(scores) at the real codes; padding does not count",
        "squared error": "the answers against the vectors of the real codes; padding does not count",
        "motion": "nearest codes of the answers, decoder, squared error, its weight; which sequences? no padding",
        "gradient of answers": "the motion loss must reach the answers, straight through the quantiser"}),
    Task("CodeTalker.step", 3, ask_step, {
        "frame 0": "embed, the layers, query; bias and keys must be of one length: at frame 0 it is 1",
        "frames 1 to 4": "positions go on (first), a cache for each layer, the last t + 1 columns of the bias",
        "frames beyond the memory": "the bias has no more columns than the memory"}),
    Task("lip_vertex_errors", 2, ask_lip_vertex_errors, {
        "errors": "lips only; squared distance, no root; the largest vertex of each frame"}),
    Task("dynamics", 2, ask_dynamics, {
        "dynamics": "upper face only; |displacement|^2, its standard deviation over time, mean over vertices"}),
]
NAMES = [task.name for task in TASKS]
METRICS = ["perplexity", "lip_vertex_errors", "dynamics"]           # from data.py; the rest is codetalker.py's


def numbers_of(task, code, seed):
    """What a task gets from the code with the inputs of this seed: {what: nested lists of numbers}."""
    said = task.ask(code, np.random.default_rng([seed, *task.name.encode()]))
    return {what: (value.detach() if torch.is_tensor(value) else np.asarray(value, float)).tolist()
            for what, value in said.items()}


# ========================================================================= source text: the key, and the student's file

ONE_AT_A_TIME = Lock()              # ast counts its depth for all threads together and fails (Python 3.11)


@lru_cache(maxsize=8)
def functions(source):
    """Where functions stand, with their decorators: {"name" or "Class.name": [(first line, line behind it), ...]}."""
    found = {}
    with ONE_AT_A_TIME:
        tree = ast.parse(source)
    for outer in tree.body:
        inner = outer.body if isinstance(outer, ast.ClassDef) else [outer]
        for node in inner:
            if isinstance(node, ast.FunctionDef):
                name = node.name if node is outer else f"{outer.name}.{node.name}"
                first = min(line.lineno for line in [node, *node.decorator_list]) - 1
                found.setdefault(name, []).append((first, node.end_lineno))
    return found


def definition(source, name):
    """The text of a function, at the left margin."""
    first, behind = functions(source)[name][-1]
    return textwrap.dedent("\n".join(source.split("\n")[first:behind]))


def replace(source, texts):
    """The source with other functions: {name: text at the left margin}. Names that it has not are passed over."""
    lines = source.split("\n")                          # not splitlines: Python's lines end nowhere else
    places = [(first, behind, texts[name]) for name, found in functions(source).items() if name in texts
              for first, behind in found]
    for first, behind, text in sorted(places, reverse=True):
        margin = lines[first][:len(lines[first]) - len(lines[first].lstrip())]
        lines[first:behind] = [textwrap.indent(text, margin)]
    return "\n".join(lines)


def cut(text):
    """A function's signature and docstring, and nothing behind them."""
    docstring = ast.parse(text).body[0].body[0]
    return "\n".join([*text.split("\n")[:docstring.end_lineno], "    raise NotImplementedError"])


@lru_cache
def key():
    """The answer key in one file: codetalker.py, and the metrics that are tasks."""
    model, data = ((ROOT / name).read_text(encoding="utf-8") for name in ("codetalker.py", "data.py"))
    metrics = [definition(data, name) for name in METRICS]
    return "\n\n\n".join([model.rstrip(), f"# {'=' * 92} metrics, from data.py\n\nimport numpy as np", *metrics]) + "\n"


@contextmanager
def new(path):
    """What is there already may be somebody's work."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: a new name expected, in a folder to write into ({error.strerror})") from None


def students_file(names=NAMES):
    """The student's file: the key without the bodies of these functions."""
    return replace(key(), {name: cut(definition(key(), name)) for name in names})


def write(path, tasks=TASKS):
    """Make the student's file, which must not be there yet."""
    with new(path), open(path, "x", encoding="utf-8") as file:
        file.write(students_file([task.name for task in tasks]))


def program(submission, name):
    """What is run to judge one task alone: the submission, in which the key stands in for all other tasks."""
    return replace(submission, {other: definition(key(), other) for other in NAMES if other != name})


def read(path):
    """A submission's text. Raises ValueError, in one line, for what is no Python file of this course."""
    try:
        if os.path.getsize(path) > 1_000_000:
            raise ValueError("1 MB at most expected")
        source = Path(path).read_text(encoding="utf-8-sig")
        if not functions(source).keys() & set(NAMES):
            raise ValueError("none of the tasks' functions is in it")
        return source
    except OSError as error:
        raise ValueError(f"{path}: a student's file expected ({error.strerror}); "
                         "`python tests/exercises.py write student.py` makes one") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else error
        raise ValueError(f"{path}: a student's file expected, which Python can read ({what}); "
                         "hand in the file that `write` made, solved") from None


def assemble(path, folder):
    """A copy of this project in which the student's file is the model and holds the metrics."""
    source, folder = read(path), Path(folder)
    with new(folder):
        folder.mkdir()
    for script in ROOT.glob("*.py"):
        text = script.read_text(encoding="utf-8")
        if script.name == "data.py":
            text = replace(text, {name: f"from codetalker import {name}" for name in METRICS})
        (folder / script.name).write_text(source if script.name == "codetalker.py" else text, encoding="utf-8")


def chosen(text):
    """An argparse type: names of tasks with commas between -> the tasks."""
    unknown = [name for name in text.split(",") if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"names out of {', '.join(NAMES)} expected, commas between, "
                                         f"found {', '.join(unknown)}")
    return [task for task in TASKS if task.name in text.split(",")]


def main():
    from data import CommandLine, cannot
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "assemble"])
    parser.add_argument("file", help="the student's file")
    parser.add_argument("folder", nargs="?", help="assemble: the folder to make")
    parser.add_argument("--tasks", type=chosen, default=TASKS, help="write: only these, commas between (default: all)")
    with cannot():
        args = parser.parse_args()
        if args.command == "assemble":
            if args.folder is None:
                raise ValueError("assemble: a student's file and the name of a new folder expected, found no folder")
            assemble(args.file, args.folder)
            print(f"cd {args.folder} && python train_vq.py && python train_ar.py && python infer.py")
        else:
            write(args.file, args.tasks)
            print(f"{args.file}: {len(args.tasks)} tasks, {sum(task.points for task in args.tasks)} points")


if __name__ == "__main__":
    main()
