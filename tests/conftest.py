import functools
import os
import urllib.request

# Faster with networks this small. The tests' child processes inherit it: equal results to the bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
import common  # noqa: E402

read_once = functools.cache(common.load_set)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA here"))


@pytest.fixture(autouse=True)
def _alone(request, monkeypatch, tmp_path):
    """Every test works in an empty folder and without a network; only common.py's read MNIST each time"""
    monkeypatch.setattr(urllib.request, "urlopen", None)
    monkeypatch.chdir(tmp_path)
    if request.module.__name__ != "test_common":
        monkeypatch.setattr(common, "load_set", read_once)
