"""An architecture is a table: tensor name on disk -> named axes. All code that depends on a family reads it.

The notation of the table, one string per tensor:

    "heads*head_dim hidden"                          two axes; an axis is a product of dims
    "heads*head_dim+kv_heads*head_dim hidden"        a fused axis: segments laid end to end
    "heads*head_dim ?attention_bias"                 present only if the config's attention_bias is true
    "vocab hidden ?!tie_word_embeddings"             present only if it is false

The first dim of a segment is the unit that pruning keeps or drops; the dims after it are the block that belongs to
one unit. `{layer}` in a name is the layer index.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import product
from math import prod
from typing import Any, Literal

from minitron.core.errors import CheckpointError, PlanError
from minitron.core.reading import Json

# The dims that pruning can shrink, in the order in which they are reported.
PRUNABLE = ("layers", "hidden", "ffn", "heads", "kv_heads")
# Those that have units of their own in every layer.
LAYER_DIMS = ("ffn", "heads", "kv_heads")

# Kind of rotary positions -> the keys that it requires.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Shape:
    """The named sizes of a decoder model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


DIMS = tuple(field.name for field in fields(Shape))


@dataclass(frozen=True)
class Segment:
    unit: str
    block: tuple[str, ...]

    def size(self, shape: Shape) -> int:
        return prod(getattr(shape, dim) for dim in (self.unit, *self.block))


Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a checkpoint: its name on disk, its axes, and its layer (None outside the layers)."""

    name: str
    axes: tuple[Axis, ...]
    layer: int | None

    def shape(self, shape: Shape) -> tuple[int, ...]:
        return tuple(sum(segment.size(shape) for segment in axis) for axis in self.axes)

    def reads(self, unit: str) -> bool:
        """Whether this is a matrix whose input axis consists of this unit."""
        return len(self.axes) == 2 and {segment.unit for segment in self.axes[1]} == {unit}


@dataclass(frozen=True)
class Parameters:
    """Exact parameter counts. Tied embeddings count once; the output projection is part of `embedding`."""

    total: int
    embedding: int
    attention: int
    mlp: int
    norm: int

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


@dataclass(frozen=True)
class Gguf:
    """The family in llama.cpp: its name there, and the ways in which its files and computations differ from others."""

    name: str
    # Rotary pairs lie side by side in each query and key head, not half a head apart.
    interleaved: bool = False
    # Key of the file, without the family's prefix -> key of config.json. The value None is left out.
    keys: Mapping[str, str] = field(default_factory=lambda: {"attention.layer_norm_rms_epsilon": "rms_norm_eps"})
    # Key of config.json -> the values that mean what llama.cpp always computes; the first is the usual name.
    computes: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: {"hidden_act": ("silu", "swish")})
    # Key of config.json -> what llama.cpp computes where the value is none or zero, which a file cannot express.
    unsaid: Mapping[str, str] = field(default_factory=dict)
    # The kinds of rotary positions that llama.cpp knows, by their names in config.json.
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    # Rotary positions may apply to a share of each head; in other families they apply to whole heads.
    partial_rotary: bool = False
    # The query and output projections are hidden x hidden.
    heads_fill_hidden: bool = False
    # The output projection: the embedding if there is no other tensor, always the embedding, or always another tensor.
    head: Literal["either", "embedding", "own"] = "either"
    # Layers with a sliding window see only the window; in other families llama.cpp lets every layer see all tokens.
    windows: bool = False
    # Where a file does not say which layers these are, llama.cpp takes all but the last of so many.
    window_step: int = 0
    # One of so many layers has no rotary positions, whatever the config says; 0 if all layers have them.
    no_rope_step: int = 0
    # llama.cpp divides queries by sqrt(head_dim), and the config by the square root of the number under this key.
    query_scale: str = ""
    # The endings of the names of tensors that llama.cpp cannot load.
    unknown: tuple[str, ...] = ()

    def in_heads(self, name: str) -> bool:
        """Whether the rows of a tensor of the file have another order within each head than in a checkpoint."""
        return self.interleaved and any(part in name for part in (".attn_q.", ".attn_k."))


# Part of the parameters -> product of dims -> how often it occurs: {"mlp": {("ffn", "hidden", "layers"): 3}, ...}.
ParameterTerms = dict[str, dict[tuple[str, ...], int]]


@dataclass(frozen=True)
class Architecture:
    """A family of models, as data. A new family is a new table; see docs/extend/family.md."""

    name: str
    tensors: Mapping[str, str]
    # Norm of the residual stream -> module whose matrices read its output. A family that puts its norms after
    # attention and MLP has only the final one.
    norms: Mapping[str, str]
    # Dim -> key of config.json. A family without a key for head_dim can only have hidden = heads * head_dim.
    config_keys: Mapping[str, str]
    # The values of transformers for keys that config.json leaves out, unless they are false or follow from other keys.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layer: str = "model.layers.{layer}"
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm"
    # The config keys with one entry per layer, from which entries are cut with their layers.
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    # transformers refuses configs of some families whose hidden size is no multiple of the head count.
    hidden_multiple_of_heads: bool = False
    # A stored norm weight w means a gain of norm_gain_offset + w.
    norm_gain_offset: float = 0.0
    # Norms of the residual stream subtract the mean over the channels first: LayerNorm instead of RMSNorm.
    centred_norms: bool = False
    # The model multiplies its embeddings by sqrt(hidden), which a smaller hidden changes.
    embedding_times_sqrt_hidden: bool = False
    # The config key of a factor of the outputs of attention and MLP, before they are added to the residual stream.
    residual_multiplier: str = ""
    # The config keys of a number that divides the logits, and of a number that caps them.
    logits_divisor: str = ""
    logits_softcap: str = ""
    # The kinds of rotary positions of its models, and former names of kinds.
    rope_kinds: tuple[str, ...] = tuple(ROPE_KINDS)
    rope_names: Mapping[str, str] = field(default_factory=dict)
    # Layers with and without a sliding window have different rotary positions.
    rope_per_layer_kind: bool = False
    # The original context, before rotary positions were stretched, is a key of the config beside the rule.
    original_context_beside: bool = False
    # None if llama.cpp does not know the family.
    gguf: Gguf | None = None
    # The endings of tensors that old exports store but no module loads.
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def shape(self, config: Mapping[str, Any]) -> Shape:
        """Read the shape from a config.json.

        Raises: CheckpointError if a size is missing or is no positive integer, or if the sizes contradict each other.
        """
        config = {**self.defaults, **config}
        sizes: dict[str, int] = {}
        for dim in DIMS:
            key = self.config_keys.get(dim, dim)
            value = config.get(key)
            if value is None and dim == "kv_heads":
                value = sizes["heads"]
            if value is None and dim == "head_dim":
                value = sizes["hidden"] // sizes["heads"]
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise CheckpointError(f"config.json: {key} is {value!r}; it must be a positive integer")
            sizes[dim] = value
        shape = Shape(**sizes)
        if shape.heads % shape.kv_heads:
            raise CheckpointError(f"config.json: {shape.heads} heads cannot share {shape.kv_heads} kv_heads equally")
        if self.heads_fill_hidden and shape.hidden != shape.heads * shape.head_dim:
            raise CheckpointError(
                f"config.json: {shape.heads} heads of {shape.head_dim} do not make hidden_size {shape.hidden}, "
                f"which is the only size that a {self.name} model can have"
            )
        return shape

    def config_for(self, config: Mapping[str, Any], shape: Shape, layers: list[int]) -> Json:
        """The config of a model of another shape, with the entries of the given layers."""
        new = dict(config)
        for dim, key in self.config_keys.items():
            new[key] = getattr(shape, dim)
        for key in self.per_layer_keys:
            if isinstance(config.get(key), list):
                new[key] = [config[key][index] for index in layers]
        return new

    def specs(self, config: Mapping[str, Any], layers: int) -> Iterator[TensorSpec]:
        """Every tensor of a checkpoint with this config, in the table's order, layer by layer."""
        config = {**self.defaults, **config}
        present = [(name, axes) for name, line in self.tensors.items() if (axes := _axes(line, config)) is not None]
        for name, axes in present:
            if "{layer}" not in name:
                yield TensorSpec(name, axes, None)
        for layer in range(layers):
            for name, axes in present:
                if "{layer}" in name:
                    yield TensorSpec(name.format(layer=layer), axes, layer)

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the output projection is the embedding itself."""
        return bool({**self.defaults, **config}.get("tie_word_embeddings", False))

    def count(self, shape: Shape, config: Mapping[str, Any]) -> Parameters:
        """The exact parameters of a model of this shape."""
        parts = dict.fromkeys(("embedding", "attention", "mlp", "norm"), 0)
        for spec in self.specs(config, layers=1):
            times = 1 if spec.layer is None else shape.layers
            parts[self._part(spec)] += times * prod(spec.shape(shape))
        return Parameters(total=sum(parts.values()), **parts)

    def parameter_terms(self, config: Mapping[str, Any]) -> ParameterTerms:
        """The result of `count` as polynomials in the dims, to count many shapes: the table is read only once."""
        terms: ParameterTerms = {}
        for spec in self.specs(config, layers=1):
            part, outside = terms.setdefault(self._part(spec), {}), () if spec.layer is None else ("layers",)
            for segments in product(*spec.axes):
                dims = tuple(sorted([*outside, *(dim for each in segments for dim in (each.unit, *each.block))]))
                part[dims] = part.get(dims, 0) + 1
        return terms

    def require_valid(self, shape: Shape) -> None:
        """Raises: PlanError for a shape that no model of this family can have."""
        for dim in DIMS:
            if getattr(shape, dim) <= 0:
                raise PlanError(f"shape {dim}={getattr(shape, dim)}: every size must be positive")
        if shape.heads % shape.kv_heads:
            raise PlanError(f"heads={shape.heads} is no multiple of kv_heads={shape.kv_heads}")
        if self.heads_fill_hidden and shape.hidden != shape.heads * shape.head_dim:
            raise PlanError(
                f"hidden={shape.hidden} needs heads={shape.hidden / shape.head_dim:g} of head_dim={shape.head_dim}, "
                f"not heads={shape.heads}: the config of a {self.name} model has no head_dim of its own, so it cannot "
                "express another; change hidden and heads together"
            )
        if self.hidden_multiple_of_heads and shape.hidden % shape.heads:
            raise PlanError(
                f"hidden={shape.hidden} is no multiple of heads={shape.heads}, "
                f"and transformers refuses such {self.name} models: choose a multiple of {shape.heads}"
            )

    @property
    def heads_fill_hidden(self) -> bool:
        """Whether hidden can only be heads * head_dim, for want of a config key."""
        return "head_dim" not in self.config_keys

    def with_hidden(self, shape: Shape, hidden: int) -> Shape | None:
        """The shape with another hidden size, and fewer heads where they must fill it; None if it is no model."""
        if self.hidden_multiple_of_heads and hidden % shape.heads:
            return None
        if not self.heads_fill_hidden or hidden == shape.hidden:
            return replace(shape, hidden=hidden)
        heads, rest = divmod(hidden, shape.head_dim)
        fitting = [n for n in range(1, shape.kv_heads + 1) if heads % n == 0 and heads // n <= shape.group]
        return replace(shape, hidden=hidden, heads=heads, kv_heads=max(fitting)) if fitting and not rest else None

    @property
    def sites(self) -> dict[str, str]:
        """The four sites of a layer, each with the module whose inputs are the activations of the site.

        In families that normalise before attention and MLP, these inputs are the outputs of the norm.
        """
        found: dict[str, str] = {}
        for name, line in self.tensors.items():
            axes, _ = _parse(line)
            if "{layer}" in name and len(axes) == 2:
                writes, reads = (axis[0].unit for axis in axes)
                site = {"heads": "attention", "kv_heads": "attention", "ffn": "mlp"}
                key = f"{site[writes]}_in" if reads == "hidden" else f"{site[reads]}_out"
                found.setdefault(key, name.removesuffix(".weight"))
        return found

    @property
    def stream_reads(self) -> tuple[str, ...]:
        """The modules of a layer whose input is the residual stream itself: norms, or matrices where there are none."""
        norms = tuple(name for name in self.norms if "{layer}" in name)
        return norms or (self.sites["attention_in"], self.sites["mlp_in"])

    def norm_before(self, matrix: str, layer: int | None) -> str | None:
        """The norm before a matrix, both by their names without `.weight`; None if there is none."""
        for norm, module in self.norms.items():
            if f"{matrix}.".startswith(module.format(layer=layer) + "."):
                return norm.format(layer=layer)
        return None

    @property
    def channel_norms(self) -> list[str]:
        """The norms of a layer with a gain per residual channel that do not stand before its matrices."""
        before = {f"{norm}.weight" for norm in self.norms}
        vectors = [name for name, line in self.tensors.items() if _parse(line)[0] == (_axis("hidden"),)]
        return [name for name in vectors if name.endswith("norm.weight") and name not in before]

    def _part(self, spec: TensorSpec) -> str:
        if spec.name in (self.embedding, self.head):
            return "embedding"
        # A bias belongs to its matrix: o_proj.bias has axis `hidden`, yet is attention.
        module = spec.name.rpartition(".")[0]
        axes, _ = _parse(self.tensors[f"{module}.weight".replace(f".{spec.layer}.", ".{layer}.", 1)])
        if len(axes) == 1:
            return "norm"
        return "mlp" if any(segment.unit == "ffn" for axis in axes for segment in axis) else "attention"


def kv_cache_bytes(shape: Shape, bytes_per_value: int = 2) -> int:
    """The bytes of the key-value cache for a token of context."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_per_value


def count_terms(terms: ParameterTerms, sizes: Mapping[str, Any], *, kind: str = "total") -> Any:
    """The parameters of a shape, or of many shapes at once where `sizes` holds an array for each dim.

    Args:
        kind: `total` or `non_embedding`.
    """
    return sum(
        times * prod(sizes[dim] for dim in dims)
        for part, products in terms.items()
        for dims, times in products.items()
        if kind == "total" or part != "embedding"
    )


def with_sizes(shape: Shape, **sizes: int) -> Shape:
    """The shape with some sizes changed.

    Raises: PlanError for a name that is no dim.
    """
    for name in sizes:
        if name not in DIMS:
            raise PlanError(f"unknown dim {name!r} in a shape; dims are {', '.join(DIMS)}")
    return replace(shape, **sizes)


def _axes(line: str, config: Mapping[str, Any]) -> tuple[Axis, ...] | None:
    """The axes of a table line; None if the config does not meet its condition."""
    axes, condition = _parse(line)
    if condition and bool(config.get(condition.lstrip("?!"), False)) == condition.startswith("?!"):
        return None
    return axes


@cache
def _parse(line: str) -> tuple[tuple[Axis, ...], str]:
    """The axes of a table line, and its condition, which may be empty."""
    *axes, condition = line.split() if "?" in line else [*line.split(), ""]
    return tuple(_axis(axis) for axis in axes), condition


def _axis(text: str) -> Axis:
    segments = []
    for part in text.split("+"):
        unit, *block = part.split("*")
        segments.append(Segment(unit, tuple(block)))
    return tuple(segments)
