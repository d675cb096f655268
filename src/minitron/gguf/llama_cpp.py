"""llama.cpp in this process, by ctypes out of a prebuilt wheel: its block quantizer and its runtime.

The functions are those of its C headers. Its structs of options change with the version, so the library fills them in,
in more room than any of them takes; only fields whose position is checked here are set.
"""

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from minitron.core.config import expanded
from minitron.core.errors import GgufError
from minitron.core.worker import say_last

PARTS = 4  # runs of rows for each thread that quantizes
MOST_THREADS = 512  # llama.cpp's limit
LIBRARY = "MINITRON_LLAMA_CPP"  # environment variable: a library to use instead of the wheel's
# Position of a word in the context's options -> its default.
_CONTEXT_DEFAULTS = {
    0: 512,  # n_ctx
    1: 2048,  # n_batch
    2: 512,  # n_ubatch
    3: 1,  # n_seq_max
    13: 2**32 - 1,  # flash_attn_type: where it is faster
    26: 1,  # type_k: F16
    27: 1,  # type_v: F16
}
_CONTEXT_EXACT = {13: 0, 26: 0, 27: 0}  # no flash attention, which rounds to F16 inside, and a key-value cache in F32


class _Options(ctypes.Structure):
    """A struct of any size up to this one, passed by value."""

    _fields_ = (("words", c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# Function -> its result and its arguments.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_set_abort_callback": (c_void_p, [c_void_p]),
    "ggml_quantize_init": (None, [c_int32]),
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (_Options, []),
    "llama_context_default_params": (_Options, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _Options]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _Options]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_ABORT = ctypes.CFUNCTYPE(None, c_char_p)


class LlamaCpp:
    """The library, with its last messages."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.functions = ctypes.CDLL(str(path))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self.functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise GgufError(f"{path} is no llama.cpp library that can be used: {error}") from None
        self.log: list[str] = []
        self._keep = _LOG(lambda level, text, _: self.log.append(text.decode(errors="replace")))
        self.functions.llama_log_set(ctypes.cast(self._keep, c_void_p), None)
        # By default, ggml prints a backtrace before it ends the process, by a debugger where there is one.
        self._keep_abort = _ABORT(lambda text: say_last(text.decode(errors="replace")))
        self.functions.ggml_set_abort_callback(ctypes.cast(self._keep_abort, c_void_p))
        self.functions.llama_backend_init()
        words = self.functions.llama_context_default_params().words
        found = {place: words[place] for place in _CONTEXT_DEFAULTS}
        if found != _CONTEXT_DEFAULTS:
            raise GgufError(
                f"{path}: the options of this llama.cpp are {found} by default instead of {_CONTEXT_DEFAULTS}: it is "
                "of another time than this program; install the version of xllamacpp that minitron's gguf extra names"
            )

    def complaint(self) -> str:
        """The last messages about a failure."""
        said = [line.strip() for line in self.log if "error" in line.lower() or "fail" in line.lower()]
        return " ".join(said[-3:]) or "it does not say why"

    def load_problem(self, file: Path) -> str:
        """The library's complaint about a file that it does not load; empty where it does."""
        self.log.clear()
        model = self.functions.llama_model_load_from_file(
            str(file).encode(), self.functions.llama_model_default_params()
        )
        if model:
            self.functions.llama_model_free(model)
        return "" if model else self.complaint()

    def quantize(
        self,
        kind: int,
        rows: Float[Tensor, "rows columns"],
        num_bytes: int,
        importance: Float[Tensor, " columns"] | None,
        threads: ThreadPoolExecutor,
        num_threads: int,
    ) -> UInt8[Tensor, " bytes"]:
        """Quantize some rows, each into blocks of its own, by ggml's quantizer; returns their bytes.

        Args:
            kind: ggml's number of the type.
            num_bytes: of all rows.
            importance: of each column.
        """
        rows = rows.contiguous()
        out = torch.empty(num_bytes, dtype=torch.uint8)
        count, columns = rows.shape
        per_row = num_bytes // count
        weights = importance.contiguous() if importance is not None else None
        self.functions.ggml_quantize_init(kind)

        def part(start: int, stop: int) -> None:
            made = self.functions.ggml_quantize_chunk(
                kind,
                rows.data_ptr() + 4 * start * columns,
                out.data_ptr() + start * per_row,
                0,
                stop - start,
                columns,
                None if weights is None else weights.data_ptr(),
            )
            assert made == (stop - start) * per_row, (made, start, stop)

        # More runs than threads, so that no thread waits long for another.
        bounds = np.linspace(0, count, min(count, PARTS * num_threads) + 1).astype(int).tolist()
        list(threads.map(part, bounds[:-1], bounds[1:]))
        return out


@cache
def llama_cpp() -> LlamaCpp:
    """The library that MINITRON_LLAMA_CPP names, or else that of the xllamacpp package.

    Raises: GgufError if it is missing or of another version.
    """
    named = os.environ.get(LIBRARY)
    if named:
        return LlamaCpp(Path(expanded(named)))
    from importlib.util import find_spec

    package = find_spec("xllamacpp")
    roots = (package.submodule_search_locations or []) if package else []
    files = [file for root in roots for file in Path(root).glob("xllamacpp*.so")]
    if not files:
        raise GgufError("quantizing needs llama.cpp: pip install 'minitron[gguf]'")
    return LlamaCpp(files[0])


class Runtime:
    """A GGUF file loaded in llama.cpp.

    context: tokens of each sequence.
    sequences: the most that are read side by side.
    exact: compute everything in float32, which is slower than llama.cpp's defaults.

    Raises: GgufError with llama.cpp's message if it cannot load the file.
    """

    def __init__(self, file: Path, *, context: int, threads: int, sequences: int = 1, exact: bool = False):
        if not 1 <= threads <= MOST_THREADS:
            raise GgufError(f"llama.cpp runs with 1 to {MOST_THREADS} threads, not {threads}: give fewer --threads")
        self.library, self.file, self.threads, self.exact = llama_cpp(), file, threads, exact
        call = self.library.functions
        self.library.log.clear()
        self.context, self.context_tokens, self.sequences = None, context, sequences
        self.model = call.llama_model_load_from_file(str(file).encode(), call.llama_model_default_params())
        if not self.model:
            raise GgufError(f"llama.cpp cannot load {file}: {self.library.complaint()}")
        self.vocab = call.llama_model_get_vocab(self.model)
        self.vocab_size = call.llama_vocab_n_tokens(self.vocab)
        try:
            self.make_room(context, sequences)
        except GgufError:
            call.llama_model_free(self.model)
            raise

    def make_room(self, context: int, sequences: int = 1) -> None:
        """Take memory for sequences of `context` tokens, and give back the memory taken before.

        Raises: GgufError if there is not enough.
        """
        call, tokens = self.library.functions, context * sequences
        if self.context:
            call.llama_free(self.context)
        options = call.llama_context_default_params()
        chosen = {0: tokens, 1: tokens, 2: min(tokens, _CONTEXT_DEFAULTS[2]), 3: sequences}
        for place, value in (chosen | (_CONTEXT_EXACT if self.exact else {})).items():
            options.words[place] = value
        self.context = call.llama_init_from_model(self.model, options)
        if not self.context:
            raise GgufError(
                f"llama.cpp cannot run {self.file} with {sequences} x {context:,} tokens: not enough memory?"
            )
        call.llama_set_n_threads(self.context, self.threads, self.threads)
        self.context_tokens, self.sequences = context, sequences

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.context:
            self.library.functions.llama_free(self.context)
        self.library.functions.llama_model_free(self.model)

    def forget(self) -> None:
        """Forget all tokens that were read."""
        call = self.library.functions
        call.llama_memory_clear(call.llama_get_memory(self.context), True)

    def logits(self, tokens: Int[Tensor, " tokens"] | Sequence[int]) -> Float[Tensor, "tokens vocab"]:
        """The logits behind each of the tokens, read from the first one on."""
        self.forget()
        return self._decode([[int(token) for token in tokens]], 0, every=True)

    def read(self, rows: Sequence[Sequence[int]], position: int) -> list[int]:
        """Read on in each sequence from `position`, and return its likeliest next token."""
        return self._decode(rows, position, every=False).argmax(-1).tolist()

    def generate(self, prompt: Sequence[int], count: int, *, temperature: float = 0.0, seed: int = 0) -> list[int]:
        """Continue a prompt by up to `count` tokens, fewer where a token ends the text; temperature 0 is greedy."""
        self.forget()
        made: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        next_tokens, position = list(prompt), 0
        for _ in range(count):
            logits = self._decode([next_tokens], position, every=False)
            position += len(next_tokens)
            if temperature > 0:
                chosen = int(torch.multinomial((logits[-1] / temperature).softmax(-1), 1, generator=generator))
            else:
                chosen = int(logits[-1].argmax())
            if self.library.functions.llama_vocab_is_eog(self.vocab, chosen):
                break
            next_tokens = [chosen]
            made.append(chosen)
        return made

    def text(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, without special tokens."""
        ids = (c_int32 * len(tokens))(*tokens)
        room = ctypes.create_string_buffer(64 * len(tokens) + 64)
        detokenize = self.library.functions.llama_detokenize
        count = detokenize(self.vocab, ids, len(tokens), room, len(room), True, False)
        if count < 0:
            room = ctypes.create_string_buffer(-count)
            count = detokenize(self.vocab, ids, len(tokens), room, len(room), True, False)
        return room.raw[:count].decode(errors="replace")

    def prompt(self, text: str) -> list[int]:
        """The token ids of a text to continue, after BOS where the file says so."""
        call = self.library.functions
        before = [call.llama_vocab_bos(self.vocab)] if call.llama_vocab_get_add_bos(self.vocab) else []
        return before + self.tokenize(text, special=False)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """The token ids of a text; `special` adds the tokens that the file puts around it.

        The spelling of a special token is read as text.
        """
        encoded = text.encode()
        room = (c_int32 * (len(encoded) + 8))()
        count = self.library.functions.llama_tokenize(
            self.vocab, encoded, len(encoded), room, len(room), special, False
        )
        assert count >= 0, f"more than {len(room)} tokens"
        return list(room[:count])

    def _decode(self, rows: Sequence[Sequence[int]], position: int, *, every: bool) -> Float[Tensor, "tokens vocab"]:
        """The logits behind every token, or behind the last token of each row; each row is a sequence."""
        call = self.library.functions
        if (
            wrong := next((token for row in rows for token in row if not 0 <= token < self.vocab_size), None)
        ) is not None:
            raise GgufError(f"token {wrong} is beyond the {self.vocab_size:,} tokens of {self.file}")
        assert len(rows) <= self.sequences, "more sequences than there is room for"
        assert position + max(map(len, rows)) <= self.context_tokens, "more tokens than the context holds"
        places = [(number, place) for number, row in enumerate(rows) for place in range(len(row))]
        batch = call.llama_batch_init(len(places), 0, 1)
        try:
            batch.n_tokens = len(places)
            for index, (number, place) in enumerate(places):
                batch.token[index], batch.pos[index] = rows[number][place], position + place
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, number
                batch.logits[index] = every or place == len(rows[number]) - 1
            failed = call.llama_decode(self.context, batch)
            if failed:
                raise GgufError(f"llama.cpp failed to run {self.file}: llama_decode returned {failed}")
            wanted = [index for index in range(len(places)) if batch.logits[index]]
            found = [
                np.ctypeslib.as_array(call.llama_get_logits_ith(self.context, i), (self.vocab_size,)) for i in wanted
            ]
            return torch.from_numpy(np.stack(found))
        finally:
            call.llama_batch_free(batch)
