import pytest
import torch

from pyrl.models import load_policy
from pyrl.testing import tiny_model_folder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from a second thread, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory):
    """policy(architecture, **config) -> float32 Policy, made once; 320 tokens, context 512."""
    made = {}

    def policy(architecture="llama", **config):
        key = (architecture, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            made[key] = load_policy(tiny_model_folder(folder, architecture=architecture, **config))
        return made[key]

    return policy
