"""The function that config.json describes, checked against the function that llama.cpp computes.

Every key that transformers reads is written into the file, follows from the tensors, changes nothing, or has one value
that llama.cpp computes, which the family's table names. Every other key must have transformers' default; anything else
is refused before a byte is written.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.core.errors import GgufError
from minitron.gguf.reader import Keys
from minitron.model.architecture import Gguf, Shape
from minitron.model.checkpoint import Checkpoint

# Keys that do not change the logits: numbers of tokens, training, and how transformers runs the model.
WITHOUT_EFFECT = {
    *("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "attention_dropout", "resid_pdrop"),
    *("embd_pdrop", "use_cache", "pretraining_tp", "dtype", "architectures", "transformers_version", "id2label"),
    *("label2id", "problem_type", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
}
# Keys that transformers reads although they are no fields of a config's class.
READ_ANYWAY = ("is_causal", "per_layer_config")
_CAUSAL = {"is_causal": True, "use_bidirectional_attention": False}
# Keys that the functions below compare with llama.cpp.
_COMPARED_BELOW = {
    *("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval"),
    "tie_word_embeddings",
}
_WINDOWED, _WHOLE = "sliding_attention", "full_attention"
# llama.cpp takes the query scale of these from hidden and heads instead of head_dim: by Gguf.name, numbers of layers.
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}


def require_runnable(checkpoint: Checkpoint, config: Any) -> None:
    """Raises: GgufError for a model that llama.cpp would refuse, or run otherwise than transformers."""
    architecture, shape, table = checkpoint.architecture, checkpoint.shape, table_of(checkpoint)
    filling = shape.heads * shape.head_dim
    if table.heads_fill_hidden and shape.hidden != filling:
        raise GgufError(
            f"llama.cpp makes the query and output projections of a {architecture.name} model hidden x hidden, but "
            f"here hidden={shape.hidden} and heads*head_dim={shape.heads}*{shape.head_dim}={filling}: it would not "
            f"load. Cut to hidden={filling}, or to another number of heads"
        )
    if table.head == "embedding" and not architecture.tied(checkpoint.config):
        raise GgufError(
            f"llama.cpp takes the embedding of a {architecture.name} model for its output projection, but this one has "
            "an output projection of its own (tie_word_embeddings is false): tie them before the model is trained"
        )
    strange = [spec.name for spec in checkpoint.specs() if spec.name.endswith(table.unknown)] if table.unknown else []
    if strange:
        raise GgufError(
            f"llama.cpp's {table.name} has no place for {strange[0]} ({len(strange)} tensors like it): "
            "a model with such biases cannot be a GGUF file"
        )
    _require_computed(checkpoint, config)
    rotary = config.no_rope_layers if table.no_rope_step else []
    expected = [int((layer + 1) % table.no_rope_step != 0) for layer in range(shape.layers)] if rotary else []
    if rotary != expected:
        raise GgufError(
            f"llama.cpp's {table.name} leaves out rotary positions in every layer number {table.no_rope_step}, but "
            f"this model's no_rope_layers is {rotary}: drop whole runs of {table.no_rope_step} layers, or none"
        )


def table_of(checkpoint: Checkpoint) -> Gguf:
    """Raises: GgufError if llama.cpp does not know the family."""
    if checkpoint.architecture.gguf is None:
        raise GgufError(
            f"llama.cpp does not know the {checkpoint.architecture.name} family, so there is no GGUF file of it"
        )
    return checkpoint.architecture.gguf


def windows(checkpoint: Checkpoint, config: Any) -> tuple[Keys, list[str]]:
    """The keys of sliding windows, or where llama.cpp has none the context up to which models agree, with a note."""
    read = _read(config)
    window, kinds = read.get("sliding_window"), read.get("layer_types")
    for kind in kinds or ():
        if kind not in (_WINDOWED, _WHOLE):
            raise _refused(checkpoint, "layer_types", kinds, f"{_WHOLE} and {_WINDOWED} alone, not {kind!r}")
    sliding = [kind == _WINDOWED for kind in kinds or [_WINDOWED] * checkpoint.shape.layers]
    if not window or not any(sliding):
        return {}, []
    if table_of(checkpoint).windows:
        return {"attention.sliding_window": window, "attention.sliding_window_pattern": sliding}, []
    if window >= config.max_position_embeddings:
        return {}, []
    note = (
        f"llama.cpp has no sliding window for {checkpoint.architecture.name} models: the file says a context of "
        f"{window:,} tokens, this model's window, up to which both are the same"
    )
    return {"context_length": window}, [note]


def rope(checkpoint: Checkpoint, config: Any) -> tuple[Keys, dict[str, Float[Tensor, " factors"]], list[str]]:
    """The keys of rotary positions, the tensors of factors that a rule of scaling has, and notes."""
    table, given = table_of(checkpoint), config.rope_parameters
    nested = _WHOLE in given or _WINDOWED in given
    rule = given.get(_WHOLE, given) if nested else given
    kind, base, part = rule.get("rope_type", "default"), float(rule["rope_theta"]), rule.get("partial_rotary_factor")
    if kind not in table.scalings:
        raise _refused(checkpoint, "rope_type", kind, f"no rule but {', '.join(table.scalings)}")
    if part not in (None, 1.0) and not table.partial_rotary and kind != "default":
        raise _refused(checkpoint, "partial_rotary_factor", part, "rotary positions of whole heads")
    # transformers reads the factor of the other families too, but takes whole heads.
    turned = int(checkpoint.shape.head_dim * (part or 1.0)) if table.partial_rotary else checkpoint.shape.head_dim
    keys: Keys = {"rope.dimension_count": turned, "rope.freq_base": base}
    if nested and _WINDOWED in given:
        local = given[_WINDOWED]
        if local.get("rope_type", "default") != "default":
            raise _refused(checkpoint, f"rope_parameters of {_WINDOWED}", local, "no scaling in layers with a window")
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    before = rule.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    match kind:
        case "linear":
            return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rule["factor"])}, {}, []
        case "llama3":
            return keys, {"rope_freqs.weight": llama3_factors(rule, base, turned)}, []
        case "yarn":
            return keys | _yarn(checkpoint, rule, before or config.max_position_embeddings), {}, []
        case "longrope":
            return _longrope(checkpoint, config, rule, before, keys)
    return keys, {}, []


def query_factor(checkpoint: Checkpoint) -> float:
    """The factor of the queries that turns llama.cpp's scale of them into the config's."""
    table, shape = table_of(checkpoint), checkpoint.shape
    wanted = checkpoint.config.get(table.query_scale) if table.query_scale else None
    if wanted is None:
        return 1.0
    return math.sqrt(scaled_by(table, shape) / wanted)


def scaled_by(table: Gguf, shape: Shape) -> int:
    """The number by whose square root llama.cpp divides the queries."""
    return shape.hidden // shape.heads if _SCALED_BY_HIDDEN.get(table.name) == shape.layers else shape.head_dim


def _require_computed(checkpoint: Checkpoint, config: Any) -> None:
    architecture, table = checkpoint.architecture, table_of(checkpoint)
    conditions = {line.partition("?")[2].lstrip("!") for line in architecture.tensors.values()}
    said = {*architecture.config_keys.values(), *table.keys.values(), table.query_scale, *conditions, *_COMPARED_BELOW}
    usual = {field.name: field.default for field in fields(type(config)) if field.default is not MISSING}
    for key, value in _read(config).items():
        if key in table.computes:
            if value not in table.computes[key]:
                raise _refused(checkpoint, key, value, table.computes[key][0])
        elif key in table.unsaid and not value:
            raise _refused(checkpoint, key, value, f"{table.unsaid[key]} where a file says none")
        elif key in _CAUSAL:
            if value not in (None, _CAUSAL[key]):
                raise _refused(checkpoint, key, value, "attention to earlier tokens alone")
        elif key not in said | WITHOUT_EFFECT and value not in (None, usual.get(key)):
            raise _refused(checkpoint, key, value, f"{usual.get(key)!r} as far as is known here")


def _read(config: Any) -> Mapping[str, Any]:
    """The values that transformers reads: the fields of the config's class, and a few keys of any config."""
    names = {field.name for field in fields(type(config))} | set(READ_ANYWAY)
    return {name: value for name, value in vars(config).items() if name in names}


def _refused(checkpoint: Checkpoint, key: str, value: Any, computed: Any) -> GgufError:
    return GgufError(
        f"{checkpoint.path / 'config.json'}: {key} is {value!r}, but llama.cpp computes {computed} for "
        f"{checkpoint.architecture.name} models: a GGUF file would be another model than this one"
    )


def _yarn(checkpoint: Checkpoint, rule: Mapping[str, Any], before: int) -> Keys:
    """The keys of yarn, of which llama.cpp fixes the bounds of frequencies and the factor of attention."""
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    for key, computed in fixed.items():
        if rule.get(key) not in (None, computed):
            raise _refused(checkpoint, f"{key} of yarn", rule[key], computed)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rule.get(key):
            raise _refused(checkpoint, f"{key} of yarn", rule[key], "attention by the factor of scaling alone")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rule["factor"]),
        "rope.scaling.original_context_length": int(before),
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }


def _longrope(
    checkpoint: Checkpoint, config: Any, rule: Mapping[str, Any], before: int | None, keys: Keys
) -> tuple[Keys, dict[str, Float[Tensor, " factors"]], list[str]]:
    if not before:
        raise _refused(checkpoint, "original_max_position_embeddings", before, "longrope from a number of tokens on")
    scale = rule.get("factor") or config.max_position_embeddings / before
    usual = math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0
    keys = keys | {
        "rope.scaling.original_context_length": int(before),
        "rope.scaling.attn_factor": float(rule.get("attention_factor") or usual),
    }
    tensors = {
        f"rope_factors_{length}.weight": torch.tensor(rule[f"{length}_factor"], dtype=torch.float32)
        for length in ("long", "short")
    }
    note = (
        f"llama.cpp takes the rotary factors of long texts where its context is larger than {before:,} tokens, and "
        "transformers where the text is: with a larger context short texts are read a little otherwise"
    )
    return keys, tensors, [note] if config.max_position_embeddings > before else []


def llama3_factors(rule: Mapping[str, Any], base: float, turned: int) -> Float[Tensor, " half"]:
    """The divisor of each frequency: 1 for short waves, `factor` for long waves, and a mean of both between."""
    wave = 2 * math.pi * base ** (torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    factor, low, high = (float(rule[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    smooth = (rule["original_max_position_embeddings"] / wave - low) / (high - low)
    return (1 / ((1 - smooth.clamp(0, 1)) / factor + smooth.clamp(0, 1))).float()
