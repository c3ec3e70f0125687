"""The Topographic VAE of Keller & Welling (2021), and its stationary form, the BubbleVAE."""

from __future__ import annotations

import math
from dataclasses import field, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from tvae_kernels import Neighborhood, TopographicLayer

from ..data import SequenceBatch, SequenceSource
from ..settings import Number, settings
from .base import ELBO, ModelSettings, SequenceModel
from .layers import Axis, Capsules, Images, Mix, Parameters, folded, gaussian

_MOST_MU = 1.0  # that may be divided by a single |u|


@settings
class TVAESettings(ModelSettings):
    """Settings of the TVAE."""

    neighborhood: Neighborhood = field(default_factory=Neighborhood)
    """Which squared activations share a denominator."""
    mu_init: Number = 30.0
    """Initial value of mu in t = (z - mu) / sqrt(W u^2)."""
    window: Literal["ones", "shared", "capsule"] = "ones"
    """Weights of the neighbourhood's taps: all 1, or learned, one window for all capsules or one a capsule."""
    told_axis: bool = False
    """Whether the model is told along which axis of its capsules a sequence rolls: axis 0 for the first transformation
    of the data, axis 1 for the second. Else it sums over the roots of all axes."""

    def __post_init__(self):
        n = self.neighborhood
        if self.told_axis and n.roots != "each axis":
            raise ValueError(f"told_axis needs a root for each axis, got {n}")
        n.check_fits(time=n.time_window, dim=self.capsule_dim, capsules=self.capsules)

    def check_fits(self, source: SequenceSource) -> None:
        """Refuse sequences that are shorter than the window, or have other transformations than the capsules axes.

        Raises:
            ValueError: what does not fit what.

        """
        if math.prod(self.neighborhood.weights_shape) == 1 and self.mu_init > _MOST_MU:
            raise ValueError(
                f"a window of a single u² cannot start from mu_init {self.mu_init:g}, for |u| is often near 0: "
                f"take a larger window (--time-window, --capsule-window), or a mu_init of at most {_MOST_MU:g}"
            )
        self.neighborhood.check_fits(source.sequence_length, self.capsule_dim, self.capsules)
        if self.told_axis and len(source.transformations) != self.neighborhood.root_count:
            moves = ", ".join(source.transformations.values())
            raise ValueError(f"told_axis needs an axis for each of {moves}, got {self.neighborhood.axes}")


class TVAE(SequenceModel):
    """The Topographic VAE: `t = (z - mu) / sqrt(W u²)` with a second encoder for `u` (Eq. 10 and 11).

    Networks are those of `VAE`. Where the neighbourhood pads time, sequences are extended at both ends by repetition
    for `u`, and where it pads the capsules, the encoder of `u` has more outputs (appendix C.2).

    Args:
        image_shape: `(channel, height, width)` of a frame.
        capsules: number of capsules C.
        capsule_dim: number of dimensions D of a capsule.
        neighborhood: which `u²` share a denominator; a circular window must fit the sequences and capsules.
        z_encoder: from frames `(N, channel, height, width)` to means and log-variances `(N, 2·C·D)`; None is the MLP.
        u_encoder: the same for `u`, `2·C·D` or with padded capsules what `neighborhood.shape_of_u` says.
        decoder: from capsules `(N, C, D)` to the pixels of frames, `(N, channel, height, width)`; None is the MLP.
        backend: as in `tvae_kernels.topographic`.
        values: other fields of `TVAESettings`.

    Raises:
        ValueError: a setting has a wrong value, or settings do not fit each other.

    """

    name = "tvae"
    Settings = TVAESettings

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        capsules: int,
        capsule_dim: int,
        neighborhood: Neighborhood,
        *,
        z_encoder: nn.Module | None = None,
        u_encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        backend: str = "auto",
        **values,
    ):
        given = self.Settings(capsules=capsules, capsule_dim=capsule_dim, neighborhood=neighborhood, **values)
        super().__init__(image_shape, given)
        self.rolls = n = given.neighborhood
        (self.frames_before, self.frames_after), _ = n.padding()
        self.u_shape = n.shape_of_u((1, 1, *self.capsule_shape))[2:]
        self.z_encoder = self.mlp_encoder(2 * math.prod(self.capsule_shape)) if z_encoder is None else z_encoder
        self.decoder = self.mlp_decoder() if decoder is None else decoder
        self.u_encoder = self.mlp_encoder(2 * math.prod(self.u_shape)) if u_encoder is None else u_encoder
        self.topographic = TopographicLayer(
            n,
            given.mu_init,
            backend=backend,
            learn_weights=given.window != "ones",
            weights_for_capsules=given.capsules if given.window == "capsule" else None,
        )

    def axis(self, batch: SequenceBatch) -> Axis | None:
        """Return the axes of the batch's transformations, for a model that is told.

        Raises:
            ValueError: the batch does not know them.

        """
        if not self.settings.told_axis:
            return None
        if batch.axis is None:
            raise ValueError("a model with told_axis=True got a batch without an axis for each sequence")
        return batch.axis

    def posterior(self, x: Images) -> tuple[Normal, Normal]:
        """Return `q(z|x)` of shape `(B, S, C, D)`, and `q(u|x)` of the same but where it is padded (Eq. 10 and 11)."""
        z, u = self.posterior_parameters(x)
        return gaussian(z), gaussian(u)

    def posterior_parameters(self, x: Images) -> tuple[Parameters, Parameters]:
        """Return means and log-variances of `z` and `u`."""
        extended = x
        if self.frames_before or self.frames_after:
            first = x[:, :1].expand(-1, self.frames_before, *x.shape[2:])
            last = x[:, -1:].expand(-1, self.frames_after, *x.shape[2:])
            extended = torch.cat((first, x, last), 1)
        return (
            self.encoded(self.z_encoder, x, self.capsule_shape),
            self.encoded(self.u_encoder, extended, self.u_shape),
        )

    def topography(self, z: Capsules, u: Capsules, axis: Axis | None = None) -> Capsules:
        """Return the capsules `t` by the topographic layer (Eq. 11).

        Raises:
            ValueError: an axis is not given to a model that is told, or given to one that is not.

        """
        if (axis is not None) != self.settings.told_axis:
            raise ValueError(f"a model with told_axis={self.settings.told_axis} got the axis {axis}")
        return self.topographic(z, u, axis)

    def forward(self, batch: SequenceBatch) -> ELBO:
        """Return one sample of the bound, which the divergences of `z` and `u` cost; on a GPU in one kernel."""
        x = batch.images
        parameters = self.posterior_parameters(x)
        found = self.topographic(*parameters, first=batch.first, of=batch.total, axis=self.axis(batch))
        costs = {"kl_z": found.kl_z, "kl_u": folded(found.kl_u, x.shape[1], self.frames_before)}
        return self.bound(batch, found.t, costs)

    def encode(self, batch: SequenceBatch, sample: bool = True) -> Capsules:
        """Return `t` at a sample of the posterior, or where `z` and `u²` have their means.

        (Not where `u` has its mean: a `u` as broad as its prior would then count as 0, and divide by next to nothing.)
        """
        qz, qu = self.posterior(batch.images)
        z, u = (qz.rsample(), qu.rsample()) if sample else (qz.mean, (qu.mean.square() + qu.variance).sqrt())
        return self.topography(z, u, self.axis(batch))

    def moved(self, batch: SequenceBatch, mix: Mix | None = None) -> Capsules | None:
        """Roll the capsules of frame 0 by one more step every frame, as `traverse`; whatever the mix, for none is told.

        None where they may roll along one of several axes and the model is not told which.
        """
        if self.rolls.root_count > 1 and not self.settings.told_axis:
            return None
        t, steps = self.encode(batch, sample=False)[:, 0], batch.images.shape[1]
        if self.rolls.root_count == 1:
            return self.rolled(t, steps)
        along = torch.stack([self.rolled(t, steps, axis=a) for a in range(self.rolls.root_count)])
        return along[self.axis(batch), torch.arange(len(t), device=t.device)]

    def with_window(self, time_window: int, capsule_window: int | tuple[int, ...]) -> TVAE:
        """Return a model of the same networks and `mu`, which it shares, with a window of another size.

        Raises:
            ValueError: the window does not fit, or its weights are learned, or the encoder of `u` is for another size.

        """
        if self.settings.window != "ones":
            raise ValueError("a window with learned weights has the size that it was trained with")
        values = {x.name: getattr(self.settings, x.name) for x in fields(self.settings)}
        values["neighborhood"] = replace(
            self.settings.neighborhood, time_window=time_window, capsule_window=capsule_window
        )
        networks = {name: getattr(self, name) for name in ("z_encoder", "u_encoder", "decoder")}
        model = type(self)(self.image_shape, **values, **networks, backend=self.topographic.backend)
        if model.u_shape != self.u_shape:
            found, needed = self.u_shape[1], model.u_shape[1]
            raise ValueError(f"this window needs u at {needed} positions of a capsule, the encoder gives {found}")
        model.topographic.mu = self.topographic.mu
        return model.train(self.training)

    def sample(self, sequences: int, time: int, axis: Axis | None = None) -> Images:
        """Draw images of `sequences` sequences of `time` frames from the prior, on the model's device."""
        shape, device = (sequences, time, *self.capsule_shape), next(self.parameters()).device
        z, u = (torch.randn(s, device=device) for s in (shape, self.settings.neighborhood.shape_of_u(shape)))
        return self.likelihood.mean(self.decode(self.topography(z, u, axis)))

    def frames_seen(self, steps: int) -> Tensor:
        """Return which of the frames take part in `t_0`, as booleans `(steps,)`: those in its temporal window."""
        seen = torch.zeros(steps, dtype=torch.bool)
        n = self.settings.neighborhood
        for i in n.time_taps:
            if n.time_boundary == "circular" or 0 <= i < steps:
                seen[i % steps] = True
        return seen


@settings
class BubbleVAESettings(TVAESettings):
    """Settings of the BubbleVAE: those of the TVAE, with a neighbourhood that does not shift."""

    neighborhood: Neighborhood = field(default_factory=lambda: Neighborhood(shift=0))
    """Which squared activations share a denominator."""

    def __post_init__(self):
        super().__post_init__()
        if self.neighborhood.shift != 0:
            raise ValueError(
                f"a BubbleVAE is stationary: its neighborhood needs shift 0, got {self.neighborhood.shift}"
            )


class BubbleVAE(TVAE):
    """The Topographic VAE with stationary temporal coherence (Eq. 8): its neighbourhood does not shift with time.

    Raises:
        ValueError: as `TVAE`, or the neighbourhood's shift is not 0.

    """

    name = "bubblevae"
    Settings = BubbleVAESettings

    def __init__(self, image_shape, capsules, capsule_dim, neighborhood: Neighborhood, **arguments):
        super().__init__(image_shape, capsules, capsule_dim, neighborhood, **arguments)
        self.rolls = Neighborhood()  # as the baselines are measured: its own topography never moves
