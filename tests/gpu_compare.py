"""python tests/gpu_compare.py DEVICE CHECKPOINT: speed of generation, and CPU against the device."""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from codetalker import STEPS_PER_FRAME, load


@torch.no_grad()
def main(device, path):
    models = [(name, load(path, "ar", name)[0]) for name in ("cpu", device)]
    config = models[0][1].config
    vq_config = models[0][1].autoencoder.config
    torch.manual_seed(0)
    mel = torch.randn(1, 60 * 30 * STEPS_PER_FRAME, config.mel_bands)
    style = torch.eye(config.styles)[:1]
    for name, model in models:
        for seconds in (1, 8, 60):                  # the first is a warm-up
            start = time.time()
            steps = seconds * 30 * STEPS_PER_FRAME
            audio = model.encode_audio(mel[:, :steps].to(name))
            model.generate(audio, style.to(name)).cpu()
            if seconds > 1:
                speed = seconds / (time.time() - start)
                print(f"{name}: {seconds} s of speech at {speed:.1f} times real time")
    short = mel[:, :99 * STEPS_PER_FRAME]
    codes = torch.randint(vq_config.codebook_size, (1, 99, vq_config.codes_per_frame))
    for what, apply in (("encoded audio", lambda m, d: m.encode_audio(short.to(d))),
                        ("decoded motion", lambda m, d: m.decode(codes.to(d)))):
        a, b = (apply(model, name).cpu() for name, model in models)
        print(f"{what}: largest difference {(a - b).abs().max():.1e} of {a.abs().max():.1f}")
    if device != "cpu":
        print(f"most memory: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
