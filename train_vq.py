"""Stage 1: learn the dictionary of facial motion.

    python train_vq.py                              the built-in speakers; a minute, their making included
    python train_vq.py --data FOLDER --out runs/my_vq
    python train_vq.py --data VOCASET --preset vocaset        the published model: hours on a GPU

Writes best.pt (best on the validation split), last.pt (to resume from), figures.json and loss.png into --out.
"""
import argparse
import time
from pathlib import Path

import torch

from codetalker import PRESETS, MotionAutoencoder, VQConfig, load, save
from data import (CommandLine, batch_of, between, cannot, clock, evaluate_reconstruction, hear_interrupts, open_data,
                  positive, random_crops, resume, training_state, warn_of_collapse, writable, write_figures)

parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of the data set (default: the built-in speakers, made on first use)")
parser.add_argument("--preset", choices=PRESETS, default="lite",
                    help="sizes and schedule: one for laptops, the two published (default: %(default)s)")
parser.add_argument("--out", default="runs/vq", help="folder for the results (default: %(default)s)")
parser.add_argument("--steps", type=positive, default=450, help="training steps (default: %(default)s)")
parser.add_argument("--batch", type=between(1, 4096, int), default=8, help="sequences at once (default: %(default)s)")
parser.add_argument("--window", type=positive, default=48, help="frames in a training sequence (default: %(default)s)")
parser.add_argument("--rate", type=between(1e-9, 1), default=2e-3, help="learning rate, first (default: %(default)s)")
parser.add_argument("--halve-every", type=positive, default=100,
                    help="steps after which the rate halves (default: %(default)s)")
parser.add_argument("--codes", type=between(1, 65_536, int), default=256,
                    help="N, codes in the codebook (default: %(default)s)")
parser.add_argument("--slots", type=int, choices=[1, 2, 4, 8, 16, 32, 64],
                    help="H, codes per frame, which share a feature's channels (default: 16, with --preset biwi 8)")
parser.add_argument("--instance-norm", action="store_true", help="normalise each clip's channels, as the paper does")
parser.add_argument("--revive-every", type=positive, default=25,
                    help="steps between revivals of dead codes (default: %(default)s)")
parser.add_argument("--eval-every", type=positive, default=150, help="steps between evaluations (default: %(default)s)")
parser.add_argument("--log-every", type=positive, default=50, help="steps between log lines (default: %(default)s)")
parser.add_argument("--seed", type=between(0, 2 ** 32, int), default=0, help="of all randomness (default: %(default)s)")
parser.add_argument("--resume", action="store_true", help="go on from last.pt in --out, exactly")

# The paper's schedule where a preset asks for it: 200 epochs of 320 (VOCASET) or 192 (BIWI) sentences, one whole
# sentence a step, the rate halved every 20 epochs (VOCASET) or never. Flags that are given have the last word.
PAPER = dict(batch=1, window=100_000, rate=1e-4, eval_every=3_200, log_every=100)
SCHEDULES = {"lite": {}, "vocaset": PAPER | dict(steps=64_000, halve_every=6_400),
             "biwi": PAPER | dict(steps=38_400, halve_every=38_400)}


def main(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(device == "cpu")     # gathers are summed in order: same seed, same figures
    data, out = open_data(args.data), Path(args.out)

    if args.resume:
        model, state = load(out / "last.pt", "vq", device)
    else:
        sizes, _ = PRESETS[args.preset]
        if args.slots:
            sizes = sizes | dict(slots=args.slots, code_width=sizes.get("width", VQConfig.width) // args.slots)
        if args.instance_norm:
            sizes = sizes | dict(instance_norm=True)
        model, state = MotionAutoencoder(VQConfig(data.channels // 3, codes=args.codes, **sizes)).to(device), None
        if args.preset == "lite":                                       # [start]
            some = [data.motion(*crop) for crop in random_crops(data.splits["train"], args.window, 128)]
            model.start_from(batch_of(some)[0].to(device))
        else:
            data.scale = 1.0                                            # the published models see metres as they are
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.rate)
    step, best, rows = 0, -float("inf"), []
    if state:
        data.check(state)
        step, rows, best = resume(state, optimiser, args)
    print(f"stage 1 on {device}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(data.splits['train'])} clips, {data.channels // 3} vertices, motion divided by {data.scale:.4g}")

    writable(out, make=True)
    start, first, interrupted = time.time(), step, hear_interrupts()
    while step < args.steps:
        # 1. the rate: a short warm-up, then halved at fixed steps (as the paper's schedule, in steps)
        rate = args.rate * min(1, (step + 1) / 20) * 0.5 ** (step // args.halve_every)
        for group in optimiser.param_groups:
            group["lr"] = rate

        # 2. a batch of random stretches of real motion
        motion, lengths = batch_of([data.motion(*crop) for crop in
                                    random_crops(data.splits["train"], args.window, args.batch)])
        motion, lengths = motion.to(device), lengths.to(device) if lengths.min() < motion.shape[1] else None

        # 3. the codebook: codes that nothing has chosen lately start again from what the encoder says now [start]
        model.train()
        if args.preset == "lite" and step % args.revive_every == 0 and step > 0:
            with torch.no_grad():
                model.quantiser.revive(model.encoder(motion, lengths))

        # 4. forward, backward, step
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            _, indices, losses = model(motion, lengths)
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not size.isfinite():
            raise ValueError(f"step {step}: the gradient is not finite any more; train again with a lower --rate")
        optimiser.step()
        step += 1

        # 5. log
        evaluates = step % args.eval_every == 0 or step == args.steps
        if step % args.log_every == 0 or evaluates:
            rows.append({"step": step} | {name: loss.item() for name, loss in losses.items()})
            print(f"step {step:5d}  rec {losses['motion']:.4f}  vq {losses['vq']:.4f}  "
                  f"codes {len(indices.unique()):3d}/{args.codes}  {clock(start, step - first, args.steps - first)}",
                  flush=True)

        # 6. evaluate on whole unseen sentences, keep the best, save
        if evaluates:
            figures = evaluate_reconstruction(model, data, "val")
            print(f"   validation  R2 {figures['r2']:.4f}  lip gap r {figures['gap_correlation']:.4f}  "
                  f"codes {figures['codes_used']}/{args.codes}  perplexity {figures['perplexity']:.1f}", flush=True)
            warn_of_collapse(figures, args.codes, step, hears=False)
            rows[-1] |= {"validation": figures}
            better, best = figures["r2"] > best, max(best, figures["r2"])
        if evaluates or interrupted:
            state = training_state(optimiser, step, rows, best, args, data)
            if evaluates and better:
                save(out / "best.pt", model, **state)
            save(out / "last.pt", model, **state)
        if interrupted:
            raise KeyboardInterrupt(f"stopped after step {step}; the same command with --resume goes on from there")

    model, _ = load(out / "best.pt", "vq", device)
    figures = evaluate_reconstruction(model, data, "test")
    write_figures(out, rows, figures, args, ("motion", "vq"))
    print(f"test split  R2 {figures['r2']:.4f}  lip gap r {figures['gap_correlation']:.4f}  "
          f"codes {figures['codes_used']}/{args.codes}  perplexity {figures['perplexity']:.1f}  "
          f"-> {out}/best.pt ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    with cannot():
        preset = parser.parse_known_args()[0].preset
        parser.set_defaults(**SCHEDULES[preset])
        main(parser.parse_args())
