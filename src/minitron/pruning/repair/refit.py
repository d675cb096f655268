"""Refit the matrices of a pruned model layer by layer, on the inputs that they have in the pruned model.

Steps that are fitted to the teacher's activations see neither the errors of the student's earlier layers nor dropped
layers. Here both models run side by side, one layer at a time. A matrix that reads the residual stream is fitted to the
output of the teacher's matrix. A matrix that writes to the stream is fitted to the difference from the teacher's stream
at that point, after the layers that were dropped there. Each fit is a ridge regression with the matrix itself as prior.
This goes beyond the papers.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitron.core.errors import PlanError
from minitron.core.numerics import add_gram, matmul_precision, normalized
from minitron.model.architecture import Architecture, TensorSpec
from minitron.model.checkpoint import Checkpoint
from minitron.model.stream import Stream
from minitron.model.weights import runs
from minitron.model.writing import write_checkpoint
from minitron.pruning.cut import embedding_gain, kept_rows, writing_order
from minitron.pruning.plan import Plan
from minitron.pruning.repair.columns import correlation_factor
from minitron.pruning.repair.residual_basis import Residual, read_norm

# The weight of the prior relative to the mean square of each input.
PRIOR_WEIGHT = 0.01


def require_direct_writes(architecture: Architecture, tied: bool) -> None:
    """Raises: PlanError for a family that normalises the outputs of its matrices."""
    if architecture.channel_norms:
        norms = ", ".join(name.removesuffix(".weight") for name in architecture.channel_norms)
        raise PlanError(
            f"the matrices of {architecture.name} models cannot be fitted to the residual stream, for {norms} stand "
            "between: leave `layers_least_squares` and `refit` out of repair.steps"
        )


@dataclass(frozen=True)
class Output:
    """The existing directory for a student, and the function that is called with (layers done, layers)."""

    path: Path
    shard_bytes: int
    progress: Callable[[int, int], None]


def refit_layers(teacher: Stream, student: Stream, plan: Plan, residual: Residual, out: Output) -> dict[str, str]:
    """Write the refitted student; returns the sha256 of each weight file.

    Args:
        teacher, student: streams of the same tokens in the same batches, before `embed`.
        plan: the plan by which the student was cut.
        residual: the student's residual stream.
    """
    work = _Refit(teacher, student, plan, residual, out.progress)
    checkpoint = student.checkpoint
    with closing(work.pieces()) as pieces:
        return write_checkpoint(
            out.path,
            config=checkpoint.config,
            tensors={
                spec.name: (checkpoint.stored[spec.name].dtype, spec.shape(checkpoint.shape)) for spec in work.specs
            },
            pieces=pieces,
            carry_from=checkpoint.path,
            shard_bytes=out.shard_bytes,
        )


def row_runs(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in parts [start, stop), each of which is read at once."""
    stored = checkpoint.stored[spec.name]
    return runs(torch.arange(stored.shape[0]), stored.row_bytes)


@dataclass
class _Regression:
    """The sums of a ridge regression of errors on inputs, whose solution is added to a matrix."""

    # Sum of z z' [columns, columns], in the upper triangle.
    inputs: Tensor = field(default_factory=lambda: torch.zeros(()))
    errors: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum of e z' [rows, columns]

    def add(self, inputs: Float[Tensor, "tokens columns"], errors: Float[Tensor, "tokens rows"]) -> None:
        if self.inputs.ndim == 0:
            self.inputs = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)
            self.errors = inputs.new_zeros(errors.shape[1], inputs.shape[1], dtype=torch.float32)
        dtype, inputs, errors = inputs.dtype, inputs.float(), errors.float()
        add_gram(self.inputs, inputs, dtype)
        with matmul_precision(dtype):
            self.errors.addmm_(errors.T, inputs)

    def change(self) -> Float[Tensor, "rows columns"]:
        scale, factor = correlation_factor(self.inputs, PRIOR_WEIGHT)
        return torch.cholesky_solve((self.errors / scale).T, factor).T / scale


class _Refit:
    def __init__(
        self, teacher: Stream, student: Stream, plan: Plan, residual: Residual, progress: Callable[[int, int], None]
    ):
        self.teacher, self.student, self.plan, self.progress = teacher, student, plan, progress
        self.residual, self.held = residual, residual.to(student.device)
        self.checkpoint, self.architecture = student.checkpoint, student.checkpoint.architecture
        self.tied = self.architecture.tied(self.checkpoint.config)
        self.prefix = self.architecture.layer + "."
        self.attention, self.mlp = (
            (norm.removeprefix(self.prefix), reader.removeprefix(self.prefix))
            for norm, reader in self.architecture.norms.items()
            if "{layer}" in norm
        )
        # The output projection is fitted after all layers.
        self.specs = writing_order(self.architecture, list(self.checkpoint.specs()))
        self.added_times = self.checkpoint.config.get(self.architecture.residual_multiplier, 1.0)

    def pieces(self) -> Generator[Tensor, None, None]:
        """The tensors of `specs` in order."""
        embedding, *after = (spec for spec in self.specs if spec.layer is None)
        yield from self._with({}, [embedding])
        for number, changes in self._layers():
            yield from self._with(changes, [spec for spec in self.specs if spec.layer == number])
            self.progress(number + 1, self.plan.student.layers)
        yield from self._with(self._fit_the_end(), after)

    def _with(self, changes: dict[str, Tensor], specs: list[TensorSpec]) -> Iterator[Tensor]:
        for spec in specs:
            for start, stop in row_runs(self.checkpoint, spec):
                rows = self.checkpoint.read_rows(spec.name, start, stop)
                yield self._changed(spec, rows, start, changes).to(rows.dtype)

    def _changed(self, spec: TensorSpec, rows: Tensor, start: int, changes: dict[str, Tensor]) -> Tensor:
        if spec.name not in changes:
            return rows
        change = changes[spec.name]
        if spec.name == self.architecture.head:
            return rows.float() + rows.float() @ change
        return rows.float() + change[start : start + len(rows)]

    def _layers(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The number of each of the student's layers, and the changes of its matrices by name."""
        self.teacher.embed()
        self.student.embed()
        ends = [*self.plan.layers[1:], self.plan.teacher.layers]
        layers = self.teacher.layers()
        for number, layer in self.student.layers():
            for index, of_teacher in layers:
                if index == self.plan.layers[number]:
                    changes = self._before_the_end(number, layer, index, of_teacher)
                self.teacher.advance(index, of_teacher)
                if index + 1 == ends[number]:
                    break
            changes |= self._fit(number, layer, self._errors_at_the_end(number, layer))
            self.student.advance(number, layer)
            yield number, changes

    def _before_the_end(self, number: int, layer: nn.Module, index: int, of_teacher: nn.Module) -> dict[str, Tensor]:
        """Fit all matrices but the down projection, each after the matrices before it."""
        changes: dict[str, Tensor] = {}
        for reader in (self.attention[1], self.mlp[1]):
            names = [
                spec.name.split(f".{number}.", 1)[1].removesuffix(".weight")
                for spec in self.checkpoint.specs()
                if spec.layer == number and spec.reads("hidden") and f".{reader}." in spec.name
            ]
            errors = self._errors_of_readers(names, number, layer, index, of_teacher)
            changes |= self._fit(number, layer, errors)
            if reader == self.attention[1]:
                errors = self._errors_after_attention(number, layer, index, of_teacher)
                changes |= self._fit(number, layer, errors)
        return changes

    def _fit(
        self, number: int, layer: nn.Module, errors: Iterator[dict[str, tuple[Tensor, Tensor]]]
    ) -> dict[str, Tensor]:
        """Fit matrices to batches of (inputs, errors) by name; returns the changes by name, on the CPU."""
        # Matrices that read the same inputs share their products and are solved for together.
        sums: dict[tuple[str, ...], _Regression] = {}
        for batch in errors:
            for some in _by_inputs(batch):
                error = torch.cat([batch[name][1] for name in some], -1)
                sums.setdefault(some, _Regression()).add(batch[some[0]][0].flatten(0, 1), error.flatten(0, 1))
        changes = {}
        for some in list(sums):
            weights = [layer.get_submodule(name).get_parameter("weight") for name in some]
            of_each = sums.pop(some).change().split([len(weight) for weight in weights])
            for name, weight, change in zip(some, weights, of_each, strict=True):
                weight.add_(change)
                changes[f"{self.architecture.layer}.{name}.weight".format(layer=number)] = change.cpu()
        return changes

    def _errors_of_readers(
        self, names: list[str], number: int, layer: nn.Module, index: int, of_teacher: nn.Module
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        specs = {spec.name: spec for spec in self.checkpoint.specs() if spec.layer == number}
        prefix = f"{self.architecture.layer}.".format(layer=number)
        kept = {
            name: kept_rows(specs[f"{prefix}{name}.weight"].axes[0], self.plan, number).to(self.student.device)
            for name in names
        }
        with _tapped(layer, names) as ours, _tapped(of_teacher, names) as theirs:
            for _ in self._side_by_side(number, layer, index, of_teacher, names):
                yield {
                    name: (ours[name].input, theirs[name].output[..., kept[name]] - ours[name].output) for name in names
                }

    def _errors_after_attention(
        self, number: int, layer: nn.Module, index: int, of_teacher: nn.Module
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        writer, norm = self._writer("attention_out"), self.mlp[0]
        with _tapped(layer, [writer, norm]) as ours, _tapped(of_teacher, [norm]) as theirs:
            for _ in self._side_by_side(number, layer, index, of_teacher, [norm]):
                yield {writer: (ours[writer].input, self._gap(theirs[norm].input, ours[norm].input))}

    def _side_by_side(
        self, number: int, layer: nn.Module, index: int, of_teacher: nn.Module, names: list[str]
    ) -> Iterator[tuple[slice, slice]]:
        """Run both layers batch by batch until the named modules have run."""
        ours, theirs = ([one.get_submodule(name) for name in names] for one in (layer, of_teacher))
        yield from zip(
            self.student.peek_at(number, layer, ours), self.teacher.peek_at(index, of_teacher, theirs), strict=True
        )

    def _errors_at_the_end(self, number: int, layer: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        writer = self._writer("mlp_out")
        with _tapped(layer, [writer]) as ours:
            goals = self.teacher.batches()
            for (_, goal), (_, _, after) in zip(goals, self.student.peek(number, layer), strict=True):
                yield {writer: (ours[writer].input, self._gap(goal, after))}

    def _fit_the_end(self) -> dict[str, Tensor]:
        """Fit the output projection, or where it is tied, the gains of the final norm."""
        name, sums = self.architecture.final_norm, _Regression()
        with self.student.final_norm() as ours:
            # The output that the student's norm has on the teacher's stream.
            norm = self.residual.norm(read_norm(self.teacher.checkpoint, name), 1.0, tied=self.tied)
            gain = norm.gain.to(self.student.device)
            if self.tied:
                gain = gain / embedding_gain(self.teacher.checkpoint, self.plan)
            bias = 0 if norm.bias is None else norm.bias.to(self.student.device)
            for (_, goal), (_, states) in zip(self.teacher.batches(), self.student.batches(), strict=True):
                unit = normalized(goal.flatten(0, 1), centred=self.architecture.centred_norms)
                made = ours(states).flatten(0, 1)
                sums.add(made, gain * self.held.embed(unit) + bias - made.float())
        if not self.tied:
            return {self.architecture.head: sums.change().cpu()}
        energy = (1 + PRIOR_WEIGHT) * sums.inputs.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
        shares = sums.errors.diagonal() / energy
        stored = self.checkpoint.read(f"{name}.weight").float()
        return {f"{name}.weight": (stored + self.architecture.norm_gain_offset) * shares.cpu()}

    def _gap(self, goal: Tensor, states: Tensor) -> Tensor:
        """The difference between the teacher's stream, in the student's channels or directions, and the student's."""
        return (self.held.embed(goal.flatten(0, 1).float()).view(states.shape) - states.float()) / self.added_times

    def _writer(self, site: str) -> str:
        return self.architecture.sites[site].removeprefix(self.prefix)


def _by_inputs(batch: dict[str, tuple[Tensor, Tensor]]) -> list[tuple[str, ...]]:
    """The names of matrices whose inputs are the same tensor."""
    found: dict[int, list[str]] = {}
    for name, (inputs, _) in batch.items():
        found.setdefault(id(inputs), []).append(name)
    return [tuple(names) for names in found.values()]


class _Tap(NamedTuple):
    input: Tensor
    output: Tensor


@contextmanager
def _tapped(layer: nn.Module, names: list[str]) -> Iterator[dict[str, _Tap]]:
    """Record the latest input and output of some modules of a layer, by name."""
    taps: dict[str, _Tap] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        taps[name] = _Tap(args[0], output)

    with ExitStack() as stack:
        for name in names:
            stack.callback(layer.get_submodule(name).register_forward_hook(partial(record, name)).remove)
        yield taps
