"""The types of quantized files, and the section of the recipe that names the files of a run."""

import math
import re
from importlib.util import find_spec

from pydantic import Field, field_validator

from minitron.core.config import Section
from minitron.core.errors import GgufError, did_you_mean

# Name of a file's type -> the type of most of its matrices, mostly by rising loss.
GGUF_TYPES: dict[str, str] = {
    "F32": "F32", "BF16": "BF16", "F16": "F16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K", "Q5_1": "Q5_1", "Q5_0": "Q5_0", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS", "Q4_1": "Q4_1", "Q4_0": "Q4_0", "Q3_K_L": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K",
    "IQ3_M": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ3_XXS": "IQ3_XXS", "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K", "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS", "IQ2_XS": "IQ2_XS", "IQ2_XXS": "IQ2_XXS",
    "IQ1_M": "IQ1_M", "IQ1_S": "IQ1_S",
}  # fmt: skip
# Types that an importance matrix does not change.
UNINFORMED = ("F32", "BF16", "F16", "Q8_0")
QUANTIZE_TOKENS = 512  # the most tokens of a block: llama.cpp's tool reads so many at a time


def require_gguf() -> None:
    """Raises: GgufError if the packages of the gguf extra are not installed."""
    if find_spec("gguf") is None:
        raise GgufError("GGUF files need other packages: pip install 'minitron[gguf]'")


def require_file_type(name: str) -> str:
    """The name of a file's type as it is spelled in GGUF_TYPES.

    Raises: GgufError for an unknown name.
    """
    found = {known.lower(): known for known in GGUF_TYPES}.get(name.lower())
    if found is None:
        raise GgufError(f"unknown GGUF type {name!r}{did_you_mean(name.upper(), GGUF_TYPES)}")
    return found


def require_tensor_type(name: str) -> str:
    """The name of a tensor's type in capitals.

    Raises: GgufError for a type that no tensor can have.
    """
    if name.upper() not in GGUF_TYPES.values():
        raise GgufError(f"unknown tensor type {name!r}{did_you_mean(name.upper(), set(GGUF_TYPES.values()))}")
    return name.upper()


class QuantizeConfig(Section):
    types: list[str] = Field(default_factory=list)
    """GGUF types to write, such as Q4_K_M and IQ4_XS; see `minitron quantize --help`."""
    bits_per_weight: list[float] = Field(default_factory=list)
    """Also mixtures of minitron's own: the types of all matrices are chosen to lose least at so many bits a weight, all
    tensors counted."""
    sizes: list[float] = Field(default_factory=list)
    """The same, for files of at most so many bytes."""
    tensor_types: dict[str, str] = Field(default_factory=dict)
    """Regular expression found in a tensor's GGUF name -> its type, instead of that of llama.cpp's rules, or what a
    mixture of minitron's own would choose; such as `{output: Q8_0}`."""
    samples: int = Field(default=256, ge=1)
    """Calibration blocks for the importance matrix."""
    blocks: int = Field(default=32, ge=1)
    """Held-out blocks that each file is measured on."""
    verify: bool = True
    """Run each file in llama.cpp and hold it against the unquantized model. A type that can do without an importance
    matrix is then written with and without one, and the better file is kept."""
    pre: str | None = None
    """llama.cpp's name of the tokenizer's splitting rule, where tokenizer.json has one that is not known."""
    threads: int | None = Field(default=None, ge=1)
    """Cores that quantize and run files; default all."""

    @property
    def wanted(self) -> bool:
        """Whether any file is asked for."""
        return bool(self.types or self.bits_per_weight or self.sizes)

    @field_validator("types")
    @classmethod
    def _of_the_ladder(cls, names: list[str]) -> list[str]:
        types = [require_file_type(name) for name in names]
        if twice := [name for name in types if types.count(name) > 1]:
            raise GgufError(f"GGUF type {twice[0]} is named twice: name each once")
        return types

    @field_validator("bits_per_weight", "sizes")
    @classmethod
    def _finite(cls, numbers: list[float]) -> list[float]:
        for number in numbers:
            if not math.isfinite(number) or number <= 0:
                raise GgufError(f"a mixture of {number:g} bits or bytes cannot be made: give a number above 0")
        return numbers

    @field_validator("tensor_types")
    @classmethod
    def _of_tensors(cls, types: dict[str, str]) -> dict[str, str]:
        for pattern in types:
            try:
                re.compile(pattern)
            except re.error as error:
                raise GgufError(f"tensor pattern {pattern!r} is no regular expression: {error}") from None
        return {pattern: require_tensor_type(name) for pattern, name in types.items()}
