"""Benchmarks are those of lm-evaluation-harness: item by item what it finds itself when it is called directly."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import bench
import pytest
import small
import tiny
import torch
from tokenizers import Tokenizer

from minitron.core.errors import CheckpointError, TaskError
from minitron.core.progress import Silent
from minitron.evaluation.layouts import TaskResult
from minitron.evaluation.tasks import definitions, harness
from minitron.evaluation.tasks.measure import TaskOptions, measure_tasks, plan_tasks
from minitron.evaluation.tasks.rows import task_of
from minitron.evaluation.tasks.suite import SUITE, chosen, kept
from minitron.model.checkpoint import load_model, load_tokenizer, open_checkpoint

pytest.importorskip("lm_eval")
SHOTS = 2
# How each task is pointed at a local file by hand: its file, the split that is asked, and the split of the examples.
BY_HAND = {
    "winogrande": ("winogrande/default.yaml", "validation", "validation"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test", "test"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", "validation"),
    "truthfulqa_mc": ("truthfulqa/truthfulqa_mc2.yaml", "validation", "validation"),
    "piqa": ("piqa/piqa.yaml", "validation", "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", "test"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test", "train"),
    "mmlu/anatomy": ("mmlu/default/mmlu_anatomy.yaml", "test", "dev"),
    "mmlu/marketing": ("mmlu/default/mmlu_marketing.yaml", "test", "dev"),
}
Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.teacher(tmp_path_factory.mktemp("model") / "teacher", max_position_embeddings=192)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.write(tmp_path_factory.mktemp("bench"))


class Heard(Silent):
    """What was measured, and the warnings."""

    def __init__(self) -> None:
        self.notes: set[str] = set()
        self.warnings: list[str] = []

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.notes.add(note)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def in_memory(model: Path, **options: Any) -> Any:
    from minitron.evaluation.tasks.in_memory import InMemory

    with harness.quietly():
        return InMemory(load_model(model), load_tokenizer(model), **options)


def streamed(model: Path, **options: Any) -> Any:
    from minitron.evaluation.tasks.models import Streamed

    with harness.quietly():
        return Streamed(open_checkpoint(model), load_tokenizer(model), **options)


def measured(of: Any, rows: Path, task: str, **options: Any) -> tuple[TaskResult, Samples]:
    plan = plan_tasks([task], rows, TaskOptions(shots=SHOTS, allow_code=True))
    ready = harness.load_task(plan.benchmarks[0], plan.local.get(plan.benchmarks[0].task))
    return harness.run_task(ready, of, samples=True, **options)


def likelihoods(samples: list[dict[str, Any]]) -> torch.Tensor:
    found = [float(response[0]) for item in samples for response in item["filtered_resps"]]
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def by_hand(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Samples]:
    """Results and items of the harness called directly, with a .yaml file for each task."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    work = tmp_path_factory.mktemp("by-hand")
    stock = Path(lm_eval.__file__).parent / "tasks"
    for name, (file, asked, examples) in BY_HAND.items():
        task, _, subject = name.partition("/")
        test = rows / task / (f"dev/{subject}.jsonl" if subject else "dev.jsonl")
        files = {asked: str(test)}
        if examples != asked:
            files[examples] = str(rows / task / (f"fewshot/{subject}.jsonl" if subject else "fewshot.jsonl"))
        lines = [f"include: {stock / file}", f"task: by_hand_{subject or task}", "dataset_path: json"]
        lines += ["dataset_name: null", "training_split: null", f"num_fewshot: {SHOTS}"]
        # Without one, examples are other items of the set that is asked; named, the item itself could be among them.
        lines += [f"fewshot_split: {examples}"] if asked == "test" else []
        lines += [f"validation_split: {'validation' if asked == 'validation' else 'null'}"]
        lines += [f"test_split: {'test' if asked == 'test' else 'null'}"]
        lines += [f"dataset_kwargs: {json.dumps({'data_files': files, 'cache_dir': str(work / 'cache')})}"]
        if task == "gsm8k":
            lines += ["generation_kwargs: {until: ['Question:', '</s>', '<|im_end|>'], max_gen_toks: 96}"]
        (work / f"{subject or task}.yaml").write_text("\n".join(lines))
    names = [f"by_hand_{name.rpartition('/')[2]}" for name in BY_HAND]
    manager = TaskManager(include_path=str(work), include_defaults=False)
    with harness.quietly():
        directly = HFLM(pretrained=tiny.model(model), tokenizer=load_tokenizer(model), batch_size=3)
        found = lm_eval.simple_evaluate(model=directly, tasks=names, task_manager=manager, bootstrap_iters=1000)
    assert found is not None
    return found, found["samples"]


@pytest.mark.parametrize("task", BY_HAND)
def test_items_are_those_of_the_harness_called_directly(
    task: str, model: Path, rows: Path, by_hand: tuple[dict[str, Any], Samples]
) -> None:
    folder, _, subject = task.partition("/")
    result, samples = measured(in_memory(model), rows, folder)
    direct, items = by_hand
    name = f"by_hand_{subject or folder}"
    own = samples[f"mmlu_{subject}" if subject else task_of(folder)]
    assert len(own) == len(items[name]) == 6 * (2 if task == "gsm8k" else 1)  # of two ways to read an answer
    for one, other in zip(own, items[name], strict=True):
        prompts = [[arguments[0] for arguments in item["arguments"]] for item in (one, other)]
        assert prompts[0] == prompts[1] and one["target"] == other["target"]
        assert [one[metric] for metric in one["metrics"]] == pytest.approx(
            [other[metric] for metric in other["metrics"]], rel=1e-5
        )
        if task == "gsm8k":
            assert one["resps"] == other["resps"]
    if task != "gsm8k":
        torch.testing.assert_close(likelihoods(own), likelihoods(items[name]), atol=1e-4, rtol=0)
    if not subject:
        key = f"{result.metric},{result.filter or 'none'}"
        found = direct["results"][name]
        assert result.value == pytest.approx(found[key]) and result.n == 6 and result.shots == SHOTS
        assert result.stderr == pytest.approx(found[key.replace(",", "_stderr,")])
        assert result.version == str(direct["versions"][name])


def test_mmlu_is_the_mean_over_the_items_of_its_subjects(model: Path, rows: Path) -> None:
    result, samples = measured(in_memory(model), rows, "mmlu")
    right = [item["acc"] for items in samples.values() for item in items]
    assert samples.keys() == {"mmlu_anatomy", "mmlu_marketing"} and result.n == len(right) == 12
    assert result.value == pytest.approx(sum(right) / 12) and result.metric == "acc" and result.stderr is not None


@pytest.mark.parametrize("task", bench.LIKELIHOOD)
def test_streamed_equals_in_memory(task: str, model: Path, rows: Path) -> None:
    result, samples = measured(in_memory(model), rows, task)
    by_layers, items = measured(streamed(model, batch=3), rows, task)
    assert samples.keys() == items.keys()
    for name in samples:
        torch.testing.assert_close(likelihoods(items[name]), likelihoods(samples[name]), atol=1e-4, rtol=0)
        greedy = [[response[1] for response in item["filtered_resps"]] for item in samples[name]]
        assert [[response[1] for response in item["filtered_resps"]] for item in items[name]] == greedy
    assert (by_layers.value, by_layers.stderr) == pytest.approx((result.value, result.stderr), rel=1e-5)


def test_rolling_likelihoods_streamed_are_those_in_memory(model: Path) -> None:
    from lm_eval.api.instance import Instance

    texts = ["the rain in the plain", "a boat", " ".join(small.WORDS.split() * 20)]  # the last is many windows long
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    found = [of.loglikelihood_rolling(asked) for of in (in_memory(model), streamed(model))]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("task", ["gsm8k", "xlsum_english", "mbpp", "humaneval"])
def test_generated_answers_are_measured_in_memory_only(task: str, model: Path, rows: Path) -> None:
    heard = Heard()
    result, samples = measured(in_memory(model, listener=heard), rows, task)
    again, _ = measured(in_memory(model), rows, task)
    assert result == again and result.n == 6 and 0 <= result.value <= 1
    benchmark = SUITE[task]
    assert (result.metric, result.title) == (benchmark.metric, benchmark.title)
    options = samples[task][0]["arguments"][0][1]
    assert {key: options[key] for key in benchmark.generation} == benchmark.generation
    if task in ("gsm8k", "humaneval"):
        assert f"task {task} wants up to" in heard.warnings[0] and "at most 96 are generated" in heard.warnings[0]
    with pytest.raises(TaskError, match=f"task {task} generates text, and a streamed model would be read whole"):
        measured(streamed(model), rows, task)


def test_rouge_is_that_of_the_package(model: Path, rows: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    result, samples = measured(in_memory(model), rows, "xlsum_english")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [(item["doc"]["summary"], item["filtered_resps"][0]) for item in samples["xlsum_english"]]
    expected = [scorer.score(summary, said)["rougeL"].fmeasure for summary, said in pairs]
    assert result.value == pytest.approx(sum(expected) / 6)


@pytest.mark.parametrize(("task", "metric"), [("mbpp", "pass_at_1"), ("humaneval", "pass_at_k")])
def test_programs_run_in_the_sandbox(task: str, metric: str, model: Path, rows: Path) -> None:
    plan = plan_tasks([task], rows, TaskOptions(allow_code=True))
    (member,) = harness.load_task(plan.benchmarks[0], plan.local[task]).members
    function, options = member._metric_fn_list[metric], member._metric_fn_kwargs[metric]
    harm = rows / "harm"
    programs = {"x = 1": 1.0, "x = 2": 0.0, f"x = 1\nopen({str(harm)!r}, 'w')": 0.0, "import os\nos._exit(0)": 0.0}
    for program, value in programs.items():
        found = function(references=["assert x == 1"], predictions=[[program]], **options)
        assert (found["pass@1"] if isinstance(found, dict) else found) == value
    assert not harm.exists()


def test_batches_are_halved_until_they_fit(model: Path, rows: Path) -> None:
    sizes: list[int] = []

    def refuse_more_than_200(module: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        sizes.append(named["input_ids"].numel())
        if sizes[-1] > 200:
            raise torch.OutOfMemoryError

    little = in_memory(model)
    little.model.register_forward_pre_hook(refuse_more_than_200, with_kwargs=True)
    result, samples = measured(little, rows, "piqa")
    expected, items = measured(in_memory(model, batch=1), rows, "piqa")
    assert max(sizes) > 200 and sizes[-1] <= 200
    torch.testing.assert_close(likelihoods(samples["piqa"]), likelihoods(items["piqa"]), atol=1e-4, rtol=0)
    assert result.value == expected.value


def test_teacher_and_student_get_the_same_prompts(model: Path, rows: Path) -> None:
    plan = plan_tasks(["winogrande"], rows, TaskOptions(shots=SHOTS))
    ready = harness.load_task(plan.benchmarks[0], plan.local["winogrande"])
    first, second = (harness.run_task(ready, in_memory(model), samples=True)[1]["winogrande"] for _ in range(2))
    assert [item["arguments"] for item in first] == [item["arguments"] for item in second]


def test_results_are_kept_by_what_they_depend_on(model: Path, rows: Path, tmp_path: Path) -> None:
    cache, work = tmp_path / "cache", tmp_path / "rows"
    bench.write(work, ("piqa", "stories"))
    other = small.teacher(tmp_path / "other", max_position_embeddings=192, num_hidden_layers=2)

    def run(path: Path = model, tasks: tuple[str, ...] = ("piqa", "stories"), **options: Any) -> tuple[Any, int]:
        """The results, and how often something was measured."""
        heard = Heard()
        plan = plan_tasks(tasks, work, TaskOptions(**options))
        return measure_tasks({"model": path}, plan, cache=cache, listener=heard), len(heard.notes)

    first, count = run()
    assert count == 2 and run() == (first, 0)
    assert run(tasks=("stories",)) == ({"model": {"stories": first["model"]["stories"]}}, 0)
    assert [run(limit=3)[1], run(limit=3)[1], run(shots=1)[1], run(other)[1], run(other)[1]] == [2, 0, 2, 2, 0]
    assert run()[0]["model"]["piqa"].n == 6 and run(limit=3)[0]["model"]["piqa"].n == 3
    bench.dump(work / "piqa" / "dev.jsonl", bench.rows("piqa", 5))
    assert run()[1] == 1
    for file in cache.glob("*.json"):
        file.write_text(file.read_text()[:-9])
    assert run()[1] == 2 and run()[1] == 0
    for file in cache.glob("*.json"):
        if file.read_text().endswith("}") and '"value": ' in file.read_text():
            raw = json.loads(file.read_text())
            file.write_text(json.dumps(raw | {"result": raw["result"] | {"value": 0.99}}))
    assert run()[0]["model"]["stories"] == first["model"]["stories"], "a number that was changed is none"


@pytest.mark.parametrize("cache", ["file", "file/deep", "~unknown"])
def test_a_cache_that_cannot_be_written_is_one_warning_and_no_error(
    model: Path, rows: Path, tmp_path: Path, cache: str
) -> None:
    (tmp_path / "file").write_text("mine")
    heard = Heard()
    plan = plan_tasks(["piqa"], rows, TaskOptions(limit=2))
    where = Path(cache) if cache.startswith("~") else tmp_path / cache
    found = measure_tasks({"a": model, "b": model}, plan, cache=where, listener=heard)
    (said,) = heard.warnings
    assert found["a"]["piqa"].n == 2 and said.startswith("results are not kept: ")
    assert "set MINITRON_CACHE to a directory" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_kept_where_nothing_is_wanted(model: Path, rows: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan = plan_tasks(["piqa"], rows)
    assert measure_tasks({"a": model}, plan)["a"] == measure_tasks({"a": model}, plan)["a"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_does_not_fit_is_streamed(model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.evaluation.tasks import measure

    heard = Heard()
    expected = measure_tasks({"m": model}, plan_tasks(["piqa"], rows))
    monkeypatch.setattr(measure, "SHARE_FOR_WEIGHTS", 0.0)
    assert measure_tasks({"m": model}, plan_tasks(["piqa"], rows), listener=heard) == expected
    assert "m: 0.0 GB of weights do not fit into 0.0 GB of free memory; they are streamed" in heard.warnings[0]
    with pytest.raises(TaskError, match="gsm8k: the answer is generated text, which a streamed model cannot give"):
        measure_tasks({"m": model}, plan_tasks(["gsm8k", "piqa"], rows))


def test_what_is_asked_is_checked_before_a_model_is_loaded(rows: Path, tmp_path: Path) -> None:
    def refused(*tasks: str, directory: Path | None = rows, **options: Any) -> str:
        with pytest.raises(TaskError) as error:
            plan_tasks(tasks, directory, TaskOptions(**options))
        return str(error.value)

    unknown = refused("helaswag", directory=None)
    assert unknown.startswith("there is no task 'helaswag' in lm-evaluation-harness 0.")
    assert unknown.endswith("did you mean 'hellaswag'?")
    assert "task 'mbpp' runs Python code that the model writes." in refused("mbpp")
    assert "allow it with --allow-code" in refused("humaneval", directory=None)
    assert "by itself, outside of the sandbox" in refused("cruxeval_input", directory=None, allow_code=True)
    assert refused("piqa", "piqa") == "task 'piqa' is given twice"
    assert refused(directory=None) == "no task is named: give --tasks, --suite or --tasks-dir"
    bench.dump(tmp_path / "piqa" / "dev.jsonl", [{"goal": "x"}])
    assert "line 1: key 'sol1' is missing" in refused("piqa", directory=tmp_path)


def test_of_a_suite_tasks_without_a_folder_are_left_out(rows: Path, tmp_path: Path) -> None:
    heard = Heard()
    bench.write(tmp_path, ("winogrande", "mmlu"))
    plan = plan_tasks(["minitron"], tmp_path, listener=heard)
    assert [one.task for one in plan.benchmarks] == ["winogrande", "mmlu"]
    assert heard.warnings[0].endswith(
        "no folder for them: arc_challenge, gsm8k, hellaswag, humaneval, mbpp, truthfulqa_mc2, xlsum_english"
    )
    whole = plan_tasks([], rows, TaskOptions(allow_code=True))
    assert len(whole.benchmarks) == len(bench.LIKELIHOOD) + len(bench.GENERATED)


def test_what_cannot_be_loaded_says_what_to_do(model: Path, tmp_path: Path) -> None:
    def refused(task: str, directory: Path | None, **options: Any) -> str:
        with pytest.raises(TaskError) as error:
            measure_tasks({"m": model}, plan_tasks([task], directory, TaskOptions(**options)))
        return str(error.value)

    bench.write(tmp_path, ("winogrande", "piqa"), count=3)
    line = refused("winogrande", tmp_path)
    assert line == f"{tmp_path / 'winogrande'}: 5 shots need 6 test rows, and there are 3; use --shots"
    bench.dump(tmp_path / "mmlu" / "dev" / "anatmy.jsonl", bench.rows("mmlu", 6))
    assert "MMLU has no subject 'anatmy'; did you mean 'anatomy'?" in refused("mmlu", tmp_path, shots=0)
    assert "task 'boolq' cannot be loaded" in refused("boolq", None)
    assert refused("boolq", None).endswith("Where the hub is out of reach, give its rows with --tasks-dir")
    assert "m in " in refused("piqa", tmp_path, chat=True)
    assert "has no chat template: its prompts cannot be a chat; leave --chat out" in refused(
        "piqa", tmp_path, chat=True
    )


def test_prompts_go_through_a_chat_template(model: Path, rows: Path, tmp_path: Path) -> None:
    with_chat = small.teacher(tmp_path / "chat", max_position_embeddings=192)
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
    (with_chat / "chat_template.jinja").write_text(template)
    plan = plan_tasks(["arc_easy"], rows, TaskOptions(shots=1, chat=True))
    assert measure_tasks({"m": with_chat}, plan)["m"]["arc_easy"].n == 6
    _, samples = measured(in_memory(with_chat), rows, "arc_easy", chat=True)
    prompt = samples["arc_easy"][0]["arguments"][0][0]
    assert prompt.count("<user>Question: ") == SHOTS + 1 and prompt.endswith("<assistant>")


def test_without_the_harness_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as it is where it cannot be imported
    with pytest.raises(TaskError, match=r"need lm_eval, which is not installed: pip install 'minitron\[eval\]'"):
        plan_tasks(["piqa"])


def test_the_process_is_left_as_it_was(model: Path, rows: Path) -> None:
    import datasets
    import evaluate
    import tqdm

    def state() -> tuple[Any, ...]:
        level, bars = logging.getLogger("lm_eval").level, datasets.are_progress_bars_disabled()
        return (
            evaluate.load,
            tqdm.tqdm,
            level,
            bars,
            torch.get_rng_state().tolist(),
            "lm_eval.tasks.mbpp.utils" in sys.modules,
        )

    before = state()
    measured(in_memory(model), rows, "mbpp")
    assert state() == before


def test_the_suite_is_that_of_the_papers() -> None:
    shots = {one.task: (one.shots, one.metric) for one in chosen(["minitron"])}
    assert shots == {
        "winogrande": (5, "acc"),
        "arc_challenge": (25, "acc_norm"),
        "mmlu": (5, "acc"),
        "hellaswag": (10, "acc_norm"),
        "gsm8k": (5, "exact_match"),
        "truthfulqa_mc2": (0, "acc"),
        "xlsum_english": (3, "rougeL"),
        "mbpp": (0, "pass_at_1"),
        "humaneval": (0, "pass@1"),
    }
    for task in ("mbpp", "humaneval"):
        assert SUITE[task].generation == {"do_sample": True, "temperature": 0.2, "top_p": 0.95}


def test_every_file_of_the_harness_that_is_known_here_is_there() -> None:
    found = definitions._all_files()
    for name, file in definitions.FILES.items():
        assert found[name] == definitions._root() / file


def test_kept_quality_is_the_share_of_the_teachers_value() -> None:
    base: dict[str, Any] = {"title": "t", "metric": "acc", "stderr": None, "n": 1, "shots": 0, "version": "1"}
    base |= {"filter": None, "others": {}}
    one, two, none = (TaskResult(value=value, higher_is_better=True, **base) for value in (0.3, 0.6, 0.0))
    assert kept(one, two) == pytest.approx(0.5) and kept(one, none) is None
    assert kept(one, TaskResult(value=0.6, higher_is_better=False, **base)) is None
    assert TaskResult(**json.loads(json.dumps(one.to_dict()))) == one


def test_names_of_several_tasks_are_known_too() -> None:
    """A tag may be one of a list in the files that have it."""
    assert definitions._all_files().keys() >= {"ai2_arc", "mmlu", "mmlu_stem", "lambada", "truthfulqa_mc1"}


def llama_like(path: Path, **options: Any) -> Path:
    tiny.sentencepiece(path, **options)
    config = {"vocab_size": 102 if options.get("special", True) else 99, "max_position_embeddings": 192}
    tiny.checkpoint("llama", path, **config)
    return path


@pytest.mark.parametrize("kind", [in_memory, streamed])
def test_a_tokenizer_without_special_tokens_is_asked_all_but_what_begins_with_nothing(
    kind: Any, tmp_path: Path, rows: Path
) -> None:
    from lm_eval.api.instance import Instance

    path = llama_like(tmp_path / "model", special=False)
    result, _ = measured(kind(path), rows, "piqa")
    assert result.n == 6
    if kind is in_memory:
        assert measured(kind(path), rows, "gsm8k")[0].n == 6
    asked = Instance("loglikelihood", {}, ("", " the"), 0)
    asked.task_name = "odd"
    with pytest.raises(TaskError, match="task odd scores text that nothing stands before, and the tokenizer has neit"):
        kind(path).loglikelihood([asked])


def test_requests_begin_with_one_start_token_and_special_tokens_in_them_are_text(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    path = llama_like(tmp_path / "model")
    stored = json.loads((path / "tokenizer.json").read_text())
    stored["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    stored["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (path / "tokenizer.json").write_text(json.dumps(stored))
    model = in_memory(path)
    text = Tokenizer.from_file(str(path / "tokenizer.json"))
    text.encode_special_tokens = True

    def bare(of: str) -> list[int]:
        return text.encode(of, add_special_tokens=False).ids

    context, continuation = model._encode_pair("the </s> rain ", "falls")
    assert [*context, *continuation] == [1, *bare("the </s> rain falls")] and continuation == bare("falls")
    tokens, mask = model.tok_batch_encode(["the</s>", "the"], left_truncate_len=5)
    assert tokens[0].tolist() == [1, *bare("the</s>")][-5:]
    assert tokens[1][mask[1] == 1].tolist() == [1, *bare("the")]
    seen: list[Any] = []
    model._loglikelihood_tokens = lambda requests, **_: seen.extend(requests) or [(0.0, True)] * len(requests)
    model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the rain",), 0)])
    assert [(before, after) for _, before, after in seen] == [([1], bare("the rain"))]


def test_a_chats_special_tokens_are_those_of_its_template(tmp_path: Path) -> None:
    model = in_memory(llama_like(tmp_path / "model"))
    model.tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    model.chat = True
    ids = model.tok_encode(model.apply_chat_template([{"role": "user", "content": "say </s> or <s>"}]))
    assert ids[0] == 1 and ids[-1] == 2 and ids.count(1) == ids.count(2) == 1
    model.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(
        TaskError, match=r"the model's chat template fails on a conversation of this task: .*no such role"
    ):
        model.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_token_of_the_template_that_the_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    path = llama_like(tmp_path / "model")
    stored = json.loads((path / "tokenizer.json").read_text())
    stored["added_tokens"].append(tiny.token("<|user|>", 102))
    (path / "tokenizer.json").write_text(json.dumps(stored))
    for model in (in_memory(path), streamed(path)):
        model.chat = True
        assert model.tok_encode("the")[0] == 1
        with pytest.raises(CheckpointError, match=r"the token '<\|user\|>', whose id is 102, but .* has 102 rows"):
            model.tok_encode("<|user|>the")


def test_answers_are_generated_whatever_the_generation_config_says(model: Path, rows: Path, tmp_path: Path) -> None:
    expected, items = measured(in_memory(model), rows, "gsm8k")
    other = shutil.copytree(model, tmp_path / "other")
    settings = {"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | settings))
    result, found = measured(in_memory(other), rows, "gsm8k")
    assert result == expected
    assert [item["resps"] for item in found["gsm8k"]] == [item["resps"] for item in items["gsm8k"]]
