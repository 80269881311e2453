"""
What the tests share: the repository on the path, two markers, and a small data set with checkpoints.

    python -m pytest -q tests               all tests but the slow ones
    python -m pytest -q tests -m slow       the slow ones alone
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)            # the models of the tests are too small for more


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not part of the default run; -m slow selects it")
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU, skipped without one")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def speakers(tmp_path_factory):
    """Folder of a small synthetic data set: four subjects, ten clips. Copy it to change it."""
    from support import speakers

    folder = tmp_path_factory.mktemp("data") / "speakers"
    with pytest.MonkeyPatch.context() as patch:
        subjects = {"train": ["ada", "ben"], "val": ["cleo"], "test": ["dan"]}
        sentences = {"train": range(1, 4), "val": range(4, 6), "test": range(6, 8)}
        patch.setattr(speakers, "SUBJECTS", subjects)
        patch.setattr(speakers, "SENTENCES", sentences)
        patch.setattr(speakers, "ProcessPoolExecutor", ThreadPoolExecutor)  # a new process would
        speakers.make_subject.cache_clear()                                 # not see the patch
        speakers.build_speakers(folder)
    speakers.make_subject.cache_clear()         # a subject depends on the list of subjects
    return folder


@pytest.fixture
def dataset(speakers):
    """The data set in that folder."""
    from data import open_data

    return open_data(speakers)


@pytest.fixture(scope="session")
def runs(speakers, tmp_path_factory):
    """Folder with vq/ and ar/, the results of two training steps of each stage on that data set."""
    import train_ar
    import train_vq

    folder = tmp_path_factory.mktemp("runs")
    shared = ["--data", str(speakers), "--steps", "2", "--batch-size", "2", "--seq-len", "16"]
    train_vq.main(train_vq.parser.parse_args([*shared, "--out", str(folder / "vq")]))
    vq = str(folder / "vq" / "best.pt")
    train_ar.main(train_ar.parser.parse_args([*shared, "--vq", vq, "--out", str(folder / "ar")]))
    return folder
