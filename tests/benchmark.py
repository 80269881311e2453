"""How fast it is and how much memory it takes, in one table.

    python tests/benchmark.py                       about five minutes on two idle CPU cores
    python tests/benchmark.py --only lite           the rows with this in their name
    python tests/benchmark.py --drift drift.png     sentences of runs/ar/best.pt singly and joined to two minutes

Each row runs in a process of its own: the median of some repetitions after one to warm up (the long ones run once),
the fastest and the slowest, how many times faster than speech the median is, and the peak of the process's memory, on
a GPU of what was allocated there. Weights and inputs are random, which makes no difference to time. Where there is a
GPU every row comes twice; that has never run.
"""
import argparse
import math
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from matplotlib.figure import Figure

import train_ar
import train_vq
from codetalker import (PRESETS, SAMPLE_RATE, ARConfig, CodeTalker, MotionAutoencoder, VQConfig, causal_bias, load,
                        prepare)
from data import FPS, batch_of_sounds, generate_clips, lip_vertex_errors, make_clip, open_data, read_wav, score

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="", help="only the rows with this in their name")
parser.add_argument("--drift", metavar="PNG", help="instead: how well two minutes of speech go, and a plot of it")

VERTICES, STYLES = {"lite": 1350, "vocaset": 5023}, 8


def random_model(preset, device):
    vq, ar = PRESETS[preset]
    model = CodeTalker(ARConfig(STYLES, **ar), MotionAutoencoder(VQConfig(VERTICES[preset], **vq)))
    torch.nn.init.normal_(model.query.weight, std=model.config.width ** -0.5)   # from zero it would say one code
    return model.to(device).eval()


def speech(seconds):
    return 0.1 * torch.randn(int(seconds * SAMPLE_RATE))


# ----------------------------------------------------------------------------------------------------------- the rows
# Each returns what is timed: a function without arguments.


def make_data(device):
    return lambda: make_clip(0, "ada", 1)


def step_of_stage1(device):
    model = MotionAutoencoder(VQConfig(VERTICES["lite"])).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters())
    batch, window = (train_vq.parser.get_default(name) for name in ("batch", "window"))
    motion = torch.randn(batch, window, 3 * VERTICES["lite"], device=device)
    return lambda: descend(optimiser, lambda: model(motion)[2], device)


def step_of_stage2(device):
    model = random_model("lite", device).train()
    optimiser = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad])
    batch, window, own = (train_ar.parser.get_default(name) for name in ("batch", "window", "own"))
    motion = torch.randn(batch, window, 3 * VERTICES["lite"], device=device)
    codes = model.autoencoder.encode(motion)
    mel = torch.stack([prepare(speech(window / FPS), FPS, window, model.config) for _ in range(batch)]).to(device)
    style = torch.eye(STYLES, device=device)[:batch]
    return lambda: descend(optimiser, lambda: model(mel, style, codes, motion, None, own)[1], device)


def descend(optimiser, forward, device):
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        losses = forward()
    optimiser.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    optimiser.step()


def generate(device, preset, seconds, batch=1):
    """From audio to vertices on the CPU."""
    model, audio, frames = random_model(preset, device), speech(seconds), int(seconds * FPS)
    style = torch.eye(STYLES, device=device)[:1].expand(batch, -1)
    template = np.zeros(3 * VERTICES[preset], np.float32)

    def work():
        sound = batch_of_sounds([prepare(audio, FPS, frames, model.config)] * batch, model.config, device)
        motion, _ = model.generate(sound, style, torch.tensor([frames] * batch, device=device))
        return motion.cpu().numpy() + template

    return work


def generate_as_released(device, preset, seconds):
    """The published loop: for each frame all frames before it again, transformer, decoder and vertices, and all of
    the recording behind a mask. `generate` must give the same."""
    model, audio, frames = random_model(preset, device), speech(seconds), int(seconds * FPS)
    config, stage1, style = model.config, model.autoencoder, torch.eye(STYLES, device=device)[:1]
    past = causal_bias(frames, config.period, config.heads, config.memory).to(device)
    aligned = torch.full((frames, frames), -math.inf, device=device).fill_diagonal_(0)

    @torch.no_grad()
    def work():
        heard = model.listen([prepare(audio, FPS, frames, config).to(device)], [frames]).squeeze(2)
        fed = torch.zeros(1, 1, 3 * VERTICES[preset], device=device)
        for t in range(1, frames + 1):
            x = model.embed(fed, style)
            for layer in model.layers:
                x = layer.norm1(x + layer.self_attention(x, bias=past[:, :t, :t]))
                x = layer.norm2(x + layer.cross_attention(x, heard, aligned[:t]))
                x = layer.norm3(x + layer.feed_forward(x))
            codes = stage1.quantiser.nearest(model.query(x).unflatten(2, (stage1.config.slots, -1)))
            motion = stage1.decode(codes.view(1, t, -1))
            fed = torch.cat([fed, motion[:, -1:]], 1)
        return motion.cpu().numpy()

    return work


LITE, VOCASET = "lite: generate, seconds of speech: ", "vocaset: generate, seconds of speech: "
ROWS = {    # name: what is timed, its arguments, repetitions, seconds of speech in it
    "data: a sentence of a built-in speaker": (make_data, (), 9, 0),
    "lite: training step of stage 1": (step_of_stage1, (), 9, 0),
    "lite: training step of stage 2": (step_of_stage2, (), 9, 0),
    LITE + "8": (generate, ("lite", 8), 9, 8),
    LITE + "60": (generate, ("lite", 60), 3, 60),
    LITE + "600": (generate, ("lite", 600), 1, 600),
    LITE + "40 times 3, one batch": (generate, ("lite", 3, 40), 3, 120),
    VOCASET + "8": (generate, ("vocaset", 8), 1, 8),
    VOCASET + "8, as released": (generate_as_released, ("vocaset", 8), 1, 8),
}


def measure(name, device):
    """Seconds of each repetition, peak memory in bytes, and what was made."""
    make, arguments, repetitions, _ = ROWS[name]
    torch.manual_seed(0)                                                # the two of vocaset must agree
    work, seconds = make(device, *arguments), []
    for i in range(repetitions + (repetitions > 1)):
        start = time.perf_counter()
        made = work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else \
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # Linux counts in KiB
    return seconds[-repetitions:], peak, made if name.startswith(VOCASET) else None


def table(only):
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}"
          + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""))
    print(f"{'':48s} {'median s':>9s} {'from':>9s} {'to':>9s} {'x real time':>11s} {'peak GB':>8s}")
    medians, made = {}, {}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for name in (name for name in ROWS if only in name):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds, peak, made[name] = pool.submit(measure, name, device).result()
            median = medians[name] = statistics.median(seconds)
            faster = f"{ROWS[name][3] / median:11.1f}" if ROWS[name][3] else 11 * " "
            print(f"{device:4s} {name:43s} {median:9.3f} {min(seconds):9.3f} {max(seconds):9.3f} {faster} "
                  f"{peak / 1e9:8.2f}", flush=True)
        for length in ("60", "600"):
            if {LITE + "8", LITE + length} <= medians.keys():
                ratio = medians[LITE + length] / int(length) / (medians[LITE + "8"] / 8)
                print(f"{device:4s} lite: cost of a second at {length} s over that at 8 s: {ratio:.2f}")
        ours, theirs = VOCASET + "8", VOCASET + "8, as released"
        if {ours, theirs} <= medians.keys():
            print(f"{device:4s} vocaset: {medians[theirs] / medians[ours]:.2f} times as fast as the released loop; "
                  f"largest difference {np.abs(made[ours] - made[theirs]).max():.1e}")


# ---------------------------------------------------------------------------------------------------------- the drift


def drift(path, seconds=120):
    """The sentences of each test speaker, over and over until there are `seconds` of them: made singly, made as one
    recording, and as one whose sentences are heard as when single, each less its own microphone. The same figures of
    the same sentences; lip error of each against time."""
    model, state = load("runs/ar/best.pt", "ar")
    data = open_data(None)
    data.check(state)
    style, clips, starts, ways = data.subjects[0], [], [], {"one recording": ([], []), "each heard alone": ([], [])}
    for speaker in sorted({clip.subject for clip in data.splits["test"]}):
        own = 100 * [clip for clip in data.splits["test"] if clip.subject == speaker]
        ends = np.cumsum([clip.frames for clip in own])
        own = own[:int(np.searchsorted(ends, seconds * data.fps)) + 1]
        frames = [clip.frames for clip in own]
        audio = [read_wav(data.wav(clip))[:round(clip.frames * SAMPLE_RATE / data.fps)] for clip in own]
        sounds = (prepare(torch.from_numpy(np.concatenate(audio)), data.fps, sum(frames), model.config),
                  torch.cat([data.sound(clip, model.config) for clip in own]))
        for sound, (made, codes) in zip(sounds, ways.values()):
            motion, chosen = model.generate(sound[None], data.style(style)[None])
            made += motion[0].split(frames)
            codes += chosen[0].split(frames)
        clips += own
        starts += [*np.cumsum([0] + frames[:-1]) / data.fps]
    ways = {"singly": generate_clips(model, data, clips, [style] * len(clips))} | ways
    axes = (figure := Figure(figsize=(8, 4), layout="constrained")).subplots()
    names = ("gap_correlation", "lve", "energy", "upper_energy")
    print(f"{'':20s}" + "".join(f"{name:>17s}" for name in names) + "   lve per minute")
    for (way, (made, codes)), marker in zip(ways.items(), "o+x"):
        figures = score(data, clips, made, codes, model.autoencoder.config.codes)
        errors = [1e6 * lip_vertex_errors(data.vertices(motion, clip.subject),
                                         data.frames_of(clip.name).reshape(clip.frames, -1, 3), data.lips).mean()
                  for clip, motion in zip(clips, made)]
        slope = 60 * np.polyfit(starts, errors, 1)[0]
        print(f"{way:20s}" + "".join(f"{figures[name]:17.4f}" for name in names) + f"{slope:+17.2f}")
        axes.plot(starts, errors, marker, label=way, fillstyle="none")
    axes.set(xlabel="start of the sentence, s", ylabel="squared lip vertex error, mm2", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    args = parser.parse_args()
    drift(args.drift) if args.drift else table(args.only)
