"""A first draft of the table of a model type that has none, from its config.json and the shapes of its tensors.

A tensor is placed by its name, and only where the sizes agree: dims coincide too often for a size alone to prove
anything. A line that the shape cannot settle is marked, and a tensor that fits nowhere is listed with the reason. A
table starts from a draft; it ends with the laws of the test suite, see docs/extend/family.md.
"""

import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from minitron.model.architecture import DIMS, Architecture

# Dim -> how config.json spells it, the usual key first.
KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
    "vocab": ("vocab_size",),
}
Q, KV = "heads*head_dim", "kv_heads*head_dim"
QKV, UP, DOWN, GATE_UP = f"{Q}+{KV}+{KV}", "ffn hidden", "hidden ffn", "ffn+ffn hidden"
NORM, HEAD = r".*norm.*|ln_.*|ln\d?", "lm_head|embed_out|output"
# Modules between a layer and a tensor's own -> what they are.
AREAS = {"attention": "(self_)?att(n|ention)", "mlp": "mlp|ffn|feed_?forward"}
INSIDE = (*AREAS, "layer")
# Where a module stands and its own name -> its axes, likeliest first. `layer` is directly in a layer, `stack` beside
# the list of layers, `outside` anywhere else.
TENSOR_ROLES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("attention", "q_proj|query|wq", (f"{Q} hidden",)),
    ("attention", "k_proj|v_proj|key|value|wk|wv", (f"{KV} hidden",)),
    ("attention", "w?qkv|qkv_proj|query_key_value|c_attn", (f"{QKV} hidden",)),
    ("attention", "o_proj|out_proj|wo|dense|c_proj", (f"hidden {Q}",)),
    ("attention", "q_?(layer_?)?(norm|ln)", ("head_dim", Q, "heads head_dim")),
    ("attention", "k_?(layer_?)?(norm|ln)", ("head_dim", KV, "kv_heads head_dim")),
    ("attention", NORM, (Q, "hidden")),
    ("mlp|layer", "gate(_proj)?|up(_proj)?|fc1|fc_in|c_fc|dense_h_to_4h|w3", (UP, GATE_UP)),
    ("mlp|layer", "gate_up_proj|up_gate_proj", (GATE_UP,)),
    ("mlp|layer", "down(_proj)?|fc2|fc_out|dense_4h_to_h", (DOWN,)),
    ("mlp", "c_proj|dense|wo", (DOWN,)),
    ("mlp", "w1|w2", (UP, DOWN)),
    ("mlp", NORM, ("ffn", "hidden")),
    ("stack|outside", f"embed_tokens|wte|embed_in|(word|tok)_embeddings|{HEAD}", ("vocab hidden",)),
    ("layer|stack", NORM, ("hidden",)),
)
EXPERTS = re.compile("expert|router|moe")
# Dims that a config may not hold, each with a matrix whose outputs tell it, in the order in which they can be found.
TOLD_BY = (
    ("vocab", "vocab hidden"), ("head_dim", f"{Q} hidden"), ("head_dim", f"{QKV} hidden"), ("kv_heads", f"{KV} hidden"),
    ("kv_heads", f"{QKV} hidden"), ("ffn", UP), ("ffn", GATE_UP),
)  # fmt: skip
# Names of the norm before attention and of the one before the MLP. The last counts only where there is one before
# attention: other families put a norm of this name after it.
NORM_BEFORE = {
    "attention": ("input_layernorm", "ln_1", "ln_attn", "self_attn_layer_norm", "norm_1", "attention_norm",
                  "attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ln_2", "ln_mlp", "norm_2",
            "ffn_norm", "feedforward_layernorm", "final_layer_norm", "post_attention_layernorm"),
}  # fmt: skip
# What an axis can be where the name says nothing.
AXES = ("vocab", "hidden", "ffn", Q, KV, "head_dim", "heads", "kv_heads", "ffn+ffn", QKV)
FUSED = "the shape does not tell segments laid end to end, as written, from segments interleaved per head, group or row"
NEXT_STEPS = (
    "Next (docs/extend/family.md): with the model's forward in transformers, settle the doubtful lines ({doubtful}) "
    "and place the unplaced tensors ({unplaced}); add conditions, for one checkpoint shows one config; fill the columns"
    " that no tensor shows; add the table to FAMILIES and a variant to tests/helpers/tiny.py, and run the tests."
)


@dataclass(frozen=True)
class Unplaced:
    """A tensor without a line; `*` in the name is an index that is not the layer's."""

    name: str
    shape: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Draft:
    """A table to be checked. `derived` says how sizes were found that config.json does not hold, `ambiguous` why a
    line of `tensors` is in doubt, `notes` what no line can say."""

    model_type: str
    config_keys: Mapping[str, str]
    sizes: Mapping[str, int]
    derived: Mapping[str, str]
    tensors: Mapping[str, str]
    ambiguous: Mapping[str, str]
    unplaced: tuple[Unplaced, ...]
    norms: Mapping[str, str]
    fields: Mapping[str, str]  # the Architecture's layer, embedding, head and final_norm, where not the usual
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Python source of the table, then as comments what is unplaced, the notes and the next steps."""
        keys, tensors = list[str](), list[str]()
        for dim in DIMS:
            if dim in self.derived or dim not in self.sizes:
                found = f"{self.sizes[dim]}, {self.derived[dim]}" if dim in self.sizes else "not found"
                keys += _comment(f"{dim}: {found}", "        ")
            keys += _entries({dim: self.config_keys[dim]} if dim in self.config_keys else {})
        for name, line in self.tensors.items():
            tensors += _comment(f"doubtful: {self.ambiguous[name]}", "        ") if name in self.ambiguous else []
            tensors += _entries({name: line})
        steps = NEXT_STEPS.format(unplaced=len(self.unplaced), doubtful=len(self.ambiguous))
        remarks = [f"unplaced: {tensor.name} {list(tensor.shape)}: {tensor.why}" for tensor in self.unplaced]
        lines = [
            "from minitron.model.architecture import Architecture",
            "",
            f"{re.sub('[^A-Z0-9]', '_', self.model_type.upper())} = Architecture(",
            f"    name={json.dumps(self.model_type)},",
            *("    config_keys={", *keys, "    },"),
            *("    tensors={", *tensors, "    },"),
            *("    norms={  # guessed by name", *_entries(self.norms), "    },"),
            *(f"    {field}={json.dumps(name)}," for field, name in self.fields.items()),
            *(")", ""),
            *(line for remark in (*remarks, *self.notes, steps) for line in _comment(remark)),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Stored:
    """What is stored under a name, where that stands, what it stands for, and what keeps it out of any table."""

    shape: tuple[int, ...]
    place: str
    readings: tuple[str, ...]
    problem: str


def draft_table(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Draft:
    """Guess the table of a checkpoint from its config.json and the shapes of its tensors, by their names on disk."""
    nested = "layers" not in _keys(config) and isinstance(config.get("text_config"), Mapping)
    section = config["text_config"] if nested else config
    keys = _keys(section)
    sizes = {dim: section[key] for dim, key in keys.items() if _is_size(section[key])}
    layer, num_layers = _layer_list(shapes, sizes.get("layers"))
    found = _patterns(shapes, layer, num_layers)
    sizes, derived = _derive(sizes, num_layers, found)
    tensors, ambiguous, turned = _place(found, sizes)
    fields, norms = _modules(tensors, found, layer)
    tied = "head" not in fields and section.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    switches = [key for key, value in section.items() if isinstance(value, bool) and re.search("bias|norm|tie_", key)]
    lists = [key for key, value in section.items() if isinstance(value, list) and len(value) == num_layers]
    bare = " and ".join(list(AREAS)[sum("{layer}" in norm for norm in norms) :])
    notes = {
        "The keys stand in text_config; an Architecture reads the top level of config.json.": nested,
        "No index in the tensor names runs over all layers.": not layer,
        f"Stored as [in, out], where minitron takes axis 1 for the input: {', '.join(turned)}.": turned,
        'Tied embeddings, so no head is stored; untied: "lm_head.weight": "vocab hidden ?!tie_word_embeddings".': tied,
        f"No norm found before {bare}: it may stand after, serve both, or feed a module without a line.": bare,
        f"Switches of the config that may be conditions: {', '.join(switches)}.": switches,
        f"Lists as long as there are layers, perhaps per_layer_keys: {', '.join(lists)}.": lists,
    }
    return Draft(
        model_type=str(config.get("model_type", "unknown")),
        config_keys=keys,
        sizes=sizes,
        derived=derived,
        tensors=tensors,
        ambiguous=ambiguous,
        unplaced=tuple(
            Unplaced(name, of.shape, _why(name, of, sizes)) for name, of in found.items() if name not in tensors
        ),
        norms=norms,
        fields={field: name for field, name in fields.items() if name != getattr(Architecture, field)},
        notes=tuple(note for note, holds in notes.items() if holds),
    )


def _keys(section: Mapping[str, Any]) -> dict[str, str]:
    """Dim -> the key that is there, one with a size before one without."""
    there = {dim: [key for key in spellings if key in section] for dim, spellings in KEYS.items()}
    return {dim: min(keys, key=lambda key: not _is_size(section[key])) for dim, keys in there.items() if keys}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _layer_list(shapes: Mapping[str, tuple[int, ...]], num_layers: int | None) -> tuple[str, int]:
    """The module of a layer, with `{layer}`, and the number of layers; nothing and 0 if no index runs over them all.

    Where several lists are long enough, such as another tower's or the experts', it is the one with most weights.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    weights: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        for index in re.finditer(r"(?:^|(?<=\.))(0|[1-9][0-9]{0,4})(?=\.)", name):
            indices[name[: index.start()]].add(int(index[1]))
            weights[name[: index.start()]] += prod(shape)
    length = {prefix: num_layers or len(seen) for prefix, seen in indices.items()}
    whole = [prefix for prefix in indices if sum(i < length[prefix] for i in indices[prefix]) == length[prefix]]
    prefix = max(whole, key=lambda prefix: weights[prefix], default=None)
    return ("", 0) if prefix is None else (prefix + "{layer}", length[prefix])


def _patterns(shapes: Mapping[str, tuple[int, ...]], layer: str, num_layers: int) -> dict[str, _Stored]:
    """Name, with `{layer}` for the index of a layer and `*` for another -> what is stored. Outside the layers first."""
    members: dict[str, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    inside = re.compile(re.escape(layer.removesuffix("{layer}")) + r"([0-9]{1,5})\.(.+)")
    for name, shape in shapes.items():
        match = inside.fullmatch(name)
        index, rest = (int(match[1]), match[2]) if match and int(match[1]) < num_layers else (-1, name)
        rest = re.sub(r"(?:^|(?<=\.))[0-9]+(?=\.|$)", "*", rest)
        if not name.endswith(Architecture.ignored_suffixes):
            members[rest if index < 0 else f"{layer}.{rest}"].append((index, shape))
    mixtures = tuple(name.partition("experts.")[0] for name in members if ".experts." in name)
    found = {}
    for name in sorted(members, key=lambda name: "{layer}" in name):
        layers, several = sorted({index for index, _ in members[name]}), sorted({shape for _, shape in members[name]})
        problems = {
            "a mixture of experts, for which there is no dim": EXPERTS.search(name) or name.startswith(mixtures),
            "it has an index that is not the layer's": "*" in name,
            f"only in layers {str(layers)[1:-1]} of {num_layers}": -1 not in layers and len(layers) < num_layers,
            f"of several shapes: {str(list(map(list, several)))[1:-1]}": len(several) > 1,
        }
        problem = "; ".join(problem for problem, holds in problems.items() if holds)
        found[name] = _Stored(several[0], *_role(name, layer), problem)
    return found


def _role(name: str, layer: str) -> tuple[str, tuple[str, ...]]:
    """Where the module of a tensor stands, and what the axes of its weight are by its name."""
    parents, _, leaf = name.rpartition(".")[0].rpartition(".")
    if layer and f"{parents}.".startswith(f"{layer}."):
        inner = parents.removeprefix(layer).split(".")[1:]
        areas = [area for area, names in AREAS.items() if all(re.fullmatch(names, part) for part in inner)]
        place = "layer" if not inner else areas[0] if areas else "other"
    else:
        place = "stack" if parents == layer.removesuffix("{layer}").rstrip(".").rpartition(".")[0] else "outside"
    known = (
        axes
        for places, names, axes in TENSOR_ROLES
        if re.fullmatch(places, place) and re.fullmatch(names, leaf.lower())
    )
    return place, next(known, ())


def _size(line: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a line; with an unknown dim, one that no tensor has."""
    if not set(re.findall(r"\w+", line)) <= sizes.keys():
        return (-1,)
    parts = ([[sizes[dim] for dim in part.split("*")] for part in axis.split("+")] for axis in line.split())
    return tuple(sum(map(prod, axis)) for axis in parts)


def _derive(
    said: Mapping[str, int], num_layers: int, found: Mapping[str, _Stored]
) -> tuple[dict[str, int], dict[str, str]]:
    """The sizes, with those that only the tensors tell, and how they tell them."""
    sizes, derived = dict(said), dict[str, str]()
    if num_layers and "layers" not in sizes:
        sizes["layers"], derived["layers"] = num_layers, "counted in the tensor names"
    matrices = [(name, of) for name, of in found.items() if of.readings and len(of.shape) == 2 and not of.problem]
    for dim, line in TOLD_BY:
        axis = line.split()[0]
        for name, of in matrices:
            # The outputs are the axis that is not hidden, whichever is first on disk.
            outputs = of.shape[1] if of.shape[0] == sizes.get("hidden") else of.shape[0]
            (without,), (each,) = (_size(axis, sizes | {dim: value}) for value in (0, 1))
            size, rest = divmod(outputs - without, max(each - without, 1))
            if dim not in sizes and of.readings[0] == line and without >= 0 and size > 0 and not rest:
                sizes[dim], derived[dim] = size, f"from {axis} = {outputs} in {name}"
        if line == f"{QKV} hidden" and "head_dim" not in sizes and {"hidden", "heads"} <= sizes.keys():
            sizes["head_dim"], derived["head_dim"] = sizes["hidden"] // sizes["heads"], "hidden / heads"
    return sizes, derived


def _fits(of: _Stored, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """What the name says and the shape agrees with: as it is, and with the axes of a layer's matrix turned round."""
    turned = [" ".join(line.split()[::-1]) for line in of.readings if of.place in INSIDE and " " in line]
    straight, turned = ([line for line in lines if _size(line, sizes) == of.shape] for lines in (of.readings, turned))
    return straight, turned


def _place(found: Mapping[str, _Stored], sizes: Mapping[str, int]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Name -> line, name -> why that is doubtful, and the matrices stored as [in, out]."""
    weights = {name: _fits(of, sizes) for name, of in found.items() if name.endswith(".weight") and not of.problem}
    matrices = [weights[name] for name in weights if found[name].place in INSIDE and len(found[name].shape) == 2]
    # Square matrices follow those that fit in one order only; where these disagree, nothing is turned.
    is_turned = {bool(turned) for straight, turned in matrices if bool(straight) != bool(turned)} == {True}
    lines, doubts, turned_names = dict[str, str](), dict[str, str](), list[str]()
    for name, (straight, turned) in weights.items():
        # Each line with its output axis, which is the bias's.
        options = [(line, line.split()[-1]) for line in turned if is_turned]
        options += [(line, line.split()[0]) for line in straight]
        if not options:
            continue
        lines[name], output = options[0]
        turned_names += [name] if is_turned and turned else []
        if why := [f"{line!r} fits too" for line, _ in options[1:]] + [FUSED] * ("+" in lines[name]):
            doubts[name] = "; ".join(why)
        bias = found.get(name.removesuffix("weight") + "bias")
        if bias and not bias.problem and _size(output, sizes) == bias.shape:
            lines[name.removesuffix("weight") + "bias"] = output
            if "+" in output or {output} != {other for _, other in options}:
                doubts[name.removesuffix("weight") + "bias"] = f"as {name}"
    return {name: lines[name] for name in found if name in lines}, doubts, turned_names


def _why(name: str, of: _Stored, sizes: Mapping[str, int]) -> str:
    """Why a tensor has no line, and what it may be."""
    if of.problem:
        return "; ".join([of.problem, *(f"by its name {line!r}" for line in _fits(of, sizes)[0])])
    expected = ((line, _size(line, sizes)) for line in of.readings)
    by_name = " or ".join(f"{line!r} = {list(size) if min(size) > 0 else 'unknown'}" for line, size in expected)
    reasons = [f"by its name {by_name}" if by_name else "no name that is known"]
    if name.endswith(".bias"):
        reasons = ["not the outputs of a weight that has a line"]
    for axis, size in enumerate(of.shape):
        by_size = " or ".join(line for line in AXES if _size(line, sizes) == (size,))
        reasons.append(f"axis {axis} is {size}: {by_size or 'no product of dims'}")
    return "; ".join(reasons)


def _modules(
    lines: Mapping[str, str], found: Mapping[str, _Stored], layer: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The fields of an Architecture that name a module or a tensor, and its norms."""
    fields, norms = {"layer": layer} if layer else {}, dict[str, str]()
    fed: dict[str, str] = {}  # "attention" or "mlp" -> its module
    before: dict[str, str] = {}  # own name of a norm directly in the layer -> its module
    for name, line in lines.items():
        module, place = name.rpartition(".")[0], found[name].place
        parent, _, leaf = module.rpartition(".")
        if line == "vocab hidden":
            fields.setdefault("head" if re.fullmatch(HEAD, leaf) else "embedding", name)
        elif place == "stack" and "emb" not in leaf:
            fields["final_norm"] = module
        elif place == "layer" and line == "hidden":
            before.setdefault(leaf, module)
        elif place in INSIDE:
            fed.setdefault(place.replace("layer", "mlp"), module if place == "layer" else parent)
    for place, names in NORM_BEFORE.items():
        norm = next((before[name] for name in names if name in before), None)
        if norm is None or place not in fed:
            break
        norms[norm] = fed[place]
    if "final_norm" in fields:
        norms[fields["final_norm"]] = fields.get("head", Architecture.head).removesuffix(".weight")
    return fields, norms


def _entries(rows: Mapping[str, str]) -> list[str]:
    return [f"        {json.dumps(key)}: {json.dumps(value)}," for key, value in rows.items()]


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
