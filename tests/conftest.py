"""What the test files share: the repository on the path, the options of the exercises, a few built-in speakers, and a
small false VOCASET."""
import pickle
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)            # these models are too small to share


def pytest_addoption(parser):
    from data import between
    parser.addoption("--impl", metavar="FILE", help="the student's file that test_exercises.py judges")
    parser.addoption("--seed", type=between(0, 10 ** 6, int), default=0, help="of all inputs of test_exercises.py")


def pytest_configure(config):
    if config.getoption("--impl"):
        config.option.tbstyle, config.option.reportchars = "no", ""         # the table says it all


def pytest_terminal_summary(terminalreporter, config):
    """Where a student's file is judged: points and hints, a line for each task."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    rows = [(report.user_properties[0][1], report) for report in reports
            if config.getoption("--impl") and report.when == "call" and report.user_properties]
    for task, report in rows:
        points = f"{task.points * report.passed} of {task.points}"
        terminalreporter.write_line(f"{points}  {task.name:23} {report.longreprtext}".rstrip())
    if rows:
        terminalreporter.write_line(f"{sum(task.points * report.passed for task, report in rows)} of "
                                    f"{sum(task.points for task, _ in rows)} points")


def browse(page, profile):
    """What chromium makes of a page that tests itself, as text; skips the test where there is no chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("no chromium")
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync --virtual-time-budget=4000 --dump-dom").split()
    return subprocess.run([browser, *flags, f"--user-data-dir={profile}", f"{page.as_uri()}#selftest"],
                          capture_output=True, text=True, timeout=90).stdout


@pytest.fixture(scope="session")
def few_speakers():
    """build_speakers(), but four subjects speak ten sentences in all, and no processes are started for it."""
    import data

    def build(folder, seed=0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "SUBJECTS", {"train": ["ada", "ben"], "val": ["cleo"], "test": ["dan"]})
            patch.setattr(data, "SENTENCES", {"train": range(1, 4), "val": range(41, 43), "test": range(61, 63)})
            patch.setattr(data, "ProcessPoolExecutor", ThreadPoolExecutor)
            data.person.cache_clear()               # who a subject is depends on the list of subjects
            data.build_speakers(folder, seed)
            data.person.cache_clear()
        return folder

    return build


@pytest.fixture(scope="session")
def speakers(few_speakers, tmp_path_factory):
    return few_speakers(tmp_path_factory.mktemp("data") / "speakers")


# ---------------------------------------------------------------------------------------------------- a false VOCASET

SPOKEN = {"FaceTalk_170728_03272_TA": (1, 2, 3), "FaceTalk_170904_00128_TA": (1, 2, 3),         # train
          "FaceTalk_170725_00137_TA": (1, 2, 3), "FaceTalk_170811_03275_TA": (21, 22),          # and val
          "FaceTalk_170809_00138_TA": (21, 22)}                                                 # and test
SOUND_ONLY, MOTION_ONLY = ("FaceTalk_170728_03272_TA", 4), ("FaceTalk_170904_00128_TA", 5)


def python2_pickle(value):
    """What cPickle.dumps(value, 2) of Python 2.7 with numpy 1.16 gives, less its memo: text is 8-bit str and so are
    the numbers of an array; numpy's modules have their old names. For dict, str, int and arrays."""
    def write(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(write(item) for pair in value.items() for item in pair) + b"u"
        if isinstance(value, str):
            return b"U" + bytes([len(value)]) + value.encode("latin1")
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        shape, numbers = b"(" + b"".join(map(write, value.shape)) + b"t", value.tobytes()
        dtype = b"cnumpy\ndtype\n" + write(value.dtype.str[1:]) + b"K\0K\1\x87R(K\3U\1<NNN" + 2 * write(-1) + b"K\0tb"
        return (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1" + shape + dtype
                + b"\x89T" + struct.pack("<i", len(numbers)) + numbers + b"tb")

    return b"\x80\2" + write(value) + b"."


@pytest.fixture(scope="session")
def vocaset_raw(tmp_path_factory):
    """VOCASET as it is downloaded, but 14 sentences of about a second, and FLAME's masks and mesh beside it.

    5023 points of an egg; the lower front opens with the sound's loudness, the upper front nods slowly. 60 frames per
    second, their rows in no order; one sentence has sound alone, one motion alone."""
    folder, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    turn = np.arange(5023) * np.pi * (3 - 5 ** 0.5)                                 # a sunflower's spiral on a sphere
    height = np.linspace(1, -1, 5023)
    across = np.sqrt(1 - height ** 2)
    sphere = np.stack([across * np.cos(turn), height, across * np.sin(turn)], 1)
    front = sphere[:, 2] > 0.5
    lips, forehead = (np.flatnonzero(front & mask) for mask in ((abs(height + 0.4) < 0.15), height > 0.5))
    templates, sounds, index, faces = {}, {}, {}, []
    for subject, sentences in SPOKEN.items():
        templates[subject] = (sphere * rng.uniform([0.06, 0.11, 0.08], [0.08, 0.13, 0.1])).astype(np.float32)
        sounds[subject], index[subject] = {}, {}
        for number in (*sentences, *(extra[1] for extra in (SOUND_ONLY, MOTION_ONLY) if extra[0] == subject)):
            frames, sentence = int(rng.integers(48, 66)), f"sentence{number:02d}"
            loud = np.abs(np.sin(np.cumsum(rng.uniform(0.05, 0.3, frames))))
            if (subject, number) != MOTION_ONLY:
                envelope = np.interp(np.arange(frames * 22_000 // 60) * 60 / 22_000, np.arange(frames), loud)
                audio = (8000 * envelope * rng.uniform(-1, 1, len(envelope))).astype(np.int16)
                sounds[subject][sentence] = {"audio": audio, "sample_rate": 22_000}
            if (subject, number) != SOUND_ONLY:
                motion = np.repeat(templates[subject][None], frames, 0)
                motion[:, lips, 1] -= 0.01 * loud[:, None]
                motion[:, forehead, 1] += 0.004 * np.sin(np.arange(frames) / 15 + number)[:, None]
                index[subject][sentence] = {frame: sum(map(len, faces)) + frame for frame in range(frames)}
                faces.append(motion)
    faces = np.concatenate(faces).astype(np.float32)
    place = rng.permutation(len(faces))                                             # where each face is put
    stored = np.empty_like(faces)
    stored[place] = faces
    for sentences in index.values():
        for name, rows in sentences.items():                                        # and the last frame comes first
            sentences[name] = {frame: int(place[row]) for frame, row in reversed(rows.items())}
    np.save(folder / "data_verts.npy", stored)
    (folder / "templates.pkl").write_bytes(python2_pickle(templates))
    (folder / "raw_audio_fixed.pkl").write_bytes(python2_pickle(sounds))
    (folder / "subj_seq_to_idx.pkl").write_bytes(pickle.dumps(index, 2))
    masks = {"lips": lips, "forehead": forehead, "eye_region": np.append(forehead[:5], 7), "neck": np.arange(9)}
    (folder / "FLAME_masks.pkl").write_bytes(pickle.dumps(masks, 2))
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in 0.1 * sphere] + ["vt 0.5 0.5"]
    lines += [f"f {a}/1 {b}/1/1 {c}" for a, b, c in ConvexHull(sphere).simplices + 1]
    (folder / "head_template.obj").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def vocaset(vocaset_raw, tmp_path_factory):
    """The same after `python data.py convert`, with regions and triangles."""
    import data

    out = tmp_path_factory.mktemp("converted") / "vocaset"
    data.convert_vocaset(vocaset_raw, out, vocaset_raw / "FLAME_masks.pkl", vocaset_raw / "head_template.obj")
    return out
