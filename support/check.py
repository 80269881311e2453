"""
python data.py check FOLDER: what is wrong with a data set, in plain words.

What new users get wrong most often is the scale of the vertices, the frame rate, displacements
instead of vertices, and missing templates. Only the last stops training; with the others the model
learns something else.
"""
from pathlib import Path

import numpy as np

from codetalker import SAMPLE_RATE
from data import USUAL_FPS, DataSet, far_frames, find_fps
from support.command import progress
from support.files import (find_files, flatten, match_splits, open_motion, pick_subject, read_audio,
                           read_description, read_templates, some)


def rms(vertices):
    """Root mean square length of vertices (..., V, 3)."""
    return np.sqrt(np.square(vertices, dtype=np.float64).sum(axis=-1).mean())


def extent(face):
    """Size of a face (V, 3): root mean square distance of its vertices from their centre."""
    return rms(face - face.mean(axis=0))


def check_still(vertices, subject, templates):
    """A finding about a clip's vertices (T, V, 3), or None; likewise the three checks below."""
    if np.ptp(vertices, axis=0).max() <= 1e-6 * np.abs(vertices).max():
        return "no motion, all frames are alike: remove the clip, or export it again"


def check_order(vertices, subject, templates):
    """In the time of a frame a face hardly turns back: successive steps go the same way."""
    spread = vertices.std(axis=0)
    most_active = spread >= np.quantile(spread, 0.9)        # elsewhere there may be more noise
    steps = np.diff(vertices[:, most_active], axis=0)
    if len(vertices) >= 30 and np.sum(steps[1:] * steps[:-1]) < 0:
        return "steps far larger than a face makes: sort frames as numbers (frame2 before frame10)"


def check_head_pose(vertices, subject, templates):
    """A finding if the best rigid motion (Kabsch 1976) is larger than what it leaves."""
    mean = vertices.mean(axis=0)
    centres = vertices.mean(axis=1, keepdims=True)                      # (T, 1, 3)
    face = mean - mean.mean(axis=0)
    u, _, vt = np.linalg.svd((vertices - centres).swapaxes(1, 2) @ face)        # (T, 3, 3)
    u[:, :, 2] *= np.linalg.det(u @ vt)[:, None]                        # no reflections
    rigid = face @ (u @ vt).swapaxes(1, 2) + centres                    # (T, V, 3)
    if len(face) >= 10 and rms(rigid - mean) > rms(vertices - rigid):
        return "head motion larger than the face's: align each frame to the template (turn, shift)"


def check_position(vertices, subject, templates):
    """A finding if a clip does not lie around its subject's template."""
    mean = vertices.mean(axis=0)
    template = templates[subject].reshape(-1, 3)
    if rms(vertices.std(axis=0)) > 0.2 * max(extent(mean), extent(template)):
        return None                 # a mesh is far larger than its motion: these are other weights
    if extent(mean) < 0.2 * extent(template):
        return ("displacements instead of vertices: frames around the template expected, found "
                "some around 0; add the subject's template to every frame")
    others = [other.reshape(-1, 3) for other in templates.values() if other.size == mean.size]
    limit = 0.05 * extent(template)                 # 4 mm for a head
    if rms(mean - template) > min(limit, *[rms(mean - other) for other in others]):
        return ("far from the template: the subject's face at rest, on the scale of its vertices, "
                "expected in templates.pkl")
    return None


def check_dataset(folder):
    """What is wrong with a data set: findings, a line each; and a summary, one line or none.

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
    wavs = find_files(folder / "wav", ".wav")
    for name in sorted(motions.keys() - wavs.keys()):
        add("motion without sound: add wav/NAME.wav, or remove it", name)
    for name in sorted(wavs.keys() - motions.keys()):
        add("sound without motion: add vertices_npy/NAME.npy, or remove it", name)
    description = attempt(read_description, folder) or {}
    attempt(match_splits, folder, description.get("splits", {}), motions.keys() & wavs.keys())
    stride = int(description.get("frame_stride", 1))

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
    lengths = {}                    # name: frames that are used, seconds of sound
    faults = {}                     # name: a finding about its motion, or None
    squares = {}                    # name: mean squared displacement of its frames
    for name in progress(sorted(motions), "checking"):
        array = attempt(open_motion, motions[name])
        audio = attempt(read_audio, wavs[name]) if name in wavs else None
        if array is None:
            continue
        frames = flatten(array[::stride])
        if audio is not None:
            lengths[name] = len(frames), len(audio) / SAMPLE_RATE
        subject = pick_subject(name, templates)
        if not np.isfinite(frames).all():
            add("NaN or infinity in the motion: export it again", name)
        elif templates and subject is None:
            add("no template's name begins the clip's name: clips are named SUBJECT_sentence01; "
                f"there are templates of {some(templates)}", name)
        elif subject and frames.shape[1] != templates[subject].size:
            add("another number of channels than its template: one mesh for all expected",
                f"{name} {frames.shape[1]}, template {templates[subject].size}")
        elif subject:
            squares[name] = np.square(frames - templates[subject], dtype=float).mean(axis=1)
            vertices = frames.reshape(len(frames), -1, 3)
            checks = [check_still, check_order]
            if not channel_names:               # weights are no vertices
                checks += [check_head_pose, check_position]
            results = (check(vertices, subject, templates) for check in checks)
            faults[name] = next(filter(None, results), None)

    for name, is_far in zip(squares, far_frames(list(squares.values()))):
        if is_far.any() and not (is_far.all() and faults[name]):
            add("lost or spiked frames, far from all others: repair them, or cut the clip",
                f"{name} frame {some(stride * np.flatnonzero(is_far))}")
        elif faults[name]:
            add(faults[name], name)

    # 4. frame rate
    for text, names in check_time(lengths, description.get("fps")).items():
        add(text, *names)

    # 5. what a training command would say
    summary = []
    data = None if findings else attempt(DataSet, folder)
    if data:
        attempt(data.measure_motion)
        clips = sum(data.splits.values(), [])
        minutes = sum(clip.frames for clip in clips) / data.fps / 60
        splits = ", ".join(f"{len(part)} {split}" for split, part in data.splits.items())
        summary.append(f"{folder}: {minutes:.1f} minutes, {data.fps:.5g} fps, {data.channels // 3} "
                       f"vertices, {len({clip.subject for clip in clips})} subjects; {splits}")
    lines = []
    for text, names in findings.items():
        lines.append(f"{text}: {len(names)} ({some(names)})" if names else text)
    return lines, summary


def check_time(lengths, stated_fps):
    """Findings {text: names} about frame rates. lengths {clip name: (frames, seconds of sound)}"""
    findings = {}
    if not lengths:
        return findings
    measured, is_usual = find_fps(lengths.values())
    is_wrong = not is_usual
    if stated_fps:
        is_wrong = abs(measured / float(stated_fps) - 1) > 0.05
    if is_wrong:
        text = (f"{measured:.3g} frames per second of sound: {stated_fps or USUAL_FPS} fps "
                "expected; cut or resample the motion, or state the right fps in dataset.json")
        findings[text] = []
    for name, (frames, seconds) in lengths.items():
        if abs(frames / measured - seconds) > 0.3:
            text = "motion and sound differ in length by more than 0.3 s; cut them alike"
            example = f"{name} {frames / measured:.1f} and {seconds:.1f} s"
            findings.setdefault(text, []).append(example)
    return findings
