"""Let a face speak, and measure how well it does.

    python infer.py                                     a test sentence beside its ground truth -> talk.html
    python infer.py --wav speech.wav --style ada:0.3,ben:0.7 --subject kira --out talk.mp4
    python infer.py --test                              evaluate on the test split -> runs/ar/test.json

The ending of --out decides what is written:
    .html   one page for any browser: heads to turn, sound, and the codes chosen for it
    .mp4    video with sound (needs ffmpeg)        .gif   the same, silent
    .png    contact sheet: the widest mouth from three sides, stills, the codes
    .obj    one mesh a frame, NAME_0000.obj ...    .npy   (T, V*3) float32, in the layout and unit of the data
"""
import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.collections import TriMesh
from matplotlib.colors import hsv_to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation
from scipy.io import wavfile
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from codetalker import SAMPLE_RATE, frames_in, import_released, load, prepare, whole
from data import (CommandLine, batch_of_sounds, between, cannot, evaluate_generation, finite, generate_clips, open_data,
                  progress, read_wav, writable, write_json)

parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--wav", help="speech, PCM or float (default: the first test clip, beside its truth)")
parser.add_argument("--style", help="way of speaking: a training subject or a weighted mix, ada:0.3,ben:0.7 "
                                    "(default: the clip's own, or the first trained on)")
parser.add_argument("--subject", help="whose face is moved (default: the clip's; with --wav the style's first)")
parser.add_argument("--take", type=between(0, 2 ** 32, int), default=0,
                    help="another number, another face for the same words: the seed of the draw (default: 0)")
parser.add_argument("--temperature", type=between(0, 2),
                    help="how freely codes are drawn: 0 always takes the likeliest, 1 draws as often as in training "
                         "(default: the model's, 0.8 or, of the published models, 0)")
parser.add_argument("--ar", default="runs/ar/best.pt", help="checkpoint of stage 2 (default: %(default)s)")
parser.add_argument("--released", nargs=2, metavar=("STAGE1", "STAGE2"),
                    help="the authors' checkpoints of both stages instead of --ar")
parser.add_argument("--data", help="folder of the data set (default: the built-in speakers, made on first use)")
parser.add_argument("--out", help="file to write (default: talk.html); with --test a folder for every clip's "
                                  ".npy (default: none)")
parser.add_argument("--test", action="store_true", help="evaluate on the whole test split instead")

ENDINGS = (".html", ".mp4", ".gif", ".png", ".obj", ".npy")
FIGURES = {"lve": ("LVE: largest squared lip distance, mean over frames", "mm2"),
           "lve_root": ("its square root", "mm"), "lve_swapped": ("LVE with another clip's audio", "mm2"),
           "fdd": ("FDD: upper-face dynamics, real - made, signed", "mm2"), "fdd_abs": ("FDD, absolute", "mm2"),
           "gap_correlation": ("lip-gap correlation", "of 1"), "r2": ("variance explained", "of 1"),
           "energy": ("energy of motion, made / real", ""), "upper_energy": ("the same, upper face", ""),
           "upper_distance": ("distance of upper-face distributions", "of 1 std"),
           "codes_used": ("codes in use", "codes"), "perplexity": ("perplexity of the codes", "codes")}
STILLS = {"rest": "SIL", "closed": "M B P", "open": "AA AE AO", "rounded": "UW OW W", "lip to teeth": "F V",
          "spread": "IY EY"}        # what the mouth does, in which phones


def main(args):
    device, out = "cuda" if torch.cuda.is_available() else "cpu", Path(args.out or "talk.html")
    if args.test and (args.wav or args.style or args.subject):
        raise ValueError("--test uses every test clip as it is: leave out --wav, --style and --subject")
    if not args.test:                           # before minutes are spent on what cannot be written
        if out.suffix not in ENDINGS:
            raise ValueError(f"--out {out}: an ending of {' '.join(ENDINGS)} expected, found {out.suffix!r}")
        writable(out.parent)
        if out.is_dir():
            raise ValueError(f"--out {out}: a file expected, found a folder")
        if out.suffix == ".mp4" and not shutil.which("ffmpeg"):
            raise ValueError("mp4 needs ffmpeg on the PATH: install it, or use --out talk.html")
    torch.manual_seed(args.take)                # the draw of codes, and compress(): same input, same page
    if args.released:
        faces_only = args.wav is not None and args.data is not None and not Path(args.data, "vertices_npy").is_dir()
        model, data = import_released(*args.released).to(device), open_data(args.data, faces_only)
        names = data.subjects if len(data.subjects) == model.config.styles else map(str, range(model.config.styles))
        state = {"data": {"channels": 3 * model.autoencoder.config.vertices, "fps": model.config.period, "scale": 1.0,
                          "subjects": list(names)}}
    else:
        model, state = load(args.ar, "ar", device)
        data = open_data(args.data)
    data.check(state)
    if args.temperature is not None:
        if args.temperature > 0 and model.config.target != "indices" and model.spread is None:
            raise ValueError("--temperature: 0 expected, since this model does not know how likely other answers are; "
                             f"found {args.temperature:g}")
        model.config.temperature = args.temperature
    if args.test:
        folder = Path(args.released[1] if args.released else args.ar).parent
        return test(model, data, folder, args.out and Path(args.out), args.take)
    if data.triangles is None and out.suffix not in (".html", ".npy"):
        raise ValueError(f"{out.suffix} needs triangles, {data.folder} has none: use .html or .npy")

    if not model.config.wav2vec2:               # a small model's frames are too little work to share; beside another
        torch.set_num_threads(1)                # program two threads would spend their time waiting for each other

    # 1. what is said, in whose style, with whose face
    clip = None if args.wav else data.splits["test"][0]
    audio = read_wav(args.wav or data.wav(clip))
    frames = clip.frames if clip else frames_in(len(audio), data.fps, model.config)
    own = clip and clip.subject in data.subjects
    said = args.style or (clip.subject if own else data.subjects[0])
    style, first = read_style(said, data)
    subject = args.subject or (clip.subject if clip else first if first in data.templates else min(data.templates))
    if subject not in data.templates:
        raise ValueError(f"--subject: one of {', '.join(sorted(data.templates))} expected, found {subject!r}")

    # 2. speak
    start = time.time()
    sound = batch_of_sounds([prepare(torch.from_numpy(audio), data.fps, frames, model.config)], model.config, device)

    def tell(done, frames):                     # where it takes longer than a few seconds
        if time.time() - start > 3:
            progress("frames", done, frames, start)

    motion, codes = model.generate(sound, style[None].to(device), torch.tensor([frames], device=device), tell=tell)
    made, codes = finite(data.vertices(motion[0].cpu(), subject), "what the model made"), codes[0].cpu().numpy()
    print(f"{frames / data.fps:.1f} s of speech in {time.time() - start:.1f} s on {device}, "
          f"{subject}'s face, style {said}")

    # 3. write
    start, written = time.time(), [out]
    faces = {f"made, style {said}": made}
    if clip:
        faces["ground truth"] = data.frames_of(clip.name).reshape(made.shape)
    if out.suffix == ".html":
        write_html(out, faces, data, audio, codes, title=clip.name if clip else Path(args.wav).stem)
    elif out.suffix == ".npy":
        write_npy(out, made, data)
    elif out.suffix == ".obj":
        written = write_obj(out, made, data.triangles)
    elif out.suffix == ".png":
        write_sheet(out, made, data, stills_of(data, clip, frames), codes)
    else:
        try:
            write_video(out, faces, data, audio)
        except subprocess.CalledProcessError as error:
            told = (error.stderr or b"").decode(errors="replace").strip() or f"status {error.returncode}"
            raise ValueError(f"{out}: ffmpeg failed, is the disk full? ({told[-200:]}); talk.html needs none") from None
    size = sum(path.stat().st_size for path in written) / 1e6
    name = out if len(written) == 1 else f"{written[0]} .. {written[-1].name}"
    print(f"{name}: {size:.2f} MB in {time.time() - start:.1f} s")


def test(model, data, folder, out, take):
    """Evaluate on each split that is a test: a table, test.json into `folder`, each motion into `out` if not None."""
    start, figures, written = time.time(), {}, 0
    writable(folder)
    if out:
        writable(out, make=True)
    for split in (name for name in data.splits if name.startswith("test")):
        clips = data.splits[split]
        strangers = sorted({clip.subject for clip in clips} - set(data.subjects))
        figures[split] = evaluate_generation(model, data, split, every_style=True, take=take)
        frames, vertices = sum(clip.frames for clip in clips), data.channels // 3
        print(f"{split}: {len(clips)} clips, {frames} frames, {vertices} vertices ({len(data.lips)} lip, "
              f"{len(data.upper_face)} upper-face), {len(data.subjects)} styles")
        if strangers:
            print(f"strangers, made in every style, figures averaged: {', '.join(strangers)}")
        for key, (name, unit) in FIGURES.items():
            unit = unit if data.millimetres else unit.replace("mm", "unit")
            print(f"    {name:49s} {figures[split][key]:8.4g} {unit}")
        if out:
            styles = [clip.subject if clip.subject in data.subjects else data.subjects[0] for clip in clips]
            for clip, motion in zip(clips, generate_clips(model, data, clips, styles)[0]):
                write_npy(out / f"{clip.name}.npy", data.vertices(motion, clip.subject), data)
                written += 1
    write_json(folder / "test.json", figures)
    print(f"{folder / 'test.json'}{f' and {written} .npy files in {out}' if out else ''} "
          f"({time.time() - start:.0f} s)")


def read_style(text, data):
    """"ada" or "ada:0.3,ben:0.7" -> weights (K,) that sum to 1, and the first name. Raises ValueError."""
    style, names = 0, []
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in data.subjects:
            raise ValueError(f"--style: one of {', '.join(data.subjects)} expected, found {name!r}")
        try:
            weight = float(weight or 1)
        except ValueError:
            weight = 0.0
        if not 0.001 <= weight <= 1000:
            raise ValueError(f"--style: a weight, 0.001 to 1000, expected, as in {name}:0.5, found {part.strip()!r}")
        style, names = style + weight * data.style(name), names + [name]
    return style / style.sum(), names[0]


def stills_of(data, clip, frames):
    """Moments worth a picture, [(frame, caption)]: the longest phone of each kind, or six evenly spaced."""
    path = data.folder / "phones" / f"{clip.name}.tsv" if clip else None
    if path is None or not path.exists():
        return [(int(frame), "") for frame in (np.arange(6) + 0.5) / 6 * frames]
    lines = [line.split() for line in path.read_text().splitlines()]
    segments = [(float(start), float(end), phone) for start, end, phone in lines]
    stills = []
    for caption, phones in STILLS.items():
        found = [segment for segment in segments if segment[2] in phones.split()]
        if found:
            start, end, phone = max(found, key=lambda segment: segment[1] - segment[0])
            stills.append((min(int((start + end) / 2 * data.fps), frames - 1), f"{caption} /{phone}/"))
    return sorted(stills)


# ==================================================================================================== drawing

SKIN = (0.80, 0.62, 0.53)           # where the data name no colours
# Key light from above left, weak fill from the right: direction (x right, y up, z to the viewer), strength.
LIGHTS = (((-0.45, 0.55, 0.75), 0.64), ((0.85, 0.05, 0.45), 0.28))
AMBIENT, WRAP = 0.28, 0.3           # wrapped diffuse light: skin has no hard terminator
SPECULAR, SHININESS = 0.10, 18      # a touch of Blinn-Phong (1977) highlight


def draw_face(axis, vertices, data, yaw=0.0):
    """A face in matplotlib: painter's algorithm with Gouraud shading.

    vertices (V, 3), y up and z out of the face, data.triangles (F, 3) outward counter-clockwise; positive yaw
    (degrees) turns the head to the image's right.
    """
    triangles = data.triangles
    cosine, sine = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    vertices = vertices @ np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
    corners = vertices[triangles]               # (F, 3, 3)
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(vertices)
    for k in range(3):                          # a vertex's normal: the area-weighted mean of its faces'
        np.add.at(normals, triangles[:, k], across)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)

    shade, gloss = AMBIENT, 0.0
    for direction, strength in LIGHTS:
        light = np.array(direction) / np.linalg.norm(direction)
        half = light + (0, 0, 1)                # halfway between the light and the viewer
        half /= np.linalg.norm(half)
        shade = shade + strength * np.maximum(0, (normals @ light + WRAP) / (1 + WRAP))
        gloss = gloss + strength * SPECULAR * np.maximum(0, normals @ half) ** SHININESS
    colours = np.broadcast_to(SKIN if data.colours is None else data.colours, vertices.shape)
    lit = np.clip(colours * shade[:, None] + gloss[:, None], 0, 1)

    # Back-face culling, then back to front. Loose pieces (eyeballs, teeth) lie just behind the largest piece,
    # the skin; they are sorted a little deeper than they are, or an eyeball would come through its lid.
    edges = triangles[:, [0, 1, 1, 2]].reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(vertices),) * 2)
    piece = connected_components(graph, directed=False)[1]
    is_loose = piece[triangles[:, 0]] != np.bincount(piece).argmax()
    order = np.argsort(corners[:, :, 2].mean(1) - 0.045 * np.ptp(vertices[:, 1]) * is_loose, kind="stable")
    visible = triangles[order[across[order, 2] > 0]]

    mesh = TriMesh(Triangulation(vertices[:, 0], vertices[:, 1], visible))
    mesh.set_facecolors(np.column_stack([lit, np.ones(len(lit))]))
    axis.add_collection(mesh)
    low, high = vertices[:, :2].min(0), vertices[:, :2].max(0)
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axis.axis("off")


def code_colours(codes):
    """(N, 4) RGBA in 0..1, one per code and always the same: golden-angle hues, four brightnesses."""
    code = np.arange(codes.max() + 1)
    colour = hsv_to_rgb(np.stack([code * 0.618034 % 1, np.full(len(code), 0.45), np.ones(len(code))], 1))
    luma = colour @ [0.299, 0.587, 0.114]       # ITU-R BT.601
    wanted = np.array([0.42, 0.54, 0.64, 0.74])[code % 4]
    return to_rgba_array(np.clip(colour * (wanted / luma)[:, None], 0, 1))


# ==================================================================================================== writing


def write_npy(path, vertices, data):
    """Vertices (T, V, 3) as (T, channels) float32, as stored in the data set, without the reader's padding."""
    stored = data.rows(data.splits["test"][0].name)[0].size if "test" in data.splits else data.channels
    with whole(path) as part:
        np.save(part, vertices.reshape(len(vertices), -1)[:, :stored])


def write_obj(path, vertices, triangles):
    """Vertices (T, V, 3) as one OBJ file a frame; returns the paths. A longer, older run's other frames go."""
    corners = "f %d %d %d\n" * len(triangles) % tuple(np.ravel(triangles) + 1)      # OBJ counts from 1
    paths = [path.with_name(f"{path.stem}_{frame:04d}.obj") for frame in range(len(vertices))]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for target, frame in zip(paths, vertices):
            points = "v %.6f %.6f %.6f\n" * len(frame) % tuple(np.ravel(frame))
            Path(folder, target.name).write_text(points + corners)
        for target in paths:                    # only when all are written
            os.replace(Path(folder, target.name), target)
    stale = len(paths)
    while (old := path.with_name(f"{path.stem}_{stale:04d}.obj")).exists():
        old.unlink()
        stale += 1
    return paths


def write_video(path, faces, data, audio):
    """An .mp4 with sound or a silent .gif of the faces {name: (T, V, 3)} side by side."""
    gif = path.suffix == ".gif"
    figure = Figure(figsize=(4 * len(faces), 4.5), dpi=80 if gif else 160)
    axes = figure.subplots(1, len(faces), squeeze=False,
                           gridspec_kw=dict(left=0.02, right=0.98, bottom=0.03, top=0.91))[0]
    count = len(next(iter(faces.values())))
    seconds = count / data.fps
    pace = min(data.fps, 25) if gif else data.fps   # GIF counts in 1/100 s: 1/25 can be written, 1/30 not
    frames = ((np.arange(max(1, round(seconds * pace))) + 0.5) / pace * data.fps).astype(int).clip(max=count - 1)
    start = time.time()
    with whole(path) as part, tempfile.TemporaryDirectory() as folder:
        silent, sound = part if gif else Path(folder, "silent.mp4"), Path(folder, "sound.wav")
        with (PillowWriter if gif else FFMpegWriter)(pace).saving(figure, silent, figure.dpi) as writer:
            for done, frame in enumerate(frames, 1):
                for axis, (name, face) in zip(axes, faces.items()):
                    axis.clear()
                    draw_face(axis, face[frame], data)
                    low, high = face.min((0, 1)), face.max((0, 1))
                    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))    # of all frames: no jumping
                    axis.set_title(name, fontsize=11, color="0.3", parse_math=False)
                writer.grab_frame()
                progress("frames", done, len(frames), start)
        if not gif:
            sound.write_bytes(wav_bytes(audio, seconds))
            command = ["ffmpeg", "-v", "error", "-y", "-i", silent, "-i", sound, "-c:v", "copy", part]
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)


def write_sheet(path, vertices, data, stills, codes):
    """A contact sheet: the widest mouth of vertices (T, V, 3), stills [(frame, caption)], codes (T, H)."""
    figure = Figure(figsize=(11, 8.2), dpi=130, layout="constrained")
    rows = figure.subfigures(3, 1, height_ratios=(3.6, 2.6, 2))
    widest = int(data.opening(vertices).argmax())
    for axis, yaw in zip(rows[0].subplots(1, 3), (0, 35, 80)):
        draw_face(axis, vertices[widest], data, yaw)
        axis.set_title(f"widest mouth, {yaw}°, {(widest + 0.5) / data.fps:.2f} s", fontsize=10, color="0.35")
    axes, map_axis = rows[1].subplots(1, len(stills), squeeze=False)[0], rows[2].subplots()
    map_axis.imshow(code_colours(codes)[codes.T], aspect="auto", interpolation="nearest",
                    extent=(0, len(codes) / data.fps, codes.shape[1] - 0.5, -0.5))
    map_axis.set(xlabel="seconds", ylabel="slot, colour: code", yticks=range(0, codes.shape[1], 4))
    for axis, (frame, caption) in zip(axes, stills):
        moment = (frame + 0.5) / data.fps
        draw_face(axis, vertices[frame], data)
        axis.set_title(f"{caption}\n{moment:.2f} s", fontsize=10)
        for colour, width in (("white", 3.5), ("black", 1.5)):
            map_axis.axvline(moment, color=colour, linewidth=width)
        map_axis.text(moment, -0.8, caption[caption.find("/"):], ha="center", va="bottom", fontsize=8, color="0.25")
    with whole(path) as part:
        figure.savefig(part, facecolor="white")


def wav_bytes(audio, seconds):
    """16-bit WAV file of audio (samples,) in [-1, 1], cut or filled with silence to `seconds`."""
    samples = np.zeros(round(seconds * SAMPLE_RATE))
    samples[:len(audio)] = np.clip(audio[:len(samples)], -1, 1)
    file = io.BytesIO()
    wavfile.write(file, SAMPLE_RATE, np.round(samples * 32767).astype(np.int16))
    return file.getvalue()


def compress(vertices, rank=64):
    """Motion (T, V, 3) as mean (V, 3) + weights (T, R) @ basis (R, V*3) int16: a truncated SVD."""
    mean = vertices.mean(0)
    rest = torch.from_numpy((vertices - mean).reshape(len(vertices), -1))
    left, size, right = torch.svd_lowrank(rest, q=min(rank, *rest.shape))
    kept = size > 1e-3 * size[0]                # with 64 at most, an error below 0.1 mm, measured on heads
    step = right.abs().max() / 32767
    return mean, (right[:, kept].T / step).round().numpy(), (left * size * step)[:, kept].numpy()


def write_html(path, faces, data, audio, codes, title):
    """One page that needs nothing else: faces {name: (T, V, 3)} to turn, audio (samples,), codes (T, H).

    Without data.triangles a map of the 40 channels that move most stands for each face.
    """
    frames, slots = codes.shape
    page = dict(title=title, fps=data.fps, frames=frames, faces=[], maps=[], triangles="", colours="")

    def packed(array, dtype):
        return base64.b64encode(np.ascontiguousarray(array, dtype)).decode()

    def add_map(name, cells, palette, rows, height, words="", low=0.0, step=1.0):
        page["maps"].append(dict(name=name, rows=[int(row) for row in rows], columns=cells.shape[1],
                                 cells=packed(cells, np.uint16), palette=packed(palette * 255, np.uint8),
                                 height=int(height), words=words, low=low, step=step))

    if data.triangles is None:
        moves = np.stack([face.reshape(frames, -1).T for face in faces.values()])       # (faces, V*3, T)
        rows = np.sort(np.argsort(-moves.std(2).sum(0))[:40])
        low, step = float(moves[:, rows].min()), float(np.ptp(moves[:, rows])) / 255 or 1.0
        for name, move in zip(faces, moves):
            add_map(name, (move[rows] - low) / step, to_rgba_array(colormaps["viridis"].colors), rows, 240,
                    "VALUE, channel ROW, ", low, step)
    else:
        linear = np.clip(SKIN if data.colours is None else data.colours, 0, 1) ** 2.2
        page["triangles"] = packed(data.triangles, np.uint32)
        page["colours"] = packed(np.broadcast_to(linear, (data.channels // 3, 3)), np.float32)
        for name, face in faces.items():
            mean, basis, weights = compress(face)
            radius = np.ptp(mean[:, 1]) / 2     # the page counts in head radii from the head's middle
            mean = (mean - (mean.min(0) + mean.max(0)) / 2) / radius
            page["faces"].append(dict(name=name, mean=packed(mean, np.float32), basis=packed(basis, np.int16),
                                      weights=packed(weights / radius, np.float32)))
    wav = wav_bytes(audio, frames / data.fps)
    page["audio"] = packed(np.frombuffer(wav, np.uint8), np.uint8)
    samples = np.frombuffer(wav, np.int16, offset=44).astype(float)     # behind the WAV header
    loud = np.array([np.abs(part).max(initial=0) for part in np.array_split(samples, 430)])
    cells = np.abs(np.linspace(-1, 1, 26))[:, None] <= loud / max(loud.max(), 1) + 0.05
    add_map("sound", cells, np.array([[0, 0, 0, 0], [0.55, 0.57, 0.6, 1]]), [0] * 26, 26)
    add_map("codes", codes.T, code_colours(codes), range(slots), slots * np.clip(220 // slots, 8, 18),
            "code VALUE, slot ROW, ")
    text = json.dumps(page)                     # ASCII only: U+2028 and its kin are escaped already
    for sign in "<>&":                          # no title or name can end the script element
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    with whole(path) as part:
        part.write_text(PAGE.replace("{{data}}", text), encoding="utf-8")


# The page. {{data}} stands for the JSON that write_html puts in.
PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>talk</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>
#stage:empty { display: none; }
:root { color-scheme: light dark; --page: #f5f4f1; --ink: #23262b; --soft: #646970; --accent: #b4472e;
        --glow: #fefdfb; --edge: #d6d9de; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131519; --ink: #e8e6e1; --soft: #9aa0a9; --accent: #ee8a6c;
          --glow: #474e5a; --edge: #1b1e24; } }
body { margin: 0 auto; max-width: 860px; padding: 20px; background: var(--page); color: var(--ink);
       font: 14px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font: 600 24px/1.25 ui-serif, Georgia, serif; margin: 0; overflow-wrap: anywhere; }
p, time, .line { color: var(--soft); margin: 4px 0; }
#stage, #controls, .line { display: flex; }
#stage { margin: 12px 0; border-radius: 16px;
         background: radial-gradient(at 50% 42%, var(--glow), var(--edge) 75%); }
figure { flex: 1; min-width: 0; margin: 0; padding-bottom: 10px; text-align: center; letter-spacing: .03em; }
figure canvas { display: block; width: min(100%, 47vh); margin: auto; cursor: grab; touch-action: pan-y; }
#controls { align-items: center; gap: 14px; }
input { flex: 1; min-width: 0; accent-color: var(--accent); }
button { width: 44px; height: 44px; padding: 14px; border: 0; border-radius: 50%; background: var(--accent); }
button::before { content: ""; display: block; height: 16px; background: var(--page);
                 clip-path: polygon(18% 0, 100% 50%, 18% 100%); }
.pause::before { clip-path: polygon(5% 0, 35% 0, 35% 100%, 65% 100%, 65% 0, 95% 0, 95% 100%, 5% 100%); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
.line { justify-content: space-between; margin: 8px 0 3px; }
.map { position: relative; overflow: hidden; border-radius: 6px; touch-action: pan-y; cursor: crosshair; }
.map canvas { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.map i { z-index: 1; position: absolute; inset: 0 auto; width: 2px; pointer-events: none;
         background: var(--ink); box-shadow: 0 0 0 1px var(--page); }
</style>
<h1></h1><p>Space plays, arrow keys step a frame, dragging turns a head.</p>
<div id="stage"></div>
<div id="controls"><button></button><input type="range" aria-label="time"><time></time></div>
<div id="maps"></div><script type="application/json">{{data}}</script>
<script>
"use strict";
const errors = [], find = (selector) => document.querySelector(selector);
window.onerror = (message) => { errors.push(message); };
const data = JSON.parse(find("script").textContent), { frames, fps } = data, duration = frames / fps;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const unpack = (text, Type) => new Type(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
function add(parent, tag, text = "", attributes = {}) {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;    // never innerHTML: titles and names come from outside
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  return element;
}
let seconds = 0, playing = false;

// 1. The face: vertices of the moment, turned into the view, shaded, filled against a depth buffer.
const SIDE = 640, view = { yaw: -0.35, pitch: 0.05 };    // canvas pixels (shown smaller); radians
const triangles = unpack(data.triangles, Uint32Array).map((vertex) => 3 * vertex);
const colours = unpack(data.colours, Float32Array);    // linear light, 0..1
const gamma = Uint8Array.from({ length: 4096 }, (_, i) => 255 * Math.min(i / 2048, 1) ** (1 / 2.2));
const faces = data.faces.map(({ name, mean, basis, weights }) => {
  const attributes = { width: SIDE, height: SIDE, role: "img", "aria-label": name };
  const canvas = add(add(find("#stage"), "figure"), "canvas", "", attributes);
  canvas.after(name);
  const context = canvas.getContext("2d"), image = context.createImageData(SIDE, SIDE);
  const at = unpack(mean, Float32Array);
  return { context, image, pixels: new Uint32Array(image.data.buffer), depth: new Float32Array(SIDE * SIDE),
           at, mean: at.slice(), normal: at.slice(), basis: unpack(basis, Int16Array),
           weights: unpack(weights, Float32Array) };
});

function draw({ context, image, pixels, depth, at, mean, normal, basis, weights }) {
  const now = clamp(seconds * fps - 0.5, 0, frames - 1);    // frame t shows the face at (t + 0.5) / fps
  const from = Math.floor(now), to = Math.min(from + 1, frames - 1);
  const rank = weights.length / frames, size = mean.length;
  at.set(mean);
  for (let k = 0; k < rank; k++) {    // vertices = mean + weights @ basis, linear between frames
    const weight = weights[from * rank + k] * (1 + from - now) + weights[to * rank + k] * (now - from);
    for (let i = 0; i < size; i++) at[i] += weight * basis[k * size + i];
  }
  const cy = Math.cos(view.yaw), sy = Math.sin(view.yaw);
  const cp = Math.cos(view.pitch), sp = Math.sin(view.pitch);
  for (let i = 0; i < size; i += 3) {    // yaw about y, then pitch about x
    const x = at[i], y = at[i + 1], z = cy * at[i + 2] - sy * x;
    at[i] = cy * x + sy * at[i + 2];
    at[i + 1] = cp * y - sp * z;
    at[i + 2] = sp * y + cp * z;
  }
  normal.fill(0);
  for (let i = 0; i < triangles.length; i += 3) {    // vertex normal: sum of its triangles' cross products
    const a = triangles[i], b = triangles[i + 1], c = triangles[i + 2];
    const ux = at[b] - at[a], uy = at[b + 1] - at[a + 1], uz = at[b + 2] - at[a + 2];
    const vx = at[c] - at[a], vy = at[c + 1] - at[a + 1], vz = at[c + 2] - at[a + 2];
    for (let k = i; k < i + 3; k++) {
      normal[triangles[k]] += uy * vz - uz * vy;
      normal[triangles[k] + 1] += uz * vx - ux * vz;
      normal[triangles[k] + 2] += ux * vy - uy * vx;
    }
  }
  for (let i = 0; i < size; i += 3) {    // perspective from 6 head radii away
    const near = 6 / (6 - at[i + 2]);    // 1 / distance is linear on the screen
    const length = Math.hypot(normal[i], normal[i + 1], normal[i + 2]) || 1;
    at[i] = SIDE * (0.5 + 0.44 * near * at[i]);
    at[i + 1] = SIDE * (0.5 - 0.44 * near * at[i + 1]);
    at[i + 2] = near;
    for (let k = i; k < i + 3; k++) normal[k] /= length;
  }
  pixels.fill(0);
  depth.fill(0);
  for (const side of [1, -1]) for (let i = 0; i < triangles.length; i += 3) {    // outer sides, then inner
    const a = triangles[i], b = triangles[i + 1], c = triangles[i + 2];
    const ax = at[a], ay = at[a + 1], bx = at[b], by = at[b + 1], cx = at[c], cy = at[c + 1];
    const area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay), bright = side > 0 ? 2048 : 700;
    if (area * side >= 0) continue;
    const left = Math.max(0, Math.ceil(Math.min(ax, bx, cx)));
    const top = Math.max(0, Math.ceil(Math.min(ay, by, cy)));
    const right = Math.min(SIDE - 1, Math.max(ax, bx, cx)), end = Math.min(SIDE - 1, Math.max(ay, by, cy));
    const du = (by - cy) / area, dv = (cy - ay) / area;    // barycentric u, v per pixel
    for (let y = top; y <= end; y++) {
      let u = ((bx - left) * (cy - y) - (cx - left) * (by - y)) / area;
      let v = ((cx - left) * (ay - y) - (ax - left) * (cy - y)) / area;
      for (let x = left; x <= right; x++, u += du, v += dv) {
        const w = 1 - u - v, pixel = y * SIDE + x, near = u * at[a + 2] + v * at[b + 2] + w * at[c + 2];
        if (u < -1e-6 || v < -1e-6 || w < -1e-6 || near < depth[pixel]) continue;
        depth[pixel] = near;
        const nx = side * (u * normal[a] + v * normal[b] + w * normal[c]);
        const ny = side * (u * normal[a + 1] + v * normal[b + 1] + w * normal[c + 1]);
        const nz = Math.sqrt(Math.max(0, 1 - nx * nx - ny * ny));
        const key = 0.76 * Math.max(0, 0.2 - 0.49 * nx + 0.55 * ny + 0.68 * nz);    // 0.2 softens its edge
        const rim = (1 - nz) * (1 - nz) * Math.max(0, nx + ny), fill = Math.max(0, 0.8 * nx + 0.6 * nz);
        const sky = 0.14 + 0.06 * ny + 0.24 * fill + 0.35 * rim, half = 0.91 * nz + 0.3 * ny - 0.27 * nx;
        const shine = 0.07 * half * half * half * half * half * half * half * half;
        const red = (u * colours[a] + v * colours[b] + w * colours[c]) * (1.06 * key + 0.94 * sky);
        const green = (u * colours[a + 1] + v * colours[b + 1] + w * colours[c + 1]) * (key + sky);
        const blue = (u * colours[a + 2] + v * colours[b + 2] + w * colours[c + 2]) * (0.9 * key + 1.1 * sky);
        pixels[pixel] = 0xff000000 | gamma[bright * (blue + shine) & 4095] << 16
                        | gamma[bright * (green + shine) & 4095] << 8 | gamma[bright * (red + shine) & 4095];
      }
    }
  }
  context.putImageData(image, 0, 0);
}

let last = null;    // where the pointer was
find("#stage").onpointerdown = (event) => { event.target.setPointerCapture(event.pointerId); last = event; };
find("#stage").onpointermove = (event) => {
  if (!event.target.hasPointerCapture(event.pointerId)) return;
  view.yaw += 0.01 * (event.clientX - last.clientX);
  view.pitch = clamp(view.pitch + 0.01 * (event.clientY - last.clientY), -1.5, 1.5);
  last = event;
  show();
};

// 2. The maps: one column a moment, one row a slot or channel; a playhead over each.
const updates = [], maps = find("#maps");    // what to do when another moment is shown
for (const { name, columns, rows, cells, palette, words, low, step, height } of data.maps) {
  const hint = add(add(maps, "div", name, { class: "line" }), "span");
  const box = add(maps, "div", "", { class: "map", style: `height: ${height}px` }), head = add(box, "i");
  const attributes = { width: columns, height: rows.length, role: "img", "aria-label": name };
  const context = add(box, "canvas", "", attributes).getContext("2d");
  const cell = unpack(cells, Uint16Array), paint = unpack(palette, Uint8Array);    // RGBA
  const image = context.createImageData(columns, rows.length);
  cell.forEach((value, i) => image.data.set(paint.subarray(4 * value, 4 * value + 4), 4 * i));
  context.putImageData(image, 0, 0);
  updates.push(() => { head.style.left = `calc(${100 * seconds / duration}% - 1px)`; });
  box.onpointermove = box.onpointerdown = (event) => {
    const x = clamp(event.offsetX / box.clientWidth, 0, 0.9999);
    const row = Math.floor(clamp(event.offsetY / height, 0, 0.9999) * rows.length);
    const value = Number((low + step * cell[row * columns + Math.floor(x * columns)]).toPrecision(4));
    const moment = `${(x * duration).toFixed(2)} s`;
    hint.textContent = words.replace("VALUE", value).replace("ROW", rows[row]) + moment;
    if (event.buttons) seek(x * duration);
  };
  if (!words) continue;    // the waveform
  const axis = add(maps, "div", "", { class: "line" });
  for (let part = 0; part <= 4; part++) add(axis, "span", (part / 4 * duration).toFixed(1) + " s");
}

// 3. The player: the sound is the clock.
const button = find("button"), slider = find("input"), audio = new Audio();
audio.src = URL.createObjectURL(new Blob([unpack(data.audio, Uint8Array)], { type: "audio/wav" }));
const frame = () => clamp(Math.floor(seconds * fps + 1e-6), 0, frames - 1);

function seek(to) {
  audio.currentTime = seconds = clamp(to, 0, duration);
  show();
}

function show() {
  faces.forEach(draw);
  updates.forEach((update) => update());
  slider.value = seconds;
  slider.ariaValueText = find("time").textContent = `${seconds.toFixed(2)} s`;
}

function play(on) {
  playing = on;
  button.className = on ? "pause" : "play";
  button.setAttribute("aria-label", button.className);
  if (!on) return audio.pause();
  seek(seconds < duration - 1e-3 ? seconds : 0);
  audio.play().catch(() => play(false));
  requestAnimationFrame(tick);
}

function tick() {
  if (!playing) return;
  seconds = Math.min(duration, audio.currentTime);
  show();
  audio.ended ? play(false) : requestAnimationFrame(tick);
}

button.onclick = () => play(!playing);
slider.oninput = () => seek(+slider.value);
onkeydown = (event) => {
  const across = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === " " && event.target !== button) play(!playing);
  else if (across) {
    play(false);
    seek((frame() + across + 0.5) / fps);
  } else return;
  event.preventDefault();
};
document.title = find("h1").textContent = data.title;
Object.assign(slider, { max: duration, step: 1 / fps });
play(false);
show();
if (location.hash === "#selftest") {    // for chromium --headless --dump-dom: the title tells
  const sums = [0.1, 0.4, 0.7].map((part) => {    // checksums of the pictures; without faces, the frames
    seek(part * duration);
    const start = faces.length ? 0 : frame();    // a face that stands still must give the same sum
    return faces.reduce((sum, face) => face.pixels.reduce((a, pixel) => (31 * a + pixel) | 0, sum), start);
  });
  const fine = !errors.length && (frames < 3 || new Set(sums).size === 3);
  document.title = `${fine ? "PASS" : "FAIL"} ${[...sums, ...errors].join("; ")}`;
}
</script>
</html>
"""


if __name__ == "__main__":
    with cannot():
        main(parser.parse_args())
