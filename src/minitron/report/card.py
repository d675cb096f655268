"""The student's README.md: a Hugging Face model card, made from the records of a run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from minitron.core.errors import GgufError
from minitron.core.files import write_text
from minitron.core.run_layout import RunLayout
from minitron.core.text import count, duration, nats, share, short_count, shown
from minitron.data.sources import BUILTIN, TEACHER
from minitron.gguf.reader import is_gguf
from minitron.gguf.source import model_directory
from minitron.report.published import DATASETS
from minitron.report.records import (
    BenchmarkRow,
    RunRecords,
    benchmarks,
    correction,
    exported,
    heldout_source,
    layer_criterion,
    layers_by_number,
    loss_name,
    public_recipe,
    repairs,
    result_table,
    sampling,
)
from minitron.report.tables import (
    BENCHMARK_NOTE,
    RESULT_COLUMNS,
    SHAPE_DIMS,
    environments,
    fenced,
    hub_id,
    markdown_table,
    result_cells,
    score,
    source_name,
)

MetricKey = Literal["lm_loss", "perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement"]
# Result keys that go into the model index, as (metric id, name). Only perplexity is a metric id of the hub.
METRICS: dict[MetricKey, tuple[str, str]] = {
    "lm_loss": ("lm_loss", "LM loss (nats per token)"),
    "perplexity": ("perplexity", "Perplexity per token"),
    "bits_per_byte": ("bits_per_byte", "Bits per byte"),
    "kl_to_teacher": ("kl_to_teacher", "KL(teacher, student) (nats per token)"),
    "top1_agreement": ("top1_agreement", "Top-1 agreement with the teacher"),
}
# Text that is neither a file nor a dataset.
KNOWN_TEXT = {BUILTIN: "the source text of Python's standard library", TEACHER: "text sampled from the parent itself"}
KNOWN_DATASETS = {BUILTIN: "Python standard library", TEACHER: "Text sampled from the parent, held-out part"}
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # files copied from the parent


def write_card(records: RunRecords) -> Path:
    """Write student/README.md.

    Raises: RunError if the file cannot be written.
    """
    path = RunLayout(records.path).card
    write_text(path, str(make_card(records)))
    return path


def make_card(records: RunRecords) -> ModelCard:
    return ModelCard(f"---\n{metadata(records).to_yaml()}\n---\n\n{_text(records)}")


def metadata(records: RunRecords) -> ModelCardData:
    """The metadata that the hub reads."""
    recipe, family = records.recipe, records.evaluations["student"].family
    return ModelCardData(
        **described(recipe.model, recipe.revision, recipe.data.source, family),
        model_name=card_model_name(records),
        eval_results=_eval_results(records),
    )


def described(model: str, revision: str | None, source: str, family: str) -> dict[str, Any]:
    """The metadata of a student that are no results.

    Of the hub's relations (adapter, finetune, merge, quantized) a finetune comes nearest: the parent's weights, trained
    further. The tags tell the rest. Without a relation, the hub takes a repository with GGUF files for a quantization.
    base_model must be a hub id, so a local teacher is named in the text only.

    Args:
        model: the parent, and its revision.
        source: of the text.
    """
    data_id, parent = hub_id(source), hub_id(model)
    return {
        "base_model": parent,
        "base_model_relation": "finetune" if parent else None,
        "datasets": [data_id] if data_id else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minitron", "pruning", "distillation", family],
        **licence(parent_card(model, revision)),
    }


def card_model_name(records: RunRecords) -> str:
    teacher = source_name(records.recipe.model).rpartition("/")[2]
    return f"{teacher}-minitron-{short_count(records.evaluations['student'].parameters.total)}"


def parent_card(model: str, revision: str | None) -> Mapping[str, Any]:
    """The metadata of the parent's card, from a local directory, a GGUF file or the cache of a hub model.

    Empty where the parent states none, or is not there any more.
    """
    try:
        directory = model_directory(model) if is_gguf(model) else Path(model).expanduser()
    except GgufError:
        return {}
    readme = directory / "README.md"
    if not readme.is_file():
        known = try_to_load_from_cache(model, "README.md", revision=revision) if hub_id(model) else None
        if not isinstance(known, str):
            return {}
        readme = Path(known)
    try:
        return metadata_load(readme) or {}
    except (yaml.YAMLError, ValueError):  # the hub cannot read such a card either
        return {}


def licence(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """license, license_name and license_link, as far as a card states them."""
    return {key: stated[key] for key in ("license", "license_name", "license_link") if key in stated}


def _eval_results(records: RunRecords) -> list[EvalResult]:
    source = heldout_source(records)
    (student,) = (row for row in result_table(records) if row["model"] == "student")
    measured = {key: value for key in METRICS if (value := student[key]) is not None and math.isfinite(value)}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=hub_id(source) or "custom",
            dataset_name=KNOWN_DATASETS.get(source, f"{source_name(source)}, held-out part"),
            metric_type=METRICS[key][0],
            metric_name=METRICS[key][1],
            metric_value=value,
        )
        for key, value in measured.items()
    ] + [_task_result(row) for row in benchmarks(records) if not row.chosen_by]


def _task_result(row: BenchmarkRow) -> EvalResult:
    student = row.student
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=DATASETS.get(row.task, row.task),  # one for each task: equal types are merged
        dataset_name=student.title,
        metric_type=student.metric,
        metric_name=f"{student.metric} ({student.shots}-shot)",
        metric_value=student.value,
        metric_args={"shots": student.shots, "items": student.n, "stderr": student.stderr},
        source_name="lm-evaluation-harness",
        source_url="https://github.com/EleutherAI/lm-evaluation-harness",
    )


def _text(records: RunRecords) -> str:
    rows = {row["model"]: row for row in result_table(records)}
    student, teacher = rows["student"], rows["teacher"]
    return f"""# {card_model_name(records)}

A smaller {_parent(records)}: {count(student["total"])} parameters instead of {count(teacher["total"])}, with
{share(student["non_embedding_share"])} of the non-embedding parameters. Its least important units were removed, and the
remaining model was trained to give the parent's next-token distributions. The method is that of Minitron
([arXiv:2407.14679](https://arxiv.org/abs/2407.14679), [arXiv:2408.11796](https://arxiv.org/abs/2408.11796)), in the
implementation of `minitron` {records.stages["student"].versions["minitron"]}.

## Results

{_results(records)}

Means over {count(records.evaluations["student"].tokens)} predicted tokens of held-out text. `teacher` is the parent,
`pruned` the model before distillation, `student` this model{_others(records)}. KL is KL(teacher ‖ model).
{_benchmarks(records)}
## Shape

{_shape(records)}

## Use

{USE.format(prompt=_prompt(records))}
{_exports(records)}
## How it was made

{_method(records)}

<details><summary>The recipe, complete (of local paths, the last part)</summary>

{fenced(yaml.safe_dump(public_recipe(records), sort_keys=False, allow_unicode=True), "yaml")}

</details>

## Limits

{_limits(records)}

## Provenance

{_provenance(records)}
"""


USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or the hub id that it has been uploaded to
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
inputs = tokenizer({prompt!r}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True))
```

With vLLM (not tested by this run): `vllm serve PATH`."""


def _limits(records: RunRecords) -> str:
    text = _measured_on(records)
    return f"""- Measured on held-out text of {text} only. What the parent could do beyond such text, in other
  languages or in long contexts was not measured and may be lost.
- Not instruction tuned or aligned beyond its parent; pruning may have weakened what the parent had of either.
- Expect the parent's biases and gaps.
- {_licence_text(records)}"""


def _exports(records: RunRecords) -> str:
    """The student in other formats, and how to run it there."""
    texts = {row.title: row.card(records.exports[name], _prompt(records)) for name, row in exported(records)}
    return "".join(f"\n## {title}\n\n{text}\n" for title, text in texts.items() if text)


def _parent(records: RunRecords) -> str:
    model = records.recipe.model
    return f"[{model}](https://huggingface.co/{model})" if hub_id(model) else f"`{source_name(model)}`"


def _results(records: RunRecords) -> str:
    head = ["model", *(f"{column.heading} ({column.unit})" for column in RESULT_COLUMNS)]
    return markdown_table(head, [[row["model"], *result_cells(row)] for row in result_table(records)])


def _others(records: RunRecords) -> str:
    how, known = correction(records), "scratch" in records.evaluations
    scratch = ", `scratch` its shape trained from random weights on the same tokens" if known else ""
    if not how:
        return scratch
    kl = shown(records.evaluations["student"].kl_to_corrected, nats)
    return f"{scratch},\n`corrected` the parent {how} (this model's KL to that one is {kl})"


def _benchmarks(records: RunRecords) -> str:
    rows = [row for row in benchmarks(records) if not row.chosen_by]
    if not rows:
        return ""
    head = ["benchmark", "metric", "shots", "items", "parent", "this model"]
    cells = []
    for row in rows:
        student = row.student
        numbers = [str(student.shots), count(student.n), score(row.teacher), score(student)]
        cells.append([student.title, student.metric, *numbers])
    return f"\n{markdown_table(head, cells)}\n\nBy lm-evaluation-harness. {BENCHMARK_NOTE}\n"


def _shape(records: RunRecords) -> str:
    rows = []
    for name in ("teacher", "student"):
        row = records.evaluations[name]
        dims = [count(getattr(row.shape, dim)) for dim in SHAPE_DIMS]
        rows.append([name, *dims, count(row.kv_cache_bytes_per_token)])
    return markdown_table(["model", *SHAPE_DIMS, "KV cache, bytes per token"], rows)


def _method(records: RunRecords) -> str:
    statistics, student = records.results.statistics, records.stages["student"]
    recipe, samples, tokens = records.recipe, count(statistics.samples), count(statistics.tokens)
    criterion = f"`{recipe.prune.criterion}`, layers by `{layer_criterion(records)}`"
    return f"""1. Scored units by the criterion {criterion},
   on {samples} samples ({tokens} tokens) of {_text_name(recipe.data.source)}{_sampling(records)}.
2. Cut: {records.results.plan.plan}.{_choices(records)}
3. Distilled on {count(records.results.student.training.tokens)} tokens of the same text with the loss
   {loss_name(recipe.distill)}, in {duration(student.seconds)} on {student.hardware.device}.{_settled(records)}"""


def _settled(records: RunRecords) -> str:
    """The sentences on a length that was given in minutes, and on settings that were changed to fit the memory."""
    budget, fit = records.results.student.budget, records.results.student.fit
    length = "" if budget is None else f" Its length was given as time: {budget}."
    return length + ("" if fit is None or not fit.changes else f" To fit the memory, settings were changed: {fit}.")


def _choices(records: RunRecords) -> str:
    """The sentences on layers that were given by number, and on repairs."""
    steps, cut = repairs(records), records.cut
    by_number = layers_by_number(records) and cut is not None
    text = f" The layers were given by number: {', '.join(map(str, cut.layers))} stay." if cut and by_number else ""
    if steps is None:
        return text
    return f"{text}\n   Repaired at the cut by {', '.join(f'`{step}`' for step in steps) or 'nothing'}."


def _measured_on(records: RunRecords) -> str:
    if records.recipe.data.heldout:
        return _text_name(records.recipe.data.heldout)
    return f"the source it was trained on ({_text_name(records.recipe.data.source)})"


def _text_name(source: str) -> str:
    return KNOWN_TEXT.get(source, f"`{source_name(source)}`")


def _sampling(records: RunRecords) -> str:
    how = sampling(records)
    return f" ({how})" if how else ""


def _licence_text(records: RunRecords) -> str:
    """The parent's licence, the models that the parent was made from, and the files with the terms."""
    parent = parent_card(records.recipe.model, records.recipe.revision)
    stated, before = licence(parent), parent.get("base_model")
    text = "Licence: the parent's applies; this card does not state it because the run did not know it."
    if stated:
        text = (
            f"Licence: {stated.get('license_name', stated.get('license'))}, the parent's, which applies to this model."
        )
    if before:
        names = ", ".join(f"`{name}`" for name in ([before] if isinstance(before, str) else before))
        text += f" The parent names {names} as its base, whose terms may apply too."
    terms = [file.name for pattern in TERMS for file in sorted((records.path / "student").glob(pattern))]
    if terms:
        text += f" The parent's terms are in {', '.join(f'`{name}`' for name in terms)}."
    return text


def _prompt(records: RunRecords) -> str:
    return next(iter(records.recipe.evaluate.prompts), "Once upon a time")


def _provenance(records: RunRecords) -> str:
    """Seed, machine, software, and the digests of the student's inputs."""
    facts = {"Seed": str(records.recipe.seed)} | environments(records.stages)
    inputs = records.stages["student"].inputs
    facts |= {f"sha256 of the {name}": f"`{digest}`" for name, digest in inputs.items()}
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
