"""
Metrics: how far generated motion is from the ground truth, and whether a training run is healthy.

Evaluation of stage 2 is free-running: the model is fed with its own codes, as in use. A
teacher-forced loss also drops if the model only copies the previous frame. pred is the generated
motion, gt the ground truth.
"""
import json
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

from codetalker import atomic_write
from support.command import progress

METRIC_NAMES = {
    "lve": "LVE: largest squared lip error, mean over frames, mm2",
    "lve_mm": "its square root, mm",
    "lve_wrong_audio": "LVE with another clip's audio, mm2",
    "fdd": "FDD: upper-face dynamics, ground truth - generated, mm2",
    "fdd_abs": "the same, absolute, mm2",
    "gap_correlation": "lip-gap correlation",
    "r2": "share of variance explained",
    "variance_ratio": "variance of motion, generated / ground truth",
    "upper_variance_ratio": "the same, upper face",
    "upper_wasserstein": "distance of upper-face distributions, std",
    "tremble": "acceleration of the upper face (median), generated / ground truth",
    "blinks": "blinks a minute",
    "blinks_gt": "the same, ground truth",
    "brow_raises": "brow raises a minute",
    "brow_raises_gt": "the same, ground truth",
    "codes_used": "codes used",
    "perplexity": "perplexity of the codes"}


def lip_vertex_errors(pred, gt, lips):
    """Largest squared distance over the lip vertices, for each frame. pred, gt (T, V, 3) -> (T,)

    LVE is its mean over all frames of all clips; no root (Richard et al. 2021; CodeTalker's code).
    """
    return np.square(pred[:, lips] - gt[:, lips]).sum(axis=-1).max(axis=1)


def upper_face_std(motion, upper_face):
    """Mean over upper-face vertices of the standard deviation of the squared displacement.

    motion (T, V, 3) is displacement from the template -> float; the deviation is over time. FDD,
    the upper-face dynamics deviation, is this of gt minus this of pred (CodeTalker's code).
    """
    squared = np.square(motion[:, upper_face]).sum(axis=-1)             # (T, vertices)
    return float(squared.std(axis=0).mean())


def motion_variance(vertices):
    """How much a face moves: variance over time of positions (T, V, 3), mean over vertices."""
    return float(vertices.var(axis=0).sum(axis=-1).mean())


def correlation(a, b):
    """Pearson's r of two curves (T,); 0 if one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def wasserstein(pred, gt):
    """Distance between the distributions of poses and speeds; lists of (T, V, 3) of equal lengths.

    It compares how often each value occurs, not when: a brow raise at a different time costs
    nothing, a missing one does. It is the Wasserstein distance of a coordinate (with as many
    samples on both sides, the mean difference of sorted values) over gt's standard deviation, both
    as means over all coordinates; then the mean of positions and speeds.
    """
    distances = []
    for order in (0, 1):                            # positions, then frame-to-frame differences
        a = np.concatenate([np.diff(motion, n=order, axis=0) for motion in pred])
        b = np.concatenate([np.diff(motion, n=order, axis=0) for motion in gt])
        difference = np.abs(np.sort(a, axis=0) - np.sort(b, axis=0))
        distances.append(ratio(difference.mean(), b.std(axis=0).mean()))
    return float(np.mean(distances))


def count_rises(curve, threshold):
    """How often a curve (T,) rises above a threshold, from below half of it or at its start."""
    rises = 0
    is_low = True
    for value in curve:
        if is_low and value > threshold:
            rises += 1
            is_low = False
        elif value < threshold / 2:
            is_low = True
    return rises


def upper_face_metrics(data, preds, gts):
    """How alive the upper face is; preds, gts: vertices (T, V, 3) of each clip -> a dict.

        tremble             median over frames of the acceleration, pred / gt: in most frames a real
                            upper face is nearly still
        blinks, blinks_gt   a minute; the lids are closer than half their usual distance
        brow_raises, brow_raises_gt     a minute; the brow is 3 mm above its median
    """
    rates = {}
    minutes = sum(len(gt) for gt in gts) / data.fps / 60
    for suffix, faces in (("", preds), ("_gt", gts)):
        accelerations, blinks, brow_raises = [], [], []
        for vertices in faces:
            second_difference = np.diff(vertices[:, data.upper_face], n=2, axis=0)
            acceleration = np.linalg.norm(second_difference, axis=-1).mean(axis=1)      # (T - 2,)
            accelerations.append(np.median(acceleration) if len(acceleration) else 0.0)
            if data.eye_gap:
                upper, lower = data.eye_gap
                gap = np.linalg.norm(vertices[:, upper] - vertices[:, lower], axis=1)
                blinks.append(count_rises(1 - gap / np.median(gap), threshold=0.5))
            if data.brow and data.to_mm:
                height = data.to_mm * vertices[:, data.brow[0], 1]                      # y is up
                brow_raises.append(count_rises(height - np.median(height), threshold=3.0))
        rates["tremble" + suffix] = float(np.mean(accelerations))
        if blinks:
            rates["blinks" + suffix] = sum(blinks) / minutes
        if brow_raises:
            rates["brow_raises" + suffix] = sum(brow_raises) / minutes
    rates["tremble"] = ratio(rates["tremble"], rates.pop("tremble_gt"))
    return rates


def perplexity(counts):
    """exp(entropy) of code counts (N,): as varied as this number of codes in equal use."""
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def wrong_audio_partner(clips, i):
    """Index of another clip, of clip i's subject if there is one, whose motion was not generated
    from clip i's audio; None if there is no other."""
    others = [j for j in range(len(clips)) if j != i]
    others = [j for j in others if clips[j].subject == clips[i].subject] or others
    later = [j for j in others if j > i]
    return min(later or others, default=None)


def ratio(a, b):
    """a / b; NaN for motion that does not move."""
    return float(a / b) if b > 0 else math.nan


def compute_metrics(data, clips, motions):
    """Metrics of predicted motions, one (T, V*3) in the model's scale for each clip: a dict.

        r2                      share of gt's variance explained, 1 is perfect
        gap_correlation         of the lip gap over time, mean over clips
        lve, lve_wrong_audio    mm2 where the unit is metres; the latter with what was generated for
                                another clip's audio: much larger, if the model uses the audio
        lve_mm                  root of lve
        fdd, fdd_abs            mean over clips, signed (positive: too little motion) and absolute
        variance_ratio, upper_variance_ratio    motion variance, pred / gt
        upper_wasserstein       distance of the upper face's distributions
        and those of upper_face_metrics()
    """
    to_mm2 = (data.to_mm or 1.0) ** 2
    lve, lve_wrong_audio, gap_correlation, fdd = [], [], [], []
    variance, upper_variance, upper_pred, upper_gt = [], [], [], []
    residual = total = 0.0
    preds = [data.vertices(motion, clip.subject) for clip, motion in zip(clips, motions)]
    gts = [data.frames(clip) for clip in clips]
    for i, (clip, pred, gt) in enumerate(zip(clips, preds, gts)):
        template = data.templates[clip.subject].reshape(1, -1, 3)
        residual += np.square(pred - gt).sum(dtype=np.float64)
        total += np.square(gt - gt.mean(axis=0)).sum(dtype=np.float64)
        lve.append(lip_vertex_errors(pred, gt, data.lips))
        gap_correlation.append(correlation(data.lip_gap_curve(pred), data.lip_gap_curve(gt)))

        upper = data.upper_face
        std_gt = upper_face_std(gt - template, upper)
        std_pred = upper_face_std(pred - template, upper)
        fdd.append(to_mm2 * (std_gt - std_pred))
        variance.append([motion_variance(pred), motion_variance(gt)])
        upper_variance.append([motion_variance(pred[:, upper]), motion_variance(gt[:, upper])])
        upper_pred.append(pred[:, upper] - template[:, upper])
        upper_gt.append(gt[:, upper] - template[:, upper])

        partner = wrong_audio_partner(clips, i)
        if partner is not None:
            wrong = data.vertices(motions[partner], clip.subject)   # on this subject's face
            errors = lip_vertex_errors(wrong[:clip.frames], gt[:len(wrong)], data.lips)
            lve_wrong_audio.append(errors)

    sums = np.sum(variance, axis=0)
    upper_sums = np.sum(upper_variance, axis=0)
    mean_lve = to_mm2 * float(np.concatenate(lve).mean(dtype=np.float64))
    wrong_errors = np.concatenate(lve_wrong_audio or [[math.nan]])
    mean_lve_wrong = to_mm2 * float(wrong_errors.mean(dtype=np.float64))
    return {"r2": 1 - ratio(residual, total), "gap_correlation": float(np.mean(gap_correlation)),
            "lve": mean_lve, "lve_mm": mean_lve ** 0.5, "lve_wrong_audio": mean_lve_wrong,
            "fdd": float(np.mean(fdd)), "fdd_abs": float(np.abs(fdd).mean()),
            "variance_ratio": ratio(*sums), "upper_variance_ratio": ratio(*upper_sums),
            "upper_wasserstein": wasserstein(upper_pred, upper_gt),
            **upper_face_metrics(data, preds, gts)}


def usage_metrics(codes, codebook_size):
    """How many codes occur in a list of code arrays, and their perplexity -> dict"""
    everything = np.concatenate([np.asarray(array).ravel() for array in codes])
    counts = np.bincount(everything, minlength=codebook_size)
    return {"codes_used": int((counts > 0).sum()), "perplexity": perplexity(counts)}


@torch.no_grad()
def evaluate_reconstruction(model, data, split):
    """Stage 1 on the clips of a split: metrics of the reconstruction."""
    device = next(model.parameters()).device
    clips = data.splits[split]
    motions, codes = [], []
    model.eval()
    for clip in clips:
        clip_codes = model.encode(data.motion(clip)[None].to(device))
        motions.append(model.decode(clip_codes)[0].cpu())
        codes.append(clip_codes.cpu())
    return compute_metrics(data, clips, motions) | usage_metrics(codes, model.config.codebook_size)


@torch.no_grad()
def generate_clips(model, data, clips, styles):
    """Generate from each clip's audio, in the style of the training subject styles[i].

    Returns motions, (T, V*3) on the CPU, and codes, (T, H) on the model's device, of each clip.

    Only the frame-by-frame loop runs in batches, since it is causal; what looks ahead, the audio
    encoder and the decoder, takes the clips one by one, without padding.
    """
    device = next(model.parameters()).device
    model.eval()
    motions = [None] * len(clips)
    codes = [None] * len(clips)
    order = sorted(range(len(clips)), key=lambda i: clips[i].frames)    # like lengths together
    longest = clips[order[-1]].frames
    batch_size = min(40, max(1, 40_000_000 // (data.channels * longest)))   # bounds the memory
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        audio = []
        for i in batch:
            features = data.audio_features(clips[i], model)[None].to(device)
            audio.append(model.encode_audio(features)[0])
        audio = pad_sequence(audio, batch_first=True)       # padding is harmless, as it is causal
        style = torch.stack([data.style(styles[i]) for i in batch]).to(device)
        generated = model.generate(audio, style)
        for row, i in enumerate(batch):
            codes[i] = generated[row, :clips[i].frames]
            motions[i] = model.decode(codes[i][None])[0].cpu()
    return motions, codes


def styles_of(data, clips, i=0):
    """For each clip the training subject whose style it gets: its own; for each unseen subject one
    of them, which changes with i."""
    style_for = {name: name for name in data.subjects}
    unseen = sorted({clip.subject for clip in clips} - set(data.subjects))
    for j, name in enumerate(unseen):
        style_for[name] = data.subjects[(i + j) % len(data.subjects)]
    return [style_for[clip.subject] for clip in clips]


def evaluate_generation(model, data, split, every_style=False, seed=0):
    """Stage 2, free-running, on the clips of a split: metrics of what it generates from the audio.

    A training subject moves in its own style. An unseen subject has none: it gets one of the
    training styles, or with every_style each of them in turn, and the metrics are averaged (the
    paper's protocol). seed: of the sampled codes; the random state of training is restored.
    """
    clips = data.splits[split]
    unseen = {clip.subject for clip in clips} - set(data.subjects)
    rounds = range(len(data.subjects) if every_style and unseen else 1)
    results = []
    for i in progress(rounds, "evaluating all styles"):
        with torch.random.fork_rng():
            torch.manual_seed(seed + i)
            motions, codes = generate_clips(model, data, clips, styles_of(data, clips, i))
        result = compute_metrics(data, clips, motions)
        if codes[0].dtype == torch.long:            # not for the trial's model without a codebook
            codes = [array.cpu() for array in codes]
            result |= usage_metrics(codes, model.autoencoder.config.codebook_size)
        results.append(result)
    metrics = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    metrics["lve_mm"] = metrics["lve"] ** 0.5       # root of the mean, not mean of the roots
    return metrics


def warn_if_collapsed(metrics, codebook_size, step, uses_audio):
    """Print a line for each way in which training fails silently, from step 200 on (R2: 100).

    Healthy runs are far from these limits: from step 150 on a perplexity above N / 4, a variance
    ratio above 0.7, a lip error four times as large with the wrong audio.
    """
    wrong_audio = metrics["lve_wrong_audio"] / max(metrics["lve"], 1e-12)
    messages = []
    if metrics.get("perplexity", codebook_size) < codebook_size / 10:
        messages.append(f"codebook collapse: perplexity {metrics['perplexity']:.1f} of "
                        f"{codebook_size}; try a lower --lr or a smaller --reset-every")
    if metrics["variance_ratio"] < 0.2:
        messages.append(f"hardly any motion: variance ratio {metrics['variance_ratio']:.3f}; try "
                        "a lower --lr, and python data.py check FOLDER")
    if uses_audio and wrong_audio < 1.2:
        messages.append(f"the audio is ignored: with another clip's the lip error is "
                        f"{wrong_audio:.2f} times as large; try a higher --sampling-prob, and "
                        "python data.py check FOLDER")
    messages = messages if step >= 200 else []
    if step >= 100 and not uses_audio and not metrics["r2"] >= 0.1:         # earlier; NaN, too
        messages.append(f"no reconstruction: R2 {metrics['r2']:.2f}; run python data.py check "
                        "FOLDER, it finds what is wrong with the data; or try a lower --lr")
    for message in messages:
        print(f"   warning: {message}", flush=True)


def write_json(path, value):
    """JSON has no NaN: it becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_metrics(out, log, test, args):
    """metrics.json (the log, metrics of the test split, flags) and loss.png, into a folder."""
    write_json(out / "metrics.json", {"flags": vars(args), "test": test, "log": log})
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    losses = [name for name in log[0] if name not in ("step", "val")]
    for name in losses:
        axes.plot([row["step"] for row in log], [row[name] for row in log], label=f"{name} loss")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    evaluated = [row for row in log if "val" in row]
    steps = [row["step"] for row in evaluated]
    correlations = [row["val"]["gap_correlation"] for row in evaluated]
    right = axes.twinx()
    right.plot(steps, correlations, "k.--", label="lip-gap r, validation")
    right.set(ylabel="correlation", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    with atomic_write(out / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)
