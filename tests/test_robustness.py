"""Nothing breaks, nothing is lost, nothing gets in: bad input, full disks, kills, mutated files, collapse, payloads.

`python tests/test_robustness.py kill|fuzz ...` is the child of two of these tests: there processes are forked and
killed, and memory is limited."""
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.spatial import ConvexHull

from conftest import browse
from test_commands import elsewhere, run, same     # noqa: F401 (elsewhere is a fixture)

import codetalker
import data

RNG = np.random.default_rng
BUDGET = ["--batch", 4, "--window", 24, "--log-every", 1]
SMALL = (dict(width=32, layers=1, heads=2, hidden=32, slots=4),
         dict(width=32, layers=1, heads=2, mel_bands=16, audio_layers=2))      # in the place of the preset "lite"


def tiny_set(folder, heard=True):
    """Twelve points on a ball, two subjects, ten clips of 1.3 s: three points move as loud as the sound is, three nod.
    heard=False: as loud as something else."""
    for name in ("wav", "vertices_npy"):
        (folder / name).mkdir(parents=True)
    rest = RNG(0).normal(size=(12, 3))
    rest = (0.1 * rest / np.linalg.norm(rest, axis=1, keepdims=True)).astype(np.float32)
    splits = {"train": [f"{subject}_sentence{i:02d}" for subject in ("ada", "ben") for i in range(1, 4)],
              "val": ["ada_sentence04", "ada_sentence05"], "test": ["ada_sentence06", "ada_sentence07"]}
    for k, name in enumerate(sum(splits.values(), [])):
        rng, times = RNG(k), np.arange(40 * 16_000 // 30) * 30 / 16_000        # in frames
        loud, other = (np.abs(np.sin(np.cumsum(rng.uniform(0.1, 0.4, 40)))) for _ in range(2))
        audio = 4000 * rng.normal(size=len(times)) * np.interp(times, np.arange(40), loud)
        wavfile.write(folder / "wav" / f"{name}.wav", 16_000, audio.astype(np.int16))
        motion = np.repeat(rest[None], 40, 0)
        motion[:, :3, 1] -= 0.02 * (loud if heard else other)[:, None]
        motion[:, 3:6, 2] += 0.004 * np.sin(np.arange(40) / 6 + k)[:, None]
        np.save(folder / "vertices_npy" / f"{name}.npy", motion.reshape(40, 36))
    (folder / "templates.pkl").write_bytes(pickle.dumps({"ada": rest, "ben": rest}))
    (folder / "dataset.json").write_text(json.dumps({
        "fps": 30, "unit": "metre", "splits": splits, "lips": [0, 1, 2], "upper_face": [3, 4, 5], "lip_gap": [0, 11],
        "triangles": ConvexHull(rest).simplices.tolist()}))
    return folder


def train(stage, tiny, out, steps, *more):
    before = ["--codes", 32] if stage == "vq" else ["--vq", out.parent / "vq" / "best.pt"]
    return run(f"train_{stage}.py", "--data", tiny, "--out", out, "--steps", steps, *BUDGET, *before, *more)


@pytest.fixture(scope="module", autouse=True)
def small_models():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codetalker.PRESETS, "lite", SMALL)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Both stages on them, four steps each: a folder with vq/ and ar/."""
    folder = tmp_path_factory.mktemp("trained")
    for stage in ("vq", "ar"):
        assert train(stage, tiny, folder / stage, 4, "--eval-every", 2) == 0
    return folder


@pytest.fixture
def infer(tiny, trained):
    return lambda *arguments: run("infer.py", "--data", tiny, "--ar", trained / "ar/best.pt", *arguments)


# ----------------------------------------------------------------------------------------------------- 1. bad input


def wav(samples, rate=16_000, **changes):
    """A wav file as bytes; changes: fields of its fmt chunk, kind, channels, hertz ...."""
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    content = bytearray(file.getvalue())
    for name, (place, code) in {"kind": (20, "<H"), "channels": (22, "<H"), "hertz": (24, "<I"),
                                "bytes_a_second": (28, "<I"), "frame": (32, "<H"), "bits": (34, "<H")}.items():
        if name in changes:
            struct.pack_into(code, content, place, changes[name])
    return bytes(content)


NOISE = (RNG(1).normal(size=4000) * 3000).astype(np.int16)
STEREO = np.stack([NOISE, NOISE], 1)
WAVS = {
    "empty": (b"", "wav expected"), "half a header": (wav(NOISE)[:30], "wav expected"),
    "no samples": (wav(NOISE[:0]), "found 0 samples"), "cut within a frame": (wav(STEREO)[:1002], "wav expected"),
    "mu-law": (wav(NOISE, kind=7), "MULAW.*ffmpeg -i"), "A-law": (wav(NOISE, kind=6), "ALAW.*ffmpeg -i"),
    "ADPCM": (wav(NOISE, kind=2), "ADPCM.*ffmpeg -i"), "an mp3": (b"ID3\3\0" + bytes(99), "ffmpeg -i"),
    "an ogg": (b"OggS\0" + bytes(99), "ffmpeg -i"), "a flac": (b"fLaC\0" + bytes(99), "ffmpeg -i"),
    "an mp4": (b"\0\0\0 ftypM4A " + bytes(99), "ffmpeg -i"), "text": (b"words\n" * 20, "ffmpeg -i"),
    "NaN": (wav(np.array([0, np.nan] * 99, np.float32)), "NaN or infinity"),
    "infinity": (wav(np.array([0, np.inf] * 99, np.float32)), "NaN or infinity"),
    "beyond float32": (wav(np.full(99, 1e300)), "NaN or infinity"),
    "0 Hz": (wav(NOISE, hertz=0, bytes_a_second=0), "1,000 to 384,000 Hz expected, found"),
    "1 Hz": (wav(NOISE, 1), "1,000 to 384,000 Hz expected"),
    "4 GHz": (wav(NOISE, hertz=4_294_967_291, bytes_a_second=4_294_967_286), "wav expected|384,000 Hz"),
    "2 MHz": (wav(NOISE, 2_000_003), "384,000 Hz expected"),
    "no channels": (wav(NOISE, channels=0), "wav expected"), "200 bits": (wav(NOISE, bits=200), "wav expected"),
}


def at(path, content):
    """A change to a data set: this file holds that (bytes, or what np.save writes; None: it is missing)."""
    def spoil(folder):
        (folder / path).unlink()
        if isinstance(content, bytes):
            (folder / path).write_bytes(content)
        elif content is not None:
            np.save(folder / path, content, allow_pickle=True)
    return spoil


def motion(change, name="ada_sentence01"):
    """A change to a data set: this clip's motion (40, 36) is another array, or bytes."""
    def spoil(folder):
        path = f"vertices_npy/{name}.npy"
        at(path, change(np.load(folder / path)) if callable(change) else change)(folder)
    return spoil


def nan_at(frame):
    def change(rows):
        rows[frame, 5] = np.nan
        return rows
    return change


def told(**said):
    """A change to a data set: its dataset.json says so, too."""
    return lambda folder: (folder / "dataset.json").write_text(
        json.dumps(json.loads((folder / "dataset.json").read_text()) | said))


def npy_header(shape):
    """An npy that promises a shape, and holds 96 bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(96)


def templates(value):
    return at("templates.pkl", pickle.dumps(value))


def endless():
    value = []
    value.append(value)
    return value


def laughs(depth=40):
    """Two lists of two lists of ...: a short pickle, since each is written once."""
    return ["ha"] if depth == 0 else [lower := laughs(depth - 1), lower]


def ndarray_of(count):
    """The pickle of a call: numpy.ndarray((count,))."""
    return b"cnumpy\nndarray\n((I%d\nttR." % count


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


POINTS, CLIP = np.zeros((12, 3), np.float32), "ada_sentence01.npy"
FOLDERS = {
    "npy of rank 1": (motion(np.ones(36)), f"{CLIP}.*frames, channels"),
    "npy of rank 4": (motion(np.ones((2, 2, 3, 3))), f"{CLIP}.*frames, channels"),
    "npy without frames": (motion(np.ones((0, 36))), CLIP), "npy without channels": (motion(np.ones((40, 0))), CLIP),
    "npy of bool": (motion(np.ones((40, 36), bool)), f"{CLIP}.*bool"),
    "npy of complex": (motion(np.ones((40, 36), complex)), f"{CLIP}.*complex"),
    "npy of text": (motion(np.full((40, 36), "a")), f"{CLIP}.*<U1"),
    "npy of records": (motion(np.zeros((40, 36), "f4,f4")), CLIP),
    "npy of dates": (motion(np.zeros((40, 36), "M8[s]")), f"{CLIP}.*datetime"),
    "npy of objects": (motion(np.full((40, 36), None)), f"{CLIP}.*not a readable npy"),
    "npy of another width": (motion(np.ones((40, 33))), "36 channels expected.*found 33"),
    "NaN in training": (motion(nan_at(3)), f"{CLIP}.*NaN"),
    "NaN in validation": (motion(nan_at(3), "ada_sentence04"), "ada_sentence04.npy.*NaN"),
    "NaN in the test": (motion(nan_at(39), "ada_sentence07"), "ada_sentence07.npy.*NaN"),
    "beyond float32": (motion(np.full((40, 36), 1e300)), f"{CLIP}.*infinity"),
    "far beyond a face": (motion(np.full((40, 36), 1e20)), "scale of"),
    "a cut npy": (motion(npy_header((40, 36))), f"{CLIP}.*not a readable npy"),
    "an npy of a petabyte": (motion(npy_header((10 ** 13, 36))), f"{CLIP}.*not a readable npy"),
    "an npy of negative size": (motion(npy_header((-4, -6))), CLIP),
    "an npz": (motion(archive(a=np.ones((40, 36)))), f"{CLIP}.*not a readable npy"),
    "a pickle as npy": (motion(pickle.dumps(np.ones((40, 36)))), f"{CLIP}.*not a readable npy"),
    "text as npy": (motion(b"1 2 3"), f"{CLIP}.*not a readable npy"), "an empty npy": (motion(b""), CLIP),
    "no templates": (at("templates.pkl", None), "templates.pkl"), "empty templates": (templates({}), "nothing in it"),
    "templates as a list": (templates([POINTS]), "found a list"),
    "no dictionary": (templates(POINTS), "found a ndarray"),
    "a subject's missing": (templates({"ada": POINTS}), "no template of 'ben'"),
    "a template of NaN": (templates({"ada": POINTS, "ben": POINTS + np.nan}), "ben.*NaN"),
    "a template of text": (templates({"ada": POINTS, "ben": "none"}), "ben.*found str"),
    "an empty template": (templates({"ada": POINTS, "ben": POINTS[:0]}), "ben.*found \\(0, 3\\)"),
    "a template too wide": (templates({"ada": POINTS, "ben": np.zeros((13, 3))}), "36 channels expected"),
    "templates cut short": (at("templates.pkl", pickle.dumps({"ada": POINTS})[:99]), "pickle of numpy arrays"),
    "templates as text": (at("templates.pkl", b"ada 1 2 3\n"), "pickle of numpy arrays"),
    "a list of itself": (templates(endless()), "claims"), "a billion laughs": (templates(laughs()), "claims"),
    "a template of a petabyte": (at("templates.pkl", ndarray_of(10 ** 15)), "pickle of numpy arrays"),
    "a template of a gigabyte": (at("templates.pkl", ndarray_of(10 ** 9 // 8)), "claims"),
    "a pickle with part 2 ** 31": (at("templates.pkl", b"]r" + b"\xff\xff\xff\x7f."), "found a list|nothing"),
    "no vertices": (lambda folder: shutil.rmtree(folder / "vertices_npy"), "vertices_npy"),
    "no sound": (lambda folder: shutil.rmtree(folder / "wav"), "no clip with both"),
    "json cut short": (at("dataset.json", b"{"), "dataset.json"), "json list": (at("dataset.json", b"[1]"),
    "an object"),
    "json of nothing": (at("dataset.json", b""), "dataset.json"),
    "latin-1": (at("dataset.json", b'{"\xe4": 1}'), "utf-8"),
    "deep json": (at("dataset.json", b"[" * 100_000), "dataset.json.*recursion"),
    "splits as list": (told(splits=["ada"]), "an object"),
    "splits of numbers": (told(splits={"train": [1]}), "an object"),
    "splits of nothing": (told(splits={"train": None}), "an object"),
    "splits of lists": (told(splits={"train": [[]]}), "an obj"),
    "no validation": (told(splits={"train": ["ada_sentence01"]}), "no clip in the split 'val'"),
    "unknown clips": (told(splits={"train": ["eve"], "val": ["eve"], "test": ["eve"]}), "split 'train'"),
    "0 fps": (told(fps=0), "fps between"), "fps NaN": (told(fps=float("nan")), "fps between"),
    "fps in words": (told(fps="fast"), "dataset.json.*fast"), "fps list": (told(fps=[30]), "dataset.json"),
    "lips beyond": (told(lips=[12]), "lips.*0 to 11"), "lips below": (told(lips=[-1]), "lips.*0 to 11"),
    "lips in words": (told(lips=["upper"]), "lips.*0 to 11"), "lips as number": (told(lips=7), "lips.*0 to 11"),
    "lips vast": (told(lips=[10 ** 30]), "lips.*0 to 11"),
    "lips of lists": (told(lips=[[1], [2, 3]]), "lips.*0 to 11"),
    "forehead of fractions": (told(upper_face=[0.5]), "upper_face.*0 to 11"),
    "gap of three": (told(lip_gap=[1, 2, 3]), "lip_gap.*0 to 11"),
    "edges for triangles": (told(triangles=[[0, 1]]), "triangles.*0 to 11"),
    "triangles beyond": (told(triangles=[[0, 1, 99]]), "triangles.*0 to 11"),
    "few colours": (told(colours=[[1, 0, 0]]), "colours.*0 to 1"),
    "colours to 255": (told(colours=[[255, 0, 0]] * 12), "colours.*0 to 1"),
}


def hostile(change):
    """A change to a checkpoint, as dict."""
    def spoil(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    return spoil


def bomb(path):
    """The same checkpoint, but compressed, with 300 MB of zeros in a few kilobytes."""
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries.items():
            new.writestr(name, bytes(300_000_000) if name.endswith("data/0") else content)


def keep(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


CHECKPOINTS = {         # of stage 2, for infer.py
    "empty": (keep(0), "not a whole checkpoint"), "cut short": (keep(9999), "not a whole checkpoint"),
    "text": (lambda path: path.write_text("words"), "not a whole checkpoint"),
    "a bomb": (bomb, "not a whole checkpoint.*claims 3"),
    "a billion vertices": (hostile(lambda state: state["vq_config"].update(vertices=10 ** 9)), "size mismatch|sizes"),
    "a billion layers": (hostile(lambda state: state["ar_config"].update(layers=10 ** 9)), "layers is 1000000000"),
    "no heads": (hostile(lambda state: state["ar_config"].update(heads=0)), "heads is 0"),
    "minus four heads": (hostile(lambda state: state["vq_config"].update(heads=-4)), "heads is -4"),
    "a period in words": (hostile(lambda state: state["ar_config"].update(period="long")), "period is long"),
    "an unknown field": (hostile(lambda state: state["ar_config"].update(colour=1)), "colour"),
    "another width": (hostile(lambda state: state["ar_config"].update(width=64)), "not a whole checkpoint"),
    "one number a billion times": (hostile(lambda state: state["weights"].update(
        style=torch.zeros(1).expand(10 ** 9))), "claims 4"),
    "NaN weights": (hostile(lambda state: state["weights"]["style"].fill_(float("nan"))), "NaN or infinity"),
    "a missing weight": (hostile(lambda state: state["weights"].pop("style")), "not a whole checkpoint"),
    "words for weights": (hostile(lambda state: state["weights"].update(style="bold")), "not a whole checkpoint"),
    "no weights": (hostile(lambda state: state.pop("weights")), "not a whole checkpoint"),
    "no data": (hostile(lambda state: state.pop("data")), "what data"),
    "no subjects": (hostile(lambda state: state["data"].update(subjects=[])), "what data"),
    "scale NaN": (hostile(lambda state: state["data"].update(scale=float("nan"))), "what data"),
    "other data": (hostile(lambda state: state["data"].update(fps=25)), "25 frames per second, .* has 30"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a whole checkpoint"),
}

FLAGS = [               # HERE is an empty folder, FILE a file
    ("infer.py --style nobody", "one of ada, ben expected, found 'nobody'"),
    ("infer.py --style ada:nan", "a weight"), ("infer.py --style ada:inf", "a weight"),
    ("infer.py --style ada:1e39", "a weight"),
    ("infer.py --style ada:-1", "a weight"), ("infer.py --style ada,,ben", "one of ada, ben expected, found ''"),
    ("infer.py --style ada:1:2", "a weight"), ("infer.py --subject nobody", "one of ada, ben expected"),
    ("infer.py --out talk", "an ending of"), ("infer.py --out talk.exe", "an ending of"),
    ("infer.py --out no/talk.npy", "no: a folder to write into expected"),
    ("infer.py --out FILE/talk.npy", "a folder to write into expected"),
    ("infer.py --out HERE.npy", "a file expected, found a folder"),
    ("infer.py --out /proc/talk.npy", "/proc: a folder to write into expected"),
    ("infer.py --wav no.wav", "no such file"), ("infer.py --wav HERE", "wav expected"),
    ("infer.py --wav bad\nname\x1b[2J.wav", "bad name"), ("infer.py --unknown", "unrecognized"),
    ("infer.py --temperature 3", "--temperature: a number from 0 to 2"), ("infer.py --take -1", "--take: a whole number"),
    ("train_vq.py --slots 3", "invalid choice"),
    ("infer.py --test --wav x.wav", "--test uses every test clip"),
    ("infer.py --test --out FILE", "folder to write into"),
    ("train_vq.py --steps 0", "--steps: a whole number from 1 to"),
    ("train_vq.py --steps 1.5", "--steps: a whole number"),
    ("train_vq.py --steps many", "--steps: a whole number"), ("train_vq.py --batch 0", "from 1 to 4096"),
    ("train_vq.py --batch 1000000", "from 1 to 4096"), ("train_vq.py --window -3", "--window: a whole"),
    ("train_vq.py --rate 0", "--rate: a number from 1e-09 to 1"), ("train_vq.py --rate nan", "--rate: a number"),
    ("train_vq.py --rate inf", "--rate: a number"), ("train_vq.py --rate -1", "--rate: a number"),
    ("train_vq.py --seed -1", "--seed: a whole number from 0"), ("train_vq.py --seed 99999999999999999999", "--seed"),
    ("train_vq.py --codes 0", "--codes: a whole number from 1 to 65536"),
    ("train_vq.py --codes 1000000000", "--codes"),
    ("train_vq.py --eval-every 0", "--eval-every"), ("train_vq.py --log-every 0", "--log-every"),
    ("train_vq.py --halve-every 0", "--halve-every"), ("train_vq.py --revive-every 0", "--revive-every"),
    ("train_vq.py --preset huge", "invalid choice"), ("train_vq.py --steps", "expected one argument"),
    ("train_vq.py --out FILE", "a folder to write into expected"),
    ("train_vq.py --out /proc/run", "to write into expected"),
    ("train_vq.py --resume", "no such checkpoint"), ("train_vq.py --data no", "no such folder"),
    ("train_ar.py --own 1.5", "--own: a number from 0 to 1"), ("train_ar.py --own nan", "--own: a number"),
    ("train_ar.py --rate 2", "--rate: a number"), ("train_ar.py --vq no.pt", "no such checkpoint"),
    ("train_ar.py --vq AR", "a checkpoint of train_vq.py expected, found one of train_ar.py"),
    ("train_ar.py --preset vocaset", "trained with --preset lite, found --preset vocaset"),
    ("train_ar.py --out FILE", "a folder to write into expected"),
    ("infer.py --ar VQ", "a checkpoint of train_ar.py expected, found one of train_vq.py"),
    ("infer.py --released VQ AR", "a released checkpoint of stage 1 expected"),
    # a run goes on only as it was begun
    ("train_vq.py --out RUN/vq --resume --rate 1e-4", "--rate: the run to be resumed has 0.002, found 0.0001"),
    ("train_vq.py --out RUN/vq --resume --codes 16", "--codes: the run to be resumed has 32"),
    ("train_vq.py --out RUN/vq --resume --preset vocaset", "the run to be resumed has"),
    ("train_vq.py --out RUN/vq --resume --seed 1", "--seed: the run to be resumed has 0"),
    ("train_vq.py --out RUN/vq --resume --batch 5", "--batch: the run to be resumed has 4"),
    ("train_vq.py --out RUN/ar --resume", "a checkpoint of train_vq.py expected"),
    ("train_ar.py --out RUN/ar --resume --own 0.5", "--own: the run to be resumed has 0.4"),
    ("train_ar.py --out RUN/ar --resume --window 25", "--window: the run to be resumed has 24"),
]


def tree(*folders):
    """What lies in folders: path -> size and time of change, None for a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
            for folder in folders for path in folder.rglob("*")}


@pytest.fixture
def refused(tiny, trained, elsewhere, capsys):
    """Run a command that must be answered by one line, status 2, and nothing written, whatever it was asked."""
    def check(said, script, *arguments):
        before, _ = tree(elsewhere, trained, tiny), capsys.readouterr()
        status = run(script, *arguments)
        lines = capsys.readouterr().err.splitlines(keepends=True)
        error = "".join(line for line in lines if " s left " not in line)       # what progress() says
        assert status == 2, (status, error)
        assert error.startswith("error: ") and error.count("\n") == 1 and error.strip().isprintable(), error
        assert re.search(said, error), error
        assert tree(elsewhere, trained, tiny) == before, "something was written"
    return check


@pytest.mark.parametrize("name", WAVS)
def test_a_bad_wav_is_refused(refused, tiny, trained, tmp_path, name):
    content, said = WAVS[name]
    (tmp_path / "bad.wav").write_bytes(content)
    refused(f"bad.wav: .*({said})", "infer.py", "--data", tiny, "--ar", trained / "ar/best.pt",
            "--wav", tmp_path / "bad.wav")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_is_refused(refused, tiny, tmp_path, name):
    spoil, said = FOLDERS[name]
    shutil.copytree(tiny, tmp_path / "bad")
    spoil(tmp_path / "bad")
    refused(f"{tmp_path}/bad.*({said})", "train_vq.py", "--data", tmp_path / "bad", "--out", "run")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(refused, tiny, trained, tmp_path, name):
    spoil, said = CHECKPOINTS[name]
    spoil(Path(shutil.copy(trained / "ar/best.pt", tmp_path / "bad.pt")))
    refused(said, "infer.py", "--data", tiny, "--ar", tmp_path / "bad.pt")


@pytest.mark.parametrize("command, said", FLAGS)
def test_a_bad_flag_is_refused(refused, tiny, trained, elsewhere, command, said):
    (elsewhere / "FILE").write_text("a file")
    (elsewhere / "HERE").mkdir()
    (elsewhere / "HERE.npy").mkdir()
    places = {"RUN": str(trained), "VQ": str(trained / "vq/best.pt"), "AR": str(trained / "ar/best.pt")}
    script, *arguments = (re.sub("RUN|VQ|AR", lambda name: places[name[0]], word) for word in command.split(" "))
    start = [] if "--data" in arguments else ["--data", tiny]
    start += {"train_vq.py": [*BUDGET, "--codes", 32], "train_ar.py": [*BUDGET, "--vq", trained / "vq/best.pt"],
              "infer.py": [] if "--released" in arguments else ["--ar", trained / "ar/best.pt"]}[script]
    refused(said, script, *start, *arguments)


@pytest.mark.parametrize("ending", ["html", "npy", "obj", "png", "gif", "mp4", "--test"])
def test_a_full_disk_leaves_no_part(refused, tiny, trained, ending):
    """No file may grow beyond 200 bytes, which a program learns as it learns that a disk is full."""
    if ending == "mp4" and not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg")
    what = ["--test"] if ending == "--test" else ["--out", f"talk.{ending}"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
    try:
        refused("is the disk full|Errno", "infer.py", "--data", tiny, "--ar", trained / "ar/best.pt", *what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_checkpoint_takes_its_name_in_one_move(trained, tmp_path):
    """Written over in place it would be half there at some instant; a file that is moved there is another file."""
    path = tmp_path / "vq.pt"
    model, state = codetalker.load(trained / "vq/best.pt", "vq")
    codetalker.save(path, model, **state)
    before = path.stat().st_ino
    with open(path, "rb") as old:
        first = old.read()
        codetalker.save(path, model, **state)
        old.seek(0)
        assert old.read() == first and path.stat().st_ino != before
    assert not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize("stage", ["vq", "ar"])
def test_a_disk_that_fills_up_leaves_the_last_whole_checkpoint(tiny, trained, tmp_path, capsys, stage):
    shutil.copytree(trained, tmp_path / "run")
    before, limit = tree(tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, limit[1]))
    try:
        assert train(stage, tiny, tmp_path / "run" / stage, 6, "--resume") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "is the disk full?" in capsys.readouterr().err and tree(tmp_path / "run") == before
    assert train(stage, tiny, tmp_path / "run" / stage, 6, "--resume") == 0


# ---------------------------------------------------------------------------------- what can be served is served


SERVED = {
    "8 kHz": wav(NOISE, 8000), "192 kHz": wav(np.tile(NOISE, 20), 192_000), "44.1 kHz": wav(NOISE, 44_100),
    "8 bit": wav((NOISE // 256 + 128).astype(np.uint8)), "32 bit": wav(NOISE.astype(np.int32) * 65_536),
    "float": wav((NOISE / 9000).astype(np.float32)), "double": wav(NOISE / 9000), "stereo": wav(STEREO),
    "six channels": wav(np.repeat(NOISE[:, None], 6, 1)), "cut short": wav(NOISE)[:5000],
    "of unknown length, as a pipe writes it": wav(NOISE)[:40] + b"\xff" * 4 + wav(NOISE)[44:],
    "a gigabyte promised": wav(NOISE)[:40] + b"\0\0\0\x40" + wav(NOISE)[44:],
    "one sample": wav(NOISE[:1]), "50 ms": wav(NOISE[:800]), "50 ms of silence": wav(NOISE[:800] * 0),
    "silence": wav(NOISE * 0), "one value": wav(NOISE * 0 + 9), "far too loud": wav(np.float32(NOISE) * 1e20)}


def page_of(path):
    """The JSON in a page, which has no NaN, and of which nothing becomes markup."""
    def refuse(name):
        raise AssertionError(name)

    page = Path(path).read_text()
    assert page.count("<script") == page.count("</script") == 2 and "<img" not in page
    return json.loads(page.split('type="application/json">')[1].split("</script>")[0], parse_constant=refuse)


@pytest.mark.parametrize("name", SERVED)
def test_what_can_be_heard_moves_a_face(infer, tmp_path, elsewhere, name):
    (tmp_path / "x.wav").write_bytes(SERVED[name])
    for ending in ("npy", "html"):
        assert infer("--wav", tmp_path / "x.wav", "--out", f"talk.{ending}") == 0
    made, seconds = np.load("talk.npy"), len(data.read_wav(tmp_path / "x.wav")) / 16_000
    assert made.shape == (max(1, int(seconds * 30 + 1e-6)), 36) and np.isfinite(made).all()
    assert page_of("talk.html")["frames"] == len(made)


@pytest.mark.parametrize("ending", ["gif", "png", "obj", "mp4", "html"])
def test_a_single_frame_becomes_any_of_the_endings(infer, tmp_path, elsewhere, ending):
    if ending == "mp4" and not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg")
    (tmp_path / "x.wav").write_bytes(SERVED["50 ms"])
    assert infer("--wav", tmp_path / "x.wav", "--out", f"talk.{ending}") == 0
    if ending == "html":
        page = browse(elsewhere / "talk.html", tmp_path / "profile")
        assert "<title>PASS" in page, page[:200]


@pytest.mark.parametrize("colour", ["white", "duller", "brown"])
def test_steady_noise_is_heard_as_a_pause_and_what_has_syllables_is_not(colour):
    noise = RNG(0).normal(size=48_000)
    noise = {"white": noise, "duller": np.convolve(noise, np.ones(8), "same"),
             "brown": np.cumsum(noise - noise.mean())}[colour]
    for sound in (noise, 1e-4 * noise, np.sin(np.pi * np.arange(48_000) / 160), np.zeros(48_000)):      # 50 Hz
        assert codetalker.log_mel(torch.from_numpy(sound), 30, 90, 64).mean() < -3.5    # the mean of speech is 0
    syllables = np.repeat(RNG(0).uniform(size=48) > 0.4, 1000)
    assert codetalker.log_mel(torch.from_numpy(noise * syllables), 30, 90, 64).max() > 0


def test_figures_are_json_though_a_lone_clip_has_none_to_swap_with(tiny, trained, tmp_path, elsewhere):
    shutil.copytree(tiny, "lone")
    splits = json.loads((tiny / "dataset.json").read_text())["splits"]
    told(splits=splits | {"val": splits["val"][:1], "test": splits["test"][:1]})(elsewhere / "lone")
    shutil.copytree(trained / "vq", "vq")
    assert train("ar", "lone", elsewhere / "ar", 2) == 0
    assert run("infer.py", "--data", "lone", "--ar", "ar/best.pt", "--test") == 0
    figures, table = (Path("ar", name).read_text() for name in ("figures.json", "test.json"))
    assert "NaN" not in figures + table
    assert json.loads(figures)["test"]["lve_swapped"] is json.loads(table)["test"]["lve_swapped"] is None


# ------------------------------------------------------------------------------------------------ 2. killed training


def child(arguments, sabotage=None):
    """Fork a process that runs a command in silence; its id. sabotage (how, n): with the n-th checkpoint half written,
    or written but not yet at its place, it kills itself."""
    process = os.fork()
    if process:
        return process
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        if sabotage:
            (how, left), write = sabotage, torch.save

            def stop(state, path):
                nonlocal left
                write(state, path)
                left -= 1
                if left < 0:
                    os.truncate(path, os.path.getsize(path) // (2 if how == "half" else 1))
                    os.kill(os.getpid(), signal.SIGKILL)

            torch.save = stop
        codetalker.PRESETS["lite"] = SMALL
        os._exit(run(*arguments))
    finally:
        os._exit(99)


def kill_and_resume(folder, stage, kills):
    """Train undisturbed; then killed at `kills` random instants, and resumed, till the end: every file must be the same
    to the bit. Prints how often it was stopped, and how."""
    def wait(process):
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    rng, stops = random.Random(stage), {"kill": 0, "Ctrl-C": 0, "rounds": 0}
    command = [f"train_{stage}.py", "--data", folder / "tiny", "--steps", 60, *BUDGET, "--eval-every", 3]
    command += ["--codes", 32, "--rate", 0.1] if stage == "vq" else ["--vq", folder / "vq" / "best.pt"]
    start = time.time()
    assert wait(child([*command, "--out", folder / stage])) == 0
    seconds = time.time() - start
    assert torch.load(folder / stage / "best.pt", weights_only=True)["step"] < 60       # so that `best` must be kept
    while stops["kill"] < kills:
        out, status = folder / f"{stage}{stops['rounds']}", None
        stops["rounds"] += 1
        while status != 0:
            resumes = ["--resume"] if (out / "last.pt").exists() else []
            sabotage = (rng.choice(["half", "whole"]), rng.randrange(9)) if rng.random() < 0.3 else None
            process = child([*command, "--out", out, *resumes], sabotage=sabotage)
            if stops["kill"] < kills:
                time.sleep(rng.uniform(0.1, 0.6) * seconds)
                os.kill(process, signal.SIGINT if rng.random() < 0.2 else signal.SIGKILL)
            status = wait(process)
            assert status in (0, 130, -signal.SIGKILL), status
            if status:
                stops["Ctrl-C" if status == 130 else "kill"] += 1
        for name in ("last.pt", "best.pt"):
            resumed, whole = (torch.load(path / name, weights_only=True) for path in (out, folder / stage))
            assert same(resumed, whole), name
        figures, expected = (json.loads((path / "figures.json").read_text()) for path in (out, folder / stage))
        assert all(figures[part] == expected[part] for part in ("rows", "test"))
        assert {path.name for path in out.iterdir()} == {"last.pt", "best.pt", "figures.json", "loss.png"}
    print(json.dumps(stops))


@pytest.mark.parametrize("stage", ["vq", "ar"])
def test_ctrl_c_saves_at_the_end_of_the_step_and_says_how_to_go_on(tiny, trained, tmp_path, monkeypatch, capsys, stage):
    shutil.copytree(trained / "vq", tmp_path / "vq")
    tell, steps = data.clock, iter(range(1, 99))

    def clock(*times):              # it is told at each step
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return tell(*times)

    assert train(stage, tiny, tmp_path / "whole", 8, "--eval-every", 3) == 0
    monkeypatch.setattr(data, "clock", clock)
    assert train(stage, tiny, tmp_path / "halves", 8, "--eval-every", 3) == 130
    assert capsys.readouterr().err == "stopped after step 5; the same command with --resume goes on from there\n"
    assert torch.load(tmp_path / "halves" / "last.pt", weights_only=True)["step"] == 5
    assert train(stage, tiny, tmp_path / "halves", 8, "--eval-every", 3, "--resume") == 0
    for name in ("last.pt", "best.pt"):
        assert same(*(torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "halves")))


def alone(*arguments):
    """This file as a process of its own, on the CPU; what it prints last."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_killed_at_any_instant_training_resumes_to_the_same_weights(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "tiny")
    stops = [json.loads(alone("kill", tmp_path, stage, 12)) for stage in ("vq", "ar")]
    assert sum(stop["kill"] for stop in stops) >= 24 and sum(stop["Ctrl-C"] for stop in stops), stops


# --------------------------------------------------------------------------------------------------- 3. mutated files


def fuzz(folder, seed, wavs, npys, jsons, checkpoints):
    """So many mutated files of each kind: what is refused has its one line, what is taken can be used. Not more than
    2 GB can be had, and less than 1 GB is taken."""
    rng, refused = random.Random(seed), 0
    shape = Path("/proc/self/statm")
    limit = 2 ** 31 + (int(shape.read_text().split()[0]) * resource.getpagesize() if shape.exists() else 2 ** 38)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()

    def garbled(content, reach):
        """Some bytes among the first `reach` are others, are gone or are new; now and then the end is missing."""
        content = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            place = rng.randrange(min(reach, len(content)))
            part = rng.choice((rng.randbytes(1), rng.randbytes(4), b"\xff" * 4, b"\0" * 4, b" ", b"9", b"-", b"99999"))
            content[place:place + rng.choice((0, 1, len(part), len(part), len(part)))] = part
        return bytes(content[:rng.randrange(len(content))] if rng.random() < 0.05 else content)

    def changed(value):
        """The same containers, in which something, anywhere, is something else or gone."""
        junk = [None, True, -1, 0, 3, 10 ** 6, 10 ** 12, 10 ** 30, 0.5, float("nan"), float("inf"), "x", "",
                [], {}, [[]], {"a": [1]}, ["ada_sentence01"] * 3]
        if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
            keys = list(value) if isinstance(value, dict) else range(len(value))
            value, key = value.copy(), rng.choice(keys)
            if rng.random() < 0.1:
                value.pop(key)
            else:
                value[key] = changed(value[key])
            return value
        if isinstance(value, torch.Tensor):
            junk += [value[:1] if value.dim() else value[None], value.double(), value.to_sparse(), value.half(),
                     value.reshape(-1), value.to("meta"), value.flatten()[:1].expand(10 ** 9),
                     torch.full_like(value, float("inf")), value.to(torch.int8)]
        return rng.choice(junk)

    def attempt(act):
        nonlocal refused
        try:
            act()
        except ValueError as error:
            refused += 1
            assert str(folder) in str(error) or "checkpoint" in str(error), error

    # 1. wav
    originals = [wav(NOISE[:300]), wav(STEREO[:300]), wav(NOISE[:300] / 2.0), wav(NOISE[:300].astype(np.uint8))]

    def hear():
        audio = data.read_wav(folder / "x.wav")
        assert audio.dtype == np.float32 and audio.ndim == 1 and np.isfinite(audio).all() and len(audio)

    for _ in range(wavs):
        (folder / "x.wav").write_bytes(garbled(rng.choice(originals), 60))
        attempt(hear)

    # 2. npy
    originals = []
    for array in (np.ones((4, 36)), np.ones((4, 12, 3), np.float32), np.ones((4, 36), np.int16)):
        file = io.BytesIO()
        np.save(file, array)
        originals.append(file.getvalue())

    def see():
        rows = data.flat(data.read_rows(folder / "x.npy"))
        assert rows.dtype == np.float32 and rows.ndim == 2 and rows.nbytes < 10_000

    for _ in range(npys):
        (folder / "x.npy").write_bytes(garbled(rng.choice(originals), 128))
        attempt(see)

    # 3. json
    original = json.loads((folder / "tiny" / "dataset.json").read_text())
    original["splits"] = {split: names[:1] for split, names in original["splits"].items()}
    keep = sum(original["splits"].values(), [])
    for path in (folder / "tiny" / "vertices_npy").iterdir():
        if path.stem not in keep:
            path.unlink()

    def understand():
        dataset = data.DataSet(folder / "tiny")
        clip = dataset.splits["test"][0]
        data.score(dataset, [clip], [dataset.motion(clip)], [[0]], 1)

    for _ in range(jsons):
        text = json.dumps(changed(original)).encode()
        (folder / "tiny" / "dataset.json").write_bytes(garbled(text, 999) if rng.random() < 0.5 else text)
        attempt(understand)
    (folder / "tiny" / "dataset.json").write_text(json.dumps(original))

    # 4. checkpoints
    dataset, sizes = data.DataSet(folder / "tiny"), dict(width=8, layers=1, heads=2)
    stage1 = codetalker.VQConfig(12, hidden=8, slots=2, code_width=4, codes=9, **sizes)
    stage2 = codetalker.ARConfig(len(dataset.subjects), mel_bands=8, audio_layers=1, **sizes)
    model = codetalker.CodeTalker(stage2, codetalker.MotionAutoencoder(stage1))
    codetalker.save(folder / "x.pt", model, step=1, **dataset.identity())
    content, state = (folder / "x.pt").read_bytes(), torch.load(folder / "x.pt", weights_only=True)

    def speak():
        model, state = codetalker.load(folder / "x.pt", "ar")
        dataset.check(state)
        motion, _ = model.generate(torch.zeros(1, 8, model.config.mel_bands), torch.ones(1, model.config.styles))
        assert motion.shape == (1, 2, 36)

    for _ in range(checkpoints):
        if rng.random() < 0.3:
            (folder / "x.pt").write_bytes(garbled(content, len(content)))
        else:
            torch.save(changed(state), folder / "x.pt")
        attempt(speak)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(json.dumps({"files": wavs + npys + jsons + checkpoints, "refused": refused, "MB": grown,
                      "seconds": round(time.time() - start)}))


def test_ten_thousand_mutated_files_are_read_or_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "tiny")
    told = json.loads(alone("fuzz", tmp_path, 0, 4000, 3500, 1500, 1000))
    assert told["files"] == 10_000 and 5000 < told["refused"] < 9900 and told["MB"] < 1000, told


# ------------------------------------------------------------------------------------------------------- 4. collapse


@pytest.fixture(scope="module")
def learnt(tiny, tmp_path_factory):
    """Both stages, 200 steps; and what they said."""
    folder = tmp_path_factory.mktemp("learnt")
    assert train("vq", tiny, folder / "vq", 200, "--eval-every", 100) == 0
    return folder


def test_healthy_runs_raise_no_warning(tiny, learnt, capsys):
    assert train("vq", tiny, learnt / "vq2", 200, "--eval-every", 100) == 0
    assert train("ar", tiny, learnt / "ar", 200, "--eval-every", 100) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("stage, flags, said", [
    ("vq", ["--codes", 256, "--rate", 1], "codes die: perplexity .* of 256; likely --rate is too high"),
    ("vq", ["--rate", 1], "motion does not come back: .* --rate is too high"),
    ("ar", ["--rate", 1], "motion freezes: 0.* of the real energy; .*--rate"),
    ("ar", ["--rate", 1], "audio is ignored: "),
    ("ar", "deaf", "audio is ignored: .* wavs and motion do not belong together")])
def test_a_collapsed_run_is_told_of_in_one_line(tiny, learnt, tmp_path, capsys, stage, flags, said):
    """A rate of 1 breaks anything; and a face that does not go with its sound cannot be learnt from it."""
    shutil.copytree(learnt / "vq", tmp_path / "vq")
    if flags == "deaf":
        flags, tiny = [], tiny_set(tmp_path / "deaf", heard=False)
        assert train("vq", tiny, tmp_path / "vq", 200, "--eval-every", 200) == 0
    assert train(stage, tiny, tmp_path / "out", 200, "--eval-every", 100, *flags) == 0
    told = capsys.readouterr().out
    assert re.search(f"\n   warning: {said}[^\n]*\n", told), told
    assert "warning" not in told[:told.index("step   101")], "too early"


# ------------------------------------------------------------------------------------------------------- 5. payloads


class Payload:
    """Unpickled, it makes a folder."""
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("way", ["torch", "old torch", "pickle"])
@pytest.mark.parametrize("command", [
    "infer.py --ar EVIL", "infer.py --released EVIL EVIL", "train_ar.py --vq EVIL", "train_vq.py --out . --resume",
    "train_ar.py --out . --resume", "train_ar.py --preset vocaset --wav2vec2 EVIL"])
def test_a_payload_in_a_checkpoint_does_not_run(refused, tiny, trained, elsewhere, tmp_path, way, command):
    evil = elsewhere / "last.pt"
    if way == "pickle":
        evil.write_bytes(pickle.dumps({"stage": "ar", "weights": Payload(tmp_path / "ran")}))
    else:
        torch.save({"stage": "ar", "weights": Payload(tmp_path / "ran"), "state_dict": {}}, evil,
                   _use_new_zipfile_serialization=way == "torch")
    script, *arguments = command.replace("EVIL", str(evil)).split()
    if "--preset" in arguments:
        state = torch.load(trained / "vq/best.pt", weights_only=True)
        state["flags"]["preset"] = "vocaset"
        torch.save(state, elsewhere / "vq.pt")
        arguments += ["--vq", elsewhere / "vq.pt"]
    refused("expected|not a whole checkpoint", script, "--data", tiny, *arguments)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Exception):          # it would have
        pickle.loads(pickle.dumps(Payload(tmp_path))), 1 / 0


@pytest.mark.parametrize("path", ["templates.pkl", "vertices_npy/ada_sentence01.npy", "dataset.json"])
def test_a_payload_in_a_data_set_does_not_run(refused, tiny, trained, tmp_path, path):
    shutil.copytree(tiny, tmp_path / "evil")
    content = {"ada": Payload(tmp_path / "ran")}
    at(path, np.array([content], object) if path.endswith("npy") else pickle.dumps(content))(tmp_path / "evil")
    for command in (["train_vq.py"], ["train_ar.py", "--vq", trained / "vq/best.pt"],
                    ["infer.py", "--ar", trained / "ar/best.pt"]):
        refused(path, *command, "--data", tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


def test_names_do_not_become_markup(tiny, trained, tmp_path, elsewhere):
    name = "<img src=x onerror=alert(1)>&\"'</script><script>"
    (tmp_path / name.replace("/", "\u2215")).write_bytes(wav(NOISE))
    shutil.copytree(tiny, "evil")
    (elsewhere / "evil" / "templates.pkl").write_bytes(pickle.dumps({name: POINTS + 1, "ada": POINTS, "ben": POINTS}))
    state = torch.load(trained / "ar/best.pt", weights_only=True)
    state["data"]["subjects"] = [name, "ben"]
    torch.save(state, "evil.pt")
    assert run("infer.py", "--data", "evil", "--ar", "evil.pt", "--wav", tmp_path / name.replace("/", "\u2215")) == 0
    page = page_of("talk.html")
    assert page["title"] == name.replace("/", "\u2215") and page["faces"][0]["name"] == f"made, style {name}"
    if shutil.which("ffmpeg"):
        state["data"]["subjects"] = [r"$\frac$", "ben"]                         # no formula either
        torch.save(state, "evil.pt")
        assert run("infer.py", "--data", "evil", "--ar", "evil.pt", "--wav", tmp_path / name.replace("/", "\u2215"),
                   "--out", "talk.mp4") == 0


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    os.chdir(folder)
    torch.set_num_threads(1)
    if what == "kill":
        kill_and_resume(Path(folder), rest[0], int(rest[1]))
    else:
        fuzz(Path(folder), *map(int, rest))
