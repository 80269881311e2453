"""What every notebook begins with: `from setup import load_or_train`.

Importing it makes the repository's root the working directory, so that `import codetalker` and
"runs/ar/best.pt" work, and sets the size of pictures.
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import torch

import train_ar
import train_vq
from codetalker import load
from data import open_data

torch.set_num_threads(1)            # the models are too small for more
plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True})


def load_or_train(stage="ar"):
    """A model of stage "vq" or "ar": that of runs/, or a small one that is trained now (two minutes).

    Returns the model in eval mode, the synthetic data set, and True if the model is that of runs/.
    """
    path = Path("runs", stage, "best.pt")
    is_full = path.exists()
    if not is_full:
        print(f"There is no {path} yet (python train_{stage}.py): a small model is trained here.")
        path = Path("runs", f"notebook_{stage}", "best.pt")
        vq_path = Path("runs", "notebook_vq", "best.pt")
        if not vq_path.exists():
            flags = f"--steps 100 --eval-every 100 --out {vq_path.parent}"
            train_vq.main(train_vq.parser.parse_args(flags.split()))
        if not path.exists():
            flags = f"--steps 150 --eval-every 150 --vq {vq_path} --out {path.parent}"
            train_ar.main(train_ar.parser.parse_args(flags.split()))
    model, checkpoint = load(path, stage)
    data = open_data(None, checkpoint)
    return model, data, is_full
