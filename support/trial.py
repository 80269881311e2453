"""
Does the codebook help? The paper's claim on trial: one transformer, several outputs, several seeds.

    python -m support.trial --rows codes,vertices,indices           an hour on two cores
    python -m support.trial --data FOLDER --out runs/my_trial       every row, on other data

A row is two trainings in a process of one core, unless they are there already, and the test split:
free-running, unseen subjects in every style. Writes table.md (mean over seeds ± the largest
deviation) and figure.png.
"""
import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from matplotlib.figure import Figure

import train_ar
import train_vq
from codetalker import CodeTalker, MotionAutoencoder, code_loss, load, motion_loss
from data import open_data
from support import speakers
from support.command import ArgumentParser, one_line_errors, positive
from support.metrics import compute_metrics, evaluate_generation, generate_clips
from support.published import InstanceNorm, PaperCodeTalker


def mix_past(model, past, other_past, style, audio, share):
    """Scheduled sampling in two passes, as in CodeTalker.forward()."""
    with torch.no_grad():
        z_hat = model.predict(other_past, style, audio)
        own_past = model.code_vectors(model.sample(model.logits(z_hat), temperature=0))
    use_own = torch.rand(past.shape[:2], device=past.device) < share        # (B, T)
    return torch.where(use_own[..., None], own_past, past)


class VertexRegressor(CodeTalker):
    """No codebook: motion (B, T, V*3) is predicted and fed back, wherever there were codes."""

    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        self.in_proj = nn.Linear(autoencoder.config.vertices * 3, config.dim)
        self.head = nn.Linear(config.dim, autoencoder.config.vertices * 3, bias=False)

    def unchanged(self, motion, temperature=None):
        return motion

    logits = unchanged
    sample = unchanged
    code_vectors = unchanged
    decode = unchanged

    def forward(self, mel, style, codes, motion, length_mask, sampling_prob=0.0):
        audio = self.encode_audio(mel)
        other_motion = motion.roll(1, dims=0)               # of another sequence in the batch
        past = mix_past(self, motion, other_motion, style, audio, sampling_prob)
        return {"motion": motion_loss(self.predict(past, style, audio), motion, length_mask)}


class IndexClassifier(CodeTalker):
    """A logit for each code is predicted instead of a feature; so there is no motion loss."""

    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        self.codes_per_frame = autoencoder.config.codes_per_frame
        logits = self.codes_per_frame * autoencoder.config.codebook_size
        self.head = nn.Linear(config.dim, logits, bias=False)

    def logits(self, z_hat):
        return z_hat.unflatten(-1, (self.codes_per_frame, -1))      # (B, T, H*N) -> (B, T, H, N)

    def forward(self, mel, style, codes, motion, length_mask, sampling_prob=0.0):
        audio = self.encode_audio(mel)
        random_codes = torch.randint_like(codes, self.autoencoder.config.codebook_size)
        past = mix_past(self, self.code_vectors(codes), self.code_vectors(random_codes), style,
                        audio, sampling_prob)
        logits = self.logits(self.predict(past, style, audio))
        return {"code": code_loss(logits, codes, length_mask)}


class MotionHistory(CodeTalker):
    """The paper's [history]: motion is fed back; in training that of the data, without sampling."""
    generate = PaperCodeTalker.generate

    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        self.in_proj = nn.Linear(autoencoder.config.vertices * 3, config.dim)

    def forward(self, mel, style, codes, motion, length_mask, sampling_prob=0.0):
        z_hat = self.predict(motion, style, self.encode_audio(mel))
        z_q, _, _ = self.autoencoder.quantiser(z_hat.unflatten(-1, (codes.shape[2], -1)))
        loss_motion = motion_loss(self.autoencoder.decoder(z_q), motion, length_mask)
        loss_code = code_loss(self.logits(z_hat), codes, length_mask)
        return {"code": loss_code, "motion": self.config.motion_weight * loss_motion}


class NormedAutoencoder(MotionAutoencoder):
    """The paper's [norm]"""

    def __init__(self, config):
        super().__init__(config)
        self.encoder.backbone.norm = InstanceNorm()
        self.decoder.backbone.norm = InstanceNorm()


# classes and flags of both stages, temperatures
ROWS = {
    "codes": (MotionAutoencoder, "", CodeTalker, "", (0.8, 0)),
    "vertices": (MotionAutoencoder, "", VertexRegressor, "--sampling-prob 0.85", (0.8,)),
    "indices": (MotionAutoencoder, "", IndexClassifier, "", (0.8, 0)),
    "N 64": (MotionAutoencoder, "--codebook-size 64", CodeTalker, "", (0.8,)),
    "N 1024": (MotionAutoencoder, "--codebook-size 1024", CodeTalker, "", (0.8,)),
    "H 4": (MotionAutoencoder, "--codes-per-frame 4", CodeTalker, "", (0.8,)),
    "H 64": (MotionAutoencoder, "--codes-per-frame 64", CodeTalker, "", (0.8,)),
    "InstanceNorm": (NormedAutoencoder, "", CodeTalker, "", (0.8,)),
    "no resets": (MotionAutoencoder, "--reset-every 1000000", CodeTalker, "", (0.8,)),
    "motion fed back": (MotionAutoencoder, "", MotionHistory, "", (0.8,)),
    "teacher forcing": (MotionAutoencoder, "", CodeTalker, "--sampling-prob 0", (0.8,)),
    "sampling 0.85": (MotionAutoencoder, "", CodeTalker, "--sampling-prob 0.85", (0.8,)),
}
COLUMNS = {"lve": "LVE", "gap_correlation": "lip gap r", "fdd": "FDD", "fdd_abs": "abs FDD",
           "variance_ratio": "variance ratio", "upper_variance_ratio": "upper variance ratio",
           "upper_wasserstein": "upper Wasserstein", "diversity": "diversity",
           "codes_used": "codes used"}

parser = ArgumentParser(prog="python -m support.trial", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of a data set (default: the synthetic one)")
parser.add_argument("--out", default="runs/trial", help="folder for the results (%(default)s)")
parser.add_argument("--seeds", type=positive, default=3, help="trainings of a row (%(default)s)")
parser.add_argument("--rows", default=",".join(ROWS), help="names of rows (%(default)s)")


def train(name, seed, args, more_flags=()):
    """Both stages of a row, unless they are there -> folder. What they print goes to log.txt."""
    vq_class, vq_flags, ar_class, ar_flags, _ = ROWS[name]
    folder = Path(args.out, f"{name.replace(' ', '_')}_{seed}")
    if (folder / "ar/metrics.json").exists():       # the last file that is written
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--seed", str(seed), *more_flags] + (["--data", args.data] if args.data else [])
    vq_flags = [*flags, *vq_flags.split(), "--out", f"{folder}/vq"]
    ar_flags = [*flags, *ar_flags.split(), "--vq", f"{folder}/vq/best.pt", "--out", f"{folder}/ar"]
    with open(folder / "log.txt", "w") as log, redirect_stdout(log):
        train_vq.main(train_vq.parser.parse_args(vq_flags), (vq_class, ar_class))
        train_ar.main(train_ar.parser.parse_args(ar_flags), (vq_class, ar_class))
    return folder


def evaluate(name, seed, args, more_flags=()):
    """Train a row with one seed if necessary -> {row of the table: metrics of the test split}"""
    torch.set_num_threads(1)
    folder = train(name, seed, args, more_flags)
    data = open_data(args.data)
    vq_class, _, ar_class, _, temperatures = ROWS[name]
    model, checkpoint = load(folder / "ar/best.pt", "ar", classes=(vq_class, ar_class))
    data.check_compatible(checkpoint)
    results = {}
    for temperature in temperatures:
        model.config.temperature = temperature
        row = name if temperature else f"{name}, most likely"
        results[row] = evaluate_generation(model, data, "test", every_style=True, seed=seed)
    model.config.temperature = temperatures[0]
    mean, results[name]["diversity"] = evaluate_takes(model, data)
    if name == "codes":
        results["codes, mean of 8 takes"] = mean
    return results
