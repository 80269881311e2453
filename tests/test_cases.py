"""Folders that people bring, each one fault away from a sound one: what check and training say."""
import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.io import wavfile

import data
from conftest import ROOT
from support import files, metrics
from support.check import check_dataset

SUBJECTS = ("ada", "ben")
NAMES = [f"{subject}_sentence{i:02d}" for subject in SUBJECTS for i in range(1, 11)]


@pytest.fixture(scope="session")
def source(speakers):
    """{subject: (template (50, 3), motion of two clips, (T, 50, 3))} of the synthetic data set."""
    templates = files.read_templates(speakers / "templates.pkl")
    cut = {}
    for subject in SUBJECTS:
        paths = sorted((speakers / "vertices_npy").glob(f"{subject}_*.npy"))[:2]
        vertices = np.concatenate([np.load(path) for path in paths]).reshape(-1, 1350, 3)[:, ::27]
        cut[subject] = templates[subject].reshape(-1, 3)[::27], vertices
    return cut


@pytest.fixture
def make(source, tmp_path):
    """Writes a folder of 20 clips of 50 vertices, whose frames went through change(vertices)."""
    def write(change=lambda vertices: vertices, fps=30, frames=60, called=SUBJECTS, clip="_sentence"):
        folder = tmp_path / "folder"
        for name in ("wav", "vertices_npy"):
            (folder / name).mkdir(parents=True)
        templates = {}
        for subject, name in zip(SUBJECTS, called):
            templates[name], vertices = source[subject]
            for i in range(1, 11):
                stem = f"{name}{clip}{i:02d}"
                np.save(folder / "vertices_npy" / f"{stem}.npy", change(vertices[5 * i:5 * i + frames]))
                sound = np.random.default_rng(i).normal(0, 3000, int(8000 * frames / fps))
                wavfile.write(folder / "wav" / f"{stem}.wav", 8000, sound.astype(np.int16))
        (folder / "templates.pkl").write_bytes(pickle.dumps(templates))
        return folder
    return write


def describe(folder, encoding="utf-8", **description):
    (folder / "dataset.json").write_text(json.dumps(description), encoding=encoding)
    return folder


def splits(train=NAMES[:16], val=NAMES[16:18], test=NAMES[18:], word="val"):
    return {"train": train, word: val, "test": test}


def change_files(folder, pattern, change):
    for path in sorted(folder.glob(pattern)):
        change(path)
    return folder


def apple_double(folder):
    for path in [*folder.glob("wav/*"), *folder.glob("vertices_npy/*")]:
        path.with_name("._" + path.name).write_bytes(b"\0\5\x16\7" + bytes(60))
    return folder


def pointer(folder, name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 54128\n"
    (folder / name).write_text(text, "utf-8")
    return folder


def spoil_frame(folder, value, frames=1):
    path = folder / "vertices_npy" / "ada_sentence03.npy"
    vertices = np.load(path)
    vertices[20:20 + frames] = value
    np.save(path, vertices)
    return folder


def turn(vertices):
    """The head turns by 17 degrees and drifts by 3 cm."""
    angle = np.linspace(0, 0.3, len(vertices))[:, None]
    x, y, z = np.moveaxis(vertices, 2, 0)
    turned = [x * np.cos(angle) + z * np.sin(angle), y, z * np.cos(angle) - x * np.sin(angle)]
    return np.stack(turned, axis=2) + 0.1 * angle[..., None]


def capture_noise(vertices):
    """What a tracker leaves: 0.2 mm a vertex, 0.3 mm of the head. It is no fault."""
    rng = np.random.default_rng(0)
    return (vertices + rng.normal(0, 0.0002, vertices.shape)
            + np.cumsum(rng.normal(0, 0.0001, (len(vertices), 1, 3)), axis=0))


def text_order(vertices):
    return vertices[np.array(sorted(range(len(vertices)), key=str))]


def still(vertices):
    return np.repeat(vertices[:1], len(vertices), axis=0)


LOST = r"lost or spiked frames, .*\(ada_sentence03 frame 20"

# case: (its folder, what check finds, the error of training), None: nothing
FAULTS = {
    "sound": (lambda make: make(), None, None),
    "sound, named": (lambda make: describe(make(), fps=30, splits=splits()), None, None),
    "capture noise": (lambda make: make(capture_noise), None, None),
    "splits half wrong": (
        lambda make: describe(make(), splits=splits([*NAMES[:7], *map(str.upper, NAMES[7:16])])),
        "train: 9 of 16 names match no clip", "9 of 16 names .* ADA_SENTENCE08, .* correct them"),
    "splits name other words": (
        lambda make: describe(make(), splits=splits(word="valid")),
        "found train, valid, test", "found train, valid, test"),
    "splits with endings": (
        lambda make: describe(make(), splits=splits([n + ".npy" for n in NAMES[:16]],
                                                    [n + ".WAV" for n in NAMES[16:18]])), None, None),
    "files of macOS": (lambda make: apple_double(make()), None, None),
    "capital .WAV": (lambda make: change_files(
        make(), "wav/*", lambda path: path.rename(path.with_suffix(".WAV"))), None, None),
    "no underscore": (lambda make: make(clip="-"), None, None),
    "longest template": (lambda make: make(called=("ad", "ada")), None, None),
    "no template": (lambda make: change_files(
        make(), "*/ben_sentence04.*", lambda path: path.rename(str(path).replace("ben_", "eve_"))),
        r"named SUBJECT_sentence01.* ada, ben: 1 \(eve_sentence04\)", "clip eve_sentence04: .* ada, ben"),
    "npy is a pointer": (lambda make: pointer(make(), "vertices_npy/ben_sentence09.npy"),
                         "ben_sentence09.npy: .*run `git lfs pull`", "run `git lfs pull`"),
    "templates are a pointer": (lambda make: pointer(make(), "templates.pkl"),
                                "run `git lfs pull`", "run `git lfs pull`"),
    "json is a pointer": (lambda make: pointer(make(), "dataset.json"),
                          "run `git lfs pull`", "run `git lfs pull`"),
    "mesh is a pointer": (lambda make: pointer(make(), "mesh.obj"),
                          "run `git lfs pull`", "run `git lfs pull`"),
    "byte order mark": (lambda make: describe(make(), "utf-8-sig", fps=30), None, None),
    "umlauts": (lambda make: make(called=("Jürgen", "Zoë")), None, None),
    "lost frame": (lambda make: spoil_frame(make(), 0), LOST, None),
    "three lost frames": (lambda make: spoil_frame(make(), 0, 3), LOST, None),
    "spiked frame": (lambda make: spoil_frame(make(), 7.0), LOST, None),
    "still": (lambda make: make(still), "no motion, all frames are alike: .* 20 ", None),
    "text order": (lambda make: make(text_order), "far larger than a face makes.*frame2 before", None),
    "random order": (lambda make: make(np.random.default_rng(0).permutation),
                     "far larger than a face makes", None),
    "head pose": (lambda make: make(turn), "head motion larger than the face's.* 20 ", None),
    "odd frame rate": (lambda make: make(fps=27.6), "27.6 frames per second of sound: .24, 25,", None),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.filterwarnings("error")
def test_check_and_training_say_what_is_wrong(make, name):
    fault, finding, refusal = FAULTS[name]
    folder = fault(make)
    findings, summary = check_dataset(folder)
    if finding is None:
        assert findings == [] and "16 train, 2 val, 2 test" in summary[0]
    else:
        assert len(findings) == 1, findings             # and no other fault is made up
        assert re.search(finding, findings[0]), findings
    if refusal is None:
        assert len(data.open_data(folder).splits["train"]) == 16
    else:
        with pytest.raises(ValueError, match=refusal) as error:
            data.open_data(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, 7.0])
def test_one_frame_cannot_move_the_scale(make, value):
    folder = make()
    scale = data.open_data(folder).scale
    spoiled = data.open_data(spoil_frame(folder, value))
    assert spoiled.scale == pytest.approx(scale, rel=0.01)
    assert any("leaves out ada_sentence03 frame 20," in line for line in spoiled.warnings)


def test_clips_in_no_split_are_mentioned(make):
    folder = describe(make(), splits=splits(NAMES[:10]))
    assert any("splits: 6 clips are in none: ben_" in line for line in data.open_data(folder).warnings)


@pytest.mark.parametrize("true, seconds, cut, expected", [
    (24, 8, 0, 24), (25, 8, 0, 25), (30, 3, 0, 30), (50, 8, 0, 50), (60, 3, 0, 60),
    (30, 1.5, 0, 30), (30000 / 1001, 1.5, 0, 30000 / 1001),
    (30000 / 1001, 60, 0, 30000 / 1001), (24000 / 1001, 60, 0, 24000 / 1001),
    (30, 4, 2, 30),             # motion ends two frames before the sound
    (27.6, 8, 0, None), (20, 8, 0, None), (29, 10, 0, None)])
def test_usual_frame_rates_come_first(true, seconds, cut, expected):
    """Decided by the longest clips: the short ones, of half a second, lose most of a frame."""
    longest = [(int(seconds * true) - cut, seconds)] * 10
    fps, is_usual = data.find_fps(longest + [(int(0.49 * true), 0.49)] * 30)
    assert is_usual == (expected is not None)
    assert fps == pytest.approx(expected or true, rel=1e-9 if expected else 0.02)


def test_wrong_audio_is_another_subjects_where_each_has_one_clip():
    """Ben's generated displacement on Ada's face, and the other way round."""
    rng = np.random.default_rng(0)
    templates = {"ada": np.zeros(6), "ben": np.full(6, 5.0)}
    clips = [data.Clip("ada_1", "ada", 4), data.Clip("ben_1", "ben", 4)]
    gt = rng.normal(size=(2, 4, 6))                     # displacements
    faces = SimpleNamespace(
        to_mm=None, fps=30, lips=[0], upper_face=[1], eye_gap=None, brow=None, templates=templates,
        vertices=lambda motion, subject: (motion + templates[subject]).reshape(-1, 2, 3),
        lip_gap_curve=lambda vertices: vertices[:, 0, 1],
        frames=lambda clip: faces.vertices(gt[int(clip.subject == "ben")], clip.subject))
    result = metrics.compute_metrics(faces, clips, gt)
    expected = np.square(gt[0, :, :3] - gt[1, :, :3]).sum(axis=1).mean()
    assert result["lve"] == 0 and result["lve_wrong_audio"] == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_metrics_of_motion_that_stands_still_are_nan_without_a_warning(make):
    dataset = data.open_data(make(lambda vertices: still(np.round(vertices, 2))))
    clips = dataset.splits["val"]
    dataset.frames = lambda clip: np.zeros((clip.frames, 50, 3), np.float32)
    result = metrics.compute_metrics(dataset, clips, [dataset.motion(clip) for clip in clips])
    assert np.isnan([result[name] for name in ("r2", "variance_ratio", "upper_wasserstein")]).all()


@pytest.mark.parametrize("r2, step, expected", [
    (-3, 150, True), (float("nan"), 100, True), (0.9, 150, False), (-3, 2, False)])
def test_hopeless_reconstruction_leads_to_check(capsys, r2, step, expected):
    healthy = {"r2": r2, "lve": 1, "lve_wrong_audio": 9, "perplexity": 100, "variance_ratio": 1}
    metrics.warn_if_collapsed(healthy, 256, step, uses_audio=False)
    assert ("run python data.py check FOLDER" in capsys.readouterr().out) == expected


# ---------- surroundings


def has_unstated_encoding(call):
    """Of an ast.Call: it reads or writes text in whatever encoding this computer prefers."""
    constants = {node.value for node in ast.walk(call) if isinstance(node, ast.Constant)}
    keywords = {keyword.arg for keyword in call.keywords}
    if "encoding" in keywords or constants & {"utf-8", "utf-8-sig", "ascii"}:
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not constants & {"rb", "wb"}
    return getattr(call.func, "attr", "") in ("read_text", "write_text") or "text" in keywords


@pytest.mark.parametrize("code, unstated", [
    ("open(path)", True), ("path.write_text(text)", True),
    ("subprocess.run(command, text=True)", True), ("open(path, 'rb')", False),
    ("path.read_text('utf-8')", False), ("open(path, 'w', encoding='utf-8')", False)])
def test_unstated_encodings_are_seen(code, unstated):
    assert has_unstated_encoding(ast.parse(code).body[0].value) == unstated


def test_every_text_file_is_read_and_written_with_a_stated_encoding():
    """Windows and old Linux consoles have others than UTF-8."""
    sources = {path: path.read_text("utf-8") for folder in (".", "support", "tests", "notebooks")
               for path in (ROOT / folder).glob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                code = re.sub(r"^(\s*)[!%].*", r"\1pass", "".join(cell["source"]), flags=re.M)
                sources[path, number] = code
    silent = [f"{path}: {ast.unparse(node)}" for path, code in sources.items()
              for node in ast.walk(ast.parse(code))
              if isinstance(node, ast.Call) and has_unstated_encoding(node)]
    assert silent == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_console_encoding_stops_a_log_line(make, encoding):
    folder = make(called=("Jürgen", "Łucja"))
    (folder / "wav" / "Łucja_sentence05.wav").unlink()
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-B", ROOT / "data.py", "check", folder],
                          env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")
    assert rb"motion without sound: add wav/NAME.wav, or remove it: 1 (\u0141ucja" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_synthetic_data_are_made_alike_by_every_start_method(speakers, tmp_path, method):
    """spawn is that of Windows and macOS."""
    (tmp_path / "script.py").write_text(f"""
import multiprocessing, sys
sys.path.insert(0, {str(ROOT)!r})
from support import speakers
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    speakers.SUBJECTS = {{"train": ["ada"]}}
    speakers.SENTENCES = {{"train": range(1, 3)}}
    speakers.build_speakers("made")
""", "utf-8")
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)
    for name in ("vertices_npy/ada_sentence01.npy", "wav/ada_sentence02.wav"):
        assert (tmp_path / "made" / name).read_bytes() == (speakers / name).read_bytes()


@pytest.mark.slow
def test_a_read_only_checkout_works_from_another_folder(make, tmp_path):
    """Nothing is written into it, and what is copied out of it can be written."""
    folder, checkout, elsewhere = make(), tmp_path / "checkout", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.*"), *ROOT.glob("tests/*.py")]:
        copy = checkout / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        copy.chmod(0o444)
    there = sorted(checkout.rglob("*"))
    tiny = ["--data", folder, "--steps", "1", "--batch-size", "2"]
    for script, *flags in (("data.py", "check", folder), ("train_vq.py", *tiny), ("train_ar.py", *tiny),
                           ("infer.py", "--data", folder), ("tests/exercises.py", "write", "a.py"),
                           ("tests/exercises.py", "assemble", "a.py")):
        subprocess.run([sys.executable, "-B", checkout / script, *flags], cwd=elsewhere, check=True)
    assert sorted(checkout.rglob("*")) == there
    assert sorted(path.name for path in elsewhere.iterdir()) == ["a.py", "mine", "runs", "talk.html"]
    assert (elsewhere / "mine" / "codetalker.py").stat().st_mode & 0o200
