"""What `topographic` refuses and how it says so, the choice of a backend, and what an import brings along."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tvae_kernels import Neighborhood, function, topographic
from tvae_kernels.backends import resolve_backend
from tvae_kernels.backends.torch import plain

SHAPE = (2, 4, 2, 3)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape or SHAPE, dtype=dtype)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"z": [1.0]}, TypeError, "z must be a tensor, got list"),
        ({"u": 1.0}, TypeError, "u must be a tensor, got float"),
        ({"mu": "30"}, TypeError, "mu must be a tensor, got str"),
        ({"weights": [[1.0]]}, TypeError, "weights must be a tensor, got list"),
        ({"z": ones().long()}, TypeError, "z must be a floating-point tensor, got torch.int64"),
        ({"u": ones().bool()}, TypeError, "u must be a floating-point tensor, got torch.bool"),
        ({"u": ones().cfloat()}, TypeError, "u must be a floating-point tensor, got torch.complex64"),
        ({"mu": torch.tensor(30)}, TypeError, "mu must be a floating-point tensor, got torch.int64"),
        ({"weights": ones(2, 3).int()}, TypeError, "weights must be a floating-point tensor, got torch.int32"),
        ({"u": ones().to("meta")}, ValueError, "u is on meta, but z is on cpu"),
        ({"mu": ones(3).to("meta")}, ValueError, "mu is on meta, but z is on cpu"),
        (
            {"u": ones(2, 4, 2, 1)},
            ValueError,
            "for z of shape (2, 4, 2, 3) u must have the shape (2, 4, 2, 3), got (2, 4, 2, 1)",
        ),
        (
            {"z": ones(4, 6), "u": ones(4, 6)},
            ValueError,
            "z and u must be (batch, time, capsule, dim), got (4, 6) and (4, 6)",
        ),
        ({"mu": ones(2)}, ValueError, "mu must broadcast to (capsule, dim) = (2, 3), got (2,)"),
        ({"mu": ones(3, 1)}, ValueError, "mu must broadcast to (capsule, dim) = (2, 3), got (3, 1)"),
        ({"mu": ones(1, 2, 3)}, ValueError, "mu must broadcast to (capsule, dim) = (2, 3), got (1, 2, 3)"),
        (
            {"weights": ones(3, 2)},
            ValueError,
            "weights must have the shape (2, 3), or for each capsule its own (2, 2, 3); got (3, 2)",
        ),
        (
            {"weights": ones(6)},
            ValueError,
            "weights must have the shape (2, 3), or for each capsule its own (2, 2, 3); got (6,)",
        ),
        ({"neighborhood": (2, 3)}, TypeError, "neighborhood must be a Neighborhood, got tuple"),
        ({"neighborhood": Neighborhood(5)}, ValueError, "a circular time_window of 5 does not fit 4 time steps"),
        (
            {"neighborhood": Neighborhood(1, 4, time_boundary="zero")},
            ValueError,
            "a circular capsule_window of 4 does not fit 3 positions in a capsule",
        ),
        ({"eps": -1e-6}, ValueError, "eps must be a finite number of at least 0, got -1e-06"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number of at least 0, got nan"),
        ({"eps": float("inf")}, ValueError, "eps must be a finite number of at least 0, got inf"),
        ({"eps": "small"}, ValueError, "eps must be a finite number of at least 0, got 'small'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference; got 'cuda'"),
        ({"backend": None}, ValueError, "backend must be one of auto, triton, torch, reference; got None"),
    ],
)
def test_errors_say_what_was_received_and_what_is_expected(changed, error, message):
    arguments = {"z": ones(), "u": ones(), "mu": 0.0, "neighborhood": Neighborhood(2, 3)} | changed
    with pytest.raises(error) as caught:
        topographic(**arguments)
    assert str(caught.value) == message


def test_all_of_these_are_legal():
    for mu in (0, 1.5, True, ones(1), ones(3), ones(1, 1), ones(2, 1), ones(1, 3), ones(2, 3), torch.tensor(0.0)):
        assert topographic(ones(), ones(), mu).shape == SHAPE


# --- the choice of a backend ------------------------------------------------------------------------------------------


def test_auto_is_torch_on_the_cpu():
    assert resolve_backend("auto", CPU) == "torch"


def test_auto_is_triton_on_a_gpu_where_it_is_installed(monkeypatch):
    pytest.importorskip("triton")
    assert resolve_backend("auto", GPU) == "triton"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert resolve_backend("auto", GPU) == "torch"


@pytest.mark.parametrize("name", ["auto", "torch", "reference"])
def test_the_variable_overrides_auto_only(monkeypatch, name):
    monkeypatch.setenv("TVAE_KERNELS_BACKEND", name)
    assert resolve_backend("auto", CPU) == {"auto": "torch"}.get(name, name)
    assert resolve_backend("torch", CPU) == "torch"
    assert resolve_backend("reference", CPU) == "reference"


def test_a_variable_that_names_no_backend(monkeypatch):
    monkeypatch.setenv("TVAE_KERNELS_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match="TVAE_KERNELS_BACKEND must be one of auto, triton, torch, reference; got 'cuda'"
    ):
        topographic(ones(), ones())
    assert topographic(ones(), ones(), backend="torch").shape == SHAPE


def test_the_backend_named_is_the_one_that_runs(monkeypatch):
    ran = []

    def spy(module, attribute, name):
        original = getattr(module, attribute)
        monkeypatch.setattr(module, attribute, lambda *args, **options: ran.append(name) or original(*args, **options))

    spy(plain, "forward", "torch")
    spy(function, "_apply", "function")
    topographic(ones(), ones(), backend="reference")
    assert ran == []
    topographic(ones(), ones(), backend="torch")
    topographic(ones(), ones())
    assert ran == ["function", "torch"] * 2


def test_the_named_triton_is_the_kernels(triton, device):
    from tvae_kernels.backends.triton import launch

    with launch.recorded() as launches:
        topographic(ones().to(device).requires_grad_(), ones().to(device), backend=triton).sum().backward()
    names = [launched.kernel.fn.__name__ for launched in launches]
    assert names == ["tile_forward_kernel", "tile_backward_kernel"]


# --- in a fresh process -----------------------------------------------------------------------------------------------


def run(code: str, **variables: str) -> str:
    """What `code` prints in a process of its own, without the interpreter of Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_the_package_brings_nothing_but_torch_and_says_what_triton_needs():
    """Imported, it is as if Triton were not installed; then without a GPU or the interpreter."""
    new, absent, no_gpu = run(
        "import sys, torch\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import tvae_kernels\n"
        "print(*{name.split('.')[0] for name in sys.modules} - before)\n"
        "from tvae_kernels import BackendUnavailableError, Neighborhood, TopographicLayer, topographic\n"
        "loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] == 'triton'}\n"
        "sys.modules['triton'] = None  # as if it were not installed\n"
        "x = torch.ones(1, 3, 1, 3, requires_grad=True)\n"
        "t = TopographicLayer(Neighborhood(3, 3), mu_init=0.0, eps=0.0)(x, x)\n"
        "t.sum().backward()\n"
        "assert torch.allclose(t, x / 3) and x.grad is not None\n"
        "topographic(x, x, backend='reference').sum().backward()\n"
        "try: topographic(x, x, backend='triton')\n"
        "except BackendUnavailableError as error: print(str(error).replace('\\n', ' '))\n"
        "del sys.modules['triton']\n"
        "sys.modules.update(loaded)\n"
        "try: topographic(x, x, backend='triton')\n"
        "except BackendUnavailableError as error: print(str(error).replace('\\n', ' '))\n"
    ).splitlines()
    assert new.split() == ["tvae_kernels"]
    for part in ("needs the package triton", "not installed", 'backend="torch"', 'backend="auto"'):
        assert part in absent
    if importlib.util.find_spec("triton"):
        for part in ("GPU tensors", "'cpu'", 'backend="torch"', 'backend="auto"', "TRITON_INTERPRET=1"):
            assert part in no_gpu
