"""The contenders of distill_step.py: each a process that trains, and whose steps wait for their turn.

The environments of TRL and ModelOpt have no minitron: its own contender alone imports it.
"""

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lib.measure import PeakMemory
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback

LEARNING_RATE, WEIGHT_DECAY, BETAS, GRADIENT_CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0
HEAD_DIM = 64
MOST_STEPS = 1000  # of a contender in all its turns


@dataclass(frozen=True)
class Sizes:
    """Of the teacher, but for the batch. The student has half of each width."""

    hidden: int = 1024
    ffn: int = 2816
    layers: int = 8
    heads: int = 16  # twice the number of key-value heads
    vocab: int = 32_000
    batch: int = 4
    block_tokens: int = 512

    def config(self, divisor: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden // divisor,
            intermediate_size=self.ffn // divisor,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads // divisor,
            num_key_value_heads=self.heads // divisor // 2,
            head_dim=HEAD_DIM,
            vocab_size=self.vocab,
            max_position_embeddings=self.block_tokens,
        )


@dataclass(frozen=True)
class Task:
    models: Path
    sizes: Sizes
    dtype: torch.dtype
    device: torch.device

    def student(self) -> Any:
        return self._load("student", torch.float32).train()

    def teacher(self) -> Any:
        return self._load("teacher", self.dtype).eval().requires_grad_(False)

    def _load(self, name: str, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.models / name, dtype=dtype).to(self.device)

    def tokens(self) -> Tensor:
        size = self.sizes.batch, self.sizes.block_tokens
        return torch.randint(0, self.sizes.vocab, size, generator=torch.Generator().manual_seed(0))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class Turns:
    """Holds a training loop back until the parent asks for steps, and answers with what they took."""

    def __init__(self, device: torch.device, packages: list[str]):
        self.device, self.packages = device, packages
        self.left = 0
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a library prints must not be taken for an answer

    def begin(self) -> None:
        """To be called before every step."""
        if not self.left:
            self._await()
        self._synchronize()
        self.start = time.perf_counter(), time.process_time()

    def end(self, loss: float) -> None:
        """To be called after every step."""
        self._synchronize()
        self.seconds.append(time.perf_counter() - self.start[0])
        self.cpu_seconds.append(time.process_time() - self.start[1])
        self.losses.append(loss)
        self.left -= 1
        if not self.left:
            self._answer()

    def _await(self) -> None:
        question = sys.stdin.readline()
        if not question:
            raise SystemExit
        self.left, memory = json.loads(question)
        self.seconds, self.cpu_seconds, self.losses = [], [], []
        self.watch = ExitStack()
        self.peak = self.watch.enter_context(DevicePeak(self.device)) if memory else None

    def _answer(self) -> None:
        self.watch.close()
        answer = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "losses": self.losses}
        if self.peak:
            answer |= {"bytes": self.peak.bytes, "versions": {name: version(name) for name in self.packages}}
        # The others need the room in their turns; the first step of the next turn takes it back.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        print(json.dumps(answer), file=self.answers, flush=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class DevicePeak:
    """Context manager: `bytes` is what the block held at most on the device, beyond what was held at its start."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "DevicePeak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            self.memory = PeakMemory().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.held
        else:
            self.memory.__exit__()
            self.bytes = self.memory.peak.anonymous


def train(contender: str, models: str, sizes: dict[str, int], dtype: str, device: str) -> None:
    """Until the parent closes the pipe."""
    task = Task(Path(models), Sizes(**sizes), getattr(torch, dtype), torch.device(device))
    chosen = CONTENDERS[contender]
    packages = ["torch", "transformers", *(one.partition("==")[0].partition("[")[0] for one in chosen.packages)]
    chosen.run(task, Turns(task.device, packages))


def own_loop(loss: Callable[[Task, Any, Any, Tensor], Callable[[], Tensor]], task: Task, turns: Turns) -> None:
    """minitron's loop around a loss, without its records."""
    model = task.student()
    of_batch = loss(task, model, task.teacher(), task.tokens().to(task.device))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    for _ in range(MOST_STEPS):
        turns.begin()
        value = of_batch()
        value.backward()
        number = value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP).item()
        optimizer.step()
        optimizer.zero_grad()
        turns.end(number)


def floor(task: Task, model: Any, teacher: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """Both models without their heads. The loss is the mean of one column of logits, so that all weights learn."""

    def loss() -> Tensor:
        with torch.no_grad():
            teacher.base_model(input_ids=tokens, use_cache=False)
        with task.autocast():
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            return (hidden @ model.get_output_embeddings().weight[:1].T).float().mean()

    return loss


def floor_with_heads(task: Task, model: Any, teacher: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """The products with both heads as well, in the dtype and at once. The loss is the mean of all logits."""

    def loss() -> Tensor:
        with torch.no_grad():
            teacher(input_ids=tokens, use_cache=False)
        with task.autocast():
            return model(input_ids=tokens, use_cache=False).logits.mean()

    return loss


def minitron(
    task: Task, model: Any, teacher: Any, tokens: Tensor, *, places: str = "off", compiled: bool = False
) -> Callable[[], Tensor]:
    """Its student and its teacher, on logits alone or with hidden states too, as is its default."""
    from minitron.distillation.config import DistillConfig
    from minitron.distillation.hidden_loss import HiddenLoss, pairs_of
    from minitron.distillation.setup import compile_layers
    from minitron.distillation.student import StudentModule
    from minitron.distillation.teachers import OnlineTeacher
    from minitron.model import attention
    from minitron.model.checkpoint import open_checkpoint
    from minitron.model.hidden_states import decoder_layers
    from minitron.model.samples import Batch

    config = DistillConfig(compile=compiled)
    assert (config.weight_decay, config.betas, config.gradient_clip) == (WEIGHT_DECAY, BETAS, GRADIENT_CLIP)
    of_teacher, student = (open_checkpoint(task.models / name) for name in ("teacher", "student"))
    pairs = pairs_of(places, student.shape, of_teacher.shape)
    between = HiddenLoss(pairs, student.shape, of_teacher.shape, centred=False) if pairs else None
    if between is not None:
        model.add_module("between", between.to(task.device))  # so that the loop trains its maps
    seen = [theirs for _, theirs in pairs]
    attention.use_in(model)
    online = OnlineTeacher(of_teacher, task.dtype, task.device, depths=seen, compiled=compiled)
    layers = decoder_layers(model, student)
    if compiled:
        compile_layers(layers)
    module = StudentModule(model, layers, config.objective, between, task.dtype).train()
    batch = Batch(tokens)

    def loss() -> Tensor:
        objective, compared = module(batch, online(batch))
        return (objective + compared) / batch.num_predicted

    return loss


def plain(
    task: Task, model: Any, teacher: Any, tokens: Tensor, *, compiled: bool = False, by_products: bool = False
) -> Callable[[], Tensor]:
    """As anybody would write it: full logits of both models, in float32 from the softmax on.

    Args:
        by_products: with minitron's attention for CPUs, the fastest kernel that was found.
    """
    if by_products:
        from minitron.model import attention

        for one in (model, teacher):
            attention.use_in(one)
    of_logits = torch.compile(plain_kl) if compiled else plain_kl
    if compiled:
        for layer in (*model.base_model.layers, *teacher.base_model.layers):
            layer.forward = torch.compile(layer.forward)

    def loss() -> Tensor:
        with task.autocast():
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            with torch.no_grad():
                teacher_logits = teacher(input_ids=tokens, use_cache=False).logits[:, :-1]
        return of_logits(logits.flatten(0, 1), teacher_logits.flatten(0, 1))

    return loss


def plain_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q, log_p = (log_softmax(of.float(), -1) for of in (logits, teacher_logits))
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def trl(task: Task, turns: Turns, *, compiled: bool = False) -> None:
    """TRL's GKDTrainer without sampling: forward KL on the batch it is given."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    with tempfile.TemporaryDirectory() as directory:
        trainer = GKDTrainer(
            task.student(),
            task.teacher(),
            args=GKDConfig(**trainer_arguments(task, directory, compiled), lmbda=0.0, beta=0.0, temperature=1.0),
            data_collator=collate,
            train_dataset=same_batch(task),
            processing_class=AutoTokenizer.from_pretrained(task.models / "student"),
        )
        run_trainer(trainer, turns)


def modelopt(task: Task, turns: Turns, *, compiled: bool = False) -> None:
    """ModelOpt's KDTrainer with its only loss for transformers: KL on logits."""
    from modelopt.torch.distill.plugins.huggingface import DistillArgsWithTeacherModel, KDTrainer
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as directory:
        trainer = KDTrainer(
            task.student(),
            TrainingArguments(**trainer_arguments(task, directory, compiled)),
            data_collator=collate,
            train_dataset=same_batch(task),
            distill_args=DistillArgsWithTeacherModel(distill=True, teacher_model=task.teacher(), temperature=1.0),
        )
        run_trainer(trainer, turns)


def trainer_arguments(task: Task, directory: str, compiled: bool) -> dict[str, Any]:
    """For transformers' Trainer, on which both are built: the optimizer of `own_loop`, and nothing but training.

    Args:
        compiled: the student, which is what Trainer compiles.
    """
    return {
        "output_dir": directory,
        "per_device_train_batch_size": task.sizes.batch,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "max_grad_norm": GRADIENT_CLIP,
        "bf16": task.dtype == torch.bfloat16,
        "use_cpu": task.device.type == "cpu",
        "gradient_checkpointing": False,
        "torch_compile": compiled,
        "dataloader_pin_memory": task.device.type == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def same_batch(task: Task) -> Any:
    """A data set that is the batch, over and over."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": task.tokens().repeat(MOST_STEPS, 1).numpy()})


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    labels = tokens.clone()
    labels[:, 0] = -100  # no position predicts it, and Trainer counts labels before they are shifted
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def run_trainer(trainer: Any, turns: Turns) -> None:
    """The trainer's own loop. A step is from its `on_step_begin` to its `on_step_end`: all but fetching the batch."""

    class Gate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(losses.pop())

    losses: list[float] = []
    training_step = trainer.training_step

    def noted(*arguments: Any, **named: Any) -> Tensor:
        loss = training_step(*arguments, **named)
        losses.append(loss.item())
        return loss

    trainer.training_step = noted
    trainer.add_callback(Gate())
    trainer.train()


@dataclass(frozen=True)
class Contender:
    title: str
    run: Callable[[Task, Turns], None]
    loss_is_kl: bool = True
    packages: tuple[str, ...] = ()  # of its own environment, if it has one


def _own(loss: Any) -> Callable[[Task, Turns], None]:
    return lambda task, turns: own_loop(loss, task, turns)


TRL, MODELOPT = ("trl==1.16.0",), ("nvidia-modelopt[hf]==0.47.0",)
CONTENDERS = {
    "floor": Contender("floor", _own(floor), loss_is_kl=False),
    "floor_with_heads": Contender("floor with both heads", _own(floor_with_heads), loss_is_kl=False),
    "minitron": Contender("minitron", _own(minitron)),
    "minitron_states": Contender("minitron, states too", _own(partial(minitron, places="all")), loss_is_kl=False),
    "minitron_compiled": Contender("minitron, compiled", _own(partial(minitron, compiled=True))),
    "plain": Contender("plain loop", _own(plain)),
    "plain_compiled": Contender("plain loop, compiled", _own(partial(plain, compiled=True))),
    "plain_best": Contender(
        "plain loop, compiled, attention by products", _own(partial(plain, compiled=True, by_products=True))
    ),
    "trl": Contender("TRL GKDTrainer", trl, packages=TRL),
    "trl_compiled": Contender("TRL GKDTrainer, compiled", partial(trl, compiled=True), packages=TRL),
    "modelopt": Contender("ModelOpt KDTrainer", modelopt, packages=MODELOPT),
    "modelopt_compiled": Contender("ModelOpt KDTrainer, compiled", partial(modelopt, compiled=True), packages=MODELOPT),
}

if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))
