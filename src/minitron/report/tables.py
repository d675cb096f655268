"""The tables of results, in the same words for the report, the card and the terminal."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.run_layout import Record
from minitron.core.text import Number, count, milliseconds, nats, percent, perplexity, share, short_count, shown, size
from minitron.data.corpus import TEXT_SUFFIXES
from minitron.evaluation.layouts import TaskResult

# Beginnings of the names of metrics that are shares of 1, shown in per cent as in the papers.
_SHARES = ("acc", "acc_norm", "exact_match", "pass", "rouge", "f1")

SHAPE_DIMS = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab")
BENCHMARK_NOTE = "Shares are in per cent, ± one standard error over the items."


def score(result: TaskResult) -> str:
    """Write a benchmark's value with its standard error."""
    scale = 100 if result.metric.startswith(_SHARES) else 1

    def scaled(number: Number | None) -> str:
        return shown(number, lambda known: f"{scale * known:,.1f}")

    return scaled(result.value) if result.stderr is None else f"{scaled(result.value)} ± {scaled(result.stderr)}"


@dataclass(frozen=True)
class Column:
    key: str
    heading: str
    unit: str
    form: Callable[[Number], str]


# The keys of records.result_table.
RESULT_COLUMNS = (
    Column("total", "Parameters", "total", count),
    Column("non_embedding", "Parameters", "non-embedding", count),
    Column("non_embedding_share", "Share", "non-embedding", share),
    Column("lm_loss", "LM loss", "nats/token", nats),
    Column("perplexity", "Perplexity", "per token", perplexity),
    Column("bits_per_byte", "Bits per byte", "of text", nats),
    Column("kl_to_teacher", "KL to teacher", "nats/token", nats),
    Column("top1_agreement", "Top-1", "agreement", percent),
    Column("weight_bytes", "Weights", "all tensors", size),
)


def result_cells(row: Mapping[str, Any], columns: Iterable[Column] = RESULT_COLUMNS) -> list[str]:
    """The row's values in the order of the columns."""
    return [shown(row[column.key], column.form) for column in columns]


_CANDIDATE_COLUMNS = (
    *(Column(dim, dim, "", count) for dim in ("layers", "hidden", "ffn", "heads", "kv_heads")),
    Column("total", "Parameters", "total", short_count),
    Column("non_embedding", "Non-emb.", "", short_count),
    Column("weight_bytes", "Weights", "", size),
    Column("kv_cache_bytes", "KV cache", "", size),
    Column("decode_seconds", "Decode", "per step", milliseconds),
    Column("prefill_seconds", "Prefill", "", milliseconds),
    Column("predicted", "Damage", "predicted", nats),
)


def candidate_columns(candidates: Iterable[Mapping[str, Any]]) -> list[Column]:
    """The columns of a search's candidates: costs, prediction, and loss at each step."""
    steps = sorted({int(step) for one in candidates for step in one["losses"]})
    measured = [Column(str(step), "Loss", f"step {step:,}" if step else "after the cut", nats) for step in steps]
    return [*_CANDIDATE_COLUMNS, *measured]


def candidate_cells(candidate: Mapping[str, Any], columns: Iterable[Column]) -> list[str]:
    """The cells of a candidate in a search's candidates.json."""
    values = {**candidate, **candidate["shape"], **candidate["losses"]}
    return [shown(values.get(column.key), column.form) for column in columns]


def hub_id(source: str) -> str | None:
    """The source if it is an `organisation/name` on the hub, None if it is a local path."""
    looks_right = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not source.lower().endswith(TEXT_SUFFIXES)
    return source if looks_right and not Path(source).exists() else None


def source_name(source: str) -> str:
    """A hub id as it is, or the last part of a local path."""
    return hub_id(source) or Path(source).name


def environments(stages: Mapping[str, Record]) -> dict[str, str]:
    """Hardware and software; each of several, in a resumed run, with the names of its stages."""
    groups: dict[str, list[str]] = {}
    for name, stage in stages.items():
        machine = stage.hardware
        device = f"{machine.device}, {machine.cores} CPU cores, {size(machine.memory_bytes)} host memory"
        software = ", ".join(f"{package} {number}" for package, number in stage.versions.items())
        groups.setdefault(json.dumps([device, software]), []).append(name)
    facts = {}
    for key, names in groups.items():
        of = "" if len(groups) == 1 else f" ({', '.join(names)})"
        facts[f"Hardware{of}"], facts[f"Software{of}"] = json.loads(key)
    return facts


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, language: str) -> str:
    """Fence a code block with more backticks than any run of them in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}{fence}"
