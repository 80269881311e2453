"""
Stage 1: learn a codebook of facial motion.

    python train_vq.py                              the synthetic data set; a minute, data included
    python train_vq.py --data FOLDER --out runs/my_vq
    python train_vq.py --data VOCASET --preset vocaset      the published model: hours on a GPU

Writes best.pt (best on the validation split), last.pt (to resume from), metrics.json and loss.png.
"""
import argparse
import math
import time
from pathlib import Path

import torch

from codetalker import CodeTalker, MotionAutoencoder, load, save
from data import open_data, random_crops
from support.command import (ArgumentParser, check_writable, learning_rate, number, one_line_errors,
                             pick_device, positive, resume_training, time_left, training_state)
from support.metrics import evaluate_reconstruction, warn_if_collapsed, write_metrics
from support.muon import Muon

parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of a data set (default: the synthetic one)")
parser.add_argument("--preset", choices=["small", "vocaset", "biwi"], default="small",
                    help="a model for laptops, or a published one: support/published.py explains")
parser.add_argument("--out", default="runs/vq", help="folder for the results (%(default)s)")
parser.add_argument("--steps", type=positive, default=300, help="training steps (%(default)s)")
parser.add_argument("--batch-size", type=number(1, 4096, int), default=8,
                    help="sequences per step (%(default)s)")
parser.add_argument("--seq-len", type=positive, default=48,
                    help="frames per sequence (%(default)s)")
parser.add_argument("--lr", type=number(1e-9, 1), default=4e-3,
                    help="highest learning rate (%(default)s)")
parser.add_argument("--halve-lr-every", type=positive, metavar="STEPS",
                    help="halve the rate every STEPS steps (default: it falls evenly to 0)")
parser.add_argument("--codebook-size", type=number(1, 65536, int), default=256,
                    help="N, number of codes (%(default)s)")
parser.add_argument("--codes-per-frame", type=int, choices=[1, 2, 4, 8, 16, 32, 64],
                    help="H; each has D / H dimensions (default: 16; biwi: 8)")
parser.add_argument("--reset-every", type=positive, default=25,
                    help="steps between resets of dead codes (%(default)s)")
parser.add_argument("--eval-every", type=positive, default=150,
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
    sizes = {}
    if args.preset != "small":
        from support import published
        classes = published.CLASSES
        sizes = published.PRESETS[args.preset][0]
    vq_class = classes[0]

    if args.resume:
        model, checkpoint = load(out / "last.pt", "vq", device, classes)
        data = open_data(args.data, checkpoint)
    else:
        data = open_data(args.data)
        config = vq_class.Config(data.channels // 3, **sizes)
        config.codebook_size = args.codebook_size
        if args.codes_per_frame:
            config.codes_per_frame = args.codes_per_frame
            config.code_dim = config.dim // args.codes_per_frame
        model = vq_class(config).to(device)
        if args.preset == "small":
            crops = random_crops(data.splits["train"], args.seq_len, count=128)
            motion = torch.stack([data.motion(clip, a, b) for clip, a, b in crops])
            model.init_from_data(motion.to(device))
        else:
            data.scale = 1.0                        # the published models take unscaled motion
    parameters = list(model.parameters())
    if args.preset == "small":
        backbones = [model.encoder.backbone, model.decoder.backbone]
        optimiser = Muon(parameters, backbones, args.lr)    # [muon]
    else:
        optimiser = torch.optim.AdamW(parameters, lr=args.lr, fused=True)
    step, log, best = 0, [], -float("inf")
    if args.resume:
        step, log, best = resume_training(checkpoint, optimiser, args)
    train_clips = data.splits["train"]
    print(f"stage 1 on {device}: {sum(p.numel() for p in parameters):,} parameters, "
          f"{len(train_clips)} clips, {data.channels // 3} vertices")

    check_writable(out)
    data.load_motion(train_clips + data.splits["val"], device)
    start, start_step = time.time(), step
    while step < args.steps:
        # 1. learning rate: a short warm-up, then down to 0 or halved [rate]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(args, step)

        # 2. a batch of random crops of motion (B, T, V*3)
        crops = random_crops(train_clips, args.seq_len, args.batch_size)
        motion = torch.stack([data.motion(clip, a, b) for clip, a, b in crops])

        # 3. dead codes start again from encoder outputs
        if args.preset == "small" and step > 0 and step % args.reset_every == 0:
            with torch.no_grad():
                model.quantiser.reset_dead_codes(model.encoder(motion))

        # 4. forward, backward, step
        model.train()
        _, codes, losses = model(motion)
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not grad_norm.isfinite():
            raise ValueError(f"step {step}: the gradient is not finite; train with a lower --lr")
        optimiser.step()
        step += 1

        # 5. log
        do_eval = step % args.eval_every == 0 or step == args.steps
        if step % args.log_every == 0 or do_eval:
            log.append({"step": step} | {name: loss.item() for name, loss in losses.items()})
            print(f"step {step:5d}  rec {losses['reconstruction']:.4f}  vq {losses['vq']:.4f}  "
                  f"codes {len(codes.unique()):3d}/{args.codebook_size}  "
                  f"{time_left(start, step - start_step, args.steps - start_step)}", flush=True)

        # 6. evaluate on unseen sentences, save the best and the last
        if do_eval:
            metrics = evaluate_reconstruction(model, data, "val")
            print(f"   validation  R2 {metrics['r2']:.4f}  lip gap r "
                  f"{metrics['gap_correlation']:.4f}  codes {metrics['codes_used']}/"
                  f"{args.codebook_size}  perplexity {metrics['perplexity']:.1f}", flush=True)
            warn_if_collapsed(metrics, args.codebook_size, step, uses_audio=False)
            log[-1]["val"] = metrics
            r2 = metrics["r2"]
            is_best = r2 > best or math.isnan(r2)           # NaN, if nothing moves: keep the latest
            best = max(best, r2)
            state = training_state(optimiser, step, log, best, args, data)
            if is_best:
                save(out / "best.pt", model, **state)
            save(out / "last.pt", model, **state)

    model, _ = load(out / "best.pt", "vq", device, classes)
    metrics = evaluate_reconstruction(model, data, "test")
    write_metrics(out, log, metrics, args)
    print(f"test split  R2 {metrics['r2']:.4f}  lip gap r {metrics['gap_correlation']:.4f}  "
          f"codes {metrics['codes_used']}/{args.codebook_size}  "
          f"perplexity {metrics['perplexity']:.1f}  -> {out}/best.pt ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    with one_line_errors():
        preset = parser.parse_known_args()[0].preset
        if preset != "small":
            from support import published
            parser.set_defaults(**published.VQ_SCHEDULE[preset])
        main(parser.parse_args())
