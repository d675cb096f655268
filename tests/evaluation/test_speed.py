"""Speed has the structure and signs that people rely on; how fast is the machine's own affair."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch

from minitron import api
from minitron.cli.main import main
from minitron.cli.speed import speed_lines
from minitron.core.errors import MinitronError
from minitron.core.worker import Child, ChildEnded
from minitron.evaluation import engines
from minitron.evaluation.engines import SpeedModel, SpeedOptions, SpeedResult
from minitron.evaluation.layouts import Ratios, Speed
from minitron.evaluation.speed import Load, SpeedRow, Timing, measure_in_turn, transformers_timer
from minitron.gguf.config import QuantizeConfig
from minitron.gguf.llama_cpp import Runtime

LOAD = Load(batch=3, context=9, new_tokens=5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("speed")
    wide = {"intermediate_size": 40_000}  # 61 MB: more than what libraries take when they run for the first time
    small.teacher(path / "teacher", **wide)
    small.teacher(path / "student", num_hidden_layers=1, **wide)
    return path / "teacher", path / "student"


@pytest.fixture(scope="module")
def files(pair: tuple[Path, Path]) -> tuple[Path, Path]:
    config, made = QuantizeConfig(types=["F32"], verify=False), []
    for model in pair:
        out = model.with_name(f"{model.name}-gguf")
        api.quantize(str(model), config, out=out)
        made += out.glob("*.gguf")
    return made[0], made[1]


def greedy(model: Path, load: Load) -> list[list[int]]:
    """transformers' own generation."""
    prompts = torch.tensor([list(prompt) for prompt in load.prompts])
    count = 1 + load.new_tokens
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    made = tiny.model(model).generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    return made[:, load.context :].tolist()


def test_what_is_timed_in_transformers_is_the_greedy_continuation(pair: tuple[Path, Path]) -> None:
    timing = transformers_timer(tiny.model(pair[0]))(LOAD)
    assert timing.made == greedy(pair[0], LOAD)
    assert timing.prefill_seconds > 0 and timing.decode_seconds > 0


def test_what_is_timed_in_llama_cpp_is_what_it_generates_one_sequence_at_a_time(
    pair: tuple[Path, Path], files: tuple[Path, Path]
) -> None:
    with Runtime(files[0], context=64, threads=1) as runtime:
        made = engines._time_llama_cpp(runtime, LOAD).made
        assert (runtime.context_tokens, runtime.sequences) == (14, 3)
        for prompt, row in zip(LOAD.prompts, made, strict=True):
            alone = runtime.generate(list(prompt), 6)
            assert row[: len(alone)] == alone
    assert made == greedy(pair[0], LOAD)


def timed(times: list[tuple[float, float]], memory: int) -> Any:
    left = iter(times)
    return lambda load: Timing(*next(left), made=[], peak_memory_bytes=memory)


def test_rates_are_medians_over_rounds_and_the_ratio_is_of_rounds() -> None:
    # Seconds of reading 100 tokens, and of 10 more. The first round warms up; the last one was disturbed.
    teacher = [(9.0, 9.0), (0.5, 1.0), (1.0, 2.0), (0.25, 0.5), (2.0, -1.0)]
    student = [(9.0, 9.0), (0.25, 1.0), (1.0, 1.0), (0.125, 0.1), (0.5, 0.5)]
    (row,) = measure_in_turn({"teacher": timed(teacher, 7), "student": timed(student, 5)}, [Load(1, 100, 10)], rounds=4)
    assert row.load == Load(1, 100, 10) and row.ratio is not None
    of_teacher, of_student = row.speeds["teacher"], row.speeds["student"]
    assert of_teacher.prefill == 150 and of_teacher.prefill_range == [50, 400]
    assert of_teacher.decode == 10 and of_teacher.decode_range == [5, 20]
    assert (of_teacher.peak_memory_bytes, of_student.peak_memory_bytes) == (7, 5)
    assert row.ratio.prefill == 2 and row.ratio.prefill_range == [1, 4]
    assert row.ratio.decode == 2 and row.ratio.decode_range == [1, 5]
    assert of_student.decode != row.ratio.decode * of_teacher.decode  # not of the medians
    assert [*row.to_dict()] == ["batch", "context", "teacher", "student", "ratio"]


def test_a_model_alone_has_no_ratio_and_a_batch_counts_all_its_tokens() -> None:
    (row,) = measure_in_turn({"model": timed([(1.0, 1.0)] * 2, 0)}, [Load(4, 100, 10)], rounds=1)
    assert row.ratio is None and "ratio" not in row.to_dict()
    assert (row.speeds["model"].prefill, row.speeds["model"].decode) == (400, 40)


def test_every_round_visits_each_model_with_each_load_from_the_smallest_on() -> None:
    seen: list[tuple[str, int]] = []

    def subject(name: str) -> Any:
        return lambda load: seen.append((name, load.batch * load.context)) or Timing(1.0, 1.0, [])

    done: list[tuple[int, int]] = []
    loads = [Load(2, 8, 1), Load(1, 8, 1)]
    measure_in_turn({"a": subject("a"), "b": subject("b")}, loads, rounds=1, progress=lambda *count: done.append(count))
    assert seen == [("a", 8), ("b", 8), ("a", 16), ("b", 16), ("b", 8), ("a", 8), ("b", 16), ("a", 16)]
    assert done == [(number, 8) for number in range(1, 9)]


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
@pytest.mark.slow
def test_teacher_and_student_are_measured_in_processes_of_their_own(
    pair: tuple[Path, Path], files: tuple[Path, Path], engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = files if engine == "llama.cpp" else pair
    grid = ("--batch", "2,1", "--context", "8", "--new-tokens", "4", "--rounds", "2", "--threads", "1")
    assert main(["speed", str(student), "--teacher", str(teacher), *grid, "--json", "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["engine"] == engine and facts["threads"] == 1 and len(facts["load_average"]) == 2
    total = {name: sum(p.numel() for p in tiny.model(path).parameters()) for name, path in zip("ts", pair, strict=True)}
    assert [facts["models"][name]["parameters"] for name in ("teacher", "student")] == [total["t"], total["s"]]
    assert [(row["batch"], row["context"]) for row in facts["rows"]] == [(1, 8), (2, 8)]
    for row in facts["rows"]:
        for name in ("teacher", "student", "ratio"):
            for kind in ("prefill", "decode"):
                low, high = row[name][f"{kind}_range"]
                assert 0 < low <= row[name][kind] <= high
        assert 1 < row["teacher"]["peak_memory_bytes"] / facts["models"]["teacher"]["weight_bytes"] < 2
        assert row["student"]["peak_memory_bytes"] < row["teacher"]["peak_memory_bytes"]
    speeds = [{name: Speed(**row[name]) for name in ("teacher", "student")} for row in facts["rows"]]
    rows = [
        SpeedRow(Load(row["batch"], row["context"], 4), some, Ratios(**row["ratio"]))
        for row, some in zip(facts["rows"], speeds, strict=True)
    ]
    models = {name: SpeedModel(**model) for name, model in facts["models"].items()}
    lines = speed_lines(SpeedResult(**facts | {"models": models, "rows": tuple(rows), "load_average": (0.0, 9.25)}))
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["1", "8", "teacher"],
        ["1", "8", "student"],
        ["1", "8", "ratio"],
    ]
    assert f"{facts['rows'][0]['ratio']['decode']:.2f} (" in lines[3] and "the load average was up to 9.2" in lines[-1]


def test_contexts_are_those_that_fit() -> None:
    assert engines._contexts(None, 4096, 32) == [128, 1024]
    assert engines._contexts(None, 512, 32) == [128]
    assert engines._contexts(None, 64, 32) == [31]
    assert engines._contexts(None, None, 32) == [128, 1024]
    with pytest.raises(MinitronError, match=r"--context 60: with the 5 tokens that follow .* at most 59"):
        engines._contexts([8, 60], 64, 4)
    with pytest.raises(MinitronError, match="--new-tokens 64 is too many for a context of 64 tokens"):
        engines._contexts(None, 64, 64)


def test_a_model_of_another_kind_than_the_engine_is_refused_with_the_way_out(
    pair: tuple[Path, Path], files: tuple[Path, Path]
) -> None:
    with pytest.raises(MinitronError, match="is a GGUF file, which transformers does not run here"):
        engines.measure_speed(str(files[0]), options=SpeedOptions(engine="transformers"))
    with pytest.raises(
        MinitronError, match=r"llama.cpp runs GGUF files, and .*`minitron quantize .* --out gguf` makes"
    ):
        engines.measure_speed(str(files[0]), str(pair[0]))
    with pytest.raises(MinitronError, match="--dtype bfloat16: the types in a GGUF file are its own"):
        engines.measure_speed(str(files[0]), options=SpeedOptions(dtype="bfloat16"))
    with pytest.raises(MinitronError, match=r"nowhere.gguf does not exist"):
        engines.measure_speed("nowhere.gguf", None)


@pytest.mark.skipif(engines.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_named_with_the_command(pair: tuple[Path, Path]) -> None:
    with pytest.raises(MinitronError, match="vLLM is not installed here; `pip install vllm`"):
        engines.measure_speed(str(pair[0]), options=SpeedOptions(engine="vllm"))


def test_a_process_that_ends_is_told_apart_from_an_answer() -> None:
    with Child() as child:
        assert child.call(math.sqrt, 4.0) == 2.0
        with pytest.raises(ChildEnded):
            child.call(os._exit, 1)
        with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
            child.call(math.sqrt, -1.0)
