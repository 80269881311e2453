"""Files, data sets, metrics and the synthetic speakers, against loops, hand-worked cases and scipy."""
import json
import pickle
import re
import shutil
import struct
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.stats import wasserstein_distance

import data
from support import files, metrics, speakers as synthetic
from support.check import check_dataset

# ---------- metrics


def test_lip_vertex_errors_matches_loop():
    rng = np.random.default_rng(0)
    pred, gt = rng.normal(size=(2, 6, 5, 3))
    lips = [1, 3, 4]
    expected = []
    for t in range(6):
        expected.append(max(np.sum((pred[t, v] - gt[t, v]) ** 2) for v in lips))
    np.testing.assert_allclose(metrics.lip_vertex_errors(pred, gt, lips), expected)


def test_upper_face_std_worked_example():
    """Vertex 1 is displaced by (3, 4, 0), then not: squared 25 and 0, standard deviation 12.5. Vertex
    2 rests: 0. The mean of both is 6.25; vertex 0 does not count."""
    motion = np.zeros((2, 3, 3))
    motion[0, 1] = (3, 4, 0)
    motion[1, 0] = (9, 9, 9)
    assert metrics.upper_face_std(motion, [1, 2]) == 6.25


def test_motion_variance_matches_loop():
    vertices = np.random.default_rng(1).normal(size=(6, 5, 3))
    total = sum(np.var(vertices[:, v, k]) for v in range(5) for k in range(3))
    assert metrics.motion_variance(vertices) == pytest.approx(total / 5)


def test_correlation_is_zero_for_a_constant_curve():
    a = np.array([1.0, 2, 4])
    assert metrics.correlation(a, 3 * a + 1) == pytest.approx(1)
    assert metrics.correlation(a, -a) == pytest.approx(-1)
    assert metrics.correlation(a, np.ones(3)) == 0


def test_wasserstein_matches_scipy_and_ignores_order():
    rng = np.random.default_rng(2)
    pred = [rng.normal(size=(30, 1, 1)) for _ in range(2)]
    gt = [rng.normal(1, 2, size=(30, 1, 1)) for _ in range(2)]
    expected = []
    for order in (0, 1):
        a = np.concatenate([np.diff(x[:, 0, 0], n=order) for x in pred])
        b = np.concatenate([np.diff(x[:, 0, 0], n=order) for x in gt])
        expected.append(wasserstein_distance(a, b) / b.std())
    assert metrics.wasserstein(pred, gt) == pytest.approx(np.mean(expected))
    assert metrics.wasserstein(gt[::-1], gt) == pytest.approx(0, abs=1e-12)     # other times, same values


def test_perplexity_worked_example():
    """Four codes in equal use: 4. Two codes with 1/4 and 3/4: exp(0.5623) = 1.755."""
    assert metrics.perplexity(np.array([5, 0, 5, 5, 5])) == pytest.approx(4)
    assert metrics.perplexity(np.array([1, 3])) == pytest.approx(1.7548, abs=1e-4)


def small_set(faces, to_mm=None):
    """As much of a data set as compute_metrics() needs: one subject whose template is zero; vertex 0
    is the lips, vertex 1 the upper face."""
    clips = [data.Clip(f"ada_{i}", "ada", len(face)) for i, face in enumerate(faces)]
    return clips, SimpleNamespace(
        to_mm=to_mm, fps=30, lips=[0], upper_face=[1], eye_gap=None, brow=None, templates={"ada": np.zeros(6)},
        vertices=lambda motion, subject: motion, lip_gap_curve=lambda vertices: vertices[:, 0, 1],
        frames=lambda clip: faces[int(clip.name[-1])])


@pytest.mark.parametrize("to_mm, unit", [(None, 1), (1000.0, 1e6)])
def test_compute_metrics_by_hand(to_mm, unit):
    """The prediction is half the ground truth of clip 0, and clip 1 exactly."""
    rng = np.random.default_rng(3)
    gt = [rng.normal(size=(8, 2, 3)), rng.normal(size=(6, 2, 3))]
    clips, dataset = small_set(gt, to_mm)
    pred = [0.5 * gt[0], gt[1]]
    result = metrics.compute_metrics(dataset, clips, pred)
    error = np.square(0.5 * gt[0][:, 0]).sum(axis=1)
    assert result["lve"] == pytest.approx(unit * error.sum() / 14)
    assert result["lve_mm"] == pytest.approx(result["lve"] ** 0.5)
    wrong0 = np.square(gt[1][:, 0] - gt[0][:6, 0]).sum(axis=1)      # clip 1's motion against clip 0
    wrong1 = np.square(0.5 * gt[0][:6, 0] - gt[1][:, 0]).sum(axis=1)
    assert result["lve_wrong_audio"] == pytest.approx(unit * (wrong0.sum() + wrong1.sum()) / 12)
    assert result["gap_correlation"] == pytest.approx(1)
    upper = metrics.upper_face_std(gt[0], [1])
    assert result["fdd"] == pytest.approx(unit * 0.75 * upper / 2)      # half the motion: 1/4 of it
    assert result["fdd_abs"] == pytest.approx(result["fdd"])
    a, b = metrics.motion_variance(gt[0]), metrics.motion_variance(gt[1])
    assert result["variance_ratio"] == pytest.approx((0.25 * a + b) / (a + b))


def test_metrics_of_the_ground_truth_are_perfect(dataset):
    clips = dataset.splits["test"]
    result = metrics.compute_metrics(dataset, clips, [dataset.motion(clip) for clip in clips])
    assert result["r2"] == pytest.approx(1, abs=1e-6)
    assert result["gap_correlation"] == pytest.approx(1, abs=1e-6)
    assert result["lve"] == pytest.approx(0, abs=1e-6)
    assert result["variance_ratio"] == pytest.approx(1, abs=1e-4)
    assert result["lve_wrong_audio"] > 1                            # mm2
    assert result["tremble"] == pytest.approx(1, rel=1e-3)
    for event in ("blinks", "brow_raises"):                         # a minute
        assert 2 < result[event] < 100 and result[event] == result[event + "_gt"], event


def test_a_rise_counts_once_until_the_curve_is_low_again():
    """Above 1: the 2, not the 3, as 0.6 is not below half of 1; the 5, after 0.4; the first 2."""
    assert metrics.count_rises(np.array([2, 0, 2, 0.6, 3, 0.4, 5]), threshold=1) == 3
    assert metrics.count_rises(np.array([0, 1, 0.9]), threshold=1) == 0


def test_tremble_is_the_acceleration_of_the_upper_face_in_most_frames():
    """The upper face jumps by 1 in one frame of ten in both; half its noise is half the tremble."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(100, 1, 3))
    jumps = (np.arange(100) % 20 < 10)[:, None, None] * [1000.0, 0, 0]
    gt = np.concatenate([noise, noise + jumps], axis=1)             # (T, 2, 3)
    pred = np.concatenate([noise, 0.5 * noise + jumps], axis=1)
    _, dataset = small_set([gt])
    result = metrics.upper_face_metrics(dataset, [pred], [gt])
    assert result["tremble"] == pytest.approx(0.5, abs=0.05)


def test_metrics_over_styles_are_means(dataset, monkeypatch):
    values = iter([1.0, 3.0])
    monkeypatch.setattr(metrics, "generate_clips", lambda *_: ([], [torch.zeros(1, dtype=torch.long)]))
    monkeypatch.setattr(metrics, "compute_metrics", lambda *_: {"lve": next(values)})
    model = SimpleNamespace(autoencoder=SimpleNamespace(config=SimpleNamespace(codebook_size=4)))
    result = metrics.evaluate_generation(model, dataset, "test", every_style=True)
    assert result["lve"] == 2 and result["lve_mm"] == pytest.approx(2 ** 0.5)
    with pytest.raises(StopIteration):
        next(values)                                # one round for each of the two training styles


# ---------- files


@pytest.mark.parametrize("kind, channels, rate", [
    ("u1", 1, 16000), ("i2", 2, 44100), ("i4", 1, 48000), ("f4", 2, 22050), ("f8", 1, 8000)])
def test_read_audio_gives_the_same_sine_from_any_wav(tmp_path, kind, channels, rate):
    t = np.arange(rate) / rate
    sine = 0.5 * np.sin(2 * np.pi * 440 * t)
    samples = np.repeat(sine[:, None], channels, axis=1)
    if kind == "u1":
        samples = np.round(samples * 127 + 128).astype("u1")
    elif kind.startswith("i"):
        samples = np.round(samples * np.iinfo(kind).max).astype(kind)
    wavfile.write(tmp_path / "a.wav", rate, samples.astype(kind))
    audio = files.read_audio(tmp_path / "a.wav")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert audio.dtype == np.float32 and len(audio) == 16000
    np.testing.assert_allclose(audio[500:-500], expected[500:-500], atol=0.01)


def test_read_audio_matches_the_wave_module(speakers):
    path = next((speakers / "wav").glob("*.wav"))
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    np.testing.assert_allclose(files.read_audio(path), samples / 32768, atol=1e-6)


def test_load_arrays_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ada": Payload()}))
    with pytest.raises(ValueError, match="is no numpy array"):
        files.load_arrays(tmp_path / "a.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_load_arrays_reads_every_protocol(tmp_path, protocol):
    arrays = {"ada": np.arange(6.0).reshape(2, 3), "n": np.float32(2)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol))
    read = files.load_arrays(tmp_path / "a.pkl")
    assert np.array_equal(read["ada"], arrays["ada"]) and read["n"] == 2


CORNERS = np.array([[0, 0, 0], [1, 0, 0.5], [1, 1, 0], [0, 1, -2]], np.float32)
PLY = "ply\nformat {} 1.0\ncomment x\nelement vertex 4\n{}element face 2\n{}end_header\n"
XYZ = "property float x\nproperty float y\nproperty float z\n"
INDICES = "property list uchar int vertex_indices\n"
COLOURED = ("property uchar red\nproperty double z\nproperty double y\nproperty double x\n",
            "property list uint8 uint32 vertex_index\nproperty short flag\n")


def binary_ply(order):
    vertices = CORNERS.astype(f"{order}f4").tobytes()
    faces = struct.pack(f"{order}B3iB4i", 3, 0, 1, 2, 4, 0, 1, 2, 3)
    name = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    return PLY.format(name, XYZ, INDICES).encode() + vertices + faces


def coloured_ply():
    vertices = b"".join(struct.pack("<B3d", 10, *corner[::-1]) for corner in CORNERS)
    faces = struct.pack("<B3IhB4Ih", 3, 0, 1, 2, -1, 4, 0, 1, 2, 3, -1)
    return PLY.format("binary_little_endian", *COLOURED).encode() + vertices + faces


MESHES = {
    "a.obj": b"\xef\xbb\xbf# caf\xe9\nv 0 0 0\nv 1 0 .5 1\nvt 0 0\nv 1 1 0\nv 0 1 -2\nf 1 2 3\n"
             b"f 1/4 2/5/6 3//7 4\n",
    "text.ply": PLY.format("ascii", XYZ, INDICES).encode() + b"0 0 0\n1 0 .5\n1 1 0\n0 1 -2\n"
                                                             b"3 0 1 2\n4 0 1 2 3\n",
    "windows.ply": PLY.format("ascii", XYZ, INDICES).replace("\n", "\r\n").encode()
                   + b"0 0 0\r\n1 0 .5\r\n1 1 0\r\n0 1 -2\r\n3 0 1 2\r\n4 0 1 2 3\r\n",
    "little.ply": binary_ply("<"),
    "big.ply": binary_ply(">"),
    "coloured.PLY": coloured_ply(),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_read_with_quads_as_two_triangles(tmp_path, name):
    (tmp_path / name).write_bytes(MESHES[name])
    vertices, triangles = files.read_mesh(tmp_path / name)
    np.testing.assert_array_equal(vertices, CORNERS)
    assert triangles == [[0, 1, 2], [0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize("name, content", [
    ("cut.ply", MESHES["little.ply"][:-9]), ("cut.ply", MESHES["text.ply"][:-9]),
    ("header.ply", MESHES["text.ply"][:60]), ("strip.ply", MESHES["text.ply"].replace(b"_indices", b"s")),
    ("a.ply", MESHES["little.ply"].replace(b"float", b"object")),
    ("a.obj", b"v 1 2\nv 1 2 3\n"), ("a.obj", b"f 1 x 3\n")])
def test_damaged_meshes_are_refused_in_a_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="an .obj or .ply mesh expected") as error:
        files.read_mesh(tmp_path / name)
    assert "\n" not in str(error.value)


# ---------- data sets


@pytest.fixture
def folder(speakers, tmp_path):
    """A copy of the small synthetic data set that a test may damage."""
    return shutil.copytree(speakers, tmp_path / "folder")


def describe(folder, **changes):
    path = folder / "dataset.json"
    description = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in description.items() if v is not None}), "utf-8")


def test_what_dataset_json_leaves_out_is_inferred(folder):
    (folder / "dataset.json").unlink()
    shutil.rmtree(folder / "phones")
    for i in range(10):                             # ten sentences of one subject
        for kind, ending in (("wav", "wav"), ("vertices_npy", "npy")):
            source = sorted((folder / kind).glob(f"ada_*.{ending}"))[0]
            shutil.copy(source, folder / kind / f"ada_new{i:02d}.{ending}")
    for kind in ("wav", "vertices_npy"):
        for path in (folder / kind).glob("*_sentence*"):
            path.unlink()
    dataset = data.open_data(folder)
    assert dataset.fps == 30 and dataset.unit is None and dataset.triangles is None
    assert {split: len(part) for split, part in dataset.splits.items()} == dict(train=8, val=1, test=1)
    assert dataset.lips == dataset.upper_face == list(range(dataset.channels // 3))
    curve = dataset.lip_gap_curve(dataset.frames(dataset.splits["test"][0]))
    assert curve.std() > 0                          # the most active channel
    assert len(dataset.warnings) == 6


def test_a_frame_has_the_phone_at_its_centre(folder):
    """At 30 fps the centres are 1/60, 3/60, 5/60 ... s; the last phone goes on to the end."""
    dataset = data.open_data(folder)
    clip = dataset.splits["train"][0]
    path = folder / "phones" / f"{clip.name}.tsv"
    path.write_text("0\t0.04\tSIL\n0.04\t0.06\tM\n0.06\t0.07\tAA\n", "utf-8")
    names = [dataset.phone_names[i] for i in dataset.phone_classes(clip)]
    assert names == ["SIL", "M"] + (clip.frames - 2) * ["AA"]
    path.write_text("0 0.04 SIL", "utf-8")
    with pytest.raises(ValueError, match=f"{clip.name}.tsv: lines of start s, end s, phone"):
        dataset.phone_classes(clip)
    path.unlink()                                   # one clip without: no phones at all
    dataset = data.open_data(folder)
    assert dataset.phone_names == [] and not dataset.phone_classes(clip).any()


def test_motion_and_vertices_are_inverse(dataset):
    clip = dataset.splits["train"][0]
    motion = dataset.motion(clip, 3, 9)
    assert motion.shape == (6, dataset.channels) and motion.dtype == torch.float32
    vertices = dataset.vertices(motion, clip.subject)
    np.testing.assert_allclose(vertices, dataset.frames(clip)[3:9], atol=1e-6)


def test_scale_is_the_root_mean_square_of_training_motion(dataset):
    motion = [dataset.motion(clip)[::5] for clip in dataset.splits["train"]]
    assert torch.cat(motion).square().mean().sqrt() == pytest.approx(1, abs=1e-3)


def test_blendshapes_are_padded_to_a_multiple_of_three(folder):
    for path in (folder / "vertices_npy").glob("*.npy"):
        np.save(path, np.load(path)[:, :7])
    templates = {name: np.zeros(7) for name in ("ada", "ben", "cleo", "dan")}
    (folder / "templates.pkl").write_bytes(pickle.dumps(templates))
    describe(folder, triangles=None, colours=None, lips=None, upper_face=None, lip_gap=None,
             eye_gap=None, brow=None)
    dataset = data.open_data(folder)
    assert dataset.channels == 9 and dataset.padding == 2


def test_frame_stride_2_takes_every_second_frame(folder, dataset):
    describe(folder, frame_stride=2, fps=15)
    half = data.open_data(folder)
    clip = half.splits["test"][0]
    np.testing.assert_array_equal(half.frames(clip), dataset.frames(dataset.splits["test"][0])[::2])


def test_region_files_name_lips_and_upper_face(folder):
    describe(folder, lips=None, upper_face=None)
    (folder / "regions").mkdir()
    (folder / "regions" / "lve.txt").write_text("3, 1, 2", "utf-8")
    (folder / "regions" / "fdd.txt").write_text("7,8", "utf-8")
    dataset = data.open_data(folder)
    assert dataset.lips == [3, 1, 2] and dataset.upper_face == [7, 8]


@pytest.mark.parametrize("ending", ["obj", "ply"])
def test_templates_and_triangles_come_from_meshes(folder, dataset, ending):
    """templates/SUBJECT.obj or .ply in place of templates.pkl; triangles of one of them."""
    (folder / "templates.pkl").unlink()
    (folder / "templates").mkdir()
    (folder / "templates" / "._ada.obj").write_text("of macOS", "utf-8")
    for subject, template in dataset.templates.items():
        points = template.reshape(-1, 3)
        lines = [" ".join(map(str, point)) for point in points]
        faces = [" ".join(map(str, triangle)) for triangle in dataset.triangles + (ending == "obj")]
        if ending == "obj":
            text = "".join(f"v {line}\n" for line in lines) + "".join(f"f {face}\n" for face in faces)
        else:
            header = PLY.format("ascii", XYZ, INDICES).replace("vertex 4", f"vertex {len(points)}")
            text = header.replace("face 2", f"face {len(faces)}")
            text += "".join(f"{line}\n" for line in lines) + "".join(f"3 {face}\n" for face in faces)
        (folder / "templates" / f"{subject}.{ending}").write_text(text, "utf-8")
    describe(folder, triangles=None)
    read = data.open_data(folder)
    assert read.templates.keys() == dataset.templates.keys()
    for subject, template in dataset.templates.items():
        np.testing.assert_array_equal(read.templates[subject], template)
    assert np.array_equal(read.triangles, dataset.triangles)
    assert check_dataset(folder)[0] == []


def test_faces_travel_in_a_checkpoint(dataset, tmp_path):
    torch.save({"dataset": dataset.metadata()}, tmp_path / "a.pt")
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    faces = data.Faces.from_checkpoint(checkpoint)
    motion = dataset.motion(dataset.splits["test"][0])
    np.testing.assert_array_equal(faces.vertices(motion, "dan"), dataset.vertices(motion, "dan"))
    assert np.array_equal(faces.triangles, dataset.triangles) and faces.lips == dataset.lips


def test_styles_come_from_a_checkpoint_of_stage_2_alone(dataset, speakers):
    """Stage 1 has no styles: stage 2 may learn those of subjects that stage 1 did not see."""
    trained = dataset.metadata() | {"subjects": ["nora"], "scale": 2.0}
    for config, subjects in (({}, ["ada", "ben"]), ({"styles": 1}, ["nora"])):
        read = data.open_data(speakers, {"dataset": trained, "config": config})
        assert read.subjects == subjects and read.scale == 2.0


def test_random_crops_are_equally_long_and_reach_both_ends():
    torch.manual_seed(0)
    clips = [data.Clip("a_1", "a", 10), data.Clip("a_2", "a", 30)]
    starts = {10: set(), 12: set()}
    chosen = []
    for _ in range(3000):
        crops = data.random_crops(clips, 12, 2)
        lengths = {stop - start for _, start, stop in crops}
        assert lengths == {10 if clips[0] in [clip for clip, _, _ in crops] else 12}
        for clip, start, _ in crops:
            chosen.append(clip.frames)
            if clip.frames == 30:
                starts[lengths.copy().pop()].add(start)
    assert starts == {10: set(range(21)), 12: set(range(19))}
    assert np.mean(np.array(chosen) == 30) == pytest.approx(0.75, abs=0.03)     # as their lengths


# ---------- what is wrong with a data set


def damage_frames(change):
    def damage(folder):
        for path in sorted((folder / "vertices_npy").glob("*.npy")):
            np.save(path, change(np.load(path), files.read_templates(folder / "templates.pkl"), path))
    return damage


def templates_without(name):
    def damage(folder):
        templates = files.load_arrays(folder / "templates.pkl")
        del templates[name]
        (folder / "templates.pkl").write_bytes(pickle.dumps(templates))
    return damage


def first(folder, pattern):
    return sorted(folder.glob(pattern))[0]


def nan_in_one(folder):
    path = first(folder, "vertices_npy/*.npy")
    frames = np.load(path)
    frames[3, 5] = np.nan
    np.save(path, frames)


def long_wav(folder):
    path = first(folder, "wav/*.wav")
    wavfile.write(path, 16000, np.tile(wavfile.read(path)[1], 2))


# name: (what is done to a folder, what check says of it, what a training command says: None, nothing)
DAMAGE = {
    "wav missing": (lambda f: first(f, "wav/*.wav").unlink(), "motion without sound", "match no clip"),
    "npy missing": (lambda f: first(f, "vertices_npy/*.npy").unlink(), "sound without motion",
                    "match no clip"),
    "no templates": (lambda f: (f / "templates.pkl").unlink(), "templates.pkl", "templates.pkl"),
    "template missing": (templates_without("ben"), "no template's name", "no template's name"),
    "npy is text": (lambda f: first(f, "vertices_npy/*.npy").write_text("x", "utf-8"), "npy file", "npy file"),
    "NaN": (nan_in_one, "NaN or infinity", "NaN or infinity"),
    "other channels": (damage_frames(lambda x, t, p: x[:, :-3]), "number of channels", "channels"),
    "displacements": (damage_frames(lambda x, t, p: x - t[p.stem.split("_")[0]]),
                      "displacements instead of vertices", None),
    "millimetres": (damage_frames(lambda x, t, p: 1000 * x), "far from the template", None),
    "other fps": (lambda f: describe(f, fps=25), "25 fps expected", None),
    "long sound": (long_wav, "differ in length", None),
    "no sound": (lambda f: wavfile.write(first(f, "wav/*.wav"), 16000, np.zeros(0, "i2")),
                 "found 0 samples", "found 0 samples"),
    "json is none": (lambda f: (f / "dataset.json").write_text("{", "utf-8"), "dataset.json", "dataset.json"),
    "fps 0": (lambda f: describe(f, fps=0), "fps between", "fps between"),
    "lips out of range": (lambda f: describe(f, lips=[9999]), "lips", "lips"),
    "ragged triangles": (lambda f: describe(f, triangles=[[0, 1, 2], [0]]), "triangles", "triangles"),
    "texts are a list": (lambda f: describe(f, texts=["hello"]), "texts", "texts"),
    "stride is a list": (lambda f: describe(f, frame_stride=[2]), "dataset.json", "dataset.json"),
    "stride -1": (lambda f: describe(f, frame_stride=-1), "frame_stride from 1", "frame_stride from 1"),
    "fps in quotes, no wav": (lambda f: (describe(f, fps="30"), shutil.rmtree(f / "wav")),
                              "motion without sound", "no clip has both"),
    "train is test": (lambda f: describe(f, splits=dict.fromkeys(["train", "val", "test"], ["ada_sentence01"])),
                      "are in train, too", "are in train, too"),
    "no test split": (lambda f: describe(f, splits={"train": ["ada_sentence01"]}), "'val'", "'val'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds_what_is_wrong(folder, name):
    damage, finding, refusal = DAMAGE[name]
    damage(folder)
    findings, _ = check_dataset(folder)
    assert any(finding in line for line in findings), findings
    if refusal and name != "no sound":              # sound is read when it is needed
        with pytest.raises(ValueError, match=refusal) as error:
            data.open_data(folder)
        assert "\n" not in str(error.value)


def test_check_passes_good_data(speakers):
    findings, summary = check_dataset(speakers)
    assert findings == [] and "30 fps, 1350 vertices, 4 subjects" in summary[0]


# ---------- the synthetic speakers


def test_takes_share_the_sound_but_not_the_upper_face():
    audio, vertices, segments, weights = synthetic.make_clip(0, "ada", 1)
    same_audio, _, _, other_weights = synthetic.make_clip(0, "ada", 1, take=1)
    assert np.array_equal(audio, same_audio) and not np.array_equal(weights, other_weights)
    assert np.corrcoef(weights[:, 0], other_weights[:, 0])[0, 1] > 0.99         # the jaw
    assert vertices.shape == (int(len(audio) / 16000 * 30), 1350, 3)


def test_lips_meet_in_p_b_m_and_part_in_open_vowels():
    face = synthetic.build_face()
    closed, opened = [], []
    for sentence in range(1, 6):
        audio, vertices, segments, _ = synthetic.make_clip(0, "ben", sentence)
        upper, lower = face.lip_gap
        gap = 1000 * np.linalg.norm(vertices[:, upper] - vertices[:, lower], axis=1)
        for start, end, phone in segments:
            around = gap[int(start * 30):int(end * 30) + 1]
            if phone in ("P", "B", "M"):
                closed.append(around.min())
            if phone in ("AA", "AE") and end - start > 0.1:
                opened.append(around.max())
    assert np.mean(np.array(closed) < 1) > 0.9 and np.mean(opened) > 5          # mm


def test_texts_are_what_the_phones_say(dataset):
    """The words without punctuation, looked up in the lexicon, are the phones without pauses."""
    lexicon = {word.lower(): phones for word, phones in synthetic.PRONUNCIATION.items()}    # "I"
    for clip in sum(dataset.splits.values(), []):
        words = re.findall("[a-z]+", dataset.texts[clip.name].lower())
        expected = [phone.rstrip("1") for word in words for phone in lexicon[word]]
        assert [phone for _, _, phone in dataset.phones(clip) if phone != "SIL"] == expected


def test_a_word_between_long_pauses_is_spoken():
    segments = [(0.0, 3.0, "SIL"), (3.0, 3.1, "AA"), (3.1, 4.0, "SIL")]
    voice = synthetic.make_subject(0, "dan").voice
    audio = synthetic.synthesise(segments, voice, np.random.default_rng(0))
    assert abs(audio).max() == 1 and abs(audio[:40_000]).max() < 1e-3


def test_segments_cover_the_audio_without_gaps():
    audio, _, segments, _ = synthetic.make_clip(0, "cleo", 2)
    starts = [start for start, _, _ in segments]
    ends = [end for _, end, _ in segments]
    assert starts[0] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(starts[1:], ends[:-1], atol=1e-9)
    assert ends[-1] == pytest.approx(len(audio) / 16000, abs=0.01)


def test_mouth_shuts_at_rest_and_a_blink_closes_one_eye():
    face = synthetic.build_face()
    weights = np.zeros((2, 14), np.float32)
    weights[1, synthetic.BLENDSHAPES.index("blink_left")] = 1
    rest, blink = synthetic.apply_blendshapes(face, face.template, weights)
    upper, lower = face.lip_gap
    assert np.linalg.norm(rest[upper] - rest[lower]) < 1e-4
    moved = np.linalg.norm(blink - rest, axis=1) > 1e-5
    assert moved.any() and (face.template[moved, 0] > 0).all()          # the left half alone


def test_mesh_is_closed_up_to_its_openings():
    """Every inner edge of a triangle is shared by exactly one other triangle, the other way round."""
    face = synthetic.build_face()
    edges = np.concatenate([face.triangles[:, [0, 1]], face.triangles[:, [1, 2]],
                            face.triangles[:, [2, 0]]])
    directed = {tuple(edge) for edge in edges}
    assert len(directed) == len(edges)              # no edge twice in the same direction
    inner = sum((b, a) in directed for a, b in directed)
    assert inner / len(directed) > 0.93
