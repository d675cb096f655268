"""A loaded model as lm-evaluation-harness queries it: what its requests have in common is computed once."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor

from minitron.core.device import free_bytes
from minitron.core.errors import TaskError
from minitron.core.progress import SILENT, Listener
from minitron.evaluation.generate import ending_tokens, only_ending
from minitron.evaluation.tasks.greedy import Stops, continuations
from minitron.evaluation.tasks.models import HarnessModel, Request, of_requests, rows_of
from minitron.evaluation.tasks.packing import Most, Pack, Row, packs, rows_may_share
from minitron.evaluation.tasks.shared import Asked, SharedForward
from minitron.model.architecture import Shape, kv_cache_bytes
from minitron.model.families import FAMILIES

# Shares of free memory for activations, logits, and keys and values together.
SHARE_OF_DEVICE = 0.5
SHARE_OF_MEMORY = 0.25
MOST_TOKENS = 2048  # of one forward call: more are no faster
MOST_ROWS = 64  # texts that are generated together
LOGIT_COPIES = 3  # logits, the same in float32, and one more in between, in float32
# The options of a task whose texts are generated greedily.
GREEDY_OPTIONS = {"until", "do_sample", "temperature", "max_gen_toks"}


class InMemory(HarnessModel):
    """A loaded model. Forward calls begin at the size that memory is estimated to allow, and are halved where that was
    too much.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int | None = None, listener: Listener = SILENT):
        super().__init__(tokenizer, pretrained=model, batch_size=batch or 1, softmax_dtype="float32")
        self.listener, self._given = listener, batch
        self._halvings = 0  # how often memory did not suffice

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._require_room(requests)
        readers = rows_of(requests, self.max_length)
        rows = sorted(readers)
        wanted = [max(len(requests[index][2]) for index in readers[row]) for row in rows]
        results: list[Any] = [None] * len(requests)
        done = 0

        def compute() -> None:
            nonlocal done
            first, forward = done, SharedForward(self.model, rows)
            for pack in packs(rows[first:], wanted[first:], self._limits()):
                here = Pack(first + pack.start, first + pack.stop, pack.prefix)
                read = [(index, row) for row in range(here.start, here.stop) for index in readers[rows[row]]]
                found = _scored(forward, here, [(requests[index][2], row) for index, row in read])
                for (index, _), result in zip(read, found, strict=True):
                    results[index] = result
                done = here.stop
                self.listener.progress(done, len(rows), self.note)

        while done < len(rows):
            self._suffices(compute)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        requests = [self._shortened(request) for request in requests]
        alike: dict[str, list[int]] = {}  # requests of the same options
        for index, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(index)
        results: list[str] = [""] * len(requests)
        for indices in alike.values():
            for index, text in zip(indices, self._generate([requests[index] for index in indices]), strict=True):
                results[index] = text
        return results

    def _generate(self, requests: Sequence[Any]) -> list[str]:
        """Generate the texts of requests with the same options, the longest prompts first."""
        options = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        most = options["max_gen_toks"]
        prompts = [self.tok_encode(one.args[0], left_truncate_len=self.max_length - most) for one in requests]
        greedy = options["do_sample"] is False and options.keys() <= GREEDY_OPTIONS
        greedy = greedy and rows_may_share(self.model.config)
        order = sorted(range(len(requests)), key=lambda index: -len(prompts[index]))
        results: list[str] = [""] * len(requests)
        start = 0

        def compute() -> None:
            nonlocal start
            self.batch_size_per_gpu = self._texts_at_once(len(prompts[order[start]]) + most)
            part = order[start : start + self.batch_size_per_gpu]
            if greedy:
                found = self._greedy([tuple(prompts[index]) for index in part], options)
            else:
                found = HFLM.generate_until(self, [requests[index] for index in part], disable_tqdm=True)
            for index, text in zip(part, found, strict=True):
                results[index] = text
            start += len(part)
            self.listener.progress(start, len(order), self.note)

        while start < len(order):
            self._suffices(compute)
        return results

    def _greedy(self, prompts: Sequence[Row], options: Any) -> list[str]:
        """The likeliest continuations of prompts as texts, each up to the first stop text."""
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(options["until"], eos=end)
        of_texts = [len(self.tokenizer.encode(text, add_special_tokens=False)) for text in until]
        stops = Stops(
            tokens=frozenset(ending_tokens(self.model, self.tokenizer)),
            texts=tuple(until),
            most=options["max_gen_toks"],
            lookback=max(of_texts, default=0) + 2,  # a text may be written in other tokens than its own
        )
        rows = sorted(set(prompts))
        plan = packs(rows, [1] * len(rows), self._limits())
        made = dict(zip(rows, continuations(self.model, self.tokenizer, rows, plan, stops), strict=True))
        texts = {row: self.tok_decode(list(ids)) for row, ids in made.items()}
        return [postprocess_generated_text(texts[row], stop=until, think_end_token=None) for row in prompts]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with only_ending(self.model, self.tokenizer):
            made: Tensor = super()._model_generate(context, max_length, stop, **options)
            return made

    def _suffices(self, compute: Callable[[], None]) -> bool:
        """Compute, and return whether memory sufficed; where it did not, what is computed next is half as large."""
        try:
            compute()
        except torch.OutOfMemoryError:
            if self._limits().tokens == 1:
                raise TaskError(
                    "the device has no memory for a batch of one row; measure likelihood tasks with --streamed"
                ) from None
            self._halvings += 1
            torch.cuda.empty_cache()
            return False
        return True

    @cached_property
    def _shape(self) -> Shape:
        return FAMILIES[self.model.config.model_type].shape(self.model.config.to_dict())

    def _limits(self) -> Most:
        """The limits of one forward call, a quarter of the memory each for activations, logits and a kept prefix."""
        shape, part = self._shape, self._budget() / 4
        tokens = min(MOST_TOKENS, part / self._bytes_of_token)
        alone = not rows_may_share(self.model.config)
        return Most(
            tokens=self._halved(tokens),
            wanted=self._halved(part / (4 * LOGIT_COPIES * shape.vocab)),
            rows=1 if alone else self._halved(self._given or tokens),
            prefix=0 if alone else int(part / kv_cache_bytes(shape, self.model.dtype.itemsize)) >> self._halvings,
        )

    def _texts_at_once(self, num_tokens: int) -> int:
        """The number of texts of `num_tokens`, prompt included, that are generated together."""
        cache = 2 * kv_cache_bytes(self._shape, self.model.dtype.itemsize)  # twice while rows leave the batch
        return self._halved(self._given or min(MOST_ROWS, self._budget() / (num_tokens * cache)))

    @property
    def _bytes_of_token(self) -> int:
        """The activations of a token in one layer."""
        return self.model.dtype.itemsize * (3 * self._shape.ffn + 8 * self._shape.hidden)

    def _budget(self) -> float:
        return (SHARE_OF_MEMORY if self.device.type == "cpu" else SHARE_OF_DEVICE) * free_bytes(self.device)

    def _halved(self, limit: float | int) -> int:
        return max(1, int(limit) >> self._halvings)

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


def _scored(forward: SharedForward, pack: Pack, answers: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Score answers, each given with the row of the pack that it ends."""
    asked = [
        Asked(row, len(forward.rows[row]) - len(ids) + at, token)
        for ids, row in answers
        for at, token in enumerate(ids)
    ]
    nats, likeliest = forward.log_likelihoods(pack, asked)
    greedy = likeliest.cpu() == torch.tensor([one.token for one in asked])
    return of_requests(nats.cpu().double(), greedy, [len(ids) for ids, _ in answers])
