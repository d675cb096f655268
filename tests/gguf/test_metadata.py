"""What a file says of its model besides how to compute it, against the gguf package's own reading of a directory."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
from gguf import GGMLQuantizationType as BlockType
from transformers import GenerationConfig

from minitron.gguf.file import describe_gguf, plain_types, write_gguf
from minitron.gguf.metadata import sampling_of
from minitron.gguf.source import model_directory
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families import FAMILIES

CARD = """---
license: [apache-2.0, mit]
license_name: house-licence
license_link: LICENSE
language: [en, no]
tags: [code, 2024]
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M
datasets:
- HuggingFaceTB/smoltalk
- https://huggingface.co/datasets/of/text
model_creator: Somebody
---
# A model
"""
SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "do_sample": True}
RUNNABLE: dict[str, dict[str, Any]] = {"nemotron": {"head_dim": 4}, "smollm3": {"no_rope_layer_interval": 4}}


def written(path: Path, name: str | None = None) -> dict[str, Any]:
    """The general keys of a directory's file, as the gguf package reads them."""
    model = describe_gguf(open_checkpoint(path), name=name)
    file = path.parent / "written.gguf"
    write_gguf(model, file, plain_types(model, BlockType.F32), keys={})
    return general(file)


def general(file: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(file).fields
    return {key: (field.contents(), field.types) for key, field in fields.items() if key.startswith("general.")}


def of_package(path: Path, total: int) -> dict[str, Any]:
    """The same keys as the package's own heuristics find them in a directory."""
    file = path.parent / "of_package.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("model")
    metadata = gguf.Metadata.load(model_path=path, total_params=total)
    metadata.set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return general(file)


def values(said: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("general."): value for key, (value, _) in said.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_is_that_of_the_weights_as_the_package_writes_it(family: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(tiny.FIRST[family], tmp_path / "SmolLM2-135M-50pct", **RUNNABLE.get(family, {}))
    said = values(written(path))
    total = tiny.model(path).num_parameters()
    assert said["size_label"] == gguf.size_label(total, 0, 0, 0) and said["size_label"].endswith("K")
    assert (said["name"], said["basename"], said["finetune"]) == (path.name, "SmolLM2", "50pct")


# Sizes in names that the package believes of a model of some 20,000 parameters.
@pytest.mark.parametrize(
    "name",
    ["Tiny-20K", "Tiny-20K-Instruct-v1.5", "Tiny-3.1-23K-chat", "Tiny-Nemo-Base-2407", "demo-teacher", "tiny", "a b-7"],
)
def test_names_fall_into_the_parts_that_the_package_sees(name: str, tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path / name)
    total = tiny.model(path).num_parameters()
    ours, theirs = written(path, name), of_package(path, total)
    for said in (ours, theirs):
        for key in ("general.name", "general.size_label"):
            said.pop(key, None)
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "finetune"),
    [
        ("SmolLM2-135M-Instruct-50pct", "Instruct-50pct"),
        ("SmolLM2-8B-Instruct-4.5B", "Instruct"),
        ("SmolLM2-135M", None),
    ],
)
def test_a_students_files_do_not_have_its_teachers_size(name: str, finetune: str | None, tmp_path: Path) -> None:
    said = values(written(tiny.checkpoint("llama-tied", tmp_path / name)))
    assert said.get("finetune") == finetune and said["basename"] == "SmolLM2"
    convention = gguf.naming_convention(None, said["basename"], finetune, None, said["size_label"], "Q4_K_M")
    assert convention == f"SmolLM2-{said['size_label']}{'' if finetune is None else '-' + finetune}-Q4_K_M"


def test_lengths_of_context_and_words_stay_in_the_name(tmp_path: Path) -> None:
    said = values(written(tiny.checkpoint("phi3", tmp_path / "Phi-3-mini-1k-instruct")))
    assert (said["basename"], said["finetune"]) == ("Phi-3", "1k-instruct") and said["size_label"] != "mini"


def test_a_card_and_a_recommended_sampling_are_said_as_the_package_says_them(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path / "Tiny-23K-Instruct")
    quoted = CARD.replace("2024", '"2024"').replace("no]", '"no"]')  # else the package writes no file
    (path / "README.md").write_text(quoted)
    (path / "generation_config.json").write_text(json.dumps(SAMPLING))
    ours, theirs = written(path), of_package(path, tiny.model(path).num_parameters())
    assert ours | {"general.name": theirs["general.name"], "general.size_label": theirs["general.size_label"]} == theirs
    said = values(ours)
    assert (said["license"], said["languages"], said["author"]) == ("apache-2.0,mit", ["en", "no"], "Somebody")
    assert said["tags"] == ["code", "2024", "text-generation"] and said["dataset.count"] == 2
    assert said["base_model.0.repo_url"] == "https://huggingface.co/HuggingFaceTB/SmolLM2-135M"
    assert (said["sampling.top_k"], said["sampling.min_p"]) == (20, 0)
    (path / "README.md").write_text(CARD)
    assert written(path) == ours


def test_licence_origin_and_sampling_of_a_file_are_those_of_a_file_made_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    path = tiny.checkpoint("llama-tied", tmp_path / "model")
    (path / "README.md").write_text(CARD)
    (path / "generation_config.json").write_text(json.dumps(SAMPLING))
    first = written(path)
    directory = model_directory(str(tmp_path / "written.gguf"))
    second = written(directory)
    last = GenerationConfig.from_pretrained(directory)
    last.validate(strict=True)
    assert SAMPLING.items() <= last.to_dict().items()
    travel = ("license", "languages", "tags", "base_model", "sampling")
    assert {key for key in first if key.split(".")[1] in travel} == {
        *(f"general.license{part}" for part in ("", ".name", ".link")),
        *("general.languages", "general.tags", "general.base_model.count"),
        *(f"general.base_model.0.{part}" for part in ("name", "organization", "repo_url")),
        *(f"general.sampling.{part}" for part in ("temp", "top_k", "top_p", "min_p")),
    }
    for key in first:
        if key.split(".")[1] in travel:
            assert second[key] == first[key], key


def test_a_file_without_settings_of_sampling_recommends_none() -> None:
    assert sampling_of({"general.sampling.temp": float("nan"), "general.sampling.top_k": "many"}) == {}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("no front matter", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: 1.0\nversion: [1, 2]\ntags: []\nlanguage: [null, {a: b}]\n---\n", {"license": "1.0"}),
        ("---\nlicense: {a: b}\nbase_model: [{name: x}]\nmodel_name: other\nsize_label: 7B\n---\n", {}),
        ('---\nlicense: "\\ud800"\ndescription: 2024-01-01\n---\n', {"license": "?", "description": "2024-01-01"}),
    ],
)
def test_what_a_card_cannot_say_is_left_out(card: str, expected: dict[str, Any], tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path / "model")
    without = values(written(path))
    (path / "README.md").write_text(card)
    assert values(written(path)) == without | expected
    assert describe_gguf(open_checkpoint(path)).notes == describe_gguf(open_checkpoint(path), card={}).notes


@pytest.mark.parametrize("card", [b"---\nlicense: [\n---\n", b"---\nlicense: \xff\n---\n"])
def test_a_card_that_cannot_be_read_is_said(card: bytes, tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path / "model")
    without = written(path)
    (path / "README.md").write_bytes(card)
    assert written(path) == without
    note = describe_gguf(open_checkpoint(path)).notes[0]
    assert note.startswith(f"the metadata of the model card {path / 'README.md'} cannot be read")


def test_what_is_no_setting_of_sampling_is_left_out(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path / "model")
    without = written(path)
    wrong = {"top_k": 1.5, "temperature": "hot", "top_p": None, "min_p": 1e99, "repetition_penalty": True}
    (path / "generation_config.json").write_text(json.dumps(wrong))
    assert written(path) == without
