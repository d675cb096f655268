"""The contents of quantization.json, checked when they are read."""

import math

from pydantic import TypeAdapter

from minitron.core.layouts import Amount, Count, FileName, Layout, Positive
from minitron.core.typed_files import FileKind


class Measured(Layout):
    """A file that llama.cpp ran over held-out text, compared with the unquantized model in transformers in float32.

    kl: KL(unquantized || file), in nats a token.
    top1: the share of tokens for which both find the same token likeliest.
    reference_perplexity: of the unquantized model.
    error: of the worst matrix read back from the file: the root mean square of its error over that of its weights.
    tokenizes_alike: over held-out and hard text; None without a tokenizer.
    text: llama.cpp's continuation of the first held-out tokens; the tokens' numbers without a tokenizer.
    """

    perplexity: float
    kl: float
    top1: float
    reference_perplexity: float
    tokens: Count
    error: float = math.nan
    tokenizes_alike: bool | None = None
    text: str = ""


class WrittenFile(Layout):
    """A GGUF file that was written.

    informed: whether an importance matrix chose its roundings.
    fallbacks: the number of matrices that have another type than the rules give, because their columns make no whole
        blocks of that type.
    digest: the file's sha256.
    measured: None where the file was not verified.
    kl_of_other: where the type was tried with and without the importance matrix, the KL of the file that was not kept.
    """

    name: str
    file: FileName
    bytes: Positive
    bits_per_weight: Amount
    informed: bool
    fallbacks: Count = 0
    digest: str = ""
    measured: Measured | None
    kl_of_other: float | None = None


class QuantizedModel(Layout):
    """The GGUF files of a model, as gguf/quantization.json lists them.

    notes: where llama.cpp does otherwise than transformers.
    """

    model: str = ""
    notes: list[str]
    files: list[WrittenFile]

    def to_dict(self) -> dict[str, object]:
        return self.model_dump()


QUANTIZATION = FileKind("a table of GGUF files", TypeAdapter(QuantizedModel))
