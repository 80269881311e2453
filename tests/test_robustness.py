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

from conftest import ROOT, browse
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
    "templates as a list": (templates([POINTS]), "found a list"), "no dictionary": (templates(POINTS), "found a ndarray"),
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
    "json cut short": (at("dataset.json", b"{"), "dataset.json"), "json list": (at("dataset.json", b"[1]"), "an object"),
    "json of nothing": (at("dataset.json", b""), "dataset.json"), "latin-1": (at("dataset.json", b'{"\xe4": 1}'), "utf-8"),
    "deep json": (at("dataset.json", b"[" * 100_000), "dataset.json.*recursion"),
    "splits as list": (told(splits=["ada"]), "an object"), "splits of numbers": (told(splits={"train": [1]}), "an object"),
    "splits of nothing": (told(splits={"train": None}), "an object"), "splits of lists": (told(splits={"train": [[]]}), "an obj"),
    "no validation": (told(splits={"train": ["ada_sentence01"]}), "no clip in the split 'val'"),
    "unknown clips": (told(splits={"train": ["eve"], "val": ["eve"], "test": ["eve"]}), "split 'train'"),
    "0 fps": (told(fps=0), "fps between"), "fps NaN": (told(fps=float("nan")), "fps between"),
    "fps in words": (told(fps="fast"), "dataset.json.*fast"), "fps list": (told(fps=[30]), "dataset.json"),
    "lips beyond": (told(lips=[12]), "lips.*0 to 11"), "lips below": (told(lips=[-1]), "lips.*0 to 11"),
    "lips in words": (told(lips=["upper"]), "lips.*0 to 11"), "lips as number": (told(lips=7), "lips.*0 to 11"),
    "lips vast": (told(lips=[10 ** 30]), "lips.*0 to 11"), "lips of lists": (told(lips=[[1], [2, 3]]), "lips.*0 to 11"),
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
    ("infer.py --style ada:nan", "a weight"), ("infer.py --style ada:inf", "a weight"), ("infer.py --style ada:1e39", "a weight"),
    ("infer.py --style ada:-1", "a weight"), ("infer.py --style ada,,ben", "one of ada, ben expected, found ''"),
    ("infer.py --style ada:1:2", "a weight"), ("infer.py --subject nobody", "one of ada, ben expected"),
    ("infer.py --out talk", "an ending of"), ("infer.py --out talk.exe", "an ending of"),
    ("infer.py --out no/talk.npy", "no: a folder to write into expected"),
    ("infer.py --out FILE/talk.npy", "a folder to write into expected"),
    ("infer.py --out HERE.npy", "a file expected, found a folder"),
    ("infer.py --out /proc/talk.npy", "/proc: a folder to write into expected"),
    ("infer.py --wav no.wav", "no such file"), ("infer.py --wav HERE", "wav expected"),
    ("infer.py --wav bad\nname\x1b[2J.wav", "bad name"), ("infer.py --unknown", "unrecognized"),
    ("infer.py --test --wav x.wav", "--test uses every test clip"), ("infer.py --test --out FILE", "folder to write into"),
    ("train_vq.py --steps 0", "--steps: a whole number from 1 to"), ("train_vq.py --steps 1.5", "--steps: a whole number"),
    ("train_vq.py --steps many", "--steps: a whole number"), ("train_vq.py --batch 0", "from 1 to 4096"),
    ("train_vq.py --batch 1000000", "from 1 to 4096"), ("train_vq.py --window -3", "--window: a whole"),
    ("train_vq.py --rate 0", "--rate: a number from 1e-09 to 1"), ("train_vq.py --rate nan", "--rate: a number"),
    ("train_vq.py --rate inf", "--rate: a number"), ("train_vq.py --rate -1", "--rate: a number"),
    ("train_vq.py --seed -1", "--seed: a whole number from 0"), ("train_vq.py --seed 99999999999999999999", "--seed"),
    ("train_vq.py --codes 0", "--codes: a whole number from 1 to 65536"), ("train_vq.py --codes 1000000000", "--codes"),
    ("train_vq.py --eval-every 0", "--eval-every"), ("train_vq.py --log-every 0", "--log-every"),
    ("train_vq.py --halve-every 0", "--halve-every"), ("train_vq.py --revive-every 0", "--revive-every"),
    ("train_vq.py --preset huge", "invalid choice"), ("train_vq.py --steps", "expected one argument"),
    ("train_vq.py --out FILE", "a folder to write into expected"), ("train_vq.py --out /proc/run", "to write into expected"),
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
    ("train_ar.py --out RUN/ar --resume --own 0.5", "--own: the run to be resumed has 0.85"),
    ("train_ar.py --out RUN/ar --resume --window 25", "--window: the run to be resumed has 24"),
]


def tree(*folders):
    """What lies in folders: path -> size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for folder in folders
            for path in [folder, *folder.rglob("*")] if path.is_file() or path.parent in folders}


@pytest.fixture
def refused(tiny, trained, elsewhere, capsys):
    """Run a command that must be answered by one line, status 2, and nothing written, whatever it was asked."""
    def check(said, script, *arguments):
        before, _ = tree(elsewhere, trained, tiny), capsys.readouterr()
        status = run(script, *arguments)
        error = capsys.readouterr().err
        assert status == 2, (status, error)
        assert error.startswith("error: ") and error.count("\n") == 1 and error.strip().isprintable(), error
        assert re.search(said, error), error
        assert tree(elsewhere, trained, tiny) == before, "something was written"
    return check


@pytest.mark.parametrize("name", WAVS)
def test_a_bad_wav_is_refused(refused, tiny, trained, tmp_path, name):
    content, said = WAVS[name]
    (tmp_path / "bad.wav").write_bytes(content)
    refused(f"bad.wav: .*({said})", "infer.py", "--data", tiny, "--ar", trained / "ar/best.pt", "--wav", tmp_path / "bad.wav")


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
