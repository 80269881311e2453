"""The grader graded: the key earns all, the skeleton nothing, each wrong answer loses its task, cheats earn nothing."""
import csv
import json
import math
import os
import re
import subprocess
import sys
import types
from contextlib import closing

import pytest

from conftest import ROOT
import exercises
import grading
from exercises import NAMES, TASKS, definition, key, numbers_of, program, replace, students_file
from grading import judge, right_answers
from sandbox import Sandbox

# A wrong answer: the task, what is wrong, and what stands for what in the key.
WRONG = [
    ("log_mel", "no window", "* window, FFT)", ", FFT)"),
    ("log_mel", "magnitude for power", ".abs().square()", ".abs()"),
    ("log_mel", "windows begin where their centre should be", "(WINDOW // 2, max(", "(0, WINDOW // 2 + max("),
    ("log_mel", "steps at s instead of s + 1/2", "+ 0.5)", "+ 0.0)"),
    ("log_mel", "natural logarithm", ".log10()", ".log()"),
    ("log_mel", "nothing subtracted", "return mel - speech_level(energy, mel, fps)", "return mel"),
    ("log_mel", "one step a frame", "steps = frames * STEPS_PER_FRAME", "steps = frames"),
    ("Quantiser.nearest", "argmax for argmin", "argmin", "argmax"),
    ("Quantiser.nearest", "long codes do not count", "self.codebook.square().sum(1) - 2", "-2"),
    ("Quantiser.nearest", "no factor 2", "- 2 * z", "- z"),
    ("Quantiser.nearest", "the nearest feature of a code", "argmin(1)", "argmin(0)"),
    ("Quantiser.nearest", "leading shape kept", "distance.argmin(1)", "distance.argmin(1).view(2, -1)"),
    ("Quantiser.nearest", "no integers", "distance.argmin(1)", "distance.argmin(1).float()"),
    ("straight_through", "no straight-through", "z_e + (z_q - z_e).detach()", "z_q"),
    ("straight_through", "no quantisation", "z_e + (z_q - z_e).detach()", "z_e"),
    ("straight_through", "nothing detached", "(z_q - z_e).detach()", "(z_q - z_e)"),
    ("straight_through", "the gradient goes to the codes", "z_e + (z_q - z_e).detach()", "z_q + 0 * z_e"),
    ("straight_through", "all detached", "z_e + (z_q - z_e).detach()", "z_q.detach() + 0 * z_e"),
    ("vq_loss", "beta on the wrong term", "codebook_loss + beta *", "beta * codebook_loss +"),
    ("vq_loss", "stop-gradients exchanged", "z_e.detach() - z_q).square", "z_e - z_q.detach()).square"),
    ("vq_loss", "the codes are not stopped", "(z_e - z_q.detach())", "(z_e - z_q)"),
    ("vq_loss", "the features are not stopped", "(z_e.detach() - z_q)", "(z_e - z_q)"),
    ("vq_loss", "no beta", "beta * ", ""),
    ("vq_loss", "padding counts", "commitment_loss = masked_mean((z_e - z_q.detach()).square().flatten(2), lengths)",
     "commitment_loss = (z_e - z_q.detach()).square().mean()"),
    ("vq_loss", "distances for squares", "(z_e - z_q.detach()).square()", "(z_e - z_q.detach()).abs()"),
    ("perplexity", "2 to the nats", "np.exp(", "np.exp2("),
    ("perplexity", "zeros are not left out", "counts[counts > 0]", "counts"),
    ("perplexity", "entropy without exp", "np.exp(-(share * np.log(share)).sum())", "-(share * np.log(share)).sum()"),
    ("perplexity", "codes in use, however much", "np.exp(-(share * np.log(share)).sum())", "len(share)"),
    ("perplexity", "sign", "np.exp(-(", "np.exp(("),
    ("perplexity", "no shares", " / counts.sum()", ""),
    ("periodic_positions", "sines first, then cosines", "-1).flatten(1)", "1).flatten(1)"),
    ("periodic_positions", "cosine before sine", "[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]"),
    ("periodic_positions", "each column its own angle", "torch.arange(0, width, 2)", "torch.arange(0, width // 2)"),
    ("periodic_positions", "base 1,000", "10_000", "1_000"),
    ("periodic_positions", "from 1", "torch.arange(period)", "torch.arange(1, period + 1)"),
    ("causal_bias", "mask off by one: not itself", "back < 0", "back <= 0"),
    ("causal_bias", "mask off by one: the next frame too", "back < 0", "back < -1"),
    ("causal_bias", "memory off by one", "back >= memory", "back > memory"),
    ("causal_bias", "bias sign", "bias = -slope", "bias = slope"),
    ("causal_bias", "no periods", 'torch.div(back, period, rounding_mode="floor")', "back"),
    ("causal_bias", "not floored", 'rounding_mode="floor"', "rounding_mode=None"),
    ("causal_bias", "slopes from 1", "torch.arange(1, heads + 1)", "torch.arange(heads)"),
    ("causal_bias", "slopes of 1/2", "4.0 **", "2.0 **"),
    ("causal_bias", "the past is hidden", "memory), -math.inf)", "memory), -math.inf).mT"),
    ("DecoderLayer.forward", "hears the frame before", "audio).squeeze(2)", "audio.roll(1, 1)).squeeze(2)"),
    ("DecoderLayer.forward", "hears all frames", "self.cross_attention(x.unsqueeze(2), audio).squeeze(2)",
     "self.cross_attention(x, audio.flatten(1, 2))"),
    ("DecoderLayer.forward", "hears one step of each frame", "audio).squeeze(2)", "audio[:, :, :1]).squeeze(2)"),
    ("DecoderLayer.forward", "no residual", "self.norm2(x + self.dropout(own))", "self.norm2(self.dropout(own))"),
    ("DecoderLayer.forward", "norm before the branch", "self.norm3(x + self.dropout(self.feed_forward(x)))",
     "x + self.dropout(self.feed_forward(self.norm3(x)))"),
    ("DecoderLayer.forward", "no bias: sees the future", "bias=bias,", "bias=cache and bias,"),
    ("DecoderLayer.forward", "no cache", ", cache=cache", ""),
    ("CodeTalker.code_losses", "no weight", "self.config.motion_weight * ", ""),
    ("CodeTalker.code_losses", "no straight-through", "nearest, _, _ = self.autoencoder.quantiser(z_hat)",
     "nearest = self.autoencoder.quantiser(z_hat)[0].detach()"),
    ("CodeTalker.code_losses", "not quantised", "nearest, _, _ = self.autoencoder.quantiser(z_hat)", "nearest = z_hat"),
    ("CodeTalker.code_losses", "decodes the true codes", "decoder(nearest,",
     "decoder(self.autoencoder.quantiser.codebook[codes[some]],"),
    ("CodeTalker.code_losses", "squares instead of likelihood", "and self.config.squared", ""),
    ("CodeTalker.code_losses", "likelihood instead of squares", "and self.config.squared", "and False"),
    ("CodeTalker.code_losses", "L1", "masked_mean(error.square(), lengths)", "masked_mean(error.abs(), lengths)"),
    ("CodeTalker.code_losses", "padding counts", "masked_mean(error.square(), lengths)", "error.square().mean()"),
    ("CodeTalker.code_losses", "decodes every sequence", "some = slice(None, None, self.config.motion_every)",
     "some = slice(None)"),
    ("CodeTalker.code_losses", "decodes the first sequence alone",
     "some = slice(None, None, self.config.motion_every)", "some = slice(0, 1)"),
    ("CodeTalker.step", "always position 0", "first=t", "first=0"),
    ("CodeTalker.step", "nothing remembered", "bias[..., -t - 1:], cache)", "bias[..., -1:], {})"),
    ("CodeTalker.step", "one cache for all layers", "layer(x, audio, bias[..., -t - 1:], cache)",
     "layer(x, audio, bias[..., -t - 1:], caches[0])"),
    ("CodeTalker.step", "the bias from its other end", "bias[..., -t - 1:]", "bias[..., :t + 1]"),
    ("CodeTalker.step", "keys off by one", "-t - 1:", "-t - 2:"),
    ("CodeTalker.step", "no query", "self.query(x)", "x"),
    ("lip_vertex_errors", "root in LVE", "np.square(made[:, lips] - true[:, lips]).sum(-1)",
     "np.sqrt(np.square(made[:, lips] - true[:, lips]).sum(-1))"),
    ("lip_vertex_errors", "mean for the largest", ".max(1)", ".mean(1)"),
    ("lip_vertex_errors", "the worst frame of each vertex", ".max(1)", ".max(0)"),
    ("lip_vertex_errors", "each coordinate alone", ".sum(-1).max(1)", ".max(-1).max(1)"),
    ("lip_vertex_errors", "the whole face", "made[:, lips] - true[:, lips]", "made - true"),
    ("dynamics", "variance for deviation", ".std(0)", ".var(0)"),
    ("dynamics", "deviation over the vertices", ".std(0)", ".std(1)"),
    ("dynamics", "length for its square", ".sum(-1).std(0)", ".sum(-1).__pow__(0.5).std(0)"),
    ("dynamics", "deviation of the coordinates", "np.square(motion[:, upper_face]).sum(-1)", "motion[:, upper_face]"),
    ("dynamics", "the whole face", "motion[:, upper_face]", "motion"),
]


@pytest.fixture(scope="module")
def sandbox():
    with closing(Sandbox(total=math.inf)) as sandbox:
        yield sandbox


def wrong_answer(name, old, new):
    """The key with a wrong answer in it."""
    text = definition(key(), name)
    assert text.count(old) == 1, f"{name}: {old!r} stands there {text.count(old)} times"
    return replace(key(), {name: text.replace(old, new)})


@pytest.mark.parametrize("name, what, old, new", WRONG, ids=[f"{name}: {what}" for name, what, *_ in WRONG])
def test_a_wrong_answer_loses_exactly_the_points_of_its_task(name, what, old, new, sandbox):
    """For each other task the very program is run that is run for the key, so it earns the same."""
    wrong = wrong_answer(name, old, new)
    assert judge(TASKS[NAMES.index(name)], wrong, 0, sandbox) is not None
    assert all(program(wrong, other) == program(key(), other) for other in NAMES if other != name)


@pytest.mark.parametrize("seed", [0, 5, 2027])
def test_the_key_earns_all_and_the_skeleton_nothing(seed, sandbox):
    for task in TASKS:
        assert judge(task, key(), seed, sandbox) is None
        assert judge(task, students_file(), seed, sandbox) == "not yet"


def test_the_seed_changes_every_right_answer():
    for name in NAMES:
        first, other = right_answers(name, 0), right_answers(name, 1)
        same = {what for what in first if first[what] == other[what]}
        assert same == {"straight_through": {"gradient of z_q"}, "periodic_positions": {"kind"}}.get(name, set()), name


def test_a_student_may_write_helpers_import_and_reorder(sandbox):
    """What stands beside the tasks is kept; the file may have other indentation."""
    source = replace(students_file(), {"perplexity": """
def perplexity(counts):
  share = shares(counts)
  return math.exp(-special.xlogy(share, share).sum())""".strip()})
    helpers = "\n\ndef shares(counts):\n\treturn counts / TOTAL(counts)\n\nTOTAL = np.sum\n"
    source = "from scipy import special\n" + source + helpers
    earned = [task.name for task in TASKS if judge(task, source, 0, sandbox) is None]
    assert earned == ["perplexity"]


# Right, and written in another way than the key; by name of the task.
ALSO_RIGHT = {
    "log_mel": """
def log_mel(audio, fps, frames, bands):
    sound, rows = torch.cat([torch.zeros(WINDOW), audio.float(), torch.zeros(SAMPLE_RATE)]), []
    for s in range(frames * STEPS_PER_FRAME):
        begin = WINDOW // 2 + round((s + 0.5) / (fps * STEPS_PER_FRAME) * SAMPLE_RATE)
        windowed = sound[begin:begin + WINDOW] * torch.hann_window(WINDOW, periodic=False)
        rows.append(torch.fft.rfft(windowed, n=FFT).abs() ** 2 @ mel_filterbank(bands))
    energy = torch.stack(rows)
    mel = torch.maximum(energy, torch.maximum(1e-8 * energy.max(), torch.tensor(1e-10))).log10()
    return mel - speech_level(energy, mel, fps)""",
    "Quantiser.nearest": """
def nearest(self, z):
    return torch.cdist(z.reshape(-1, z.shape[-1]), self.codebook).argmin(dim=1)""",
    "straight_through": """
def straight_through(z_e, z_q):
    return z_q.detach() + z_e - z_e.detach()""",
    "vq_loss": """
def vq_loss(z_e, z_q, beta, lengths=None):
    def distance(a, b):
        return masked_mean(((a - b) ** 2).reshape(len(a), a.shape[1], -1), lengths)
    return distance(z_e.detach(), z_q) + beta * distance(z_e, z_q.detach())""",
    "perplexity": """
def perplexity(counts):
    shares = [count / sum(counts) for count in counts if count > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))""",
    "periodic_positions": """
def periodic_positions(period, width, device="cpu"):
    table = torch.zeros(period, width)
    for t in range(period):
        for column in range(width):
            angle = t / 10000 ** (column // 2 * 2 / width)
            table[t, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table.to(device)""",
    "causal_bias": """
def causal_bias(frames, period, heads, memory):
    bias = torch.full((heads, frames, frames), -math.inf)
    for h in range(heads):
        for i in range(frames):
            for j in range(max(0, i - memory + 1), i + 1):
                bias[h, i, j] = -(1 / 4 ** (h + 1)) * ((i - j) // period)
    return bias""",
    "CodeTalker.step": """
def step(self, t, past, style, audio, bias, caches):
    x, columns = self.embed(past, style, t), min(t + 1, bias.shape[-1])
    for number, layer in enumerate(self.layers):
        x = layer(x, audio, bias[:, :, bias.shape[-1] - columns:], caches[number])
    return self.query(x)""",
    "lip_vertex_errors": """
def lip_vertex_errors(made, true, lips):
    return [max(((a[v] - b[v]) ** 2).sum() for v in lips) for a, b in zip(made, true)]""",
    "dynamics": """
def dynamics(motion, upper_face):
    return (np.linalg.norm(motion[:, upper_face], axis=2) ** 2).std(axis=0).mean()""",
}


@pytest.mark.parametrize("name", ALSO_RIGHT)
def test_another_right_way_earns_the_points(name, sandbox):
    solved = replace(students_file(), {name: ALSO_RIGHT[name].strip()})
    assert judge(TASKS[NAMES.index(name)], solved, 0, sandbox) is None


def test_the_examples_of_the_handout_hold_for_the_key(tmp_path, monkeypatch, capsys):
    """Its cells, less the lines that are IPython's, where student.py is the key."""
    notebook = json.loads((ROOT / "notebooks" / "assignment.ipynb").read_text(encoding="utf-8"))
    headings = re.findall(r"### \d+\. [^(]*\((\d) points\)", json.dumps(notebook))
    assert [int(points) for points in headings] == [task.points for task in TASKS]
    lines = [line for cell in notebook["cells"] if cell["cell_type"] == "code"
             for line in "".join(cell["source"]).split("\n") if not line.startswith("%")]
    (tmp_path / "codetalker.py").touch()                    # what the handout knows the root by
    (tmp_path / "student.py").write_text(key())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        exec("\n".join(lines), {})
    finally:
        del sys.modules["student"]
    said = capsys.readouterr().out
    assert "not yet" not in said and len(re.findall(r"^[\w.]+: \d points$", said, re.MULTILINE)) == 2 * len(TASKS)


# ------------------------------------------------------------------------------------------------------------- cheats

TAKE_OVER = "\n".join(["", *(f"{name} = stolen.{name}" for name in NAMES)])
READ_THE_KEY = f"""
import sys
exec(open({str(ROOT / "codetalker.py")!r}).read(), globals())
sys.modules["codetalker"] = sys.modules["student"]
exec(open({str(ROOT / "data.py")!r}).read(), globals())"""
CHEATS = {
    "import the key": f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import codetalker as stolen, data
for name in {exercises.METRICS}:
    setattr(stolen, name, getattr(data, name)){TAKE_OVER}""",
    "read the key from the disk": READ_THE_KEY,
    "read the tests": f"""
import sys, types
sys.path.insert(0, {str(ROOT / "tests")!r})
import grading
exec(grading.key(), globals())""",
    "ask the harness, which is in memory": """
import sys
exec(sys.modules["exercises"].key(), globals())""",
    "undo what refuses it: names": f"""
import __main__, os
__main__.FORBIDDEN = ("nothing",)
os.path.realpath = os.fsdecode = lambda path, **_: os.getcwd()
real = open
open = lambda path: real(Path(path))
class Path(str):
    startswith, __contains__ = lambda *_: True, lambda *_: False
{READ_THE_KEY}""",
    "undo what refuses it: code": f"""
import gc, types
for function in gc.get_objects():
    if type(function) is types.FunctionType and function.__name__ == "refuse":
        for cell in function.__closure__:
            if type(cell.cell_contents) is tuple:
                cell.cell_contents = ("",)
{READ_THE_KEY}""",
    "leave the folder": f"""
import os
folder = os.open({str(ROOT)!r}, os.O_RDONLY)
text = open(os.open("codetalker.py", os.O_RDONLY, dir_fd=folder)).read()
text += open(os.open("data.py", os.O_RDONLY, dir_fd=folder)).read()
exec(text, globals())""",
    "patch torch": """
import json
for module in (torch, np, torch.testing, np.testing, math):
    for name in ("allclose", "isclose", "equal", "array_equal", "assert_close", "assert_allclose"):
        setattr(module, name, lambda *_, **__: True)
torch.Tensor.__eq__ = torch.Tensor.__lt__ = lambda *_: torch.tensor(True)
json.dump = lambda said, file: file.write('true')""",
    "exit with status 0": "import os\nos._exit(0)",
    "leave with status 0": "import sys\nsys.exit(0)",
    "hang": "while True: pass",
    "print that all is well and write a result": """
import os
print("33 of 33 points", flush=True)
open("answer.json", "w").write('{"points": 33, "bands": 0, "indices": 0, "value": 0, "loss": 0, "errors": [NaN]}')
os._exit(0)""",
    "kill the grader": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "start a process": "import subprocess\nsubprocess.run(['true'])",
    "an answer that says nothing": "import os\nopen('answer.json', 'w').write('\"\"')\nos._exit(0)",
    "a huge answer": "import os\nopen('answer.json', 'w').write('[' * 10_000_000)\nos._exit(0)",
    "an answer that blocks": "import os\nos.mkfifo('answer.json')\nos._exit(0)",
    "a deep answer": "import os\nopen('answer.json', 'w').write('[' * 1_000_000)\nos._exit(0)",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_earns_nothing(cheat, sandbox):
    hangs = cheat == "hang"
    with closing(Sandbox(seconds=1, total=3)) as impatient:
        for task in TASKS:
            remark = judge(task, students_file() + CHEATS[cheat], 0, impatient if hangs else sandbox)
            assert remark and "\n" not in remark and len(remark) < 300
            assert not hangs or "it was not ready" in remark or "no time is left" in remark


@pytest.mark.parametrize("cheat", list(CHEATS)[:4])
def test_these_cheats_would_earn_all_where_nothing_confines_them(cheat, monkeypatch):
    """So it is the sandbox that keeps them from it."""
    code = types.ModuleType("student")
    monkeypatch.setitem(sys.modules, "student", code)
    monkeypatch.setitem(sys.modules, "codetalker", sys.modules["codetalker"])       # to be put back
    exec(students_file() + CHEATS[cheat], code.__dict__)
    assert all(numbers_of(task, code, 0) == right_answers(task.name, 0) for task in TASKS)


# ------------------------------------------------------------------------------------------- a folder, and bad input

NEIGHBOURS = {
    "key": (key(), ""), "nothing": (students_file(), "not yet"),
    "hangs": (students_file() + "\nwhile True: pass\n", "not ready within"),
    "exits": (students_file() + CHEATS["exit with status 0"], "ended before"),
    "kills": (students_file() + CHEATS["kill the grader"], "not allowed"),
    "prints": (students_file() + "\nwhile True: print('x' * 100_000)\n", "not ready within"),
    "fills": (students_file() + "\nfile = open('large', 'wb')\nwhile True: file.write(bytes(10 ** 6))\n", "OSError"),
    "eats": (students_file() + "\nones = torch.ones(2 ** 30)\n", "Error"),
    "typo": ("def perplexity(counts:\n", "line 1"), "other": ("print('hello')\n", "none of the tasks"),
    "latin": (b"# \xe9\n", "which Python can read"), "renamed": (key().replace("def dynamics", "def fdd"), "missing"),
}


def test_a_folder_becomes_one_table_and_no_submission_disturbs_another(tmp_path, monkeypatch, capsys):
    for name, (source, _) in NEIGHBOURS.items():
        (tmp_path / f"{name}.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    monkeypatch.setattr(grading, "Sandbox", lambda: Sandbox(seconds=5))
    grading.grade_folder(tmp_path, tmp_path / "grades.csv", tasks=TASKS[-1:], at_once=2)
    with open(tmp_path / "grades.csv", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted(NEIGHBOURS)
    for name, row in rows.items():
        assert row["points"] == row["dynamics"] == ("2" if name == "key" else "0")
        assert NEIGHBOURS[name][1] in row["remarks"]


@pytest.mark.parametrize("main, arguments, said", [
    (grading.main, ["missing", "grades.csv"], "no .py in it"),
    (grading.main, [".", "grades.csv", "--tasks", "perplexity,beauty"], "found beauty"),
    (grading.main, [".", "missing/grades.csv"], "a folder to write into expected"),
    (grading.main, [".", "."], "found a folder"),
    (grading.main, [".", "grades.csv", "--seed", "x"], "a whole number from 0"),
    (exercises.main, ["write", "student.py"], "a new name expected"),
    (exercises.main, ["write", "new.py", "--tasks", "beauty"], "found beauty"),
    (exercises.main, ["assemble", "missing.py", "mine"], "No such file"),
    (exercises.main, ["assemble", "student.py"], "found no folder"),
    (exercises.main, ["assemble", "student.py", "."], "a new name expected"),
    (exercises.main, ["burn", "student.py"], "invalid choice")])
def test_a_mistake_is_answered_in_one_line(main, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.py").write_text(students_file())
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["student.py"]


def test_the_self_check_says_points_and_hints(tmp_path):
    """One task right, one wrong, ten not yet: 2 of 33 points."""
    source = replace(students_file(), {"dynamics": definition(key(), "dynamics"),
                                       "straight_through": "def straight_through(z_e, z_q):\n    return z_q"})
    (tmp_path / "student.py").write_text(source)
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", ROOT / "tests/test_exercises.py",
                          "--impl", "student.py", "-p", "no:cacheprovider"],
                         cwd=tmp_path, capture_output=True, text=True, timeout=100)
    said = run.stdout
    assert run.returncode == 1 and "2 of 33 points" in said and said.count("not yet") == 10
    assert "0 of 2  straight_through        gradient of z_e: backward" in said and "2 of 2  dynamics\n" in said


def test_the_student_s_file_trains_and_speaks(tmp_path, speakers):
    """Its own functions are the model and the metrics; here the key stands for a solved file."""
    (tmp_path / "student.py").write_text(key())
    exercises.assemble(tmp_path / "student.py", tmp_path / "mine")
    run = subprocess.run([sys.executable, "-c", """
import runpy, sys
import codetalker, data
assert data.perplexity is codetalker.perplexity and data.dynamics is codetalker.dynamics
for command in ("train_vq.py --steps 2", "train_ar.py --steps 2", "infer.py --out talk.npy"):
    sys.argv = command.split() + ["--data", sys.argv[-1]]
    runpy.run_path(sys.argv[0], run_name="__main__")
""", speakers], cwd=tmp_path / "mine", env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0 and (tmp_path / "mine" / "talk.npy").exists(), run.stderr
