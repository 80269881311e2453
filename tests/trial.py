"""Does the codebook help? The paper's claim on trial: one transformer, three answers, several seeds.

    python tests/trial.py                           the built-in speakers -> runs/trial/table.md, figure.png; two hours
    python tests/trial.py --data FOLDER --out runs/trial_mine
    python tests/trial.py --rows "N 64,H 4"         a table of these rows alone

Every row is the two training commands with the flags the table names, once for each seed, on one core each (so as many
at once as there are cores); then the test split, free-running, strangers in every style. What is already trained is not
trained again. A row is the mean over seeds, and behind +- the largest distance of one from it.
"""
import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from matplotlib.figure import Figure

from codetalker import load, whole
from data import CommandLine, between, cannot, evaluate_generation, generate_clips, make_clip, open_data, write_json

parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of the data set (default: the built-in speakers)")
parser.add_argument("--out", type=Path, default=Path("runs/trial"), help="folder for it all (default: %(default)s)")
parser.add_argument("--seeds", type=between(1, 100, int), default=3, help="of the first three rows (default: 3)")
parser.add_argument("--rows", help="names of rows, with commas (default: all)")

ROWS = {    # name: flags of train_vq.py, flags of train_ar.py, temperatures to generate at
    "codes": ("", "", (0.8, 0.0)),
    "vertices": ("", "--target vertices --own 0.85", (0.0,)),
    "indices": ("", "--target indices", (0.8, 0.0)),
    "N 64": ("--codes 64", "", (0.8,)),
    "N 1024": ("--codes 1024", "", (0.8,)),
    "H 4": ("--slots 4", "", (0.8,)),
    "H 64": ("--slots 64", "", (0.8,)),
    "InstanceNorm": ("--instance-norm", "", (0.8,)),
    "no revival": ("--revive-every 100000", "", (0.8,)),
    "history motion": ("", "--history motion", (0.8,)),
    "history true": ("", "--own 0", (0.8,)),
    "history own": ("", "--own 0.85", (0.8,)),
}
MAIN = ("codes", "vertices", "indices")             # these with every seed, the others with the first alone
COLUMNS = {"lve": "LVE", "gap_correlation": "lip gap r", "fdd": "FDD", "fdd_abs": "abs FDD",
           "energy": "energy", "upper_energy": "upper energy", "upper_distance": "upper distance",
           "diversity": "diversity", "codes_used": "codes in use", "minutes": "CPU min, stage 2"}
TAKES, SENTENCES = 5, 8                             # from which diversity is measured


def run(script, out, args, seed, flags):
    """One training command, unless its results are there; its words go to log.txt, its minutes to minutes.txt."""
    if (out / "minutes.txt").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    given, start = ["--data", args.data] if args.data else [], time.time()
    words = [sys.executable, ROOT / script, *given, "--out", out, "--seed", str(seed), *flags]
    with open(out / "log.txt", "w") as log:
        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        if subprocess.run(words, env=one_core, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise ValueError(f"{script} failed; {out}/log.txt says why")
    (out / "minutes.txt").write_text(f"{(time.time() - start) / 60:.1f}")
    print(f"{out}: {(time.time() - start) / 60:.1f} min", flush=True)


def diversity(takes):
    """How far takes of one sentence lie apart: the root mean square distance of two of them. (takes, T, V, 3)"""
    return float(np.sqrt(2 * np.var(takes, axis=0, ddof=1).sum(-1).mean()))


def evaluate(folder, temperature, data_folder):
    """All figures of a trained model at one temperature, a dict; kept beside the checkpoint."""
    kept = folder / f"test_{temperature:g}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = open_data(data_folder)
    model, _ = load(folder / "best.pt", "ar")
    model.config.temperature = temperature
    figures = evaluate_generation(model, data, "test", every_style=True)
    figures["minutes"] = float((folder / "minutes.txt").read_text())
    figures["diversity"] = np.nan
    if data_folder is None:             # only the built-in speakers say the same sentence with another face
        seed = json.loads((data.folder / "dataset.json").read_text())["seed"]
        clips = data.splits["test"][::len(data.splits["test"]) // SENTENCES]
        styles = [data.subjects[i % len(data.subjects)] for i in range(len(clips))]
        made = [generate_clips(model, data, clips, styles)[0] for _ in range(TAKES)]
        made = [[data.vertices(take[i], clip.subject) for take in made] for i, clip in enumerate(clips)]
        real = [[make_clip(seed, clip.subject, int(clip.sentence.removeprefix("sentence")), take)[1]
                 for take in range(TAKES)] for clip in clips]
        made, real = ([diversity(np.stack(takes)[:, :, data.upper_face]) for takes in side] for side in (made, real))
        figures["diversity"] = sum(made) / sum(real)
    write_json(kept, figures)
    return figures


def draw(path, table):
    """Lips against upper face: the mean of each row, and every seed as a small dot."""
    figure = Figure((9, 3.4), layout="constrained")
    measures = ("fdd_abs", "absolute FDD, upper face (mm2)"), ("upper_distance", "distance of distributions")
    for axis, (name, label) in zip(figure.subplots(1, 2), measures):
        for i, (row, figures) in enumerate(table.items()):
            colour = f"C{i % 10}"
            axis.plot([f["lve"] for f in figures], [f[name] for f in figures], ".", color=colour, alpha=0.4)
            middle = [np.mean([f[key] for f in figures]) for key in ("lve", name)]
            axis.plot(*middle, "o", color=colour, label=row)
        axis.set(xlabel="lip error, LVE (mm2)", ylabel=label)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)


def main(args):
    names = args.rows.split(",") if args.rows else list(ROWS)
    if unknown := set(names) - set(ROWS):
        raise ValueError(f"--rows: of {', '.join(ROWS)} expected, found {', '.join(sorted(unknown))}")
    open_data(args.data)                                    # made before two commands want to make it
    jobs = [(name, seed) for name in names for seed in range(args.seeds if name in MAIN else 1)]
    vq = {job: args.out / f"vq{ROWS[job[0]][0].replace(' ', '')}_{job[1]}" for job in jobs}
    ar = {job: args.out / f"{job[0].replace(' ', '_')}_{job[1]}" for job in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        first = {vq[job]: job for job in jobs}.values()     # rows share a dictionary where it is trained alike
        list(pool.map(lambda job: run("train_vq.py", vq[job], args, job[1], ROWS[job[0]][0].split()), first))
        list(pool.map(lambda job: run("train_ar.py", ar[job], args, job[1],
                                      ["--vq", vq[job] / "best.pt", *ROWS[job[0]][1].split()]), jobs))
    table = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in jobs:
            for temperature in ROWS[job[0]][2]:
                row = job[0] + ("" if temperature == ROWS[job[0]][2][0] else ", likeliest")
                table.setdefault(row, []).append(pool.submit(evaluate, ar[job], temperature, args.data))
        table = {row: [future.result() for future in futures] for row, futures in table.items()}

    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, figures in table.items():
        cells = []
        for key in COLUMNS:
            values = np.array([f[key] for f in figures], dtype=float)
            spread = f" ±{np.abs(values - values.mean()).max().round(5):.1g}" if len(values) > 1 else ""
            cells.append("-" if np.isnan(values).any() else f"{values.mean().round(5):#.3g}".rstrip(".") + spread)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    with whole(args.out / "table.md") as part:
        part.write_text("\n".join(lines) + "\n")
    with whole(args.out / "figure.png") as part:
        draw(part, table)
    print("\n".join(lines), f"-> {args.out}/table.md, figure.png", sep="\n")


if __name__ == "__main__":
    with cannot():
        main(parser.parse_args())
