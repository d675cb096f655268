"""A model's config.json: read once, checked, and brought into one form for all readers.

A key that is null counts as missing, unless null has a meaning. Every value has a rule. Rotary positions, which have
had several spellings, end in one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.errors import CheckpointError, did_you_mean
from minitron.core.reading import Json, read_json
from minitron.model.architecture import ROPE_KINDS, Architecture, Shape
from minitron.model.families import FAMILIES, family_of

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
QUANTIZE_AFTER = "cut the original model in 16 or 32 bits and quantize after"
# Keys that name code to run: no code is run, and these keys are not written.
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")
DTYPE_KEYS = ("dtype", "torch_dtype")  # the second is the older spelling
LARGEST_SIZE = 2**31 - 1
LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ValueRule:
    """The rule of a value. With `null`, null is a value with a meaning: no window, no cap, as many key-value heads."""

    text: str
    holds: Callable[[Any], bool]
    null: bool = False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and 0 < value <= LARGEST_SIZE


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(each) and each > 0 for each in value)


_SIZE = ValueRule(f"a positive integer of at most {LARGEST_SIZE}", _is_size)
_COUNT = ValueRule("an integer from 0", lambda value: _is_integer(value) and value >= 0)
_NUMBER = ValueRule("a finite number", _is_number)
_POSITIVE = ValueRule("a finite number above 0", lambda value: _is_number(value) and value > 0)
_FROM_0 = ValueRule("a finite number from 0", lambda value: _is_number(value) and value >= 0)
_SHARE = ValueRule("a number above 0 and up to 1", lambda value: _is_number(value) and 0 < value <= 1)
_SWITCH = ValueRule("true or false", lambda value: isinstance(value, bool))
_NAME = ValueRule("a string", lambda value: isinstance(value, str))
_NUMBERS = ValueRule("a list of finite numbers above 0", _is_numbers)
_OBJECT = ValueRule("an object", lambda value: isinstance(value, dict), null=True)
_WINDOW = ValueRule(_SIZE.text + ", or null for no window", _SIZE.holds, null=True)
_SHARED_HEADS = ValueRule(_SIZE.text + ", or null for as many as there are query heads", _SIZE.holds, null=True)
_CAP = ValueRule(_POSITIVE.text + ", or null for no cap", _POSITIVE.holds, null=True)

CONFIG_RULES: dict[str, ValueRule] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "head_dim", "max_position_embeddings"), _SIZE),
    **dict.fromkeys(("original_max_position_embeddings", "sliding_window_pattern", "no_rope_layer_interval"), _SIZE),
    "num_key_value_heads": _SHARED_HEADS,
    "max_window_layers": _COUNT,
    "sliding_window": _WINDOW,
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "initializer_range"), _FROM_0),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), _FROM_0),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "logits_scaling"), _POSITIVE),
    **dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier"), _NUMBER),
    "partial_rotary_factor": _SHARE,
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _CAP),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_cache"), _SWITCH),
    **dict.fromkeys(("hidden_act", "hidden_activation", *DTYPE_KEYS), _NAME),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _OBJECT),
}
ROPE_RULES: dict[str, ValueRule] = {
    **dict.fromkeys(("rope_type", "type"), _NAME),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"), _POSITIVE),
    **dict.fromkeys(("beta_fast", "beta_slow"), _POSITIVE),
    **dict.fromkeys(("mscale", "mscale_all_dim"), _FROM_0),
    "partial_rotary_factor": _SHARE,
    "original_max_position_embeddings": _SIZE,
    **dict.fromkeys(("short_factor", "long_factor"), _NUMBERS),
}


def read_config(path: Path) -> Json:
    """Read the config.json of a model directory; if its family is known, in the form of `settled`.

    Raises: CheckpointError if it is missing, is no JSON object, breaks a rule, or describes quantized weights.
    """
    file = path / CONFIG
    if not file.exists() and not file.is_symlink():
        if (path / ADAPTER).is_file():
            raise CheckpointError(adapter_alone(path))
        raise CheckpointError(f"{path} is not a model directory: it has no config.json")
    config = read_json(file, CheckpointError, keys_once=True)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must be a JSON object")
    method = _quantized_by(config)
    if method:
        raise CheckpointError(f"{path} holds quantized weights ({method}); {QUANTIZE_AFTER}")
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in FAMILIES:
        return config
    try:
        return settled(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}/{error}") from None  # each begins with the file's name


def settled(config: Mapping[str, Any]) -> Json:
    """Bring the config of a known family into the form in which each key has one meaning.

    Raises: CheckpointError if a value breaks its rule, or if two values contradict each other.
    """
    config = {key: value for key, value in config.items() if value is not None or _null_says_something(key)}
    for key, rule in CONFIG_RULES.items():
        _require(key, config.get(key), rule)
    architecture = family_of(config)
    shape = architecture.shape(config)
    for key in architecture.per_layer_keys:
        _require_list(key, config.get(key))
    return _one_rope(config, architecture, shape)


def require_entry_per_layer(path: Path, config: Mapping[str, Any], architecture: Architecture, layers: int) -> None:
    """Raises: CheckpointError for a per-layer list whose length is not the number of layers."""
    for key in architecture.per_layer_keys:
        if config.get(key) is not None and len(config[key]) != layers:
            raise CheckpointError(
                f"{path / CONFIG}: {key} is a list of {len(config[key])}; it must be a list with one entry for each of "
                f"the {layers} layers"
            )


def adapter_alone(path: Path) -> str:
    """The message about a directory that holds an adapter, such as LoRA, instead of a model."""
    base = read_json(path / ADAPTER, CheckpointError)
    name = base.get("base_model_name_or_path") if isinstance(base, dict) else None
    return (
        f"{path} is an adapter, LoRA or alike ({ADAPTER}), and not a model: merge it into its base model"
        f"{f' {name}' if name else ''} first (peft: merge_and_unload), and save the result"
    )


def _null_says_something(key: str) -> bool:
    return key not in CONFIG_RULES or CONFIG_RULES[key].null


def _require(key: str, value: Any, rule: ValueRule) -> None:
    if value is not None and not rule.holds(value):
        raise CheckpointError(f"{CONFIG}: {key} is {_short(value)}; it must be {rule.text}")


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 100 else f"{said[:100]}..."


def _require_list(key: str, value: Any) -> None:
    """Check the value of a key with one entry per layer."""
    if value is None:
        return
    if not isinstance(value, list):
        raise CheckpointError(f"{CONFIG}: {key} is {_short(value)}; it must be a list with one entry for each layer")
    known: tuple[Any, ...] = LAYER_KINDS if key == "layer_types" else (0, 1)
    strange = [entry for entry in value if entry not in known]
    if strange:
        raise CheckpointError(
            f"{CONFIG}: {key} holds {_short(strange[0])}; its entries must be {' or '.join(map(str, known))}"
        )


def _one_rope(config: Json, architecture: Architecture, shape: Shape) -> Json:
    """The config with one rule for rotary positions, in current names.

    If both are there, transformers takes rope_scaling over rope_parameters, and ignores the latter's base.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    tables = {
        key: _rope_table(key, config[key], config, architecture, shape)
        for key in ("rope_scaling", "rope_parameters")
        if config.get(key)
    }
    config = config | tables
    if old and new:
        table = tables["rope_parameters"]
        wanted = table.get("full_attention") or {} if architecture.rope_per_layer_kind else table
        if not _same_rope(tables["rope_scaling"], wanted):
            raise CheckpointError(
                f"{CONFIG}: rope_scaling is {_short(old)} and rope_parameters is {_short(new)}, two rules for the same "
                "rotary positions: remove the one that is not meant (and keep rope_theta)"
            )
        del config["rope_scaling"]
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    before = table.get("original_max_position_embeddings")
    if architecture.original_context_beside and before is not None:
        config.setdefault("original_max_position_embeddings", before)
    return config


def _same_rope(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two tables are equal, apart from a base that only one of them has."""
    one, other = ({"rope_type": table.get("type", "default")} | dict(table) for table in (one, other))
    own = [{key: value for key, value in table.items() if key != "type"} for table in (one, other)]
    if not all("rope_theta" in table for table in own):
        own = [{key: value for key, value in table.items() if key != "rope_theta"} for table in own]
    return own[0] == own[1]


def _rope_table(
    where: str, said: Mapping[str, Any], config: Mapping[str, Any], architecture: Architecture, shape: Shape
) -> Json:
    """rope_scaling or rope_parameters, checked: one rule, or one for each kind of layer."""
    nested = [key for key in said if key in LAYER_KINDS]
    if where == "rope_parameters" and architecture.rope_per_layer_kind:
        strange = [key for key in said if key not in LAYER_KINDS]
        if strange:
            raise CheckpointError(
                f"{CONFIG}: {where} holds {strange[0]}; in a {architecture.name} model it has one object for each kind "
                f"of layer: {' and '.join(LAYER_KINDS)}"
            )
        beside = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
        return {
            kind: table and _rope_rule(f"{where}.{kind}", table, config, architecture, shape, base=beside[kind])
            for kind, table in said.items()
        }
    if nested:
        raise CheckpointError(
            f"{CONFIG}: {where} has one rule for {' and one for '.join(nested)} layers, where a {architecture.name} "
            "model has one for all"
        )
    return _rope_rule(where, said, config, architecture, shape, base="rope_theta")


def _rope_rule(
    where: str, said: Any, config: Mapping[str, Any], architecture: Architecture, shape: Shape, *, base: str
) -> Json:
    """Check one rule for rotary positions, and give its kind the current name.

    Args:
        base: the key of the config with the meaning of the rule's rope_theta.
    """
    _require(where, said, _OBJECT)
    rule = {key: value for key, value in said.items() if value is not None}
    for key, wanted in ROPE_RULES.items():
        _require(f"{where}.{key}", rule.get(key), wanted)
    names = {key: architecture.rope_names.get(rule[key], rule[key]) for key in ("rope_type", "type") if key in rule}
    if len(set(names.values())) > 1:
        raise CheckpointError(
            f"{CONFIG}: {where} is of rope_type {rule['rope_type']!r} and of type {rule['type']!r}, two spellings of "
            "one key: remove the one that is not meant"
        )
    kind = next(iter(names.values()), "default")
    if kind not in architecture.rope_kinds:
        raise CheckpointError(
            f"{CONFIG}: {where} asks for rotary positions of type {kind!r}, which a {architecture.name} model cannot "
            f"have{did_you_mean(kind, architecture.rope_kinds)}"
        )
    missing = [key for key in ROPE_KINDS[kind] if key not in rule]
    if missing:
        raise CheckpointError(
            f"{CONFIG}: {where} is of type {kind!r} and has no {missing[0]}, without which it is none"
        )
    _require_said_once(where, rule, config, base)
    share = rule.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    pairs = int(shape.head_dim * share) // 2
    for key in ("short_factor", "long_factor"):
        if kind == "longrope" and len(rule[key]) != pairs:
            raise CheckpointError(
                f"{CONFIG}: {where}.{key} has {len(rule[key])} numbers; heads of {shape.head_dim} take {pairs}"
            )
    return rule | names


def _require_said_once(where: str, rule: Mapping[str, Any], config: Mapping[str, Any], base: str) -> None:
    """Check that values in a rule and beside it agree: programs differ in which of the two they read."""
    pairs = {"rope_theta": base} | {
        key: key for key in ("partial_rotary_factor", "original_max_position_embeddings") if key in rule
    }
    for inside, outside in pairs.items():
        if inside in rule and outside in config and not math.isclose(rule[inside], config[outside]):
            raise CheckpointError(
                f"{CONFIG}: {where}.{inside} is {rule[inside]} and {outside} is {config[outside]}, though both say the "
                "same thing: remove the one that is not meant"
            )


def _quantized_by(config: Mapping[str, Any]) -> str | None:
    """The quantization that a config.json describes; None for plain weights."""
    for key in ("quantization_config", "compression_config", "quantization"):  # the last is mlx's
        facts = config.get(key)
        if facts:
            said = {name: value for name, value in facts.items() if value} if isinstance(facts, dict) else {}
            method = [str(said["quant_method"])] if "quant_method" in said else []
            flags = [flag for flag in ("load_in_4bit", "load_in_8bit") if flag in said]
            bits = [f"{said['bits']} bits"] if "bits" in said else []
            return f"config.json's {key}: {', '.join([*method, *flags, *bits]) or facts}"
    return None
