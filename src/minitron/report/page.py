"""report.html: one self-contained page about a finished run, made from its records only."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import yaml

from minitron.core.files import prove_file, write_text
from minitron.core.run_layout import MODELS, STAGES, RunLayout
from minitron.core.text import (
    MISSING,
    count,
    duration,
    flops,
    nats,
    percent,
    rate,
    ratio,
    share,
    short_count,
    shown,
    size,
    with_range,
)
from minitron.data.sources import TEACHER
from minitron.report import html, plots
from minitron.report.choices import why
from minitron.report.exporters import EXPORTERS
from minitron.report.published import PUBLISHED
from minitron.report.records import (
    RunRecords,
    benchmarks,
    correction,
    exported,
    heldout_source,
    loss_name,
    result_table,
    sampling,
    stage_flops,
)
from minitron.report.tables import (
    BENCHMARK_NOTE,
    RESULT_COLUMNS,
    SHAPE_DIMS,
    environments,
    result_cells,
    score,
    source_name,
)


def write_report(records: RunRecords, out: Path | None = None) -> Path:
    """Write report.html, by default into the run directory; the same records give the same bytes.

    Raises: RunError if the file cannot be written.
    """
    path = out or RunLayout(records.path).report
    prove_file(path, keeps=[records.path])
    write_text(path, render(records))
    return path


def render(records: RunRecords) -> str:
    sections = (results, measured_tasks, shapes, why, speeds, exports, training, texts, provenance)
    body = "\n".join(part for section in sections if (part := section(records)))
    return html.document(_title(records), _header(records), body)


def _title(records: RunRecords) -> str:
    teacher, student = (short_count(records.evaluations[name].parameters.total) for name in ("teacher", "student"))
    return f"{source_name(records.recipe.model)} ({teacher}) → student ({student})"


def _header(records: RunRecords) -> str:
    seconds = sum(stage.seconds for stage in records.stages.values())
    last = records.stages["evaluations"]
    return f"""<header>
<h1>{escape(_title(records))}</h1>
<p class="lead">{escape(headline(records))}</p>
<p class="run">Run <code>{escape(records.path.resolve().name)}</code>, {escape(last.started[:10])},
minitron {escape(last.versions["minitron"])}, {duration(seconds)} on {escape(last.hardware.device)}.</p>
</header>"""


def headline(records: RunRecords) -> str:
    """The run in one sentence."""
    rows = {row["model"]: row for row in result_table(records)}
    teacher, student = rows["teacher"], rows["student"]
    corrected = correction(records) is not None
    whom = "the corrected one" if corrected else "it"
    found = [records.evaluations[name] for name in ("pruned", "student")]
    after_cut, after_all = (one.kl_to_corrected if corrected else one.kl_to_teacher for one in found)
    return (
        f"{source_name(records.recipe.model)} was cut to {share(student['non_embedding_share'])} of its "
        f"non-embedding parameters ({count(teacher['non_embedding'])} → {count(student['non_embedding'])}); "
        f"the KL divergence to {whom} on held-out text is {shown(after_cut, _headline_nats)} nats per token "
        f"after pruning and {shown(after_all, _headline_nats)} after distillation on "
        f"{count(records.results.student.training.tokens)} tokens."
    )


def _headline_nats(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def results(records: RunRecords) -> str:
    rows = result_table(records)
    tokens = records.evaluations["teacher"].tokens
    table = html.table(
        "Results",
        ["Model", *((column.heading, column.unit) for column in RESULT_COLUMNS)],
        [[row["model"], *result_cells(row)] for row in rows],
    )
    losses = {row["model"]: row["lm_loss"] for row in rows}
    kls = {row["model"]: row["kl_to_teacher"] for row in rows}
    charts: list[tuple[str, Mapping[str, float | None], str]] = [
        ("Language-model loss", losses, "On held-out text, at each stage. Lower is better."),
        ("KL divergence to the teacher", kls, "On the same text. 0 is the teacher itself."),
    ]
    figures = []
    for name, of_models, caption in charts:
        values = {model: value for model, value in of_models.items() if value is not None and math.isfinite(value)}
        label = f"Bar chart, {name} in nats per token: " + ", ".join(f"{m} {v:.3f}" for m, v in values.items())
        figures.append(html.figure(plots.bars(values, "nats per token", label), name, caption))
    note = (
        f"Means over {count(tokens)} predicted tokens of text that was held out from training. Perplexity is the "
        "exponential of the loss. KL is KL(teacher ‖ model) of the next-token distributions. Top-1 agreement is the "
        "share of tokens for which the model and the teacher predict the same next token. 1 MB is 1,000,000 bytes."
    )
    scratch = " The scratch model has the student’s shape and was trained from random weights on the same tokens."  # noqa: RUF001
    note += scratch if "scratch" in records.evaluations else ""
    if how := correction(records):
        note += (
            f" The corrected model is the teacher, {how}. KL and agreement are to the teacher as it was given, so the "
            "correction counts as distance. KL to the corrected model: "
            + ", ".join(
                f"{name} {shown(found.kl_to_corrected, nats)}"
                for name, found in records.evaluations.items()
                if "kl_to_corrected" in found.model_fields_set
            )
            + "."
        )
    if heldout_source(records) == TEACHER:
        note += (
            " The text was sampled from the teacher itself: its loss there is the entropy of its own text, and tells "
            "nothing about other text."
        )
    return html.section("Results", table, html.note(note), html.figures(figures))


def measured_tasks(records: RunRecords) -> str:
    """The benchmarks of teacher and student, beside the values of the papers."""
    rows = benchmarks(records)
    if not rows:
        return ""
    head: list[html.Heading] = [
        "Benchmark",
        "Metric",
        "Shots",
        "Items",
        "Teacher",
        "Student",
        ("Kept", "of the teacher"),
    ]
    cells = [
        [
            row.student.title + (CHOSEN if row.chosen_by else ""),
            row.student.metric,
            str(row.student.shots),
            count(row.student.n),
            score(row.teacher),
            score(row.student),
            shown(row.kept, percent),
        ]
        for row in rows
    ]
    note = f"{BENCHMARK_NOTE} Measured by lm-evaluation-harness, both models on the same items with the same prompts."
    if any(row.chosen_by for row in rows):
        note += f" {CHOSEN.strip()}: its questions decided which layers stay, so its value is no result of the student."
    limit = records.recipe.evaluate.limit
    note += f" Only the first {count(limit)} items of each task were asked." if limit else ""
    parts = [html.table("Benchmarks", head, cells), html.note(note)]
    own = [row for row in rows if any(row.task in published for published in PUBLISHED.values())]
    if own:
        names: list[html.Heading] = ["Model", *(row.student.title for row in own)]
        published = [
            [model, *(f"{values[row.task]:.1f}" if row.task in values else MISSING for row in own)]
            for model, values in PUBLISHED.items()
        ]
        table = html.table("Published values", names, published)
        text = "As the papers report them, in per cent, with the shots of their suite; for orientation, not run here."
        parts.append(html.details("The published models", f"{table}\n{html.note(text)}"))
    return html.section("Benchmarks", *parts)


CHOSEN = " (used to choose)"


def shapes(records: RunRecords) -> str:
    teacher, student = (records.evaluations[name] for name in ("teacher", "student"))
    sizes = [vars(row.shape) | {"kv_cache": row.kv_cache_bytes_per_token} for row in (teacher, student)]
    parts = [vars(row.parameters) for row in (teacher, student)]
    part_head = ("embedding", "attention", "mlp", "norm")
    return html.section(
        "Shape",
        html.table(
            "Shape before and after",
            ["Model", *SHAPE_DIMS, ("KV cache", "bytes per token")],
            _before_and_after((*SHAPE_DIMS, "kv_cache"), *sizes),
        ),
        html.table("Parameters by part", ["Parameters", *part_head], _before_and_after(part_head, *parts)),
        html.note(f"Weights and KV cache in {student.dtype}, the dtype of the checkpoint."),
    )


def _before_and_after(keys: Sequence[str], teacher: Mapping[str, int], student: Mapping[str, int]) -> list[list[str]]:
    return [
        ["teacher", *(count(teacher[key]) for key in keys)],
        ["student", *(count(student[key]) for key in keys)],
        ["kept", *(share(student[key] / teacher[key]) if teacher[key] else MISSING for key in keys)],
    ]


def speeds(records: RunRecords) -> str:
    if records.speed is None:
        return ""
    teacher, student, ratios = records.speed.teacher, records.speed.student, records.speed.ratio
    assert ratios is not None
    weights = {name: records.evaluations[name].weight_bytes for name in ("teacher", "student")}
    rows = []
    for name, speed in (("teacher", teacher), ("student", student)):
        prefill = with_range(speed.prefill, speed.prefill_range, rate)
        rows.append([name, size(weights[name]), prefill, with_range(speed.decode, speed.decode_range, rate)])
    shares = [shown(value, ratio) for value in (ratios.prefill, ratios.decode)]
    rows.append(["student / teacher", ratio(weights["student"] / weights["teacher"]), *shares])
    ranges = {
        "prefill": (teacher.prefill_range, student.prefill_range),
        "decode": (teacher.decode_range, student.decode_range),
    }
    overlapping = [kind for kind, (one, other) in ranges.items() if other[0] <= one[1] and one[0] <= other[1]]
    hardware = records.stages["evaluations"].hardware
    note = (
        f"Median of several rounds, slowest to fastest in brackets; one sequence, {teacher.prompt_tokens} prompt "
        f"tokens and {teacher.new_tokens} new tokens, in transformers on {hardware.device} "
        f"(CPU threads: {hardware.threads})."
    )
    if overlapping:
        note += f" The ranges of {' and '.join(overlapping)} overlap: weak evidence of a difference there."
    head: list[html.Heading] = ["Model", ("Weights", "all tensors"), ("Prefill", "tokens/s"), ("Decode", "tokens/s")]
    return html.section("Size and speed", html.table("Size and speed", head, rows), html.note(note))


def exports(records: RunRecords) -> str:
    """The student in other formats, a section each."""
    parts = {row.title: row.report(records.exports[name]) for name, row in exported(records)}
    return "\n".join(html.section(title, *some) for title, some in parts.items() if some)


def training(records: RunRecords) -> str:
    steps = [row for row in records.metrics if row.loss is not None]
    if not steps:
        return ""
    recipe, last = records.recipe.distill, steps[-1]
    name = loss_name(recipe)
    thinned = -(-len(steps) // plots.MOST_POINTS)
    caption = f"{name[0].upper()}{name[1:]}, nats per token" + (
        f"; each point is a mean of about {thinned} steps" if thinned > 1 else ""
    )
    note = (
        f"{count(last.step)} steps of {count(steps[0].tokens / steps[0].step)} tokens, "
        f"{count(last.tokens)} tokens in all. The held-out points use the first {count(recipe.evaluate_blocks)} "
        "held-out blocks, or all if there are fewer; the result table may use another number."
    )
    if (budget := records.results.student.budget) is not None:
        note += f" The length was given as time: {budget}."
    if (fit := records.results.student.fit) is not None and fit.changes:
        note += f" To fit the memory, settings were changed: {fit}."
    if recipe.correction is not None:
        when = ", as it was at each step" if recipe.correction == "parallel" else ""
        note += f" The loss is against the corrected teacher{when}."
    figures = [
        html.figure(plots.training_curve(records.metrics, "nats per token"), "Distillation loss", caption),
        html.figure(plots.learning_rate_curve(records.metrics), "Learning rate", "at each step"),
    ]
    return html.section("Training", html.note(note), html.figures(figures))


def texts(records: RunRecords) -> str:
    if not records.generations:
        return ""
    parts = [html.note(f"Greedy continuations, at most {records.recipe.evaluate.new_tokens} tokens each.")]
    for row in records.generations:
        of_models = row.of_models
        columns = "".join(_continuation(name, of_models[name]) for name in MODELS if name in of_models)
        parts.append(
            f'<h3>Prompt: <code class="text">{escape(row.prompt)}</code></h3>\n<div class="texts">{columns}</div>'
        )
    return html.section("The same prompts, continued by each model", *parts)


def _continuation(model: str, text: str) -> str:
    shown_text = escape(text) or "<i>(nothing)</i>"
    return f'<div class="{model}"><h4>{model}</h4><p class="text" dir="auto">{shown_text}</p></div>'


def provenance(records: RunRecords) -> str:
    head: list[html.Heading] = [
        "Stage",
        ("Started", "UTC"),
        ("Time", "wall clock"),
        "Tokens",
        ("Compute", "counted"),
        ("Peak memory", "host, whole process"),
        ("Inputs", "sha256, first 12 digits"),
    ]
    counted = stage_flops(records)
    rows = [
        [
            name,
            stage.started.replace("T", " ").removesuffix("Z"),
            duration(stage.seconds),
            shown(_stage_tokens(records, name), count),
            shown(counted.get(name), flops),
            size(stage.peak_memory_bytes),
            ", ".join(f"{key}\N{NO-BREAK SPACE}{digest[:12]}" for key, digest in stage.inputs.items()),
        ]
        for name, stage in records.stages.items()
    ]
    facts = {
        "Teacher": records.recipe.model + (f" at {records.recipe.revision}" if records.recipe.revision else ""),
        "Data": f"sampled from the teacher, {how}" if (how := sampling(records)) else records.recipe.data.source,
        "Seed": str(records.recipe.seed),
        "Cost": _cost(records, sum(counted.values())),
    }
    words = {name: STAGES[name] if name in STAGES else EXPORTERS[name].title for name in records.stages}
    recipe = yaml.safe_dump(records.whole_recipe, sort_keys=False, allow_unicode=True)
    return html.section(
        "Provenance",
        html.facts(facts | environments(records.stages)),
        html.table("Stages", head, rows),
        html.details("What each stage makes", html.facts(words)),
        html.details("Full recipe", f"<pre><code>{escape(recipe)}</code></pre>"),
    )


def _cost(records: RunRecords, operations: int) -> str:
    """Tokens, operations, hours, and energy if it is known for every stage."""
    seconds = sum(stage.seconds for stage in records.stages.values())
    trained = sum(training.tokens for training in records.results.trainings.values())
    joules = [stage.energy_joules for stage in records.stages.values()]
    known = [one for one in joules if one is not None]
    energy = f", {sum(known) / 3.6e6:,.3g} kWh by the processors' own counters" if len(known) == len(joules) else ""
    return (
        f"{count(trained)} tokens trained on, {flops(operations)} in calibration and training, "
        f"{seconds / 3600:,.2f} hours{energy}"
    )


def _stage_tokens(records: RunRecords, name: str) -> int | None:
    results = records.results
    tokens = {name: training.tokens for name, training in results.trainings.items()}
    tokens |= {
        "data": results.data.train_tokens + results.data.heldout_tokens,
        "statistics": results.statistics.tokens,
        "evaluations": records.evaluations["teacher"].tokens,
    }
    tokens |= {} if results.search is None else {"search": results.search.tokens}
    return tokens.get(name)
