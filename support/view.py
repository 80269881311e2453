"""
Pictures, videos and files of talking faces. Not part of the paper: skip it on first reading.

`faces` is a data.Faces; all but write_npy and write_html need its triangles. Vertices are (V, 3),
y up and z out of the face. Videos show frame t from t / fps to (t + 1) / fps; the page has it at
the middle of that, glTF at its start, and both are linear in between.
"""
import base64
import io
import json
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.collections import TriMesh
from matplotlib.colors import hsv_to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation
from scipy.io import wavfile
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from codetalker import SAMPLE_RATE, atomic_write

SKIN = (0.80, 0.62, 0.53)  # where the data name no colours


def unit(vectors):
    """Vectors (..., 3) divided by their length; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)


# Key light from above left, weak fill light from the right: x right, y up, z to the viewer.
LIGHTS = unit(np.array([(-0.45, 0.55, 0.75), (0.85, 0.05, 0.45)]))
HALFWAY = unit(LIGHTS + (0, 0, 1))  # between a light and the viewer
STRENGTH = np.array([0.64, 0.28])
AMBIENT = 0.28
WRAP = 0.3  # wrapped diffuse light: skin has no hard terminator
SPECULAR, SHININESS = 0.10, 18  # a touch of Blinn-Phong (1977) highlight
STILLS = {  # what the mouth does, in which phones
    "rest": "SIL",
    "closed": "M B P",
    "open": "AA AE AO",
    "rounded": "UW OW W",
    "lip to teeth": "F V",
    "spread": "IY EY",
}
GLB_SHAPES = 48  # largest error in generated clips of 3 to 10 s: 0.08 mm (0.17 mm with 32)


# ---------- drawing -------------------------------------------------------------------------------


def draw_face(axis, vertices, faces, yaw=0.0):
    """Draw a face (V, 3) into a matplotlib axis: painter's algorithm with Gouraud shading.

    faces.triangles (F, 3) are counter-clockwise from outside; faces.colours (V, 3) or None.
    A positive yaw (degrees) turns the face to the right of the image.
    """
    angle = np.radians(yaw)
    sine, cosine = np.sin(angle), np.cos(angle)
    vertices = vertices @ np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
    triangles = faces.triangles
    face_normals, normals = mesh_normals(vertices, triangles)

    diffuse = np.maximum(0, (normals @ LIGHTS.T + WRAP) / (1 + WRAP))  # (V, lights)
    specular = SPECULAR * np.maximum(0, normals @ HALFWAY.T) ** SHININESS
    brightness = AMBIENT + diffuse @ STRENGTH  # (V,)
    colours = vertex_colours(faces, vertices) * brightness[:, None]
    colours += (specular @ STRENGTH)[:, None]

    # Back to front, without back faces. Eyeballs and teeth lie just behind the skin: they are
    # sorted a little deeper than they are, or an eyeball would come through its lid.
    depth = vertices[triangles, 2].mean(1)
    depth -= 0.045 * np.ptp(vertices[:, 1]) * is_loose(triangles)
    order = np.argsort(depth, kind="stable")
    visible = triangles[order[face_normals[order, 2] > 0]]

    mesh = TriMesh(Triangulation(vertices[:, 0], vertices[:, 1], visible))
    mesh.set_facecolors(to_rgba_array(np.clip(colours, 0, 1)))
    axis.add_collection(mesh)
    set_limits(axis, vertices)
    axis.set(aspect="equal")
    axis.axis("off")


def mesh_normals(vertices, triangles):
    """Outward normals of triangles (F, 3), twice their area long, and of vertices (V, 3), unit."""
    a, b, c = vertices[triangles].transpose(1, 0, 2)  # (F, 3 corners, 3) -> three of (F, 3)
    face_normals = np.cross(b - a, c - a)
    normals = np.zeros_like(vertices)
    for corner in triangles.T:
        np.add.at(normals, corner, face_normals)
    normals[~normals.any(1)] = (0, 0, 1)  # vertices of no triangle
    return face_normals, unit(normals)


def vertex_colours(faces, vertices):
    """RGB in 0..1 for each of the vertices (V, 3)."""
    colours = SKIN if faces.colours is None else faces.colours
    return np.clip(np.broadcast_to(colours, vertices.shape), 0, 1)


def is_loose(triangles):
    """(F,) bool: triangles outside the largest connected piece of the mesh, the skin."""
    edges = triangles[:, [0, 1, 1, 2]].reshape(-1, 2)  # (F, 4) -> (2F, 2)
    count = triangles.max() + 1
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(count, count))
    piece = connected_components(graph, directed=False)[1]  # (V,)
    return piece[triangles[:, 0]] != np.bincount(piece).argmax()


def set_limits(axis, vertices):
    """Fit an axis to vertices (..., 3)."""
    x, y = vertices[..., 0], vertices[..., 1]
    axis.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))


def code_colours(codes):
    """(codes.max() + 1, 4) RGBA in 0..1: a code has the same colour in every picture.

    Golden-angle hues in four brightnesses.
    """
    code = np.arange(codes.max() + 1)
    hue = code * 0.618034 % 1
    colours = hsv_to_rgb(np.stack([hue, np.full(len(code), 0.45), np.ones(len(code))], 1))
    luma = colours @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    wanted = np.array([0.42, 0.54, 0.64, 0.74])[code % 4]
    return to_rgba_array(np.clip(colours * (wanted / luma)[:, None], 0, 1))


# ---------- writing -------------------------------------------------------------------------------


def write_npy(path, vertices, channels):
    """Vertices (T, V, 3) as (T, channels) float32, without the zeros that pad the last vertex."""
    flat = vertices.reshape(len(vertices), -1)
    with atomic_write(path) as tmp:
        np.save(tmp, flat[:, :channels].astype(np.float32, copy=False))


def wav_bytes(audio, seconds):
    """A 16-bit WAV file of audio (samples,) in [-1, 1], cut or padded with silence to `seconds`."""
    samples = np.zeros(round(seconds * SAMPLE_RATE))
    samples[:len(audio)] = np.clip(audio[:len(samples)], -1, 1)
    file = io.BytesIO()
    wavfile.write(file, SAMPLE_RATE, np.round(samples * 32767).astype(np.int16))
    return file.getvalue()


def write_video(path, vertices, faces, audio, progress=iter):
    """An .mp4 with sound (needs ffmpeg) or a silent .gif: the faces {name: (T, V, 3)} side by side.

    `progress` wraps the frames, as tqdm does. Raises ValueError if ffmpeg fails.
    """
    is_gif = path.suffix == ".gif"
    clips = list(vertices.values())
    frames = len(clips[0])
    fps = min(faces.fps, 12.5) if is_gif else faces.fps  # a GIF counts in 1/100 s, and is large
    shown = np.arange(0, frames, faces.fps / fps).astype(int)
    figure = Figure(figsize=(4 * len(clips), 4.5), dpi=56 if is_gif else 160)
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.03, top=0.91)
    axes = figure.subplots(1, len(clips), squeeze=False)[0]
    writer = PillowWriter(fps) if is_gif else FFMpegWriter(fps)
    with atomic_write(path) as tmp, tempfile.TemporaryDirectory() as folder:
        silent = tmp if is_gif else Path(folder, "silent.mp4")
        try:
            with writer.saving(figure, silent, figure.dpi):
                for frame in progress(shown):
                    for axis, name, clip in zip(axes, vertices, clips):
                        axis.clear()
                        draw_face(axis, clip[frame], faces)
                        set_limits(axis, clip)              # of all frames: no jumping
                        axis.set_title(name, fontsize=11, color="0.3", parse_math=False)
                    writer.grab_frame()
            if not is_gif:
                sound = Path(folder, "sound.wav")
                sound.write_bytes(wav_bytes(audio, frames / faces.fps))
                inputs = ["-i", silent, "-i", sound]
                command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *inputs, "-c:v", "copy", tmp]
                subprocess.run(command, capture_output=True, check=True, encoding="utf-8",
                               errors="replace")
        except subprocess.CalledProcessError as error:      # either run of ffmpeg
            reason = " ".join(str(error.stderr).split())[-200:]
            raise ValueError(f"{path}: ffmpeg failed ({reason}); talk.html needs none") from None


def pick_stills(segments, frames, fps):
    """Moments for the contact sheet, in order: [(frame, caption)].

    The longest phone of each kind in segments [(start s, end s, phone)]; without segments, six
    evenly spaced frames.
    """
    stills = []
    for caption, phones in STILLS.items():
        found = [segment for segment in segments or [] if segment[2] in phones.split()]
        if found:
            start, end, phone = max(found, key=lambda segment: segment[1] - segment[0])
            frame = int((start + end) / 2 * fps)
            stills.append((min(frame, frames - 1), f"{caption} /{phone}/"))
    if not stills:
        stills = [(frames * number // 12, "") for number in range(1, 12, 2)]
    return sorted(stills)


def write_sheet(path, vertices, faces, stills, codes):
    """A .png: the widest mouth in vertices (T, V, 3), stills [(frame, caption)], codes (T, H)."""
    figure = Figure(figsize=(11, 8.2), dpi=130, layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(3.6, 2.6, 2))
    widest = int(faces.lip_gap_curve(vertices).argmax())
    moment = (widest + 0.5) / faces.fps
    what = "most active channel's maximum" if faces.lip_gap is None else "widest mouth"
    for axis, yaw in zip(top.subplots(1, 3), (0, 35, 80)):
        draw_face(axis, vertices[widest], faces, yaw)
        axis.set_title(f"{what}, {yaw}°, {moment:.2f} s", fontsize=10, color="0.35")

    frames, components = codes.shape
    code_map = bottom.subplots()
    code_map.imshow(code_colours(codes)[codes.T], aspect="auto", interpolation="nearest",
                    extent=(0, frames / faces.fps, components + 0.5, 0.5))
    code_map.set(xlabel="seconds", ylabel="component (colour: its code)")
    axes = middle.subplots(1, len(stills), squeeze=False)[0]
    for axis, (frame, caption) in zip(axes, stills):
        moment = (frame + 0.5) / faces.fps
        draw_face(axis, vertices[frame], faces)
        axis.set_title(f"{caption}\n{moment:.2f} s", fontsize=10)
        code_map.axvline(moment, color="white", linewidth=3.5)
        code_map.axvline(moment, color="black", linewidth=1.5)
        phone = caption[caption.find("/"):]
        code_map.text(moment, 0.2, phone, rotation=45, va="bottom", fontsize=8, color="0.25")
    with atomic_write(path) as tmp:
        figure.savefig(tmp, facecolor="white")


def principal_shapes(vertices, rank=64):
    """Vertices (T, V, 3) as mean (V, 3) + weights (T, R) @ shapes (R, V*3): a truncated SVD.

    The shapes are orthonormal, at most `rank`, without those that move the face less than a
    thousandth of the first. They come from at most 1,000 evenly spaced frames.
    """
    flat = vertices.reshape(len(vertices), -1)  # (T, V, 3) -> (T, V*3)
    mean = flat.mean(0)
    sample = flat[::len(flat) // 1000 + 1] - mean  # (n, V*3)
    # With n far below V*3, the eigenvectors of an (n, n) matrix are ten times faster than an SVD.
    _, vectors = np.linalg.eigh(sample @ sample.T)  # columns, the largest last
    shapes = vectors[:, ::-1][:, :rank].T @ sample
    size = np.linalg.norm(shapes, axis=1)
    shapes = unit(shapes[size >= 1e-3 * size[0]])
    weights = flat @ shapes.T - mean @ shapes.T
    return mean.reshape(-1, 3), weights, shapes


def write_html(path, vertices, faces, audio, codes, title, caption="", segments=None,
               code_faces=None):
    """One page that needs nothing else: viewer.html with faces to turn, sound, lip gap and codes.

    vertices {name: (T, V, 3)}, the generated ones first; audio (samples,); codes (T, H) or None;
    segments [(start s, end s, word or phone)] or None; code_faces (N, V, 3) or None: the faces
    that are shown when codes are pointed at. Without faces.triangles the page shows the 40 most
    active channels.
    """
    clips = list(vertices.values())
    frames = len(clips[0])
    curves = np.stack([faces.lip_gap_curve(clip) for clip in clips])  # (clips, T)
    wav = wav_bytes(audio, frames / faces.fps)
    page = {
        "title": title,
        "caption": caption,
        "names": list(vertices),
        "fps": faces.fps,
        "frames": frames,
        "segments": segments or [],
        "curve": "most active channel" if faces.lip_gap is None else "lip gap",
        "curves": np.float32(curves * (faces.to_mm or 1)),
        "unit": "mm" if faces.to_mm else "",
        "audio": np.frombuffer(wav, np.uint8),
    }
    if codes is not None:
        page["codes"] = np.uint16(codes.T)
        page["code_palette"] = np.uint8(code_colours(codes) * 255)

    if faces.triangles is None:
        motion = np.stack([clip.reshape(frames, -1).T for clip in clips])  # (clips, V*3, T)
        activity = motion.std(2).sum(0)
        channels = np.sort(np.argsort(-activity)[:40])
        motion = motion[:, channels]
        page["channels"] = channels.tolist()
        page["low"] = float(motion.min())
        page["step"] = float(np.ptp(motion)) / 255 or 1.0
        page["motion"] = np.uint16((motion - page["low"]) / page["step"])
        page["motion_palette"] = np.uint8(to_rgba_array(colormaps["viridis"].colors) * 255)
    else:
        if code_faces is not None:
            clips.append(code_faces)
        mean, weights, shapes = principal_shapes(np.concatenate(clips))
        middle = (mean.min(0) + mean.max(0)) / 2
        radius = np.ptp(mean[:, 1]) / 2  # the page's unit of length
        step = max(np.abs(shapes).max(), 1e-12) / 32767
        page["triangles"] = np.uint32(faces.triangles)
        page["colours"] = np.float32(vertex_colours(faces, mean) ** 2.2)  # sRGB -> linear
        page["mean"] = np.float32((mean - middle) / radius)
        page["shapes"] = np.int16(np.round(shapes / step))
        page["weights"] = np.float32(weights * step / radius)  # (clips * T [+ N], R)

    text = json.dumps(page, default=to_base64)  # ASCII: U+2028 and its kin are escaped already
    for sign in "<>&":  # no title or name can end the script element
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    viewer = Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
    with atomic_write(path) as tmp:
        tmp.write_text(viewer.replace("{{data}}", text), encoding="utf-8")


def to_base64(array):
    return base64.b64encode(array.tobytes()).decode()


def write_glb(path, vertices, faces):
    """One animated binary glTF 2.0 file of vertices (T, V, 3), in the data's unit (glTF: metres).

    The mean face is the mesh, the principal shapes are its morph targets, with weights in [-1, 1]
    that are linear between frames. Frame t is at t / fps; the last is held for one frame.
    """
    mean, weights, shapes = principal_shapes(vertices, GLB_SHAPES)
    largest = np.maximum(np.abs(weights).max(0), 1e-12)  # (R,)
    weights = np.concatenate([weights, weights[-1:]]) / largest
    targets = (shapes * largest[:, None]).reshape(len(shapes), -1, 3)  # (R, V*3) -> (R, V, 3)
    times = np.arange(len(weights)) / faces.fps
    normals = mesh_normals(mean, faces.triangles)[1]
    colours = vertex_colours(faces, mean) ** 2.2  # sRGB -> linear

    binary = bytearray()
    views = []
    accessors = []
    arrays = [faces.triangles.ravel(), mean, normals, colours, times, weights.ravel(), *targets]
    for number, array in enumerate(arrays):
        array = np.float32(array) if number else np.uint32(array)
        view = {"buffer": 0, "byteOffset": len(binary), "byteLength": array.nbytes}
        if array.ndim == 2 or number == 0:
            view["target"] = 34962 if number else 34963  # ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER
        views.append(view)
        accessors.append({
            "bufferView": number,
            "componentType": 5126 if number else 5125,  # FLOAT, UNSIGNED_INT
            "type": "VEC3" if array.ndim == 2 else "SCALAR",
            "count": len(array),
            "min": np.atleast_1d(array.min(0)).tolist(),
            "max": np.atleast_1d(array.max(0)).tolist(),
        })
        binary += array.tobytes()
    numbers = range(len(targets))
    primitive = {
        "indices": 0,
        "attributes": {"POSITION": 1, "NORMAL": 2, "COLOR_0": 3},
        "targets": [{"POSITION": 6 + number} for number in numbers],
        "material": 0,
    }
    skin = {"metallicFactor": 0, "roughnessFactor": 0.6}
    target_names = [f"shape {number}" for number in numbers]
    content = {
        "asset": {"version": "2.0", "generator": "CodeTalker from scratch"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": "face", "mesh": 0}],
        "meshes": [{"primitives": [primitive], "extras": {"targetNames": target_names}}],
        "materials": [{"pbrMetallicRoughness": skin, "doubleSided": True}],
        "animations": [{
            "name": "talk",
            "samplers": [{"input": 4, "output": 5, "interpolation": "LINEAR"}],
            "channels": [{"sampler": 0, "target": {"node": 0, "path": "weights"}}],
        }],
        "buffers": [{"byteLength": len(binary)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)  # chunks are multiples of four bytes
    with atomic_write(path) as tmp, open(tmp, "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(binary)))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(binary), b"BIN\0") + binary)
