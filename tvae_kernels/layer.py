"""`TopographicLayer`: the operation as a module with a learned `mu` and, if wanted, learned weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_eps, check_neighborhood, check_tensor
from .backends import BACKENDS
from .function import topographic
from .latents import Latents, topographic_latents
from .neighborhood import Neighborhood, checked_count, checked_number


class TopographicLayer(nn.Module):
    """`t = (z - mu) / sqrt(window_sum(u²) + eps)` with one trainable scalar `mu` (Keller & Welling 2021, Eq. 11).

    Equivalent to `topographic(z, u, self.mu, neighborhood, self.weights, eps, backend)`.

    Args:
        neighborhood: which `u²` share a denominator.
        mu_init: initial value of `mu`; the paper's 30 speeds up convergence (appendix A.2).
        eps: added inside the square root.
        backend: as in `topographic`.
        learn_weights: whether the taps have weights, which are trained. They start at 1 and cannot become negative.
        weights_for_capsules: number of capsules C, if each shall have weights of its own.

    Raises:
        TypeError: `neighborhood` is none, or a number is of another type.
        ValueError: the backend's name is unknown, weights for capsules are not to be learned, or a number is out of
            its range.

    """

    def __init__(
        self,
        neighborhood: Neighborhood,
        mu_init: float = 30.0,
        eps: float = 1e-6,
        backend: str = "auto",
        learn_weights: bool = False,
        weights_for_capsules: int | None = None,
    ):
        super().__init__()
        check_neighborhood(neighborhood)
        check_eps(eps)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        if weights_for_capsules is not None:
            if not learn_weights:
                raise ValueError(f"weights for {weights_for_capsules} capsules need learn_weights")
            weights_for_capsules = checked_count("weights_for_capsules", weights_for_capsules)
        self.neighborhood = neighborhood
        self.eps = eps
        self.backend = backend
        self.mu = nn.Parameter(torch.tensor(float(checked_number("mu_init", mu_init))))
        if learn_weights:
            leading = () if weights_for_capsules is None else (weights_for_capsules,)
            one = math.log(math.expm1(1.0))  # where softplus is 1
            self.raw_weights = nn.Parameter(torch.full((*leading, *neighborhood.weights_shape), one))
        else:
            self.register_parameter("raw_weights", None)

    @property
    def weights(self) -> Tensor | None:
        """Return `softplus(raw_weights)`, of `neighborhood.weights_shape` or with C before it; None without."""
        return None if self.raw_weights is None else F.softplus(self.raw_weights)

    def forward(
        self,
        z: Tensor,
        u: Tensor,
        axis: int | Tensor | None = None,
        noise: tuple[Tensor, Tensor] | None = None,
        first: int = 0,
        of: int | None = None,
    ) -> Tensor | Latents:
        """Map `z`, `(batch, time, capsule, dim)`, and `u`, of `neighborhood.shape_of_u(z.shape)`, to `t` like `z`.

        From means and log-variances, `(batch, time, 2, capsule, dim)`, it is `sample`. A model calls the module itself,
        so that hooks and wrappers of modules have their turn: `sample` and `step` called by name go past them.

        `axis` says along which axis the sequences are known to roll, where every axis has a root: see `topographic`.
        The other arguments are those of `sample`.
        """
        if isinstance(z, Tensor) and z.ndim == 5:
            return self.sample(z, u, noise, first, of, axis)
        if noise is not None:
            raise ValueError("noise is for means and log-variances, (batch, time, 2, capsule, dim)")
        return topographic(z, u, self.mu, self.neighborhood, self.weights, self.eps, self.backend, axis)

    def sample(
        self,
        z: Tensor,
        u: Tensor,
        noise: tuple[Tensor, Tensor] | None = None,
        first: int = 0,
        of: int | None = None,
        axis: int | Tensor | None = None,
    ) -> Latents:
        """From means and log-variances, `(batch, time, 2, capsule, dim)`, to `t` at a sample and both KL terms.

        Equivalent to
        `topographic_latents(z, u, self.mu, neighborhood, self.weights, eps, backend, noise, first, of, axis)`.
        """
        settings = self.neighborhood, self.weights, self.eps, self.backend
        return topographic_latents(z, u, self.mu, *settings, noise, first, of, axis)

    def step(
        self, z: Tensor, u: Tensor, state: Tensor | None = None, axis: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map the next frames of a stream: a causal window on a sequence that need not have an end (Eq. 22).

        Fed with a sequence in pieces, it gives the same as `forward` on the whole.

        Args:
            z: `(batch, frames, capsule, dim)`, one frame or more.
            u: the same but where the capsules are padded.
            state: what the call for the frames before returned; None at the start of a sequence.
            axis: as in `topographic`.

        Returns:
            `t` of the shape of `z`, and the state: the last `W - 1` frames of `u`.

        Raises:
            TypeError: an argument is no floating-point tensor.
            ValueError: the window is not causal, or time is a circle, or the state has another shape.

        """
        for name, x in (("z", z), ("u", u), ("state", state)):
            if name != "state" or x is not None:
                check_tensor(name, x)
        if z.ndim != 4 or u.ndim != 4:
            raise ValueError(f"z and u must be (batch, time, capsule, dim), got {tuple(z.shape)} and {tuple(u.shape)}")
        n = self.neighborhood
        if not n.causal or n.time_boundary == "circular":
            raise ValueError(f"a stream needs a causal window and a time that is no circle, got {n}")
        kept = n.time_window - 1
        if state is None:
            if n.time_boundary == "padded":
                raise ValueError(f"with padded time the first state is the padding: {kept} frames of u, got None")
            # frames of zeros add nothing to a window that is cut
            state = u.new_zeros((u.shape[0], kept, *u.shape[2:]))
        expected = (u.shape[0], kept, *u.shape[2:])
        if tuple(state.shape) != expected:
            raise ValueError(f"for u of shape {tuple(u.shape)} the state must be {expected}, got {tuple(state.shape)}")
        u = torch.cat((state, u), 1)
        t = topographic(z, u, self.mu, n.with_padded_time, self.weights, self.eps, self.backend, axis)
        return t, u[:, u.shape[1] - kept :]

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        return f"{self.neighborhood}, eps={self.eps}, backend={self.backend!r}"
