"""report.html: one self-contained page about a finished run, made from its records only.

The page loads nothing: its style sheet and figures are inline, it has no scripts, and its content security policy
forbids both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from minitron.files import readable_os_errors
from minitron.publish import plots
from minitron.publish.formats import (
    MISSING,
    RESULT_COLUMNS,
    Number,
    candidate_cells,
    candidate_columns,
    count,
    duration,
    environments,
    flops,
    milliseconds,
    ratio,
    result_cells,
    share,
    short_count,
    shown,
    size,
    source_name,
)
from minitron.publish.records import MODELS, RunRecords, result_table

SHOWN_CANDIDATES = 16
Heading = str | tuple[str, str]  # a name, or a name and its unit
LOSS_NAMES = {"forward_kl": "forward KL", "cross_entropy": "cross entropy"}


def write_report(records: RunRecords) -> Path:
    """Write report.html into the run directory; the same records give the same bytes.

    Raises: RunError if the file cannot be written.
    """
    path = records.path / "report.html"
    with readable_os_errors(path):
        path.write_text(render(records), encoding="utf-8")
    return path


def render(records: RunRecords) -> str:
    sections = (results, shapes, search, speeds, training, importance, texts, provenance)
    body = "\n".join(part for section in sections if (part := section(records)))
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(_title(records))}</title>
<style>
{style}</style>
</head>
<body>
{_header(records)}
<main>
{body}
</main>
</body>
</html>
"""


def _title(records: RunRecords) -> str:
    teacher, student = (
        short_count(records.evaluations[name]["parameters"]["total"]) for name in ("teacher", "student")
    )
    return f"{source_name(records.recipe['model'])} ({teacher}) → student ({student})"


def _header(records: RunRecords) -> str:
    seconds = sum(stage["seconds"] for stage in records.stages.values())
    last = records.stages["evaluations"]
    return f"""<header>
<h1>{escape(_title(records))}</h1>
<p class="lead">{escape(headline(records))}</p>
<p class="run">Run <code>{escape(records.path.resolve().name)}</code>, {escape(last["started"][:10])},
minitron {escape(last["versions"]["minitron"])}, {duration(seconds)} on {escape(last["hardware"]["device"])}.</p>
</header>"""


def headline(records: RunRecords) -> str:
    """The run in one sentence."""
    rows = {row["model"]: row for row in result_table(records)}
    teacher, pruned, student = (rows[name] for name in ("teacher", "pruned", "student"))
    return (
        f"{source_name(records.recipe['model'])} was cut to {share(student['non_embedding_share'])} of its "
        f"non-embedding parameters ({count(teacher['non_embedding'])} → {count(student['non_embedding'])}); "
        f"the KL divergence to it on held-out text is {shown(pruned['kl_to_teacher'], _headline_nats)} nats per token "
        f"after pruning and {shown(student['kl_to_teacher'], _headline_nats)} after distillation on "
        f"{count(records.stages['student']['result']['training']['tokens'])} tokens."
    )


def _headline_nats(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def results(records: RunRecords) -> str:
    rows = result_table(records)
    tokens = records.evaluations["teacher"]["tokens"]
    table = _table(
        "Results",
        ["Model", *((column.heading, column.unit) for column in RESULT_COLUMNS)],
        [[row["model"], *result_cells(row)] for row in rows],
    )
    charts = [
        ("Language-model loss", "lm_loss", "On held-out text, at each stage. Lower is better."),
        ("KL divergence to the teacher", "kl_to_teacher", "On the same text. 0 is the teacher itself."),
    ]
    figures = []
    for name, key, caption in charts:
        values = {row["model"]: row[key] for row in rows if shown(row[key], str) != MISSING}
        label = f"Bar chart, {name} in nats per token: " + ", ".join(f"{m} {v:.3f}" for m, v in values.items())
        figures.append(_figure(plots.bars(values, "nats per token", label), name, caption))
    note = (
        f"Means over {count(tokens)} predicted tokens of text that was held out from training. Perplexity is the "
        "exponential of the loss. KL is KL(teacher ‖ model) of the next-token distributions. Top-1 agreement is the "
        "share of tokens for which the model and the teacher predict the same next token. 1 MB is 1,000,000 bytes."
    )
    scratch = " The scratch model has the student’s shape and was trained from random weights on the same tokens."  # noqa: RUF001
    return _section("Results", table, _note(note + scratch * ("scratch" in records.evaluations)), _figures(figures))


def shapes(records: RunRecords) -> str:
    teacher, student = (records.evaluations[name] for name in ("teacher", "student"))
    sizes = [row["shape"] | {"kv_cache": row["kv_cache_bytes_per_token"]} for row in (teacher, student)]
    parts = [row["parameters"] for row in (teacher, student)]
    shape_head = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab")
    part_head = ("embedding", "attention", "mlp", "norm")
    return _section(
        "Shape",
        _table(
            "Shape before and after",
            ["Model", *shape_head, ("KV cache", "bytes per token")],
            _before_and_after((*shape_head, "kv_cache"), *sizes),
        ),
        _table("Parameters by part", ["Parameters", *part_head], _before_and_after(part_head, *parts)),
        _note(f"Weights and KV cache in {student['dtype']}, the dtype of the checkpoint."),
    )


def _before_and_after(keys: Sequence[str], teacher: Mapping[str, int], student: Mapping[str, int]) -> list[list[str]]:
    return [
        ["teacher", *(count(teacher[key]) for key in keys)],
        ["student", *(count(student[key]) for key in keys)],
        ["kept", *(share(student[key] / teacher[key]) if teacher[key] else MISSING for key in keys)],
    ]


def search(records: RunRecords) -> str:
    if not records.search:
        return ""
    facts, found = records.search, records.search["candidates"]
    columns = candidate_columns(found)
    head = ["Rank", *(c.heading if not c.unit else (c.heading, c.unit) for c in columns)]
    rows = [[f"{rank}", *candidate_cells(one, columns)] for rank, one in enumerate(found[:SHOWN_CANDIDATES], start=1)]
    machine = facts["machine"]
    note = (
        f"The best {len(rows)} of {count(len(found))} shapes within the budgets. The damage is predicted from the "
        "statistics and has no unit; losses are the training loss, in nats per token, on the training blocks that "
        f"the first pass reads last. KV cache and times are of {count(facts['batch'])} × "  # noqa: RUF001
        f"{count(facts['context_tokens'])} tokens; times are modelled from {size(machine['bytes_per_second'])} and "
        f"{flops(machine['flops_per_second'])} per second, not measured."
    )
    table = _table("Candidates", head, rows)
    return _section("The search for the shape", _note(note), table, _figures(_search_figures(found)))


def _search_figures(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Costs against a loss that is comparable: at the first rung, else after the cut, else the prediction."""
    steps = sorted({int(step) for one in found for step in one["losses"]})
    step = next((str(step) for step in steps if step > 0), "0" if steps else None)
    y = "predicted damage" if step is None else "nats per token"
    when = {None: "predicted, not measured", "0": "right after the cut"}.get(step, f"after {step} steps")
    here = [one for one in found if step is None or step in one["losses"]]
    losses = [one["predicted"] if step is None else one["losses"][step] for one in here]
    axes: dict[str, tuple[str, Callable[[Number], str]]] = {
        "total": ("parameters", short_count),
        "kv_cache_bytes": ("KV cache", size),
        "decode_seconds": ("decoding step, modelled", milliseconds),
    }
    figures = [
        _figure(
            plots.pareto([(one[key], loss) for one, loss in zip(here, losses, strict=True)], x, y, form),
            f"Loss against {x}",
            f"Loss {when}; the line joins candidates that no other beats in both",
        )
        for key, (x, form) in axes.items()
    ]
    if len(steps) > 1:
        curves = [{int(at): loss for at, loss in one["losses"].items()} for one in here]
        caption = "Each rung keeps the better half; step 0 is right after the cut"
        figures.append(_figure(plots.rung_curves(curves, y), "Successive halving", caption))
    return figures


def speeds(records: RunRecords) -> str:
    if not records.speed:
        return ""
    rows = []
    for name, speed in records.speed.items():
        spreads = [_spread(speed[kind], *speed[f"{kind}_range"]) for kind in ("prefill", "decode")]
        rows.append([name, size(records.evaluations[name]["weight_bytes"]), *spreads])
    teacher, student = records.speed["teacher"], records.speed["student"]
    weights = [records.evaluations[name]["weight_bytes"] for name in ("student", "teacher")]
    ratios = [shown(student[kind] / teacher[kind], ratio) for kind in ("prefill", "decode")]
    rows.append(["student / teacher", ratio(weights[0] / weights[1]), *ratios])
    overlapping = [
        kind
        for kind in ("prefill", "decode")
        if student[f"{kind}_range"][0] <= teacher[f"{kind}_range"][1]
        and teacher[f"{kind}_range"][0] <= student[f"{kind}_range"][1]
    ]
    hardware = records.stages["evaluations"]["hardware"]
    note = (
        f"Median of several rounds, slowest to fastest in brackets; one sequence, {teacher['prompt_tokens']} prompt "
        f"tokens and {teacher['new_tokens']} new tokens, in transformers on {hardware['device']} "
        f"(CPU threads: {hardware['threads']})."
    )
    if overlapping:
        note += f" The ranges of {' and '.join(overlapping)} overlap: weak evidence of a difference there."
    head: list[Heading] = ["Model", ("Weights", "all tensors"), ("Prefill", "tokens/s"), ("Decode", "tokens/s")]
    return _section("Size and speed", _table("Size and speed", head, rows), _note(note))


def _spread(median: float, slowest: float, fastest: float) -> str:
    return shown(median, lambda value: f"{count(value)} ({count(slowest)}–{count(fastest)})")  # noqa: RUF001


def training(records: RunRecords) -> str:
    steps = [row for row in records.metrics if "loss" in row]
    if not steps:
        return ""
    recipe, last = records.recipe["distill"], steps[-1]
    name = LOSS_NAMES.get(recipe["loss"], recipe["loss"])
    thinned = -(-len(steps) // plots.MOST_POINTS)
    caption = f"{name}, nats per token" + (f"; each point is a mean of about {thinned} steps" if thinned > 1 else "")
    note = (
        f"{count(last['step'])} steps of {count(steps[0]['tokens'] / steps[0]['step'])} tokens, "
        f"{count(last['tokens'])} tokens in all. The held-out points use the first {count(recipe['evaluate_blocks'])} "
        "held-out blocks, or all if there are fewer; the result table may use another number."
    )
    figures = [
        _figure(plots.training_curve(records.metrics, "nats per token"), "Distillation loss", caption),
        _figure(plots.learning_rate_curve(records.metrics), "Learning rate", "of AdamW, at each step"),
    ]
    return _section("Training", _note(note), _figures(figures))


def importance(records: RunRecords) -> str:
    scores, plan = records.scores, records.plan
    if not scores or not plan:
        return ""
    before, after = plan["teacher"], plan["student"]
    kept = {dim: dict(zip(plan["layers"], plan[dim], strict=True)) for dim in ("ffn", "heads", "kv_heads")}
    group = before["heads"] // before["kv_heads"]
    drawn = {
        "layers": plots.layer_scores(scores["layers"], plan["layers"]),
        "hidden": plots.hidden_scores(scores["hidden"], plan["hidden"]),
        "ffn": plots.ffn_scores(scores["ffn"], kept["ffn"]),
        "heads": plots.head_scores(scores["heads"], kept["heads"], group, "query head"),
    }
    names = {
        "layers": ("Layers", "Block Influence: 1 - cosine between a layer’s input and output"),  # noqa: RUF001
        "hidden": ("Hidden channels", "One score for all layers"),
        "ffn": ("FFN neurons", "Sorted within each layer; opacity is the score, on a log scale"),
        "heads": ("Query heads", "Opacity is the score" + "; lines part the heads of different kv heads" * (group > 1)),
    }
    if group > 1:
        drawn["kv_heads"] = plots.head_scores(scores["kv_heads"], kept["kv_heads"], 0, "kv head")
        names["kv_heads"] = ("KV heads", "Opacity is the score")
    per_layer = {"ffn": " per layer", "heads": " per layer", "kv_heads": " per layer"}
    figures = [
        _figure(drawn[dim], title, f"{text}. {count(after[dim])} of {count(before[dim])} kept{per_layer.get(dim, '')}.")
        for dim, (title, text) in names.items()
    ]
    samples = records.stages["statistics"]["result"]
    legend = (
        '<p class="note"><span class="swatch kept"></span>kept <span class="swatch removed"></span>removed. '
        f"Scores from {count(samples['samples'])} calibration samples ({count(samples['tokens'])} tokens); "
        f"criterion: {escape(records.recipe['prune']['criterion'])}.</p>"
    )
    return _section("Importance", legend, _figures(figures))


def texts(records: RunRecords) -> str:
    if not records.generations:
        return ""
    parts = [_note(f"Greedy continuations, at most {records.recipe['evaluate']['new_tokens']} tokens each.")]
    for row in records.generations:
        columns = "".join(_continuation(name, row[name]) for name in MODELS if name in row)
        parts.append(
            f'<h3>Prompt: <code class="text">{escape(row["prompt"])}</code></h3>\n<div class="texts">{columns}</div>'
        )
    return _section("The same prompts, continued by each model", *parts)


def _continuation(model: str, text: str) -> str:
    shown_text = escape(text) or "<i>(nothing)</i>"
    return f'<div class="{model}"><h4>{model}</h4><p class="text" dir="auto">{shown_text}</p></div>'


def provenance(records: RunRecords) -> str:
    head: list[Heading] = [
        "Stage",
        ("Started", "UTC"),
        ("Time", "wall clock"),
        "Tokens",
        ("Peak memory", "host, whole process"),
        ("Inputs", "sha256, first 12 digits"),
    ]
    rows = [
        [
            name,
            stage["started"].replace("T", " ").removesuffix("Z"),
            duration(stage["seconds"]),
            shown(_stage_tokens(records, name), count),
            size(stage["peak_memory_bytes"]),
            ", ".join(f"{key}\N{NO-BREAK SPACE}{digest[:12]}" for key, digest in stage["inputs"].items()),
        ]
        for name, stage in records.stages.items()
    ]
    facts = {
        "Teacher": records.recipe["model"]
        + (f" at {records.recipe['revision']}" if records.recipe["revision"] else ""),
        "Data": records.recipe["data"]["source"],
        "Seed": str(records.recipe["seed"]),
    }
    recipe = yaml.safe_dump(records.recipe, sort_keys=False, allow_unicode=True)
    return _section(
        "Provenance",
        _facts(facts | environments(records.stages)),
        _table("Stages", head, rows),
        f"<details><summary>Full recipe</summary>\n<pre><code>{escape(recipe)}</code></pre></details>",
    )


def _stage_tokens(records: RunRecords, name: str) -> int | None:
    result = records.stages[name]["result"]
    match name:
        case "data":
            return result["train_tokens"] + result["heldout_tokens"]
        case "statistics":
            return result["tokens"]
        case "search":
            return result["tokens"]
        case "student" | "scratch":
            return result["training"]["tokens"]
        case "evaluations":
            return records.evaluations["teacher"]["tokens"]
    return None


def _section(title: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *parts, "</section>"])


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _facts(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _figure(svg: str, title: str, caption: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption>\n{svg}</figure>"


def _figures(figures: Iterable[str]) -> str:
    return '<div class="figures">\n' + "\n".join(figures) + "\n</div>"


def _table(caption: str, head: Sequence[Heading], rows: Iterable[Sequence[str]]) -> str:
    """The first cell of each row names it. The table scrolls by itself where the page is too narrow."""
    top = "".join(f'<th scope="col">{_heading(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _heading(cell: Heading) -> str:
    return escape(cell) if isinstance(cell, str) else f"{escape(cell[0])}<small>{escape(cell[1])}</small>"
