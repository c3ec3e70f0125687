"""What only the Triton kernels can get wrong: memory nobody writes, what is kept, offsets and devices."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import Problem, assert_within, exhaustive, window_matrix

from tvae_kernels import Neighborhood, TopographicLayer, topographic
from tvae_kernels.arguments import Inputs, Window

plain = pytest.importorskip("tvae_kernels.backends.triton.plain", exc_type=ImportError)
launch = pytest.importorskip("tvae_kernels.backends.triton.launch", exc_type=ImportError)


# A neighbourhood and a shape for each pair of kernels, by name, and whether the backward pass reads what was kept.
KINDS = {
    "whole": ((2, 18, 3, 18), Neighborhood(5, 3), False),
    "whole, time cut": ((2, 7, 3, 18), Neighborhood(5, 3, time_boundary="zero"), False),
    "ring": ((2, 7, 3, 18), Neighborhood(5, 3), False),
    "tile": ((1, 140, 1, 100), Neighborhood(4, 2), False),
    "tile, r kept": ((1, 70, 1, 200), Neighborhood(24, 3), True),
    "taps": ((2, 7, 3, 18), Neighborhood(5, 3, capsule_boundary="zero"), True),
}
kinds = pytest.mark.parametrize(("shape", "neighborhood", "keeps_r"), KINDS.values(), ids=KINDS)


@kinds
def test_every_pair_of_kernels_is_chosen_where_it_is_meant_to_be(triton, shape, neighborhood, keeps_r, request):
    kind = request.node.callspec.id.split(",")[0]
    x = torch.empty(shape)
    choice = plain.choose(Inputs(x, x, torch.zeros(()), None), Window(neighborhood, 1e-6), x)
    if kind == "taps":
        assert choice is None
    else:
        assert choice.kind == kind.replace("ring", "tile")
        assert choice.plan.RING.value == (kind == "ring")
        assert choice.plan.SAVE_R.value == keeps_r


@pytest.mark.quick
@kinds
def test_every_pair_of_kernels(triton, device, shape, neighborhood, keeps_r):
    problem = Problem.random(shape, neighborhood, device=device)
    problem.check(triton)
    if keeps_r:  # which a forward pass alone does not write
        t = topographic(problem.z, problem.u, problem.mu, neighborhood, backend=triton)
        assert_within("t", t, problem.judge()["t"], problem.bounds()["t"])


@kinds
def test_r_is_kept_only_where_it_will_be_read(triton, device, shape, neighborhood, keeps_r):
    """A forward pass that nobody can differentiate writes t and nothing else."""
    problem = Problem.random(shape, neighborhood, device=device)
    layer = TopographicLayer(neighborhood, backend=triton).to(device)
    leaf = problem.z.clone().requires_grad_()
    with launch.recorded() as launches:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                layer(problem.z, problem.u)
                topographic(leaf, problem.u, problem.mu, neighborhood, backend=triton)
        layer(problem.z, problem.u)
    kept = [launched.arguments.get("r") is not None for launched in launches]
    assert kept == [False] * 4 + [keeps_r]


@kinds
def test_an_element_nobody_writes_would_show(triton, device, shape, neighborhood, keeps_r):
    """The `triton` fixture, under which all tests of these kernels run, makes unwritten memory NaN."""
    problem = Problem.random(shape, neighborhood, device=device)

    def launch_forward_only(x, kernel, grid, *args, **options):
        if "forward" in kernel.fn.__name__:
            kernel[grid](*args, **options)

    with launch.intercepted(launch_forward_only):
        result = problem.solve(triton)
    assert result["t"].isfinite().all()
    assert all(result[name].isnan().all() for name in ("dz", "du", "dmu"))
    with launch.recorded():
        assert problem.solve(triton)["t"].isnan().all()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 elements and lanes that hold one frame, so that small problems have many tiles with halos."""
    monkeypatch.setattr(plain, "_MOST_ELEMENTS", dict.fromkeys(plain._MOST_ELEMENTS, 64))
    monkeypatch.setattr(plain, "_MOST_FRAMES", dict.fromkeys(plain._MOST_FRAMES, 1))
    plain.choice.cache_clear()
    yield
    plain.choice.cache_clear()


@st.composite
def tiled_problems(draw) -> Problem:
    """Problems of 2 to 40 frames in tiles of 16 or 32, whose windows may leave but few frames without a halo."""
    D, S = draw(st.integers(2, 4)), draw(st.integers(2, 40))
    boundary = draw(st.sampled_from(["circular", "zero"]))
    window, width = draw(st.integers(1, min(S, 13))), draw(st.integers(1, D))
    shift, causal = draw(st.integers(-D, D)), draw(st.booleans())
    return Problem.random(
        (draw(st.integers(1, 2)), S, draw(st.integers(1, 3)), D),
        Neighborhood(window, width, shift, causal, time_boundary=boundary),
        eps=draw(st.sampled_from([0.0, 1e-6])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("examples", [8, exhaustive(50)])
def test_many_small_tiles(triton, device, small_tiles, examples):
    reached = set()

    @settings(max_examples=examples)
    @given(tiled_problems())
    def check(problem):
        inputs, window = Inputs(problem.z, problem.u, problem.mu, None), Window(problem.neighborhood, problem.eps)
        choice = plain.choose(inputs, window, problem.dt)
        plan = None if choice is None else choice.plan
        reached.add("taps" if plan is None else "r kept" if plan.SAVE_R else "ring" if plan.RING else "halo")
        problem.check(triton)

    check()
    assert reached >= {"halo", "r kept", "ring"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-19, 1e-21])
def test_windows_of_subnormal_squares(triton, device, dtype, size):
    """Where `u²` is subnormal in float32, t is as large as it must be, not infinite."""
    u = torch.full((1, 4, 1, 4), size, dtype=dtype, device=device)
    u[:, 2] *= -0.5
    t = topographic(torch.full_like(u, 1e-15), u, 0.0, Neighborhood(3, 2), eps=0.0, backend=triton)
    v = window_matrix(Neighborhood(3, 2), 4, 4) @ u.square().cpu().double().flatten()
    expected = 1e-15 * v.reshape(u.shape) ** -0.5
    # u² is a multiple of 2^-149 in float32: at 1e-42 about 1 part in 700 is lost
    torch.testing.assert_close(t.cpu().double(), expected, rtol=1e-3 if size < 1e-20 else 1e-5, atol=0)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """float16 memory of 5·2³⁰ elements and some, of which only the touched pages exist."""
    path = tmp_path_factory.mktemp("sparse") / "memory"
    yield torch.from_file(str(path), shared=True, size=5 * 2**30 + 2**20, dtype=torch.float16)
    path.unlink()


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_offsets_past_31_bits(triton, device, sparse, axis):
    """Inputs whose fourth element along an axis is 3·2³⁰ elements after the first, though the stride fits 31 bits."""
    if device.type != "cpu":
        pytest.skip("on a GPU, test_more_than_31_bits_of_elements does this with real memory")
    shape = [1, 3, 1, 3]
    shape[axis] = 4
    strides = [64, 16, 8, 1]
    strides[axis] = 2**30
    problem = Problem.random(shape, Neighborhood(2, 2), weighted=True, eps=0.5, dtype=torch.float16)
    far = {}
    for number, name in enumerate(("z", "u", "dt")):
        # From 2³¹ on, so that an offset that wraps around in 32 bits finds zeros and not the end of the process
        far[name] = sparse.as_strided(shape, strides, 2**31 + number * 1024)
        far[name].copy_(getattr(problem, name))
    expected = problem.solve(triton)
    for name, actual in replace(problem, **far).solve(triton).items():
        assert torch.equal(actual, expected[name]), name


@pytest.mark.gpu
def test_more_than_31_bits_of_elements(triton, device):
    """Batches before, around and after element 2³¹ are what they are on their own, and what the reference says."""
    S, C, D = 18, 18, 18
    B = 2**31 // (S * C * D) + 3
    if torch.cuda.mem_get_info(device)[0] < 48e9:
        pytest.skip("needs 48 GB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # filling 20 GB with NaN shows nothing that smaller tests do not
    neighborhood = Neighborhood(5, 3)
    z = torch.randn(1, S, C, D, dtype=torch.float16, device=device).expand(B, S, C, D)
    u = torch.randn(B, S, C, D, dtype=torch.float16, device=device).requires_grad_()
    t = topographic(z, u, 0.5, neighborhood, eps=0.5, backend=triton)
    (du,) = torch.autograd.grad(t.sum(), u)
    for batch in (slice(0, 2), slice(B // 2, B // 2 + 2), slice(B - 4, B)):
        dt = torch.ones_like(t[batch])
        part = Problem(z[batch], u[batch].detach(), 0.5, None, dt, neighborhood, eps=0.5)
        alone, expected, bounds = part.solve(triton), part.judge(), part.bounds()
        for name, actual in {"t": t[batch], "du": du[batch]}.items():
            assert torch.equal(actual, alone[name])
            assert_within(name, actual, expected[name], bounds[name])
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
def test_launches_on_the_device_of_the_tensors(triton):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = Problem.random((2, 7, 2, 5), Neighborhood(4, 3), weighted=True, device=torch.device("cuda", 1))
    with torch.cuda.device(0):
        assert all(x.device.index == 1 for x in problem.solve(triton).values())
        problem.check(triton)


@pytest.mark.gpu
def test_a_cuda_graph_can_capture_the_operation(triton, device):
    """Nothing is tuned, compiled or read back once the kernels have run."""
    problem = Problem.random((2, 7, 2, 5), Neighborhood(4, 3), device=device)
    expected = problem.solve(triton)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = problem.solve(triton)
    for x in actual.values():
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, expected[name]) for name, x in actual.items())
