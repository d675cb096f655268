"""How much of its teacher does a student keep, right after the cut and after so many tokens of distillation?

    python benchmarks/recovery.py --cache DIR --model DIR --data train.txt --heldout valid.txt
        [--targets 80%,65%,50%] [--starts default,plain,random,taylor,block_influence] [--tokens 0,0.03M,0.1M,1M]
        [--rates 0.5,1,2] [--seeds 0,1] [--tasks DIR] [--types Q8_0,Q4_K_M,Q2_K] [--plot FILE] [--out FILE]

Every cell is a training run of its own, with its own full schedule: a shorter budget is no point on a longer curve. All
runs are distilled by the default settings, and all but `block_influence` have the shape that the target gives:

- default: cut and repaired as `minitron prune` does it;
- logits: the same, distilled on logits alone;
- refit: the same cut, with the sequential refit behind it;
- plain: the papers' cut by activations and block influence, without a repair, distilled on logits alone with AdamW;
- random: the shape with random weights, distilled in the same way as `default`;
- taylor: a plain cut by first-order Taylor scores, |weight x gradient| summed over a unit, the score of LLM-Pruner (Ma
  et al. 2023);
- slicegpt: hidden sliced in a basis of each block's own, with the matrices between them, by lib/slicegpt.py, to the
  same parameters; its distillation is a plain loop on logits with AdamW, on the same batches at the same rates;
- block_influence: the layers of least block influence are dropped until the parameters are nearest to the target's, and
  no repair is made.

--tasks names a directory of local rows, of the tasks in CHANCE: teacher, cuts and students of `default` are measured on
all of them.
--types names GGUF types: the teacher and each target's student of most tokens are written in each, and measured in
llama.cpp against the teacher. --speed names one in which the speeds of the shapes are measured beside the teacher's.
Runs and students are kept in the cache, and the runs beside the result file, so the same command goes on where it was
stopped, within a run too, and several can share one cache (--part 0/2, --part 1/2).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lib import slicegpt
from lib.distillations import (
    BLOCK_TOKENS,
    Bench,
    arguments,
    as_text,
    integers,
    numbers,
    of_target,
    opened,
    published,
    share_of,
    to_do,
    token_counts,
)
from lib.measure import header, table
from torch.nn.functional import cross_entropy

from minitron import api
from minitron.core.text import rate as per_second
from minitron.core.text import with_range
from minitron.data.config import DataConfig
from minitron.distillation.schedule import Schedule
from minitron.evaluation.engines import SpeedOptions, measure_speed
from minitron.evaluation.layouts import TaskResult
from minitron.evaluation.tasks.measure import TaskOptions, measure_tasks, plan_tasks
from minitron.gguf.config import QuantizeConfig
from minitron.model.architecture import Shape, with_sizes
from minitron.model.checkpoint import load_model
from minitron.pruning.cut import cut
from minitron.pruning.importance import Scores
from minitron.pruning.plan import choose

TAYLOR_BLOCKS = 10  # as many samples as LLM-Pruner takes
CHANCE = {"arc_easy": 0.25, "hellaswag": 0.25, "lambada_openai": 0.0, "piqa": 0.5, "winogrande": 0.5}
SPEED_ROUNDS, SPEED_CONTEXT = 5, 256
CLEARLY = 2  # standard errors above chance
OF_TEACHER = {"model": "teacher"}
DASHES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)))
OF_DEFAULT = ("logits", "random")  # begin with the cut of `default`
REPAIRED = ("default", "logits", "refit")
AT_CUT = 10_000  # where a plot over the logarithm of tokens has the cut
PLAIN: dict[str, Any] = {"intermediate": "off", "optimizer": "adamw"}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "slicegpt": PLAIN,
    "random": {"initialize": "random"},
    "logits": {"intermediate": "off"},
}


@dataclass(frozen=True)
class Lab:
    """The students of one teacher, kept in the cache by their target and what was done to them."""

    bench: Bench

    def shape(self, target: str, start: str) -> Shape:
        teacher = self.bench.teacher
        if start == "block_influence":
            share = share_of(target)
            fewer = [with_sizes(teacher.shape, layers=layers) for layers in range(1, teacher.shape.layers)]
            return min(fewer, key=lambda shape: abs(self.bench.share(shape) - share))
        key = {"shape_of": target}
        if not self.bench.has(key):
            self.bench.record({"key": key, "shape": as_text(of_target(self.bench.pruner, target), teacher.shape)})
        text = next(row["shape"] for row in self.bench.rows if row["key"] == key)
        return self.bench.from_text(text)

    def path(self, **key: Any) -> Path:
        name = "_".join(str(value).strip("%") for value in key.values())
        return self.bench.cache / "students" / name

    def pruned(self, target: str, start: str) -> Path:
        """The student right after its cut, made and measured if it is not there."""
        out, key = self.path(target=target, start=start), run_key(target, start, 0)
        if not out.exists():
            partial = Path(tempfile.mkdtemp(dir=self.bench.cache))
            self.cut(self.shape(target, start), start, partial)
            out.parent.mkdir(exist_ok=True)
            partial.rename(out)
        if not self.bench.has(key):
            self.bench.record({"key": key, **self.bench.measure(out)})
        return out

    def cut(self, shape: Shape, start: str, out: Path) -> None:
        teacher = self.bench.teacher
        if start in ("default", "refit"):
            steps = [*self.bench.pruner.repairs, *(["refit"] if start == "refit" else [])]
            replace(self.bench.pruner, repairs=steps).make(shape, out)
            return
        scores = self.taylor if start == "taylor" else self.bench.pruner.unit_scores
        cut(teacher, choose(scores, teacher.shape, shape), out)

    @cached_property
    def taylor(self) -> Scores:
        """The sum of |weight x gradient| over the weights of each unit, by the loss on calibration text."""
        teacher, shape = self.bench.teacher, self.bench.teacher.shape
        model = load_model(teacher.path, torch.float32)
        for row in self.bench.pruner.scoring.calibration.tokens[:TAYLOR_BLOCKS]:
            logits = model(row[None].long()).logits[0, :-1]
            (cross_entropy(logits, row[1:].long()) / TAYLOR_BLOCKS).backward()
        parameters = dict(model.named_parameters())
        sizes = {dim: getattr(shape, dim) for dim in ("hidden", "ffn", "heads", "kv_heads")}
        damages = {dim: torch.zeros(shape.layers, size, dtype=torch.float64) for dim, size in sizes.items()}
        layers = torch.zeros(shape.layers, dtype=torch.float64)
        for spec in teacher.specs():
            weight = parameters.get(spec.name)
            if spec.layer is None or weight is None or weight.grad is None:
                continue
            damage = (weight.detach() * weight.grad).abs().double()
            layers[spec.layer] += damage.sum()
            for number, axis in enumerate(spec.axes):
                rows = damage.movedim(number, 0)
                of_rows = rows.reshape(len(rows), -1).sum(1).split([segment.size(shape) for segment in axis])
                for segment, found in zip(axis, of_rows, strict=True):
                    if segment.unit in sizes:
                        damages[segment.unit][spec.layer] += found.view(sizes[segment.unit], -1).sum(1)
        damages["kv_heads"] += damages["heads"].unflatten(-1, (shape.kv_heads, shape.group)).sum(-1)
        return Scores(layers, damages["hidden"].sum(0), *(damages[dim] for dim in ("ffn", "heads", "kv_heads")))

    def run(self, target: str, start: str, tokens: int, rate: float, seed: int) -> None:
        """One student, unless the cache has it."""
        key, bench = run_key(target, start, tokens, rate, seed), self.bench
        if bench.has(key) or (tokens == 0 and (rate, seed) != (1.0, 0)):
            return
        if tokens == 0 and start in OF_DEFAULT:
            return
        if start == "slicegpt":
            bench.record({"key": key, **self.sliced(target, tokens, rate, seed)})
            return
        pruned = self.pruned(target, "default" if start in OF_DEFAULT else start)
        if tokens == 0:
            return
        kept = self.path(**key)
        partial = kept.with_name(f"{kept.name}.partial")
        partial.mkdir(exist_ok=True)
        row = bench.distilled(pruned, self.schedule(target, start, tokens, rate, seed), partial)
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)
        bench.record({"key": key, "threads": torch.get_num_threads(), **row})

    def schedule(self, target: str, start: str, tokens: int, rate: float, seed: int) -> Schedule:
        settings = {"tokens": tokens, "seed": seed, **CHANGES.get(start, {})}
        return self.bench.schedule(self.shape(target, start), settings, repaired=start in REPAIRED, rate=rate)

    def sliced(self, target: str, tokens: int, rate: float, seed: int) -> dict[str, float]:
        """The teacher sliced to the target's parameters and trained, measured in memory."""
        bench, samples = self.bench, self.bench.pruner.scoring.calibration
        size = slicegpt.size_of_target(bench.model.config, share_of(target))
        model, parameters = slicegpt.sliced(bench.model, samples.tokens, size)
        started = time.monotonic()
        if tokens:
            schedule = self.schedule(target, "slicegpt", tokens, rate, seed)
            slicegpt.train(model, load_model(bench.teacher.path), bench.corpus.train, schedule)
        seconds = time.monotonic() - started
        row = {**bench.measured(model), "hidden": size, "parameters": parameters}
        return row | ({"seconds": seconds, "threads": torch.get_num_threads()} if tokens else {})

    def models(self) -> Iterator[tuple[str, Path]]:
        """The teacher, and cuts and students of `default` at the usual rate, fewest tokens first, with a name each."""
        yield "teacher", self.bench.teacher.path
        for row in sorted(_runs(self), key=_order):
            key = row["key"]
            usual = key.get("start") == "default" and (key["rate"], key["seed"]) == (1.0, 0)
            if usual:
                path = self.path(**key) if key["tokens"] else self.path(target=key["target"], start="default")
                if path.exists():
                    yield _name(key), path

    def examined(self, directory: Path) -> None:
        """Measure each model in each task of a directory of local rows."""
        plan = plan_tasks([], directory, TaskOptions())
        for name, path in self.models():
            keys = [{"task": one.task, "of": name} for one in plan.benchmarks]
            missing = tuple(one for key, one in zip(keys, plan.benchmarks, strict=True) if not self.bench.has(key))
            if missing:
                found = measure_tasks({name: path}, replace(plan, benchmarks=missing))[name]
                for task, result in found.items():
                    self.bench.record({"key": {"task": task, "of": name}, "result": result.to_dict()})

    def timed(self, kind: str, target: str) -> None:
        """Measure the speed of a target's shape beside the teacher's in llama.cpp, in files of a type."""
        key = {"speed_of": target, "type": kind}
        if self.bench.has(key):
            return
        with tempfile.TemporaryDirectory(dir=self.bench.cache) as directory:
            files = []
            for model in (self.pruned(target, "default"), self.bench.teacher.path):
                out = Path(directory) / model.name
                api.quantize(str(model), QuantizeConfig(types=[kind], verify=False), out=out)
                files.extend(map(str, out.glob("*.gguf")))
            result = measure_speed(*files, SpeedOptions(batches=[1], contexts=[SPEED_CONTEXT], rounds=SPEED_ROUNDS))
        self.bench.record({"key": key, "result": result.to_dict()})

    def quantized(self, types: str, args: argparse.Namespace) -> None:
        """Write the teacher and the last students in each type, and keep their bytes and their KL to the teacher."""
        data = DataConfig(source=args.data, heldout=args.heldout, block_tokens=BLOCK_TOKENS)
        last = {name.partition(",")[0]: (name, path) for name, path in self.models()}
        for name, path in last.values():
            missing = [one for one in types.split(",") if not self.bench.has({"file": one, "of": name})]
            if not missing:
                continue
            with tempfile.TemporaryDirectory(dir=self.bench.cache) as directory:
                out = Path(directory) / "files"
                table = api.quantize(str(path), QuantizeConfig(types=missing, blocks=1), data, out=out)
                for file in table.files:
                    found = api.evaluate(
                        out / file.file, data, teacher=self.bench.teacher.path, blocks=self.bench.heldout_blocks
                    )
                    self.bench.record(
                        {
                            "key": {"file": file.name, "of": name},
                            "bytes": file.bytes,
                            "kl": found.kl_to_teacher,
                            "loss": found.lm_loss,
                        }
                    )


def run_key(target: str, start: str, tokens: int, rate: float = 1.0, seed: int = 0) -> dict[str, Any]:
    return {"target": target, "start": start, "tokens": tokens, "rate": rate, "seed": seed}


def main() -> None:
    parser = arguments(__doc__, data=None)
    parser.add_argument("--targets", default="80%,65%,50%")
    parser.add_argument("--starts", default="default")
    parser.add_argument("--tokens", default="0,0.03M,0.1M,0.3M")
    parser.add_argument("--rates", default="1")
    parser.add_argument("--tasks", type=Path, help="directory of local rows")
    parser.add_argument("--types", help="GGUF types, such as Q8_0,Q4_K_M,Q2_K")
    parser.add_argument("--speed", metavar="TYPE", help="GGUF type in which speed is measured, on a machine at rest")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    lab = Lab(opened(args))
    targets = args.targets.split(",")
    grid = product(
        token_counts(args.tokens), integers(args.seeds), numbers(args.rates), args.starts.split(","), targets
    )
    for tokens, seed, rate, start, target in to_do(args, grid):
        lab.run(target, start, tokens, rate, seed)
    if not (args.only_table or lab.bench.has(OF_TEACHER)):
        lab.bench.record({"key": OF_TEACHER, **lab.bench.measure(lab.bench.teacher.path)})
    if args.types and not args.only_table:
        lab.quantized(args.types, args)
    if args.tasks and not args.only_table:
        lab.examined(args.tasks)
    if args.speed and not args.only_table:
        for target in targets:
            lab.timed(args.speed, target)
    published(lab.bench, report(lab, args.name), args)
    if args.plot:
        plot(lab, args.plot)


def report(lab: Lab, name: str) -> str:
    teacher = lab.bench.teacher
    own = next((row["loss"] for row in lab.bench.rows if row["key"] == OF_TEACHER), float("nan"))
    lines = [
        header(f"Recovery after a cut: {name}"),
        f"Teacher {teacher.shape}, {teacher.parameters.non_embedding:,} non-embedding parameters; "
        f"{lab.bench.corpus.train_tokens:,} training tokens, read again where a budget is larger. KL to the teacher in "
        f"nats a token, top-1 agreement with it and loss on {lab.bench.heldout_blocks} "
        f"held-out blocks of {BLOCK_TOKENS}, where the teacher's own loss is {own:.3f}. Each "
        "cell is a run of its own with its own schedule; with several rates or seeds there is a row for each. Minutes "
        "are those of distillation, with as many threads as stand behind; another run may have shared the machine.",
        "",
        table(
            ["target, start", "shape", "parameters", "tokens", "rate", "KL", "top-1", "loss", "minutes (threads)"],
            [_row(lab, row) for row in sorted(_runs(lab), key=_order)],
        ),
        "",
    ]
    if results := [row for row in lab.bench.rows if "task" in row["key"]]:
        lines += [
            f"Benchmarks of `default`: the value and its standard error over items. The mean is of those on which the "
            f"teacher is at least {CLEARLY} standard errors above chance.",
            "",
            _tasks(lab, results),
            "",
        ]
    if speeds := [row for row in lab.bench.rows if "speed_of" in row["key"]]:
        lines += [
            f"Tokens a second of one sequence in llama.cpp behind {SPEED_CONTEXT} tokens: medians of {SPEED_ROUNDS} "
            "rounds of teacher and student in turn, slowest to fastest in brackets; a ratio is the median of the "
            "rounds' ratios.",
            "",
            table(["target, type", "load", "teacher", "student", "ratio"], [*_speeds(speeds)]),
            "",
        ]
    if files := [row for row in lab.bench.rows if "file" in row["key"]]:
        lines += [
            "Files for llama.cpp, with an importance matrix of calibration text: KL to the unquantized teacher.",
            "",
            table(
                ["model", "type", "bytes", "KL", "loss"],
                [
                    [
                        row["key"]["of"],
                        row["key"]["file"],
                        f"{row['bytes']:,}",
                        f"{row['kl']:.3f}",
                        f"{row['loss']:.3f}",
                    ]
                    for row in sorted(files, key=lambda row: -row["bytes"])
                ],
            ),
            "",
        ]
    return "\n".join(lines)


def _runs(lab: Lab) -> list[dict[str, Any]]:
    return [row for row in lab.bench.rows if "start" in row["key"]]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    key = row["key"]
    return -float(key["target"].rstrip("%")), key["start"], key["tokens"], key["rate"], key["seed"]


def _row(lab: Lab, row: dict[str, Any]) -> list[str]:
    key = row["key"]
    shape = lab.shape(key["target"], key["start"])
    cells = [as_text(shape, lab.bench.teacher.shape), f"{lab.bench.share(shape):.1%}"]
    if key["start"] == "slicegpt":
        share = row["parameters"] / lab.bench.teacher.parameters.non_embedding
        cells = [f"hidden={row['hidden']}", f"{share:.1%}"]
    minutes = f"{row['seconds'] / 60:.0f} ({row['threads']})" if "seconds" in row else ""
    seed = f", seed {key['seed']}" if key["seed"] else ""
    return [
        f"{key['target']}, {key['start']}{seed}",
        *cells,
        f"{key['tokens']:,}",
        f"{key['rate']:g}",
        f"{row['kl']:.3f}",
        f"{row['top1']:.1%}",
        f"{row['loss']:.3f}",
        minutes,
    ]


def _tasks(lab: Lab, rows: list[dict[str, Any]]) -> str:
    keys = [row["key"] for row in sorted(_runs(lab), key=_order)]
    results: dict[str, dict[str, TaskResult]] = {"teacher": {}}
    results |= {_name(key): {} for key in keys if key["start"] == "default"}
    for row in rows:
        result = TaskResult.model_validate(row["result"])
        results[row["key"]["of"]][row["key"]["task"]] = result
    teacher = results["teacher"]
    clear = [task for task, one in teacher.items() if one.value > CHANCE[task] + CLEARLY * (one.stderr or 0)]
    lines = []
    for model, found in results.items():
        if not found:
            continue
        cells = [
            f"{found[task].value:.3f} ± {found[task].stderr or 0:.3f}" if task in found else "" for task in teacher
        ]
        whole = found.keys() >= set(clear) and clear
        lines.append([model, *cells, f"{statistics.fmean(found[task].value for task in clear):.3f}" if whole else ""])
    heads = [f"{one.title}, {one.metric}, {one.n} items, chance {CHANCE[task]:g}" for task, one in teacher.items()]
    return table(["model", *heads, f"mean of {len(clear)}"], lines)


def _speeds(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    for row in sorted(rows, key=lambda row: -share_of(row["key"]["speed_of"])):
        (found,) = row["result"]["rows"]
        for load in ("prefill", "decode"):
            cells = [
                with_range(found[name][load], found[name][f"{load}_range"], form)
                for name, form in (("teacher", per_second), ("student", per_second), ("ratio", "{:.2f}".format))
            ]
            threads = f"{row['result']['threads']} threads"
            yield [f"{row['key']['speed_of']}, {row['key']['type']}", f"{load}, {threads}", *cells]


def plot(lab: Lab, out: Path) -> None:
    """KL over tokens, a line for each target and start; the cut stands at the left edge."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = out.name  # the same plot is the same file
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for row in sorted(_runs(lab), key=_order):
        key = row["key"]
        if key["start"] == "logits" or key["rate"] != 1.0:  # lines beside that of `default`
            continue
        of_curve = curves.setdefault((key["target"], key["start"]), {})
        of_curve[key["tokens"]] = min(row["kl"], of_curve.get(key["tokens"], row["kl"]))
    targets = list(dict.fromkeys(target for target, _ in curves))
    starts = sorted({start for _, start in curves}, key=lambda start: start != "default")
    for (target, start), points in curves.items():
        axes.plot(
            [max(tokens, AT_CUT) for tokens in points],
            list(points.values()),
            color=f"C{targets.index(target)}",
            linestyle=DASHES[starts.index(start) % len(DASHES)],
            marker="o",
            markersize=3.5,
            label=f"{target}, {start.replace('_', ' ')}",
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens of distillation", ylabel="KL to the teacher, nats per token")
    axes.xaxis.set_major_formatter(lambda value, _: "cut" if value <= AT_CUT else f"{value / 1e6:g}M")
    axes.set_xticks([AT_CUT, *sorted({tokens for points in curves.values() for tokens in points if tokens})])
    axes.minorticks_off()
    kls = [kl for points in curves.values() for kl in points.values()]
    axes.set_yticks([kl for kl in (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10) if min(kls) <= kl <= max(kls)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def _name(key: dict[str, Any]) -> str:
    """Of a student of `default` at the usual rate."""
    return f"{key['target']}, {_after(key['tokens'])}"


def _after(tokens: int) -> str:
    return f"{tokens / 1e6:g}M tokens" if tokens else "the cut"


if __name__ == "__main__":
    main()
