"""Do our benchmarks agree, item by item, with lm-evaluation-harness called directly, and streamed with in memory?

    python benchmarks/tasks_agree.py --teacher DIR --student DIR --rows DIR [--limit N] [--out FILE]

--rows is a directory for --tasks-dir. Each task that it holds is also pointed at the same rows by a .yaml file, as the
harness's documentation describes, and measured by `lm_eval.simple_evaluate` with its own class for Hugging Face models.
Sampled programs of MBPP and HumanEval differ with the batch, so they are compared at batch 1; the harness's side has no
executor, and compares the programs.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
from lib.measure import header, publish, table
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers.utils.logging import set_verbosity_error

from minitron.evaluation.tasks import harness
from minitron.evaluation.tasks.definitions import FILES, SUBJECTS, version
from minitron.evaluation.tasks.in_memory import InMemory
from minitron.evaluation.tasks.measure import TaskOptions, plan_tasks
from minitron.evaluation.tasks.models import Streamed
from minitron.evaluation.tasks.rows import LocalTask
from minitron.evaluation.tasks.suite import BenchmarkTask
from minitron.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from minitron.report.tables import score

STOCK = Path(lm_eval.__file__).parent / "tasks"
Samples = dict[str, list[dict[str, Any]]]
# Of the .yaml files by hand: a task whose rows are multiple choice or a last word is none of the harness's.
GENERAL = {
    "choice": ["output_type: multiple_choice", 'doc_to_text: "{{ctx}}"', 'doc_to_choice: "{{endings}}"',
               'doc_to_target: "{{label}}"', "metric_list: [{metric: acc}, {metric: acc_norm}]"],
    "last word": ["output_type: loglikelihood", 'doc_to_text: "{{ctx}}"', 'doc_to_target: " {{target}}"',
                  "metric_list: [{metric: perplexity}, {metric: acc}]"],
}  # fmt: skip
# Tasks whose definitions import the hub's executor: what of them makes the prompts is taken, and nothing is executed.
CODE = ("mbpp", "humaneval")
OF_PROMPTS = ("output_type", "doc_to_text", "doc_to_target", "target_delimiter", "generation_kwargs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20, help="items of each task, or subject, that is not generated")
    parser.add_argument("--generated", type=int, default=5, help="items of each task that is generated")
    parser.add_argument("--tasks", nargs="*", default=[], help="default all that the rows are of")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    set_verbosity_error()
    plan = plan_tasks(args.tasks, args.rows, TaskOptions(allow_code=True))
    rows: list[list[str]] = []
    for name, path in (("teacher", args.teacher), ("student", args.student)):
        for benchmark in plan.benchmarks:
            rows.append([name, *compared(path, benchmark, plan.local[benchmark.task], args)])
            print(rows[-1], flush=True)
    columns = ["model", "task", "shots", "items", "value", "same prompts and answers", "largest gap, in memory"]
    text = f"""{header("Benchmarks against the harness called directly")}
lm_eval {version()} called directly, with its own class for Hugging Face models in batches of 4 (generated
tasks: 1), against `minitron evaluate --tasks-dir`. The gap is of log-likelihoods of continuations, in nats; answers
are compared as text, and programs before they run. At most {args.limit} items of each task or subject,
{args.generated} of generated ones. The teacher is a 3.15M-parameter TinyStories Llama with a context of 512 tokens, at
chance in all but the two stories tasks; the student is a plain cut of it, without training. The machine had other work.

{table([*columns, "largest gap, streamed", "ours, s", "streamed, s", "harness, s"], rows)}
"""
    publish(text, args.out)


def compared(path: Path, benchmark: BenchmarkTask, local: LocalTask, args: argparse.Namespace) -> list[str]:
    """A row of the table; raises where items are not the same."""
    task = harness.load_task(benchmark, local)
    limit = args.generated if task.generates else args.limit
    with harness.quietly():
        ours = InMemory(load_model(path), load_tokenizer(path), batch=1 if task.generates else None)
        layers = Streamed(open_checkpoint(path), load_tokenizer(path))
    started = time.perf_counter()
    result, samples = harness.run_task(task, ours, limit=limit, samples=True)
    own_seconds = time.perf_counter() - started
    started = time.perf_counter()
    items = by_hand(path, benchmark, local, limit, generates=task.generates, longest=ours.max_length)
    direct_seconds = time.perf_counter() - started
    pairs = [pair for name in samples for pair in zip(samples[name], items[name], strict=True)]
    same = sum(_same(*pair, text=task.generates) for pair in pairs)
    gap = streamed_gap = streamed_seconds = "-"
    if not task.generates:
        started = time.perf_counter()
        by_layers, streamed = harness.run_task(task, layers, limit=limit, samples=True)
        streamed_seconds = f"{time.perf_counter() - started:.1f}"
        assert abs(by_layers.value - result.value) < 1e-4, (by_layers, result)
        gap = f"{max(_gap(*pair) for pair in pairs):.1e}"
        streamed_gap = f"{max(_gap(*pair) for n in samples for pair in zip(samples[n], streamed[n], strict=True)):.1e}"
    assert same == len(pairs), (benchmark.task, same, len(pairs))
    cells = [benchmark.task, str(result.shots), str(result.n), score(result), f"{same} of {len(pairs)}"]
    return [*cells, gap, streamed_gap, f"{own_seconds:.1f}", streamed_seconds, f"{direct_seconds:.1f}"]


def by_hand(
    path: Path, benchmark: BenchmarkTask, local: LocalTask, limit: int, *, generates: bool, longest: int
) -> Samples:
    """Items of the harness called directly, by the names that ours have."""
    with tempfile.TemporaryDirectory() as directory:
        work, names = Path(directory), {}
        for subject, test in local.parts.items():
            own = f"mmlu_{subject}" if subject else benchmark.task
            names[own] = f"by_hand_{own}"
            files = {"test": _dump(work / f"{own}-test.jsonl", test)}
            if local.fewshot.get(subject):
                files["fewshot"] = _dump(work / f"{own}-fewshot.jsonl", local.fewshot[subject])
            lines = _definition(benchmark, local, subject, files, work, longest)
            (work / f"{own}.yaml").write_text("\n".join([f"task: {names[own]}", *lines]))
        manager = TaskManager(include_path=str(work), include_defaults=False)
        with harness.quietly():
            batch = 1 if generates else 4
            model = HFLM(pretrained=load_model(path), tokenizer=load_tokenizer(path), batch_size=batch)
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=[*names.values()],
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                confirm_run_unsafe_code=True,
            )
        assert found is not None
        return {own: found["samples"][name] for own, name in names.items()}


def _definition(
    benchmark: BenchmarkTask, local: LocalTask, subject: str, files: dict[str, str], work: Path, longest: int
) -> list[str]:
    task = benchmark.task
    if local.kind is not None:
        lines = list(GENERAL[local.kind])
    elif task in CODE:
        stock = load_yaml(STOCK / FILES[task], resolve_func=False)
        stock["generation_kwargs"] |= benchmark.generation
        if stock["generation_kwargs"].get("max_gen_toks", 0) >= longest:
            stock["generation_kwargs"]["max_gen_toks"] = longest // 2
        lines = [f"{key}: {json.dumps(stock[key])}" for key in OF_PROMPTS if key in stock]
        lines += ["metric_list: [{metric: bypass}]"]
    else:
        lines = [f"include: {STOCK / (SUBJECTS.format(subject=subject) if subject else FILES[task])}"]
    lines += ["dataset_path: json", "dataset_name: null", "training_split: null", "validation_split: null"]
    lines += ["test_split: test", f"num_fewshot: {benchmark.shots or 0}"]
    lines += [f"dataset_kwargs: {json.dumps({'data_files': files, 'cache_dir': str(work / 'cache')})}"]
    lines += [] if task == "mbpp" else [f"fewshot_split: {'fewshot' if 'fewshot' in files else 'test'}"]
    return lines


def _dump(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _same(one: dict[str, Any], other: dict[str, Any], *, text: bool) -> bool:
    prompts = [[arguments[0] for arguments in item["arguments"]] for item in (one, other)]
    if text:
        return prompts[0] == prompts[1] and one["resps"] == other["resps"]
    best = [[one["filtered_resps"].index(max(one["filtered_resps"])), [r[1] for r in one["filtered_resps"]]]]
    best += [[other["filtered_resps"].index(max(other["filtered_resps"])), [r[1] for r in other["filtered_resps"]]]]
    values = [[item[metric] for metric in sorted(one["metrics"])] for item in (one, other)]
    near = all(abs(a - b) < 1e-3 for a, b in zip(*values, strict=True))
    return prompts[0] == prompts[1] and best[0] == best[1] and near


def _gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(one["filtered_resps"], other["filtered_resps"], strict=True)
    return max(abs(float(a[0]) - float(b[0])) for a, b in pairs)


if __name__ == "__main__":
    main()
