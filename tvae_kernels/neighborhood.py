"""Which squared activations `u²` share a denominator: the topography of the layer as one validated, hashable value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Boundary = Literal["circular", "zero"]


@dataclass(frozen=True)
class Neighborhood:
    """The taps `(i, k)` of the window sum `v[l, d] = Σ u[l + i, d + shift·i + k]²` of one capsule.

    Time offsets `i` cover `time_window` frames and capsule offsets `k` cover `capsule_window` positions, both around
    zero; an even window has its extra tap on the positive side (18 frames are -8 … +9). `shift` is how far the window
    moves along the capsule with each frame: 1 is the shifting temporal coherence of Topographic VAEs (Keller & Welling
    2021, Eq. 9), 0 the stationary one of BubbleVAE (Eq. 8). A `time_window` of 1 has no temporal coherence.

    Args:
        time_window: number of frames W in the window, the paper's 2L; at least 1.
        capsule_window: number of neighbouring positions K in the window; at least 1.
        shift: positions the window moves along the capsule per frame; any integer.
        causal: only past and present frames, `i = -(W - 1) … 0` (Eq. 22).
        time_boundary: "circular" wraps around the sequence; "zero" drops the taps that fall outside.
        capsule_boundary: the same along the capsule.

    Raises:
        TypeError: a window or the shift is not an integer, or `causal` is not a bool.
        ValueError: a window is smaller than 1, or a boundary is unknown.

    """

    time_window: int = 1
    capsule_window: int = 1
    shift: int = 1
    causal: bool = False
    time_boundary: Boundary = "circular"
    capsule_boundary: Boundary = "circular"

    def __post_init__(self):
        for name in ("time_window", "capsule_window", "shift"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if name != "shift" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be True or False, got {self.causal!r}")
        for name in ("time_boundary", "capsule_boundary"):
            if getattr(self, name) not in get_args(Boundary):
                raise ValueError(f'{name} must be "circular" or "zero", got {getattr(self, name)!r}')

    @property
    def time_taps(self) -> range:
        """The time offsets `i`, in frames, lowest first."""
        last = 0 if self.causal else self.time_window // 2
        return range(last - self.time_window + 1, last + 1)

    @property
    def capsule_taps(self) -> range:
        """The capsule offsets `k`, in positions, lowest first."""
        last = self.capsule_window // 2
        return range(last - self.capsule_window + 1, last + 1)

    def check_fits(self, time: int, dim: int) -> None:
        """Refuse a circular window that is longer than its axis, which would count elements twice.

        Args:
            time: length S of the sequence.
            dim: number D of positions in a capsule.

        Raises:
            ValueError: naming the window and the axis.

        """
        for name, window, boundary, axis, size in (
            ("time_window", self.time_window, self.time_boundary, "time steps", time),
            ("capsule_window", self.capsule_window, self.capsule_boundary, "positions in a capsule", dim),
        ):
            if boundary == "circular" and window > size:
                raise ValueError(f"a circular {name} of {window} does not fit {size} {axis}")
