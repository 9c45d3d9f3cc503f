"""Models that a function makes."""

import sys

import pytest

from pyrl.models import load_policy, model_folder
from pyrl.testing import tiny_model_folder


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Writes a module `making` with this code, and imports nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda code: (tmp_path / "making.py").write_text(code)
    sys.modules.pop("making", None)


def test_a_function_makes_the_folder(module, tmp_path):
    module(
        "from pyrl.testing import tiny_model_folder\n"
        f"def folder():\n    return tiny_model_folder({str(tmp_path / 'model')!r})\n"
    )
    assert model_folder("making:folder") == str(tmp_path / "model")
    assert load_policy("making:folder").tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("code", "name", "problem"),
    [
        ("", "no.such:folder", "no module 'no.such'"),
        ("", "making:folder", "making has no function 'folder'"),
        ("folder = 3", "making:folder", "making has no function 'folder'"),
        ("def folder(): return None", "making:folder", r"folder\(\) returned None"),
        ("def folder(): return '/no/such'", "making:folder", "returned '/no/such'"),
        ("def folder(): return __file__[:-10]", "making:folder", "has no config.json"),
    ],
)
def test_what_gives_no_model_is_named(module, code, name, problem):
    module(code)
    with pytest.raises(ValueError, match=f"model '{name}'.*{problem}"):
        load_policy(name)


def test_a_module_that_lacks_something_says_so_itself(module):
    module("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        model_folder("making:folder")


def test_folders_come_first_and_ids_stay(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "a:b")
    assert model_folder("a:b") == "a:b"
    assert model_folder("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="no such folder"):
        model_folder("./a:c")
