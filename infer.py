"""
Speech in, a talking face out; or evaluation on a test split.

    python infer.py                                     a test sentence beside its ground truth
    python infer.py --wav speech.wav --style ada:0.3,ben:0.7 --subject kira --out talk.mp4
    python infer.py --test                              metrics on the test split

The ending of --out decides what is written:
    .html   one page for any browser: faces to turn, sound, the codes
    .mp4    video with sound (needs ffmpeg)         .gif    the same, silent
    .png    a contact sheet: three views, stills, the codes
    .glb    one animated file for Blender, Unreal, three.js
    .csv    weights of ARKit's blendshapes, as Live Link Face records them
    .npy    vertices (T, V*3) float32, in the unit of the data
"""
import argparse
import shutil
import time
from pathlib import Path

import torch

from codetalker import SAMPLE_RATE, CodeTalker, MotionAutoencoder, load
from data import DataSet, Faces, open_data
from support import arkit, view
from support.command import (ArgumentParser, check_writable, number, one_line_errors, pick_device,
                             progress)
from support.files import check_finite, read_audio
from support.metrics import METRIC_NAMES, evaluate_generation, generate_clips, styles_of, write_json

parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--wav", help="speech (default: the first test clip)")
parser.add_argument("--style", help="a training subject's style, or a mix such as ada:0.3,ben:0.7 "
                                    "(default: the clip's subject, or the first training subject)")
parser.add_argument("--subject", help="whose face is animated (default: the clip's; with --wav the "
                                      "first of --style)")
parser.add_argument("--seed", type=number(0, 2 ** 32, int), default=0,
                    help="another seed gives another animation for the same speech (%(default)s)")
parser.add_argument("--temperature", type=number(0, 2),
                    help="for sampling codes: 0 takes the most likely, 1 samples as in the "
                         "training data (default: the model's, 1)")
parser.add_argument("--ar", default="runs/ar/best.pt", help="checkpoint of stage 2 (%(default)s)")
parser.add_argument("--preset", choices=["small", "vocaset", "biwi"], default="small",
                    help="as in training; --released needs none (%(default)s)")
parser.add_argument("--released", nargs=2, metavar=("STAGE1", "STAGE2"),
                    help="the authors' two checkpoints instead of --ar; needs --data")
parser.add_argument("--data", help="folder of a data set (default: the synthetic one, where a test "
                                   "clip is needed)")
parser.add_argument("--out", help="file to write (default: talk.html); with --test a folder for "
                                  "test.json and the motion of every clip")
parser.add_argument("--test", action="store_true", help="evaluate on the test split")
parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")

SUFFIXES = (".html", ".mp4", ".gif", ".png", ".glb", ".csv", ".npy")
CHUNK = 600                 # frames that are decoded at once
OVERLAP = 60                # frames over which a chunk fades into the next


def main(args):
    # refuse what can be refused before the model is loaded
    out = Path(args.out or "talk.html")
    if args.test and (args.wav or args.style or args.subject):
        raise ValueError("--test takes the test clips as they are: no --wav, --style, --subject")
    if not args.test:
        if out.suffix not in SUFFIXES or out.is_dir():
            raise ValueError(f"--out {out}: a file ending in {' '.join(SUFFIXES)} expected")
        if out.suffix == ".mp4" and not shutil.which("ffmpeg"):
            raise ValueError(f"--out {out}: mp4 needs ffmpeg; install it, or use talk.html")
        check_writable(out.parent)
    audio = torch.from_numpy(read_audio(args.wav)) if args.wav else None

    device = pick_device(args.device)
    model, faces, data = load_model(args, device)
    if args.temperature is not None:
        model.config.temperature = args.temperature
    if args.test:
        return test(model, data, args)
    if out.suffix == ".csv" and not arkit.can_write(faces):
        raise ValueError(f"--out {out}: ARKit's weights come from a model of such weights, or of "
                         "the synthetic face, found another mesh; use .glb or .npy")
    if faces.triangles is None and out.suffix not in (".html", ".csv", ".npy"):
        raise ValueError(f"--out {out}: the data has no triangles to draw; use .html or .npy")

    # 1. speech, style, face
    clip = None
    if args.wav:
        seconds = len(audio) / SAMPLE_RATE
        frames = max(1, int(seconds * faces.fps + 1e-6))    # 1e-6: 29.9999999 are 30 frames
        title = Path(args.wav).stem
    else:
        clip = data.splits["test"][0]
        audio, frames = data.audio(clip), clip.frames
        title = str(data.texts.get(clip.name, clip.name))
    if args.style:
        style_text = args.style
    elif clip and clip.subject in faces.subjects:
        style_text = clip.subject
    else:
        style_text = faces.subjects[0]
    style, first_subject = read_style(style_text, faces)
    subject = args.subject or (clip.subject if clip else first_subject)
    if subject not in faces.templates:
        raise ValueError(f"--subject: one of {', '.join(sorted(faces.templates))} expected, found "
                         f"{subject!r}")

    # 2. codes from speech, motion from the codes
    start = time.time()
    if device == "cpu" and args.preset == "small" and not args.released:
        torch.set_num_threads(1)            # faster: a frame of the small model is little work
    torch.manual_seed(args.seed)
    with torch.no_grad():
        features = model.preprocess_audio(audio, faces.fps, frames)[None].to(device)
        encoded = model.encode_audio(features)                      # (1, T, D)
        codes = model.generate(encoded, style[None].to(device),
                               progress=lambda steps: progress(steps, "generating frames"))
        motion = decode_in_chunks(model, codes)[0].cpu()            # (T, V*3)
    pred = faces.vertices(motion, subject)
    check_finite(pred, "the generated motion")
    print(f"{frames / faces.fps:.1f} s of speech in {time.time() - start:.1f} s on {device}: "
          f"the face of {subject} in the style {style_text}")

    # 3. write
    shown = {f"generated, style {style_text}": pred}
    if clip:
        shown["ground truth"] = data.frames(clip)
    segments = data.phones(clip) if clip else None
    audio = audio.numpy()
    if out.suffix == ".html":
        caption = f"generated by CodeTalker from speech, with the face of {subject}"
        view.write_html(out, shown, faces, audio, codes[0].cpu().numpy(), title, caption, segments,
                        faces_of_codes(model, faces, subject))
    elif out.suffix == ".npy":
        view.write_npy(out, pred, faces.channels - faces.padding)
    elif out.suffix == ".csv":
        arkit.write_csv(out, pred, faces, subject)
    elif out.suffix == ".glb":
        view.write_glb(out, pred, faces)
    elif out.suffix == ".png":
        stills = view.pick_stills(segments, frames, faces.fps)
        view.write_sheet(out, pred, faces, stills, codes[0].cpu().numpy())
    else:
        view.write_video(out, shown, faces, audio, lambda steps: progress(steps, "drawing"))
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


def load_model(args, device):
    """The model, its Faces, and the data set, itself a Faces: None where a recording needs none."""
    if args.preset != "small" or args.released:
        from support import published
    if args.released:
        model, data = published.open_released(*args.released, args.data)
        if not args.wav and not isinstance(data, DataSet):
            raise ValueError(f"{args.data}: the folder has no clips; give a recording as --wav")
        return model.to(device), data, data
    classes = published.CLASSES if args.preset != "small" else (MotionAutoencoder, CodeTalker)
    model, checkpoint = load(args.ar, "ar", device, classes)
    if args.wav and not args.data:
        return model, Faces.from_checkpoint(checkpoint), None
    data = open_data(args.data, checkpoint)
    return model, data, data


def read_style(text, faces):
    """'ada' or 'ada:0.3,ben:0.7' -> weights (K,) that sum to 1, and the first name."""
    style = torch.zeros(len(faces.subjects))
    names = []
    for part in text.split(","):
        name, _, weight = part.partition(":")
        name = name.strip()
        names.append(name)
        if name not in faces.subjects:
            raise ValueError(f"--style: one of {', '.join(faces.subjects)} expected, found "
                             f"{name!r}")
        try:
            weight = float(weight or 1)
        except ValueError:
            weight = 0.0                    # refused below
        if not 0.001 <= weight <= 1000:
            raise ValueError(f"--style: a weight from 0.001 to 1000 expected, as in {name}:0.5, "
                             f"found {part.strip()!r}")
        style += weight * faces.style(name)
    return style / style.sum(), names[0]


def decode_in_chunks(model, codes):
    """Codes (1, T, H) -> motion (1, T, V*3), in chunks of CHUNK frames, each faded into the next.

    The decoder attends to all frames at once, which is too much for long speech [chunks].
    """
    chunks = [model.decode(codes[:, :CHUNK])]
    fade_in = torch.linspace(0, 1, OVERLAP + 2, device=codes.device)[1:-1, None]    # (OVERLAP, 1)
    # every chunk starts OVERLAP frames before the end of what is decoded so far
    for start in range(CHUNK - OVERLAP, codes.shape[1] - OVERLAP, CHUNK - OVERLAP):
        chunk = model.decode(codes[:, start:start + CHUNK])
        faded = (1 - fade_in) * chunks[-1][:, -OVERLAP:] + fade_in * chunk[:, :OVERLAP]
        chunks[-1] = chunks[-1][:, :-OVERLAP]
        chunks.append(torch.cat([faded, chunk[:, OVERLAP:]], dim=1))
    return torch.cat(chunks, dim=1)


@torch.no_grad()
def faces_of_codes(model, faces, subject):
    """The face of each code, (N, V, 3): the middle of nine frames that have this code H times."""
    config = model.autoencoder.config
    codes = torch.arange(config.codebook_size, device=model.style.device)
    codes = codes[:, None, None].expand(-1, 9, config.codes_per_frame)          # (N, 9, H)
    middle = model.decode(codes)[:, 4].cpu()                                    # (N, V*3)
    return faces.vertices(middle, subject)


def test(model, data, args):
    """Print the metrics of every test split and write test.json beside the checkpoint, or into the
    folder --out, together with every motion."""
    start = time.time()
    checkpoint = args.released[1] if args.released else args.ar
    folder = Path(args.out or Path(checkpoint).parent)
    check_writable(folder)
    results = {}
    for split in [name for name in data.splits if name.startswith("test")]:
        clips = data.splits[split]
        results[split] = evaluate_generation(model, data, split, every_style=True, seed=args.seed)
        unseen = sorted({clip.subject for clip in clips} - set(data.subjects))
        print(f"{split}: {len(clips)} clips, {sum(clip.frames for clip in clips)} frames, "
              f"{len(data.lips)} lip and {len(data.upper_face)} upper-face vertices")
        if unseen:
            print(f"unseen subjects, mean over {len(data.subjects)} styles: {', '.join(unseen)}")
        if not data.to_mm:
            print("dataset.json states no unit: mm and mm2 stand for the data's own unit")
        for name, text in METRIC_NAMES.items():
            if name in results[split]:
                print(f"    {text:58s} {results[split][name]:8.4g}")
        if args.out:
            torch.manual_seed(args.seed)            # as in the first round of evaluate_generation()
            motions, _ = generate_clips(model, data, clips, styles_of(data, clips))
            for clip, motion in zip(clips, motions):
                vertices = data.vertices(motion, clip.subject)
                path = folder / f"{clip.name}.npy"
                view.write_npy(path, vertices, data.channels - data.padding)
    write_json(folder / "test.json", results)
    print(f"-> {folder / 'test.json'} ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    with one_line_errors():
        main(parser.parse_args())
