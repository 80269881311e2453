"""support/trial.py: the models on trial are trained for two steps, and the table is checked."""
from argparse import Namespace

import numpy as np
import pytest
import torch

from data import DataSet
from support import speakers, trial

TWO_STEPS = " --steps 2 --batch-size 2 --seq-len 16"


@pytest.fixture
def row_of_two_steps(dataset, tmp_path, monkeypatch):
    """row -> what trial.run() gives after two training steps."""
    def run(row):
        classes, vq_flags, ar_flags, temperatures = trial.ROWS[row]
        short = (classes, vq_flags + TWO_STEPS, ar_flags + TWO_STEPS, temperatures)
        monkeypatch.setitem(trial.ROWS, row, short)
        return trial.run(row, 0, Namespace(data=str(dataset.folder), out=tmp_path))
    monkeypatch.setattr(trial, "TAKES", 2)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("row", ["vertices", "indices", "paper's stage 2"])
def test_rows_train_generate_and_are_not_trained_twice(row, row_of_two_steps, tmp_path):
    first = row_of_two_steps(row)
    assert all(np.isfinite(list(metrics.values())).all() for metrics in first.values())
    checkpoint = next(tmp_path.glob("*/ar/best.pt"))
    written = checkpoint.stat().st_mtime_ns
    row_of_two_steps(row)
    assert checkpoint.stat().st_mtime_ns == written


@pytest.mark.parametrize("model_class", [trial.VertexRegressor, trial.IndexClassifier])
def test_generation_matches_teacher_forcing_on_what_was_generated(model_class, runs):
    """Feeding the outputs back one by one gives what predict() gives for all of them at once."""
    autoencoder, _ = trial.load(runs / "vq" / "best.pt", "vq")
    model = model_class(trial.CodeTalker.Config(styles=2, dim=32), autoencoder).eval()
    style = torch.eye(2)[:1]
    audio = torch.randn(1, 12, 32)
    outputs = model.generate(audio, style, temperature=0)
    z_hat = model.predict(model.code_vectors(outputs), style, audio)
    again = model.sample(model.logits(z_hat), temperature=0)
    assert torch.allclose(outputs.float(), again.float(), atol=1e-5)


def test_other_takes_have_the_same_lips(dataset, monkeypatch):
    subjects = {"train": ["ada", "ben"], "val": ["cleo"], "test": ["dan"]}
    monkeypatch.setattr(speakers, "SUBJECTS", subjects)     # those of the small data set
    monkeypatch.setattr(trial, "TAKES", 2)
    speakers.make_subject.cache_clear()
    gestures = speakers.make_subject(0, "dan").gestures
    real = trial.evaluate(dataset, "real", trial.real_takes(dataset, borrow=False))
    borrowed = trial.evaluate(dataset, "borrowed", trial.real_takes(dataset, borrow=True))
    assert speakers.make_subject(0, "dan").gestures is gestures
    speakers.make_subject.cache_clear()
    assert real["real"]["gap_correlation"] > 0.99 and real["real"]["diversity"] > 0.1       # mm
    assert borrowed["borrowed"]["lve"] != real["real"]["lve"]
    assert real["real, mean of 2 takes"]["diversity"] == 0


def test_table_cells_are_mean_and_largest_deviation_over_seeds(tmp_path):
    results = [{"codes": dict.fromkeys(trial.COLUMNS, value)} for value in (1.0, 2.0, 6.0)]
    trial.write_table(results + [{"real": dict.fromkeys(trial.COLUMNS, 0.5)}], tmp_path)
    lines = (tmp_path / "table.md").read_text("utf-8").splitlines()
    assert lines[0] == "| | " + " | ".join(trial.COLUMNS) + " |"
    assert lines[2] == "| codes " + "| 3 ±3 " * len(trial.COLUMNS) + "|"
    assert lines[3] == "| real " + "| 0.5 ±0 " * len(trial.COLUMNS) + "|"
    assert (tmp_path / "figure.png").stat().st_size > 1000
