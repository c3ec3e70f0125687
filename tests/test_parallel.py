"""Sequences split over processes against the whole sequence, in float64: values, first and second derivatives.

As a script, this file computes the parts in processes forked from one, for it takes seconds to start; the tests put
them together and compare.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tvae_kernels import Neighborhood, TopographicLayer, exchange_halo, topographic, topographic_split

FRAMES = (7, 5, 6)  # of the parts of three processes; of two, the last two
CASES = {
    f"{boundary}-{'causal' if causal else 'centred'}-shift-{shift}-{window}": Neighborhood(
        window, 3, shift=shift, causal=causal, time_boundary=boundary
    )
    for boundary, causal, shift, window in itertools.product(("circular", "zero"), (False, True), (0, 1), (1, 4, 5))
} | {
    "torus": Neighborhood(3, (2, 1), shift=(1, 0.5), axes=(3, 2), roots="each axis", time_boundary="zero"),
    "speeds": Neighborhood(4, 2, speeds=(1, -0.5), time_boundary="circular", capsule_boundary="padded"),
}


def inputs(neighborhood, frames):
    """z, u, mu and weights, and the gradients that arrive, of a sequence of so many frames."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, frames, 2, 6)
    shapes = shape, neighborhood.shape_of_u(shape), (2, 1), neighborhood.weights_shape, shape
    z, u, mu, weights, dt = (torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes)
    return [z.requires_grad_(), u.requires_grad_(), mu.requires_grad_(), weights.square().requires_grad_(), dt]


def derivatives(t, z, u, mu, weights, dt):
    """`t`, the gradients of z, u, mu and weights, and those of the sum of squares of the first two."""
    first = torch.autograd.grad(t, (z, u, mu, weights), dt, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (z, u))
    return [x.detach() for x in (t, *first, *second)]


def of_part(neighborhood, frames, rank, group):
    """The same of the part of one process."""
    part = slice(sum(frames[:rank]), sum(frames[: rank + 1]))
    z, u, mu, weights, dt = inputs(neighborhood, sum(frames))
    z, u = (x.detach()[:, part].requires_grad_() for x in (z, u))
    t = topographic_split(z, u, mu, neighborhood, weights, group=group)
    return derivatives(t, z, u, mu, weights, dt[:, part])


def compute(rank, folder):
    """Compute all cases, as one of three processes and, but for the first of them, as one of two."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    two = dist.new_group([1, 2])
    for group, members in ((None, 3), (two, 2)):
        rank = dist.get_rank(group)
        if rank >= 0:
            results = {name: of_part(n, FRAMES[-members:], rank, group) for name, n in CASES.items()}
            torch.save(results, folder / f"{members}-{rank}.pt")
    if dist.get_rank() == 0:
        torch.save(sharded_gradients(), folder / "sharded.pt")
    else:
        sharded_gradients()
    dist.destroy_process_group()


class Mapped(torch.nn.Module):
    """A layer with weights for each capsule, on linear maps of what it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_z, self.to_u = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
        layer = TopographicLayer(CASES["speeds"], 0.5, learn_weights=True, weights_for_capsules=2)
        self.layer = layer.double()

    def forward(self, x):
        u = self.to_u(x)
        return self.layer(self.to_z(x), torch.nn.functional.pad(u, SPEEDS_PADDING)).square().mean()


SPEEDS_PADDING = CASES["speeds"].padding()[1][0]


def own_part(rank):
    return torch.randn(2, 5, 2, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def sharded_gradients():
    """The gradients of all parameters, sharded over all processes but for the scalar `mu`, as docs/training.md does."""
    module = Mapped()
    mesh, mu = init_device_mesh("cpu", (dist.get_world_size(),)), module.layer.mu
    for part in (module.layer, module):
        fully_shard(part, mesh=mesh, ignored_params={mu})
    module(own_part(dist.get_rank())).backward()
    dist.all_reduce(mu.grad)
    mu.grad /= dist.get_world_size()
    names = {name for name, x in module.named_parameters() if not hasattr(x, "full_tensor")}
    assert names == {"layer.mu"}
    return [x.grad if x is mu else x.grad.full_tensor() for x in module.parameters()]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What the processes have computed, by their number."""
    folder = tmp_path_factory.mktemp("parts")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__, folder]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    found = {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in range(n)] for n in (2, 3)}
    return found | {"sharded": torch.load(folder / "sharded.pt")}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("processes", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_the_parts_of_a_split_sequence_are_those_of_the_whole(processes, name, request):
    neighborhood, frames = CASES[name], FRAMES[-processes:]
    if processes == 1:
        results = [of_part(neighborhood, frames, 0, None)]
    else:
        results = [part[name] for part in request.getfixturevalue("parts")[processes]]
    z, u, mu, weights, dt = inputs(neighborhood, sum(frames))
    whole = derivatives(topographic(z, u, mu, neighborhood, weights), z, u, mu, weights, dt)
    names = ("t", "dz", "du", "dmu", "dweights", "second derivative of z", "second derivative of u")
    for quantity, expected, *split in zip(names, whole, *results, strict=True):
        actual = sum(split) if quantity in ("dmu", "dweights") else torch.cat(split, 1)
        # Sums in another order, of no more terms than there are elements, of up to ten times the largest result.
        bound = 10 * expected.abs().max() * dt.numel() * torch.finfo(torch.float64).eps
        torch.testing.assert_close(actual, expected, rtol=0, atol=float(bound), msg=lambda m, q=quantity: f"{q}: {m}")


@pytest.mark.slow
def test_a_layer_whose_parameters_are_sharded_has_the_gradients_of_the_whole(parts):
    module = Mapped()
    (sum(module(own_part(rank)) for rank in range(3)) / 3).backward()
    for (name, x), actual in zip(module.named_parameters(), parts["sharded"], strict=True):
        # the mean of three, in whatever order, and of no more terms than there are elements
        bound = 10 * x.grad.abs().max() * 3 * own_part(0).numel() * torch.finfo(torch.float64).eps
        torch.testing.assert_close(actual, x.grad, rtol=0, atol=float(bound), msg=lambda m, n=name: f"{n}: {m}")


def test_one_process_borrows_from_itself_or_finds_zeros():
    u = torch.arange(1.0, 6.0).reshape(1, 5, 1, 1)
    circular = exchange_halo(u, Neighborhood(4)).flatten().tolist()
    assert circular == [5, 1, 2, 3, 4, 5, 1, 2]
    assert exchange_halo(u, Neighborhood(4, time_boundary="zero")).flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert exchange_halo(u, Neighborhood(4, causal=True)).flatten().tolist() == [3, 4, 5, 1, 2, 3, 4, 5]


def test_gradients_of_any_order():
    u = torch.randn(1, 5, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for boundary in ("circular", "zero"):
        n = Neighborhood(4, time_boundary=boundary)
        assert torch.autograd.gradcheck(lambda u, n=n: exchange_halo(u, n).square(), u)
        assert torch.autograd.gradgradcheck(lambda u, n=n: exchange_halo(u, n).square(), u)


@pytest.mark.parametrize("boundary", ["circular", "zero"])
def test_a_window_longer_than_a_part_is_refused(boundary):
    z = torch.zeros(1, 3, 1, 2)
    n = Neighborhood(5, time_boundary=boundary)
    with pytest.raises(ValueError, match="time_window of 5 does not fit the 3 frames of a part"):
        exchange_halo(z, n)
    with pytest.raises(ValueError, match=r"time_window of 5 does not fit (the 3 frames of a part|3 time steps)"):
        topographic_split(z, z, neighborhood=n)


def test_what_does_not_fit_is_refused_before_anything_is_exchanged(monkeypatch):
    monkeypatch.setattr("tvae_kernels.parallel.exchange_halo", lambda *_: pytest.fail("exchanged"))
    z = torch.zeros(1, 3, 1, 2)
    with pytest.raises(ValueError, match=r"u must have the shape \(1, 3, 1, 2\), got \(1, 4, 1, 2\)"):
        topographic_split(z, torch.zeros(1, 4, 1, 2))
    with pytest.raises(TypeError, match="u must be a tensor, got NoneType"):
        topographic_split(z, None)
    with pytest.raises(TypeError, match="neighborhood must be a Neighborhood, got int"):
        topographic_split(z, z, neighborhood=5)


SEEDED = "import os, torch; torch.manual_seed(int(os.environ['RANK']))\n"
WHOLE = """
def whole(x):
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts, 1)

from tvae_kernels import topographic
whole_z, whole_u = (whole(x).requires_grad_() for x in (z, u))
whole_t = topographic(whole_z, whole_u, mu, neighborhood)
gradients = torch.autograd.grad(whole_t.square().sum(), (whole_z, whole_u, mu))
for part, expected in zip((whole(t), whole(dz), whole(du), dmu), (whole_t, *gradients)):
    torch.testing.assert_close(part, expected.detach(), rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
dist.destroy_process_group()
"""


@pytest.mark.exhaustive
def test_the_example_of_the_page_gives_what_the_whole_sequence_gives(tmp_path):
    page = (Path(__file__).parent.parent / "docs/training.md").read_text(encoding="utf-8")
    part = page.split("## Sequences split over processes\n")[1]
    (tmp_path / "split.py").write_text(SEEDED + part.split("```python\n")[1].split("```")[0] + WHOLE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "split.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_padded_time_is_refused():
    n = Neighborhood(3, time_boundary="padded")
    with pytest.raises(ValueError, match=r'time_boundary must be "circular" or "zero" .* got "padded"'):
        exchange_halo(torch.zeros(1, 5, 1, 2), n)


def test_a_split_sequence_of_one_part_is_padded_time(device):
    z, u, mu, weights, _ = inputs(n := Neighborhood(4, 3), 6)
    halo = exchange_halo(u, n)
    expected = topographic(z, halo, mu, replace(n, time_boundary="padded"), weights)
    assert torch.equal(topographic_split(z, u, mu, n, weights), expected)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(compute, (Path(sys.argv[1]),), nprocs=3, start_method="fork")
