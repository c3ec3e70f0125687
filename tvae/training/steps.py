"""One step of training, sequences included: taken eagerly, with a compiled model, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..config import Precision, StepKind
from ..data import SequenceBatch, SequenceStream
from ..models import ELBO
from .run import RunError

Mark = Callable[[str], object]


def unmarked(stage: str) -> None:
    """Do nothing at the end of a stage: nobody measures."""


def build_step(
    kind: StepKind,
    precision: Precision,
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer,
    stream: SequenceStream,
    mark: Mark = unmarked,
) -> Step:
    """Make the step of a kind, for a model and an optimiser that `fabric` has set up.

    Args:
        kind: "eager", one operation at a time; "compiled", the model by torch.compile; "graph", all of the step
            captured once as a CUDA graph and then replayed. They give the same within float32 rounding.
        precision: as in `Config`; for "tf32" call the step within `matmul_precision`.
        fabric: where.
        model: whose weights are trained.
        optimizer: of all of them.
        stream: the sequences.
        mark: called with the name of every stage of a step at its end, to measure them.

    """
    return KINDS[kind](precision, fabric, model, optimizer, stream, mark)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Change meanwhile PyTorch's setting for float32 matrix products, which is one for the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Step:
    """`step(i)` trains on batch number i, with noise from PyTorch's generators, and returns its ELBO, detached."""

    def __init__(
        self,
        precision: Precision,
        fabric: Fabric,
        model: nn.Module,
        optimizer: Optimizer,
        stream: SequenceStream,
        mark: Mark = unmarked,
    ):
        self.autocast = torch.autocast(fabric.device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
        self.fabric = fabric
        self.model = model
        self.optimizer = optimizer
        self.stream = stream
        self.mark = mark

    def __call__(self, i: int) -> ELBO:
        """Take step i: data, forward, backward, optimiser."""
        batch = self.stream[i]
        self.mark("data")
        return self.learn(batch, self.mark)

    def learn(self, batch: SequenceBatch, mark: Mark) -> ELBO:
        """Take the stages after the data."""
        with self.autocast:  # and not by Fabric, which would round the images, too
            elbo = self.model(batch)
        mark("forward")
        self.optimizer.zero_grad()
        self.fabric.backward(-elbo.objective.mean())
        mark("backward")
        self.optimizer.step()
        self.model.module.project_weights()
        mark("optimiser")
        return tree_map_only(Tensor, Tensor.detach, elbo)


class CompiledStep(Step):
    """The model compiled by torch.compile, for the one shape that there is, with the noise of the eager model."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model.module.compile(dynamic=False, options={"fallback_random": True})

    def learn(self, batch: SequenceBatch, mark: Mark) -> ELBO:
        """Take the stages after the data; the first call compiles.

        Raises:
            RunError: the compiler fails, or there is none.

        """
        try:
            return super().learn(batch, mark)
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
        self.drawn = tuple(None if x is None else x.to(self.fabric.device) for x in self.draw(0))
        self.elbo: ELBO

    def __call__(self, i: int) -> ELBO:
        """Draw, while the GPU takes the step before, and replay all else."""
        for place, drawn in zip(self.drawn, self.draw(i), strict=True):
            if place is not None:
                place.copy_(drawn.pin_memory(), non_blocking=True)
        self.mark("data")
        if self.taken < self.EAGER_STEPS:
            self.graph.warm_up(self.train)
        else:
            if self.taken == self.EAGER_STEPS:
                self.capture()
            self.graph.replay()
        self.taken += 1
        self.mark("replay")
        return self.elbo

    def draw(self, i: int) -> tuple[Tensor | None, ...]:
        """Draw examples (B,), factors (B, S, F), and what else is known of batch i, on the CPU."""
        examples, *poses = self.stream.draw(i)
        return examples, *self.stream.source.describe(examples, *poses)

    def train(self) -> None:
        """Render the sequences and learn from them."""
        examples, factors, *known = self.drawn
        source, part = self.stream.source, self.stream.part
        images = source.render(examples, factors)
        batch = SequenceBatch(
            images, factors if source.factors else None, *known, first=part.start, total=self.stream.batch_size
        )
        self.elbo = self.learn(batch, unmarked)  # no marks: a capture would hold them

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
