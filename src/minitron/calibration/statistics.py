"""The statistics of a teacher on its calibration samples, with their files, and the section calibrate of a recipe."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from minitron.calibration import layouts
from minitron.core.config import Section
from minitron.core.device import Precision, compute_dtype, pick_device
from minitron.core.errors import PlanError, RunError
from minitron.core.typed_files import read_tensors, read_typed
from minitron.model.architecture import LAYER_DIMS, Shape
from minitron.model.checkpoint import Checkpoint
from minitron.model.stream import Pass

# Reductions of |activation| over the tokens of a sample, in the order in which `Statistics.sums` holds them.
SEQUENCE_AGGREGATES = ("mean", "l2", "variance")


MOST_SAMPLES, TOKENS_OF_COLUMN = 1024, 32
COLLECT = "collect them again with `minitron calibrate`"


def usual_samples(shape: Shape, block_tokens: int) -> int:
    """Return the default number of calibration blocks, by the sizes of the model alone.

    Scores settle soon; a repair solves for a matrix's columns, and needs a multiple of them in tokens: TOKENS_OF_COLUMN
    for each column of the widest matrix (docs/log). The speed of the machine has no say, so that a recipe gives the
    same student everywhere.

    Paper: P1 and P2 use 1024 samples, which is the most.
    """
    columns = max(shape.ffn, shape.hidden, shape.heads * shape.head_dim)
    return min(MOST_SAMPLES, -(-TOKENS_OF_COLUMN * columns // block_tokens))


class CalibrateConfig(Section):
    samples: int | None = Field(default=None, ge=1)
    """Calibration blocks, drawn from the training split. Default: as many as hold 32 tokens for each channel of the
    widest matrix, at most the papers' 1024."""
    batch: int | None = Field(default=None, ge=1)
    """Blocks per forward call; changes speed and memory, not the statistics. Default: as many as keep the widest
    activations within 256 MiB, at most 8."""
    precision: Precision = "auto"
    """Number format of the forward pass; sums are float32 or better in any case."""
    second_moment: bool = False
    """Also average the products of all pairs of residual channels: a hidden x hidden matrix, for about a tenth more
    time."""

    def for_model(self, shape: Shape, block_tokens: int) -> "CalibrateConfig":
        """Fill in the number of samples."""
        return self.model_copy(update={"samples": self.samples or usual_samples(shape, block_tokens)})

    @property
    def num_samples(self) -> int:
        """The number of samples of a config that `for_model` has filled in."""
        assert self.samples is not None
        return self.samples

    def as_pass(
        self, scratch: Path | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Pass:
        """The settings of every streamed pass over the calibration samples."""
        device = pick_device()
        return Pass(compute_dtype(self.precision, device), self.batch, device, scratch, progress)


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration samples, all float64.

    sums: site -> [layers, 3, 2, channels] (head_in has one layer). Axis 1 is the reduction v of |a| over a sample's
        tokens (SEQUENCE_AGGREGATES), axis 2 is (sum of v, sum of v squared) over samples. The l2 reduction's sum of
        squares is the sum of squared columns that an importance matrix needs.
    cosine: the mean cosine between each layer's input and output [layers].
    second_moment: the mean of u u' over tokens and over all modules that read the residual stream x, with u = x /
        rms(x) [hidden, hidden]; None unless it was asked for. A module takes every second token of a sample: attention
        and the final norm take the first, third and so on, the MLP takes the others.
    mean: the mean of u [hidden]; None like second_moment.
    samples, tokens: the numbers of samples and of tokens without pads.
    weight_squares: dim -> the sum of squares of the weights in the layers' matrices that belong to each unit: [layers,
        units] for ffn, heads and kv_heads, [hidden], [layers]. A weight belongs to the units of both its axes. Empty
        in files of older versions.
    written: dim -> how much each unit writes to the residual stream: the mean over tokens of |y|^2 / |x|^2, with y what
        the unit adds and x the stream after attention or MLP has added: [layers, units] for ffn and heads; for layers,
        of what the layer adds in all, [layers]. Empty in files of older versions.
    model: `Checkpoint.fingerprint` of the model that the statistics were collected from.
    """

    sums: dict[str, Tensor]
    cosine: Tensor
    second_moment: Tensor | None
    mean: Tensor | None
    samples: int
    tokens: int
    weight_squares: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)
    model: str = ""

    def save(self, path: Path) -> None:
        save_file({name: t.contiguous() for name, t in self._tensors().items()}, path / "statistics.safetensors")
        facts = {"samples": self.samples, "tokens": self.tokens, "model": self.model}
        (path / "statistics.json").write_text(json.dumps(facts))

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in the file."""
        named = {"cosine": self.cosine, "second_moment": self.second_moment, "mean": self.mean}
        named |= {f"sums.{site}": tensor for site, tensor in self.sums.items()}
        named |= {f"weight_squares.{dim}": tensor for dim, tensor in self.weight_squares.items()}
        named |= {f"written.{dim}": tensor for dim, tensor in self.written.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def column_squares(self) -> dict[str, Float[Tensor, "layers channels"]]:
        """The sum over all tokens of each channel's square, by site."""
        return {site: sums[:, SEQUENCE_AGGREGATES.index("l2"), 1] for site, sums in self.sums.items()}

    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """The covariance of the normalised residual stream.

        Raises: PlanError if the statistics were collected without its second moment.
        """
        require_second_moment(self)
        assert self.second_moment is not None and self.mean is not None
        return self.second_moment - self.mean.outer(self.mean)

    @staticmethod
    def load(path: Path) -> "Statistics":
        """Raises: RunError if the directory holds no statistics, or damaged ones."""
        facts, file = path / "statistics.json", path / "statistics.safetensors"
        if not facts.exists() or not file.exists():
            raise RunError(
                f"{path} holds no statistics; make them with `minitron calibrate` "
                f"(there is no {(file if facts.exists() else facts).name})"
            )
        meta = read_typed(facts, layouts.STATISTICS, RunError, way_out=COLLECT)
        tensors = read_tensors(file, RunError)
        if "cosine" not in tensors:
            raise RunError(f"{file} has no tensor cosine: it is damaged, or holds something else; {COLLECT}")

        def group(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        return Statistics(
            sums=group("sums."),
            weight_squares=group("weight_squares."),
            written=group("written."),
            cosine=tensors["cosine"],
            second_moment=tensors.get("second_moment"),
            mean=tensors.get("mean"),
            samples=meta.samples,
            tokens=meta.tokens,
            model=meta.model,
        )

    @staticmethod
    def load_of_shape(checkpoint: Checkpoint, path: Path) -> "Statistics":
        """Load statistics that must have been collected from a model of this shape.

        Raises: RunError if there are none, or if they are damaged or of another shape.
        """
        statistics = Statistics.load(path)
        _require_of_shape(statistics._tensors(), checkpoint, path / "statistics.safetensors")
        return statistics

    @staticmethod
    def load_for(checkpoint: Checkpoint, path: Path) -> "Statistics":
        """Load statistics that must have been collected from this model.

        Raises: RunError if there are none, or if they were collected from another model.
        """
        statistics = Statistics.load(path)
        if statistics.model != checkpoint.fingerprint():
            raise RunError(
                f"the statistics in {path} were not collected from the model in {checkpoint.path}: "
                "collect them again with `minitron calibrate`, or give the model that they are of"
            )
        _require_of_shape(statistics._tensors(), checkpoint, path / "statistics.safetensors")
        return statistics


def _require_of_shape(tensors: dict[str, Tensor], checkpoint: Checkpoint, file: Path) -> None:
    """Raises: RunError for a tensor that is missing, has another size or dtype, or is not finite."""
    shape = checkpoint.shape
    wanted: dict[str, tuple[int, ...]] = {"cosine": (shape.layers,)}
    wanted |= {f"sums.{site}": (layers, 3, 2, width) for site, (layers, width) in site_sizes(checkpoint).items()}
    optional: dict[str, tuple[int, ...]] = {"second_moment": (shape.hidden, shape.hidden), "mean": (shape.hidden,)}
    optional |= {f"weight_squares.{dim}": sizes for dim, sizes in weight_sizes(shape).items()}
    optional |= {f"written.{dim}": sizes for dim, sizes in written_sizes(shape).items()}
    for name, sizes in (wanted | {name: sizes for name, sizes in optional.items() if name in tensors}).items():
        if name not in tensors:
            raise RunError(f"{file} has no tensor {name}: it is damaged, or of another model; {COLLECT}")
        found = tensors[name]
        if (found.dtype, tuple(found.shape)) != (torch.float64, sizes):
            raise RunError(
                f"{file}: {name} is {str(found.dtype).removeprefix('torch.')} {list(found.shape)}, and of the model in "
                f"{checkpoint.path} it is float64 {list(sizes)}: it is damaged, or of another model; {COLLECT}"
            )
        if not found.isfinite().all():
            raise RunError(f"{file}: {name} holds numbers that are not finite; {COLLECT}")
    if ("mean" in tensors) != ("second_moment" in tensors):
        raise RunError(f"{file} has only one of second_moment and mean: it is damaged; {COLLECT}")


def site_sizes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """For each site, the number of layers that have it and the number of its channels."""
    shape, architecture = checkpoint.shape, checkpoint.architecture
    widths = {spec.name: spec.shape(shape)[-1] for spec in checkpoint.specs()}
    sites = {
        site: (shape.layers, widths[f"{module.format(layer=0)}.weight"]) for site, module in architecture.sites.items()
    }
    return {**sites, "head_in": (1, shape.hidden)}


def weight_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The sizes of each tensor in `Statistics.weight_squares`."""
    per_layer = {dim: (shape.layers, getattr(shape, dim)) for dim in LAYER_DIMS}
    return {"layers": (shape.layers,), "hidden": (shape.hidden,), **per_layer}


def written_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The sizes of each tensor in `Statistics.written`."""
    return {"layers": (shape.layers,), "heads": (shape.layers, shape.heads), "ffn": (shape.layers, shape.ffn)}


def require_second_moment(statistics: Statistics) -> None:
    """Raises: PlanError if the statistics were collected without the second moment."""
    if statistics.second_moment is None:
        raise PlanError(
            "the statistics hold no second moment of the residual stream, which repair step basis needs; "
            "collect it with `minitron calibrate --second-moment` (calibrate.second_moment)"
        )
