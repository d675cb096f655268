"""Cut a checkpoint and repair it on the way, one layer in memory at a time, without training.

One streamed pass over the teacher measures the activations of each layer, carries out the steps of REPAIRS on it and
writes the student's layer. The second moment of a layer's neurons takes hundreds of megabytes in a large model, so only
the moments of one layer are in memory, and none are stored.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitron.calibration.statistics import Statistics
from minitron.core.files import scratch_directory
from minitron.core.numerics import add_gram, matmul_precision
from minitron.model.architecture import TensorSpec
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass, Stream
from minitron.model.writing import SHARD_BYTES, write_checkpoint
from minitron.pruning.cut import (
    cut,
    embedding_gain,
    kept_rows,
    require_plan_for,
    sources_of,
    student_config,
    writing_order,
)
from minitron.pruning.importance import Scores
from minitron.pruning.plan import Plan
from minitron.pruning.repair import REPAIRS, Repair, Step, needed_steps, require_enough_tokens
from minitron.pruning.repair.columns import Surgeon
from minitron.pruning.repair.refit import Output, row_runs
from minitron.pruning.repair.residual_basis import Basis, Channels, Reads, Residual, read_norm


@dataclass(frozen=True)
class Repaired:
    """A student as it was written: its plan, with the units that repairs chose, and the sha256 of each weight file."""

    plan: Plan
    digests: dict[str, str]


@dataclass(frozen=True)
class Evidence:
    """The data that repairs are fitted to: statistics and scores of the teacher, and the calibration samples."""

    statistics: Statistics
    scores: Scores
    samples: Samples


def repaired_cut(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    steps: Sequence[Step],
    evidence: Evidence,
    pass_: Pass,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Repaired:
    """Write the pruned checkpoint into the existing directory `out`, with the repairs that `steps` names.

    Steps whose dims the plan does not cut do nothing.

    Args:
        steps: the repair steps, as `resolve_repair` returns them.

    Raises: PlanError if the family, the statistics or the number of tokens does not allow a step.

    Paper: beyond P1 and P2, except for residual heads (P1, "Obtaining a Pruned Model").
    """
    require_plan_for(checkpoint, plan)
    needed = needed_steps(steps, plan.teacher, plan.student)
    require_enough_tokens(needed, plan.teacher, evidence.samples.tokens.numel())
    rows = [row for step, row in REPAIRS.items() if step in needed]
    pass_ = replace(pass_, batch=pass_.batch_of(checkpoint.shape, evidence.samples))  # the same for both models
    residual: Residual = Channels(torch.tensor(plan.hidden))
    for row in rows:
        row.require(checkpoint.architecture, checkpoint.architecture.tied(checkpoint.config))
        if row.residual is not None:
            residual = row.residual(checkpoint, plan, evidence.statistics)

    def stream(model: Checkpoint, num_states: int = 1) -> Stream:
        return Stream(model, evidence.samples, pass_, num_states=num_states)

    first_rows = [row for row in rows if row.second_pass is None]
    second_passes = [row.second_pass for row in rows if row.second_pass is not None]
    with ExitStack() as stack:
        scratch = partial(scratch_directory, pass_.scratch or out.parent, prefix="minitron-unfitted-")
        outputs = [*(stack.enter_context(scratch()) for _ in second_passes), out]
        if first_rows:
            num_states = 2 if any(row.succeeds for row in first_rows) else 1
            work = _Repair(stream(checkpoint, num_states), plan, first_rows, residual, evidence.scores, pass_.progress)
            digests, plan = work.write(outputs[0], shard_bytes), work.plan
        else:
            digests = cut(checkpoint, plan, outputs[0], shard_bytes=shard_bytes)
        for second_pass, (before, after) in zip(second_passes, pairwise(outputs), strict=True):
            student = stream(open_checkpoint(before))
            output = Output(after, shard_bytes, pass_.progress)
            digests = second_pass(stream(checkpoint), student, plan, residual, output)
    return Repaired(plan, digests)


@dataclass
class _Seen:
    """The measurements of one layer, to which its repairs are fitted."""

    # Site -> the sum over tokens of the products of its inputs, in the upper triangle.
    products: dict[str, Float[Tensor, "columns columns"]] = field(default_factory=dict)
    # Of a layer that dropped ones follow: what they add to the stream times the inputs of the site that takes over,
    # the sum over tokens.
    missing: Float[Tensor, "hidden columns"] | None = None
    scales: dict[str, list[float]] = field(default_factory=dict)  # norm -> `scale_of`, a mean for each sample
    reads: dict[str, Reads] = field(default_factory=dict)  # norm -> of a residual basis, sums to fit its readers to
    readers: dict[str, Basis] = field(default_factory=dict)

    def scale(self, norm: str) -> float:
        """The mean over tokens; 1 where no step scales norms."""
        return sum(self.scales[norm]) / len(self.scales[norm]) if norm in self.scales else 1.0

    def reader(self, norm: str | None, residual: Residual) -> Residual:
        """What the matrices after a norm read through."""
        if norm is not None and norm in self.reads:
            self.readers[norm] = self.reads.pop(norm).reader(self.scale(norm))
        return self.readers.get(norm or "", residual)


class _Repair:
    """The streamed pass: it measures the teacher's layers and makes the student's tensors, layer by layer."""

    def __init__(
        self,
        stream: Stream,
        plan: Plan,
        rows: Sequence[Repair],
        residual: Residual,
        scores: Scores,
        progress: Callable[[int, int], None],
    ):
        self.stream, self.plan, self.residual, self.scores = stream, plan, residual, scores
        self.progress = progress
        self.checkpoint, self.architecture = stream.checkpoint, stream.checkpoint.architecture
        self.config = student_config(self.checkpoint, plan)
        self.tied = self.architecture.tied(self.checkpoint.config)
        specs = list(self.architecture.specs(self.config, plan.student.layers))
        # The student's tensor -> the teacher's tensor that it is cut from.
        self.sources = dict(zip((spec.name for spec in specs), sources_of(self.checkpoint, plan), strict=True))
        self.specs = writing_order(self.architecture, specs)
        self.norms = {norm.format(layer=layer) for norm in self.architecture.norms for layer in plan.layers}
        self.removals = {row.site: row.remove for row in rows if row.remove is not None}
        self.successor = next((row.site for row in rows if row.succeeds), None)
        self.changes = [(row.site, row.change) for row in rows if row.change is not None]
        self.norm_scale = next((row.norm_scale for row in rows if row.norm_scale is not None), None)
        self.held = residual.to(stream.device)

    def write(self, out: Path, shard_bytes: int) -> dict[str, str]:
        """Write the student into the existing directory `out`; returns the sha256 of each weight file."""
        with closing(self.pieces()) as pieces:
            return write_checkpoint(
                out,
                config=self.config,
                tensors={spec.name: (self.stored_dtype(spec), spec.shape(self.plan.student)) for spec in self.specs},
                pieces=pieces,
                carry_from=self.checkpoint.path,
                shard_bytes=shard_bytes,
            )

    def stored_dtype(self, spec: TensorSpec) -> torch.dtype:
        return self.checkpoint.stored[self.sources[spec.name]].written_dtype

    def pieces(self) -> Generator[Tensor, None, None]:
        """The tensors of `specs` in order and in their stored dtypes, whole or some rows at a time."""
        embedding, *after = (spec for spec in self.specs if spec.layer is None)
        yield from self._outside([embedding], _Seen())
        for index, seen in self._seen_in_layers():
            number = self.plan.layers.index(index)
            yield from self._layer(number, [spec for spec in self.specs if spec.layer == number], seen)
            self.progress(index + 1, self.plan.teacher.layers)
        self.progress(self.plan.teacher.layers, self.plan.teacher.layers)
        yield from self._outside(after, self._seen_at_the_end())

    def _seen_in_layers(self) -> Iterator[tuple[int, _Seen]]:
        """Yield the kept layers, by the teacher's numbers, each when what follows it is known."""
        if not self.removals and self.norm_scale is None and self.successor is None:
            yield from ((index, _Seen()) for index in self.plan.layers)
            return
        kept, num_layers = set(self.plan.layers), self.plan.teacher.layers
        self.stream.embed()
        before = self.stream.more_states() if self.successor is not None else None
        waiting: tuple[int, _Seen] | None = None  # a layer that dropped ones follow; `before` are the states before it
        for index, layer in self.stream.layers():
            if waiting is not None and index in kept:
                yield self._with_missing(*waiting, before)
                waiting = None
            seen = _Seen()
            is_followed = before is not None and index in kept and index + 1 < num_layers and index + 1 not in kept
            if before is not None and is_followed:
                before.copy_(self.stream.states)
                waiting = index, seen
            sites = set(self.removals) | ({self.successor} if self.successor and is_followed else set())
            with ExitStack() as stack:
                if index in kept:
                    self._watch(stack, index, layer, seen, sites)
                self.stream.advance(index, layer)
            if index in kept and not is_followed:
                yield index, seen
        if waiting is not None:
            yield self._with_missing(*waiting, before)

    def _with_missing(self, index: int, seen: _Seen, before: Tensor | None) -> tuple[int, _Seen]:
        """Run a kept layer once more, and compare its outputs with the stream after the dropped layers behind it.

        Args:
            before: the states before the layer; those of the stream are after the dropped layers.
        """
        assert self.successor is not None
        site = self.architecture.sites[self.successor].removeprefix(self.architecture.layer + ".")
        times = self.checkpoint.config.get(self.architecture.residual_multiplier, 1.0)
        inputs: list[Tensor] = []
        with self.stream.layer(index) as layer, ExitStack() as stack:
            module = layer.get_submodule(site)
            stack.callback(module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])).remove)
            for rows, _, after in self.stream.peek(index, layer, before):
                columns = inputs.pop()
                goal = self.stream.states[rows].to(after.device)
                _add_missing(seen, columns.flatten(0, 1), (goal.float() - after.float()).flatten(0, 1) / times)
        return index, seen

    def _watch(self, stack: ExitStack, index: int, layer: nn.Module, seen: _Seen, sites: Iterable[str]) -> None:
        prefix = self.architecture.layer + "."
        for name in self.architecture.norms:
            if "{layer}" in name:
                module = layer.get_submodule(name.removeprefix(prefix))
                self._watch_norm(stack, name.format(layer=index), module, seen)
        for site in sites:
            module = layer.get_submodule(self.architecture.sites[site].removeprefix(prefix))
            add = partial(_add_products, seen, site)
            stack.callback(module.register_forward_pre_hook(lambda _, args, add=add: add(args[0])).remove)

    def _watch_norm(self, stack: ExitStack, name: str, module: nn.Module, seen: _Seen) -> None:
        norm_scale = self.norm_scale
        if norm_scale is None:
            return

        def add(states: Float[Tensor, "samples tokens hidden"]) -> None:
            for sample in states:
                scales = norm_scale(self.held, sample, self.architecture.centred_norms)
                seen.scales.setdefault(name, []).append(scales.double().mean().item())
            if name in seen.reads:
                seen.reads[name].add(states)

        # An embedding that is the output projection too cannot be fitted as one.
        if isinstance(self.held, Basis) and not (self.tied and name == self.architecture.final_norm):
            seen.reads[name] = Reads(self.held, centred=self.architecture.centred_norms)

        stack.callback(module.register_forward_pre_hook(lambda _, args: add(args[0])).remove)

    def _seen_at_the_end(self) -> _Seen:
        seen = _Seen()
        if self.norm_scale is not None:
            with self.stream.final_norm() as norm, ExitStack() as stack:
                self._watch_norm(stack, self.architecture.final_norm, norm, seen)
                for _, states in self.stream.batches():
                    norm(states)
        return seen

    def _layer(self, number: int, specs: list[TensorSpec], seen: _Seen) -> Iterator[Tensor]:
        by_name, fitted = {spec.name: spec for spec in specs}, dict[str, Tensor]()
        for site in list(seen.products):
            name = f"{self.architecture.sites[site]}.weight".format(layer=number)
            surgeon = Surgeon(self.residual.write(self._teacher_tensor(by_name[name])), seen.products.pop(site))
            if site == self.successor and seen.missing is not None:
                surgeon.add(self.held.write(seen.missing))
            if site in self.removals:
                self.plan = self.plan.with_units(number, self.removals[site](surgeon, self.plan, number))
            fitted[name] = surgeon.weight.cpu()
        for spec in specs:
            tensor = fitted[spec.name] if spec.name in fitted else self._tensor(spec, seen)
            yield tensor.to(self.stored_dtype(spec))

    def _outside(self, specs: list[TensorSpec], seen: _Seen) -> Iterator[Tensor]:
        """The tensors outside the layers; tensors with a row for each token come some rows at a time."""
        for spec in specs:
            whole = [(0, self.checkpoint.stored[spec.name].shape[0])]
            for start, stop in row_runs(self.checkpoint, spec) if len(spec.axes) == 2 else whole:
                rows = self.checkpoint.read_rows(spec.name, start, stop)
                yield self._turned(spec, rows.float(), seen).to(self.stored_dtype(spec))

    def _teacher_tensor(self, spec: TensorSpec) -> Tensor:
        """The teacher's tensor for one of the student's inside a layer, with the changes of the steps."""
        assert spec.layer is not None
        tensor = self.checkpoint.read(self.sources[spec.name]).float()
        for site, change in self.changes:
            if spec.name.startswith(self.architecture.sites[site].format(layer=spec.layer) + "."):
                tensor = change(tensor, self.plan, spec.layer, self.scores)
        return tensor

    def _tensor(self, spec: TensorSpec, seen: _Seen) -> Tensor:
        tensor = self._teacher_tensor(spec)
        for axis, segments in enumerate(spec.axes):
            if segments[0].unit != "hidden":
                tensor = tensor.index_select(axis, kept_rows(segments, self.plan, spec.layer))
        return self._turned(spec, tensor, seen)

    def _turned(self, spec: TensorSpec, tensor: Tensor, seen: _Seen) -> Tensor:
        """A tensor with its hidden axis, if there is one, changed to the student's residual stream."""
        module, _, kind = self.sources[spec.name].rpartition(".")
        if spec.name == self.architecture.embedding:
            return self.residual.embed(tensor) * embedding_gain(self.checkpoint, self.plan)
        if spec.reads("hidden"):
            layer = None if spec.layer is None else self.plan.layers[spec.layer]
            norm = self.architecture.norm_before(module, layer)
            reader = seen.reader(norm, self.residual)
            return reader.read(tensor, None if norm is None else read_norm(self.checkpoint, norm))
        if module in self.norms:
            return self._norm_tensor(module, kind, seen.scale(module))
        return self.residual.write(tensor) if spec.axes[0][0].unit == "hidden" else tensor

    def _norm_tensor(self, name: str, kind: str, scale: float) -> Tensor:
        before_embedding = self.tied and name == self.architecture.final_norm
        if before_embedding:
            scale /= embedding_gain(self.checkpoint, self.plan)
        norm = self.residual.norm(read_norm(self.checkpoint, name), scale, tied=before_embedding)
        if kind == "bias":
            assert norm.bias is not None
            return norm.bias
        return norm.gain - self.architecture.norm_gain_offset


def _add_products(seen: _Seen, site: str, inputs: Float[Tensor, "samples tokens columns"]) -> None:
    rows = inputs.flatten(0, 1).float()
    if site not in seen.products:
        seen.products[site] = rows.new_zeros(rows.shape[1], rows.shape[1])
    add_gram(seen.products[site], rows, inputs.dtype)


def _add_missing(seen: _Seen, inputs: Float[Tensor, "tokens columns"], missing: Float[Tensor, "tokens hidden"]) -> None:
    if seen.missing is None:
        seen.missing = missing.new_zeros(missing.shape[1], inputs.shape[1])
    with matmul_precision(inputs.dtype):
        seen.missing.addmm_(missing.T, inputs.float())
