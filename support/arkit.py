"""
Blendshape weights under ARKit's names, in the csv of Epic's app Live Link Face.

    Timecode,BlendShapeCount,EyeBlinkLeft, ... TongueOut,HeadYaw, ... RightEyeRoll
    10:12:00:02.000,61,0.0312, ...                  hours:minutes:seconds:sixtieths

The 52 weights are motion. Nine rotations of head and eyes are not read, and written as 0.
"""
import csv
import time

import numpy as np
from scipy.optimize import nnls

from codetalker import atomic_write
from support.speakers import BLENDSHAPES, apply_blendshapes, build_face

# Apple's ARFaceAnchor.BlendShapeLocation, in the order and with the capitals of Live Link Face
NAMES = """
EyeBlinkLeft EyeLookDownLeft EyeLookInLeft EyeLookOutLeft EyeLookUpLeft EyeSquintLeft EyeWideLeft
EyeBlinkRight EyeLookDownRight EyeLookInRight EyeLookOutRight EyeLookUpRight EyeSquintRight
EyeWideRight JawForward JawRight JawLeft JawOpen MouthClose MouthFunnel MouthPucker MouthRight
MouthLeft MouthSmileLeft MouthSmileRight MouthFrownLeft MouthFrownRight MouthDimpleLeft
MouthDimpleRight MouthStretchLeft MouthStretchRight MouthRollLower MouthRollUpper MouthShrugLower
MouthShrugUpper MouthPressLeft MouthPressRight MouthLowerDownLeft MouthLowerDownRight
MouthUpperUpLeft MouthUpperUpRight BrowDownLeft BrowDownRight BrowInnerUp BrowOuterUpLeft
BrowOuterUpRight CheekPuff CheekSquintLeft CheekSquintRight NoseSneerLeft NoseSneerRight TongueOut
""".split()
ROTATIONS = ["HeadYaw", "HeadPitch", "HeadRoll", "LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll",
             "RightEyeYaw", "RightEyePitch", "RightEyeRoll"]
ARKIT_NAMES = {                     # of speakers.BLENDSHAPES, after Apple's descriptions
    "jaw": "JawOpen", "close": "MouthClose", "protrude": "MouthFunnel", "round": "MouthPucker",
    "spread": "MouthStretchLeft MouthStretchRight", "tuck": "MouthRollLower",
    "raise_upper": "MouthUpperUpLeft MouthUpperUpRight", "frown": "BrowDownLeft BrowDownRight",
    "brow_left": "BrowOuterUpLeft BrowInnerUp", "brow_right": "BrowOuterUpRight BrowInnerUp",
    "blink_left": "EyeBlinkLeft", "blink_right": "EyeBlinkRight",
    "squint": "EyeSquintLeft EyeSquintRight", "cheek": "MouthSmileLeft MouthSmileRight"}
# What dataset.json would say of such data. Three channels are a vertex, so regions are not exact:
# 5 to 13 are jaw, mouth and BrowDownLeft; 4 has JawForward; 16 and 17 are in neither list.
DESCRIPTION = {"channel_names": NAMES, "lips": [*range(5, 14)], "upper_face": [*range(5), 14, 15]}
MAX_LOST = 15                       # rows in which no face was seen: 1/4 s at 60 fps
OPENING = 0.25                      # of the jaw, see fit(): residual 0.8 %; with 1 it is 1.8 %


def read_csv(path):
    """The weights of a csv, columns as NAMES -> (T, 52) float32; ValueError for any other file.

    Rows in which the face was not seen (BlendShapeCount 0) have none; they are interpolated.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        header = [name.lower() for name in header]
        order = [header.index(name.lower()) for name in NAMES]
        seen = [t for t, row in enumerate(rows) if float(row[1])]
        lost = max(np.diff(seen, prepend=-1, append=len(rows))) - 1
        if not seen:
            raise ValueError(f"no face in any of {len(rows)} rows")
        if lost > MAX_LOST:
            raise ValueError(f"no face in {lost} rows; cut the recording there")
        weights = np.array([[rows[t][i] for i in order] for t in seen], np.float32)
    except (ValueError, IndexError, OSError, csv.Error) as error:
        raise ValueError(f"{path}: a csv of Live Link Face expected ({error})") from None
    times = np.arange(len(rows))
    columns = [np.interp(times, seen, column) for column in weights.T]
    return np.stack(columns, axis=1).astype(np.float32)


def can_write(faces):
    """Whether a model's motion is ARKit's weights, or that of the synthetic face."""
    return bool(faces.channel_names) or np.array_equal(faces.triangles, build_face().triangles)


def write_csv(path, vertices, faces, subject):
    """Vertices (T, V, 3), of a model that can_write() accepts, as a csv of Live Link Face."""
    frames = len(vertices)
    if faces.channel_names:
        weights = vertices.reshape(frames, -1)[:, :len(NAMES)]          # without padding
    else:
        weights, residual = fit(vertices, faces.templates[subject].reshape(-1, 3))
        print(f"fitted to ARKit's blendshapes: {residual:.1%} of the motion's variance is left")
    lines = [",".join(["Timecode", "BlendShapeCount", *NAMES, *ROTATIONS])]
    for t, row in enumerate(weights):
        seconds, sixtieths = divmod(t * 60 / faces.fps, 60)
        clock = time.strftime("%H:%M:%S", time.gmtime(seconds))
        numbers = [f"{weight:.6f}" for weight in row] + ["0.000000"] * len(ROTATIONS)
        lines.append(f"{clock}:{sixtieths:06.3f},61,{','.join(numbers)}")
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def fit(vertices, template):
    """Vertices (T, V, 3) of the synthetic face, its template (V, 3) -> weights (T, 52) in 0..1, and
    the share of the motion's variance that they leave: non-negative least squares in each frame.

    apply_blendshapes() stops lips where they touch, so a shape is measured as what it adds to a
    slightly open mouth. With Apple, equal JawOpen and MouthClose shut the mouth: so `close`, which
    shuts a jaw opened by OPENING, is divided by OPENING.
    """
    face = build_face()
    each = np.eye(len(BLENDSHAPES))
    before = np.zeros_like(each)
    before[1:, 0] = OPENING             # the jaw is opened first, except for its own shape
    after = np.maximum(before, each)
    shapes = apply_blendshapes(face, template, after)
    shapes -= apply_blendshapes(face, template, before)
    shapes[BLENDSHAPES.index("close")] /= OPENING
    shapes = shapes.reshape(len(each), -1)                              # (14, V*3)
    motion = (vertices - template).reshape(len(vertices), -1)           # (T, V*3)
    weights = [nnls(shapes.T, frame)[0] for frame in motion]
    weights = np.clip(weights, 0, 1)                                    # (T, 14)
    residual = np.square(motion - weights @ shapes).mean()
    named = [[name in ARKIT_NAMES[shape].split() for name in NAMES] for shape in BLENDSHAPES]
    weights = (weights[:, :, None] * np.array(named)).max(axis=1)       # (T, 14, 52) -> (T, 52)
    return weights, residual / motion.var(axis=0).mean()
