"""Speakers, reader and metrics against loops, hand-worked cases and the wave module of Python."""
import hashlib
import json
import os
import pickle
import re
import shutil
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
from scipy.stats import wasserstein_distance

import data
import infer
from codetalker import STEPS_PER_FRAME, ARConfig
from conftest import MOTION_ONLY, ROOT, SOUND_ONLY, SPOKEN, python2_pickle
from test_commands import run

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


def test_distribution_distance_is_scipy_s_and_asks_how_often_not_when():
    """Later by a while costs little, half the size half of the distance of a still face."""
    true, made = ([RNG(seed).normal(size=(length, 2, 3)) for length in (30, 50)] for seed in (0, 1))
    expected = []
    for part in (np.asarray, lambda motion: np.diff(motion, axis=0)):
        a, b = (np.concatenate([part(motion) for motion in side]).reshape(-1, 6) for side in (made, true))
        between = [wasserstein_distance(a[:, i], b[:, i]) for i in range(6)]
        expected.append(np.mean(between) / np.mean([b[:, i].std() for i in range(6)]))
    assert data.distribution_distance(made, true) == pytest.approx(np.mean(expected))
    assert data.distribution_distance(true, true) == 0
    blink = [np.exp(-0.5 * ((np.arange(100) - middle) / 4) ** 2)[:, None, None] for middle in (30, 60, 60)]
    late, dull, still = (data.distribution_distance([x], blink[:1]) for x in (blink[1], blink[2] / 2, 0 * blink[2]))
    assert late < 1e-3 and dull == pytest.approx(still / 2, abs=1e-3) and still > 0.4


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
    assert dataset.sound(clip, ARConfig(styles=1, mel_bands=12)).shape == (8 * STEPS_PER_FRAME, 12)
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
    monkeypatch.setattr(infer, "evaluate_generation", lambda model, data, split, every_style, take: figures[split])
    infer.test(None, dataset, tmp_path, None, 0)
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
    (finding,), _ = data.examine(folder)                                # nothing about the frames
    assert "wrong scale" in finding and "FaceTalk_170728_03272_TA spans 0, " in finding
    (folder / "dataset.json").write_text('{"fps": 60}')
    assert data.DataSet(folder).fps == 60 and data.DataSet(folder).frames_of(clip.name).shape[0] == 12


# ------------------------------------------------------------------------------------------------------------ convert


def test_convert_is_every_second_frame_in_order(vocaset_raw, vocaset):
    index, sounds = (pickle.loads((vocaset_raw / f"{name}.pkl").read_bytes(), encoding="latin1")
                     for name in ("subj_seq_to_idx", "raw_audio_fixed"))
    vertices, names = np.load(vocaset_raw / "data_verts.npy", mmap_mode="r"), set()
    assert MOTION_ONLY[1] in {int(name[-2:]) for name in index[MOTION_ONLY[0]]}     # they are in the raw files
    assert SOUND_ONLY[1] in {int(name[-2:]) for name in sounds[SOUND_ONLY[0]]}
    for subject, numbers in SPOKEN.items():
        for number in numbers:
            sentence, name = f"sentence{number:02d}", f"{subject}_sentence{number:02d}"
            names.add(name)
            motion, rows = np.load(vocaset / "vertices_npy" / f"{name}.npy"), index[subject][sentence]
            assert motion.dtype == np.float32 and motion.shape == ((len(rows) + 1) // 2, 15069)
            for frame in range(0, len(rows), 2):
                assert (motion[frame // 2] == vertices[rows[frame]].ravel()).all()
            rate, audio = wavfile.read(vocaset / "wav" / f"{name}.wav")
            assert rate == 22_000 and audio.dtype == np.int16 and (audio == sounds[subject][sentence]["audio"]).all()
    assert {path.stem for path in vocaset.glob("[wv]*/*.*")} == names
    dataset = data.DataSet(vocaset)
    masks = pickle.loads((vocaset_raw / "FLAME_masks.pkl").read_bytes())
    assert dataset.lips == masks["lips"].tolist()
    assert dataset.upper_face == sorted({*masks["forehead"].tolist(), *masks["eye_region"].tolist()})
    lines = (vocaset_raw / "head_template.obj").read_text().splitlines()
    corners = [[int(corner.split("/")[0]) - 1 for corner in line.split()[1:]] for line in lines if line[:2] == "f "]
    assert dataset.triangles.tolist() == corners and len(corners) == 2 * 5023 - 4       # Euler, of a closed surface
    assert (dataset.fps, dataset.millimetres, dataset.subjects) == (30, 1000, list(SPOKEN)[:3])
    assert {split: len(clips) for split, clips in dataset.splits.items()} == {"train": 9, "val": 2, "test": 2}
    findings, (about, missing) = data.examine(vocaset)
    assert findings == [] and "13 clips of 5 subjects" in about and "387 of 400 sentences are missing" in missing


def test_quads_become_two_triangles(tmp_path):
    (tmp_path / "mesh.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvn 0 0 1\nf 1//1 2//1 3//1 4//1\n")
    assert data.read_triangles(tmp_path / "mesh.obj", 4) == [[0, 1, 2], [0, 2, 3]]


def rewrite(name, change):
    """A spoiler: the pickle `name` unpickled, changed and pickled again."""
    def spoil(folder):
        content = pickle.loads((folder / name).read_bytes(), encoding="latin1")
        change(content)
        (folder / name).unlink()
        (folder / name).write_bytes(pickle.dumps(content))
    return spoil


def replace_by(name, content):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    return spoil


def first(content):
    return next(iter(content.values()))


EVIL = pickle.dumps({"ada": Payload(os.mkdir, "ran")})


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: (folder / "templates.pkl").unlink(), "templates.pkl"),
    (lambda folder: (folder / "data_verts.npy").unlink(), "data_verts.npy"),
    (replace_by("raw_audio_fixed.pkl", EVIL), "raw_audio_fixed.pkl.*refused.*mkdir"),
    (replace_by("subj_seq_to_idx.pkl", EVIL), "subj_seq_to_idx.pkl.*refused"),
    (replace_by("templates.pkl", EVIL), "templates.pkl.*refused"),
    (replace_by("FLAME_masks.pkl", EVIL), "FLAME_masks.pkl.*refused"),
    (replace_by("subj_seq_to_idx.pkl", pickle.dumps({"ada": [1, 2]})), "subj_seq_to_idx.pkl.*download"),
    (replace_by("raw_audio_fixed.pkl", pickle.dumps({})), "motion and audio"),
    (rewrite("raw_audio_fixed.pkl", lambda content: first(first(content)).pop("sample_rate")), "sample_rate"),
    (rewrite("raw_audio_fixed.pkl", lambda content: first(first(content)).update(audio="la")), "raw_audio_fixed.pkl"),
    (rewrite("subj_seq_to_idx.pkl", lambda content: first(first(content)).update({1: 9999})), "data_verts.npy.*9999"),
    (rewrite("subj_seq_to_idx.pkl", lambda content: first(first(content)).update({1: -1})), "data_verts.npy"),
    (rewrite("subj_seq_to_idx.pkl", lambda content: content.update({"../ada": first(content)})), "ada.*no name"),
    (rewrite("templates.pkl", lambda content: content.pop("FaceTalk_170725_00137_TA")), "FaceTalk_170725_00137_TA"),
    (rewrite("templates.pkl", lambda content: content.update(FaceTalk_170725_00137_TA=np.ones((9, 3)))), "5023, 3"),
    (rewrite("FLAME_masks.pkl", lambda content: content.pop("lips")), "lips"),
    (rewrite("FLAME_masks.pkl", lambda content: content.update(forehead=np.array([5023]))), "5022"),
    (replace_by("head_template.obj", b"v 0 0 0\nv 0 1 0\nv 1 0 0\nf 1 2 3\n"), "5023.*found 3"),
    (replace_by("head_template.obj", b"f a b c\n"), "head_template.obj"),
    (lambda folder: (folder.parent / "out").mkdir(), "out.*exists")])
def test_a_spoilt_vocaset_is_refused_and_nothing_is_written(vocaset_raw, tmp_path, monkeypatch, capsys, spoil, said):
    folder = tmp_path / "raw"
    folder.mkdir()
    for path in vocaset_raw.iterdir():
        (folder / path.name).symlink_to(path)
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert run("data.py", "convert", "--vocaset", folder, "--out", "out", "--masks", folder / "FLAME_masks.pkl",
               "--mesh", folder / "head_template.obj") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(said, error)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_conversion_that_fails_half_way_leaves_nothing(vocaset_raw, tmp_path, monkeypatch):
    monkeypatch.setattr(data.wavfile, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.convert_vocaset(vocaset_raw, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- check


def test_good_data_pass(speakers, folder, capsys):
    """The second are not faces but four channels that move more than they lie apart, as blendshape weights do."""
    assert run("data.py", "check", speakers) == run("data.py", "check", folder) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "10 clips of 4 subjects" in first and "30 fps, 1350 vertices; 6 train, 2 val, 2 test" in first
    assert "20 clips of 2 subjects" in second and "25 fps, 2 vertices; 16 train, 2 val, 2 test" in second


def npys(change, pattern="*"):
    def spoil(folder):
        for path in folder.glob(f"vertices_npy/{pattern}.npy"):
            np.save(path, change(np.load(path), path.stem))
    return spoil


def all_by(scale, offset):
    def spoil(folder):
        npys(lambda rows, _: (rows * scale + offset).astype(np.float32))(folder)
        rewrite("templates.pkl", lambda content: content.update({name: face * scale + offset
                                                                 for name, face in content.items()}))(folder)
    return spoil


def displacements(folder):
    templates = pickle.loads((folder / "templates.pkl").read_bytes())
    npys(lambda rows, name: rows - templates[name.partition("_")[0]].ravel())(folder)


def swap_templates(content):
    content["ada"], content["ben"] = content["ben"], content["ada"]


def with_nan(array, name=None):
    array.ravel()[5] = np.nan
    return array


def halve(folder):
    for path in folder.glob("wav/ben_*.wav"):
        rate, audio = wavfile.read(path)
        wavfile.write(path, rate, audio[:len(audio) // 2])


def describe(**said):
    def spoil(folder):
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return spoil


SPOILS = {
    "millimetres": (all_by(1000, 0), "a template on a wrong scale.*0.2.*: 4 .*spans 2.*, ..."),
    "0 to 1": (all_by(3.7, 0.5), "a template on a wrong scale.*0.2.*: 4 .*spans (0.9|1)"),
    "vertices in millimetres": (npys(lambda rows, _: 1000 * rows), "far from the template.*: 10 .ada_sentence01, "),
    "displacements": (displacements, "displacements instead of vertices.*: 10 .ada_sentence01, .*, ..."),
    "two templates swapped": (rewrite("templates.pkl", swap_templates), "far from the template.*: 6 .ada_sentence01"),
    "one template": (rewrite("templates.pkl", lambda content: content.update(dan=content["dan"] + 0.01)),
                     "far from the template.*: 2 .dan_sentence61, dan_sentence62"),
    "fps": (describe(fps=60), "(29.[89]|30) frames for each second of sound: 60 fps expected"),
    "no templates": (lambda folder: (folder / "templates.pkl").unlink(), "templates.pkl"),
    "no template": (rewrite("templates.pkl", lambda content: content.pop("ada")), "no template.*: 1 .ada"),
    "pickle": (replace_by("templates.pkl", b"nothing"), "templates.pkl: a pickle of numpy arrays expected"),
    "evil": (replace_by("templates.pkl", EVIL), "templates.pkl.*refused"),
    "template width": (rewrite("templates.pkl", lambda content: content.update(ben=np.ones(9))), "width.*: 1 .ben"),
    "template NaN": (rewrite("templates.pkl", lambda content: with_nan(content["ben"])), "with NaN.*: 1 .ben"),
    "NaN": (npys(with_nan, "b*1"), "NaN or infinity in the motion.*: 1 .ben_sentence01"),
    "width": (npys(lambda rows, _: rows[:, :-3], "c*"), "another width.*: 2 .cleo_sentence41 4047, not 4050, cleo"),
    "no wav": (lambda folder: (folder / "wav/ada_sentence03.wav").unlink(), "motion alone.*wav.*: 1 .ada_sentence03"),
    "no npy": (lambda folder: (folder / "vertices_npy/ada_sentence03.npy").unlink(), "sound alone.*npy.*: 1 .ada"),
    "wav": (replace_by("wav/ada_sentence03.wav", b"RIFF"), "a wav that cannot be read.*: 1 .ada_sentence03"),
    "npy": (replace_by("vertices_npy/ada_sentence03.npy", b"x"), "an npy that cannot be read.*: 1 .ada_sentence03"),
    "cut": (halve, "of different length.*: 3 .ben_sentence01 .* s and .* s, ben_"),
    "json": (lambda folder: (folder / "dataset.json").write_text("{"), "dataset.json"),
    "splits": (describe(splits={"train": ["ada_sentence01"]}), "no clip in the split 'val'")}


@pytest.mark.parametrize("name", SPOILS)
def test_check_says_what_is_wrong(speakers, tmp_path, capsys, name):
    shutil.copytree(speakers, tmp_path / "data")
    spoil, said = SPOILS[name]
    spoil(tmp_path / "data")
    assert run("data.py", "check", tmp_path / "data") == 1
    printed = capsys.readouterr().out
    assert re.search(said, printed) and "Traceback" not in printed
    alone = not name.startswith("template ")                # whose clips are then told of, too
    assert printed.count("\n") == 1 or not alone


def test_check_says_all_that_is_wrong(speakers, tmp_path):
    shutil.copytree(speakers, tmp_path / "data")
    chosen = ["fps", "no template", "NaN", "no wav", "width"]
    for name in chosen:
        SPOILS[name][0](tmp_path / "data")
    findings, about = data.examine(tmp_path / "data")
    for name in chosen:
        assert any(re.search(SPOILS[name][1], finding) for finding in findings), name
    assert len(findings) == len(chosen) and about == []


def test_to_check_no_folder_is_bad_usage(tmp_path):
    assert run("data.py", "check", tmp_path / "nowhere") == run("data.py", "check") == run("data.py") == 2


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
