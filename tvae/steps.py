"""One step of training, sequences included: taken eagerly, with a compiled model, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.optim import Optimizer

from .data import SequenceStream
from .models import ELBO
from .presets import Precision, StepKind
from .run import RunError


def build_step(
    kind: StepKind,
    precision: Precision,
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer,
    stream: SequenceStream,
) -> Step:
    """The step of a kind, for a `VAE` and an optimiser that `fabric` has set up.

    Args:
        kind: "eager", one operation at a time; "compiled", the model by torch.compile; "graph", all of the step
            captured once as a CUDA graph and then replayed. They give the same within float32 rounding.
        precision: as in `Config`; for "tf32" call the step within `matmul_precision`.
        fabric: where.
        model: whose weights are trained.
        optimizer: of all of them.
        stream: the sequences.

    """
    return KINDS[kind](precision, fabric, model, optimizer, stream)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Meanwhile, PyTorch's setting for float32 matrix products, which is one for the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Step:
    """`step(i)` trains on batch number i, with noise from PyTorch's generators, and returns its ELBO, detached."""

    def __init__(
        self, precision: Precision, fabric: Fabric, model: nn.Module, optimizer: Optimizer, stream: SequenceStream
    ):
        self.autocast = torch.autocast(fabric.device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
        self.fabric = fabric
        self.model = model
        self.optimizer = optimizer
        self.stream = stream
        self.elbo: ELBO

    def __call__(self, i: int) -> ELBO:
        """All stages of step i."""
        for _ in self.stages(i):
            pass
        return self.elbo

    def stages(self, i: int) -> Iterator[str]:
        """The step, stage by stage; gives the name of each when it is done."""
        batch = self.stream[i]
        yield "data"
        yield from self.learn(batch.images, batch.axis)

    def learn(self, images: Tensor, axis: Tensor) -> Iterator[str]:
        """The stages after the data."""
        axis = self.model.module.told(axis)
        with self.autocast:  # and not by Fabric, which would round the images, too
            elbo = self.model(images, self.stream.part.start, self.stream.batch_size, axis)
        yield "forward"
        self.optimizer.zero_grad()
        self.fabric.backward(-elbo.total.mean())
        yield "backward"
        self.optimizer.step()
        self.model.module.project_weights()
        self.elbo = ELBO(*(x if x is None else x.detach() for x in elbo))
        yield "optimiser"


class CompiledStep(Step):
    """The model compiled by torch.compile, for the one shape that there is, with the noise of the eager model."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model.module.compile(dynamic=False, options={"fallback_random": True})

    def learn(self, images: Tensor, axis: Tensor) -> Iterator[str]:
        """The stages after the data; the first call compiles.

        Raises:
            RunError: the compiler fails, or there is none.

        """
        try:
            yield from super().learn(images, axis)
        except TorchDynamoException as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"torch.compile fails: {reason}; train with --step eager, which gives the same") from error


class GraphStep(Step):
    """All of the step but the draws of the data as one CUDA graph: the host launches once and waits for nothing.

    The first steps are taken eagerly: they warm up what must be warm in a capture, and make the optimiser's state. A
    replay reads the seed of the noise anew, so that the noise is that of an eager step.
    """

    EAGER_STEPS = 3

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.graph = Graph()
        self.taken = 0
        self.draws = tuple(x.to(self.fabric.device) for x in self.draw(0))

    def stages(self, i: int) -> Iterator[str]:
        """Two: the draws, which the host makes while the GPU takes the step before, and the replay of all others."""
        for x, drawn in zip(self.draws, self.draw(i), strict=True):
            x.copy_(drawn.pin_memory(), non_blocking=True)
        yield "data"
        if self.taken < self.EAGER_STEPS:
            self.graph.warm_up(self.train)
        else:
            if self.taken == self.EAGER_STEPS:
                self.capture()
            self.graph.replay()
        self.taken += 1
        yield "replay"

    def draw(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Examples (B,), factors (B, S, F) and axes (B,) of batch i, on the CPU."""
        examples, starts, transformation = self.stream.draw(i)
        source = self.stream.source
        return examples, source.advance(starts, transformation), source.axis(transformation)

    def train(self) -> None:
        """Render the sequences and learn from them."""
        examples, factors, axis = self.draws
        for _ in self.learn(self.stream.source.render(examples, factors), axis):
            pass

    def capture(self) -> None:
        """Capture `train`, of which nothing is computed yet."""
        adam = [group for group in self.optimizer.param_groups if "capturable" in group]
        for group in adam:
            group["capturable"] = True  # fused, it is, but says so only in a capture: else there would be warnings
        self.graph.capture(self.train)
        for group in adam:
            group["capturable"] = False


class Graph:
    """A CUDA graph, and a stream beside the current one on which it is warmed up and captured."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], object]) -> None:
        """Call the function on the stream, after all before and before all after."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def capture(self, function: Callable[[], object]) -> None:
        """Capture what the function does to tensors that keep their places; tensors that it makes are the graph's."""
        with torch.cuda.graph(self.graph, stream=self.stream):
            function()

    def replay(self) -> None:
        """Do it all again, with what is now in the places."""
        self.graph.replay()


KINDS = {"eager": Step, "compiled": CompiledStep, "graph": GraphStep}
