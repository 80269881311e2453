"""
python data.py check FOLDER: what is wrong with a data set, in plain words.

What new users get wrong most often is the scale of the vertices, the frame rate, displacements
instead of vertices, and missing templates. None of these stops training; the faces just never move.
"""
from pathlib import Path

import numpy as np

from codetalker import SAMPLE_RATE
from data import DataSet
from support.command import progress
from support.files import (find_files, flatten, open_motion, read_audio, read_description,
                           read_templates, some)


def rms(vertices):
    """Root mean square length of vertices (V*3,)."""
    return np.sqrt(np.square(vertices.reshape(-1, 3), dtype=np.float64).sum(axis=1).mean())


def extent(face):
    """Size of a face (V*3,): root mean square distance of its vertices from their centre."""
    vertices = face.reshape(-1, 3)
    return rms(vertices - vertices.mean(axis=0))


def check_position(frames, subject, templates):
    """A finding if a clip's frames (T, V*3) do not lie around their subject's template, or None."""
    mean = frames.mean(axis=0)
    template = templates[subject]
    if rms(frames.std(axis=0)) > 0.2 * max(extent(mean), extent(template)):
        return None                 # a mesh is far larger than its motion: these are other weights
    if extent(mean) < 0.2 * extent(template):
        return ("displacements instead of vertices: frames around the template expected, found "
                "some around 0; add the subject's template to every frame")
    distances = [rms(mean - other) for other in templates.values() if other.size == mean.size]
    limit = 0.05 * extent(template)                 # 4 mm for a head
    if rms(mean - template) > min(limit, *distances):
        return ("far from the template: the subject's face at rest, on the scale of its vertices, "
                "expected in templates.pkl")
    return None


def check_time(lengths, stated_fps):
    """Findings {text: names} about frame rates. lengths {clip name: (frames, seconds of sound)}"""
    findings = {}
    measured = np.median([frames / seconds for frames, seconds in lengths.values()])
    fps = stated_fps or measured
    if abs(measured / fps - 1) > 0.05:
        text = (f"{measured:.3g} frames per second of sound: {fps:g} fps expected; correct fps in "
                "dataset.json, or resample the motion")
        findings[text] = []
    for name, (frames, seconds) in lengths.items():
        if abs(frames / measured - seconds) > 0.3:
            text = "motion and sound differ in length by more than 0.3 s; cut them alike"
            example = f"{name} {frames / measured:.1f} and {seconds:.1f} s"
            findings.setdefault(text, []).append(example)
    return findings


def check_dataset(folder):
    """What is wrong with a data set: findings, a line each; and a summary, a line or two.

    ValueError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: a folder with wav/, vertices_npy/ and templates.pkl expected, "
                         "found no folder")
    findings = {}                   # text: the clips or subjects it is true of

    def add(text, *names):
        findings.setdefault(text, []).extend(names)

    def attempt(read, *arguments):
        try:
            return read(*arguments)
        except (ValueError, OSError) as error:
            add(str(error))

    # 1. which files there are
    motions = find_files(folder / "vertices_npy", ".npy", ".csv")
    wavs = {path.stem: path for path in sorted(folder.glob("wav/[!.]*.[wW][aA][vV]"))}
    for name in sorted(motions.keys() - wavs.keys()):
        add("motion without sound: add wav/NAME.wav, or remove it", name)
    for name in sorted(wavs.keys() - motions.keys()):
        add("sound without motion: add vertices_npy/NAME.npy, or remove it", name)
    description = attempt(read_description, folder) or {}

    # 2. templates
    channel_names = description.get("channel_names")
    templates = attempt(read_templates, folder / "templates.pkl", channel_names) or {}
    for subject, template in templates.items():
        span = np.ptp(template.reshape(-1, 3), axis=0).max()
        if description.get("unit") == "metre" and not 0.1 < span < 0.5:
            add("a template on a wrong scale: a head of about 0.2 expected, as the unit is metre; "
                "rescale templates and vertices (millimetres: times 0.001)",
                f"{subject} {span:.3g}")

    # 3. every clip
    lengths = {}
    for name in progress(sorted(motions), "checking"):
        array = attempt(open_motion, motions[name])
        audio = attempt(read_audio, wavs[name]) if name in wavs else None
        if array is None:
            continue
        frames = flatten(array)
        if audio is not None:
            lengths[name] = len(frames), len(audio) / SAMPLE_RATE
        subject = max([s for s in templates if name.startswith(s)], key=len, default=None)
        if not np.isfinite(frames).all():
            add("NaN or infinity in the motion: export it again", name)
        elif subject is None:
            add("no template's name begins the clip's name: add one to templates.pkl", name)
        elif frames.shape[1] != templates[subject].size:
            add("another number of channels than its template: one mesh for all expected",
                f"{name} {frames.shape[1]}, template {templates[subject].size}")
        elif not channel_names and (finding := check_position(frames, subject, templates)):
            add(finding, name)

    # 4. frame rate
    if lengths:
        stated_fps = description.get("fps")
        if stated_fps:
            stated_fps = float(stated_fps) * int(description.get("frame_stride", 1))
        for text, names in check_time(lengths, stated_fps).items():
            add(text, *names)

    # 5. what a training command would say
    summary = []
    data = None if findings else attempt(DataSet, folder)
    if data:
        attempt(data.measure_motion)
    if data:
        clips = sum(data.splits.values(), [])
        minutes = sum(clip.frames for clip in clips) / data.fps / 60
        splits = ", ".join(f"{len(part)} {split}" for split, part in data.splits.items())
        summary.append(f"{folder}: {minutes:.1f} minutes, {data.fps:g} fps, {data.channels // 3} "
                       f"vertices, {len({clip.subject for clip in clips})} subjects; {splits}")
    lines = []
    for text, names in findings.items():
        lines.append(f"{text}: {len(names)} ({some(names)})" if names else text)
    return lines, summary
