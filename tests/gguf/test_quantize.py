"""Quantized files: ggml's blocks, llama.cpp's mixtures, importance matrices, mixtures of our own, and the proof."""

import json
import os
import platform
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import golden_models
import numpy as np
import pytest
import small
import tiny
import torch
from gguf import GGMLQuantizationType as BlockType

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.core.errors import GgufError, RunError
from minitron.core.progress import SILENT, Listener
from minitron.gguf.config import GGUF_TYPES, QuantizeConfig, require_file_type
from minitron.gguf.file import GgufModel, describe_gguf, weights_bytes, write_gguf
from minitron.gguf.imatrix import ImportanceMatrix, importance_of, read_importance, write_importance
from minitron.gguf.layouts import Measured
from minitron.gguf.llama_cpp import Runtime, llama_cpp
from minitron.gguf.mixtures import Damage, best_mixture, measure_damage, smallest_mixture
from minitron.gguf.quantize import IMPORTANCE, TABLE, QuantizeText, _Work, require_possible, write_ladder
from minitron.gguf.types import (
    FALLBACK,
    Mixture,
    fixed_types,
    mixture,
    quantized_bytes,
    require_importance,
    write_quantized,
)
from minitron.model.checkpoint import open_checkpoint
from minitron.model.describe import sizes_beyond_blocks
from minitron.model.samples import Samples
from minitron.model.stream import Pass

TEXT = tiny.tokens(2, 24, seed=1)
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> GgufModel:
    """A model whose rows make whole blocks of 256."""
    path = tmp_path_factory.mktemp("wide")
    tiny.checkpoint("llama", path, **WIDE)
    tiny.tokenizer(path)
    return describe_gguf(open_checkpoint(path))


@pytest.fixture(scope="module")
def statistics(wide: GgufModel) -> Statistics:
    return measure_statistics(wide.checkpoint, Samples(tiny.tokens(6, 24)), Pass(torch.float32))


@pytest.fixture(scope="module")
def importance(wide: GgufModel, statistics: Statistics) -> ImportanceMatrix:
    return importance_of(wide.checkpoint, statistics.column_squares(), samples=6, tokens=144, source="random tokens")


@pytest.mark.parametrize("cut", [{"intermediate_size": 128}, {"hidden_size": 128}, {"num_attention_heads": 4}, {}])
def test_a_cut_is_said_to_break_blocks_where_k_types_fall_back(cut: dict[str, int], tmp_path: Path) -> None:
    tiny.checkpoint("llama", tmp_path, **{**WIDE, "num_attention_heads": 8, "num_key_value_heads": 4, **cut})
    student = describe_gguf(open_checkpoint(tmp_path))
    teacher = replace(student.checkpoint.shape, hidden=256, ffn=256, heads=8)
    readers = {"hidden": ("attn_q", "ffn_gate", "token_embd"), "ffn": ("ffn_down",), "heads": ("attn_output",)}
    fallen = " ".join(mixture(student, "Q4_K_M", informed=False).fallbacks)
    wanted = {dim for dim, names in readers.items() if any(name in fallen for name in names)}
    assert sizes_beyond_blocks(teacher, student.checkpoint.shape).keys() == wanted
    assert bool(wanted) == bool(cut)


def test_the_importance_matrix_is_the_sum_of_the_squares_of_each_matrixs_inputs(
    wide: GgufModel, importance: ImportanceMatrix
) -> None:
    """Against hooks on every matrix of transformers' own model."""
    model, wanted = tiny.model(wide.checkpoint.path), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: wanted.__setitem__(name, args[0].double().square().sum((0, 1)))
            )
    tiny.logits(model, tiny.tokens(6, 24))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert importance.sums.keys() == {names.get_name(f"{name}.weight", (".weight",)) for name in wanted}
    for name, sums in wanted.items():
        found = importance.sums[names.get_name(f"{name}.weight", (".weight",))]
        torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=0)
    assert set(importance.counts.values()) == {144}


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_an_importance_matrix_is_read_as_it_was_written(
    suffix: str, importance: ImportanceMatrix, tmp_path: Path
) -> None:
    file = tmp_path / f"imatrix.{suffix}"
    write_importance(importance, file)
    found = read_importance(file)
    assert found.sums.keys() == importance.sums.keys() and (found.chunks, found.datasets) == (6, ("random tokens",))
    for name in importance.sums:
        torch.testing.assert_close(found.of(name), importance.of(name), rtol=1e-6, atol=0)
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03", "is no importance matrix"),
        (struct.pack("<ii", 1, 10**9), "it ends too early"),
        (struct.pack("<i", 0), "it has no entries"),
        (b"text", "it ends too early"),
    ],
)
def test_what_is_no_importance_matrix_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "imatrix").write_bytes(content)
    with pytest.raises(GgufError, match=words):
        read_importance(tmp_path / "imatrix")


def test_an_importance_matrix_of_another_model_is_refused(wide: GgufModel, tmp_path: Path) -> None:
    other = ImportanceMatrix({"blk.0.ffn_down.weight": torch.ones(7)}, {"blk.0.ffn_down.weight": 1}, 1, 1, ())
    with pytest.raises(GgufError, match=r"has 7 columns for blk.0.ffn_down.weight, which has 256: it is of another"):
        write_quantized(wide, mixture(wide, "Q4_0", informed=True), tmp_path / "x.gguf", importance=other)
    strange = ImportanceMatrix({"blk.9.x": torch.ones(7)}, {"blk.9.x": 1}, 1, 1, ())
    with pytest.raises(GgufError, match="has none of this model's matrices"):
        write_quantized(wide, mixture(wide, "Q4_0", informed=True), tmp_path / "x.gguf", importance=strange)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, dict[str, str]]]:
    """Model -> file type -> what llama.cpp's own tool made of it; see benchmarks/gguf_oracle.py."""
    return json.loads((Path(__file__).parents[1] / "golden" / "quantized.json").read_text())


@pytest.mark.parametrize("name", golden_models.MODELS)
def test_mixtures_are_those_of_llama_cpps_own_tool(name: str, golden: dict[str, Any], tmp_path: Path) -> None:
    model = golden_models.model(name, tmp_path)
    assert len(golden[name]) >= 40
    for label, theirs in golden[name].items():
        file_type, _, informed = label.partition(" ")
        mixed = mixture(model, file_type, informed=bool(informed))
        assert " ".join(mixed.types[tensor.name].name for tensor in model.tensors) == theirs["types"], label
        if not informed:
            require_importance(model, mixed)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines may round otherwise")
def test_tensors_are_those_of_llama_cpps_own_tool_byte_for_byte(golden: dict[str, Any], tmp_path: Path) -> None:
    model, file = golden_models.model("small", tmp_path), tmp_path / "x.gguf"
    importance = golden_models.importance(model)
    assert len({label.partition(" ")[0] for label in golden["small"]}) == len(GGUF_TYPES) - 1
    # Without importance only where blocks are made otherwise: the others have the same code with weights of one.
    plain = {"Q4_0", "Q2_K", "IQ3_S"}
    for label, theirs in golden["small"].items():
        file_type, _, informed = label.partition(" ")
        if not informed and file_type not in plain:
            continue
        mixed, used = mixture(model, file_type, informed=bool(informed)), importance if informed else None
        write_quantized(model, mixed, file, importance=used, importance_file="imatrix.gguf", threads=2)
        assert file.stat().st_size == quantized_bytes(model, mixed, used, "imatrix.gguf"), label
        assert golden_models.digest(file) == theirs["sha256"], label


@pytest.mark.parametrize(
    ("file_type", "error"), [("Q8_0", 0.01), ("Q6_K", 0.03), ("Q4_K_M", 0.12), ("IQ4_XS", 0.12), ("Q2_K", 0.4)]
)
def test_weights_read_back_are_near(
    file_type: str, error: float, wide: GgufModel, importance: ImportanceMatrix, tmp_path: Path
) -> None:
    mixed, file = mixture(wide, file_type, informed=True), tmp_path / "x.gguf"
    write_quantized(wide, mixed, file, importance=importance, threads=1)
    assert not mixed.fallbacks
    for stored, tensor in zip(gguf.GGUFReader(file).tensors, wide.tensors, strict=True):
        found = torch.from_numpy(gguf.quants.dequantize(stored.data.copy(), stored.tensor_type))
        wanted = torch.cat(list(wide.runs(tensor)))
        assert ((found.view_as(wanted) - wanted).square().mean() / wanted.square().mean()).sqrt() < error


def test_threads_and_runs_of_rows_do_not_change_a_byte(
    wide: GgufModel, importance: ImportanceMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = mixture(wide, "IQ3_M", informed=True)
    digests = {write_quantized(wide, mixed, tmp_path / "1", importance=importance, threads=1)}
    monkeypatch.setattr("minitron.gguf.file.CHUNK_BYTES", 100_000)
    digests |= {write_quantized(wide, mixed, tmp_path / "3", importance=importance, threads=3)}
    assert len(digests) == 1


def test_columns_that_make_no_whole_blocks_fall_back(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 100, "head_dim": 12}
    model = describe_gguf(open_checkpoint(tiny.checkpoint("llama", tmp_path, **sizes)))
    for file_type, base in GGUF_TYPES.items():
        mixed = mixture(model, file_type, informed=True)
        kind = BlockType[base]
        gate, down = mixed.types["blk.2.ffn_gate.weight"], mixed.types["blk.2.ffn_down.weight"]
        if gguf.GGML_QUANT_SIZES[kind][0] == 256:
            assert gate in {FALLBACK[kind], *FALLBACK.values()} and "blk.2.ffn_gate.weight" in mixed.fallbacks
        if gguf.GGML_QUANT_SIZES[kind][0] > 1:
            assert down == BlockType.F16  # 100 columns


@pytest.mark.parametrize("file_type", ["IQ1_S", "IQ2_M", "IQ3_XS", "IQ3_XXS", "Q2_K_S"])
def test_the_smallest_types_need_an_importance_matrix(file_type: str, wide: GgufModel, tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=rf"{file_type} needs an importance matrix"):
        write_quantized(wide, mixture(wide, file_type, informed=False), tmp_path / "x.gguf")
    require_importance(wide, mixture(wide, "Q2_K", informed=False))
    assert not [*tmp_path.iterdir()]


def test_types_of_single_tensors_win_over_the_rules(wide: GgufModel) -> None:
    mixed = mixture(
        wide, "Q4_K_M", informed=True, overrides={"output": BlockType.Q8_0, r"blk\.1\..*down": BlockType.F16}
    )
    assert mixed.types["output.weight"] == mixed.types["blk.0.attn_output.weight"] == BlockType.Q8_0
    assert mixed.types["blk.1.ffn_down.weight"] == BlockType.F16 != mixed.types["blk.0.ffn_down.weight"]


def test_names_of_types_are_the_ladders() -> None:
    assert require_file_type("q4_k_m") == "Q4_K_M"
    with pytest.raises(GgufError, match=r"unknown GGUF type 'Q4_KM'; did you mean 'Q4_K_M'\?"):
        QuantizeConfig(types=["Q4_KM"])
    with pytest.raises(GgufError, match=r"unknown tensor type 'Q4_K_M'; did you mean 'Q4_K'\?"):
        QuantizeConfig(tensor_types={"output": "Q4_K_M"})
    with pytest.raises(GgufError, match=r"tensor pattern '\(' is no regular expression: missing \)"):
        QuantizeConfig(tensor_types={"(": "Q4_K"})


def test_a_full_disk_leaves_nothing(wide: GgufModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minitron.core.direct_io.os.write", full)
    with pytest.raises(RunError, match=r"cannot write .*x.gguf: No space left on device"):
        write_gguf(wide, tmp_path / "x.gguf", mixture(wide, "F32", informed=False).types, keys={})
    assert not [*tmp_path.iterdir()]


def test_another_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINITRON_LLAMA_CPP", str(tmp_path / "no.so"))
    with pytest.raises(GgufError, match=r"no.so is no llama.cpp library"):
        llama_cpp.__wrapped__()


@pytest.fixture(scope="module")
def damage(wide: GgufModel, importance: ImportanceMatrix) -> Damage:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitron.gguf.mixtures.ERROR_ROWS", 32)
        return measure_damage(wide, importance, TEXT, near=BlockType.Q4_0, threads=2)


def test_our_own_mixture_loses_less_than_any_of_one_type_and_keeps_within_the_size(
    wide: GgufModel, damage: Damage
) -> None:
    """Held against every file of one type for all matrices, by the damage that was measured."""
    for kind in (BlockType.Q3_K, BlockType.IQ4_XS, BlockType.Q4_K, BlockType.Q5_K):
        same = {tensor.name: kind if tensor.is_matrix else BlockType.F32 for tensor in wide.tensors}
        own = best_mixture(wide, damage, weights_bytes(wide, same), {})
        assert weights_bytes(wide, own.types) <= weights_bytes(wide, same)
        lost = [sum(damage.of(name, types[name]) for name in damage.errors) for types in (own.types, same)]
        assert lost[0] < lost[1]
    least = weights_bytes(wide, smallest_mixture(wide, {}).types)
    assert weights_bytes(wide, best_mixture(wide, damage, least + 10_000, {}).types) <= least + 10_000
    with pytest.raises(GgufError, match="no types make tensors of"):
        best_mixture(wide, damage, least // 2, {})


def test_types_of_single_tensors_hold_in_our_own_mixtures_too(wide: GgufModel, damage: Damage) -> None:
    fixed = fixed_types(wide, {"ffn_up": BlockType.F32, "blk.0": BlockType.Q8_0})
    assert fixed["blk.0.ffn_up.weight"] == BlockType.F32 and fixed["blk.0.attn_q.weight"] == BlockType.Q8_0
    least = weights_bytes(wide, smallest_mixture(wide, fixed).types)
    own = best_mixture(wide, damage, least + 10_000, fixed).types
    ruled = mixture(wide, "Q4_K_M", informed=True, overrides={"ffn_up": BlockType.F32}).types
    assert all(own[name] == kind for name, kind in fixed.items()) and weights_bytes(wide, own) <= least + 10_000
    assert ruled["blk.1.ffn_up.weight"] == BlockType.F32 and ruled["blk.1.attn_q.weight"] == BlockType.Q4_K
    with pytest.raises(GgufError, match=r"no matrix's name has the pattern 'experts'; there are .*attn_k.weight"):
        fixed_types(wide, {"experts": BlockType.Q8_0})


@pytest.mark.parametrize("kind", [BlockType.Q4_0, BlockType.Q4_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "blk.0.ffn_down.weight"])
def test_the_effect_of_a_type_is_the_kl_of_a_file_with_that_one_matrix_quantized(
    name: str, kind: BlockType, wide: GgufModel, importance: ImportanceMatrix, damage: Damage, tmp_path: Path
) -> None:
    """As llama.cpp runs it, which rounds activations too."""
    assert damage.of(name, kind) == pytest.approx(kl_of_one(wide, name, kind, importance, tmp_path), rel=0.3)


def kl_of_one(model: GgufModel, name: str, kind: BlockType, importance: ImportanceMatrix, path: Path) -> float:
    """The KL that a file has in llama.cpp with one matrix quantized."""
    types = {tensor.name: BlockType.F32 for tensor in model.tensors} | {name: kind}
    write_quantized(model, Mixture("F32", types, {}), path / "one.gguf", importance=importance)
    exact, kl = tiny.model(model.checkpoint.path), 0.0
    with Runtime(path / "one.gguf", context=64, threads=1) as runtime:
        for block in TEXT:
            wanted = tiny.logits(exact, block[None])[0].log_softmax(-1)
            kl += (wanted.exp() * (wanted - runtime.logits(block).log_softmax(-1))).sum(-1).mean().item() / len(TEXT)
    return kl


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, wide: GgufModel) -> Path:
    """A directory that `quantize` filled, to read only."""
    out = tmp_path_factory.mktemp("shipped")
    text = QuantizeText(tiny.tokens(8, 32), tiny.tokens(3, 32, seed=2), "random tokens")
    config = QuantizeConfig(types=["F32", "Q4_K_M", "IQ2_XS"], bits_per_weight=[5.0], blocks=2, threads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitron.gguf.mixtures.ERROR_ROWS", 8)
        write_ladder(wide.checkpoint, config, out, text=text, name="tiny")
    return out


def test_the_ladder_is_written_run_and_tabled(shipped: Path) -> None:
    table = json.loads((shipped / TABLE).read_text())
    rows = {row["name"]: row for row in table["files"]}
    assert [*rows] == ["F32", "Q4_K_M", "IQ2_XS", "5bpw"] and table["model"] == "tiny"
    assert {file.name for file in shipped.iterdir()} == {row["file"] for row in rows.values()} | {IMPORTANCE, TABLE}
    exact = rows["F32"]["measured"]
    assert exact["kl"] < 1e-5 and exact["error"] == 0 and exact["tokenizes_alike"] and exact["tokens"] == 62
    assert exact["perplexity"] == pytest.approx(exact["reference_perplexity"], rel=1e-3)
    for name, row in rows.items():
        assert row["bytes"] == (shipped / row["file"]).stat().st_size
        assert (row["kl_of_other"] is None) == (name != "Q4_K_M") and row["informed"] in (
            True,
            name == "Q4_K_M",
            name != "F32",
        )
    kept = rows["Q4_K_M"]
    assert kept["measured"]["kl"] <= kept["kl_of_other"] and exact["kl"] < rows["5bpw"]["measured"]["kl"]
    assert rows["5bpw"]["bits_per_weight"] <= 5.0 and rows["IQ2_XS"]["measured"]["kl"] > kept["measured"]["kl"]


def test_the_proof_is_what_transformers_computes_of_the_weights_read_back(shipped: Path, wide: GgufModel) -> None:
    """llama.cpp rounds activations too, so the divergences agree but for that."""
    row = next(row for row in json.loads((shipped / TABLE).read_text())["files"] if row["name"] == "IQ2_XS")
    model, changed = tiny.model(wide.checkpoint.path), tiny.model(wide.checkpoint.path)
    for stored, tensor in zip(gguf.GGUFReader(shipped / row["file"]).tensors, wide.tensors, strict=True):
        values = torch.from_numpy(gguf.quants.dequantize(np.array(stored.data), stored.tensor_type))
        if wide.in_heads(tensor):
            values = values.unflatten(0, (-1, 16, 2)).transpose(1, 2).flatten(0, 2)
        changed.get_parameter(tensor.source.name).data.copy_(values.view(tensor.shape))
    wanted, found = (
        tiny.logits(one, tiny.tokens(3, 32, seed=2)[:2])[:, :-1].log_softmax(-1) for one in (model, changed)
    )
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    assert row["measured"]["kl"] == pytest.approx(kl, rel=0.05)


def test_what_cannot_be_made_is_said_before_anything_is_written(wide: GgufModel, tmp_path: Path) -> None:
    def attempt(**config: object) -> None:
        text = QuantizeText(tiny.tokens(2, 8), tiny.tokens(1, 8), "random tokens")
        write_ladder(wide.checkpoint, QuantizeConfig(**config), tmp_path, text=text)

    with pytest.raises(GgufError, match=r"1 bits per weight are too few: this model's smallest types have 2\.\d\d"):
        attempt(bits_per_weight=[1.0])
    with pytest.raises(GgufError, match=r"a file of 1.00 kB is too small: the smallest has"):
        attempt(sizes=[1000.0])
    with pytest.raises(GgufError, match="verifying needs text: give --calibration TEXT, or --no-verify"):
        write_ladder(wide.checkpoint, QuantizeConfig(types=["F16"]), tmp_path, text=None)
    assert not [*tmp_path.iterdir()]


def measured(kl: float) -> Measured:
    return Measured(perplexity=1.0, kl=kl, top1=1.0, reference_perplexity=1.0, tokens=1)


@pytest.mark.parametrize(
    ("types", "kls", "words"),
    [
        (
            ["F16"],
            {"F16": 0.5},
            r"plain F16 file of .* are 0.5 nats a token \(KL\) from the model's, where at most 0.01",
        ),
        (["F32"], {"F32": 0.005}, "plain F32 file .* where at most 0.001 is rounding"),
        (["Q4_0", "F16"], {"F16": 0.5}, "plain F16 file"),
        (["Q8_0"], {"Q8_0": 0.5, "BF16": 0.5}, "plain BF16 file"),
        (["Q4_0"], {"Q8_0": 0.5, "BF16": 0.5}, "plain BF16 file"),
        (["Q4_0"], {"Q8_0": 0.005, "Q4_0": 3.0}, None),
        (["Q4_0"], {"Q8_0": 0.5, "BF16": 0.005, "Q4_0": 3.0}, None),
        (["Q8_0"], {"Q8_0": 0.5, "BF16": 0.005}, None),
        (["Q4_0", "F16"], {"F16": 0.005, "Q4_0": 3.0}, None),
    ],
)
def test_what_a_file_loses_is_believed_only_of_a_conversion_that_a_plain_file_proves(
    types: list[str], kls: dict[str, float], words: str | None, wide: GgufModel, tmp_path: Path
) -> None:
    """A proof that finds what the table says; files of types that were not asked for are gone."""
    proven: list[str] = []

    def prove(file: Path) -> Measured:
        proven.append(file.stem.rpartition("-")[2])
        return measured(kls[proven[-1]])

    work = _Work(wide, {}, QuantizeConfig(types=types, threads=1), tmp_path, None, None, SILENT)
    work.prove = prove
    if words is None:
        assert [work.llama_type(kind).measured.kl for kind in sorted(types, key=["F16", "Q8_0", "Q4_0"].index)]
        assert {file.stem.rpartition("-")[2] for file in tmp_path.iterdir()} == set(types)
    else:
        with pytest.raises(GgufError, match=words):
            for kind in sorted(types, key=["F32", "F16", "Q8_0", "Q4_0"].index):
                work.llama_type(kind)
        assert not [*tmp_path.iterdir()]
    assert set(proven) == kls.keys()


def test_an_option_that_would_change_nothing_is_refused(wide: GgufModel, tmp_path: Path) -> None:
    def attempt(words: str, importance: Path | None = None, **config: object) -> None:
        with pytest.raises(GgufError, match=words):
            require_possible(
                wide.checkpoint,
                QuantizeConfig(**config),
                informed=True,
                importance_file=importance,  # type: ignore[arg-type]
            )

    attempt(r"llama.cpp has no splitting rule of that name; .*gpt-2", types=["F16"], pre="my-own")
    assert require_possible(wide.checkpoint, QuantizeConfig(pre="llama-bpe"), informed=False)
    attempt(
        "every matrix with the pattern 'ffn_up' has a type by an earlier", tensor_types={"ffn": "F16", "ffn_up": "Q8_0"}
    )
    attempt("4.5bpw is asked for twice", bits_per_weight=[4.5, 4.5])
    for bad in ([0.0], [float("inf")], [float("nan")], [-1.0]):
        with pytest.raises(GgufError, match="give a number above 0"):
            QuantizeConfig(bits_per_weight=bad)
    with pytest.raises(GgufError, match="GGUF type Q8_0 is named twice"):
        QuantizeConfig(types=["Q8_0", "q8_0"])
    columns = {tensor.name: tensor.shape[1] for tensor in wide.tensors if tensor.is_matrix and tensor.layer == 0}
    whole = {name: torch.ones(count) for name, count in columns.items()}
    file = tmp_path / "imatrix.gguf"

    def write(sums: dict[str, torch.Tensor]) -> None:
        write_importance(ImportanceMatrix(sums, dict.fromkeys(sums, 1), 1, 1, ("text",)), file)

    write(whole)
    attempt(r"--imatrix .*imatrix.gguf changes nothing of F16, Q8_0", file, types=["F16", "Q8_0"])
    attempt(r"IQ2_XS needs .*blk.1.attn_k.weight .* the one given has nothing of it", file, types=["IQ2_XS"])
    for wrong in (float("nan"), -1.0, float("inf"), 0.0):
        write(whole | {"blk.0.ffn_up.weight": torch.full((256,), wrong)})
        attempt("what it has of blk.0.ffn_up.weight is no sum of squares", file, types=["Q4_0"])


def test_more_threads_than_cores_are_not_taken(wide: GgufModel, tmp_path: Path) -> None:
    said: list[str] = []

    class Hears(Listener):
        def warn(self, text: str) -> None:
            said.append(text)

    work = _Work(wide, {}, QuantizeConfig(types=["F16"], threads=10**9), tmp_path, None, None, Hears())
    assert work.threads == os.cpu_count() and "1,000,000,000 threads are more than this machine has" in said[0]


def test_the_command_line_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from minitron.cli.main import main

    model, text = small.teacher(tmp_path / "model"), small.text(tmp_path / "text.jsonl")
    arguments = ["quantize", str(model), "--types", "q8_0,Q4_K_M", "--quiet"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "matrices Q4_K -> Q5_0" in capsys.readouterr().out
    out = tmp_path / "out"
    options = ["--calibration", str(text), "--samples", "8", "--block-tokens", "16", "--no-verify"]
    assert main([*arguments, *options, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["type", "size", "bits/weight", "imatrix", "perplexity", "KL", "top-1", "other", "way"]
    assert [line.split()[0] for line in lines[1:]] == ["Q8_0", "Q4_K_M", "in"]
    assert {file.name for file in out.iterdir()} == {"model-Q8_0.gguf", "model-Q4_K_M.gguf", IMPORTANCE, TABLE}
    assert main(["quantize", str(model), "--types", "Q4_KM", "--out", str(tmp_path / "no")]) == 1
    assert "did you mean 'Q4_K_M'" in capsys.readouterr().err and not (tmp_path / "no").exists()
