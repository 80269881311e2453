"""ARKit's blendshape weights in the csv of Live Link Face: reading, writing, training on them."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import data
import infer
from codetalker import ARConfig, CodeTalker, MotionAutoencoder, VQConfig, save
from support import arkit, files
from support import speakers as synthetic
from support.check import check_dataset

HEADER = ["Timecode", "BlendShapeCount", *arkit.NAMES, *arkit.ROTATIONS]
WEIGHTS = np.random.default_rng(0).uniform(0, 1, (40, 52)).round(6)


def write_text(path, weights=WEIGHTS, header=HEADER, lost=(), mark=""):
    """A csv as the app writes it, with rotations that are not 0; `lost` rows have no weights."""
    lines = [",".join(header)]
    for t, row in enumerate(weights):
        values = dict(zip(HEADER, [f"10:59:59:{t:02d}.169", "61", *map(str, row), *["-0.25"] * 9]))
        lines.append(values["Timecode"] + ",0" if t in lost else
                     ",".join(values[name[0].upper() + name[1:]] for name in header))
    path.write_text(mark + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    return path


# ---------- reading

CAMEL = [*HEADER[:2], *[name[0].lower() + name[1:] for name in reversed(arkit.NAMES)]]


@pytest.mark.parametrize("how", [{}, {"header": CAMEL}, {"header": HEADER[:54]}, {"mark": "\ufeff"}],
                         ids=["61 columns", "another order and capitals", "52 columns", "byte order mark"])
def test_columns_are_found_by_name(tmp_path, how):
    weights = arkit.read_csv(write_text(tmp_path / "a.csv", **how))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, WEIGHTS, atol=1e-7)


def test_rows_without_a_face_lie_between_their_neighbours(tmp_path):
    """Rows 4 and 5 are lost, a third and two thirds of the way from row 3 to row 6; row 0 is as row 1."""
    weights = arkit.read_csv(write_text(tmp_path / "a.csv", lost=[0, 4, 5]))
    np.testing.assert_allclose(weights[0], WEIGHTS[1], atol=1e-6)
    np.testing.assert_allclose(weights[4], (2 * WEIGHTS[3] + WEIGHTS[6]) / 3, atol=1e-6)
    np.testing.assert_allclose(weights[7:], WEIGHTS[7:], atol=1e-6)


@pytest.mark.parametrize("text, reason", [
    ("", "Live Link Face expected"),
    ("Timecode,BlendShapeCount,JawOpen\n0,1,0.5\n", "eyeblinkleft"),
    (",".join(HEADER), "no face"),
    (",".join(HEADER) + "\n0,61,0.5\n", "index"),
    (",".join(HEADER) + "\n0,61" + ",x" * 61, "could not convert"),
    (",".join(HEADER) + "\n0,61" + ",0" * 61 + "\n0,0" * 16, "no face in 16 rows")])
def test_other_files_are_refused_in_a_line(tmp_path, text, reason):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as error:
        arkit.read_csv(tmp_path / "a.csv")
    assert "\n" not in str(error.value)


# ---------- writing


@pytest.mark.parametrize("fps, frame, timecode", [
    (60, 59, "00:00:00:59.000"), (60, 60, "00:00:01:00.000"), (30, 29, "00:00:00:58.000"),
    (25, 1, "00:00:00:02.400"), (25, 25, "00:00:01:00.000"), (30, 30 * 61, "00:01:01:00.000")])
def test_timecode_counts_sixtieths(tmp_path, fps, frame, timecode):
    faces = SimpleNamespace(channel_names=arkit.NAMES, fps=fps)
    arkit.write_csv(tmp_path / "a.csv", np.zeros((frame + 1, 18, 3), np.float32), faces, "ada")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()[-1].split(",")[0] == timecode


def test_what_is_written_can_be_read(tmp_path):
    faces = SimpleNamespace(channel_names=arkit.NAMES, fps=60)
    vertices = np.pad(WEIGHTS, ((0, 0), (0, 2))).reshape(-1, 18, 3)
    arkit.write_csv(tmp_path / "a.csv", vertices, faces, "ada")
    np.testing.assert_allclose(arkit.read_csv(tmp_path / "a.csv"), WEIGHTS, atol=1e-6)
    header, *rows = [line.split(",") for line in (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()]
    assert header == HEADER and {row[1] for row in rows} == {"61"}
    assert {value for row in rows for value in row[-9:]} == {"0.000000"}            # rotations


@pytest.mark.parametrize("shape", synthetic.BLENDSHAPES)
def test_a_blendshape_gets_its_names_weight(shape):
    """Half of a shape, beside a jaw at a quarter: a half under its names, nothing much elsewhere. A
    mouth closed by half closes half of the jaw's quarter."""
    face, template = synthetic.build_face(), synthetic.make_subject(0, "ben").template
    weights = np.zeros((2, 14))
    weights[:, 0] = 0.25
    weights[1, synthetic.BLENDSHAPES.index(shape)] = 0.5
    fitted, _ = arkit.fit(synthetic.apply_blendshapes(face, template, weights), template)
    names = arkit.ARKIT_NAMES[shape].split()
    others = [i for i, name in enumerate(arkit.NAMES) if name not in [*names, "JawOpen"]]
    expected = {"close": 0.125, "tuck": 0.38}.get(shape, 0.5)       # the upper lip stops the lower one
    for name in names:
        assert fitted[1, arkit.NAMES.index(name)] == pytest.approx(expected, abs=0.05)
    assert fitted[1, others].max() < 0.1
    assert set(names) <= set(arkit.NAMES) and 0 <= fitted.min() and fitted.max() <= 1


def test_a_synthetic_clip_is_explained():
    """Less than 2 % of its variance is left, and the jaw follows what the clip was made from."""
    _, vertices, _, weights = synthetic.make_clip(0, "ada", 90)
    fitted, residual = arkit.fit(vertices, synthetic.make_subject(0, "ada").template)
    assert 0 < residual < 0.02
    jaw = fitted[:, arkit.NAMES.index("JawOpen")]
    assert np.corrcoef(jaw, weights[:, 0])[0, 1] > 0.99


def test_only_named_weights_and_the_synthetic_face_can_be_written(dataset):
    assert arkit.can_write(dataset)
    assert arkit.can_write(SimpleNamespace(channel_names=arkit.NAMES, triangles=None))
    for triangles in (None, dataset.triangles[1:]):
        assert not arkit.can_write(SimpleNamespace(channel_names=None, triangles=triangles))


# ---------- a data set


@pytest.fixture(scope="module")
def live_link(tmp_path_factory):
    """Eleven takes of half a second, 60 fps, without templates or dataset.json."""
    folder = tmp_path_factory.mktemp("live_link")
    (folder / "wav").mkdir()
    (folder / "vertices_npy").mkdir()
    rng = np.random.default_rng(1)
    for name in [f"ada_{i}" for i in range(10)] + ["ben_0"]:
        curve = np.sin(np.arange(30) / 6)[:, None] * rng.uniform(0, 0.5, 52)
        write_text(folder / "vertices_npy" / f"{name}.csv", (0.5 + curve).round(6))
        samples = rng.integers(-9000, 9000, 8000).astype(np.int16)
        wavfile.write(folder / "wav" / f"{name}.wav", 16000, samples)
    return folder


def test_a_folder_of_csv_is_a_data_set(live_link):
    dataset = data.open_data(live_link)
    assert dataset.fps == 60 and dataset.channel_names == arkit.NAMES and dataset.padding == 2
    assert dataset.subjects == ["ada", "ben"] and not any(x.any() for x in dataset.templates.values())
    clip = dataset.splits["train"][0]
    weights = arkit.read_csv(live_link / "vertices_npy" / f"{clip.name}.csv")
    np.testing.assert_allclose(dataset.frames(clip).reshape(30, 54)[:, :52], weights, atol=1e-6)
    jaw = arkit.NAMES.index("JawOpen")
    np.testing.assert_allclose(dataset.lip_gap_curve(dataset.frames(clip)), weights[:, jaw], atol=1e-6)
    findings, summary = check_dataset(live_link)
    assert findings == [] and "60 fps" in summary[0]


def test_weights_stay_in_their_range_and_names_travel(live_link, tmp_path):
    torch.save({"dataset": data.open_data(live_link).metadata()}, tmp_path / "a.pt")
    faces = data.Faces.from_checkpoint(torch.load(tmp_path / "a.pt", weights_only=True))
    assert faces.channel_names == arkit.NAMES
    vertices = faces.vertices(torch.tensor([-5.0, 0.1, 5.0])[:, None].expand(3, 54), "ada")
    assert vertices.min() == 0 and vertices.max() == 1


@pytest.mark.parametrize("name, subject", [
    ("ada_sentence01", "ada"), ("MySlate_2_iPhone", "MySlate"), ("s1_01", "s1"), ("take01", "take")])
def test_subject_of_a_take_without_templates(tmp_path, name, subject):
    (tmp_path / "vertices_npy").mkdir()
    write_text(tmp_path / "vertices_npy" / f"{name}.csv")
    templates = files.read_templates(tmp_path / "templates.pkl", arkit.NAMES)
    assert list(templates) == [subject] and templates[subject].shape == (54,)


def test_from_csv_to_csv(live_link, tmp_path, monkeypatch, capsys):
    """A model of these data, untrained, and a take's speech -> a csv that is read as motion again."""
    monkeypatch.chdir(tmp_path)
    autoencoder = MotionAutoencoder(VQConfig(vertices=18))
    model = CodeTalker(ARConfig(styles=2, period=60), autoencoder)
    save("ar.pt", model, dataset=data.open_data(live_link).metadata())
    wav = str(live_link / "wav" / "ada_0.wav")
    for out in ("a.csv", "a.html", "a.npy"):
        infer.main(infer.parser.parse_args(["--ar", "ar.pt", "--wav", wav, "--out", out]))
    weights = arkit.read_csv("a.csv")
    np.testing.assert_allclose(weights, np.load("a.npy"), atol=1e-6)
    assert weights.shape == (30, 52) and 0 <= weights.min() and weights.max() <= 1
    with pytest.raises(ValueError, match="no triangles"):
        infer.main(infer.parser.parse_args(["--ar", "ar.pt", "--wav", wav, "--out", "a.glb"]))


def test_from_the_synthetic_face_to_csv(runs, speakers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--ar", str(runs / "ar" / "best.pt"), "--data", str(speakers), "--out", "a.csv"]
    infer.main(infer.parser.parse_args(flags))
    assert re.search(r"fitted .* \d+\.\d% of", capsys.readouterr().out)
    frames = data.DataSet(speakers).splits["test"][0].frames
    assert arkit.read_csv("a.csv").shape == (frames, 52)


def test_another_mesh_is_refused_before_any_work(live_link, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = CodeTalker(ARConfig(styles=2), MotionAutoencoder(VQConfig(vertices=18)))
    save("ar.pt", model, dataset=data.open_data(live_link).metadata() | {"channel_names": None})
    wav = str(live_link / "wav" / "ada_0.wav")
    with pytest.raises(ValueError, match="found another mesh"):
        infer.main(infer.parser.parse_args(["--ar", "ar.pt", "--wav", wav, "--out", "a.csv"]))
    assert [path.name for path in tmp_path.iterdir()] == ["ar.pt"]
