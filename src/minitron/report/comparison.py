"""One page about several finished runs, made from their records, in the style of report.html."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from os.path import commonpath
from pathlib import Path
from typing import Any

from minitron.core.errors import RunError
from minitron.core.files import prove_file, write_text
from minitron.core.text import MISSING, count, duration, flops, nats, ratio, short_count, shown, size
from minitron.evaluation.layouts import Evaluated, Ratios
from minitron.report import html, plots
from minitron.report.records import (
    ResultRow,
    RunRecords,
    correction,
    loss_name,
    public_recipe,
    repairs,
    result_table,
    stage_flops,
)
from minitron.report.tables import RESULT_COLUMNS, SHAPE_DIMS, result_cells, source_name


def write_comparison(runs: Sequence[RunRecords], out: Path) -> Path:
    """Write the page; the same records give the same bytes.

    Raises: RunError if the file cannot be written, or a run is given twice.
    """
    prove_file(out, keeps=[records.path for records in runs])
    write_text(out, render_comparison(runs))
    return out


def render_comparison(runs: Sequence[RunRecords]) -> str:
    named = name_runs(runs)
    students = {
        name: row for name, records in named.items() for row in result_table(records) if row["model"] == "student"
    }
    sections = (results_section(named, students), curves_section(named), shapes_section(named), recipes_section(named))
    title = f"{len(named)} runs compared"
    header = f"""<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(comparison_headline(students))}</p>
<p class="run">{escape(", ".join(named))}</p>
</header>"""
    return html.document(title, header, "\n".join(part for part in sections if part))


def name_runs(runs: Sequence[RunRecords]) -> dict[str, RunRecords]:
    """Name each run by the part of its path in which the runs differ.

    Raises: RunError if a run is given twice.
    """
    paths = [records.path.resolve() for records in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise RunError(f"{path} is given twice; name each run once")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path.relative_to(commonpath(paths))) for path in paths]
    return dict(zip(names, runs, strict=True))


def comparison_headline(students: Mapping[str, ResultRow]) -> str:
    known = {
        name: kl
        for name, row in students.items()
        if (kl := row["kl_to_teacher"]) is not None and shown(kl, nats) != MISSING
    }
    if not known:
        return "No run knows how far its student is from its teacher."
    best, smallest = min(known, key=lambda name: known[name]), min(students, key=lambda name: students[name]["total"])
    return (
        f"{best} is nearest to its teacher, with a KL divergence of {nats(known[best])} nats per token; "
        f"{smallest if smallest != best else 'it'} is the smallest, with {short_count(students[smallest]['total'])} "
        "parameters."
    )


# The columns that are compared, without those that depend on the text or stand among the costs.
KEPT_COLUMNS = [column for column in RESULT_COLUMNS if column.key not in ("bits_per_byte", "weight_bytes")]
# Heading -> the cell of a run.
COSTS: dict[html.Heading, Callable[[RunRecords], str]] = {
    ("Distilled", "tokens"): lambda run: count(run.results.student.training.tokens),
    ("Compute", "of all stages"): lambda run: flops(sum(stage_flops(run).values())),
    ("Time", "of all stages"): lambda run: duration(sum(stage.seconds for stage in run.stages.values())),
    ("Weights", "all tensors"): lambda run: size(run.evaluations["student"].weight_bytes),
    ("Prefill", "of teacher's"): lambda run: shown(_ratios(run).prefill, ratio),
    ("Decode", "of teacher's"): lambda run: shown(_ratios(run).decode, ratio),
}


def _ratios(run: RunRecords) -> Ratios:
    return run.speed.ratio if run.speed and run.speed.ratio else Ratios()


def results_section(named: Mapping[str, RunRecords], students: Mapping[str, ResultRow]) -> str:
    head: list[html.Heading] = ["Student of", *((column.heading, column.unit) for column in KEPT_COLUMNS)]
    kept = [
        [name, *result_cells(students[name], KEPT_COLUMNS), shown(run.evaluations["pruned"].kl_to_teacher, nats)]
        for name, run in named.items()
    ]
    costs = [[name, *(cell(run) for cell in COSTS.values())] for name, run in named.items()]
    return html.section(
        "Results",
        html.table("What each student kept", [*head, ("KL after cut", "nats/token")], kept),
        html.table("What each student cost, and how fast it is", ["Student of", *COSTS], costs),
        *(html.note(text) for text in cautions(named)),
        html.figures(_result_figures(students)),
    )


def _result_figures(students: Mapping[str, ResultRow]) -> list[str]:
    """Each student's KL and loss against its size."""
    kls = {name: row["kl_to_teacher"] for name, row in students.items()}
    losses = {name: row["lm_loss"] for name, row in students.items()}
    figures = []
    for values, title, unit in (
        (kls, "KL divergence against size", "KL to teacher, nats/token"),
        (losses, "Held-out loss against size", "loss, nats/token"),
    ):
        points = {
            name: (students[name]["non_embedding"], value)
            for name, value in values.items()
            if value is not None and shown(value, nats) != MISSING
        }
        if points:
            drawn = plots.named_points(points, "non-embedding parameters", unit, short_count)
            figures.append(html.figure(drawn, title, "Lower and further left is better"))
    return figures


def cautions(named: Mapping[str, RunRecords]) -> list[str]:
    """Notes on differences of the runs that make their numbers incomparable."""

    def differ(values: Sequence[Any]) -> bool:
        return len(set(map(str, values))) > 1

    runs, notes = list(named.values()), []
    teachers = [records.stages["evaluations"].inputs.get("teacher", records.recipe.model) for records in runs]
    if differ(teachers):
        names = ", ".join(f"{name}: {source_name(records.recipe.model)}" for name, records in named.items())
        notes.append(
            f"The runs have different teachers ({names}): KL, agreement, share and speed are to each run's teacher."
        )
    texts = [
        (records.stages["evaluations"].inputs.get("data"), records.evaluations["student"].tokens) for records in runs
    ]
    if differ(texts):
        notes.append(
            "They were not measured on the same tokens of held-out text: a difference of losses or KL may be "
            "one of the texts."
        )
    machines = [records.stages["evaluations"].hardware for records in runs]
    if differ([(machine.device, machine.threads) for machine in machines]):
        notes.append("They ran on different hardware or numbers of threads: times and speeds cannot be compared.")
    corrected = [name for name, records in named.items() if correction(records)]
    if corrected:
        notes.append(
            f"Of {', '.join(corrected)} the teacher was corrected; KL is to the teacher as it was given, so the "
            "correction counts as distance."
        )
    return notes


def curves_section(named: Mapping[str, RunRecords]) -> str:
    """The curves of all distillations by tokens: held-out loss, and the smoothed loss of the batches."""
    heldout = {
        name: [(row.tokens, row.heldout_loss) for row in records.metrics if row.heldout_loss is not None]
        for name, records in named.items()
    }
    batches = {
        name: [(row.tokens, row.loss) for row in records.metrics if row.loss is not None]
        for name, records in named.items()
    }
    losses = {name: loss_name(records.recipe.distill) for name, records in named.items()}
    figures = [
        html.figure(plots.overlaid(some, "tokens", "nats per token", marked=marked), title, caption)
        for some, title, caption, marked in (
            (heldout, "Held-out distillation loss", "On each run's own held-out text", True),
            (batches, "Distillation loss of the batches", "Each point is a mean of neighbouring steps", False),
        )
        if any(some.values())
    ]
    if not figures:
        return ""
    same = len(set(losses.values())) == 1
    note = (
        f"The loss is {next(iter(losses.values()))}."
        if same
        else "The runs were trained for different losses: "
        + ("; ".join(f"{name}: {loss}" for name, loss in losses.items()) + ". Their curves cannot be compared.")
    )
    return html.section("Distillation", html.note(note), html.figures(figures))


def shapes_section(named: Mapping[str, RunRecords]) -> str:
    rows = [_shape_row(name, records.evaluations["student"]) for name, records in named.items()]
    teachers = {}
    for records in named.values():
        teachers[source_name(records.recipe.model)] = records.evaluations["teacher"]
    before = [_shape_row(f"teacher {name}", row) for name, row in teachers.items()]
    head: list[html.Heading] = ["Model", *SHAPE_DIMS, ("KV cache", "bytes per token")]
    return html.section("Shapes", html.table("Shapes of all students", head, [*before, *rows]))


def _shape_row(name: str, row: Evaluated) -> list[str]:
    return [name, *(count(getattr(row.shape, dim)) for dim in SHAPE_DIMS), count(row.kv_cache_bytes_per_token)]


def recipes_section(named: Mapping[str, RunRecords]) -> str:
    """The keys in which the runs' recipes differ."""
    flat = {name: _flat(public_recipe(records)) for name, records in named.items()}
    keys = dict.fromkeys(key for recipe in flat.values() for key in recipe)
    rows = [
        [key, *(recipe.get(key, MISSING) for recipe in flat.values())]
        for key in keys
        if len({recipe.get(key, MISSING) for recipe in flat.values()}) > 1
    ]
    steps = {name: repairs(records) for name, records in named.items()}
    if len({str(some) for some in steps.values()}) > 1:
        rows.append(
            ["repaired by", *(MISSING if some is None else ", ".join(some) or "nothing" for some in steps.values())]
        )
    if not rows:
        return html.section("What differs", html.note("The recipes are the same, key by key."))
    unknown = any(cell == MISSING for row in rows for cell in row)
    note = html.note(f"{MISSING}: the run's version of minitron had no such key.") if unknown else ""
    return html.section("What differs", html.table("Keys of the recipes that differ", ["Key", *flat], rows), note)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat
