"""The operation inside PyTorch's program transformations and between processes."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from numerics import exhaustive
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tvae_kernels import (
    Neighborhood,
    TopographicLayer,
    backends,
    roll_capsules,
    topographic,
    topographic_latents,
    topographic_split,
)
from tvae_kernels.neighborhood import read

pytestmark = pytest.mark.slow
NEIGHBORHOOD = Neighborhood(5, 3)
SHAPE = (2, 6, 2, 6)


@pytest.fixture(autouse=True)
def forget_what_was_compiled(device):
    torch._dynamo.reset()
    with device:  # where tensors and modules are made unless they say otherwise
        yield


def normal(*shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(torch.get_default_device())


quiet = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so


@pytest.fixture(scope="module", params=["torch", "triton"])
def transformed_backend(request):
    return request.getfixturevalue("triton") if request.param == "triton" else request.param


@pytest.fixture(scope="module", params=["reference", "torch", "triton"])
def any_backend(request):
    return request.getfixturevalue("triton") if request.param == "triton" else request.param


# Every type and every kind of kernels once; the rest is exhaustive.
TYPES = (torch.float64, torch.float32, torch.bfloat16)
COMPILED = [
    ((lambda *values: values) if i == j else exhaustive)(boundary, dtype)
    for i, boundary in enumerate(["time_boundary", "capsule_boundary", None])
    for j, dtype in enumerate(TYPES)
]


@pytest.mark.slow
@quiet
@pytest.mark.parametrize(("boundary", "dtype"), COMPILED)
def test_compiled_in_one_graph_it_has_the_same_value_and_gradients(transformed_backend, dtype, boundary):
    neighborhood = Neighborhood(5, 3, **({boundary: "zero"} if boundary else {}))
    layer = TopographicLayer(neighborhood, mu_init=0.3, backend=transformed_backend)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        z, u = (normal(*SHAPE, seed=s).to(dtype).requires_grad_() for s in (1, 2))
        t = module(z, u)
        t.sin().sum().backward()
        results.append((t, z.grad, u.grad, module.mu.grad))
    for actual, expected in zip(*reversed(results), strict=True):
        # the same operations in the same order: nothing may differ
        assert torch.equal(actual, expected)
        assert expected.abs().sum() > 0


@pytest.mark.slow
@quiet
def test_another_batch_size_compiles_once_more_and_no_third_does(transformed_backend):
    """The second size makes the batch a variable; from then on nothing is compiled again."""
    layer = TopographicLayer(NEIGHBORHOOD, mu_init=0.3, backend=transformed_backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    counts = []
    for batch in (2, 3, 5, 4, 7):
        z, u = (normal(batch, *SHAPE[1:], seed=s).requires_grad_() for s in (1, 2))
        t = compiled(z, u)
        assert torch.equal(t, layer(z, u))
        t.sum().backward()
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


@pytest.mark.slow
@quiet
def test_a_batch_marked_as_dynamic_is_compiled_once(transformed_backend):
    layer = TopographicLayer(NEIGHBORHOOD, mu_init=0.3, backend=transformed_backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (3, 5, 2):
        z, u = (normal(batch, *SHAPE[1:], seed=s).requires_grad_() for s in (1, 2))
        for x in (z, u):
            torch._dynamo.mark_dynamic(x, 0)
        compiled(z, u).sum().backward()
    assert counter.frame_count == 1


# The kernels that keep r for the backward pass and those that do not, with and without weights.
OPERATOR_CASES = {
    "plain": (Neighborhood(3, 2), False),
    "cut": (Neighborhood(3, 2, capsule_boundary="zero"), False),
    "weighted": (Neighborhood(3, 2), True),
}


@quiet
@pytest.mark.parametrize(("neighborhood", "weighted"), OPERATOR_CASES.values(), ids=OPERATOR_CASES)
@pytest.mark.parametrize("save_r", [True, exhaustive(False)])
def test_operators_keep_their_promises(triton, neighborhood, weighted, save_r):
    """`opcheck`: the schema, the shapes and types that the compilers are told, tracing with dynamic shapes."""
    shape = (1, 4, 2, 4)
    z, u, dt = (normal(*shape, seed=s).float() for s in (1, 2, 3))
    weights = normal(3, 2, seed=4).abs().float() if weighted else None
    mu = torch.tensor(0.3)
    text = neighborhood.text
    forward, backward = backends.forward.registered, backends.backward.registered
    torch.library.opcheck(forward, ("triton", z, u, mu, weights, text, 1e-6, save_r))
    if not save_r:
        return
    r = forward("triton", z, u, mu, weights, text, 1e-6, True)[1]
    r = r if r.numel() else None
    torch.library.opcheck(backward, ("triton", z, u, mu, weights, text, 1e-6, r, dt))


@pytest.mark.parametrize(
    "neighborhood",
    [
        Neighborhood(3, 2, 10**30, capsule_boundary="zero"),
        Neighborhood(3, (2, 1), (0.1, -1), axes=(2, 3), roots="each axis", speeds=(1, 1 / 3)),
    ],
)
def test_a_neighborhood_survives_being_written_as_text(neighborhood):
    assert read(neighborhood.text) == neighborhood


def functions(backend):
    """A scalar function of `(z, mu)` on the backend and on the reference."""
    u = normal(*SHAPE, seed=2)
    return [
        lambda z, mu, b=b: topographic(z, u, mu, NEIGHBORHOOD, backend=b).sin().sum() for b in (backend, "reference")
    ]


def assert_equal_up_to_rounding(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)  # float64 sums of at most 432 terms near 1


def test_func_grad(transformed_backend):
    z, mu = normal(*SHAPE), torch.tensor(0.3, dtype=torch.float64)
    actual, expected = (torch.func.grad(f, argnums=(0, 1))(z, mu) for f in functions(transformed_backend))
    assert_equal_up_to_rounding(actual, expected)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (4, 0)])
def test_vmap_over_z_and_mu(transformed_backend, in_dims):
    z = normal(*SHAPE) if in_dims[0] is None else normal(3, *SHAPE).movedim(0, in_dims[0])
    mu = torch.tensor(0.3, dtype=torch.float64) if in_dims[1] is None else normal(3)
    actual, expected = (torch.vmap(f, in_dims)(z, mu) for f in functions(transformed_backend))
    assert_equal_up_to_rounding(actual, expected)


def test_vmap_over_u_and_weights_without_gradients(transformed_backend):
    z, u = normal(*SHAPE, seed=1), normal(3, *SHAPE, seed=2)
    weights = normal(3, NEIGHBORHOOD.time_window, NEIGHBORHOOD.capsule_window, seed=3).abs()
    with torch.no_grad():
        actual, expected, shared = (
            torch.vmap(lambda u, w, b=b: topographic(z, u, 0.3, NEIGHBORHOOD, w, backend=b), (0, in_dim))(u, w)
            for b, w, in_dim in (
                (transformed_backend, weights, 0),
                ("reference", weights, 0),
                (transformed_backend, weights[0], None),
            )
        )
    assert_equal_up_to_rounding(actual, expected)
    assert_equal_up_to_rounding(shared[0], expected[0])


def test_gradients_of_every_sample_and_of_their_sum(transformed_backend):
    z, mu = normal(3, *SHAPE), normal(3)
    kernel, reference = functions(transformed_backend)
    each = [torch.vmap(torch.func.grad(f, argnums=(0, 1)))(z, mu) for f in (kernel, reference)]
    assert_equal_up_to_rounding(*each)
    total = [torch.func.grad(lambda z, mu, f=f: torch.vmap(f)(z, mu).sum(), (0, 1))(z, mu) for f in (kernel, reference)]
    assert_equal_up_to_rounding(*total)


def test_exported_program_gives_the_same(transformed_backend):
    layer = TopographicLayer(NEIGHBORHOOD, mu_init=0.3, backend=transformed_backend)
    z, u = normal(*SHAPE, seed=1).float(), normal(*SHAPE, seed=2).float()
    program = torch.export.export(layer, (z, u)).module()
    torch.testing.assert_close(program(z, u), layer(z, u))


# A window of each file of a backend.
FILES = {
    "plain": Neighborhood(3, 2),
    "taps": Neighborhood(3, 2, 0.5),
    "fourier": Neighborhood(3, 2, 0.5, roll="fourier"),
}
files = pytest.mark.parametrize("neighborhood", FILES.values(), ids=FILES)
# Each file and each backend; the others are exhaustive.
PAIRS = [
    (("torch", "taps"), ("triton", "plain"), ("torch", "fourier")),
    (("torch", "plain"), ("triton", "taps"), ("triton", "fourier")),
]
files_of_backends = pytest.mark.parametrize(
    ("transformed_backend", "neighborhood"),
    [
        *((backend, FILES[file]) for backend, file in PAIRS[0]),
        *(exhaustive(backend, FILES[file]) for backend, file in PAIRS[1]),
    ],
    ids=["-".join(pair) for pairs in PAIRS for pair in pairs],
    indirect=["transformed_backend"],
)


@quiet
@files_of_backends
def test_compilers_are_told_what_results_are(transformed_backend, neighborhood):
    """Also of tensors that are not contiguous: shapes, types and strides."""
    z, u, dt = (normal(1, 4, 2, 4, seed=s).transpose(1, 3) for s in (1, 2, 3))
    arguments = z, u, torch.tensor(0.3, dtype=z.dtype), normal(3, 2, seed=4).abs(), neighborhood.text, 1e-6
    forward, backward = backends.forward.registered, backends.backward.registered
    torch.library.opcheck(forward, (transformed_backend, *arguments, True))
    r = forward(transformed_backend, *arguments, True)[1]
    torch.library.opcheck(backward, (transformed_backend, *arguments, r, dt))


@files
def test_a_call_with_fake_tensors_leaves_nothing_behind(transformed_backend, neighborhood):
    z, u = (normal(1, 4, 2, 4, seed=s) for s in (1, 2))
    with FakeTensorMode() as mode:
        fake = topographic(
            mode.from_tensor(z).requires_grad_(), mode.from_tensor(u), 0.3, neighborhood, backend=transformed_backend
        )
        fake.sum().backward()
    assert fake.shape == z.shape

    def call(z, u):
        return topographic(z, u, 0.3, neighborhood, backend=transformed_backend)

    traced = make_fx(call, tracing_mode="fake")(z, u)
    assert torch.equal(traced(z, u), call(z, u))
    assert_equal_up_to_rounding(call(z, u), topographic(z, u, 0.3, neighborhood, backend="reference"))


@files
def test_tensors_without_memory_have_shapes(neighborhood):
    z, u = (torch.empty(1, 4, 2, 4, device="meta", requires_grad=True) for _ in range(2))
    t = topographic(z, u, 0.3, neighborhood)
    t.sum().backward()
    assert t.is_meta
    assert t.shape == z.grad.shape == u.grad.shape == z.shape


@quiet
@files_of_backends
def test_sizes_and_eps_may_be_variables(transformed_backend, neighborhood):
    torch._dynamo.reset()
    z, u = (normal(2, 4, 2, 4, seed=s) for s in (1, 2))
    compiled = torch.compile(lambda layer, z, u: layer(z, u), dynamic=True, fullgraph=True, backend="aot_eager")
    for eps in (1e-6, 0.5):
        layer = TopographicLayer(neighborhood, 0.3, eps, transformed_backend)
        assert_equal_up_to_rounding(compiled(layer, z, u), layer(z, u))


@quiet
@pytest.mark.parametrize(
    ("transformed_backend", "roll"),
    [
        ("torch", "fourier"),
        ("triton", "linear"),
        exhaustive("torch", "linear"),
        exhaustive("triton", "fourier"),
    ],
    indirect=["transformed_backend"],
)
def test_what_a_neighborhood_is_part_of_compiles(transformed_backend, roll):
    """Streams, split sequences, rolls and speeds, in one graph."""
    z, u = (normal(2, 4, 2, 4, seed=s) for s in (1, 2))
    causal = Neighborhood(3, 2, causal=True, time_boundary="zero", roll=roll)
    speeds = Neighborhood(3, 2, speeds=(1, 0.5), roll=roll)
    layer = TopographicLayer(causal, 0.3, backend=transformed_backend)
    for call in (
        lambda z, u: layer.step(z, u)[0],
        lambda z, u: topographic_split(z, u, 0.3, causal, backend=transformed_backend),
        lambda z, u: roll_capsules(z, 2, speeds),
        lambda z, u: topographic(z, u, 0.3, speeds, backend=transformed_backend),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_equal_up_to_rounding(compiled(z, u), call(z, u))


@files
@pytest.mark.parametrize("weighted", ["", "capsule"])
def test_func_jacrev(transformed_backend, neighborhood, weighted):
    z, u = (normal(1, 4, 2, 4, seed=s) for s in (1, 2))
    weights = normal(2, 3, 2, seed=3).abs() if weighted else None
    actual, expected = (
        torch.func.jacrev(lambda u, b=b: topographic(z, u, 1.0, neighborhood, weights, backend=b).sum((1, 2, 3)))(u)
        for b in (transformed_backend, "reference")
    )
    assert expected.abs().sum() > 0
    assert_equal_up_to_rounding(actual, expected)


# With weights and without in turn; the others are exhaustive.
@pytest.mark.parametrize(
    ("neighborhood", "weighted"),
    [
        ((lambda *values: values) if (number + len(weighted)) % 2 else exhaustive)(neighborhood, weighted)
        for number, neighborhood in enumerate([*FILES.values(), Neighborhood(3, 2, time_boundary="zero")])
        for weighted in ("", "capsule")
    ],
    ids=str,
)
def test_a_vectorized_jacobian_is_the_looped_one(transformed_backend, neighborhood, weighted):
    """Of what vmap sees of a backward pass: of every argument, and as `is_grads_batched` gives it."""
    z, u = (normal(1, 4, 2, 4, seed=s).requires_grad_() for s in (1, 2))
    mu = normal(2, 1, seed=5).requires_grad_()
    weights = normal(2, 3, 2, seed=3).abs() if weighted else None
    arguments = (z, u, mu) if weights is None else (z, u, mu, weights.requires_grad_())

    def function(z, u, mu, weights=None):
        return topographic(z, u, mu, neighborhood, weights, backend=transformed_backend).sum((0, 1, 2))

    looped, vectorized = (torch.autograd.functional.jacobian(function, arguments, vectorize=v) for v in (False, True))
    assert all(x.abs().sum() > 0 for x in looped)
    for actual, expected in zip(vectorized, looped, strict=True):
        assert_equal_up_to_rounding(actual, expected)
    t = function(*arguments)
    (batched,) = torch.autograd.grad(t, u, torch.eye(4, dtype=t.dtype), is_grads_batched=True)
    assert_equal_up_to_rounding(batched, looped[1])


def test_a_vectorized_jacobian_of_latents_is_the_looped_one(transformed_backend):
    z, u = (normal(1, 4, 2, 2, 4, seed=s) for s in (1, 2))
    noise = normal(1, 4, 2, 4, seed=3), normal(1, 4, 2, 4, seed=4)

    def function(z, u):
        t, kl_z, _ = topographic_latents(z, u, 0.3, FILES["plain"], backend=transformed_backend, noise=noise)
        return t.sum((0, 1, 2)) + kl_z.sum()

    looped, vectorized = (torch.autograd.functional.jacobian(function, (z, u), vectorize=v) for v in (False, True))
    for actual, expected in zip(vectorized, looped, strict=True):
        assert expected.abs().sum() > 0
        assert_equal_up_to_rounding(actual, expected)


@files
@pytest.mark.parametrize("weighted", [False, True])
def test_inputs_decide_where_and_in_which_type(any_backend, neighborhood, weighted):
    """Not the default device, here one without memory, nor the default type; results, gradients and noise."""
    device = torch.get_default_device()
    z, u = (normal(1, 4, 2, 4, seed=s).float() for s in (1, 2))
    weights = normal(3, 2, seed=3).float().abs() if weighted else None
    parameters = torch.stack((z, u), 2)

    def call():
        leaves = [x.detach().requires_grad_() for x in (z, u)]
        t = topographic(*leaves, 0.3, neighborhood, weights, backend=any_backend)
        sampled = topographic_latents(parameters, parameters, 0.3, neighborhood, weights, backend=any_backend)
        rolled = roll_capsules(z, 1, neighborhood)
        return t, *torch.autograd.grad(t.sum(), leaves), rolled, *sampled

    backends.tables.table.forget()
    backends.tables.phases.forget()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            torch.manual_seed(0)
            actual = call()
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    for x, y in zip(actual, call(), strict=True):
        assert (x.device.type, x.dtype) == (device.type, torch.float32)
        assert torch.equal(x, y)


RUNS_EXPORTED = """
import sys, torch

def run(backend, package):
    for file in ("plain", "taps", "fourier"):
        program = torch.export.load(f"{sys.argv[1]}/{backend} {file}.pt2").module()
        z, u, expected = torch.load(f"{sys.argv[1]}/{backend} {file}.pt")
        torch.testing.assert_close(program(z, u), expected)
        assert ("tvae_kernels" in sys.modules) is package

run("reference", False)
import tvae_kernels
run("torch", True)
"""


def test_an_exported_program_runs_where_the_package_was_imported_and_the_reference_without_it(tmp_path):
    z, u = (normal(*SHAPE, seed=s).float().cpu() for s in (1, 2))
    for backend, (file, neighborhood) in itertools.product(("reference", "torch"), FILES.items()):
        layer = TopographicLayer(neighborhood, 0.3, backend=backend).cpu()
        torch.export.save(torch.export.export(layer, (z, u)), tmp_path / f"{backend} {file}.pt2")
        torch.save((z, u, layer(z, u).detach()), tmp_path / f"{backend} {file}.pt")
    command = [sys.executable, "-c", RUNS_EXPORTED, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


class Doubled(torch.nn.Module):
    """The layer on two linear maps of its input, so that all of its gradients reach parameters."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.to_z, self.to_u = (torch.nn.Linear(SHAPE[3], SHAPE[3], dtype=torch.float64) for _ in range(2))
        self.layer = TopographicLayer(NEIGHBORHOOD, mu_init=0.3, backend=backend).double()

    def forward(self, x):
        return self.layer(self.to_z(x), self.to_u(x))


def gradients(module, x):
    module(x).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}


def train_on_a_half(rank, folder, backend, device):
    """What each of two processes does."""
    torch.set_default_device(device)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    module = torch.nn.parallel.DistributedDataParallel(Doubled(backend))
    torch.save(gradients(module, normal(4, *SHAPE[1:])[2 * rank : 2 * rank + 2]), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("transformed_backend", [exhaustive("torch"), exhaustive("triton")], indirect=True)
def test_two_processes_with_half_a_batch_each_have_the_gradients_of_the_whole(transformed_backend, device, tmp_path):
    torch.multiprocessing.spawn(train_on_a_half, (str(tmp_path), transformed_backend, device), nprocs=2)
    expected = gradients(Doubled(transformed_backend), normal(4, *SHAPE[1:]))
    assert len(expected) == 5
    for rank in range(2):
        actual = torch.load(tmp_path / str(rank))
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().sum() > 0
            assert_equal_up_to_rounding(actual[name], gradient)
