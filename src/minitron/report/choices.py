"""The report's section on why the student is as it is: its shape, its layers, its units, and the repair of the cut."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from minitron.core.text import (
    MISSING,
    Number,
    count,
    flops,
    milliseconds,
    nats,
    percent,
    share,
    short_count,
    shown,
    size,
)
from minitron.model.architecture import Shape
from minitron.model.describe import K_BLOCK, sizes_beyond_blocks
from minitron.pruning.depth import LAYER_CRITERIA
from minitron.pruning.importance import CRITERIA
from minitron.pruning.layouts import MadePlan, UnitScores
from minitron.pruning.repair import REPAIRS, replaces_channels
from minitron.report import html, plots
from minitron.report.records import RunRecords, layer_criterion, layers_by_number, repairs
from minitron.report.tables import candidate_cells, candidate_columns
from minitron.shapes.layouts import CandidateRecord

SHOWN_CANDIDATES = 16
ARROW = "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}"
OPEN_LAYERS = 16  # a table of more rows is closed at first
CUT_DIMS = ("layers", "hidden", "ffn", "heads", "kv_heads")
UNIT_NAMES = {"ffn": "FFN neurons", "heads": "query heads", "kv_heads": "kv heads"}


def why(records: RunRecords) -> str:
    return html.section(
        "Why this student",
        shape_sentence(records),
        describe_search(records),
        describe_units(records),
        describe_repair(records),
    )


def shape_sentence(records: RunRecords) -> str:
    """The rule that gave the shape, in one sentence."""
    prune, changes = records.recipe.prune, _changes(records)
    if records.search is not None:
        found = records.search.candidates
        text = f"A search ranked {count(len(found))} shapes within the budgets and took {changes}: {_verdict(found)}."
    elif prune.target is not None:
        text = f"A target of {prune.target} gave {changes}, by the rule of an older version, which ranked no shapes."
    else:
        text = f"The recipe gives the sizes: {changes}."
    teacher, student = (Shape(**vars(records.evaluations[name].shape)) for name in ("teacher", "student"))
    if "gguf" in records.exports and (beyond := sizes_beyond_blocks(teacher, student)):
        rows = " and ".join(f"{count(row)} ({dim})" for dim, row in beyond.items())
        text += f" Rows of {rows} make no whole blocks of {K_BLOCK}: in GGUF files of K types they get larger types."
    return html.paragraph(text)


def _changes(records: RunRecords) -> str:
    teacher, student = (vars(records.evaluations[name].shape) for name in ("teacher", "student"))
    changes = [
        f"{dim} {count(teacher[dim])}{ARROW}{count(student[dim])} ({share(student[dim] / teacher[dim])})"
        for dim in CUT_DIMS
        if student[dim] != teacher[dim]
    ]
    return ", ".join(changes) or "the teacher’s own shape"  # noqa: RUF001


def _verdict(found: Sequence[CandidateRecord]) -> str:
    """The measure of the best candidate, compared with the next candidate of the same measure."""
    best, *others = found
    if not best.losses:
        return f"its predicted damage, {nats(best.predicted)}, is the lowest"
    measured = sorted(map(int, best.losses), reverse=True)
    step = next((step for step in measured if any(str(step) in one.losses for one in others)), measured[0])
    losses = sorted(one.losses[str(step)] for one in others if str(step) in one.losses)
    when = f"after {count(step)} steps of distillation" if step else "right after the cut"
    against = f", the best of the others’ {nats(losses[0])}" if losses else ""  # noqa: RUF001
    return f"its loss {when} is {nats(best.losses[str(step)])} nats per token{against}"


def describe_search(records: RunRecords) -> str:
    if records.search is None:
        return ""
    facts, found = records.search, records.search.candidates
    cells_of = [one.model_dump() for one in found]
    columns = candidate_columns(cells_of)
    head = ["Rank", *(c.heading if not c.unit else (c.heading, c.unit) for c in columns)]
    best = enumerate(cells_of[:SHOWN_CANDIDATES], start=1)
    rows = [[f"{rank}", *candidate_cells(one, columns)] for rank, one in best]
    machine = facts.machine
    note = (
        f"The best {len(rows)} of {count(len(found))} shapes within the budgets. The damage is a prediction from the "
        "statistics of the KL to the teacher right after the cut, in nats per token, with up to a tenth more for sizes "
        "that are no multiples of 256; it is made to put shapes in order, and the KL itself can be several times as "
        "large; losses are the training loss on the training blocks that "
        f"the first pass reads last. KV cache and times are of {count(facts.batch)} × "  # noqa: RUF001
        f"{count(facts.context_tokens)} tokens; times are modelled from {size(machine.bytes_per_second)} and "
        f"{flops(machine.flops_per_second)} per second, not measured."
    )
    table = html.table("Candidates", head, rows)
    return html.subsection("The search for the shape", html.note(note), table, html.figures(_search_figures(found)))


def _search_figures(found: Sequence[CandidateRecord]) -> list[str]:
    """Figures of costs against the first loss that is comparable: after steps, after the cut, or predicted."""
    steps = sorted({int(step) for one in found for step in one.losses})
    step = next((str(step) for step in steps if step > 0), "0" if steps else None)
    y = "predicted damage" if step is None else "nats per token"
    when = {None: "predicted, not measured", "0": "right after the cut"}.get(step, f"after {step} steps")
    here = [one for one in found if step is None or step in one.losses]
    losses = [one.predicted if step is None else one.losses[step] for one in here]
    axes: list[tuple[str, Callable[[Number], str], list[Number]]] = [
        ("parameters", short_count, [one.total for one in here]),
        ("KV cache", size, [one.kv_cache_bytes for one in here]),
        ("decoding step, modelled", milliseconds, [one.decode_seconds for one in here]),
    ]
    figures = [
        html.figure(
            plots.pareto(list(zip(costs, losses, strict=True)), x, y, form),
            f"Loss against {x}",
            f"Loss {when}; the line joins candidates that no other beats in both",
        )
        for x, form, costs in axes
    ]
    if len(steps) > 1:
        curves = [{int(at): loss for at, loss in one.losses.items()} for one in here]
        caption = "Each round keeps the best quarter; step 0 is right after the cut"
        figures.append(html.figure(plots.elimination_curves(curves, y), "Successive elimination", caption))
    return figures


def describe_units(records: RunRecords) -> str:
    """The layers, channels, neurons and heads that stay, and the scores that chose them."""
    scores, plan, cut = records.scores, records.plan, records.cut
    if scores is None or plan is None or cut is None:
        return ""
    before, after = vars(cut.teacher), vars(cut.student)
    choices = {dim: layer_choices(dim, scores, plan, cut) for dim in UNIT_NAMES}
    kept = {dim: {one.layer: one.kept for one in choices[dim]} for dim in UNIT_NAMES}
    group = before["heads"] // before["kv_heads"]
    figures = [
        _layer_figure(records, scores, cut),
        _hidden_figure(records, scores, cut),
        html.figure(
            plots.ffn_scores(scores.ffn, kept["ffn"]),
            "FFN neurons",
            "Sorted within each layer; opacity is the score, on a log scale. "
            + _outcome("ffn", before, after, choices["ffn"]),
        ),
        html.figure(
            plots.head_scores(scores.heads, kept["heads"], group, "query head"),
            "Query heads",
            "Opacity is the score"
            + ("; lines part the heads of different kv heads" if group > 1 else "")
            + ". "
            + _outcome("heads", before, after, choices["heads"]),
        ),
    ]
    if group > 1:
        drawn = plots.head_scores(scores.kv_heads, kept["kv_heads"], 0, "kv head")
        outcome = _outcome("kv_heads", before, after, choices["kv_heads"])
        figures.append(html.figure(drawn, "KV heads", f"Opacity is the score. {outcome}"))
    fewer = {dim: choices[dim] for dim in UNIT_NAMES if after[dim] < before[dim]}
    return html.subsection("Layers and units", _legend(records), html.figures(figures), _by_layer(fewer))


def _legend(records: RunRecords) -> str:
    samples, prune = records.results.statistics, records.recipe.prune
    steps = prune.iterations
    text = (
        f"Scores from {count(samples.samples)} calibration samples ({count(samples.tokens)} tokens); "
        f"units by {CRITERIA[prune.criterion].title}; layers by {LAYER_CRITERIA[layer_criterion(records)].title}."
    )
    text += f" The cut was made in {steps} steps; these are the scores of the first." if steps > 1 else ""
    swatches = '<span class="swatch kept"></span>kept <span class="swatch removed"></span>removed. '
    return f'<p class="note">{swatches}{escape(text)}</p>'


def _layer_figure(records: RunRecords, scores: UnitScores, cut: MadePlan) -> str:
    criterion = LAYER_CRITERIA[layer_criterion(records)]
    kept, num_layers = cut.layers, cut.teacher.layers
    outcome = _kept(len(kept), num_layers)
    if len(kept) < num_layers:
        outcome += f"; dropped: {_ranges(sorted(set(range(num_layers)) - set(kept)))}"
    if layers_by_number(records):
        outcome += ". The recipe gives their numbers; the scores chose none"
    drawn = plots.layer_scores(scores.layers, kept, criterion.unit)
    meaning = criterion.meaning[0].upper() + criterion.meaning[1:]
    return html.figure(drawn, f"Layers, by {criterion.title}", f"{meaning}. {outcome}.")


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as the recipe writes them: 3, 7, 9-11."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _hidden_figure(records: RunRecords, of_units: UnitScores, cut: MadePlan) -> str:
    scores, kept = of_units.hidden, cut.hidden
    title, text = "Hidden channels", "One score for all layers"
    if replaces_channels(repairs(records)):
        drawn = plots.hidden_scores(scores, None)
        return html.figure(
            drawn, title, f"{text}; not used: a basis of {count(len(kept))} directions took their place."
        )
    outcome = _kept(len(kept), len(scores))
    outcome += _of_mass(kept_mass(scores, kept)) if len(kept) < len(scores) else ""
    return html.figure(plots.hidden_scores(scores, kept), title, f"{text}. {outcome}.")


@dataclass(frozen=True)
class LayerChoice:
    """The units of one dim that a layer keeps.

    mass: their share of the layer's scores; nan if all scores are zero.
    planned_mass: the share of the units that the scores chose.
    otherwise: the number of units that the repair chose instead.
    """

    layer: int
    kept: Sequence[int]
    mass: float
    planned_mass: float
    otherwise: int


def layer_choices(dim: str, scores: UnitScores, plan: MadePlan, cut: MadePlan) -> list[LayerChoice]:
    """A choice for each layer that stays.

    Args:
        plan, cut: before and after the repair.
    """
    of_layers, before, after = (getattr(each, dim) for each in (scores, plan, cut))
    return [
        LayerChoice(
            layer=layer,
            kept=kept,
            mass=kept_mass(of_layers[layer], kept),
            planned_mass=kept_mass(of_layers[layer], planned),
            otherwise=len(set(kept) - set(planned)),
        )
        for layer, planned, kept in zip(cut.layers, before, after, strict=True)
    ]


def kept_mass(scores: Sequence[Number], kept: Iterable[int]) -> float:
    """The kept units' share of the sum of all scores."""
    whole = sum(scores)
    return sum(scores[unit] for unit in kept) / whole if whole else math.nan


def _outcome(dim: str, before: Mapping[str, int], after: Mapping[str, int], choices: Sequence[LayerChoice]) -> str:
    """The number of kept units, their share of the scores, and the choices of the repair, as means over layers."""
    text = _kept(after[dim], before[dim])
    if after[dim] == before[dim]:
        return f"{text} in the layers that stay." if after["layers"] < before["layers"] else f"{text}."
    text += " per layer"
    mass, planned = (_mean([getattr(one, key) for one in choices]) for key in ("mass", "planned_mass"))
    text += _of_mass(mass)
    moved = sum(one.otherwise for one in choices)
    if not moved:
        return f"{text}."
    kept = sum(len(one.kept) for one in choices)
    return (
        f"{text}. The scores alone would keep {shown(planned, percent)}; the repair chose {count(moved)} of "
        f"{count(kept)} otherwise."
    )


def _kept(after: int, before: int) -> str:
    return f"All {count(before)} kept" if after == before else f"{count(after)} of {count(before)} kept"


def _of_mass(mass: float) -> str:
    return f", with {shown(mass, percent)} of the scores’ sum"  # noqa: RUF001


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _by_layer(choices: Mapping[str, Sequence[LayerChoice]]) -> str:
    if not choices:
        return ""
    columns: dict[html.Heading, list[str]] = {}
    for dim, of_dim in choices.items():
        name = UNIT_NAMES[dim][0].upper() + UNIT_NAMES[dim][1:]
        columns[name, "share of the scores kept"] = [shown(one.mass, percent) for one in of_dim]
        if any(one.otherwise for one in of_dim):
            columns[name, "chosen otherwise"] = [_otherwise(one) for one in of_dim]
    layers = [str(one.layer) for one in next(iter(choices.values()))]
    table = html.table("Units by layer", ["Layer", *columns], zip(layers, *columns.values(), strict=True))
    moved = any(one.otherwise for of_dim in choices.values() for one in of_dim)
    text = "Chosen otherwise: units that the repair kept and that the scores would have dropped."
    note = html.note(text) if moved else ""
    return html.details("Units by layer", note + table, is_open=len(layers) <= OPEN_LAYERS)


def _otherwise(one: LayerChoice) -> str:
    return f"{count(one.otherwise)} of {count(len(one.kept))}" if one.otherwise else MISSING


def describe_repair(records: RunRecords) -> str:
    steps = repairs(records)
    if steps is None:
        return ""
    if not steps:
        return html.subsection("Repair", html.note("None: what was kept was left as it was in the teacher."))
    note = "Steps at the cut that make up for removed units, fitted to the calibration samples, without training."
    return html.subsection("Repair", html.note(note), html.facts({step: REPAIRS[step].text for step in steps}))
