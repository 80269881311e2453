"""Stage 2: let speech choose from the dictionary.

    python train_ar.py                              after train_vq.py; four minutes on a laptop
    python train_ar.py --data FOLDER --vq runs/my_vq/best.pt --out runs/my_ar
    python train_ar.py --data VOCASET --preset vocaset --wav2vec2 model.safetensors     the published model

Every evaluation is free-running: the model feeds on its own codes, as it will in use. Teacher-forced losses fall
even when it has learnt nothing but to continue; lip error with the audio swapped for another clip's tells whether it
listens.
Writes best.pt (lowest free-running lip error over that with swapped audio), last.pt (to resume from), figures.json
and loss.png into --out.
"""
import argparse
import time
from pathlib import Path

import torch

from codetalker import PRESETS, ARConfig, CodeTalker, import_wav2vec2, load, other_voice, save
from data import (CommandLine, batch_of, batch_of_sounds, between, cannot, clock, evaluate_generation,
                  hear_interrupts, open_data, positive, random_crops, resume, training_state, warn_of_collapse,
                  writable, write_figures)

parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of the data set (default: the built-in speakers, made on first use)")
parser.add_argument("--preset", choices=PRESETS, default="lite",
                    help="sizes and schedule: one for laptops, the two published (default: %(default)s)")
parser.add_argument("--wav2vec2", help="weights of facebook/wav2vec2-base-960h, pytorch_model.bin or "
                                       "model.safetensors; the published models hear through it")
parser.add_argument("--vq", default="runs/vq/best.pt", help="checkpoint of stage 1 (default: %(default)s)")
parser.add_argument("--out", default="runs/ar", help="folder for the results (default: %(default)s)")
parser.add_argument("--steps", type=positive, default=1650, help="training steps (default: %(default)s)")
parser.add_argument("--batch", type=between(1, 4096, int), default=8, help="sequences at once (default: %(default)s)")
parser.add_argument("--window", type=positive, default=80, help="frames in a training sequence (default: %(default)s)")
parser.add_argument("--rate", type=between(1e-9, 1), default=2e-3, help="learning rate, first (default: %(default)s)")
parser.add_argument("--halve-every", type=positive, default=330,
                    help="steps after which the rate halves (default: %(default)s)")
parser.add_argument("--target", choices=["codes", "vertices", "indices"], default="codes",
                    help="what the transformer answers: a feature, for whose nearest codes it stands (the paper); the "
                         "vertices themselves (no codebook); or a score for every code (default: %(default)s)")
parser.add_argument("--history", choices=["codes", "motion"], default=None,
                    help="what is fed back to it (default: codes; with --target vertices the motion)")
parser.add_argument("--own", type=between(0, 1), default=0.4,
                    help="share of the history that is the model's own answers, 0 to 1 (default: %(default)s)")
parser.add_argument("--eval-every", type=positive, default=550, help="steps between evaluations (default: %(default)s)")
parser.add_argument("--log-every", type=positive, default=50, help="steps between log lines (default: %(default)s)")
parser.add_argument("--seed", type=between(0, 2 ** 32, int), default=0, help="of all randomness (default: %(default)s)")
parser.add_argument("--resume", action="store_true", help="go on from last.pt in --out, exactly")

# The paper's schedule where a preset asks for it: 100 epochs of 320 (VOCASET) or 192 (BIWI) sentences, one whole
# sentence a step, always the same rate, the truth as history. Flags that are given have the last word.
PAPER = dict(batch=1, window=100_000, rate=1e-4, halve_every=32_000, own=0.0, eval_every=3_200, log_every=100)
SCHEDULES = {"lite": {}, "vocaset": PAPER | dict(steps=32_000), "biwi": PAPER | dict(steps=19_200)}


def main(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(device == "cpu")     # gathers are summed in order: same seed, same figures
    data, out = open_data(args.data), Path(args.out)

    if args.resume:
        model, state = load(out / "last.pt", "ar", device)
        autoencoder = model.autoencoder                     # whatever --vq has become since
        data.check(state)
    else:
        autoencoder, stage1 = load(args.vq, "vq", device)
        data.check(stage1)
        if stage1["flags"].get("preset", args.preset) != args.preset:
            raise ValueError(f"{args.vq}: trained with --preset {stage1['flags']['preset']}, found --preset "
                             f"{args.preset}; both stages need the same")
        _, sizes = PRESETS[args.preset]
        if args.preset != "lite":
            if not args.wav2vec2:
                raise ValueError(f"preset {args.preset} hears through wav2vec 2.0: give --wav2vec2 FILE, "
                                 "pytorch_model.bin or model.safetensors of facebook/wav2vec2-base-960h")
            wav2vec2, ears = import_wav2vec2(args.wav2vec2)
            sizes = sizes | {"wav2vec2": wav2vec2}
        sizes = sizes | {"target": args.target}
        if args.history or args.target == "vertices":
            sizes["history"] = args.history or "motion"
        config = ARConfig(styles=len(data.subjects), period=round(data.fps), **sizes)
        if (config.target, config.history) == ("vertices", "codes"):
            raise ValueError("--target vertices has no codes to feed back: --history motion expected, found codes")
        if config.audio_steps == 2 and data.fps != 25:
            raise ValueError(f"preset {args.preset} hears two steps of 20 ms a frame: 25 frames per second expected, "
                             f"found {data.fps:g}; --preset vocaset takes any")
        model, state = CodeTalker(config, autoencoder), None
        if args.preset != "lite":
            model.audio_encoder = ears
        model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=args.rate)
    step, best, rows = 0, float("inf"), []
    if state:
        step, rows, best = resume(state, optimiser, args)
    print(f"stage 2 on {device}: {sum(p.numel() for p in trained):,} parameters, {len(data.splits['train'])} clips, "
          f"styles {', '.join(data.subjects)}")

    # The codes of all real motion; they never change any more.
    with torch.no_grad():
        codes = {clip.name: autoencoder.encode(data.motion(clip)[None].to(device))[0]
                 for clip in data.splits["train"]}

    writable(out, make=True)
    start, first, interrupted = time.time(), step, hear_interrupts()
    while step < args.steps:
        # 1. the rate: a short warm-up, then halved at fixed steps
        rate = args.rate * min(1, (step + 1) / 20) * 0.5 ** (step // args.halve_every)
        for group in optimiser.param_groups:
            group["lr"] = rate

        # 2. a batch of random stretches: motion, its codes, its sound, who moves so
        crops = random_crops(data.splits["train"], args.window, args.batch)
        motion, lengths = batch_of([data.motion(*crop) for crop in crops])
        target, _ = batch_of([codes[clip.name][a:b] for clip, a, b in crops])
        sound = batch_of_sounds([data.sound(clip, model.config, a, b) for clip, a, b in crops], model.config, device)
        style = torch.stack([data.style(clip.subject) for clip, _, _ in crops])
        motion, target, style = (tensor.to(device) for tensor in (motion, target, style))
        lengths = lengths.to(device) if lengths.min() < motion.shape[1] else None

        # 3. forward, backward, step
        model.train()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            sound = sound if model.config.wav2vec2 else other_voice(sound)
            _, losses = model(sound, style, target, motion, lengths, args.own)
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        size = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not size.isfinite():
            raise ValueError(f"step {step}: the gradient is not finite any more; train again with a lower --rate")
        optimiser.step()
        step += 1

        # 4. log
        evaluates = step % args.eval_every == 0 or step == args.steps
        if step % args.log_every == 0 or evaluates:
            rows.append({"step": step} | {name: loss.item() for name, loss in losses.items()})
            print(f"step {step:5d}  " + "".join(f"{name} {loss:.4f}  " for name, loss in losses.items())
                  + clock(start, step - first, args.steps - first), flush=True)

        # 5. evaluate free-running on unseen sentences, keep the best, save
        if evaluates:
            figures = evaluate_generation(model, data, "val")
            print(f"   free-running  lip gap r {figures['gap_correlation']:.3f}  LVE {figures['lve']:.4g}  "
                  f"swapped {figures['lve_swapped']:.4g}  energy {figures['energy']:.2f}  "
                  f"upper {figures['upper_energy']:.2f}  codes {figures['codes_used']:.0f}  "
                  f"perplexity {figures['perplexity']:.1f}", flush=True)
            warn_of_collapse(figures, model.autoencoder.config.codes, step)
            rows[-1] |= {"validation": figures}
            # Lip error alone would choose a dull face; over the error with swapped audio, which is 1 for a face that
            # does not listen, it chooses one that moves, and rightly.
            merit = figures["lve"] / figures["lve_swapped"]
            better = not merit >= best                                  # also where a lone clip leaves nothing to swap
            best = merit if better else best
        if evaluates or interrupted:
            state = training_state(optimiser, step, rows, best, args, data)
            if evaluates and better:
                save(out / "best.pt", model, **state)
            save(out / "last.pt", model, **state)
        if interrupted:
            raise KeyboardInterrupt(f"stopped after step {step}; the same command with --resume goes on from there")

    model, _ = load(out / "best.pt", "ar", device)
    figures = evaluate_generation(model, data, "test")
    write_figures(out, rows, figures, args, [name for name in ("feature", "motion") if name in rows[-1]])
    print(f"test split, free-running  lip gap r {figures['gap_correlation']:.3f}  LVE {figures['lve']:.4g}  "
          f"swapped {figures['lve_swapped']:.4g}  energy {figures['energy']:.2f}  "
          f"-> {out}/best.pt ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    with cannot():
        preset = parser.parse_known_args()[0].preset
        parser.set_defaults(**SCHEDULES[preset])
        main(parser.parse_args())
