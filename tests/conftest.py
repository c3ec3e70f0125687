"""Where the tests run: on the GPU if there is one, else on the CPU with the kernels in Triton's interpreter."""

import importlib.util
import os

import numpy as np
import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when tvae_kernels.kernels is first imported
os.environ.pop("TVAE_KERNELS_BACKEND", None)  # each test names its backend

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


@pytest.fixture(scope="module")
def triton() -> str:
    """The name of the triton backend, where it can run.

    What `torch.empty` and its kin return is filled with NaN meanwhile, so that an output element nobody wrote shows.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    before = np.seterr(all="ignore")  # the interpreter computes in numpy, which warns where IEEE arithmetic gives inf
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, which is set
    yield "triton"
    torch.use_deterministic_algorithms(False)
    np.seterr(**before)


@pytest.fixture(scope="module", params=["reference", "torch", "triton"])
def backend(request) -> str:
    """Each backend in turn."""
    return request.getfixturevalue("triton") if request.param == "triton" else request.param


@pytest.fixture(scope="module", params=["torch", "triton"])
def kernel_backend(request) -> str:
    """Each backend that has a gradient of its own in turn."""
    return request.getfixturevalue("triton") if request.param == "triton" else request.param
