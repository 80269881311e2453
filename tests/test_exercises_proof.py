"""
The grader graded: wrong answers earn nothing and cost nothing else, right ones earn everything.
"""
import csv
from contextlib import suppress
from itertools import product

import pytest

from exercises import ROOT, TASKS, definition, run_test, students_file
from grading import grade, grade_folder, judge, load

KEY = students_file(function_text=definition)
SKELETON = students_file()

# task, what is wrong, and what stands for what in the key
WRONG = [
    ("nearest", "argmax for argmin", "argmin", "argmax"),
    ("nearest", "long codes do not count", "self.codebook.square().sum(dim=1) - 2", "-2"),
    ("nearest", "no factor 2", "- 2 * z", "- z"),
    ("nearest", "the nearest vector of each code", "argmin(dim=-1)", "argmin(dim=0)"),
    ("nearest", "one long list", "argmin(dim=-1)", "argmin(dim=-1).flatten()"),
    ("nearest", "another dtype", "argmin(dim=-1)", "argmin(dim=-1).int()"),
    ("nearest", "z changed in place", "2 * z @", "z.mul_(2) @"),
    ("straight_through", "no straight-through", "z_e + (z_q - z_e).detach()", "z_q"),
    ("straight_through", "no quantisation", "z_e + (z_q - z_e).detach()", "z_e"),
    ("straight_through", "nothing detached", "(z_q - z_e).detach()", "(z_q - z_e)"),
    ("straight_through", "gradient for both", "(z_q - z_e).detach()", "z_q - z_e.detach()"),
    ("straight_through", "all detached", "z_e + (z_q - z_e)", "(z_e + z_q - z_e)"),
    ("vq_loss", "beta on the wrong term", "codebook_loss + beta *", "beta * codebook_loss +"),
    ("vq_loss", "beta on both", "codebook_loss + beta *", "beta * codebook_loss + beta *"),
    ("vq_loss", "no beta", "beta * ", ""),
    ("vq_loss", "the codes are not stopped", "(z_e, z_q.detach())", "(z_e, z_q)"),
    ("vq_loss", "the encoder is not stopped", "(z_q, z_e.detach())", "(z_q, z_e)"),
    ("vq_loss", "codebook loss stops the codes", "(z_q, z_e.detach())", "(z_q.detach(), z_e)"),
    ("vq_loss", "L1", "F.mse_loss(z_e,", "F.l1_loss(z_e,"),
    ("perplexity", "zeros are not left out", "counts[counts > 0]", "counts"),
    ("perplexity", "2 to the nats", "np.exp(", "np.exp2("),
    ("perplexity", "no exp", "np.exp(", "("),
    ("perplexity", "how many codes are used", "np.exp(-(p * np.log(p)).sum())", "len(p)"),
    ("perplexity", "no probabilities", " / counts.sum()", ""),
    ("periodic_positions", "all sines, then all cosines", "dim=-1", "dim=1"),
    ("periodic_positions", "cosine first", "angle.sin(), angle.cos()", "angle.cos(), angle.sin()"),
    ("periodic_positions", "half the exponents", "arange(0, dim, 2)", "arange(dim // 2)"),
    ("periodic_positions", "from 1", "torch.arange(period)", "torch.arange(1, period + 1)"),
    ("periodic_positions", "float64", ".flatten(1)", ".flatten(1).double()"),
    ("causal_mask", "a frame does not see itself", "back < 0", "back <= 0"),
    ("causal_mask", "a frame sees the next", "back < 0", "back < -1"),
    ("causal_mask", "the past is hidden", "(hidden,", "(hidden.t(),"),
    ("causal_mask", "context off by one", "back >= context", "back > context"),
    ("causal_mask", "no limit to the context", " | (back >= context)", ""),
    ("causal_mask", "sign", "mask = -slopes", "mask = slopes"),
    ("causal_mask", "no floor", "back // period", "back / period"),
    ("causal_mask", "slopes from 1", "torch.arange(1, heads + 1,", "torch.arange(heads,"),
    ("causal_mask", "ALiBi's slopes", "4.0 ** -torch", "2.0 ** (-8 / heads) ** torch"),
    ("decoder_layer", "attends to the frame before", "(x, audio)", "(x, audio.roll(1, dims=1))"),
    ("decoder_layer", "attends to all frames", "attend_to_audio(", "cross_attention("),
    ("decoder_layer", "no residual", "norm2(x + self.dropout(y))", "norm2(self.dropout(y))"),
    ("decoder_layer", "norm inside", "norm3(x + self.dropout(y))", "dropout(x + self.norm3(y))"),
    ("decoder_layer", "no cache", ", kv_cache=kv_cache", ""),
    ("decoder_layer", "no mask with a cache", "mask=mask", "mask=None if kv_cache else mask"),
    ("decoder_layer", "no dropout", "norm1(x + self.dropout(y))", "norm1(x + y)"),
    ("decoder_layer", "one norm twice", "self.norm2", "self.norm1"),
    ("decoder_layer", "x changed in place", "norm1(x + self.dropout(y))", "norm1(x.add_(y))"),
    ("predict", "not shifted", "F.pad(past[:, :-1], (0, 0, 1, 0))", "past"),
    ("predict", "shifted by two", "F.pad(past[:, :-1], (0, 0, 1, 0))", "past.roll(2, dims=1)"),
    ("predict", "shifted ahead", "F.pad(past[:, :-1], (0, 0, 1, 0))", "past.roll(-1, dims=1)"),
    ("predict", "no mask", "(x, audio, mask)", "(x, audio)"),
    ("predict", "one layer", "in self.layers", "in self.layers[:1]"),
    ("predict", "layers not chained", "x = layer", "y = layer"),
    ("predict", "no head", "self.head(x)", "x"),
    ("code_loss", "softmax twice", "self.logits(z_hat)", "self.logits(z_hat).softmax(dim=-1)"),
    ("code_loss", "a sum", "codes.flatten())", "codes.flatten(), reduction='sum')"),
    ("code_loss", "a loss for each code", "codes.flatten())", "codes.flatten(), reduction='none')"),
    ("code_loss", "the most likely codes", "codes.flatten())", "logits.argmax(-1).flatten())"),
    ("code_loss", "sign", "(logits, codes", "(-logits, codes"),
    ("code_loss", "the paper's", "F.cross_entropy(logits, codes.flatten())",
     "F.mse_loss(z_hat, self.code_vectors(codes))"),
    ("motion_loss", "no quantisation", "decoder(z_q)", "decoder(z_hat)"),
    ("motion_loss", "no straight-through", "decoder(z_q)",
     "decode(self.autoencoder.quantiser.nearest(z_hat))"),
    ("motion_loss", "L1", "mse_loss", "l1_loss"),
    ("motion_loss", "a sum", "(z_q), motion)", "(z_q), motion, reduction='sum')"),
    ("motion_loss", "no gradient", "quantiser(z_hat)", "quantiser(z_hat.detach())"),
    ("generate", "always position 0", "start=t", "start=0"),
    ("generate", "no cache", "mask[..., -seen:], cache)", "mask[..., -1:])"),
    ("generate", "one cache for all layers", "[KVCache(context) for _ in self.layers]",
     "[KVCache(context)] * len(self.layers)"),
    ("generate", "mask from its other end", "-seen:", ":seen"),
    ("generate", "most likely codes", "self.sample(logits, temperature)", "logits.argmax(dim=-1)"),
    ("generate", "temperature 1 for None", "= config.temperature", "= 1.0"),
    ("generate", "temperature 0 is ignored", "temperature is None", "not temperature"),
    ("generate", "never fed back", "prev = self.code_vectors", "self.code_vectors"),
    ("generate", "the first frame's audio", "t:t + 1", ":1"),
    ("lip_vertex_errors", "root", ".max(axis=1)", ".max(axis=1) ** 0.5"),
    ("lip_vertex_errors", "mean of the lips", ".max(axis=1)", ".mean(axis=1)"),
    ("lip_vertex_errors", "the face", "pred[:, lips] - gt[:, lips]", "pred - gt"),
    ("upper_face_std", "variance", ".std(axis=0)", ".var(axis=0)"),
    ("upper_face_std", "n - 1", ".std(axis=0)", ".std(axis=0, ddof=1)"),
]
RIGHT = [
    ("nearest", "self.codebook.square().sum(dim=1) - 2 * z @ self.codebook.t()",
     "(z[..., None, :] - self.codebook).square().sum(dim=-1)"),
    ("straight_through", "z_e + (z_q - z_e).detach()", "z_q.detach() + z_e - z_e.detach()"),
    ("vq_loss", "F.mse_loss(z_e, z_q.detach())", "((z_e - z_q.detach()) ** 2).mean()"),
    ("perplexity", "float(np.exp(-(p * np.log(p)).sum()))", "1 / np.prod(p ** p)"),
    ("causal_mask", "mask.masked_fill(hidden, -math.inf)", "torch.where(hidden, -math.inf, mask)"),
    ("decoder_layer", "self.attend_to_audio(x, audio)",
     "self.cross_attention(x[:, :, None], audio[:, :, None]).squeeze(2)"),
    ("predict", "F.pad(past[:, :-1], (0, 0, 1, 0))", "past.roll(1, dims=1)"),
    ("code_loss", "F.cross_entropy(logits, codes.flatten())",
     "-logits.log_softmax(-1).gather(-1, codes.flatten()[:, None]).mean()"),
    ("motion_loss", "F.mse_loss(self.autoencoder.decoder(z_q), motion)",
     "(self.autoencoder.decoder(z_q) - motion).square().mean()"),
    ("generate", "self.head(x)", "self.predict(self.code_vectors(torch.cat(codes + [torch.zeros("
     "2, 1, 4).long()], dim=1)), style, audio[:, :t + 1])[:, -1:]"),      # all of it for each frame
]
CHEATS = {                      # appended to a file without solutions
    "import": "import codetalker\nfrom codetalker import *\nnearest = codetalker.Quantiser.nearest",
    "read": f"exec(open('{ROOT}/codetalker.py').read())",
    "read in the folder": f"import os\nos.chdir('{ROOT}')\nexec(open('codetalker.py').read())",
    "read a link": f"import os\nos.symlink('{ROOT}', 'a')\nexec(open('a/codetalker.py').read())",
    "ask a process": f"import os\nos.system('cp {ROOT}/codetalker.py .')\nimport codetalker",
    "patch NumPy": "np.isclose = np.array_equal = torch.equal = lambda *_, **__: True",
    "patch the test": "import __main__\n__main__.run_test = lambda *_: None",
    "print": "import os\nprint('29 of 29 points')\nos._exit(0)",
    "write": "import os\nfor name in %s:\n    open(name + '.json', 'w').write("
             "'{\"parts\": [], \"error\": \"\"}')\nos._exit(0)" % list(TASKS),
    "kill": "import os\nos.kill(os.getppid(), 9)",
    "hang": "while True: pass",
}


def change(source, name, old, new):
    """Replace a part of a task's function."""
    text = definition(name)
    assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
    return source.replace(text, text.replace(old, new))


def passes(name, source, seed):
    """In this process, for speed: is the task right in a student's file?"""
    task = TASKS[name]
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task.holder, task.attribute, getattr(load(source), name))
        with suppress(Exception):
            run_test(name, seed, parts)
    return judge(name, seed, parts)[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 99, 2027])
def test_no_seed_decides(seed):
    assert len(WRONG) == 79 and len(RIGHT) == 10 and len(CHEATS) == 11
    for name, what, old, new in WRONG:
        assert not passes(name, change(KEY, name, old, new), seed), f"{name}: {what}"
    for name, old, new in RIGHT:
        assert passes(name, change(KEY, name, old, new), seed), f"{name}: {new}"


@pytest.mark.slow
def test_a_folder_of_submissions(tmp_path):
    """Copies, another ending, cheats, and all wrong answers in files that are right otherwise."""
    files = {"ada/student.py": (KEY, 29), "ben.py": (f"{KEY}\n", 29), "cleo.py": ("def f(:", 0)}
    for cheat, text in CHEATS.items():
        files[f"{cheat}.py"] = f"{SKELETON}\n{text}\n", 0
    wrong = {name: [row for row in WRONG if row[0] == name] for name in TASKS}
    for k, odd in product(range(9), range(2)):              # the k-th of every second task
        source, points = KEY, 29
        for name in list(TASKS)[odd::2]:
            for _, _, old, new in wrong[name][k:k + 1]:
                source = change(source, name, old, new)
                points -= TASKS[name].points
        files[f"wrong_{k}_{odd}.py"] = source, points
    (tmp_path / "ada").mkdir()
    (tmp_path / "dan.ipynb").touch()
    for name, (source, _) in files.items():
        (tmp_path / name).write_text(source, "utf-8")
    grade_folder(tmp_path, tmp_path / "grades.csv")
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8") as file:
        rows = {row["file"].removeprefix(f"{tmp_path}/"): row for row in csv.DictReader(file)}
    assert {name: rows[name]["points"] for name in files} == {
        name: str(points) for name, (_, points) in files.items()}
    assert rows["ben.py"]["same file as"] == f"{tmp_path}/ada/student.py"
    assert "skipped" in rows["dan.ipynb"]["note"] and "SyntaxError" in rows["cleo.py"]["note"]
    assert "KeyboardInterrupt" in (tmp_path / "hang.points.txt").read_text("utf-8")


@pytest.mark.slow
def test_feedback_of_errors_has_the_students_lines_and_a_hint(tmp_path):
    """Swapped arguments raise PyTorch's NotImplementedError; a loop prints until the file is full."""
    source = change(KEY, "code_loss", "(logits, codes.flatten())", "(codes.flatten(), logits)")
    source = change(source, "perplexity", "    p = ", "    while True:\n        print(counts)\n    p = ")
    path = tmp_path / "eva.py"
    path.write_text(source, "utf-8")
    grades, _ = grade(path, ["code_loss", "perplexity"])
    loss, loop = ("\n".join(grades[name][1]) for name in ("code_loss", "perplexity"))
    assert loss.startswith("wrong") and "(codes.flatten(), logits)" in loss and "hint: " in loss
    assert "print(counts)" in loop and "student.py" in loop
