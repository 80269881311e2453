"""
Reading the files that people bring: sound, arrays, pickles, descriptions, meshes.

Every function raises ValueError, in one line, for a file that it cannot read: where, what was
expected, what was found, what to do. Nothing in a file is ever run.
"""
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
from scipy import signal
from scipy.io import wavfile

from codetalker import SAMPLE_RATE, refuse_pointer
from support import arkit


def read_text(path):
    """A text file in UTF-8, with or without a byte order mark."""
    refuse_pointer(path)
    return Path(path).read_text(encoding="utf-8-sig")


class ArrayUnpickler(pickle.Unpickler):
    """A pickle can run any program. This one can only make numpy arrays."""
    array = np.zeros(1)
    makers = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": array.__reduce__()[0],
              "_frombuffer": array.__reduce_ex__(5)[0], "scalar": array[0].__reduce__()[0]}

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.makers:
            return self.makers[name]                # numpy 1 and 2 have them in different modules
        if (module, name) == ("_codecs", "encode"):     # bytes of an array in an old pickle
            return lambda text, encoding: text.encode("latin1")
        raise ValueError(f"refused: {module}.{name} in it is no numpy array")


def load_arrays(path):
    """A pickle of plain containers and numpy arrays, Python 2's too."""
    try:
        refuse_pointer(path)
        with open(path, "rb") as file:
            return ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:
        raise ValueError(f"{path}: a pickle of numpy arrays expected ({error})") from None


def read_templates(path, channel_names=None):
    """templates.pkl, or templates/SUBJECT.obj or .ply -> {subject: (V*3,) float32}

    ARKit's weights are 0 at rest; a subject's name is the clip's, up to an underscore or number.
    """
    clips = find_files(path.parent / "vertices_npy", ".csv") if channel_names else {}
    meshes = find_files(path.with_suffix(""), ".obj", ".ply")
    if path.exists() or not (clips or meshes):
        templates = load_arrays(path)
    elif clips:
        subjects = [re.split(r"_|\d+$", clip)[0] for clip in clips]
        templates = dict.fromkeys(subjects, np.zeros(len(channel_names)))
    else:
        templates = {name: read_mesh(mesh)[0] for name, mesh in meshes.items()}
    if not isinstance(templates, dict) or not templates:
        raise ValueError(f"{path}: {{subject: (V, 3)}} expected, found {type(templates).__name__}")
    read = {}
    for subject, template in templates.items():
        is_array = isinstance(template, np.ndarray) and template.dtype.kind in "fiu"
        if not is_array or template.size == 0:
            raise ValueError(f"{path}: numbers (V, 3) expected for {subject}")
        read[str(subject)] = flatten(template[None])[0]
        check_finite(read[str(subject)], f"{path}: {subject}")
    return read


def find_files(folder, *endings):
    """{name without ending: path} of a folder's files with one of these endings, sorted."""
    paths = sorted(Path(folder).glob("[!.]*"))      # a dot begins what macOS adds
    return {path.stem: path for path in paths if path.suffix.lower() in endings}


def open_motion(path):
    """The motion of a clip, (frames, channels) or (frames, V, 3), from .npy or from ARKit's .csv"""
    return arkit.read_csv(path) if path.suffix.lower() == ".csv" else open_npy(path)


def open_npy(path):
    """An npy file (frames, channels) or (frames, V, 3), not yet read from disk."""
    try:
        refuse_pointer(path)
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        raise ValueError(f"{path}: an npy file of numbers expected ({error})") from None
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: numbers (frames, channels) expected, found {array.dtype} "
                         f"{array.shape}")
    return array


def flatten(frames):
    """(T, channels) or (T, V, 3) -> (T, V*3) float32, with zeros up to a multiple of three."""
    with np.errstate(over="ignore"):                # what overflows is infinite, and refused
        frames = np.asarray(frames, np.float32).reshape(len(frames), -1)
    return np.pad(frames, ((0, 0), (0, -frames.shape[1] % 3)))


def check_finite(array, where):
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: finite numbers expected, found NaN or infinity; export it "
                         "again")


def read_audio(path):
    """A recording, any rate and channels -> mono float32 (samples,) in [-1, 1], 16 kHz. What is no
    PCM or float wav, such as mp3, m4a or a video, is decoded by ffmpeg."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; a recording expected")
    try:
        refuse_pointer(path)
    except ValueError as error:
        raise ValueError(f"{path}: sound expected, found {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)     # chunks that are not audio
        try:
            rate, audio = wavfile.read(path)
        except Exception:                           # scipy raises many kinds
            audio = np.empty(0)
        if audio.size == 0:                             # also where a header's size says 0
            rate, audio = wavfile.read(decode(path))
    if audio.size == 0 or not 1000 <= rate <= 384_000:
        raise ValueError(f"{path}: sound at 1,000 to 384,000 Hz expected, found {audio.size} "
                         f"samples at {rate} Hz")
    if audio.dtype == np.uint8:                     # 8-bit wavs are unsigned
        audio = (audio.astype(np.float32) - 128) / 128
    elif audio.dtype.kind == "i":
        audio = audio / -float(np.iinfo(audio.dtype).min)
    audio = audio.reshape(len(audio), -1)           # (samples, channels)
    check_finite(audio, path)
    mono = audio.mean(axis=1)
    strength = audio.std(axis=0)
    if mono.std() < 0.1 * strength.max():           # the channels cancel each other: take one
        mono = audio[:, strength.argmax()]
    divisor = math.gcd(rate, SAMPLE_RATE)
    mono = signal.resample_poly(mono, SAMPLE_RATE // divisor, rate // divisor)
    return mono.astype(np.float32)


def decode(path):
    """The sound of any file that ffmpeg reads, as a float wav in memory."""
    path = Path(path).absolute()                    # no name then looks like a flag or an address
    if not shutil.which("ffmpeg"):
        command = ["ffmpeg", "-i", str(path), str(path.with_name(f"{path.stem}_16k.wav"))]
        text = subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
        raise ValueError(f"{path}: a PCM or float wav expected; other sound needs ffmpeg: install "
                         f"it, or convert the file elsewhere: {text}")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", path, "-vn", "-c:a", "pcm_f32le"]
    done = subprocess.run([*command, "-f", "wav", "-"], capture_output=True)
    if done.returncode or not done.stdout:
        reason = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        reason = reason.removeprefix(f"{path}: ")
        raise ValueError(f"{path}: sound expected, ffmpeg finds none ({reason})")
    return io.BytesIO(done.stdout)


def read_description(folder):
    """dataset.json and, where it says nothing of them, the vertex lists regions/lve.txt and fdd.txt
    (BIWI has them) and the triangles of mesh.obj, as one dict."""
    path = folder / "dataset.json"
    try:
        description = json.loads(read_text(path)) if path.exists() else {}
        if not isinstance(description, dict):
            raise ValueError("an object {...} expected")
        if not 0 < float(description.get("fps", 30)) < 1000:
            raise ValueError(f"fps between 0 and 1000 expected, found {description['fps']}")
        if int(description.get("frame_stride", 1)) < 1:
            raise ValueError(f"frame_stride from 1 expected, found {description['frame_stride']}")
        splits = description.get("splits", {})
        if not isinstance(splits, dict) or not all(isinstance(v, list) for v in splits.values()):
            raise ValueError('"splits": {"train": [clip names], ...} expected')
        if not isinstance(description.get("texts", {}), dict):
            raise ValueError('"texts": {"clip name": "what is said", ...} expected')
        for name, path in (("lips", folder / "regions" / "lve.txt"),
                           ("upper_face", folder / "regions" / "fdd.txt")):
            if path.exists() and name not in description:
                text = read_text(path).replace(",", " ")
                description[name] = [int(index) for index in text.split()]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    meshes = [*folder.glob("mesh.obj"), *find_files(folder / "templates", ".obj", ".ply").values()]
    if meshes and "triangles" not in description:
        description["triangles"] = read_mesh(meshes[0])[1]
    if find_files(folder / "vertices_npy", ".csv"):
        description = arkit.DESCRIPTION | description
    return description


def match_splits(folder, splits, clips):
    """"splits" of dataset.json, its names without .npy or .wav.

    ValueError if a name is no clip, or is in train and in another split.
    """
    matched = {}
    for split, names in splits.items():
        matched[split] = [re.sub(r"\.(npy|wav)$", "", str(name), flags=re.I) for name in names]
        missing = [name for name in matched[split] if name not in clips]
        if missing:
            raise ValueError(f"{folder}/dataset.json: splits: {split}: {len(missing)} of "
                             f"{len(names)} names match no clip with motion and sound: "
                             f"{some(missing)}; correct them, or leave them out")
    for split in matched.keys() - {"train"}:
        shared = [name for name in matched[split] if name in matched.get("train", [])]
        if shared:
            raise ValueError(f"{folder}/dataset.json: splits: {len(shared)} clips of {split} are "
                             f"in train, too: {some(shared)}; leave them out of one")
    return matched


def pick_subject(clip, templates):
    """The longest name of a template that the name of a clip begins with, or None."""
    return max((name for name in templates if clip.startswith(name)), key=len, default=None)


def read_mesh(path):
    """An .obj or .ply -> vertices (V, 3) float32; triangles [[vertex, vertex, vertex], ...] from 0;
    quads become two."""
    try:
        refuse_pointer(path)
        content = Path(path).read_bytes()
        read = read_ply if content.startswith(b"ply") else read_obj
        vertices, polygons = read(content)
        triangles = []
        for first, *others in polygons:
            triangles += [[first, *pair] for pair in zip(others, others[1:])]
        return np.array(vertices, np.float32), triangles
    except (ValueError, LookupError, TypeError, StopIteration, OSError) as error:
        raise ValueError(f"{path}: an .obj or .ply mesh expected ({error})") from None


def read_obj(content):
    """Bytes of an .obj -> [[x, y, z], ...], [[vertex, vertex, ...], ...] from 0"""
    vertices, polygons = [], []
    for line in content.decode("utf-8-sig", "replace").splitlines():
        if line.startswith("v "):
            vertices.append([float(word) for word in line.split()[1:4]])
        elif line.startswith("f "):                 # a corner is vertex, or vertex/texture/normal
            polygons.append([int(corner.split("/")[0]) - 1 for corner in line.split()[1:]])
    return vertices, polygons


# PLY's types that numpy does not know (char), or knows with another size (int has 8 bytes there).
PLY_TYPES = {"char": "i1", "uchar": "u1", "int": "i4", "uint": "u4", "float": "f4"}


def read_ply(content):
    """Bytes of a .ply, text or binary -> the same. Its header names the properties of a vertex and
    of a face; a list begins with its length."""
    header, body = re.split(rb"end_header\r?\n", content, maxsplit=1)
    words = iter(body.split())
    stream = io.BytesIO(body)
    order = ">" if b"binary_big_endian" in header else "<"

    def take(kind):
        if b"format ascii" in header:
            return float(next(words))
        dtype = np.dtype(PLY_TYPES.get(kind, kind)).newbyteorder(order)
        return np.frombuffer(stream.read(dtype.itemsize), dtype)[0]

    rows = {}
    for element in re.split(r"\nelement ", header.decode("ascii", "replace"))[1:]:
        name, count = element.splitlines()[0].split()
        properties = re.findall(r"^property (?:list (\w+) )?(\w+) (\w+)", element, re.MULTILINE)
        rows[name] = [{} for _ in range(int(count))]
        for row in rows[name]:
            for length, kind, label in properties:
                row[label] = [take(kind) for _ in range(int(take(length) if length else 1))]
    vertices = [[*row["x"], *row["y"], *row["z"]] for row in rows["vertex"]]    # each is a list
    polygons = [row.get("vertex_indices") or row["vertex_index"] for row in rows.get("face", [])]
    return vertices, [[int(corner) for corner in polygon] for polygon in polygons]


def vertex_list(description, name, shape, vertices):
    """An entry of dataset.json as an array of vertex numbers of this shape (-1: any), or None."""
    if not description.get(name):
        return None
    try:
        array = np.array(description[name])
        fits = array.dtype.kind == "i" and array.shape == array.reshape(shape).shape
        fits = fits and 0 <= array.min() and array.max() < vertices
    except ValueError:                              # rows of different length
        fits = False
    if not fits:
        raise ValueError(f"{name} (from dataset.json, regions/ or a mesh): a list of shape {shape} "
                         f"of vertices 0 to {vertices - 1} expected")
    return array


def some(names):
    """The first three of many names, to be printed."""
    names = list(names)
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
