"""The formats in which a run writes its student besides the checkpoint, a row each: what is done, and its words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from minitron.core.config import Section
from minitron.core.progress import Listener
from minitron.core.text import MISSING, count, percent, perplexity, size
from minitron.core.typed_files import FileKind
from minitron.data.corpus import Corpus, draw_samples
from minitron.gguf.config import QUANTIZE_TOKENS, require_gguf
from minitron.gguf.layouts import QUANTIZATION, QuantizedModel, WrittenFile
from minitron.model.checkpoint import Checkpoint
from minitron.report import html, plots
from minitron.report.tables import fenced, markdown_table


@dataclass(frozen=True)
class Export:
    """A student to be written in another format.

    name: of the model, for the names of its files.
    card: the metadata that its model card will have, but for the results.
    config: the exporter's section of the recipe; None without a section.
    source: of the text of the corpus.
    """

    student: Checkpoint
    name: str
    card: Mapping[str, Any]
    config: Any
    corpus: Corpus
    source: str
    seed: int
    listener: Listener


@dataclass(frozen=True)
class Exporter:
    """An output format. Its name in the table is the stage of a run and the directory of its files.

    title: the heading in report and card.
    write: writes the files into a directory, proves them, and returns the result for the stage's record.
    table, kind: the file in that directory that describes the others, and its type. Report, card and push read it.
    report: the parts of the report's section, as HTML; none where there is nothing to show.
    card: the text of the model card's section, with a prompt for examples; empty where there is nothing to show.
    files: the files in the directory that are pushed.
    section: the section of the recipe, whose property `wanted` says whether files are asked for; None for always.
    require: raises a MinitronError where packages are missing.
    """

    title: str
    write: Callable[[Export, Path], Mapping[str, object]]
    table: str
    kind: FileKind[Any]
    report: Callable[[Any], list[str]]
    card: Callable[[Any, str], str]
    files: Callable[[Any, Path], list[Path]]
    section: str | None = None
    require: Callable[[], None] = lambda: None

    def config(self, recipe: BaseModel) -> Section | None:
        """The exporter's section of a recipe."""
        return None if self.section is None else getattr(recipe, self.section)

    def wanted(self, recipe: BaseModel) -> bool:
        """Whether a recipe, or what a report reads of it, asks for the files."""
        if self.section is None:
            return True
        section = vars(recipe).get(self.section)
        return section is not None and bool(section.wanted)


def _write_gguf(export: Export, out: Path) -> Mapping[str, object]:
    from minitron.gguf.quantize import QuantizeText, write_ladder

    config, corpus = export.config, export.corpus
    tokens = draw_samples(corpus, config.samples, export.seed).tokens
    heldout = torch.from_numpy(corpus.heldout.head(config.blocks).select(slice(None)))
    source = Path(export.source).name or export.source
    text = QuantizeText(tokens[:, :QUANTIZE_TOKENS], heldout[:, :QUANTIZE_TOKENS], source)
    name, card, listener = export.name, export.card, export.listener
    return write_ladder(export.student, config, out, text=text, name=name, card=card, listener=listener).to_dict()


def _gguf_cells(file: WrittenFile) -> list[str]:
    return [size(file.bytes), f"{file.bits_per_weight:.2f}", "yes" if file.informed else "no"]


GGUF_HEAD: list[html.Heading] = [
    "Type",
    "File",
    ("Bits", "per weight"),
    ("Importance", "matrix"),
    ("Perplexity", "in llama.cpp"),
    ("KL to student", "nats/token"),
    ("Top-1", "agreement"),
    ("KL of the other", "nats/token"),
]


def _gguf_report(model: QuantizedModel) -> list[str]:
    if not model.files:
        return []
    rows = []
    for file in model.files:
        measured = [MISSING] * 4
        if seen := file.measured:
            other = MISSING if file.kl_of_other is None else f"{file.kl_of_other:.5f}"
            measured = [perplexity(seen.perplexity), f"{seen.kl:.5f}", percent(seen.top1), other]
        rows.append([file.name, *_gguf_cells(file), *measured])
    parts = [html.table("GGUF files", GGUF_HEAD, rows)]
    if first := next((file.measured for file in model.files if file.measured), None):
        note = (
            f"Each file was run in llama.cpp over {count(first.tokens)} tokens of held-out text, against the "
            f"student as it is, whose perplexity on them is {perplexity(first.reference_perplexity)}. A type that "
            "can do without an importance matrix was written with and without one, and the better file kept; the last "
            "column is the other. A name with bpw is a mixture of minitron's own."
        )
        parts.append(html.note(note))
    parts += [html.note(note) for note in model.notes]
    points = {file.name: (file.bytes, file.measured.kl) for file in model.files if file.measured}
    if len(points) > 1:
        drawn = plots.file_sizes(points)
        parts.append(
            html.figures([html.figure(drawn, "What a smaller file costs", "Lower and further left is better")])
        )
    return parts


def _gguf_card(model: QuantizedModel, prompt: str) -> str:
    if not model.files:
        return ""
    first, rows = model.files[0], []
    for file in model.files:
        measured = [f"{file.measured.kl:.5f}", percent(file.measured.top1)] if file.measured else [MISSING] * 2
        rows.append([file.file, *_gguf_cells(file), *measured])
    tested = "Each was run in llama.cpp and compared with this model." if first.measured else "None was tested."
    notes = "".join(f"\n\nNote: {note}." for note in model.notes)
    head = ["file", "size", "bits/weight", "importance matrix", "KL to this model", "top-1 agreement"]
    return f"""{tested}{notes}

{markdown_table(head, rows)}

With llama.cpp: `llama-cli -m {first.file} -p {prompt!r}`. With Ollama:

{fenced(f"FROM ./{first.file}", "Modelfile")}"""


def _gguf_files(model: QuantizedModel, directory: Path) -> list[Path]:
    importance = directory / "imatrix.gguf"
    files = [directory / file.file for file in model.files]
    return [*files, importance] if files and importance.is_file() else files


EXPORTERS: dict[str, Exporter] = {
    "gguf": Exporter(
        title="GGUF files",
        write=_write_gguf,
        table="quantization.json",
        kind=QUANTIZATION,
        report=_gguf_report,
        card=_gguf_card,
        files=_gguf_files,
        section="gguf",
        require=require_gguf,
    ),
}
