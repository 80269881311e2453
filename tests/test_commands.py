"""The three commands on a tiny data set and a tiny budget, as README has them, and what they do with mistakes."""
import base64
import json
import pickle
import runpy
import shutil
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch
from PIL import Image

import codetalker
import data
from conftest import ROOT, browse

BUDGET = "--batch 2 --window 16 --log-every 1 --eval-every 2".split()


def run(script, *arguments):
    """`python SCRIPT ARGUMENTS` within this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands are run from an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def train(speakers, folder, stage, steps, *more):
    before = ["--codes", 16, "--revive-every", 2] if stage == "vq" else ["--vq", folder.parent / "whole_vq" / "best.pt"]
    assert run(f"train_{stage}.py", "--data", speakers, "--out", folder, "--steps", steps, *BUDGET, *before, *more) == 0


@pytest.fixture(scope="module")
def runs(speakers, tmp_path_factory):
    """Both stages, four steps each, in runs/whole_vq and runs/whole_ar."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("vq", "ar"):
        train(speakers, folder / f"whole_{stage}", stage, 4)
    return folder


@pytest.fixture(scope="module")
def infer(speakers, runs):
    """infer.py with these data and this checkpoint."""
    return lambda *arguments: run("infer.py", "--data", speakers, "--ar", runs / "whole_ar" / "best.pt", *arguments)


@pytest.fixture
def speech(tmp_path):
    """0.41 s of noise, 8 bit, stereo, 11025 Hz: 12 whole frames."""
    with wave.open(str(tmp_path / "noise.wav"), "wb") as file:
        file.setparams((2, 1, 11_025, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(64, 192, 2 * int(0.41 * 11_025), dtype=np.uint8).tobytes())
    return tmp_path / "noise.wav"


# ----------------------------------------------------------------------------------------------------------- training


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.parametrize("stage", ["vq", "ar"])
def test_two_steps_and_two_resumed_are_four_bit_for_bit(speakers, runs, stage):
    halves = runs / f"halves_{stage}"
    train(speakers, halves, stage, 2)
    train(speakers, halves, stage, 4, "--resume")
    whole, resumed = (torch.load(folder / "last.pt", weights_only=True) for folder in (runs / f"whole_{stage}", halves))
    assert whole["step"] == 4 and [row["step"] for row in whole["rows"]] == [1, 2, 3, 4]
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert same(whole[name], resumed[name]), name


@pytest.mark.parametrize("stage, losses", [("vq", {"motion", "vq"}), ("ar", {"motion", "feature"})])
def test_training_writes_checkpoints_and_figures(runs, stage, losses):
    folder = runs / f"whole_{stage}"
    assert {path.name for path in folder.iterdir()} == {"best.pt", "last.pt", "figures.json", "loss.png"}
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["flags"]["steps"] == 4 and len(figures["rows"]) == 4
    assert all(losses <= row.keys() and ("validation" in row) == (row["step"] in (2, 4)) for row in figures["rows"])
    best = torch.load(folder / "best.pt", weights_only=True)
    merit = {"vq": lambda figures: figures["r2"], "ar": lambda figures: -figures["lve"] / figures["lve_swapped"]}[stage]
    rows = [row for row in figures["rows"] if "validation" in row]
    assert best["step"] == max(rows, key=lambda row: merit(row["validation"]))["step"]
    assert Image.open(folder / "loss.png").size[0] > 500


def test_stage2_keeps_the_stage1_it_was_given(runs):
    given, kept = (torch.load(runs / folder / "best.pt", weights_only=True)["weights"] for folder in ("whole_vq", "whole_ar"))
    assert all(torch.equal(value, kept[f"autoencoder.{name}"]) for name, value in given.items())


# ------------------------------------------------------------------------------------------------------------ infer.py


@pytest.mark.parametrize("ending", ["html", "npy", "obj", "png", "gif", "mp4"])
def test_a_wav_becomes_any_of_the_endings(infer, speech, elsewhere, ending):
    if ending == "mp4" and not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg")
    assert infer("--wav", speech, "--style", "ada:0.3,ben:0.9", "--subject", "dan", "--out", f"talk.{ending}") == 0
    written = sorted(path.name for path in elsewhere.iterdir())
    assert written == ([f"talk_{frame:04d}.obj" for frame in range(12)] if ending == "obj" else [f"talk.{ending}"])
    path, face = elsewhere / written[0], data.build_face()
    if ending == "npy":
        vertices = np.load(path)
        assert vertices.dtype == np.float32 and vertices.shape == (12, face.template.size)
        assert np.abs(vertices).max() < 0.2 and np.isfinite(vertices).all()     # metres: a head
    elif ending == "obj":
        assert infer("--wav", speech, "--style", "ben:3,ada", "--subject", "dan", "--out", "same.npy") == 0
        lines = [line.split() for line in path.read_text().splitlines()]
        places = np.array([line[1:] for line in lines if line[0] == "v"], float)
        corners = np.array([line[1:] for line in lines if line[0] == "f"], int)
        assert np.array_equal(corners - 1, face.triangles)
        np.testing.assert_allclose(places.ravel(), np.load("same.npy")[0], atol=1e-6)
    elif ending == "html":
        page = path.read_text()
        assert "http://" not in page and "https://" not in page and "noise" in page
    elif ending == "mp4":
        told = subprocess.run(["ffmpeg", "-hide_banner", "-i", str(path)], capture_output=True, text=True).stderr
        assert "Video:" in told and "Audio:" in told and "30 fps" in told
    else:
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20          # more than a blank sheet
            durations = [image.seek(i) or image.info.get("duration", 0) for i in range(getattr(image, "n_frames", 1))]
            assert sum(durations) == (400 if ending == "gif" else 0)            # ms; equal frames are joined


def test_the_page_passes_its_self_test_in_a_browser(infer, elsewhere, tmp_path):
    """It seeks to three moments and puts PASS into its title if three different pictures come of it."""
    assert infer() == 0                                                         # a test clip beside its truth
    page = browse(elsewhere / "talk.html", tmp_path / "profile")
    assert "<title>PASS" in page, page[:200]
    assert page.count("<canvas") == 4                                           # two heads, the sound, the codes


def test_the_page_shows_every_vertex_within_a_tenth_of_a_millimetre(infer, speakers, elsewhere):
    """It holds mean + weights @ basis in head radii; the second face is the truth, known from the data set."""
    assert infer() == 0
    page = json.loads((elsewhere / "talk.html").read_text().split('type="application/json">')[1].split("</script>")[0])
    clip = data.DataSet(speakers).splits["test"][0]
    true = np.load(speakers / "vertices_npy" / f"{clip.name}.npy").astype(float)
    mean, basis, weights = (np.frombuffer(base64.b64decode(page["faces"][1][name]), kind).astype(float)
                            for name, kind in (("mean", "f4"), ("basis", "i2"), ("weights", "f4")))
    shown = mean + weights.reshape(clip.frames, -1) @ basis.reshape(-1, mean.size)
    shown, true = shown.reshape(clip.frames, -1, 3), true.reshape(clip.frames, -1, 3)
    shown *= np.ptp(true.mean(0)[:, 1]) / 2
    error = (shown - shown[0, 0]) - (true - true[0, 0])                         # wherever the page puts the middle
    assert np.linalg.norm(error, axis=2).max() < 2e-4                           # two vertices, 0.1 mm each
    audio = np.frombuffer(base64.b64decode(page["audio"])[44:], np.int16)
    stored = data.wavfile.read(speakers / "wav" / f"{clip.name}.wav")[1]
    assert np.abs(audio[:len(stored)].astype(int) - stored[:len(audio)]).max() <= 1


def test_a_take_is_another_face_for_the_same_words_and_the_same_once_more(infer, speech, elsewhere):
    for name, flags in (("a", []), ("b", ["--take", 0]), ("c", ["--take", 1]), ("d", ["--take", 1, "--temperature", 0]),
                        ("e", ["--temperature", 0])):
        assert infer("--wav", speech, "--out", f"{name}.npy", *flags) == 0
    a, b, c, d, e = (np.load(f"{name}.npy") for name in "abcde")
    assert np.array_equal(a, b) and not np.array_equal(a, c) and np.array_equal(d, e) and not np.array_equal(a, e)


def test_test_writes_the_figures_of_the_motions_it_writes(infer, speakers, runs):
    """The test subject is a stranger, so test.json holds means over both styles; the motions are in the first.
    The lip error is worked out anew from what infer.py makes of each clip's wav in each style."""
    assert infer("--test", "--temperature", 0, "--out", "motions") == 0
    dataset, errors = data.DataSet(speakers), []
    for clip in dataset.splits["test"]:
        true = np.load(speakers / "vertices_npy" / f"{clip.name}.npy")
        for style in ("ada", "ben"):
            assert infer("--wav", speakers / "wav" / f"{clip.name}.wav", "--subject", clip.subject, "--style", style,
                         "--temperature", 0, "--out", f"{style}.npy") == 0
            error = np.square(np.load(f"{style}.npy") - true).reshape(clip.frames, -1, 3)[:, dataset.lips].sum(2)
            errors += error.max(1).tolist()                                     # of every frame
        np.testing.assert_allclose(np.load(f"motions/{clip.name}.npy"), np.load("ada.npy"), atol=1e-6)
    figures = json.loads((runs / "whole_ar" / "test.json").read_text())["test"]
    assert figures["lve"] == pytest.approx(1e6 * np.mean(errors), rel=1e-3)     # mm2


# --------------------------------------------------------------------------------------------------- the paper's data


@pytest.fixture
def recorded(tmp_path):
    """The released code's small models, as files; and what was recorded from them."""
    found = torch.load(ROOT / "tests" / "official.pt", weights_only=True)["vocaset"]
    for stage in (1, 2):
        torch.save({"state_dict": found[f"stage{stage}_state_dict"]}, tmp_path / f"stage{stage}.pth.tar")
    return found


@pytest.mark.parametrize("preset", ["lite", "vocaset"])
def test_vocaset_goes_through_the_three_commands(vocaset, recorded, tmp_path, monkeypatch, capsys, preset):
    """As downloaded (two sentences missing), converted, trained on with both presets, the published one at a toy size,
    and tested by the paper's protocol."""
    toy1, toy2 = codetalker.PRESETS["vocaset"]
    toy1, toy2 = toy1 | dict(width=32, layers=1, heads=2, hidden=24, slots=4, code_width=8), toy2 | dict(width=16, layers=1)
    monkeypatch.setitem(codetalker.PRESETS, "vocaset", (toy1, toy2))
    torch.save({name.removeprefix("audio_encoder."): tensor for name, tensor in recorded["stage2_state_dict"].items()
                if name.startswith("audio_encoder.")}, "pytorch_model.bin")
    small = ["--data", vocaset, "--preset", preset, "--steps", 2, "--batch", 2, "--eval-every", 2]
    assert run("train_vq.py", *small, "--out", "vq", "--codes", 16) == 0
    hears = [] if preset == "lite" else ["--wav2vec2", "pytorch_model.bin"]
    assert run("train_ar.py", *small, *hears, "--vq", "vq/best.pt", "--out", "ar") == 0
    assert run("infer.py", "--data", vocaset, "--ar", "ar/best.pt", "--test") == 0
    dataset, state = data.DataSet(vocaset), torch.load("ar/best.pt", weights_only=True)
    frames = sum(clip.frames for clip in dataset.splits["test"])
    assert f"2 clips, {frames} frames, 5023 vertices ({len(dataset.lips)} lip, " in capsys.readouterr().out
    subjects = ["FaceTalk_170728_03272_TA", "FaceTalk_170904_00128_TA", "FaceTalk_170725_00137_TA"]     # not sorted
    assert state["data"]["subjects"] == subjects and state["weights"]["style"].shape[0] == 3
    published = preset == "vocaset"
    assert state["ar_config"]["history"] == ("motion" if published else "codes")
    assert (state["data"]["scale"] == 1) == state["vq_config"]["instance_norm"] == published
    if published:       # trained on from the file, but for its convolutions
        named = "audio_encoder.convs.1.weight", "feature_extractor.conv_layers.1.conv.weight"
        assert torch.equal(state["weights"][named[0]], torch.load("pytorch_model.bin", weights_only=True)[named[1]])
        moved = state["weights"]["audio_encoder.project.weight"] - torch.load(
            "pytorch_model.bin", weights_only=True)["feature_projection.projection.weight"]
        assert 0 < moved.abs().max() < 0.01


def test_released_checkpoints_animate_a_face_of_which_only_the_template_is_there(recorded, speech, tmp_path, capsys):
    faces = tmp_path / "faces"
    faces.mkdir()
    template = recorded["template"].reshape(20, 3).numpy()
    (faces / "templates.pkl").write_bytes(pickle.dumps({"zoe": template + 1, "kim": template}))
    (faces / "mesh.obj").write_text("v 0 0 0\n" * 20 + "f 1 2 3\nf 3/1 2/1 4/1\n")
    released = tmp_path / "stage1.pth.tar", tmp_path / "stage2.pth.tar"
    start = ["--released", *released, "--data", faces, "--wav", speech]
    assert run("infer.py", *start, "--style", "1:1,2:3", "--out", "face.npy") == 0
    assert run("infer.py", *start, "--subject", "zoe", "--out", "face.obj") == 0

    model = codetalker.import_released(*released)
    audio = torch.from_numpy(data.read_wav(speech))
    frames = codetalker.frames_in(len(audio), 30, model.config)
    wave = codetalker.prepare(audio, 30, frames, model.config)
    motion, _ = model.generate([wave], torch.tensor([[0, 0.25, 0.75]]), torch.tensor([frames]))
    np.testing.assert_allclose(np.load("face.npy"), motion[0] + recorded["template"], atol=1e-5)
    assert "f 3 2 4" in open("face_0000.obj").read()
    capsys.readouterr()
    assert run("infer.py", *start, "--temperature", 0.5, "--out", "warm.npy") == 2
    assert "--temperature: 0 expected" in capsys.readouterr().err
    assert run("infer.py", *start[:2], released[0], *start[3:], "--out", "face.npy") == 2           # stage 1 twice
    assert "stage1.pth.tar: a released checkpoint of stage 2 expected" in capsys.readouterr().err
    assert run("infer.py", *start, "--out", "face.npy", "--data", tmp_path) == 2
    assert "templates.pkl" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("command", [
    "train_vq.py --data nowhere", "train_vq.py --data DATA --resume",
    "train_ar.py --data DATA --vq VQ --preset vocaset", "train_ar.py --data DATA --vq VQ --preset biwi --wav2vec2 no.bin",
    "infer.py --data DATA --released nowhere nowhere", "infer.py --data nowhere --released VQ AR --wav nowhere.wav",
    "train_ar.py --data DATA --vq nowhere.pt", "train_ar.py --data DATA --vq AR", "train_ar.py --data DATA --vq VQ --resume",
    "infer.py --data DATA --ar nowhere.pt", "infer.py --data DATA --ar VQ", "infer.py --data nowhere --ar AR",
    "infer.py --data DATA --ar AR --wav nowhere.wav", f"infer.py --data DATA --ar AR --wav {__file__}",
    "infer.py --data DATA --ar AR --style nobody", "infer.py --data DATA --ar AR --style ada:much",
    "infer.py --data DATA --ar AR --style ada:0", "infer.py --data DATA --ar AR --subject nobody",
    "infer.py --data DATA --ar AR --out talk.doc", "infer.py --data DATA --ar AR --out no/folder/talk.npy",
    "infer.py --data DATA --ar AR --test --style ada"])
def test_a_mistake_is_answered_by_one_line_and_status_2(speakers, runs, elsewhere, capsys, command):
    places = {"DATA": speakers, "VQ": runs / "whole_vq" / "best.pt", "AR": runs / "whole_ar" / "best.pt"}
    capsys.readouterr()
    assert run(*(places.get(word, word) for word in command.split())) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) > 30
    assert not [path for path in elsewhere.rglob("*") if path.is_file()], "something was written"


def test_a_checkpoint_of_other_data_is_refused(infer, runs, speakers, tmp_path, capsys):
    """The same folder at 25 frames per second."""
    shutil.copytree(speakers, tmp_path / "other")
    described = json.loads((speakers / "dataset.json").read_text()) | {"fps": 25}
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(described))
    assert infer("--data", tmp_path / "other") == 2
    assert "30 frames per second" in capsys.readouterr().err


def test_a_process_of_its_own_ends_so_too(elsewhere):
    told = subprocess.run([sys.executable, "-B", ROOT / "infer.py", "--ar", "nowhere.pt"], capture_output=True, text=True)
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
    assert told.stderr.startswith("error: nowhere.pt") and not list(elsewhere.iterdir())


# ----------------------------------------------------------------------------------------------------------- the trial


def test_the_trial_makes_its_table_of_what_it_trained(speakers, tmp_path, monkeypatch):
    """Two seeds of one row, and a second row on its dictionaries; every cell is the mean of what evaluations found."""
    import trial
    monkeypatch.setattr(trial, "ROWS", {"codes": ("--steps 2", "--steps 2", (0.8, 0.0)),
                                        "own": ("--steps 2", "--steps 2 --own 0", (0.8,))})
    trial.main(trial.parser.parse_args(["--data", str(speakers), "--out", str(tmp_path), "--seeds", "2"]))
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                      for line in (tmp_path / "table.md").read_text().splitlines()]
    assert [row[0] for row in rows] == ["codes", "codes, likeliest", "own"]
    for row, folders, kept in zip(rows, (("codes_0", "codes_1"), ("codes_0", "codes_1"), ("own_0",)),
                                  ("test_0.8.json", "test_0.json", "test_0.8.json")):
        found = [json.loads((tmp_path / folder / kept).read_text()) for folder in folders]
        for column, key in (("LVE", "lve"), ("energy", "energy"), ("codes in use", "codes_used")):
            cell = row[head.index(column)].split(" ±")
            assert float(cell[0]) == pytest.approx(np.mean([figures[key] for figures in found]), rel=0.01, abs=1e-5)
            assert len(cell) == len(found)
    assert sorted(path.name for path in tmp_path.glob("vq*")) == ["vq--steps2_0", "vq--steps2_1"]
    assert Image.open(tmp_path / "figure.png").size[0] > 500
