"""What the three test files share: the repository on the path, and a small data set of the built-in speakers."""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)            # these models are too small to share


@pytest.fixture(scope="session")
def few_speakers():
    """build_speakers(), but four subjects speak ten sentences in all, and no processes are started for it."""
    import data

    def build(folder, seed=0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "SUBJECTS", {"train": ["ada", "ben"], "val": ["cleo"], "test": ["dan"]})
            patch.setattr(data, "SENTENCES", {"train": range(1, 4), "val": range(41, 43), "test": range(61, 63)})
            patch.setattr(data, "ProcessPoolExecutor", ThreadPoolExecutor)
            data.person.cache_clear()               # who a subject is depends on the list of subjects
            data.build_speakers(folder, seed)
            data.person.cache_clear()
        return folder

    return build


@pytest.fixture(scope="session")
def speakers(few_speakers, tmp_path_factory):
    return few_speakers(tmp_path_factory.mktemp("data") / "speakers")
