"""Which squared activations `u²` share a denominator: the topography of the layer as one validated, hashable value."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args

Boundary = Literal["circular", "zero", "padded"]
Roots = Literal["one", "each axis"]
Roll = Literal["linear", "fourier"]


class Tap(NamedTuple):
    """One term of a window sum: `weight · x` of the element `time` frames and `offsets` positions further on.

    The offsets are real numbers, one for each axis of the capsule; `window` of them along the capsule do not depend on
    time, `roll` does. `root` and `number` say to which root the term belongs and which of the weights it has.
    """

    time: int
    roll: tuple[float, ...]
    window: tuple[int, ...]
    root: int
    number: int

    @property
    def offsets(self) -> tuple[float, ...]:
        """Add roll and window together."""
        return tuple(a + b for a, b in zip(self.roll, self.window, strict=True))

    @property
    def corners(self) -> list[tuple[float, tuple[int, ...]]]:
        """Return the whole offsets around it with their coefficients, exact ones: of the roll before it is moved."""
        return [(part, tuple(a + b for a, b in zip(o, self.window, strict=True))) for part, o in corners(self.roll)]


@dataclass(frozen=True)
class Neighborhood:
    """The taps `(i, k)` of the window sum `v[l, d] = Σ u[l + i, d + shift·i + k]²` of one capsule.

    Time offsets `i` cover `time_window` frames and capsule offsets `k` cover `capsule_window` positions, both around
    zero; an even window has its extra tap on the positive side (18 frames are -8 … +9). `shift` is how far the window
    moves along the capsule with each frame: 1 is the shifting temporal coherence of Topographic VAEs (Keller & Welling
    2021, Eq. 9), 0 the stationary one of BubbleVAE (Eq. 8). A `time_window` of 1 has no temporal coherence.

    With `axes` the positions of a capsule lie on a torus of up to three axes, the last one fastest. Then `d`, `shift`
    and `k` have one number for each axis, and there are two forms. "one" root: the window covers all axes at once, as
    in the 5 x 5 windows of section 6.2. A root for "each axis": one window an axis, which rolls along that axis alone,
    and the denominator is the sum of their roots (Eq. 21).

    Args:
        time_window: number of frames W in the window; at least 1. The paper's L is a part of S frames: W = 2·L·S.
        capsule_window: number of neighbouring positions K in the window; at least 1. One for each axis, or one for all.
        shift: positions the window moves along the capsule per frame; any integer, or a fraction, which interpolates
            as `roll` says. One for each axis, or one for all.
        causal: only past and present frames, `i = -(W - 1) … 0` (Eq. 22).
        time_boundary: "circular" wraps around the sequence; "zero" drops the taps that fall outside; with "padded" `u`
            has as many frames more at both ends as the windows reach, which are independent variables (appendix C.2).
        capsule_boundary: the same along the capsule, on every axis.
        axes: number of positions along each axis of a capsule; None is one axis of any length.
        roots: "one", or a root for "each axis".
        speeds: of each capsule, a factor of its shift; None is 1 for all.
        roll: for fractional shifts, "linear" interpolates `u²` between neighbours (Eq. 19); "fourier" shifts the phase
            of `u` (appendix C.1), before it is squared: the square of a band-limited signal is never negative, a
            band-limited square may be.

    Raises:
        TypeError: a value is not of its type.
        ValueError: a value is out of its range, or values do not fit each other.

    """

    time_window: int = 1
    capsule_window: int | tuple[int, ...] = 1
    shift: float | tuple[float, ...] = 1
    causal: bool = False
    time_boundary: Boundary = "circular"
    capsule_boundary: Boundary = "circular"
    axes: tuple[int, ...] | None = None
    roots: Roots = "one"
    speeds: tuple[float, ...] | None = None
    roll: Roll = "linear"

    def __post_init__(self):
        self._set("time_window", checked_count("time_window", self.time_window))
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be True or False, got {self.causal!r}")
        for name, kind in (
            ("time_boundary", Boundary),
            ("capsule_boundary", Boundary),
            ("roots", Roots),
            ("roll", Roll),
        ):
            if getattr(self, name) not in get_args(kind):
                choices = " or ".join(f'"{choice}"' for choice in get_args(kind))
                raise ValueError(f"{name} must be {choices}, got {getattr(self, name)!r}")
        if self.axes is not None:
            self._set("axes", tuple(checked_count("axes", size) for size in _numbers("axes", self.axes)))
            if not 1 <= len(self.axes) <= 3:
                raise ValueError(f"axes must be 1 to 3 numbers, got {self.axes}")
        self._set("capsule_window", self._for_each_axis("capsule_window", checked_count))
        self._set("shift", self._for_each_axis("shift", checked_number))
        if self.speeds is not None:
            self._set("speeds", tuple(checked_number("speeds", speed) for speed in _numbers("speeds", self.speeds)))
            if not self.speeds:
                raise ValueError("speeds must have a number for each capsule, got none")
        if self.roots == "each axis" and not self.is_multidimensional:
            raise ValueError(f'a root for "each axis" needs axes, got {self.axes}')
        if self.roll == "fourier" and (self.is_multidimensional or self.capsule_boundary != "circular"):
            raise ValueError('roll "fourier" needs capsules of one circular axis')
        self._derive()

    def _derive(self) -> None:
        """Make what follows from the fields once: it is asked for at every call, and a compiler cannot make it then."""
        padded = "padded" in (self.time_boundary, self.capsule_boundary)
        whole = not self.is_multidimensional and isinstance(self.shift, int) and self.speeds is None
        self._set("_plain", whole and not padded)
        self._set("_text", json.dumps(self._values()))
        self._set("_hash", hash(tuple(self._values().values())))
        roots = range(self.root_count if self.root_count > 1 else 0)
        self._set("_by_axis", tuple(self._of_axis(axis) for axis in roots))
        by_speed = {speed: self._of_speed(speed) for speed in set(self.speeds or ())}
        self._set("_by_capsule", tuple(by_speed[speed] for speed in self.speeds or ()))
        is_open = self.time_boundary == "padded"
        self._set("_with_padded_time", self if is_open else replace(self, time_boundary="padded"))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict:
        return self._values()

    def __setstate__(self, state: dict) -> None:
        # Whatever else a pickle of another version holds, it holds the fields.
        self.__init__(**{name: value for name, value in state.items() if name in self.__dataclass_fields__})

    def _values(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    def _for_each_axis(self, name: str, convert) -> object:
        """Return the field as one number, or for several axes as a tuple of as many."""
        value, count = getattr(self, name), len(self.axes or (0,))
        if isinstance(value, Iterable) and not isinstance(value, str):
            value = tuple(value)
            values = tuple(convert(name, x) for x in value)
            if len(values) != count:
                raise ValueError(f"{name} must be one number or {count}, one for each axis; got {value}")
        else:
            values = (convert(name, value),) * count
        return values if count > 1 else values[0]

    # --- what the layer and its backends ask --------------------------------------------------------------------------

    @property
    def is_multidimensional(self) -> bool:
        """Say whether capsules have more than one axis."""
        return self.axes is not None and len(self.axes) > 1

    @property
    def is_plain(self) -> bool:
        """Say whether the window moves by whole positions along one axis, alike in all capsules; `u` is like `z`."""
        return self._plain

    @property
    def by_phase(self) -> bool:
        """Say whether the window rolls by phase shifts of `u`; where it is plain, whole rolls are the same."""
        return self.roll == "fourier" and not self._plain

    @property
    def text(self) -> str:
        """Return the fields as JSON, from which `read` makes an equal neighbourhood."""
        return self._text

    @property
    def with_padded_time(self) -> Neighborhood:
        """Return the same window where the frames of `u` around those of `z` are known."""
        return self._with_padded_time

    @property
    def time_taps(self) -> range:
        """Return the time offsets `i`, in frames, lowest first."""
        last = 0 if self.causal else self.time_window // 2
        return range(last - self.time_window + 1, last + 1)

    @property
    def capsule_taps(self) -> range:
        """Return the capsule offsets `k` along the only axis, in positions, lowest first."""
        return _centred(self.capsule_window)

    @property
    def root_count(self) -> int:
        """Return the number of roots R whose sum is the denominator."""
        return len(self.axes) if self.roots == "each axis" else 1

    @property
    def weights_shape(self) -> tuple[int, ...]:
        """Return the shape of the weights: `(W, K)`; `(W, K1, K2, …)` for axes; `(W, K1 + …)` with a root for each."""
        windows = self.capsule_window if self.is_multidimensional else (self.capsule_window,)
        return (self.time_window, sum(windows)) if self.roots == "each axis" else (self.time_window, *windows)

    def lengths(self, dim: int) -> tuple[int, ...]:
        """Positions along each axis of capsules of `dim` positions."""
        return (dim,) if self.axes is None else self.axes

    def of_capsule(self, c: int) -> Neighborhood:
        """Return the neighbourhood of one capsule, which has its own speed; speeds take turns where there are fewer."""
        return self if self.speeds is None else self._by_capsule[c % len(self.speeds)]

    def _of_speed(self, speed: float) -> Neighborhood:
        shift = self.shift if self.is_multidimensional else (self.shift,)
        shift = tuple(s * speed for s in shift)
        return replace(self, speeds=None, shift=shift if self.is_multidimensional else shift[0])

    def along(self, axis: int) -> Neighborhood:
        """Return the neighbourhood of a sequence known to roll along one axis: its window alone, under one root.

        Raises:
            ValueError: there is no such axis, or no root for each.

        """
        if not isinstance(axis, Integral) or isinstance(axis, bool) or not 0 <= axis < len(self._by_axis):
            raise ValueError(f"axis must be one of those that have a root each, got {axis!r} for {self}")
        return self._by_axis[axis]

    def _of_axis(self, axis: int) -> Neighborhood:
        keep = [a == axis for a in range(len(self.axes))]
        window = tuple(k if kept else 1 for k, kept in zip(self.capsule_window, keep, strict=True))
        shift = tuple(s if kept else 0 for s, kept in zip(self.shift, keep, strict=True))
        return replace(self, roots="one", capsule_window=window, shift=shift)

    def taps(self, speed: float = 1) -> Iterator[Tap]:
        """All terms of the window sums, by root, of a capsule of some speed."""
        windows = self.capsule_window if self.is_multidimensional else (self.capsule_window,)
        shift = self.shift if self.is_multidimensional else (self.shift,)
        axes = range(len(windows))
        columns, first = [], 0  # root, offsets along the capsule, axes that roll, number of the weight in its row
        if self.roots == "one":
            for k in itertools.product(*map(_centred, windows)):
                columns.append((0, k, axes, len(columns)))
        else:
            for axis in axes:
                for number, k in enumerate(_centred(windows[axis])):
                    window = tuple(k if a == axis else 0 for a in axes)
                    columns.append((axis, window, (axis,), first + number))
                first += windows[axis]
        for root in range(self.root_count):
            for row, i in enumerate(self.time_taps):
                for tap_root, window, rolling, column in columns:
                    if tap_root == root:
                        # rounded, so that sums of decimal fractions are whole where they should be
                        roll = tuple(round(shift[a] * speed * i, 12) if a in rolling else 0 for a in axes)
                        yield Tap(i, roll, window, root, row * len(columns) + column)

    def padding(self) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
        """How many frames, and positions along each axis, `u` has more than `z` before and after it."""
        count = len(self.axes) if self.is_multidimensional else 1
        time, capsule = (0, 0), ((0, 0),) * count
        if self.time_boundary == "padded":
            time = -self.time_taps[0], self.time_taps[-1]
        if self.capsule_boundary == "padded":
            shift = self.shift if self.is_multidimensional else (self.shift,)
            windows = self.capsule_window if self.is_multidimensional else (self.capsule_window,)
            capsule = tuple(self._reach(s, _centred(k)) for s, k in zip(shift, windows, strict=True))
        return time, capsule

    def _reach(self, shift: float, window: range) -> tuple[int, int]:
        """How many positions before a capsule, and after it, a window gets to along one axis, at its ends in time."""
        ends = self.time_taps[0], self.time_taps[-1]
        rolls = [round(shift * speed * i, 12) for speed in set(self.speeds or (1,)) for i in ends]
        return -math.floor(min(rolls) + window[0]), math.ceil(max(rolls) + window[-1])

    def within(self, steps: int, dim: int) -> Neighborhood:
        """Return the window without taps that are outside for every element of capsules of `dim` positions.

        It is centred as this one is: of its weights those in the middle are left, and where it is causal the last rows.
        Where capsules are padded all are kept: how long `u` is follows from them.
        """
        if "zero" not in (self.time_boundary, self.capsule_boundary) or self.capsule_boundary == "padded":
            return self
        time, windows = self.time_window, self.capsule_window if self.is_multidimensional else (self.capsule_window,)
        if self.time_boundary == "zero":
            time = min(time, max(1, steps if self.causal else 2 * steps - 1))
        lengths = self.lengths(dim)
        if time == self.time_window and all(k < 2 * n for k, n in zip(windows, lengths, strict=True)):
            return self
        return _without_outside(self, time, lengths)

    def shape_of_u(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return the shape of `u` for a `z` of shape `(B, S, C, D)`: the same but where a boundary is padded."""
        batch, steps, capsules, dim = shape
        if self.time_boundary != "padded" and self.capsule_boundary != "padded":
            return batch, steps, capsules, dim
        (before, after), capsule = self.padding()
        lengths = self.lengths(dim)
        padded = math.prod([n + sum(padding) for n, padding in zip(lengths, capsule, strict=True)])
        return batch, before + steps + after, capsules, padded

    def check_fits(self, time: int, dim: int, capsules: int | None = None) -> None:
        """Refuse capsules of another shape, and a circular window longer than its axis: it would count elements twice.

        Args:
            time: length S of the sequence.
            dim: number D of positions in a capsule.
            capsules: number C of capsules, if it is known.

        Raises:
            ValueError: naming what does not fit what.

        """
        if self.axes is not None and math.prod(self.axes) != dim:
            raise ValueError(f"axes {self.axes} have {math.prod(self.axes)} positions, but a capsule has {dim}")
        if capsules is not None and self.speeds is not None and len(self.speeds) != capsules:
            raise ValueError(f"there are {len(self.speeds)} speeds for {capsules} capsules")
        if self.time_boundary == "circular" and self.time_window > time:
            raise ValueError(f"a circular time_window of {self.time_window} does not fit {time} time steps")
        if self.capsule_boundary == "circular":
            windows = self.capsule_window if self.is_multidimensional else (self.capsule_window,)
            for window, size in zip(windows, self.lengths(dim), strict=True):
                if window > size:
                    raise ValueError(
                        f"a circular capsule_window of {window} does not fit {size} positions in a capsule"
                    )


@lru_cache(maxsize=1024)
def _without_outside(n: Neighborhood, time_window: int, lengths: tuple[int, ...]) -> Neighborhood:
    shorter = replace(n, time_window=time_window)
    windows = n.capsule_window if n.is_multidimensional else (n.capsule_window,)
    if n.capsule_boundary == "zero":
        shift = n.shift if n.is_multidimensional else (n.shift,)
        reach = [size - 1 + max(shorter._reach(s, range(1))) for size, s in zip(lengths, shift, strict=True)]
        windows = tuple(max(1, min(k, 2 * most + 1)) for k, most in zip(windows, reach, strict=True))
    shorter = replace(shorter, capsule_window=windows if n.is_multidimensional else windows[0])
    return n if shorter == n else shorter


@lru_cache(maxsize=1024)
def read(text: str) -> Neighborhood:
    """Return the neighbourhood of its `text`, parsed once: the text stands for it where operators take no objects."""
    return Neighborhood(**json.loads(text))


def corners(offsets: tuple[float, ...]) -> list[tuple[float, tuple[int, ...]]]:
    """Real offsets as whole ones with the coefficients of their linear interpolation, along each axis (Eq. 19)."""
    axes = []
    for offset in offsets:
        low = math.floor(offset)
        above = offset - low
        # each coefficient by one subtraction: 1 - above would keep the rounding error of a sum with a whole number
        axes.append([(low + 1 - offset, low), (above, low + 1)] if above else [(1.0, low)])
    return [(math.prod([c for c, _ in x]), tuple([o for _, o in x])) for x in itertools.product(*axes)]


def _centred(window: int) -> range:
    last = window // 2
    return range(last - window + 1, last + 1)


def _numbers(name: str, value: object) -> tuple:
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise TypeError(f"{name} must be a tuple of numbers, got {value!r}")
    return tuple(value)


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        hint = ": of sequences of S frames the paper's L is a window of W = 2·L·S" if name == "time_window" else ""
        raise TypeError(f"{name} must be an integer, got {value!r}{hint}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def checked_count(name: str, value: object) -> int:
    """Return an integer of at least 1.

    Raises:
        TypeError: it is no integer.
        ValueError: it is less.

    """
    _check_integer(name, value, 1)
    return int(value)


def checked_number(name: str, value: object) -> int | float:
    """Return a number that is finite, as an int where it is whole, so that equal neighbourhoods are equal.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not finite.

    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return int(value) if value == int(value) else float(value)
