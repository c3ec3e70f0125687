"""Where the tests run: on the GPU if there is one, else on the CPU with the kernels in Triton's interpreter."""

import importlib.util
import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # set before torch starts: threads of busy processes wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Believe the CPU in what instructions it has; else the compiler starts a process that imports torch for each kind.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import interpreter
import numpy as np
import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when tvae_kernels.backends.triton is first imported
os.environ.pop("TVAE_KERNELS_BACKEND", None)  # each test names its backend

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background, and its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


# How the names of the groups begin that take longest, the longest first: processes that start with these end together.
HEAVY = (
    "compile latents",
    "test_composition",
    "test_cli",
    "kills",
    "test_topographies",
    "compiler",
    "torchrun",
    "test_topographic",
    "test_open",
    "test_hard_values",
    "test_latents",
    "test_loop",
    "test_start",
    "test_parallel",
    "compile",
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups and pytest selects by markers
def pytest_collection_modifyitems(config, items):
    """Mark what is quick, give each file its group where its tests have none, and put the heavy groups first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # by the number of tests: the order of the items is the better one
    for item in items:
        if not HAS_GPU and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if not any(item.iter_markers("xdist_group")):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        slow = {"slow", "exhaustive", "long"} & set(item.keywords) or interprets(item)
        if not slow and "quick" not in item.keywords:
            item.add_marker("quick")
    items.sort(key=weight)


def weight(item) -> int:
    """Where its group stands among the heavy ones, or after them."""
    name = item.get_closest_marker("xdist_group").args[0]
    return next((place for place, start in enumerate(HEAVY) if name.startswith(start)), len(HEAVY))


def interprets(item) -> bool:
    """Whether a test runs kernels, which takes seconds in the interpreter."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return not HAS_GPU and ("triton" in item.fixturenames or any(x == "triton" for x in parameters if type(x) is str))


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
    if not HAS_GPU:
        interpreter.hurry()
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


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory):
    """A data set of noise in MNIST's format: 50 training and 20 test images.

    Pixel (0, 0) numbers them from 0 to 69, and the last digit of the number is the label.
    """
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(256, size=(70, 28, 28), dtype=np.uint8)
    images[:, 0, 0] = np.arange(70)
    for prefix, part in (("train", images[:50]), ("t10k", images[50:])):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", part)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", part[:, 0, 0] % 10)
    return folder
