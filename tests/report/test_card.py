import re
from pathlib import Path

import example_run
import pytest
import tiny
import yaml
from gguf import GGMLQuantizationType
from huggingface_hub import ModelCard, constants

from minitron.gguf.file import describe_gguf, plain_types, write_gguf
from minitron.model.checkpoint import open_checkpoint
from minitron.report.card import write_card
from minitron.report.records import read_run, result_table
from minitron.report.tables import result_cells


def card_of(run: Path) -> ModelCard:
    return ModelCard.load(write_card(read_run(run)))


def test_metadata_round_trips_and_has_the_measured_values(tmp_path: Path) -> None:
    card = card_of(example_run.write(tmp_path / "run"))
    assert card.data.base_model == "acme/parent-3M"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"minitron", "pruning", "distillation"} <= set(card.data.tags)
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    loss, bits, kl, agreement = example_run.QUALITY["student"]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values.pop("perplexity") == pytest.approx(44.83, abs=0.01)
    assert values == {"lm_loss": loss, "bits_per_byte": bits, "kl_to_teacher": kl, "top1_agreement": agreement}


def test_card_embeds_the_exact_recipe_but_no_local_directories(tmp_path: Path) -> None:
    text = card_of(example_run.write(tmp_path / "run")).text
    match = re.search(r"^(`{3,})yaml\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    recipe = example_run.recipe("acme/parent-3M")
    recipe["data"] = recipe["data"] | {"source": Path(recipe["data"]["source"]).name}
    assert match and yaml.safe_load(match[2]) == recipe


def test_card_has_the_result_table(tmp_path: Path) -> None:
    run = example_run.write(tmp_path / "run")
    text = card_of(run).text
    for row in result_table(read_run(run)):
        assert f"| {' | '.join([row['model'], *result_cells(row)])} |" in text


def test_a_local_teacher_is_named_but_is_no_base_model(tmp_path: Path) -> None:
    card = card_of(example_run.write(tmp_path / "run", teacher="/models/parent-3M"))
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()
    assert "A smaller `parent-3M`" in card.text


def test_licence_is_the_parents_where_its_card_states_one(tmp_path: Path) -> None:
    teacher = tmp_path / "parent"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: house-licence\n---\n# Parent\n")
    card = card_of(example_run.write(tmp_path / "run", teacher=str(teacher)))
    assert (card.data.license, card.data.license_name) == ("other", "house-licence")
    assert "house-licence" in card.text


def test_licence_of_a_gguf_file_is_the_one_that_it_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    parent, file = tiny.checkpoint("llama-tied", tmp_path / "parent"), tmp_path / "parent.gguf"
    (parent / "README.md").write_text("---\nlicense: gemma\n---\n")
    model = describe_gguf(open_checkpoint(parent))
    write_gguf(model, file, plain_types(model, GGMLQuantizationType.F32), keys={})
    run = example_run.write(tmp_path / "run", teacher=str(file))
    assert card_of(run).data.license == "gemma"
    file.unlink()
    assert "license" not in card_of(run).data.to_dict()


def test_the_chain_of_licences_goes_back_to_the_parents_parent(tmp_path: Path) -> None:
    teacher = tmp_path / "parent"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: llama3.1\nbase_model: [acme/first, acme/second]\n---\n")
    run = example_run.write(tmp_path / "run", teacher=str(teacher))
    for name in ("LICENSE", "NOTICE", "USE_POLICY.md"):
        (run / "student" / name).write_text("terms")
    card = card_of(run)
    assert card.data.license == "llama3.1" and card.data.base_model is None
    assert "names `acme/first`, `acme/second` as its base" in card.text
    assert "The parent's terms are in `LICENSE`, `NOTICE`, `USE_POLICY.md`." in card.text


def test_the_licence_of_a_downloaded_parent_is_that_of_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--acme--parent-3M" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    refs = tmp_path / "models--acme--parent-3M" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert card_of(example_run.write(tmp_path / "run")).data.license == "mit"


@pytest.mark.parametrize("readme", [None, "# No metadata", "---\n: [broken\n---\n", "---\n- a list\n---\n"])
def test_licence_is_left_out_where_it_is_not_known(tmp_path: Path, readme: str | None) -> None:
    teacher = tmp_path / "parent"
    teacher.mkdir()
    if readme is not None:
        (teacher / "README.md").write_text(readme)
    card = card_of(example_run.write(tmp_path / "run", teacher=str(teacher)))
    assert card.data.license is None
    assert "the parent's applies" in card.text


def test_card_says_by_what_the_units_were_chosen_and_what_repaired_the_cut(tmp_path: Path) -> None:
    text = card_of(example_run.write(tmp_path / "run")).text
    assert "by the criterion `activation`, layers by `block_influence`" in text
    assert "Repaired at the cut by `basis`, `ffn_obs`, `heads_obs`." in text
    assert "Repaired" not in card_of(example_run.write(tmp_path / "older", repaired=False)).text


def test_card_says_which_layers_were_given_by_number(tmp_path: Path) -> None:
    run = example_run.write(tmp_path / "run")
    recipe = example_run.recipe("acme/parent-3M")
    recipe["prune"] |= {"drop_layers": "2"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "The layers were given by number: 0, 1, 3 stay." in card_of(run).text


def test_card_works_without_scratch_and_without_speed(tmp_path: Path) -> None:
    assert "| scratch |" not in card_of(example_run.write(tmp_path / "run", scratch=False, speed=False)).text


def test_benchmarks_are_in_the_card_and_its_model_index(tmp_path: Path) -> None:
    run = example_run.write(tmp_path / "run", tasks=("winogrande", "mmlu", "stories"), chosen_by=("mmlu",))
    card = card_of(run)
    assert "| Winogrande | acc | 5 | 1,234 | 80.0 ± 1.2 | 60.0 ± 1.2 |" in card.text
    found = {result.dataset_name: result for result in card.data.eval_results if result.metric_type == "acc"}
    assert found.keys() == {"Winogrande", "stories"} and "| MMLU |" not in card.text  # which chose the layers
    one = found["Winogrande"]
    assert (one.dataset_type, one.metric_value, one.metric_name) == ("allenai/winogrande", 0.6, "acc (5-shot)")
    assert one.metric_args == {"shots": 5, "items": 1234, "stderr": 0.0123}
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
