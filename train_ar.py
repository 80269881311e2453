"""
Stage 2: learn to predict codes from speech.

    python train_ar.py                              after train_vq.py; three minutes on a laptop
    python train_ar.py --data FOLDER --vq runs/my_vq/best.pt --out runs/my_ar
    python train_ar.py --data VOCASET --preset vocaset --wav2vec2 pytorch_model.bin     (published)

Every evaluation is free-running: the model is fed its own codes, as in use. The teacher-forced loss
also drops if the model only copies the previous frame. "lip gap r" is the correlation of the
distance between the inner lips with the ground truth's. LVE is the largest squared error of a lip
vertex, mean over frames; with another clip's audio it should be much larger.

Writes best.pt (highest correlation of the lip gap on unseen sentences), last.pt, metrics.json and
loss.png.
"""
import argparse
import time
from pathlib import Path

import torch

from codetalker import CodeTalker, MotionAutoencoder, load, perturb_vocal_tract, save
from data import open_data, random_crops
from support.command import (ArgumentParser, check_writable, learning_rate, number, one_line_errors,
                             pick_device, positive, progress, resume_training, time_left,
                             training_state)
from support.metrics import evaluate_generation, warn_if_collapsed, write_metrics
from support.muon import Muon

parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of a data set (default: the synthetic one)")
parser.add_argument("--preset", choices=["small", "vocaset", "biwi"], default="small",
                    help="a model for laptops, or a published one: support/published.py explains")
parser.add_argument("--wav2vec2", help="for the published models: pytorch_model.bin of "
                                       "facebook/wav2vec2-base-960h")
parser.add_argument("--vq", default="runs/vq/best.pt", help="checkpoint of stage 1 (%(default)s)")
parser.add_argument("--init-audio", metavar="CHECKPOINT",
                    help="start from the audio encoder of another stage 2, such as the synthetic "
                         "data set's runs/ar/best.pt, which has learnt phones")
parser.add_argument("--out", default="runs/ar", help="folder for the results (%(default)s)")
parser.add_argument("--steps", type=positive, default=1800, help="training steps (%(default)s)")
parser.add_argument("--batch-size", type=number(1, 4096, int), default=8,
                    help="sequences per step (%(default)s)")
parser.add_argument("--seq-len", type=positive, default=80,
                    help="frames per sequence (%(default)s)")
parser.add_argument("--lr", type=number(1e-9, 1), default=2e-3,
                    help="highest learning rate (%(default)s)")
parser.add_argument("--halve-lr-every", type=positive, metavar="STEPS",
                    help="halve the rate every STEPS steps (default: it falls evenly to 0)")
parser.add_argument("--sampling-prob", type=number(0, 1), default=0.8,
                    help="scheduled sampling: in half of the training sequences, this share of "
                         "past frames is the model's own (%(default)s)")
parser.add_argument("--eval-every", type=positive, default=900,
                    help="steps between evaluations (%(default)s)")
parser.add_argument("--log-every", type=positive, default=50,
                    help="steps between log lines (%(default)s)")
parser.add_argument("--seed", type=number(0, 2 ** 32, int), default=0,
                    help="random seed (%(default)s)")
parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
parser.add_argument("--resume", action="store_true",
                    help="continue from last.pt in --out; exactly, if --steps is the same")


def main(args, classes=(MotionAutoencoder, CodeTalker)):
    """classes: of stage 1 and stage 2; support/trial.py trains others."""
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    out = Path(args.out)
    if args.preset != "small":
        from support import published
        classes = published.CLASSES
    ar_class = classes[1]

    if args.resume:
        model, checkpoint = load(out / "last.pt", "ar", device, classes)
        data = open_data(args.data, checkpoint)
    else:
        autoencoder, stage1 = load(args.vq, "vq", device, classes)
        data = open_data(args.data, stage1)
        sizes = {}
        if args.preset != "small":
            sizes = published.ar_sizes(args.preset, args.wav2vec2, data.fps)
        phone_classes = max(1, len(data.phone_names))
        config = ar_class.Config(styles=len(data.subjects), phones=phone_classes,
                                 period=round(data.fps), **sizes)
        model = ar_class(config, autoencoder).to(device)
        if args.preset != "small":
            published.load_wav2vec2(model, args.wav2vec2)
        if args.init_audio:
            other, _ = load(args.init_audio, "ar", device, classes)
            model.audio_encoder.load_state_dict(other.audio_encoder.state_dict())
    trainable = [p for p in model.parameters() if p.requires_grad]
    if args.preset == "small":
        optimiser = Muon(trainable, [model.audio_encoder, model.layers], args.lr)   # [muon]
    else:
        optimiser = torch.optim.Adam(trainable, lr=args.lr, fused=True)
    step, log, best = 0, [], -float("inf")
    if args.resume:
        step, log, best = resume_training(checkpoint, optimiser, args)
    train_clips = data.splits["train"]
    print(f"stage 2 on {device}: {sum(p.numel() for p in trainable):,} parameters, "
          f"{len(train_clips)} clips, styles {', '.join(data.subjects)}")

    check_writable(out)
    data.load_motion(train_clips + data.splits["val"], device)
    styles = {subject: data.style(subject).to(device) for subject in data.subjects}
    phones = {clip.name: data.phone_classes(clip).to(device) for clip in train_clips}
    codes = {}                              # of each clip, (T, H); only once: stage 1 is frozen
    with torch.no_grad():
        for clip in progress(train_clips, "codes and audio features"):
            codes[clip.name] = model.autoencoder.encode(data.motion(clip)[None])[0]
            data.audio_features(clip, model)                # fills the cache, on the device
    start, start_step = time.time(), step
    while step < args.steps:
        # 1. learning rate: a short warm-up, then down to 0 or halved [rate]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(args, step)

        # 2. a batch of random crops: motion, its codes, its audio, the subject's style
        crops = random_crops(train_clips, args.seq_len, args.batch_size)
        motion = torch.stack([data.motion(clip, a, b) for clip, a, b in crops])
        code_batch = torch.stack([codes[clip.name][a:b] for clip, a, b in crops])
        features = torch.stack([data.audio_features(clip, model, a, b) for clip, a, b in crops])
        phone_batch = torch.stack([phones[clip.name][a:b] for clip, a, b in crops])
        style = torch.stack([styles[clip.subject] for clip, _, _ in crops])
        if args.preset == "small":
            features = perturb_vocal_tract(features)

        # 3. forward, backward, step
        model.train()
        losses = model(features, style, code_batch, motion, phone_batch, args.sampling_prob)
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        if not grad_norm.isfinite():
            raise ValueError(f"step {step}: the gradient is not finite; train with a lower --lr")
        optimiser.step()
        step += 1

        # 4. log
        do_eval = step % args.eval_every == 0 or step == args.steps
        if step % args.log_every == 0 or do_eval:
            log.append({"step": step} | {name: loss.item() for name, loss in losses.items()})
            shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            remaining = time_left(start, step - start_step, args.steps - start_step)
            print(f"step {step:5d}  {shown}  {remaining}", flush=True)

        # 5. evaluate free-running on unseen sentences, save the best and the last
        if do_eval:
            metrics = evaluate_generation(model, data, "val")
            print(f"   free-running  lip gap r {metrics['gap_correlation']:.3f}  "
                  f"LVE {metrics['lve']:.4g}  with wrong audio {metrics['lve_wrong_audio']:.4g}  "
                  f"variance ratio {metrics['variance_ratio']:.2f}  "
                  f"upper face {metrics['upper_variance_ratio']:.2f}", flush=True)
            codebook_size = model.autoencoder.config.codebook_size
            warn_if_collapsed(metrics, codebook_size, step, uses_audio=True)
            log[-1]["val"] = metrics
            # not LVE: it prefers faces that hardly move, and a few clips make it noisy
            is_best = metrics["gap_correlation"] >= best
            best = max(best, metrics["gap_correlation"])
            state = training_state(optimiser, step, log, best, args, data)
            if is_best:
                save(out / "best.pt", model, **state)
            save(out / "last.pt", model, **state)

    model, _ = load(out / "best.pt", "ar", device, classes)
    metrics = evaluate_generation(model, data, "test")
    write_metrics(out, log, metrics, args)
    print(f"test split, free-running  lip gap r {metrics['gap_correlation']:.3f}  "
          f"LVE {metrics['lve']:.4g}  with wrong audio {metrics['lve_wrong_audio']:.4g}  "
          f"variance ratio {metrics['variance_ratio']:.2f}  "
          f"-> {out}/best.pt ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    with one_line_errors():
        preset = parser.parse_known_args()[0].preset
        if preset != "small":
            from support import published
            parser.set_defaults(**published.AR_SCHEDULE[preset])
        main(parser.parse_args())
