"""Groups of motions: the exponential against closed forms, and images that turn as the data's do."""

import math

import pytest
import torch

from tvae.data.posed import MNISTPosedSequences
from tvae.models.group import DIMENSIONS, algebra, exp, warped

# Some ten products and sums of numbers of the size of 1, in float64.
DOUBLE = {"rtol": 0, "atol": 1e-14}


def elements(dimension, count=50):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def closed_form(theta, u=(0, 0), sigma=0.0):
    """The exponential of an element with `θ` or `σ` other than 0: with complex numbers, `p -> a p + u (a - 1) / w`."""
    w = complex(sigma, theta)
    a = math.e**sigma * complex(math.cos(theta), math.sin(theta))
    shift = complex(*u) * (a - 1) / w
    return torch.tensor([[a.real, -a.imag, shift.real], [a.imag, a.real, shift.imag], [0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize("group", DIMENSIONS)
def test_the_exponential_is_the_closed_form(group):
    tau = elements(DIMENSIONS[group])
    expected = [closed_form(x[0], tuple(x[1:3]) or (0, 0), *x[3:4]) for x in tau.tolist()]
    torch.testing.assert_close(exp(tau), torch.stack(expected), **DOUBLE)


def test_shifts_of_turns_are_those_of_the_integral():
    """`V u` of SE(2) with `V = [[sin θ, -(1 - cos θ)], [1 - cos θ, sin θ]] / θ`."""
    tau = elements(3)
    theta, u = tau[:, 0], tau[:, 1:, None]
    sin, cos = theta.sin() / theta, (1 - theta.cos()) / theta
    v = torch.stack((torch.stack((sin, -cos), -1), torch.stack((cos, sin), -1)), -2)
    torch.testing.assert_close(exp(tau)[:, :2, 2:], v @ u, **DOUBLE)


@pytest.mark.parametrize("group", DIMENSIONS)
def test_the_exponential_of_the_opposite_undoes_it_and_parts_add_up(group):
    tau = elements(DIMENSIONS[group])
    eye = torch.eye(3, dtype=torch.float64).expand(len(tau), 3, 3)
    # Sizes of up to e³, times as many roundings.
    torch.testing.assert_close(exp(tau) @ exp(-tau), eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(exp(0.3 * tau) @ exp(0.7 * tau), exp(tau), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", DIMENSIONS)
def test_its_gradient_at_rest_is_the_algebra(group):
    size = DIMENSIONS[group]
    found = torch.autograd.functional.jacobian(exp, torch.zeros(size))
    expected = torch.stack([algebra(row) for row in torch.eye(size)], -1)
    torch.testing.assert_close(found, expected.to(found.dtype))
    assert found.isfinite().all()


def bar():
    """An image that is like none of its turns."""
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 3:20, 5:8] = 1
    image[0, 0, 17:20, 5:15] = 1
    return image


def test_a_quarter_turn_is_counter_clockwise_as_in_the_data(mnist_dir):
    image = bar()
    # Positions of up to 14 pixels, rounded in float32 four times, between pixels that differ by 1.
    tolerance = {"rtol": 0, "atol": 1e-5}
    turned = warped(image, exp(torch.tensor([[math.pi / 2]])))
    torch.testing.assert_close(turned[0, 0], torch.rot90(image[0, 0], 1, (0, 1)), **tolerance)
    source = MNISTPosedSequences(mnist_dir, "test")
    source.images = (255 * image[0]).byte()
    poses = torch.tensor([[[k, 0, 0, 0] for k in range(19)]])
    frames = source.render(torch.tensor([0]), poses)[0]
    angles = torch.tensor(source.factors[0].values).deg2rad()
    torch.testing.assert_close(warped(image.expand(19, -1, -1, -1), exp(angles[:, None])), frames, **tolerance)


def test_shifts_and_sizes_move_images_where_they_say():
    """`x(p) = y(exp(τ) p)`: by u the other way, by exp(-σ) larger."""
    image = bar()
    one = 2 / 28
    shifted = warped(image, exp(torch.tensor([[0.0, 3 * one, -2 * one]])))
    expected = torch.roll(image, (2, -3), (-2, -1))
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-5)
    square = torch.zeros(1, 1, 28, 28)
    square[..., 9:19, 9:19] = 1
    grown = warped(square, exp(torch.tensor([[0.0, 0, 0, -math.log(2)]])))
    assert grown.sum().item() == pytest.approx(400, rel=0.01)


def test_one_motion_after_the_other_is_their_product():
    """Of a smooth image, for each of the three warps interpolates: h² / 8 times both second derivatives."""
    pixels = 112
    x = torch.linspace(-3, 3, pixels, dtype=torch.float64)
    tolerance = 3 * (6 / (pixels - 1)) ** 2 / 8 * (4 + 2)
    image = torch.exp(-2 * (x - 0.3) ** 2 - (x[:, None] + 0.2) ** 2)[None, None]
    first, second = (exp(torch.tensor([tau])) for tau in ([0.4, 0.1, -0.1], [-0.9, 0.05, 0.1]))
    twice = warped(warped(image, first), second)
    torch.testing.assert_close(twice, warped(image, first @ second), rtol=0, atol=tolerance)
    assert (twice - warped(image, second @ first)).abs().max() > 10 * tolerance
