"""What the right answer is and how far a computed one may be from it.

Two authorities stand behind every number. `window_matrix` writes the window sum out as a matrix, element by element
from its definition; it judges the reference. The reference, in float64 and differentiated by autograd, judges the rest.

Error bounds follow from the rounding errors along the way. With unit roundoff h (half of `torch.finfo.eps`), every
operation multiplies its exact result by (1 + δ), |δ| ≤ h, so that to first order the δ of a chain add up, a root halves
what came before it, and a sum of n terms in any order adds at most (n - 1)·h times the sum of the terms' magnitudes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tvae_kernels import Neighborhood, reference, topographic
from tvae_kernels.arguments import compute_dtype

MU_SHAPES = {"none": None, "scalar": (), "capsule": ("C", 1), "position": ("D",), "each": ("C", "D")}


def exhaustive(*values):
    """Parameters of a case that is left to `-m exhaustive`."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def window_matrix(
    neighborhood: Neighborhood, time: int, dim: int, weights: Tensor | None = None, shift: int | None = None
) -> Tensor:
    """The `(S·D, S·D)` matrix of the window sum: row `(l, d)` has `w[i, k]` in column `(l + i, d + shift·i + k)`."""
    n = neighborhood
    shift = n.shift if shift is None else shift
    if n.causal:
        first_i, last_i = -(n.time_window - 1), 0
    else:
        first_i, last_i = -((n.time_window - 1) // 2), n.time_window // 2
    first_k, last_k = -((n.capsule_window - 1) // 2), n.capsule_window // 2
    matrix = torch.zeros(time, dim, time, dim, dtype=torch.float64)
    for l in range(time):
        for d in range(dim):
            for row, i in enumerate(range(first_i, last_i + 1)):
                for column, k in enumerate(range(first_k, last_k + 1)):
                    to_l, to_d = l + i, d + shift * i + k
                    if n.time_boundary == "circular":
                        to_l %= time
                    if n.capsule_boundary == "circular":
                        to_d %= dim
                    if 0 <= to_l < time and 0 <= to_d < dim:
                        matrix[l, d, to_l, to_d] += 1.0 if weights is None else float(weights[row, column])
    return matrix.reshape(time * dim, time * dim)


def interpreted() -> bool:
    """Whether the triton backend runs in the interpreter."""
    from tvae_kernels.backends.triton import launch

    return launch.interpreted()


@dataclass
class Problem:
    """One set of arguments of `topographic`, and the gradient `dt` that arrives at its result."""

    z: Tensor
    u: Tensor
    mu: Tensor | float
    weights: Tensor | None
    dt: Tensor
    neighborhood: Neighborhood
    eps: float

    @classmethod
    def random(
        cls, shape, neighborhood, mu="scalar", weighted=False, eps=1e-6, dtype=torch.float32, device="cpu", seed=0
    ):
        """Normal `z`, `u`, `mu` and `dt`, uniform weights; `mu` is a key of `MU_SHAPES`."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

        sizes = {"C": shape[2], "D": shape[3]}
        mu_shape = MU_SHAPES[mu]
        windows = (neighborhood.time_window, neighborhood.capsule_window)
        weights = torch.rand(windows, generator=generator, dtype=torch.float64).to(device, dtype) if weighted else None
        mu = 0.5 if mu_shape is None else normal(*(sizes.get(n, n) for n in mu_shape))
        return cls(normal(*shape), normal(*shape), mu, weights, normal(*shape), neighborhood, eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.z.dtype

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The arguments that have a gradient, by name."""
        named = {"z": self.z, "u": self.u, "mu": self.mu, "weights": self.weights}
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}

    def solve(self, backend: str) -> dict[str, Tensor]:
        """`t` and the gradient `d…` of each argument."""
        leaves = {name: x.detach().requires_grad_() for name, x in self.leaves.items()}
        arguments = {"mu": self.mu, "weights": None} | leaves
        t = topographic(**arguments, neighborhood=self.neighborhood, eps=self.eps, backend=backend)
        gradients = torch.autograd.grad(t, list(leaves.values()), self.dt)
        return {"t": t.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}

    def judge(self) -> dict[str, Tensor]:
        """What `solve` should give: the reference in float64 on the CPU, differentiated by autograd."""

        def exact(x):
            return x.detach().to("cpu", torch.float64) if isinstance(x, Tensor) else x

        fields = {name: exact(getattr(self, name)) for name in ("z", "u", "mu", "weights", "dt")}
        return replace(self, **fields).solve("reference")

    def bounds(self, backend: str = "") -> dict[str, Tensor]:
        """How far each result of `solve` may be from `judge`, element by element."""

        def magnitude(x):
            return (
                x.detach().to("cpu", torch.float64) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
            )

        z, u, mu, dt = magnitude(self.z), magnitude(self.u), magnitude(self.mu), magnitude(self.dt).abs()
        weights = None if self.weights is None else magnitude(self.weights)
        squares = u.square()
        r = (reference.window_sum(squares, self.neighborhood, weights) + self.eps).rsqrt()
        centred = (z - mu).abs()
        g = 0.5 * dt * centred * r**3
        taps, elements = self.neighborhood.time_window * self.neighborhood.capsule_window, z.numel()

        # Rounding errors in units of h, along the longest path of any backend:
        in_r = (taps + 3) / 2 + 4  # square, weight, taps - 1 additions, eps and its own rounding; GPUs' rsqrt: 2 ulp
        in_t = in_r + 2  # z - mu, times r
        in_dz = in_r + 1
        in_g = 3 * in_r + 5  # z - mu and four products
        in_du = in_g + taps + 2  # weight, taps - 1 additions, times u, negation or doubling exact
        result = {"t": (in_t, centred * r), "dz": (in_dz, dt * r)}
        result["du"] = (in_du, 2 * u.abs() * reference.window_sum(g, self.neighborhood, weights, adjoint=True))
        if isinstance(self.mu, Tensor):
            result["dmu"] = (in_dz + elements, (dt * r).sum_to_size(mu.shape))
        if weights is not None:
            in_dw = in_g + 2 + elements  # the two factors u, then one sum over everything
            result["dweights"] = (in_dw, reference.weight_gradients(g[None], u, self.neighborhood, weights.shape))

        info, out = torch.finfo(compute_dtype(self.dtype)), torch.finfo(self.dtype)
        judges = 2 if self.dtype == torch.float64 else 1  # the judge then rounds as often as the judged
        h = judges * 1.01 * info.eps / 2  # 1 % for the higher orders: at most (3000 · 2**-24)² here
        rounding_out = 0 if out.bits == info.bits else out.eps / 2
        if self.dtype == torch.bfloat16 and backend == "triton" and interpreted():
            rounding_out = out.eps  # the interpreter cuts float32 off where GPUs round it (see test_compilation.py)
        floor = out.smallest_normal * out.eps  # one subnormal step, where relative accuracy ends
        return {name: (count * h + rounding_out) * size + floor for name, (count, size) in result.items()}

    def check(self, backend: str) -> None:
        """Assert that a backend's result and all its gradients are within their bounds."""
        actual, expected, bounds = self.solve(backend), self.judge(), self.bounds(backend)
        assert actual.keys() == expected.keys() == bounds.keys()
        for name, x in actual.items():
            argument = self.z if name == "t" else getattr(self, name[1:])
            assert x.dtype == argument.dtype, f"{name} has type {x.dtype}"
            assert x.shape == argument.shape, f"{name} has shape {tuple(x.shape)}"
            assert_within(name, x, expected[name], bounds[name])


def assert_within(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Every element of `actual` is finite and at most `bound` from `expected`."""
    actual = actual.detach().to("cpu", torch.float64)
    assert actual.isfinite().all(), f"{name} has {(~actual.isfinite()).sum()} elements that are not finite"
    excess = (actual - expected).abs() / bound
    assert (excess <= 1).all(), f"{name} is off by up to {excess.max():.3g} times its error bound"


@st.composite
def problems(draw, longest: int, widest: int, dtypes=(torch.float32, torch.float64)) -> Problem:
    """Any problem with axes up to `longest` and windows up to `widest`, beyond the axis where it is cut."""
    boundary = st.sampled_from(["circular", "zero"])
    time_boundary, capsule_boundary = draw(boundary), draw(boundary)
    axis = st.integers(1, longest)
    S, D = draw(axis), draw(axis)

    def window(size: int, kind: str):
        return st.integers(1, min(widest, size) if kind == "circular" else widest)

    neighborhood = Neighborhood(
        time_window=draw(window(S, time_boundary)),
        capsule_window=draw(window(D, capsule_boundary)),
        shift=draw(st.integers(-2 * longest, 2 * longest)),
        causal=draw(st.booleans()),
        time_boundary=time_boundary,
        capsule_boundary=capsule_boundary,
    )
    return Problem.random(
        (draw(st.integers(1, 2)), S, draw(st.integers(1, 2)), D),
        neighborhood,
        mu=draw(st.sampled_from(sorted(MU_SHAPES))),
        weighted=draw(st.booleans()),
        eps=draw(st.sampled_from([0.0, 1e-6, 0.5])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**31)),
    )
