"""Groups of motions of the plane, and images that they move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

DIMENSIONS = {"SO(2)": 1, "SE(2)": 3, "Sim(2)": 4}  # of turns; of turns and shifts; of these and sizes

Elements = Float[Tensor, "... dimension"]  # of a Lie algebra: θ, then u_1, u_2, then σ, as far as the group has them
Matrices = Float[Tensor, "... 3 3"]


def algebra(tau: Elements) -> Matrices:
    """Lay out elements as matrices `[[σ, -θ, u_1], [θ, σ, u_2], [0, 0, 0]]`, with 0 for what they do not have."""
    theta, u1, u2, sigma = F.pad(tau, (0, 4 - tau.shape[-1])).unbind(-1)
    zero = torch.zeros_like(theta)
    rows = (sigma, -theta, u1), (theta, sigma, u2), (zero, zero, zero)
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def exp(tau: Elements) -> Matrices:
    """Return the motions that elements of an algebra lead to: `p -> exp(tau) p` for points `p = (x, y, 1)`.

    In float64, of which no setting makes less.
    """
    return torch.linalg.matrix_exp(algebra(tau.double()))


def warped(
    images: Float[Tensor, "image channel height width"], motion: Float[Tensor, "image 3 3"]
) -> Float[Tensor, "image channel height width"]:
    """Return the images `x(p) = y(motion p)`: a motion says where in `y` each point of `x` comes from.

    Points are (x, y) from -1 to 1, to the right and down, so that `exp(θ)` turns an image counter-clockwise by θ, as
    the factor "rotation" of MNIST does. Bilinear, and 0 outside.
    """
    # Sums of products, for matrix products as those of F.affine_grid would round by batch size and TF32 settings.
    height, width = images.shape[-2:]
    x, y = (2 * torch.arange(n, dtype=images.dtype, device=images.device) + 1 for n in (width, height))
    x, y = x / width - 1, (y / height - 1)[:, None]
    rows = motion[:, :2, :, None, None].to(images.dtype).unbind(1)
    points = [a * x + b * y + c for a, b, c in (row.unbind(1) for row in rows)]
    return F.grid_sample(images, torch.stack(points, -1), align_corners=False)
