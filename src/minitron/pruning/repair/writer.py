"""Cut a checkpoint and repair it on the way: closed-form compensation, one layer in memory at a time, no training.

One streamed pass over the teacher, with the plan known, collects what each layer's repair is fitted to, and writes the
student's layer. A matrix of products of a layer's neurons is hundreds of megabytes in a large model, so there is one at
a time, and none is stored.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitron.calibration.statistics import Statistics, require_second_moment
from minitron.core.files import scratch_directory
from minitron.core.numerics import matmul_precision
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
from minitron.pruning.given import Units
from minitron.pruning.importance import Scores
from minitron.pruning.plan import Plan
from minitron.pruning.repair.columns import Surgeon
from minitron.pruning.repair.config import REPAIRS, Step, needed_steps, replaces_channels, require_enough_tokens
from minitron.pruning.repair.refit import refit, row_runs
from minitron.pruning.repair.residual_basis import (
    Channels,
    Residual,
    read_norm,
    require_basis,
    residual_basis,
    scale_of,
)


@dataclass(frozen=True)
class Repaired:
    """What a repaired cut made."""

    plan: Plan  # with the units that the repair chose
    digests: dict[str, str]  # sha256 of each file of weights


@dataclass(frozen=True)
class Evidence:
    """What a repair is fitted to.

    statistics, scores: those that the plan was made from.
    samples: calibration samples, whose activations are read.
    """

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

    Steps that repair what the plan does not cut do nothing.

    Args:
        steps: such as `resolve` gives.

    Raises: PlanError if the family, the statistics or the number of tokens does not allow a step.

    Paper: beyond P1 and P2, but for residual heads (P1, "Obtaining a Pruned Model").
    """
    require_plan_for(checkpoint, plan)
    needed = needed_steps(steps, plan)
    if not needed:
        return Repaired(plan, cut(checkpoint, plan, out, shard_bytes=shard_bytes))
    require_enough_tokens(needed, plan, evidence.samples.tokens.numel())
    residual, scores, progress = (
        _residual(checkpoint, plan, needed, evidence.statistics),
        evidence.scores,
        pass_.progress,
    )
    pass_ = replace(pass_, batch=pass_.batch_of(checkpoint.shape, evidence.samples))  # the same for both models

    def stream(model: Checkpoint) -> Stream:
        return Stream(model, evidence.samples, pass_)

    if "refit" not in needed:
        return _cut(stream(checkpoint), plan, out, needed, residual, scores, shard_bytes, progress)
    with scratch_directory(pass_.scratch or out.parent, prefix="minitron-unfitted-") as path:
        steps = [step for step in needed if step != "refit"]
        made = _cut(stream(checkpoint), plan, path, steps, residual, scores, shard_bytes, progress)
        unfitted = stream(open_checkpoint(path))
        options: dict[str, Any] = {"shard_bytes": shard_bytes, "progress": progress}
        digests = refit(stream(checkpoint), unfitted, made.plan, residual, out, **options)
    return Repaired(made.plan, digests)


def _cut(
    stream: Stream,
    plan: Plan,
    out: Path,
    steps: Sequence[Step],
    residual: Residual,
    scores: Scores,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> Repaired:
    """One streamed pass over the teacher, or a plain cut where there are no steps."""
    checkpoint = stream.checkpoint
    if not steps:
        return Repaired(plan, cut(checkpoint, plan, out, shard_bytes=shard_bytes))
    work = _Repair(stream, plan, frozenset(steps), residual, scores, progress)
    with closing(work.pieces()) as pieces:
        digests = write_checkpoint(
            out,
            config=work.config,
            tensors={spec.name: (work.stored_dtype(spec), spec.shape(plan.student)) for spec in work.specs},
            pieces=pieces,
            carry_from=checkpoint.path,
            shard_bytes=shard_bytes,
        )
    return Repaired(work.plan, digests)


def _residual(checkpoint: Checkpoint, plan: Plan, steps: Sequence[Step], statistics: Statistics) -> Residual:
    if not replaces_channels(steps):
        return Channels(torch.tensor(plan.hidden))
    architecture, tied = checkpoint.architecture, checkpoint.architecture.tied(checkpoint.config)
    require_basis(architecture, tied=tied)
    require_second_moment(statistics)
    assert statistics.second_moment is not None
    return residual_basis(
        statistics.second_moment,
        plan.student.hidden,
        centred=architecture.centred_norms,
        tied=read_norm(checkpoint, architecture.final_norm) if tied else None,
    )


@dataclass
class _Seen:
    """What was seen of a layer: what its repair is fitted to."""

    products: dict[str, Float[Tensor, "columns columns"]] = field(default_factory=dict)  # site -> sum over tokens
    scales: dict[str, list[float]] = field(default_factory=dict)  # norm -> `scale_of`, a mean for each sample

    def scale(self, norm: str) -> float:
        """Mean over tokens; 1 where none was looked for."""
        return sum(self.scales[norm]) / len(self.scales[norm]) if norm in self.scales else 1.0


class _Repair:
    """The student's tensors, layer by layer."""

    def __init__(
        self,
        stream: Stream,
        plan: Plan,
        steps: frozenset[Step],
        residual: Residual,
        scores: Scores,
        progress: Callable[[int, int], None],
    ):
        self.stream, self.plan, self.steps, self.residual, self.scores = stream, plan, steps, residual, scores
        self.progress = progress
        self.checkpoint, self.architecture = stream.checkpoint, stream.checkpoint.architecture
        self.config = student_config(self.checkpoint, plan)
        specs = list(self.architecture.specs(self.config, plan.student.layers))
        # The student's tensor -> the teacher's behind it.
        self.sources = dict(zip((spec.name for spec in specs), sources_of(self.checkpoint, plan), strict=True))
        self.specs = writing_order(self.architecture, specs)
        self.norms = {norm.format(layer=layer) for norm in self.architecture.norms for layer in plan.layers}
        of_steps = [repair.site for step, repair in REPAIRS.items() if step in steps]
        self.sites = [site for site in dict.fromkeys(of_steps) if site is not None]
        self.scaled = any(REPAIRS[step].scales for step in steps)
        self.held = residual.to(stream.device)

    def stored_dtype(self, spec: TensorSpec) -> torch.dtype:
        return self.checkpoint.stored[self.sources[spec.name]].dtype

    def pieces(self) -> Generator[Tensor, None, None]:
        """The tensors of `specs` in order, in the dtypes that they are stored in, whole or in runs of rows."""
        embedding, *after = (spec for spec in self.specs if spec.layer is None)
        yield from self._outside([embedding], _Seen())
        for index, seen in self._seen_in_layers():
            if index in self.plan.layers:
                number = self.plan.layers.index(index)
                yield from self._layer(number, [spec for spec in self.specs if spec.layer == number], seen)
            self.progress(index + 1, self.plan.teacher.layers)
        yield from self._outside(after, self._seen_at_the_end())

    def _seen_in_layers(self) -> Iterator[tuple[int, _Seen]]:
        if not self.sites and not self.scaled:
            yield from ((index, _Seen()) for index in self.plan.layers)
            return
        self.stream.embed()
        for index, layer in self.stream.layers():
            seen = _Seen()
            with ExitStack() as stack:
                if index in self.plan.layers:
                    self._watch(stack, index, layer, seen)
                for _ in self.stream.run(index, layer):
                    pass
            yield index, seen

    def _watch(self, stack: ExitStack, index: int, layer: nn.Module, seen: _Seen) -> None:
        prefix = self.architecture.layer + "."
        for name in self.architecture.norms:
            if "{layer}" in name:
                module = layer.get_submodule(name.removeprefix(prefix))
                self._watch_norm(stack, name.format(layer=index), module, seen)
        for site in self.sites:
            module = layer.get_submodule(self.architecture.sites[site].removeprefix(prefix))
            add = partial(_add_products, seen, site)
            stack.callback(module.register_forward_pre_hook(lambda _, args, add=add: add(args[0])).remove)

    def _watch_norm(self, stack: ExitStack, name: str, module: nn.Module, seen: _Seen) -> None:
        def add(states: Float[Tensor, "samples tokens hidden"]) -> None:
            for sample in states:
                scales = scale_of(self.held, sample, centred=self.architecture.centred_norms)
                seen.scales.setdefault(name, []).append(scales.double().mean().item())

        if self.scaled:
            stack.callback(module.register_forward_pre_hook(lambda _, args: add(args[0])).remove)

    def _seen_at_the_end(self) -> _Seen:
        seen = _Seen()
        if self.scaled:
            with self.stream.final_norm() as norm, ExitStack() as stack:
                self._watch_norm(stack, self.architecture.final_norm, norm, seen)
                for _, states in self.stream.batches():
                    norm(states)
        return seen

    def _layer(self, number: int, specs: list[TensorSpec], seen: _Seen) -> Iterator[Tensor]:
        mended = {}
        for site, mend in (("mlp_out", self._mend_mlp), ("attention_out", self._mend_attention)):
            if site in seen.products:
                name = f"{self.architecture.sites[site]}.weight"
                writer = self.checkpoint.read(name.format(layer=self.plan.layers[number])).float()
                surgeon = Surgeon(self.residual.write(writer), seen.products.pop(site))
                mend(number, surgeon)
                mended[name.format(layer=number)] = surgeon.weight.cpu()
        for spec in specs:
            tensor = mended[spec.name] if spec.name in mended else self._tensor(spec, seen)
            yield tensor.to(self.stored_dtype(spec))

    def _mend_mlp(self, number: int, surgeon: Surgeon) -> None:
        if "ffn_obs" in self.steps:
            surgeon.eliminate(self.plan.teacher.ffn - self.plan.student.ffn)
            self._replace_units("ffn", number, surgeon.kept)
        else:
            surgeon.remove(_others(self.plan.ffn[number], self.plan.teacher.ffn))

    def _mend_attention(self, number: int, surgeon: Surgeon) -> None:
        teacher, student = self.plan.teacher, self.plan.student
        if "heads_obs" in self.steps:
            kv_heads = surgeon.keep_blocks(range(teacher.kv_heads), student.kv_heads, teacher.group * teacher.head_dim)
            groups = [range(kv * teacher.group, (kv + 1) * teacher.group) for kv in kv_heads]
            heads = [surgeon.keep_blocks(group, student.group, teacher.head_dim) for group in groups]
            self._replace_units("kv_heads", number, kv_heads)
            self._replace_units("heads", number, tuple(head for group in heads for head in group))
        else:
            dropped = _others(self.plan.heads[number], teacher.heads)
            surgeon.remove((dropped[:, None] * teacher.head_dim + torch.arange(teacher.head_dim)).flatten())

    def _replace_units(self, dim: Literal["ffn", "heads", "kv_heads"], number: int, units: Units) -> None:
        of_layers: list[Units] = list(getattr(self.plan, dim))
        of_layers[number] = units
        changes: dict[str, Any] = {dim: tuple(of_layers)}
        self.plan = replace(self.plan, **changes)

    def _outside(self, specs: list[TensorSpec], seen: _Seen) -> Iterator[Tensor]:
        """The tensors outside of the layers; those with a row for each token in runs of rows."""
        for spec in specs:
            whole = [(0, self.checkpoint.stored[spec.name].shape[0])]
            for start, stop in row_runs(self.checkpoint, spec) if len(spec.axes) == 2 else whole:
                rows = self.checkpoint.read_rows(spec.name, start, stop)
                yield self._turned(spec, rows.float(), seen).to(rows.dtype)

    def _tensor(self, spec: TensorSpec, seen: _Seen) -> Tensor:
        """One of the student's tensors inside a layer."""
        tensor = self.checkpoint.read(self.sources[spec.name]).float()
        if "residual_heads" in self.steps:
            tensor = self._with_residual_heads(spec, tensor)
        for axis, segments in enumerate(spec.axes):
            if segments[0].unit != "hidden":
                tensor = tensor.index_select(axis, kept_rows(segments, self.plan, spec.layer))
        return self._turned(spec, tensor, seen)

    def _turned(self, spec: TensorSpec, tensor: Tensor, seen: _Seen) -> Tensor:
        """A tensor with its hidden axis, if it has one, in the student's stream."""
        module, _, kind = self.sources[spec.name].rpartition(".")
        if spec.name == self.architecture.embedding:
            return self.residual.embed(tensor) * embedding_gain(self.checkpoint, self.plan)
        if spec.reads("hidden"):
            layer = None if spec.layer is None else self.plan.layers[spec.layer]
            norm = self.architecture.norm_before(module, layer)
            return self.residual.read(tensor, None if norm is None else read_norm(self.checkpoint, norm))
        if module in self.norms:
            return self._norm_tensor(module, kind, seen.scale(module))
        return self.residual.write(tensor) if spec.axes[0][0].unit == "hidden" else tensor

    def _norm_tensor(self, name: str, kind: str, scale: float) -> Tensor:
        before_embedding = name == self.architecture.final_norm and self.architecture.tied(self.checkpoint.config)
        if before_embedding:
            scale /= embedding_gain(self.checkpoint, self.plan)
        norm = self.residual.norm(read_norm(self.checkpoint, name), scale, tied=before_embedding)
        if kind == "bias":
            assert norm.bias is not None
            return norm.bias
        return norm.gain - self.architecture.norm_gain_offset

    def _with_residual_heads(self, spec: TensorSpec, tensor: Tensor) -> Tensor:
        """Query heads that stay, plus what sets them apart from those that go: the last kept in rank with the first
        dropped, and so on outwards (P1). Queries only: a key-value head has no other to take over from."""
        reader = self.architecture.sites["attention_in"].format(layer=spec.layer)
        if not spec.name.startswith(reader + "."):
            return tensor
        assert spec.layer is not None
        teacher, kept = self.plan.teacher, set(self.plan.heads[spec.layer])
        rank = self.scores.heads[self.plan.layers[spec.layer]].argsort(descending=True, stable=True).tolist()
        heads = tensor[: teacher.heads * teacher.head_dim].unflatten(0, (teacher.heads, teacher.head_dim))
        changed = heads.clone()
        for kv in self.plan.kv_heads[spec.layer]:
            group = [head for head in rank if head // teacher.group == kv]
            stay, go = ([head for head in group if (head in kept) == stays] for stays in (True, False))
            for one, other in zip(reversed(stay), go, strict=False):
                changed[one] += heads[one] - heads[other]
        return torch.cat([changed.flatten(0, 1), tensor[teacher.heads * teacher.head_dim :]])


def _add_products(seen: _Seen, site: str, inputs: Float[Tensor, "samples tokens columns"]) -> None:
    rows = inputs.flatten(0, 1).float()
    if site not in seen.products:
        seen.products[site] = rows.new_zeros(rows.shape[1], rows.shape[1])
    with matmul_precision(inputs.dtype):
        seen.products[site].addmm_(rows.T, rows)


def _others(units: Units, total: int) -> Int[Tensor, " others"]:
    """The indices below `total` that are not among the units."""
    left = torch.ones(total, dtype=torch.bool)
    left[list(units)] = False
    return left.nonzero().flatten()
