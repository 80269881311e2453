"""
Does the codebook help? The paper's claim on trial: one transformer, several outputs.

    python -m support.trial --rows codes vertices indices       an hour on two cores

Trains what is not there yet; writes table.md (mean over seeds ± largest deviation), figure.png.
"""
import itertools
import multiprocessing
from argparse import Namespace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import train_ar
import train_vq
from codetalker import CodeTalker, MotionAutoencoder, load
from data import open_data
from support import speakers
from support.command import ArgumentParser, one_line_errors, positive
from support.metrics import compute_metrics, generate_clips
from support.published import InstanceNorm, PaperCodeTalker


class VertexRegressor(CodeTalker):
    """No codebook: motion (B, T, V*3) is predicted and fed back, wherever there were codes."""
    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        self.in_proj = torch.nn.Linear(autoencoder.config.vertices * 3, config.dim)
        self.head = torch.nn.Linear(config.dim, autoencoder.config.vertices * 3, bias=False)

    def decode(self, motion, temperature=None):
        return motion
    logits = decode                         # they all return motion as it is
    sample = decode
    code_vectors = decode

    def forward(self, mel, style, codes, motion, phones, sampling_prob=0.0):
        audio = self.encode_audio(mel)
        # as in scheduled_sampling(), but in all sequences; the past of the first pass is another
        # sequence's motion in place of random codes, so that it must use the audio
        with torch.no_grad():
            own_motion = self.predict(motion.roll(1, dims=0), style, audio)
        use_own = torch.rand(codes.shape[:2], device=mel.device) < sampling_prob
        past = torch.where(use_own[..., None], own_motion, motion)
        return {"motion": F.mse_loss(self.predict(past, style, audio), motion),
                "phone": self.phone_loss(audio, phones)}


class IndexClassifier(CodeTalker):
    """A logit for each code is predicted instead of a feature."""
    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        outputs = autoencoder.config.codes_per_frame * autoencoder.config.codebook_size     # H*N
        self.head = torch.nn.Linear(config.dim, outputs, bias=False)

    def logits(self, z_hat):
        return z_hat.unflatten(-1, (self.autoencoder.config.codes_per_frame, -1))   # (B, T, H, N)

    def motion_loss(self, z_hat, motion):
        return torch.zeros((), device=motion.device)        # logits are no features to decode


class PaperStage2(CodeTalker):
    """The paper's [history] and [loss]: motion is fed back, squared errors are minimised."""
    forward = PaperCodeTalker.forward
    generate = PaperCodeTalker.generate
    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        self.in_proj = torch.nn.Linear(autoencoder.config.vertices * 3, config.dim)
        config.temperature = 0.0            # no distribution is learnt


class NormedAutoencoder(MotionAutoencoder):     # the paper's [norm]: InstanceNorm in both backbones
    def __init__(self, config):
        super().__init__(config)
        self.encoder.backbone.norm = InstanceNorm()
        self.decoder.backbone.norm = InstanceNorm()


DEFAULT = (MotionAutoencoder, CodeTalker)
ROWS = {    # classes of both stages, flags of stage 1, flags of stage 2, temperatures
    "codes": (DEFAULT, "", "", (1, 0)),
    "vertices": ((MotionAutoencoder, VertexRegressor), "", "", (1,)),
    "indices": ((MotionAutoencoder, IndexClassifier), "", "", (1, 0)),
    "InstanceNorm": ((NormedAutoencoder, CodeTalker), "", "", (1,)),
    "paper's stage 2": ((MotionAutoencoder, PaperStage2), "", "--sampling-prob 0", (0,)),
    "no resets": (DEFAULT, "--reset-every 1000000", "", (1,)),
    "N 1024": (DEFAULT, "--codebook-size 1024", "", (1,)),
    "H 4": (DEFAULT, "--codes-per-frame 4", "", (1,)),
    "teacher forcing": (DEFAULT, "", "--sampling-prob 0", (1,)),
}
COLUMNS = ("lve", "gap_correlation", "fdd", "fdd_abs", "variance_ratio", "upper_variance_ratio",
           "upper_wasserstein", "diversity")
TAKES = 8                                   # samples of each test clip


def run(row, seed, args):
    """Train a row, unless it is there, and evaluate it -> {name in the table: metrics}"""
    torch.set_num_threads(1)
    classes, vq_flags, ar_flags, temperatures = ROWS[row]
    folder = Path(args.out, f"{row.replace(' ', '_')}_{seed}")
    if not (folder / "ar/metrics.json").exists():           # what is written last
        vq = Namespace(data=args.data, seed=seed, out=f"{folder}/vq")
        ar = Namespace(data=args.data, seed=seed, out=f"{folder}/ar", vq=f"{folder}/vq/best.pt")
        train_vq.main(train_vq.parser.parse_args(vq_flags.split(), vq), classes)
        train_ar.main(train_ar.parser.parse_args(ar_flags.split(), ar), classes)
    model, checkpoint = load(folder / "ar/best.pt", "ar", classes=classes)
    data = open_data(args.data, checkpoint)
    clips = data.splits["test"]
    styles = [clip.subject if clip.subject in data.subjects else style
              for clip, style in zip(clips, itertools.cycle(data.subjects))]
    torch.manual_seed(seed)
    table = {}
    for temperature in temperatures:
        model.config.temperature = temperature
        takes = [generate_clips(model, data, clips, styles)[0] for _ in range(TAKES)]
        table |= evaluate(data, row if temperature else f"{row}, most likely", takes)
    return table


def real_takes(data, borrow):
    """Other takes of the synthetic test clips, as of a perfect model: [take][clip] (T, V*3).

    borrow: with another subject's gestures.
    """
    takes = [[] for _ in range(TAKES)]
    for clip, style in zip(data.splits["test"], itertools.cycle(data.subjects)):
        subject = speakers.make_subject(0, clip.subject)    # cached: make_clip() sees what changes
        gestures = subject.gestures
        if borrow:
            subject.gestures = speakers.make_subject(0, style).gestures
        sentence = int(clip.sentence.removeprefix("sentence"))
        for take, motions in enumerate(takes, 1):           # take 0 is the ground truth
            _, vertices, _, _ = speakers.make_clip(0, clip.subject, sentence, take)
            motion = vertices.reshape(clip.frames, -1) - data.templates[clip.subject]
            motions.append(torch.from_numpy(motion / data.scale))
        subject.gestures = gestures
    return takes


def evaluate(data, name, takes):
    """Motion [take][test clip] (T, V*3) -> {name: metrics, mean over takes; and those of the mean
    motion}. diversity: root mean square distance of two takes of the upper face, mm or data unit"""
    clips = data.splits["test"]
    results = [compute_metrics(data, clips, motions) for motions in takes]
    metrics = {key: np.mean([result[key] for result in results]) for key in results[0]}
    by_clip = [torch.stack(motions).unflatten(-1, (-1, 3)) for motions in zip(*takes)]
    variance = [motions[:, :, data.upper_face].var(dim=0).sum(dim=-1).mean() for motions in by_clip]
    metrics["diversity"] = (2 * np.mean(variance)) ** 0.5 * data.scale * (data.to_mm or 1.0)
    if metrics["diversity"] == 0:           # a regression, or temperature 0: all takes are equal
        return {name: metrics}
    means = [motions.mean(dim=0).flatten(1) for motions in by_clip]         # (T, V*3)
    of_mean = compute_metrics(data, clips, means) | {"diversity": 0.0}
    return {name: metrics, f"{name}, mean of {TAKES} takes": of_mean}


def write_table(results, out):
    """[{name in the table: metrics}] -> table.md, figure.png"""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    figure = Figure((8, 4), layout="constrained")
    axis = figure.subplots(subplot_kw={"xlabel": "LVE", "ylabel": "upper face, variance ratio"})
    axis.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    for name in dict.fromkeys(itertools.chain(*results)):
        seeds = [result[name] for result in results if name in result]
        means = {column: np.mean([metrics[column] for metrics in seeds]) for column in COLUMNS}
        cells = [name]
        for column, mean in means.items():
            spread = max(abs(metrics[column] - mean) for metrics in seeds)
            cells.append(f"{mean:.3g} ±{spread:.1g}")
        lines.append(f"| {' | '.join(cells)} |")
        fill = "none" if "mean of" in name else "full"
        axis.plot(means["lve"], means["upper_variance_ratio"], "o", fillstyle=fill, label=name)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(Path(out, "figure.png"), dpi=110)
    Path(out, "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


parser = ArgumentParser(prog="python -m support.trial", description=__doc__.splitlines()[1])
parser.add_argument("--data", help="folder of a data set (default: the synthetic one)")
parser.add_argument("--out", default="runs/trial", help="folder for the results (%(default)s)")
parser.add_argument("--seeds", type=positive, default=3, help="trainings of a row (%(default)s)")
parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")


def main(args):
    data = open_data(args.data)             # made now, before two processes want to make it
    with multiprocessing.get_context("spawn").Pool() as pool:
        results = pool.starmap(run, itertools.product(args.rows, range(args.seeds), [args]), 1)
    if args.data is None:
        results.append(evaluate(data, "real", real_takes(data, borrow=False)))
        results.append(evaluate(data, "real, borrowed style", real_takes(data, borrow=True)))
    write_table(results, args.out)


if __name__ == "__main__":
    with one_line_errors():
        main(parser.parse_args())
