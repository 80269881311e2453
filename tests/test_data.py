"""Speakers, reader and metrics against loops, hand-worked cases and the wave module of Python."""
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import wave
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.spatial import cKDTree

import data
import infer
from conftest import ROOT, SPOKEN, python2_pickle

RNG = np.random.default_rng


# ------------------------------------------------------------------------------------------------------------ metrics


def test_lip_vertex_errors_and_energy_by_loop():
    made, true, lips = *RNG(0).normal(size=(2, 6, 5, 3)), [1, 3, 4]
    worst = [max(sum((made[t, v, k] - true[t, v, k]) ** 2 for k in range(3)) for v in lips) for t in range(6)]
    np.testing.assert_allclose(data.lip_vertex_errors(made, true, lips), worst)
    spread = [np.mean((made[:, v, k] - np.mean(made[:, v, k])) ** 2) for v in range(5) for k in range(3)]
    assert data.energy(made) == pytest.approx(sum(spread) / 5)


def test_dynamics_by_hand():
    """Vertex 1 is displaced by (3, 4, 0), then not: squared 25 and 0, deviation 12.5. Vertex 2 stays, so 0.
    Over the two of them 6.25; vertex 0 does not count."""
    motion = np.zeros((2, 3, 3))
    motion[0, 1], motion[1, 0] = (3, 4, 0), (9, 9, 9)
    assert data.dynamics(motion, [1, 2]) == 6.25


def a_set(faces, millimetres=None):
    """As much of a data set as score() asks for: clips of one subject, whose face at rest is all zeros; vertex 0 is
    the lips, vertex 1 the upper face."""
    clips = [data.Clip(f"ada_{i}", "ada", len(face)) for i, face in enumerate(faces)]
    return clips, SimpleNamespace(
        millimetres=millimetres, lips=[0], upper_face=[1], templates={"ada": np.zeros(6)},
        vertices=lambda motion, subject: motion, opening=lambda face: face[:, 0, 1],
        frames_of=lambda name: faces[int(name[-1])].reshape(-1, 6))


@pytest.mark.parametrize("millimetres, squared", [(None, 1), (1000.0, 1e6)])
def test_score_by_hand(millimetres, squared):
    """Lips: two frames at 0 are made at -3, six at 2 are made at 3. LVE (2 * 9 + 6 * 1) / 8 = 3, where the mean of
    the clips' means is 5. Swapped, over two frames each: 3 against 0 and -3 against 2, (9 + 25) / 2 = 17.
    Upper face: the one clip really goes 0, 2, so 0, 4 squared, deviation 2, and is made still; with the other it is
    the other way round. So FDD is 2 and -2: 0 signed, 2 absolute."""
    true, made = ([np.zeros((frames, 2, 3)) for frames in (2, 6)] for _ in range(2))
    true[0][:, 0, 1], made[0][:, 0, 1], true[1][:, 0, 1], made[1][:, 0, 1] = 0, -3, 2, 3
    true[0][1::2, 1, 0] = made[1][1::2, 1, 0] = 2
    clips, dataset = a_set(true, millimetres)
    figures = data.score(dataset, clips, made, [np.zeros((2, 1), int)] * 2, 4)
    expected = {"lve": 3, "lve_root": (3 / squared) ** 0.5, "lve_swapped": 17, "fdd": 0, "fdd_abs": 2}
    assert {name: figures[name] / squared for name in expected} == pytest.approx(expected)


def test_figures_over_styles_are_means_and_the_root_is_taken_last(monkeypatch):
    """A stranger in three styles, 1, 2 and 3 off the truth: LVE (1 + 4 + 9) / 3; its root, no mean of roots."""
    true = RNG(0).normal(size=(4, 2, 3))
    clips, dataset = a_set([true])
    dataset.subjects, dataset.splits = ["b", "c", "d"], {"test": clips}
    monkeypatch.setattr(data, "generate_clips", lambda model, dataset, clips, styles, *_: (
        [true + [0, 1 + dataset.subjects.index(styles[0]), 0]], [np.zeros((4, 1), int)]))
    model = SimpleNamespace(autoencoder=SimpleNamespace(config=SimpleNamespace(codes=4)))
    figures = data.evaluate_generation(model, dataset, "test", every_style=True)
    assert figures["lve"] == pytest.approx(14 / 3) and figures["lve_root"] == pytest.approx((14 / 3) ** 0.5)


def test_correlation_is_pearsons():
    a, b = RNG(0).normal(size=(2, 20))
    assert data.correlation(a, 3 * a + b) == pytest.approx(np.corrcoef(a, 3 * a + b)[0, 1])
    assert data.correlation(a, np.ones(20)) == 0


def test_perplexity_by_hand():
    """Four codes equally often: 4. Shares 1/2, 1/4, 1/4: entropy 1.5 bit, 2^1.5."""
    assert data.perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert data.perplexity(np.array([2, 1, 1, 0])) == pytest.approx(2 ** 1.5)


def test_score_of_the_truth_of_a_still_face_and_of_half_the_motion(speakers):
    dataset = data.DataSet(speakers)
    clips = dataset.splits["test"]
    codes = [torch.tensor([[0, 1], [2, 3]])] * 2

    def score(factor):
        return data.score(dataset, clips, [factor * dataset.motion(clip) for clip in clips], codes, 8)

    truth, half, still = score(1.0), score(0.5), score(0.0)
    true = [np.load(speakers / "vertices_npy" / f"{clip.name}.npy").reshape(clip.frames, -1, 3) for clip in clips]
    template = pickle.loads((speakers / "templates.pkl").read_bytes())[clips[0].subject]
    assert truth["r2"] == pytest.approx(1) and truth["gap_correlation"] == pytest.approx(1)
    assert truth["energy"] == pytest.approx(1, abs=1e-3) and half["energy"] == pytest.approx(0.25, abs=1e-3)
    assert half["upper_energy"] == pytest.approx(0.25, abs=1e-3) and still["gap_correlation"] == 0
    assert truth["lve"] == pytest.approx(0, abs=1e-6) and truth["fdd_abs"] == pytest.approx(0, abs=1e-3)
    residual, total = (sum(np.square(face - rest).sum(dtype=float) for face, rest in zip(true, other))
                       for other in ([template] * 2, [face.mean(0) for face in true]))
    assert still["r2"] == pytest.approx(1 - residual / total, abs=1e-3)
    lve = [1e6 * max(((frame - template)[dataset.lips] ** 2).sum(1)) for face in true for frame in face]
    assert still["lve"] == pytest.approx(np.mean(lve), rel=1e-3)        # mm2, of all frames of all clips
    assert still["lve_root"] == pytest.approx(np.mean(lve) ** 0.5, rel=1e-3)
    fdd = [1e6 * data.dynamics(face - template, dataset.upper_face) for face in true]
    assert still["fdd"] == pytest.approx(np.mean(fdd), rel=1e-3)
    frames = min(map(len, true))
    swapped = 1e6 * data.lip_vertex_errors(true[0][:frames], true[1][:frames], dataset.lips).mean()
    assert truth["lve_swapped"] == pytest.approx(swapped, rel=1e-3)     # two clips: each is the other's
    assert (truth["codes_used"], truth["perplexity"]) == (4, pytest.approx(4))


# ---------------------------------------------------------------------------------------------------------------- wav


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("kind, channels", [(1, 1), (2, 2), (3, 1), (4, 2), ("float32", 1), ("float32", 2)])
def test_a_wav_of_any_kind_is_the_same_sine(tmp_path, kind, channels, rate):
    """Half a second of 440 Hz at amplitude 0.5, in `kind` bytes a sample; the second channel is silent."""
    sine = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
    sound = np.stack([sine, 0 * sine][:channels], 1)
    path = tmp_path / "sine.wav"
    if kind == "float32":
        wavfile.write(path, rate, sound.astype(np.float32))
    else:
        whole = np.round(sound * (2 ** (8 * kind - 1) - 1)).astype(int) + (128 if kind == 1 else 0)
        with wave.open(str(path), "wb") as file:
            file.setparams((channels, kind, rate, 0, "NONE", ""))
            file.writeframes(b"".join(int(x).to_bytes(kind, "little", signed=kind > 1) for x in whole.ravel()))
    audio = data.read_wav(path)
    assert audio.dtype == np.float32 and audio.shape == (8000,)
    expected = 0.5 / channels * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
    np.testing.assert_allclose(audio[200:-200], expected[200:-200], atol=0.01)


@pytest.mark.parametrize("content", [None, b"", b"no sound here, only words\n" * 9, np.zeros(0, np.int16),
                                     np.array([0, np.nan], np.float32)])
def test_what_is_no_sound_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        wavfile.write(path, 16_000, content)
    with pytest.raises(ValueError) as error:
        data.read_wav(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- reader


class Payload:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [os.mkdir, np.savetxt, eval])
def test_a_pickle_that_runs_code_is_refused(tmp_path, call):
    ran = tmp_path / "ran"
    arguments = {os.mkdir: (str(ran),), np.savetxt: (str(ran), [1]), eval: (f"__import__('os').mkdir({str(ran)!r})",)}
    path = tmp_path / "templates.pkl"
    path.write_bytes(pickle.dumps({"ada": Payload(call, *arguments[call])}))
    with pytest.raises(ValueError, match="refused"):
        data.read_pickle(path)
    assert not ran.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_arrays_is_read(tmp_path, protocol):
    path, arrays = tmp_path / "templates.pkl", {"ada": np.arange(6.).reshape(2, 3), "one": np.float64(2)}
    path.write_bytes(pickle.dumps(arrays, protocol))
    read = data.read_pickle(path)
    assert read["ada"].tolist() == arrays["ada"].tolist() and read["one"] == 2


def test_a_pickle_of_python_2_is_read_without_a_warning(tmp_path):
    """Its opcodes are those that cPickle of Python 2.7 with numpy 1.16 wrote for such a dictionary."""
    path, samples = tmp_path / "x.pkl", np.arange(-300, 300, dtype=np.int16)
    path.write_bytes(python2_pickle({"ada": {"audio": samples, "sample_rate": 9}, "ben": np.float32([[.5, -1e-3]])}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = data.read_pickle(path)
    assert read["ada"]["audio"].tolist() == list(range(-300, 300)) and read["ada"]["sample_rate"] == 9
    assert read["ben"].dtype == np.float32 and read["ben"].tolist() == np.float32([[.5, -1e-3]]).tolist()


@pytest.mark.parametrize("content", [
    np.array([1.0, None]), np.array([{"a": 1}, [2]], object), np.array(["a", "b"]), np.dtype("f4"), {1, 2}, Counter(),
    [np.array([[], [()]], object)]])
def test_a_pickle_of_anything_but_numbers_is_refused(tmp_path, content):
    path = tmp_path / "templates.pkl"
    path.write_bytes(pickle.dumps({"ada": content}))
    with pytest.raises(ValueError, match="refused") as error:
        data.read_pickle(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    """Two subjects, ten sentences each, 25 fps, four channels that are 2 above or below the template's 10."""
    for name in ("wav", "vertices_npy"):
        (tmp_path / name).mkdir()
    for subject in ("f_one", "m2"):
        for sentence in range(1, 11):
            name, sign = f"{subject}_sentence{sentence:02d}", RNG(sentence).choice([-2, 2], (5 + sentence, 4))
            np.save(tmp_path / "vertices_npy" / f"{name}.npy", (10 + sign).astype(np.float32))
            samples = RNG(0).normal(0, 999, 640 * (5 + sentence) + 100).astype(np.int16)
            wavfile.write(tmp_path / "wav" / f"{name}.wav", 16_000, samples)
    (tmp_path / "templates.pkl").write_bytes(pickle.dumps({name: np.full(4, 10.) for name in ("f_one", "m2")}, 2))
    return tmp_path


def test_a_folder_without_dataset_json_is_inferred(folder):
    """Four channels are padded to six; so the root mean square of motion is 2 sqrt(4 / 6)."""
    dataset = data.DataSet(folder)
    assert (dataset.fps, dataset.channels, dataset.subjects) == (25, 6, ["f_one", "m2"])
    assert dataset.scale == pytest.approx(2 * (4 / 6) ** 0.5)
    assert {split: sorted(clip.sentence for clip in clips if clip.subject == "m2")
            for split, clips in dataset.splits.items()} == {
        "train": [f"sentence{i:02d}" for i in range(1, 9)], "val": ["sentence09"], "test": ["sentence10"]}
    clip = next(clip for clip in dataset.splits["train"] if clip.name == "m2_sentence03")
    stored = np.load(folder / "vertices_npy" / "m2_sentence03.npy")
    motion = dataset.motion(clip, 2, 6)
    np.testing.assert_allclose(motion, np.pad(stored[2:6] - 10, ((0, 0), (0, 2))) / dataset.scale, rtol=1e-6)
    np.testing.assert_allclose(dataset.vertices(motion, "m2").reshape(4, 6)[:, :4], stored[2:6], rtol=1e-6)
    assert dataset.mel(clip, 12).shape == (8 * data.log_mel.__globals__["STEPS_PER_FRAME"], 12)
    assert dataset.style("m2").tolist() == [0, 1]


def test_dataset_json_has_the_last_word(folder):
    splits = {"train": ["m2_sentence01"], "val": ["m2_sentence02"], "test": ["f_one_sentence03"]}
    (folder / "dataset.json").write_text(json.dumps({"fps": 24.5, "splits": splits, "lips": [1], "upper_face": [0],
                                                     "lip_gap": [0, 1], "unit": "metre"}))
    dataset = data.DataSet(folder)
    assert {split: [clip.name for clip in clips] for split, clips in dataset.splits.items()} == splits
    assert (dataset.fps, dataset.subjects, dataset.lips, dataset.upper_face) == (24.5, ["m2"], [1], [0])
    vertices = np.array([[[0, 0, 0], [3, 4, 0]], [[1, 1, 1], [1, 1, 3]]], float)
    assert dataset.opening(vertices).tolist() == [5, 2]


def drop_wavs(folder):
    for path in (folder / "wav").iterdir():
        path.unlink()


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: (folder / "vertices_npy").rename(folder / "vertices"), "vertices_npy"),
    (lambda folder: (folder / "templates.pkl").unlink(), "templates.pkl"),
    (lambda folder: (folder / "templates.pkl").write_bytes(pickle.dumps({"f_one": np.ones(4)})), "template.*m2"),
    (lambda folder: (folder / "templates.pkl").write_bytes(pickle.dumps({"f_one": np.ones(4), "m2": np.ones(9)})), "m2"),
    (lambda folder: (folder / "templates.pkl").write_bytes(pickle.dumps([np.ones(4)])), "templates.pkl.*list"),
    (lambda folder: (folder / "templates.pkl").write_bytes(pickle.dumps({"m2": {"rest": 1}})), "templates.pkl.*m2"),
    (lambda folder: (folder / "dataset.json").write_text('{"splits": ["m2_sentence01"]}'), "dataset.json"),
    (lambda folder: np.save(folder / "vertices_npy" / "f_one_sentence01.npy", np.ones(4)), "f_one_sentence01"),
    (lambda folder: (folder / "dataset.json").write_text("{"), "dataset.json"),
    (lambda folder: (folder / "dataset.json").write_text('{"splits": {"train": ["m2_sentence01"]}}'), "val"),
    (drop_wavs, "wav")])
def test_a_spoilt_folder_is_refused_in_one_line(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ValueError, match=said) as error:
        data.DataSet(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_motion_without_wav_is_left_out_with_a_note(folder):
    (folder / "wav" / "m2_sentence01.wav").unlink()
    dataset = data.DataSet(folder)
    assert any("m2_sentence01" in note and "wav" in note for note in dataset.notes)
    assert "m2_sentence01" not in {clip.name for clip in dataset.splits["train"]}


# ----------------------------------------------------------------------------------------------------- published data


def write_layout(folder, names, fps, frames=12):
    """A folder in the layout, clips of two vertices as long as `frames` at `fps`, each number its own."""
    for part in ("wav", "vertices_npy"):
        (folder / part).mkdir(parents=True)
    for i, name in enumerate(names):
        np.save(folder / "vertices_npy" / f"{name}.npy", RNG(i).normal(size=(frames, 6)).astype(np.float32))
        sound = RNG(i).normal(0, 999, int(16_000 * frames / fps)).astype(np.int16)
        wavfile.write(folder / "wav" / f"{name}.wav", 16_000, sound)
    templates = {name.rpartition("_")[0]: np.zeros((2, 3)) for name in names}
    (folder / "templates.pkl").write_bytes(python2_pickle(templates))
    return folder


@pytest.fixture
def biwi(tmp_path):
    """Eight of the fourteen subjects, nine of the forty sentences; the sounds are a little longer than the motion."""
    names = [f"{subject}_e{sentence:02d}" for subject in "F1 F2 F3 F8 M1 M3 M4 M5".split()
             for sentence in (1, 2, 32, 33, 36, 37, 38, 39, 40)]
    folder = write_layout(tmp_path / "biwi", names, 24.6)
    (folder / "regions").mkdir()
    (folder / "regions" / "lve.txt").write_text("1")
    (folder / "regions" / "fdd.txt").write_text("0, 1,\n")
    return folder


def test_biwi_is_read_as_it_is(biwi):
    dataset = data.DataSet(biwi)
    seen, unseen = ["F2", "F3", "M3", "M4", "M5"], ["F1", "F8", "M1"]
    parts = {"train": (seen, (1, 2, 32)), "val": (seen, (33, 36)), "test": (seen, (37, 38, 39, 40)),
             "test_b": (unseen, (37, 38, 39, 40))}
    for split, (subjects, numbers) in parts.items():
        expected = [f"{subject}_e{i:02d}" for subject in subjects for i in numbers]
        assert [clip.name for clip in dataset.splits.pop(split)] == expected
    assert not dataset.splits
    assert (dataset.fps, dataset.subjects, dataset.millimetres) == (25, seen, None)
    assert (dataset.lips, dataset.upper_face) == ([1], [0, 1])
    splits = {"train": ["F8_e01"], "val": ["F2_e01"], "test": ["F3_e01"]}
    (biwi / "dataset.json").write_text(json.dumps({"fps": 24, "lips": [0], "splits": splits}))
    dataset = data.DataSet(biwi)                                        # dataset.json has the last word
    assert (dataset.fps, dataset.subjects, dataset.lips, dataset.upper_face) == (24, ["F8"], [0], [0, 1])
    assert {split: [clip.name for clip in clips] for split, clips in dataset.splits.items()} == splits


def test_regions_that_are_no_indices_are_refused(biwi):
    (biwi / "regions" / "fdd.txt").write_text("0, one")
    with pytest.raises(ValueError, match="fdd.txt"):
        data.DataSet(biwi)
    (biwi / "regions" / "fdd.txt").write_text("0, 2")
    with pytest.raises(ValueError, match="upper_face.*0 to 1"):
        data.DataSet(biwi)


def test_every_test_split_has_its_table_and_its_figures(biwi, tmp_path, monkeypatch, capsys):
    dataset = data.DataSet(biwi)
    figures = {split: {name: number + i / 8 for i, name in enumerate(infer.FIGURES)}
               for number, split in enumerate(dataset.splits)}
    monkeypatch.setattr(infer, "evaluate_generation", lambda model, data, split, every_style: figures[split])
    infer.test(None, dataset, tmp_path, None)
    said = capsys.readouterr().out
    assert re.findall(r"(\w+): (\d+) clips, (\d+) frames, 2 vertices \(1 lip, 2 upper-face\), 5 styles", said) == [
        ("test", "20", "240"), ("test_b", "12", "144")]
    assert "strangers, made in every style, figures averaged: F1, F8, M1\n" in said
    assert "unit2" in said and "mm" not in said
    assert json.loads((tmp_path / "test.json").read_text()) == {split: figures[split] for split in ("test", "test_b")}


@pytest.mark.parametrize("fps, stride, taken", [(60, 2, 30), (30, 1, 30), (29.4, 1, 30)])
def test_a_converted_vocaset_of_60_fps_is_read_every_second_frame(tmp_path, fps, stride, taken):
    """As FaceFormer's conversion leaves it. Styles are numbered as in the paper's checkpoints, not sorted."""
    names = [f"{subject}_sentence{number:02d}" for subject, numbers in SPOKEN.items() for number in (*numbers, 40)]
    folder = write_layout(tmp_path / "vocaset", names, fps)
    dataset = data.DataSet(folder)
    assert (dataset.fps, dataset.millimetres) == (taken, 1000)
    assert dataset.subjects == ["FaceTalk_170728_03272_TA", "FaceTalk_170904_00128_TA", "FaceTalk_170725_00137_TA"]
    assert {split: len(clips) for split, clips in dataset.splits.items()} == {"train": 12, "val": 3, "test": 3}
    assert any("every second frame" in note for note in dataset.notes) == (stride == 2)
    clip = dataset.splits["train"][1]
    stored = np.load(folder / "vertices_npy" / f"{clip.name}.npy")
    assert clip.frames == 12 // stride
    np.testing.assert_array_equal(dataset.frames_of(clip.name, 1, 4), stored[stride:4 * stride:stride])
    (folder / "dataset.json").write_text('{"fps": 60}')
    assert data.DataSet(folder).fps == 60 and data.DataSet(folder).frames_of(clip.name).shape[0] == 12


def test_random_crops_lie_within_their_clips_and_reach_both_ends():
    clips = [data.Clip("a_1", "a", 5), data.Clip("b_1", "b", 3)]
    crops = Counter((clip.name, start, stop) for clip, start, stop in data.random_crops(clips, 4, 400))
    assert set(crops) == {("a_1", 0, 4), ("a_1", 1, 5), ("b_1", 0, 3)}
    assert crops["b_1", 0, 3] == pytest.approx(400 * 3 / 8, abs=50)     # five standard deviations


# -------------------------------------------------------------------------------------------------- built-in speakers


def digest(clip):
    return hashlib.sha256(clip[0].tobytes() + clip[1].tobytes() + repr(clip[2]).encode()).hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_any_process(tmp_path):
    code = ("import data, test_data\nfor _ in range(2): print(test_data.digest(data.make_clip(3, 'gwen', 7)))")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    fresh = subprocess.run([sys.executable, "-B", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    ours = digest(data.make_clip(3, "gwen", 7))
    assert fresh.stdout.split() == [ours, ours]
    assert len({ours, digest(data.make_clip(4, "gwen", 7)), digest(data.make_clip(3, "gwen", 8))}) == 3


def test_build_speakers_is_whole_and_the_same_again(speakers, few_speakers, tmp_path):
    again = few_speakers(tmp_path / "again")
    for path in sorted(speakers.rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(speakers)).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert len(list(again.glob("wav/*.wav"))) == len(list(again.glob("vertices_npy/*.npy"))) == 10
    dataset = data.DataSet(again)
    assert [dataset.subjects, dataset.fps, dataset.channels] == [["ada", "ben"], 30, len(data.build_face().template) * 3]
    for clip in sum(dataset.splits.values(), []):
        rate, audio = wavfile.read(dataset.wav(clip))
        assert rate == 16_000 and abs(len(audio) / rate - clip.frames / 30) < 1 / 30


def test_speakers_that_fail_half_way_do_not_appear(few_speakers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "write_clip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        few_speakers(tmp_path / "speakers")
    assert not (tmp_path / "speakers").exists()


def test_takes_share_the_sound_and_the_lips_but_not_the_upper_face():
    (sound, _, _, first), (sound_again, _, _, second) = (data.make_clip(0, "eva", 5, take) for take in (0, 1))
    assert np.array_equal(sound, sound_again)
    lips = [k for k in range(7) if first[:, k].std() > 0.01]
    assert len(lips) > 4 and not np.array_equal(first[:, lips], second[:, lips])
    assert min(np.corrcoef(first[:, k], second[:, k])[0, 1] for k in lips) > 0.99
    upper = [np.corrcoef(first[:, k], second[:, k])[0, 1] for k in range(7, 14) if first[:, k].std() * second[:, k].std()]
    assert np.median(upper) < 0.7


def test_lips_meet_in_p_b_m_and_part_in_open_vowels():
    """The lip gap in millimetres, of four subjects and five sentences each: of the frames between 1/5 and 3/5 of a
    P, B or M (a stop's last third is burst and breath), and the widest of each open vowel."""
    face, closed, opened = data.build_face(), [], []
    for subject in ("ada", "ben", "iris", "liam"):
        for sentence in range(1, 6):
            _, vertices, segments, _ = data.make_clip(0, subject, sentence)
            gap = 1000 * np.linalg.norm(np.diff(vertices[:, face.lip_gap], axis=1)[:, 0], axis=1)
            time = (np.arange(len(gap)) + 0.5) / data.FPS
            for start, end, phone in segments:
                share = (time - start) / (end - start)
                if phone in ("P", "B", "M"):
                    closed += gap[(share > 0.2) & (share < 0.6)].tolist()
                elif phone in ("AA", "AE", "AY", "AW"):
                    opened += [gap[(share > 0) & (share < 1)].max(initial=0)]
    assert len(closed) > 20 and len(opened) > 20
    assert max(closed) < 1 and np.mean(opened) > 8


def test_the_lexicon_holds_every_english_phoneme():
    """The 39 of the CMU dictionary."""
    arpabet = ("AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH")
    used = {phone.rstrip("1") for phones in data.PRONUNCIATION.values() for phone in phones}
    assert used == set(arpabet.split()) and used <= set(data.PHONES)


def test_segments_follow_the_words_without_gaps():
    rng = RNG(0)
    segments, accents = data.schedule(["my", "mother", ",", "speak"], data.make_speaker(rng, 0.5), rng)
    assert [phone for *_, phone in segments] == "SIL M AY M AH DH ER SIL S P IY K SIL".split()
    assert segments[0][0] == 0 and all(a[1] == pytest.approx(b[0]) and b[0] < b[1] for a, b in zip(segments, segments[1:]))
    assert len(accents) == 2                                            # mother and speak are content words
    with pytest.raises(ValueError, match="zebra"):
        data.schedule(["zebra"], data.make_speaker(rng, 0.5), rng)


# ----------------------------------------------------------------------------------------------------------- the face


def test_the_mesh_is_a_surface():
    """Indices within range, no triangle a line, and no edge in more than two triangles."""
    face = data.build_face()
    triangles = face.triangles
    assert set(triangles.ravel()) == set(range(len(face.template)))
    a, b, c = face.template[triangles].transpose(1, 0, 2)
    assert np.linalg.norm(np.cross(b - a, c - a), axis=1).min() > 0
    edges = Counter(tuple(sorted(edge)) for triangle in triangles.tolist() for edge in zip(triangle, triangle[1:] + triangle[:1]))
    assert max(edges.values()) == 2
    assert face.colours.shape == face.template.shape and 0 <= face.colours.min() <= face.colours.max() <= 1


def test_the_face_is_its_own_mirror_image_and_moves_as_one():
    face = data.build_face()
    both = [i for i, name in enumerate(data.MOTIONS) if "left" not in name and "right" not in name]
    motions = np.zeros((1 + len(both), 14))
    motions[range(1, 1 + len(both)), both] = 0.7                        # at rest, then each motion
    for vertices in data.pose(face, face.template, motions):
        distance = cKDTree(vertices).query(vertices * (-1, 1, 1))[0]
        assert (distance < 2e-5).mean() > 0.9                           # teeth and irises need not match
        assert distance[face.lips + face.upper_face].max() < 2e-5


@pytest.mark.parametrize("subject", ["ada", "liam"])
def test_at_rest_the_lips_meet_and_a_blink_closes_its_own_eye(subject):
    """Lid margins are the fifth ring; seven columns face each other. The left eye is the one at x > 0."""
    *_, face, template = data.person(0, subject)
    motions = np.zeros((3, 14))
    motions[1, data.MOTIONS.index("blink_left")] = motions[2, data.MOTIONS.index("blink_right")] = 1
    rest, left, right = 1000 * data.pose(face, template, motions)
    np.testing.assert_allclose(rest, 1000 * template, atol=1e-3)
    assert np.linalg.norm(rest[face.lip_gap[0]] - rest[face.lip_gap[1]]) < 0.5

    def eyes(vertices):
        gaps = [np.linalg.norm(vertices[lid[4][1:8]] - vertices[lid[4][:8:-1]], axis=1).max() for lid in face.lids]
        return dict(zip(["left", "right"], gaps)) if vertices[face.lids[0][4][0], 0] > 0 else None

    assert min(eyes(rest).values()) > 7
    assert eyes(left)["left"] < 0.5 < 7 < eyes(left)["right"]
    assert eyes(right)["right"] < 0.5 < 7 < eyes(right)["left"]


def test_jaw_opens_close_undoes_it_and_lips_never_cross():
    face = data.build_face()
    jaw, shut = np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 5))
    motions = np.zeros((25, 14))
    motions[:, data.MOTIONS.index("jaw")], motions[:, data.MOTIONS.index("close")] = jaw.ravel(), shut.ravel()
    posed = 1000 * data.pose(face, face.template, motions)
    gap = np.linalg.norm(posed[:, face.lip_gap[0]] - posed[:, face.lip_gap[1]], axis=1).reshape(5, 5)
    assert (np.diff(gap[0]) > 3).all() and gap[0, -1] == pytest.approx(22, abs=2)       # opening, not closed
    assert gap[-1].max() < 0.5                                          # closed, whatever the jaw does
    anything = np.zeros((60, 14))
    anything[:, :7] = RNG(0).random((60, 7)) * RNG(1).integers(0, 2, (60, 7))
    posed = 1000 * data.pose(face, face.template, anything)
    assert (posed[:, face.upper, 1] - posed[:, face.lower, 1]).min() > -0.05


@pytest.mark.parametrize("motions, template", [((5, 13), None), ((14,), None), ((5, 14), (7, 3))])
def test_pose_refuses_other_shapes(motions, template):
    face = data.build_face()
    with pytest.raises(ValueError, match="pose expects"):
        data.pose(face, np.zeros(template) if template else face.template, np.zeros(motions))
