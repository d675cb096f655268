"""Models as lm-evaluation-harness queries them, and the one that is read one layer at a time.

All are the harness's class for Hugging Face models, which tokenizes text and cuts prompts. A streamed model is never
loaded: the requests of a task go through its layers together. `in_memory.py` has the model that is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from minitron.core.errors import TaskError
from minitron.core.progress import SILENT, Listener
from minitron.evaluation.tasks.packing import Row
from minitron.model.checkpoint import Checkpoint
from minitron.model.likelihood import Scored, score_tokens
from minitron.model.samples import Samples
from minitron.model.stream import Pass, Stream, skeleton
from minitron.model.tokens import chat_ids, prompt_ids, quoted, require_within, text_ids

# A request of the harness: its two texts, and the tokens of each.
Request = tuple[tuple[str, str] | None, list[int], list[int]]

ALL_AT_ONCE = 1 << 40  # rows: the harness must not split them, batches are made here
# Streamed rows are padded to the longest of a pass, and each pass reads the model once.
LONGEST_OF_SHORTEST = 1.3
PASS_BYTES = 16 << 30  # hidden states of one pass, in a file beyond what memory takes


class HarnessModel(HFLM):
    """The common part: text becomes tokens by the rule of `model.tokens`, nothing is printed, and errors name the way
    out.

    A request with an empty context and a text that is scored whole begin with BOS, else with EOS; a tokenizer with
    neither still serves all other requests.
    """

    listener: Listener
    note = ""  # the note of progress: task and model
    chat = False  # whether contexts are written by the chat template

    def __init__(self, tokenizer: Any, **options: Any):
        # Pads are masked, but without a pad token the harness would add a token that the model has no row for.
        pad, rows = tokenizer.pad_token_id, options["pretrained"].config.vocab_size
        if pad is None or pad >= rows:
            ids = [tokenizer.eos_token_id, tokenizer.bos_token_id, min(tokenizer.get_vocab().values())]
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(next(id for id in ids if id is not None))
        super().__init__(tokenizer=tokenizer, **options)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is False or self._scores_whole:
            ids = text_ids(self.tokenizer, string)
        else:
            ids = chat_ids(self.tokenizer, string) if self.chat else prompt_ids(self.tokenizer, string)
        rows = self.config.vocab_size
        require_within(ids, rows, self.tokenizer, f"{'the chat' if self.chat else 'the request'} {string[:40]!r}")
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert padding_side == "left"
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, longest - len(row) :] = torch.tensor(row)
            mask[index, longest - len(row) :] = 1
        return tokens, mask

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Decode tokens; None for the end token of a tokenizer that has none."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return super()._encode_pair(context, quoted(self.tokenizer, continuation) if self.chat else continuation)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        marked = [turn | {"content": quoted(self.tokenizer, turn["content"])} for turn in chat_history]
        try:
            return super().apply_chat_template(marked, add_generation_prompt)
        except Exception as error:  # any error of the model's own template
            raise TaskError(f"the model's chat template fails on a conversation of this task: {error!r}") from None

    @property
    def prefix_token_id(self) -> int | None:
        tokenizer = self.tokenizer
        return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._require_start([request for request in requests if request.args[0] == ""])
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        self._require_start(requests)
        self.batch_size_per_gpu = ALL_AT_ONCE
        # The cache mixes up windows that differ only in the last token and in the part that is scored.
        self.logits_cache, self._scores_whole = False, True
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self.logits_cache, self._scores_whole = True, False
        return found

    _scores_whole = False  # whether the harness puts BOS before texts itself

    def _require_start(self, requests: Sequence[Any]) -> None:
        if requests and self.prefix_token_id is None:
            raise TaskError(
                f"task {requests[0].task_name} scores text that nothing stands before, and the tokenizer has neither a "
                "BOS nor an EOS token to put there: leave this task out"
            )

    def _require_room(self, requests: Sequence[Request]) -> None:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise TaskError(
                f"an answer of {longest} tokens is longer than the model's context of {self.max_length} tokens: "
                "this task cannot be measured with this model"
            )


class Streamed(HarnessModel):
    """A checkpoint of any size: requests of a task go through its layers together, one layer in memory at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Any,
        *,
        batch: int | None = None,
        listener: Listener = SILENT,
        scratch: Path | None = None,
    ):
        # The harness reads the config of the model only.
        empty = skeleton(checkpoint, checkpoint.written_dtype)
        super().__init__(tokenizer, pretrained=empty, batch_size=ALL_AT_ONCE)
        self.checkpoint, self.listener = checkpoint, listener
        self._rows_of_batch, self._scratch = batch, scratch

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        raise TaskError(
            f"task {requests[0].task_name} generates text, and a streamed model would be read whole for each token: "
            "leave this task out, or measure it where the model fits into memory"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._require_room(requests)
        readers = rows_of(requests, self.max_length)
        results: list[Any] = [None] * len(requests)
        passes = self._passes(sorted(readers, key=len))
        for number, rows in enumerate(passes):
            asked = [(index, number_of_row) for number_of_row, row in enumerate(rows) for index in readers[row]]
            found = self._likelihoods(rows, [(requests[index][2], row) for index, row in asked], number, len(passes))
            for (index, _), result in zip(asked, found, strict=True):
                results[index] = result
        return results

    def _passes(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Group rows in order of length, so that they need little padding and their states fit."""
        passes: list[list[Row]] = []
        of_token = self.checkpoint.shape.hidden * self.checkpoint.written_dtype.itemsize
        for row in rows:
            fits = bool(passes) and len(row) <= LONGEST_OF_SHORTEST * len(passes[-1][0]) + 8
            if fits and (len(passes[-1]) + 1) * len(row) * of_token <= PASS_BYTES:
                passes[-1].append(row)
            else:
                passes.append([row])
        return passes

    def _likelihoods(
        self, rows: Sequence[Row], asked: Sequence[tuple[list[int], int]], number: int, num_passes: int
    ) -> list[tuple[float, bool]]:
        """Score continuations, given with the row that each ends, in one pass over rows in order of length."""
        tokens = torch.zeros(len(rows), len(rows[-1]), dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        pass_ = Pass(self.checkpoint.written_dtype, self._rows_of_batch, scratch=self._scratch)
        stream = Stream(self.checkpoint, Samples(tokens), pass_)
        stream.run_to_end(
            lambda done, total: self.listener.progress(number * total + done, num_passes * total, self.note)
        )
        places = [(row, len(rows[row]) - len(ids) + i, token) for ids, row in asked for i, token in enumerate(ids)]
        nats, greedy = score_tokens(stream, [stream.states], Scored(*torch.tensor(places).T.contiguous()))
        return of_requests(nats[0], greedy[0], [len(continuation) for continuation, _ in asked])


def rows_of(requests: Sequence[Request], max_length: int) -> dict[Row, list[int]]:
    """Rows of tokens, each with the requests that read it: answers of one token share the row of their context.

    A row ends before the last token of the answer, and loses its beginning where it is longer than the context.
    """
    readers: dict[Row, list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        readers.setdefault(tuple((context + continuation)[-(max_length + 1) : -1]), []).append(index)
    return readers


def of_requests(
    nats: Float[Tensor, " scored"], greedy: Bool[Tensor, " scored"], lengths: Sequence[int]
) -> list[tuple[float, bool]]:
    """The likelihood of each answer, and whether it is the likeliest, from those of its tokens."""
    parts = zip(nats.split(list(lengths)), greedy.split(list(lengths)), strict=True)
    return [(part.sum().item(), bool(likeliest.all())) for part, likeliest in parts]
