"""Training and inference on a GPU: a pretended one anywhere, a real one where there is one."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import codetalker
import data
from codetalker import STEPS_PER_FRAME
from conftest import ROOT
from pretend_cuda import MixedDevices, PretendCuda
from test_commands import TINY, run, speech  # noqa: F401  (speech is a fixture)

STEPS = ["--batch-size", "4", "--seq-len", "16", "--log-every", "100", "--eval-every", "100"]


def count(script, *flags):
    """Run a command on the pretended GPU -> the counts."""
    gpu = PretendCuda()
    with gpu:
        assert run(script, *flags, "--device", "cuda") == 0
    return gpu


def test_pretended_gpu_refuses_what_a_gpu_refuses():
    with PretendCuda() as gpu:
        x = torch.ones(2, 2).to("cuda")
        assert x.device == torch.device("cuda", 0) and (x @ x).device == x.device
        assert (x + torch.tensor(1.0)).is_cuda                      # a scalar on the CPU may join
        with pytest.raises(MixedDevices):
            x + torch.ones(2, 2)
        with pytest.raises(MixedDevices):
            x.numpy()
        assert not gpu.waits
        assert x.sum().item() == 4 and sum(gpu.waits.values()) == 1


@pytest.fixture(scope="module")
def gpu_runs(speakers, tmp_path_factory):
    """Both stages trained on the pretended GPU, with a reset of dead codes, and resumed."""
    folder = tmp_path_factory.mktemp("gpu")
    shared = ["--data", speakers, *TINY]
    vq = ["--out", folder / "vq", "--reset-every", 2]
    ar = ["--out", folder / "ar", "--vq", folder / "vq" / "best.pt"]
    for script, flags in (("train_vq.py", vq), ("train_ar.py", ar)):
        count(script, *shared, *flags, "--steps", 4)
        count(script, *shared, *flags, "--steps", 6, "--resume")
    return folder


def test_no_two_devices_meet_in_any_command(gpu_runs, speakers, speech, tmp_path):  # noqa: F811
    checkpoint = ["--ar", gpu_runs / "ar" / "best.pt"]
    count("infer.py", *checkpoint, "--wav", speech, "--out", tmp_path / "a.html")
    count("infer.py", *checkpoint, "--data", speakers, "--test")


@pytest.mark.parametrize("stage", ["vq", "ar"])
def test_a_training_step_waits_once_and_copies_nothing(gpu_runs, speakers, tmp_path, stage):
    """Counted as the difference between runs of 4 and 12 steps, which log and evaluate alike."""
    flags = ["--data", speakers, *STEPS]
    if stage == "ar":
        flags += ["--vq", gpu_runs / "vq" / "best.pt"]
    short, long = (count(f"train_{stage}.py", *flags, "--steps", steps, "--out", tmp_path / str(steps))
                   for steps in (4, 12))
    waits = (sum(long.waits.values()) - sum(short.waits.values())) / 8
    assert waits <= 1, long.waits
    assert sum(long.copies.values()) == sum(short.copies.values()), long.copies
    launches = (long.launches - short.launches) / 8
    print(f"stage {stage}: {launches:.0f} launches, {waits:.1f} waits a step")
    assert launches < {"vq": 450, "ar": 800}[stage]


def test_pretended_gpu_finds_motion_left_on_the_cpu(speakers, tmp_path, monkeypatch):
    monkeypatch.setattr(data.DataSet, "load_motion", lambda self, clips, device: None)
    with pytest.raises(MixedDevices), PretendCuda():
        run("train_vq.py", "--data", speakers, *TINY, "--steps", 1, "--out", tmp_path,
            "--device", "cuda")


def test_pretended_gpu_finds_a_mask_made_on_the_cpu(gpu_runs, speakers, tmp_path, monkeypatch):
    causal_mask = codetalker.causal_mask
    monkeypatch.setattr(codetalker, "causal_mask", lambda *sizes: causal_mask(*sizes[:4]))
    with pytest.raises(MixedDevices), PretendCuda():
        run("train_ar.py", "--data", speakers, *TINY, "--steps", 1, "--out", tmp_path,
            "--vq", gpu_runs / "vq" / "best.pt", "--device", "cuda")


# ---------- a real GPU


@pytest.fixture
def models(runs):
    path = runs / "ar" / "best.pt"
    return codetalker.load(path, "ar")[0], codetalker.load(path, "ar", "cuda")[0]


@pytest.mark.cuda
@torch.no_grad()
def test_cuda_forward_matches_cpu(models):
    """With TF32 off the largest difference is within 1e-4 of the largest value."""
    torch.set_float32_matmul_precision("highest")
    cpu, cuda = models
    mel = torch.randn(1, 60 * STEPS_PER_FRAME, cpu.config.mel_bands)
    codes = torch.randint(256, (1, 60, 16))
    for a, b in ((cpu.encode_audio(mel), cuda.encode_audio(mel.cuda()).cpu()),
                 (cpu.decode(codes), cuda.decode(codes.cuda()).cpu())):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()


@pytest.mark.cuda
def test_cuda_generates_the_same_codes_at_temperature_0(models, dataset):
    torch.set_float32_matmul_precision("highest")
    cpu, cuda = models
    features = dataset.audio_features(dataset.splits["test"][0], cpu)[None]
    style = dataset.style("ada")[None]
    with torch.no_grad():
        codes = [model.generate(model.encode_audio(features.to(device)), style.to(device), 0).cpu()
                 for model, device in ((cpu, "cpu"), (cuda, "cuda"))]
    assert torch.equal(*codes)


@pytest.mark.cuda
@pytest.mark.parametrize("stage", ["vq", "ar"])
def test_cuda_trains_and_resumes(speakers, runs, tmp_path, stage):
    flags = ["--data", speakers, *TINY, "--device", "cuda", "--out", tmp_path]
    if stage == "ar":
        flags += ["--vq", runs / "vq" / "best.pt"]
    assert run(f"train_{stage}.py", *flags, "--steps", 2) == 0
    assert run(f"train_{stage}.py", *flags, "--steps", 4, "--resume") == 0
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True, map_location="cpu")
    assert checkpoint["step"] == 4
    assert all(weight.isfinite().all() for weight in checkpoint["weights"].values())


@pytest.mark.slow
def test_gpu_check_runs_dry_on_a_cpu(speakers, tmp_path):
    settings = {"DEVICE": "cpu", "STEPS": "2", "DATA": str(speakers), "OUT": str(tmp_path / "out"),
                "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "tests/gpu_check.sh"], cwd=ROOT, check=True, timeout=300,
                   env=os.environ | settings | {"PATH": path}, capture_output=True)
    report = (tmp_path / "out" / "report.txt").read_text("utf-8")
    statuses = re.findall(r"== exit (\d+)", report)
    assert statuses[:4] == ["0"] * 4, report                # the tests marked cuda are skipped
    assert "times real time" in report and "largest difference 0.0e+00" in report
