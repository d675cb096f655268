"""Models as lm-evaluation-harness queries them: in memory, or one layer in memory at a time.

Both are the harness's class for Hugging Face models, which tokenizes text and cuts prompts. In memory, it also
computes, in batches whose size is found here. Streamed, the requests of a task go through the layers together, and the
model is never loaded.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from minitron.core.device import free_bytes
from minitron.core.errors import TaskError
from minitron.core.progress import SILENT, Listener
from minitron.evaluation.generate import only_ending
from minitron.model.checkpoint import Checkpoint
from minitron.model.likelihood import Scored, score_tokens
from minitron.model.samples import Samples
from minitron.model.stream import Pass, Stream, skeleton
from minitron.model.tokens import chat_ids, prompt_ids, quoted, require_within, text_ids

# A request of the harness: its two texts, and the tokens of each.
Request = tuple[tuple[str, str] | None, list[int], list[int]]

# Shares of free memory for activations and logits of one forward call.
SHARE_OF_DEVICE = 0.5
SHARE_OF_MEMORY = 0.25
MOST_ON_CPU_BYTES = 1 << 30  # larger batches are no faster there
MOST_ROWS = 64
LOGIT_COPIES = 3  # logits, their log-probabilities, and one more in between, in float32
ALL_AT_ONCE = 1 << 40  # rows: the harness must not split them, batches are made here
BATCHES_AT_ONCE = 8  # between two measurements of free memory
# Streamed rows are padded to the longest of a pass, and each pass reads the model once.
LONGEST_OF_SHORTEST = 1.3
PASS_BYTES = 16 << 30  # hidden states of one pass, in a file beyond what memory takes


class _Model(HFLM):
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


class InMemory(_Model):
    """A loaded model. Batches begin at the size that memory is estimated to allow, and are halved where that was too
    much.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int | None = None, listener: Listener = SILENT):
        super().__init__(tokenizer, pretrained=model, batch_size=batch or 1, softmax_dtype="float32")
        self.listener, self._given = listener, batch
        self._most = MOST_ROWS

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._require_room(requests)

        def in_turn(index: int) -> tuple[int, list[int]]:
            _, context, continuation = requests[index]
            tokens = context + continuation
            return -len(tokens), tokens  # equal contexts side by side: the harness computes them once

        def compute(part: list[int]) -> list[tuple[float, bool]]:
            return HFLM._loglikelihood_tokens(self, [requests[i] for i in part], disable_tqdm=True)

        order = sorted(range(len(requests)), key=in_turn)
        lengths = [min(self.max_length, -in_turn(index)[0]) for index in order]
        return self._in_batches(order, lengths, compute)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        requests = [self._shortened(request) for request in requests]

        def compute(part: list[int]) -> list[str]:
            return HFLM.generate_until(self, [requests[i] for i in part], disable_tqdm=True)

        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0]))
        return self._in_batches(order, [self.max_length] * len(order), compute)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with only_ending(self.model, self.tokenizer):
            made: Tensor = super()._model_generate(context, max_length, stop, **options)
            return made

    def _in_batches(self, order: list[int], lengths: list[int], compute: Callable[[list[int]], list[Any]]) -> list[Any]:
        """Compute all requests in batches; returns the results in the requests' own order.

        Args:
            order: of computing, longest first.
            lengths: the tokens of each request in that order.
        """
        results: list[Any] = [None] * len(order)
        start = 0
        while start < len(order):
            self.batch_size_per_gpu = self._rows(lengths[start])
            part = order[start : start + BATCHES_AT_ONCE * self.batch_size_per_gpu]
            try:
                found = compute(part)
            except torch.OutOfMemoryError:
                if self.batch_size_per_gpu == 1:
                    raise TaskError(
                        "the device has no memory for a batch of one row; measure likelihood tasks with --streamed"
                    ) from None
                self._most = self._given = self.batch_size_per_gpu // 2
                torch.cuda.empty_cache()
                continue
            for index, result in zip(part, found, strict=True):
                results[index] = result
            start += len(part)
            self.listener.progress(start, len(order), self.note)
        return results

    def _rows(self, num_tokens: int) -> int:
        """The number of rows of `num_tokens` in a batch."""
        if self._given:
            return self._given
        config, device = self.model.config, self.device
        if device.type == "cpu":
            budget = min(MOST_ON_CPU_BYTES, SHARE_OF_MEMORY * free_bytes(device))
        else:
            budget = SHARE_OF_DEVICE * free_bytes(device)
        of_layer = 3 * config.intermediate_size + 8 * config.hidden_size
        cache = 2 * config.num_hidden_layers * config.hidden_size
        of_token = 4 * LOGIT_COPIES * config.vocab_size + self.model.dtype.itemsize * (of_layer + cache)
        return max(1, min(self._most, int(budget / (num_tokens * of_token))))

    def _shortened(self, request: Any) -> Any:
        """Leave room for the prompt: ask for new tokens of at most half the context."""
        context, options = request.args
        wanted = options.get("max_gen_toks", self.max_gen_toks)
        if wanted < self.max_length:
            return request
        most = self.max_length // 2
        self.listener.warn(
            f"task {request.task_name} wants up to {wanted} new tokens, and the model's context has {self.max_length}: "
            f"at most {most} are generated"
        )
        shorter = copy.copy(request)
        shorter.arguments = (context, options | {"max_gen_toks": most})
        return shorter


class Streamed(_Model):
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
        empty = skeleton(checkpoint, checkpoint.dtype)
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
        # Row of tokens -> the requests that read it. Answers of one token share the row of their context.
        readers: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            row = tuple((context + continuation)[-(self.max_length + 1) : -1])
            readers.setdefault(row, []).append(index)
        results: list[Any] = [None] * len(requests)
        passes = self._passes(sorted(readers, key=len))
        for number, rows in enumerate(passes):
            asked = [(index, number_of_row) for number_of_row, row in enumerate(rows) for index in readers[row]]
            found = self._likelihoods(rows, [(requests[index][2], row) for index, row in asked], number, len(passes))
            for (index, _), result in zip(asked, found, strict=True):
                results[index] = result
        return results

    def _passes(self, rows: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Group rows in order of length, so that they need little padding and their states fit."""
        passes: list[list[tuple[int, ...]]] = []
        of_token = self.checkpoint.shape.hidden * self.checkpoint.dtype.itemsize
        for row in rows:
            fits = bool(passes) and len(row) <= LONGEST_OF_SHORTEST * len(passes[-1][0]) + 8
            if fits and (len(passes[-1]) + 1) * len(row) * of_token <= PASS_BYTES:
                passes[-1].append(row)
            else:
                passes.append([row])
        return passes

    def _likelihoods(
        self, rows: Sequence[tuple[int, ...]], asked: Sequence[tuple[list[int], int]], number: int, num_passes: int
    ) -> list[tuple[float, bool]]:
        """Score continuations, given with the row that each ends, in one pass over rows in order of length."""
        tokens = torch.zeros(len(rows), len(rows[-1]), dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        pass_ = Pass(self.checkpoint.dtype, self._rows_of_batch, scratch=self._scratch)
        stream = Stream(self.checkpoint, Samples(tokens), pass_)
        stream.run_to_end(
            lambda done, total: self.listener.progress(number * total + done, num_passes * total, self.note)
        )
        places = [(row, len(rows[row]) - len(ids) + i, token) for ids, row in asked for i, token in enumerate(ids)]
        nats, greedy = score_tokens(stream, [stream.states], Scored(*torch.tensor(places).T.contiguous()))
        return _of_requests(nats[0], greedy[0], [len(continuation) for continuation, _ in asked])


def _of_requests(
    nats: Float[Tensor, " scored"], greedy: Bool[Tensor, " scored"], lengths: Sequence[int]
) -> list[tuple[float, bool]]:
    parts = zip(nats.split(list(lengths)), greedy.split(list(lengths)), strict=True)
    return [(part.sum().item(), bool(likeliest.all())) for part, likeliest in parts]
