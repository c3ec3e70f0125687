"""Sequences whose time is split over processes: each holds its own frames and borrows those its windows reach into.

    process r of n        ... | u_{first} ... u_{last} | ...
    exchange_halo   u_{first - before} ... u_{last + after}      before = -time_taps[0], after = time_taps[-1]

The frames at both ends of a part, its halo, come from the neighbours. A window over a part and its halo is one with
padded time, so that the operation needs nothing else to know. The gradient of a halo goes back to whom the frames
belong: borrowing and giving back are transposes of each other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .arguments import Inputs, Window, check, check_neighborhood, check_tensor
from .function import topographic
from .neighborhood import Neighborhood


def topographic_split(
    z: Tensor,
    u: Tensor,
    mu: Tensor | float = 0.0,
    neighborhood: Neighborhood = Neighborhood(),  # noqa: B008 - frozen
    weights: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return `topographic` on a sequence whose frames are split over the processes of a group, in order of their ranks.

    Equivalent to the part of this process of `topographic` on the whole sequence, and to::

        topographic(z, exchange_halo(u, neighborhood, group), mu, neighborhood.with_padded_time, ...)

    Every process calls it, and asks for the gradient if any does. The gradients of `z` and `u` are those of the whole
    sequence; those of `mu` and `weights` are the terms of this part, to be summed over the processes.

    Args:
        z: the frames of this process, `(batch, time, capsule, dim)`; parts may differ in length.
        u: the same but where the capsules are padded.
        mu: as in `topographic`, and alike in all processes, as are the following.
        neighborhood: with circular or zero time; without one there is no topography.
        weights: as in `topographic`.
        eps: as in `topographic`.
        backend: as in `topographic`.
        group: the processes; None is the default group, or this process alone where there is none.

    Returns:
        `t`, of the shape of `z`.

    Raises:
        TypeError: as `topographic`.
        ValueError: as `topographic` and `exchange_halo`.

    """
    # Before anything is exchanged: a process that fails alone leaves the others waiting.
    check(Inputs(z, u, mu, weights), Window(neighborhood, eps))
    u = exchange_halo(u, neighborhood, group)
    return topographic(z, u, mu, neighborhood.with_padded_time, weights, eps, backend)


def exchange_halo(u: Tensor, neighborhood: Neighborhood, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the frames of this process between those that its windows reach into.

    These are the last ones of the process before it and the first ones of the process after it.

    With circular time the first process and the last are neighbours, with zero time they find zeros. Every process
    calls it, also backward. Differentiable, any number of times.

    Args:
        u: `(batch, time, ...)`; the parts of the processes may differ in length.
        neighborhood: its `time_taps` say how far the windows reach, its `time_boundary` what is beyond the ends.
        group: the processes; None is the default group, or this process alone where there is none.

    Returns:
        `(batch, before + time + after, ...)`.

    Raises:
        TypeError: `u` is no floating-point tensor, or `neighborhood` none.
        ValueError: the window is longer than the part of this process, or time is padded.

    """
    check_tensor("u", u)
    check_neighborhood(neighborhood)
    if u.ndim < 2:
        raise ValueError(f"u must be (batch, time, ...), got {tuple(u.shape)}")
    if neighborhood.time_boundary == "padded":
        raise ValueError('time_boundary must be "circular" or "zero" for a sequence that is split, got "padded"')
    if neighborhood.time_window > u.shape[1]:
        raise ValueError(f"a time_window of {neighborhood.time_window} does not fit the {u.shape[1]} frames of a part")
    taps = neighborhood.time_taps
    return _Borrow.apply(u, -taps[0], taps[-1], neighborhood.time_boundary == "circular", group)


class _Borrow(torch.autograd.Function):
    """Frames `(B, S, ...)` with their halo, `(B, before + S + after, ...)`."""

    @staticmethod
    def forward(ctx, u, before, after, circular, group):
        ctx.arguments = (before, after, circular, group)
        # The first frames go to the process before, for which they come after; the last ones the other way.
        right, left = _swap(u[:, :after], u[:, u.shape[1] - before :], circular, group)
        return torch.cat((left, u, right), 1)

    @staticmethod
    def backward(ctx, gradient):
        return _GiveBack.apply(gradient, *ctx.arguments), None, None, None, None


class _GiveBack(torch.autograd.Function):
    """The transpose of `_Borrow`: frames without their halo, which is added where it came from."""

    @staticmethod
    def forward(ctx, x, before, after, circular, group):
        ctx.arguments = (before, after, circular, group)
        left, own, right = x.split((before, x.shape[1] - before - after, after), 1)
        last, first = _swap(left, right, circular, group)
        own = own.clone()
        own[:, :after] += first
        own[:, own.shape[1] - before :] += last
        return own

    @staticmethod
    def backward(ctx, gradient):
        return _Borrow.apply(gradient, *ctx.arguments), None, None, None, None


def _swap(to_before: Tensor, to_after: Tensor, circular: bool, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Give frames to the process before and to the one after; returns those from the one after and the one before.

    All processes give as many frames to the same side. Where a process has no neighbour it gets zeros.
    """
    is_split = dist.is_available() and dist.is_initialized()
    rank, count = (dist.get_rank(group), dist.get_world_size(group)) if is_split else (0, 1)
    if count == 1 and circular:
        return [to_before, to_after]
    received = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (to_before, to_after)]
    operations = []
    # Two processes in a ring are neighbours on both sides: the one's first message is what the other gets first.
    for given, to, taken, source in ((to_before, -1, received[0], 1), (to_after, 1, received[1], -1)):
        for do, x, side in ((dist.isend, given.contiguous(), to), (dist.irecv, taken, source)):
            if x.numel() and (circular or 0 <= rank + side < count):
                operations.append(dist.P2POp(do, x, group=group, group_peer=(rank + side) % count))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    return received
