"""What the commands print of their results, as lines of text."""

from typing import Any


def candidate_lines(facts: dict[str, Any], top: int) -> list[str]:
    from minitron.report.tables import candidate_cells, candidate_columns

    found, speeds = facts["candidates"], facts["machine"]
    columns = candidate_columns(found)
    cells = [[column.heading for column in columns], [column.unit for column in columns]]
    lines = aligned(cells + [candidate_cells(one, columns) for one in found[:top]])
    if len(found) > top:
        lines.append(f"and {len(found) - top:,} more; --top or --json shows them")
    return [
        *lines,
        "",
        f"{len(found):,} shapes fit. Cache and times are of {facts['batch']} x {facts['context_tokens']:,} tokens; "
        f"times are modelled from {speeds['bytes_per_second'] / 1e9:,.1f} GB/s and "
        f"{speeds['flops_per_second'] / 1e12:,.3g} TFLOP/s.",
    ]


def aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def benchmark_lines(facts: dict[str, Any]) -> list[str]:
    from minitron.core.text import percent, shown
    from minitron.report.tables import BENCHMARK_NOTE, score

    teacher = facts.get("teacher_tasks", {})
    cells = [["benchmark", "metric", "shots", "items", *(["teacher"] if teacher else []), "model"]]
    cells[0] += ["kept"] if teacher else []
    for name, row in facts["tasks"].items():
        own = [name, row["metric"], str(row["shots"]), f"{row['n']:,}"]
        pair = [score(teacher[name])] if teacher else []
        cells.append([*own, *pair, score(row), *([shown(facts["kept"][name], percent)] if teacher else [])])
    return [*aligned(cells), "", BENCHMARK_NOTE]


def planned_lines(planned: list[dict[str, Any]]) -> list[str]:
    from minitron.core.text import size

    cells = [["type", "size", "bits/weight", "falls back"]]
    for row in planned:
        kinds = [f"{was} -> {now}" for was, now in row["fallbacks"].values()]
        fallen = ", ".join(f"{kinds.count(kind)} matrices {kind}" for kind in dict.fromkeys(kinds))
        cells.append([row["name"], size(row["bytes"]), f"{row['bits_per_weight']:.2f}", fallen or "-"])
    return aligned(cells)


def ladder_lines(table: dict[str, Any]) -> list[str]:
    from minitron.core.text import percent, perplexity, size

    cells = [["type", "size", "bits/weight", "imatrix", "perplexity", "KL", "top-1", "other way"]]
    for row in table["files"]:
        seen = row["measured"]
        measured = [perplexity(seen["perplexity"]), f"{seen['kl']:.5f}", percent(seen["top1"])] if seen else ["-"] * 3
        other = "-" if row["kl_of_other"] is None else f"{row['kl_of_other']:.5f}"
        own = [row["name"], size(row["bytes"]), f"{row['bits_per_weight']:.2f}", "yes" if row["informed"] else "no"]
        cells.append([*own, *measured, other])
    return aligned(cells)


def speed_lines(facts: dict[str, Any]) -> list[str]:
    from minitron.core.text import rate, shown, size, with_range

    names = [*facts["models"], *(["ratio"] if "ratio" in facts["rows"][0] else [])]
    cells = [["batch", "context", "", "prefill, tokens/s", "decode, tokens/s", "peak memory"]]
    for row in facts["rows"]:
        for name in names:
            form, speed = ("{:.2f}".format if name == "ratio" else rate), row[name]
            rates = [with_range(speed[kind], speed[f"{kind}_range"], form) for kind in ("prefill", "decode")]
            memory = shown(speed.get("peak_memory_bytes"), size)
            cells.append([str(row["batch"]), str(row["context"]), name, *rates, memory])
    busiest = max(facts["load_average"])
    busy = f"; the load average was up to {busiest:.1f}: other work had its share" * (busiest > facts["threads"] + 0.5)
    return [
        *aligned(cells),
        "",
        f"{facts['engine']} on {facts['device']}, CPU threads: {facts['threads']}; median of {facts['rounds']} rounds, "
        f"slowest to fastest in brackets; {facts['new_tokens']} new tokens{busy}",
    ]


def estimate_lines(facts: dict[str, Any]) -> list[str]:
    from minitron.core.text import duration, flops, size

    lines, context, tokens = [], facts["context"], facts["distill_tokens"]
    for name in ("teacher", "student"):
        model = facts[name]
        parameters, cache = model["parameters"], model["kv_cache_bytes_per_token"]
        lines += [
            f"{name}: {model['family']}, " + " ".join(f"{dim}={number}" for dim, number in model["shape"].items()),
            f"  {parameters['total']:,} parameters, {parameters['non_embedding']:,} non-embedding",
            f"  {size(model['weight_bytes'])} of {model['dtype']} weights, "
            f"KV cache {size(cache)} a token, {size(cache * context)} at {context:,} tokens",
        ]
    forward, step = facts["teacher_forward_flops_per_token"], facts["student_step_flops_per_token"]
    if sampled := facts["sampled_tokens"]:
        lines.append(
            f"text: {sampled:,} training tokens sampled from the teacher, one by one, {flops(sampled * forward)}"
        )
    lines += [
        f"calibration: {facts['calibration_tokens']:,} tokens at most, {flops(facts['calibration_flops'])}",
        f"distillation: {f'{tokens:,} tokens' if tokens else 'one pass over the text'}; per token "
        f"{flops(forward)} teacher forward, {flops(step)} student step",
        f"memory while distilling: {size(facts['training_bytes'])} for weights, gradients and optimizer, "
        "and activations on top",
    ]
    if tokens:
        here = facts["here"]
        lines.append(f"all of distillation: {flops(facts['distill_flops'])}")
        if corrected := facts["correction_tokens"]:
            lines.append(
                f"correction of the teacher: {corrected:,} tokens at most, {flops(facts['correction_flops'])} more"
            )
        lines.append(
            f"on this machine: {duration(here['seconds'])} at {flops(here['flops_per_second'])}/s, an assumed "
            f"{here['utilisation']:.0%} of what a large matrix product reaches here"
        )
    if tokens and "gpus" in facts:
        gpus = facts["gpus"]
        lines.append(
            f"on {gpus['count']} GPUs: {duration(gpus['seconds'])}, "
            f"{gpus['count'] * gpus['seconds'] / 3600:,.0f} GPU hours, at an assumed {gpus['utilisation']:.0%} of "
            f"{gpus['teraflops']:g} TFLOP/s each; {size(gpus['bytes_per_gpu'])} on each, fully sharded"
        )
    return lines
