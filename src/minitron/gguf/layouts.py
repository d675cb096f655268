"""What quantization.json holds, checked when it is read."""

from pydantic import TypeAdapter

from minitron.core.layouts import Amount, Count, FileName, Layout, Positive
from minitron.core.typed_files import FileKind


class Quantized(Layout):
    kl: float
    top1: float
    tokens: Count
    perplexity: float
    reference_perplexity: float


class QuantizedFile(Layout):
    name: str
    file: FileName
    bytes: Positive
    bits_per_weight: Amount
    informed: bool
    measured: Quantized | None
    kl_of_other: float | None = None


class Ladder(Layout):
    """gguf/quantization.json."""

    notes: list[str]
    files: list[QuantizedFile]


QUANTIZATION = FileKind("a table of GGUF files", TypeAdapter(Ladder))
