"""A stage runs once, for the inputs it was given, and leaves all of its work or none."""

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.core.errors import CheckpointError, RunError
from minitron.core.machine import EnergyCounter
from minitron.pipeline.directory import RunDirectory
from minitron.recipe import Recipe, build_recipe, load_recipe

RECORD = {
    "stage", "inputs", "config", "result", "started", "seconds", "peak_memory_bytes", "energy_joules", "versions",
    "hardware",
}  # fmt: skip
INPUTS = {"model": "abc", "data": "def"}


class Steps:
    """Hears the stages, and is itself the work of one that writes a file."""

    def __init__(self) -> None:
        self.states: list[str] = []
        self.runs = 0

    def stage(self, name: str, state: str) -> None:
        self.states.append(f"{name} {state}")

    def progress(self, done: int, total: int, note: str = "") -> None:
        raise AssertionError("no stage here reports progress")

    def warn(self, text: str) -> None:
        raise AssertionError(text)

    def __call__(self, out: Path) -> dict[str, Any]:
        self.runs += 1
        (out / "made.txt").write_text(str(self.runs))
        return {"runs": self.runs}


def fail(out: Path) -> dict[str, Any]:
    (out / "half.txt").write_text("half")
    raise ValueError("the work went wrong")


def recipe(**sections: Any) -> Recipe:
    return build_recipe({"model": "m", "prune": {"target": "50%"}, **sections})


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def test_a_stage_runs_once_and_its_record_says_what_went_in(tmp_path: Path) -> None:
    work = Steps()
    config = {"seed": 3, "prune": recipe().prune}
    for _ in range(3):
        with RunDirectory(tmp_path / "run", recipe(), work) as stages:
            path = stages.do("scores", work, inputs=INPUTS, config=config)
    assert work.states == ["scores running", "scores done", "scores unchanged", "scores unchanged"]
    assert work.runs == 1 and files(path) == {"made.txt", "record.json"}
    record = json.loads((path / "record.json").read_text())
    assert set(record) == RECORD
    assert (record["stage"], record["inputs"], record["result"]) == ("scores", INPUTS, {"runs": 1})
    assert record["config"]["seed"] == 3 and record["config"]["prune"]["target"] == "50%"
    assert record["versions"].keys() == {"python", "minitron", "torch", "transformers", "safetensors", "numpy"}
    assert record["hardware"].keys() == {"device", "cores", "threads", "memory_bytes"}
    assert record["peak_memory_bytes"] > 10**7 and record["seconds"] >= 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inputs": {"model": "abc", "data": "new"}}, r"changed: data\."),
        ({"inputs": {"model": "abc", "data": "def", "plan": "p"}}, r"changed: plan\."),
        ({"config": {"seed": 4, "prune": {"target": "50%"}}}, r"changed: seed \(3, now 4\)\."),
        ({"config": {"seed": 3, "prune": {"target": "30%"}}}, r"changed: prune.target \('50%', now '30%'\)\."),
        ({"config": {"seed": 3}}, r"changed: prune.target \('50%', now None\)\."),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_input_is_named(tmp_path: Path, changed: dict[str, Any], message: str, finished: bool) -> None:
    given: dict[str, Any] = {"inputs": INPUTS, "config": {"seed": 3, "prune": {"target": "50%"}}}
    with RunDirectory(tmp_path) as stages:
        state = tmp_path / "state"
        if finished:
            stages.do("scores", Steps(), **given)
        else:
            with pytest.raises(ValueError):
                stages.do("scores", fail, **given, state=state)
        before = files(tmp_path)
        held = "scores" if finished else "state"
        with pytest.raises(RunError, match=f"{held} was made from other inputs; {message}"):
            stages.do("scores", Steps(), **(given | changed), state=state)
        assert files(tmp_path) == before
        assert stages.do("scores", Steps(), **given, state=state) == tmp_path / "scores"


def test_work_that_fails_leaves_nothing_and_the_stages_before_it_stay(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="went wrong"), RunDirectory(out, recipe()) as stages:
        stages.do("data", Steps(), inputs={}, config={})
        stages.do("scores", fail, inputs={}, config={})
    assert files(out) == {".lock", "recipe.yaml", "data", "data/made.txt", "data/record.json"}


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "scores.partial").mkdir()
    (tmp_path / "scores.partial" / "old.txt").write_text("old")
    with RunDirectory(tmp_path) as stages:
        path = stages.do("scores", Steps(), inputs={}, config={})
    assert files(path) == {"made.txt", "record.json"} and not (tmp_path / "scores.partial").exists()


def test_a_damaged_model_removes_the_text_that_was_tokenized_for_it_and_no_work_that_was_done(tmp_path: Path) -> None:
    for stages_done, left in ((["data"], set()), (["data", "pruned"], {"run", "run/data", "run/pruned"})):
        with pytest.raises(CheckpointError), RunDirectory(tmp_path / "run", recipe(), Steps()) as stages:
            for name in stages_done:
                stages.do(name, Steps(), inputs=INPUTS, config={})
            raise CheckpointError("logits are not finite")
        assert {name for name in files(tmp_path) if (tmp_path / name).is_dir()} == left


def test_a_stage_that_was_moved_to_its_final_place_is_done(tmp_path: Path) -> None:
    work, final = Steps(), {"student": tmp_path / "student"}
    for _ in range(2):
        with RunDirectory(tmp_path / "work", None, work, final) as stages:
            made = stages.do("student", work, inputs=INPUTS, config={})
            if made != final["student"]:
                made.rename(final["student"])
    assert made == final["student"] and work.states == ["student running", "student done", "student unchanged"]
    changed = pytest.raises(RunError, match=r"student was made from other inputs; changed: data")
    with changed, RunDirectory(tmp_path / "work", None, work, final) as stages:
        stages.do("student", work, inputs=INPUTS | {"data": "other"}, config={})


def test_a_failure_before_any_stage_is_done_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError), RunDirectory(tmp_path / "fresh", recipe()) as stages:
        stages.do("data", fail, inputs={}, config={})
    assert not any(tmp_path.iterdir())


def test_a_failure_does_not_remove_a_directory_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError), RunDirectory(tmp_path, recipe()) as stages:
        stages.do("data", fail, inputs={}, config={})
    assert "notes.txt" in files(tmp_path)


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, recipe()):
        stored = (tmp_path / "recipe.yaml").read_text()
        with (
            pytest.raises(RunError, match="is in use by another process; wait for it, or choose another --out"),
            RunDirectory(tmp_path, recipe(seed=1)),
        ):
            pass
        assert (tmp_path / "recipe.yaml").read_text() == stored
    with RunDirectory(tmp_path):
        pass  # free again


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="is a file; the output must be a directory"), RunDirectory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_the_stored_recipe_is_the_one_that_every_stage_agreed_to(tmp_path: Path) -> None:
    first, other = recipe(), recipe(seed=1)
    with RunDirectory(tmp_path, first) as stages:
        stages.do("data", Steps(), inputs={}, config={"seed": 0})
    with pytest.raises(RunError, match="seed"), RunDirectory(tmp_path, other) as stages:
        stages.do("data", Steps(), inputs={}, config={"seed": 1})
    assert load_recipe(tmp_path / "recipe.yaml") == first
    with RunDirectory(tmp_path, first) as stages:
        settled = stages.update_recipe(first, {"distill": first.distill.model_copy(update={"tokens": 7})})
    assert load_recipe(tmp_path / "recipe.yaml") == settled


def test_digests_are_of_content_and_survive_the_process(tmp_path: Path) -> None:
    one, two = tmp_path / "a", tmp_path / "b"
    one.write_text("1")
    two.write_text("2")
    with RunDirectory(tmp_path / "run") as stages:
        digest = stages.digest([one, two])
        assert stages.digest([two, one]) == digest
        assert stages.digest([one]) != digest
    with RunDirectory(tmp_path / "run") as stages:
        assert stages.digest([one, two]) == digest
        two.write_text("3")
        assert stages.digest([one, two]) != digest


def test_energy_is_that_of_the_packages_since_the_start_also_when_their_counters_begin_again(tmp_path: Path) -> None:
    counters = {"intel-rapl:0": 900, "intel-rapl:1": 100, "intel-rapl:0:0": 5}  # microjoules; the last is a part
    for name, value in counters.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    counter = EnergyCounter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("200")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("150")
    assert counter.joules() == pytest.approx((300 + 50) / 1e6)
    assert EnergyCounter(tmp_path / "nowhere").joules() is None
