"""
Data sets: any folder in the layout of FaceFormer and CodeTalker, or the synthetic one.

    python data.py check FOLDER         says in plain words what is wrong with a data set

    FOLDER/wav/SUBJECT_sentence01.wav               speech, any sample rate
    FOLDER/vertices_npy/SUBJECT_sentence01.npy      vertices (frames, V*3); or blendshape weights;
                                                    or .csv, ARKit's weights of Live Link Face
    FOLDER/templates.pkl                            {subject: (V, 3)}, each subject's face at rest;
                                                    or templates/SUBJECT.obj or .ply; not for .csv
    FOLDER/phones/SUBJECT_sentence01.tsv            optional: lines of start s, end s, phone
    FOLDER/dataset.json                             optional; what it leaves out is inferred:
        fps, unit ("metre"), splits {"train": [clip names], "val": ..., "test": ...},
        triangles [[vertex, vertex, vertex], ...], colours [[red, green, blue], ...] in 0..1,
        lips [vertices], upper_face [vertices], lip_gap [upper, lower vertex of the inner lips],
        eye_gap [upper, lower vertex of the lids], brow [vertex], to count blinks and brow raises,
        frame_stride (2 reads every second frame), texts {clip name: what is said}

Motion is vertices - template. Frame t covers the time from t / fps to (t + 1) / fps and shows the
face at its middle. Without a folder, support/speakers.py makes a synthetic data set on first use.
"""
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from codetalker import SAMPLE_RATE
from support import speakers
from support.command import ArgumentParser, check_writable, free_memory, one_line_errors, progress
from support.files import (check_finite, find_files, flatten, match_splits, open_motion,
                           pick_subject, read_audio, read_description, read_templates, read_text,
                           some, vertex_list)

SYNTHETIC = "speakers"      # folder of the synthetic data set
USUAL_FPS = (24, 25, 30, 50, 60)
NTSC_FPS = (24000 / 1001, 30000 / 1001, 60000 / 1001)       # of American television and many phones

# -----------------------------------------------------------------------------
# a data set


@dataclass
class Faces:
    """What it takes to turn the model's motion into faces. It travels in every checkpoint."""
    fps: float                      # frames per second
    unit: str | None                # "metre", or unknown
    subjects: list                  # training subjects; each is one of the model's styles
    templates: dict                 # subject -> face at rest (V*3,) float32
    triangles: np.ndarray | None    # (F, 3)
    colours: np.ndarray | None      # (V, 3) in 0..1
    lips: list                      # vertices
    upper_face: list                # vertices
    lip_gap: list | None            # vertices of the inner lips: upper, lower
    eye_gap: list | None = None     # vertices of the lids of one eye: upper, lower
    brow: list | None = None        # one vertex
    channel_names: list | None = None   # of blendshape weights in 0..1
    scale: float = 1.0              # motion is divided by it: its root mean square in training
    most_active_channel: int = 0    # stands for the lip gap where there is none
    padding: int = 0                # zero channels that were added to make V*3

    @property
    def channels(self):             # V*3
        return next(iter(self.templates.values())).size

    @property
    def to_mm(self):
        return 1000.0 if self.unit == "metre" else None

    def vertices(self, motion, subject):
        """The model's motion (T, V*3) -> vertices (T, V, 3) float32 of a subject."""
        vertices = np.asarray(motion, np.float32) * self.scale
        vertices += self.templates[subject]         # in place: ten minutes are 300 MB
        if self.channel_names:
            vertices = vertices.clip(0, 1)
        return vertices.reshape(len(vertices), -1, 3)

    def style(self, subject):
        """A training subject's style, (K,) one-hot."""
        return F.one_hot(torch.tensor(self.subjects.index(subject)), len(self.subjects)).float()

    def lip_gap_curve(self, vertices):
        """vertices (T, V, 3) -> distance of the inner lips, or the most active channel, (T,)"""
        if self.lip_gap is None:
            return vertices.reshape(len(vertices), -1)[:, self.most_active_channel]
        upper, lower = self.lip_gap
        return np.linalg.norm(vertices[:, upper] - vertices[:, lower], axis=1)

    def metadata(self):
        """As plain numbers, lists and tensors, which torch.load(weights_only=True) reads."""
        fields = {field: getattr(self, field) for field in Faces.__dataclass_fields__}
        templates = {name: torch.from_numpy(array) for name, array in self.templates.items()}
        for name in ("triangles", "colours"):
            if fields[name] is not None:
                fields[name] = torch.from_numpy(fields[name])
        return fields | {"templates": templates}

    @staticmethod
    def from_checkpoint(checkpoint):
        try:
            faces = Faces(**checkpoint["dataset"])
            faces.templates = {name: array.numpy() for name, array in faces.templates.items()}
            for name in ("triangles", "colours"):
                if getattr(faces, name) is not None:
                    setattr(faces, name, getattr(faces, name).numpy())
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint does not describe its data ({error}); train anew")
        return faces


@dataclass
class Clip:
    name: str                       # SUBJECT_sentenceNN
    subject: str
    frames: int                     # T

    @property
    def sentence(self):
        return self.name.removeprefix(self.subject).rpartition("_")[2]


class DataSet(Faces):
    """A folder in the layout described above. `warnings`: a line for each thing that was inferred.

    Raises ValueError, in one line, for what is wrong.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.warnings = []
        self.device = "cpu"         # of the tensors that motion() and audio_features() return
        self.motion_cache = {}
        self.audio_cache = {}
        if not (self.folder / "vertices_npy").is_dir():
            found = "no vertices_npy/" if self.folder.is_dir() else "no such folder"
            raise ValueError(f"{folder}: a folder with wav/, vertices_npy/ and templates.pkl "
                             f"expected, found {found}")
        description = read_description(self.folder)
        self.texts = description.get("texts", {})
        channel_names = description.get("channel_names")
        self.templates = read_templates(self.folder / "templates.pkl", channel_names)
        self.motion_paths = find_files(self.folder / "vertices_npy", ".npy", ".csv")
        self.stride = int(description.get("frame_stride", 1))
        clips = self.find_clips()
        fps = float(description.get("fps") or self.infer_fps(clips))
        self.splits = self.read_splits(description.get("splits"), clips)
        subjects = dict.fromkeys(clip.subject for clip in self.splits["train"])     # in order
        vertices = self.channels // 3
        regions = {}
        for name in ("lips", "upper_face"):
            regions[name] = vertex_list(description, name, (-1,), vertices)
            if regions[name] is None:
                regions[name] = np.arange(vertices)
                self.warnings.append(f"{name}: not in dataset.json, so all {vertices} vertices")
        for name, count in (("lip_gap", 2), ("eye_gap", 2), ("brow", 1)):
            regions[name] = vertex_list(description, name, (count,), vertices)
        colours = description.get("colours")
        if colours is not None:
            colours = np.array(colours, np.float32)
            if colours.shape != (vertices, 3):
                raise ValueError(f"{folder}/dataset.json: colours: shape {(vertices, 3)} expected, "
                                 f"found {colours.shape}")
        super().__init__(
            fps, description.get("unit"), list(subjects), self.templates,
            vertex_list(description, "triangles", (-1, 3), vertices), colours,
            channel_names=channel_names,
            **{name: None if array is None else array.tolist() for name, array in regions.items()})
        stored = open_motion(self.motion_paths[clips[0].name])
        self.padding = self.channels - stored[0].size

    def find_clips(self):
        """The clips that have motion and sound, sorted by name; all need a template of one size."""
        self.wavs = find_files(self.folder / "wav", ".wav")
        clips = []
        for name, path in self.motion_paths.items():
            if name not in self.wavs:
                self.warnings.append(f"{name}: motion without wav, left out")
                continue
            subject = pick_subject(name, self.templates)
            if subject is None:
                raise ValueError(f"{self.folder}/templates.pkl: no template's name begins clip "
                                 f"{name}: clips are named SUBJECT_sentence01, and there are "
                                 f"templates of {some(self.templates)}")
            array = open_motion(path)[::self.stride]
            width = flatten(array[:1]).shape[1]
            if not width == self.templates[subject].size == self.channels:
                raise ValueError(f"{path}: {self.channels} channels expected, as in the first "
                                 f"template; found {width}, and {self.templates[subject].size} "
                                 f"in the template of {subject}")
            clips.append(Clip(name, subject, len(array)))
        if not clips:
            raise ValueError(f"{self.folder}: no clip has both wav/NAME.wav and "
                             "vertices_npy/NAME.npy")
        return clips

    def infer_fps(self, clips):
        lengths = []
        for clip in sorted(clips, key=lambda clip: clip.frames)[-10:]:  # reading sound takes time
            lengths.append((clip.frames, len(read_audio(self.wavs[clip.name])) / SAMPLE_RATE))
        fps, is_usual = find_fps(lengths)
        doubt = "" if is_usual else ", which is unusual: cut motion and sound alike, or state fps"
        self.warnings.append(f"fps: {fps:.5g}, as frames per second of sound{doubt}")
        return fps

    def read_splits(self, named, clips):
        """{split: clips}. Without names, two of ten sentences are held out, for val and test."""
        by_name = {clip.name: clip for clip in clips}
        splits = {}
        if named:
            for split, names in match_splits(self.folder, named, by_name).items():
                splits[split] = [by_name[name] for name in names]
            rest = by_name.keys() - {clip.name for part in splits.values() for clip in part}
            if rest:
                self.warnings.append(f"splits: {len(rest)} clips are in none: {some(sorted(rest))}")
        else:
            sentences = sorted({clip.sentence for clip in clips})
            for split, part in (("train", range(8)), ("val", [8]), ("test", [9])):
                chosen = {sentence for i, sentence in enumerate(sentences) if i % 10 in part}
                splits[split] = [clip for clip in clips if clip.sentence in chosen]
            self.warnings.append("splits: of ten sentences eight to train, one to val, one to test")
        splits = {split: part for split, part in splits.items() if part}
        for split in ("train", "val", "test"):
            if split not in splits:
                raise ValueError(f"{self.folder}: no clip in the split {split!r}, found "
                                 f"{', '.join(splits)} (name the clips of train, val and test in "
                                 "dataset.json, or record ten sentences)")
        return splits

    def measure_motion(self):
        """Sets scale and most_active_channel from every fifth training frame, except lost ones."""
        def squares(clip):
            motion = self.read_frames(clip)[::5] - self.templates[clip.subject]
            return np.square(motion, dtype=np.float64)

        clips = self.splits["train"]
        sums, means = [], []
        for clip in progress(clips, "measuring motion"):
            squared = squares(clip)
            sums.append(squared.sum(axis=0))
            means.append(squared.mean(axis=1))
        square_sum = np.zeros(self.channels)
        count = 0
        for clip, clip_sum, is_far in zip(clips, sums, far_frames(means)):
            if is_far.any():
                clip_sum = squares(clip)[~is_far].sum(axis=0)
                frames = some(5 * self.stride * np.flatnonzero(is_far))
                self.warnings.append(f"scale: leaves out {clip.name} frame {frames}, far off")
            square_sum += clip_sum
            count += np.sum(~is_far)
        self.scale = float(np.sqrt(square_sum.mean() / count))
        if not 1e-9 < self.scale < 1e9:
            raise ValueError(f"{self.folder}: motion expected, found a scale of {self.scale:.3g}")
        self.most_active_channel = int(square_sum.argmax())
        self.warnings.append(f"scale: motion is divided by {self.scale:.4g}, its root mean square")
        if self.channel_names:
            self.most_active_channel = self.channel_names.index("JawOpen")
        elif self.lip_gap is None:
            self.warnings.append(f"lip_gap: not in dataset.json, so the most active channel, "
                                 f"{self.most_active_channel}")

    def read_frames(self, clip, start=None, stop=None):
        """Frames start ... stop of a clip, (T, V*3) float32."""
        path = self.motion_paths[clip.name]
        frames = flatten(open_motion(path)[::self.stride][start:stop])
        check_finite(frames, path)
        return frames

    def frames(self, clip):
        """The vertices of a clip, (T, V, 3) float32."""
        return self.read_frames(clip).reshape(clip.frames, -1, 3)

    def motion(self, clip, start=None, stop=None):
        """The model's view of a clip: (vertices - template) / scale, (T, V*3) float32 tensor."""
        if clip.name in self.motion_cache:
            return self.motion_cache[clip.name][start:stop]
        displacement = self.read_frames(clip, start, stop) - self.templates[clip.subject]
        return torch.from_numpy(displacement / self.scale).to(self.device)

    def load_motion(self, clips, device):
        """Keep the motion of these clips on the device, if a third of its memory is enough for it.

        Training then reads no files and copies nothing to the device: crops are slices.
        """
        self.device = device
        needed = 4 * self.channels * sum(clip.frames for clip in clips)             # bytes
        if free_memory(device) < 3 * needed:
            print(f"{needed / 1e9:.1f} GB of motion do not fit on {device}: read from disk instead")
            return
        for clip in progress(clips, "loading motion"):
            self.motion_cache[clip.name] = self.motion(clip)

    def audio(self, clip):
        """The clip's speech, (samples,) float32 tensor at 16 kHz."""
        return torch.from_numpy(read_audio(self.wavs[clip.name]))

    def phones(self, clip):
        """[(start s, end s, phone)] of a clip, from phones/NAME.tsv; or None."""
        path = self.folder / "phones" / f"{clip.name}.tsv"
        if not path.exists():
            return None
        try:
            lines = [line.split("\t") for line in read_text(path).splitlines()]
            return [(float(start), float(end), phone) for start, end, phone in lines]
        except ValueError as error:
            raise ValueError(f"{path}: lines of start s, end s, phone expected, with tabs between "
                             f"them ({error})") from None

    @cached_property
    def phone_names(self):
        """The phones of the training split, sorted; [] unless all its clips have them."""
        segments = [self.phones(clip) for clip in self.splits["train"]]
        if not all(segments):
            return []
        return sorted({phone for clip_segments in segments for _, _, phone in clip_segments})

    def phone_classes(self, clip):
        """The phone at the centre of each frame, as its place in phone_names: (T,) int64 tensor.

        Between two segments it is the later one. All 0 if there are no phones, so that there is one
        class, and nothing to be learnt.
        """
        if not self.phone_names:
            return torch.zeros(clip.frames, dtype=torch.long)
        segments = self.phones(clip)
        centres = (np.arange(clip.frames) + 0.5) / self.fps                 # s
        ends = [end for _, end, _ in segments]
        at = np.searchsorted(ends, centres, side="right").clip(max=len(segments) - 1)
        return torch.tensor([self.phone_names.index(segments[i][2]) for i in at])

    def audio_features(self, clip, model, start=0, stop=None):
        """model.preprocess_audio() of a clip, frames start ... stop; computed once, then cached."""
        if clip.name not in self.audio_cache:
            features = model.preprocess_audio(self.audio(clip), self.fps, clip.frames)
            self.audio_cache[clip.name] = features.to(self.device)
        features = self.audio_cache[clip.name]
        steps = len(features) // clip.frames        # audio steps per frame
        stop = clip.frames if stop is None else stop
        return features[start * steps:stop * steps]

    def check_compatible(self, checkpoint):
        """Take over a checkpoint's scale and styles; ValueError if it is of other data."""
        trained = Faces.from_checkpoint(checkpoint)
        for name, unit in (("channels", "motion channels"), ("fps", "frames per second")):
            expected = getattr(trained, name)
            found = getattr(self, name)
            if expected != found:
                raise ValueError(f"the checkpoint was trained for {expected:g} {unit}, "
                                 f"{self.folder} has {found:g}; give the folder it was trained on "
                                 "as --data")
        self.scale = trained.scale
        self.most_active_channel = trained.most_active_channel
        if "styles" in checkpoint["config"]:                # stage 1 has none
            self.subjects = trained.subjects


def far_frames(means):
    """Which frames are lost (zeros) or spiked: [mean squared displacement (T,)] -> [bool (T,)]

    Those whose root mean square displacement is more than five times the 90th percentile of all
    frames. Measured: in clean data, synthetic and captured, at most 2.2 times; lost frames, 35.
    """
    limit = 5 ** 2 * np.percentile(np.concatenate(means), 90) if means else 0
    return [mean > limit for mean in means]


def find_fps(lengths):
    """[(frames, seconds of sound)] of clips -> fps, by the ten longest, and whether it is usual."""
    frames, seconds = np.transpose(sorted(lengths)[-10:])
    nearly = 1 + 0.02 * np.median(frames)           # motion often ends a little before the sound
    for rates, tolerance in ((USUAL_FPS, 1), (NTSC_FPS, 1), (USUAL_FPS, nearly)):
        errors = [np.median(abs(frames - fps * seconds)) for fps in rates]
        if min(errors) < tolerance:
            return rates[np.argmin(errors)], True
    return float(np.median(frames / seconds)), False


def open_data(folder, checkpoint=None):
    """The data set in `folder`; None: the synthetic one, made now if it is not there yet.

    With a checkpoint its scale and styles are taken over; otherwise the scale is measured.
    """
    if folder is None:
        folder = SYNTHETIC
        if not Path(folder).exists():
            check_writable(".")
            speakers.build_speakers(folder, progress=progress)
    data = DataSet(folder)
    if checkpoint:
        data.check_compatible(checkpoint)
    else:
        data.measure_motion()
    for line in data.warnings:
        print(f"{folder}: {line}")
    return data


# -----------------------------------------------------------------------------
# batches


def random_crops(clips, frames, count):
    """`count` random stretches of equal length, as [(clip, start, stop)].

    That is `frames`, or the length of the shortest clip chosen: a batch needs no padding. Longer
    clips are chosen more often, so that every frame of the data is about equally likely.
    """
    weights = torch.tensor([float(clip.frames) for clip in clips])
    chosen = [clips[i] for i in torch.multinomial(weights, count, replacement=True)]
    frames = min(frames, *[clip.frames for clip in chosen])
    crops = []
    for clip in chosen:
        start = int(torch.randint(clip.frames - frames + 1, (1,)))
        crops.append((clip, start, start + frames))
    return crops


def main():
    parser = ArgumentParser(description="Find out what is wrong with a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="exit status 1 if something is wrong")
    check.add_argument("folder", help="a folder that --data would take")
    args = parser.parse_args()
    from support.check import check_dataset
    findings, summary = check_dataset(args.folder)
    for line in summary + findings:
        print(line)
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    with one_line_errors():
        main()
