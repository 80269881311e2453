"""The commands, end to end on a tiny data set: what they write, resuming, and mistakes of the user."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import data
import infer
import train_ar
import train_vq
from conftest import ROOT
from support.command import one_line_errors

SCRIPTS = {"train_vq.py": train_vq, "train_ar.py": train_ar, "infer.py": infer}
TINY = ["--batch-size", "2", "--seq-len", "16", "--eval-every", "2", "--log-every", "1"]


def run(script, *words):
    """A command in this process -> its exit status."""
    module = SCRIPTS[script]
    try:
        with one_line_errors():
            module.main(module.parser.parse_args([str(word) for word in words]))
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.fixture
def tmp_cwd(tmp_path, monkeypatch):
    """An empty folder as working directory."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Two thirds of a second of sound that is neither silent nor steady."""
    t = np.arange(10_667) / 16000
    audio = np.sin(2 * np.pi * 200 * t) * np.sin(2 * np.pi * 3 * t) ** 2
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    wavfile.write(path, 16000, (20000 * audio).astype(np.int16))
    return path


# ---------- training


def test_training_writes_checkpoints_metrics_and_a_picture(runs):
    for stage in ("vq", "ar"):
        names = sorted(path.name for path in (runs / stage).iterdir())
        assert names == ["best.pt", "last.pt", "loss.png", "metrics.json"]
        metrics = json.loads((runs / stage / "metrics.json").read_text("utf-8"))
        assert metrics["test"]["lve"] > 0 and metrics["log"][-1]["val"]["lve"] > 0
        checkpoint = torch.load(runs / stage / "last.pt", weights_only=True)
        assert checkpoint["step"] == metrics["log"][-1]["step"]


@pytest.mark.parametrize("stage", ["vq", "ar"])
@pytest.mark.parametrize("flags, share", [([], 1 / 4), (["--halve-lr-every", 2], 1 / 2)])
def test_learning_rate_of_the_last_step(speakers, runs, tmp_path, stage, flags, share):
    """Of four steps the last has 4 / 20 of warm-up, and 1 / 4 of a straight line, or one halving."""
    flags = [*flags, "--data", speakers, *TINY, "--steps", 4, "--lr", 1e-3, "--out", tmp_path]
    if stage == "ar":
        flags += ["--vq", runs / "vq" / "best.pt"]
    assert run(f"train_{stage}.py", *flags) == 0
    optimiser = torch.load(tmp_path / "last.pt", weights_only=True)["optimiser"]
    assert optimiser["param_groups"][0]["lr"] == pytest.approx(1e-3 * 4 / 20 * share)


@pytest.mark.parametrize("stage", ["vq", "ar"])
def test_resume_is_exact(speakers, runs, tmp_path, stage):
    """Two steps and, resumed, two more leave the same bits as four steps at once."""
    flags = ["--data", speakers, *TINY, "--halve-lr-every", 3]      # whatever --steps is
    if stage == "ar":
        flags += ["--vq", runs / "vq" / "best.pt"]
    assert run(f"train_{stage}.py", *flags, "--out", tmp_path / "once", "--steps", 4) == 0
    assert run(f"train_{stage}.py", *flags, "--out", tmp_path / "twice", "--steps", 2) == 0
    assert run(f"train_{stage}.py", *flags, "--out", tmp_path / "twice", "--steps", 4, "--resume") == 0
    once, twice = (torch.load(tmp_path / name / "last.pt", weights_only=True)
                   for name in ("once", "twice"))
    assert once["step"] == twice["step"] == 4
    for name, weight in once["weights"].items():
        assert torch.equal(weight, twice["weights"][name]), name
    assert torch.equal(once["rng"], twice["rng"]) and once["best"] == twice["best"]


def test_best_is_the_step_of_the_highest_lip_gap_correlation(speakers, runs, tmp_path, monkeypatch):
    """Step 4 of 2, 4, 6, 8 is the best one; after step 6 the run is resumed."""
    correlations = iter([0.3, 0.6, 0.4, 0.0, 0.5, 0.0])     # 0.0: of the test split

    def evaluate(*args):
        return evaluate_generation(*args) | {"gap_correlation": next(correlations)}
    evaluate_generation = train_ar.evaluate_generation
    monkeypatch.setattr(train_ar, "evaluate_generation", evaluate)
    flags = ["--data", speakers, *TINY, "--vq", runs / "vq" / "best.pt", "--out", tmp_path]
    assert run("train_ar.py", *flags, "--steps", 6) == 0
    assert run("train_ar.py", *flags, "--steps", 8, "--resume") == 0
    steps = [torch.load(tmp_path / name, weights_only=True)["step"] for name in ("best.pt", "last.pt")]
    assert steps == [4, 8]


def test_same_seed_same_weights(speakers, tmp_path):
    for name in ("a", "b"):
        assert run("train_vq.py", "--data", speakers, *TINY, "--steps", 2, "--out", tmp_path / name) == 0
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["weights"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------- inference


@pytest.fixture
def infer_cwd(tmp_cwd, runs, speakers):
    """infer.py on the tiny checkpoints, in an empty folder."""
    def call(*words):
        return run("infer.py", "--ar", runs / "ar" / "best.pt", *words)
    return call


def test_a_recording_needs_no_data_folder(infer_cwd, speech, tmp_cwd):
    assert infer_cwd("--wav", speech, "--out", "a.npy") == 0
    vertices = np.load("a.npy")
    assert vertices.shape == (20, 1350 * 3) and vertices.dtype == np.float32
    assert sorted(path.name for path in tmp_cwd.iterdir()) == ["a.npy"]


def test_seed_changes_the_animation_and_temperature_0_does_not_depend_on_it(infer_cwd, speech):
    for name, flags in (("a", []), ("b", ["--seed", 0]), ("c", ["--seed", 1]),
                        ("d", ["--seed", 1, "--temperature", 0]), ("e", ["--temperature", 0])):
        assert infer_cwd("--wav", speech, "--out", f"{name}.npy", *flags) == 0
    a, b, c, d, e = (np.load(f"{name}.npy") for name in "abcde")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.array_equal(d, e) and not np.array_equal(a, e)


def test_page_holds_face_sound_and_no_address(infer_cwd, speakers):
    assert infer_cwd("--data", speakers, "--out", "a.html") == 0
    page = open("a.html", encoding="utf-8").read()
    assert len(page) < 1_500_000
    texts = json.loads((speakers / "dataset.json").read_text("utf-8"))["texts"]
    assert f'"title": "{texts["dan_sentence06"]}"' in page          # the words, not the clip's name
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("</script>") == len(re.findall(r"<script", page))


def test_a_title_cannot_end_the_script_element(infer_cwd, speech, tmp_path):
    path = tmp_path / "a</script><b>.wav".replace("/", "\u2215")
    shutil.copy(speech, path)
    assert infer_cwd("--wav", path, "--out", "a.html") == 0
    assert "<b>" not in open("a.html", encoding="utf-8").read()


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".gif", b"GIF8"), (".glb", b"glTF")])
def test_pictures_and_glb_are_written(infer_cwd, speech, suffix, start):
    assert infer_cwd("--wav", speech, "--out", f"a{suffix}") == 0
    assert open(f"a{suffix}", "rb").read(4) == start


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")
def test_mp4_has_picture_and_sound(infer_cwd, speech):
    assert infer_cwd("--wav", speech, "--out", "a.mp4") == 0
    command = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_type", "-of", "csv", "a.mp4"]
    streams = subprocess.run(command, capture_output=True, encoding="utf-8").stdout
    assert "video" in streams and "audio" in streams


def test_chunks_decode_to_the_same_motion_where_they_do_not_overlap(monkeypatch):
    """A decoder that looks one frame back: chunks differ from the full sequence nowhere but at their
    starts, which fade in."""
    class Model:
        def decode(self, codes):
            return codes.float().cumsum(1).clamp(max=3.0)

    monkeypatch.setattr(infer, "CHUNK", 10)
    monkeypatch.setattr(infer, "OVERLAP", 4)
    codes = torch.ones(1, 31, 2)
    motion = infer.decode_in_chunks(Model(), codes)
    assert motion.shape == (1, 31, 2)
    full = Model().decode(codes)
    fading = {6, 7, 12, 13, 18, 19, 24, 25}          # where a chunk's sum has not reached 3 yet
    for t in range(31):
        assert torch.equal(motion[0, t], full[0, t]) == (t not in fading), t


def test_metrics_of_test_are_those_of_the_motion_it_writes(infer_cwd, speakers, runs):
    """The test subject is unseen, so test.json has means over both styles."""
    assert infer_cwd("--test", "--data", speakers, "--temperature", 0, "--out", "motions") == 0
    dataset = data.open_data(speakers)
    errors = []
    for clip in dataset.splits["test"]:
        gt = dataset.frames(clip)
        for style in ("ada", "ben"):
            assert infer_cwd("--wav", dataset.wavs[clip.name], "--subject", clip.subject, "--style",
                             style, "--temperature", 0, "--out", f"{style}.npy") == 0
            pred = np.load(f"{style}.npy").reshape(gt.shape)
            errors += np.square(pred - gt)[:, dataset.lips].sum(axis=2).max(axis=1).tolist()
        written = np.load(f"motions/{clip.name}.npy")
        np.testing.assert_allclose(written, np.load("ada.npy"), atol=1e-5)
    metrics = json.loads(Path("motions/test.json").read_text("utf-8"))["test"]
    assert metrics["lve"] == pytest.approx(1e6 * np.mean(errors), rel=1e-3)     # mm2


# ---------- mistakes: one line on stderr, status 2, nothing written

MISTAKES = {
    "no such folder": "train_vq.py --data nowhere",
    "nothing to resume": "train_vq.py --data DATA --resume",
    "steps 0": "train_vq.py --data DATA --steps 0",
    "lr is no number": "train_vq.py --data DATA --lr fast",
    "unknown flag": "train_vq.py --data DATA --learning-rate 1",
    "no such device": "train_vq.py --data DATA --device tpu9",
    "folder is a file": "train_vq.py --data DATA --out FILE",
    "no checkpoint": "train_ar.py --data DATA --vq nowhere.pt",
    "checkpoint of stage 2": "train_ar.py --data DATA --vq AR",
    "checkpoint is text": "train_ar.py --data DATA --vq FILE",
    "nothing to resume, stage 2": "train_ar.py --data DATA --vq VQ --resume",
    "sampling prob 2": "train_ar.py --data DATA --vq VQ --sampling-prob 2",
    "preset without wav2vec2": "train_ar.py --data DATA --vq VQ --preset vocaset",
    "no stage-2 checkpoint": "infer.py --ar nowhere.pt",
    "checkpoint of stage 1": "infer.py --ar VQ --wav WAV",
    "no such wav": "infer.py --ar AR --wav nowhere.wav",
    "wav is text": "infer.py --ar AR --wav FILE",
    "wav without sound": "infer.py --ar AR --wav EMPTY",
    "wav with NaN": "infer.py --ar AR --wav NAN",
    "unknown style": "infer.py --ar AR --wav WAV --style nobody",
    "weight is a word": "infer.py --ar AR --wav WAV --style ada:much",
    "weight 0": "infer.py --ar AR --wav WAV --style ada:0",
    "unknown subject": "infer.py --ar AR --wav WAV --subject nobody",
    "unknown ending": "infer.py --ar AR --wav WAV --out talk.doc",
    "out is a folder": "infer.py --ar AR --wav WAV --out FOLDER",
    "test with a style": "infer.py --ar AR --data DATA --test --style ada",
    "data of another fps": "infer.py --ar AR --data FPS25",
    "data of another mesh": "infer.py --ar AR --data MESH",
    "resume with another seed": "train_vq.py --data DATA --out RUN --resume --seed 7 --steps 9",
    "released without a file": "infer.py --released nowhere nowhere --data DATA --wav WAV",
}


@pytest.fixture(scope="session")
def places(speakers, runs, speech, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "text").write_text("this is no such file", "utf-8")
    (folder / "folder.npy").mkdir()
    wavfile.write(folder / "empty.wav", 16000, np.zeros(0, np.int16))
    wavfile.write(folder / "nan.wav", 16000, np.full(9000, np.nan, np.float32))
    for name, change in (("fps25", {"fps": 25}), ("mesh", {})):
        shutil.copytree(speakers, folder / name)
        path = folder / name / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    from test_data import damage_frames
    damage_frames(lambda frames, templates, path: frames[:, :-3])(folder / "mesh")
    return {"DATA": speakers, "VQ": runs / "vq" / "best.pt", "AR": runs / "ar" / "best.pt",
            "RUN": runs / "vq", "WAV": speech, "FILE": folder / "text", "FOLDER": folder / "folder.npy",
            "EMPTY": folder / "empty.wav", "NAN": folder / "nan.wav", "FPS25": folder / "fps25",
            "MESH": folder / "mesh"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line(places, tmp_cwd, capsys, name):
    words = [places.get(word, word) for word in MISTAKES[name].split()]
    capsys.readouterr()
    assert run(*words) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and len(stderr) > 30
    assert not [path for path in tmp_cwd.rglob("*") if path.is_file()], "something was written"


def test_a_process_of_its_own_ends_so_too(tmp_cwd):
    command = [sys.executable, "-B", ROOT / "infer.py", "--ar", "nowhere.pt", "--wav", "nowhere.wav"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: nowhere") and not list(tmp_cwd.iterdir())


# ---------- slow


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(speakers, tmp_path):
    """Killed at a random moment after its first checkpoint, the run goes on to the same bits."""
    flags = ["--data", speakers, *TINY, "--steps", "12"]
    assert run("train_vq.py", *flags, "--out", tmp_path / "once") == 0
    command = [sys.executable, ROOT / "train_vq.py", *flags, "--out", tmp_path / "killed"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(map(str, command), env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run("train_vq.py", *flags, "--out", tmp_path / "killed", "--resume") == 0
    once, killed = (torch.load(tmp_path / name / "last.pt", weights_only=True)["weights"]
                    for name in ("once", "killed"))
    assert all(torch.equal(once[name], killed[name]) for name in once)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_checkpoints_end_in_one_line(runs, speech, tmp_cwd, capsys, damage):
    content = bytearray((runs / "ar" / "best.pt").read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(20):
        broken = content.copy()
        if damage == "cut":
            broken = broken[:rng.integers(len(broken))]
        else:
            broken[rng.integers(min(4000, len(broken)))] ^= 1 << rng.integers(8)
        open("broken.pt", "wb").write(broken)
        capsys.readouterr()
        status = run("infer.py", "--ar", "broken.pt", "--wav", speech, "--out", "a.npy")
        stderr = capsys.readouterr().err
        assert status == 0 or status == 2 and stderr.count("\n") == 1


@pytest.mark.slow
def test_page_tests_itself_in_a_browser(infer_cwd, speakers, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium")
    assert infer_cwd("--data", speakers, "--out", tmp_path / "a.html") == 0
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
             "--disable-background-networking --disable-component-update --disable-sync "
             "--virtual-time-budget=4000 --dump-dom").split()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    address = (tmp_path / "a.html").as_uri() + "#selftest"
    dom = subprocess.run([browser, *flags, profile, address], capture_output=True, encoding="utf-8",
                         timeout=90).stdout
    assert "<title>PASS" in dom, re.search("<title>.*", dom)
