"""Where the tests run: on the GPU if there is one, else on the CPU with the kernels in Triton's interpreter."""

import importlib.util
import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # set before torch starts: threads of busy processes wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    "test_topographic",
    "test_topographies",
    "torchrun",
    "compiler",
    "test_hard_values",
    "test_open",
    "test_latents",
    "test_runs",
    "test_progress",
    "test_start",
    "test_random_problems",
    "test_loop",
    "test_parallel",
    "compile",
)


def pytest_configure(config):
    """Let xdist keep the order of the groups, which it would put by the numbers of their tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups and pytest selects by markers
def pytest_collection_modifyitems(config, items):
    """Mark what is quick, give each file its group where its tests have none, and put the heavy groups first."""
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


@pytest.fixture
def inductor(monkeypatch):
    """Let PyTorch's default compiler believe the CPU in what vector instructions it has.

    Else it starts a process that imports torch for each kind of them.
    """
    from torch._inductor import cpu_vec_isa

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda *_: True)
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    yield
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory):
    """A data set of noise in MNIST's format: 50 training and 20 test images.

    Pixel (0, 0) numbers them from 0 to 69, and the last digit of the number is the label. Other noise stands for the
    data sets that have its format.
    """
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("MNIST", "FashionMNIST", "KMNIST")):
        raw = folder / name / "raw"
        raw.mkdir(parents=True)
        images = np.random.default_rng(seed).integers(256, size=(70, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(70)
        for prefix, part in (("train", images[:50]), ("t10k", images[50:])):
            write_idx(raw / f"{prefix}-images-idx3-ubyte", part)
            write_idx(raw / f"{prefix}-labels-idx1-ubyte", part[:, 0, 0] % 10)
    return folder
