"""A push sends what it says and nothing else: held against a hub of our own that speaks the hub's protocol."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import example_run
import pytest
from huggingface_hub import HfApi, constants, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from minitron.cli.main import main
from minitron.core.errors import MinitronError
from minitron.report.card import write_card
from minitron.report.hub import planned_uploads, push
from minitron.report.layouts import FilesRecipe
from minitron.report.records import read_run

STUDENT = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "words", "LICENSE": "terms"}
NEVER = ("student/metrics.jsonl", "distill/state-000000040960/student.safetensors", "data/train.bin")
GGUF = ("run-Q4_K_M.gguf", "imatrix.gguf")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with its files; with what a training leaves, too."""
    path = example_run.write(tmp_path / "run")
    for name, content in STUDENT.items():
        (path / "student" / name).write_text(content)
    for name in (*NEVER, *(f"gguf/{file}" for file in GGUF)):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"content of {name}")
    measured = {"kl": 0.01, "top1": 0.9, "perplexity": 4.0, "reference_perplexity": 4.0, "tokens": 100}
    row = {
        "name": "Q4_K_M",
        "file": GGUF[0],
        "bytes": 10,
        "bits_per_weight": 4.8,
        "informed": True,
        "measured": measured,
    }
    (path / "gguf" / "quantization.json").write_text(json.dumps({"files": [row], "notes": []}))
    write_card(read_run(path))
    return path


def expected(run: Path) -> dict[str, bytes]:
    """Each place in the repository and what belongs there, written down by hand."""
    student = {name: (run / "student" / name).read_bytes() for name in (*STUDENT, "README.md")}
    return student | {name: (run / "gguf" / name).read_bytes() for name in GGUF}


class Hub(HTTPServer):
    """What the hub answers to a client that creates a repository and commits to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.created: list[dict[str, Any]] = []
        self.validated: list[str] = []
        self.committed: dict[str, bytes] = {}
        self.public = False  # whether what is there already is public
        self.refuses = 0  # with this status, to be given files

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._say({"id": "me/half", "private": not self.server.public, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            return self._say({"url": "https://huggingface.co/me/half"})
        if self.path.endswith("/validate-yaml"):
            self.server.validated.append(json.loads(body)["content"])
            return self._say({"warnings": [], "errors": []})
        if self.server.refuses:
            return self._say({"error": "no"}, self.server.refuses)
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in
                     json.loads(body)["files"]]  # fmt: skip
            return self._say({"files": files})
        assert "/commit/" in self.path, self.path
        rows = [json.loads(line) for line in body.decode().splitlines()]
        files = [row["value"] for row in rows if row["key"] == "file"]
        assert len(files) == len(rows) - 1
        self.server.committed |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        self._say({"commitUrl": f"{self.server.address}/me/half/commit/1", "commitOid": "1", "success": True})

    def _say(self, facts: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(facts).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def test_a_push_sends_student_card_terms_and_gguf_files_and_nothing_else(run: Path, hub: Hub) -> None:
    url = push(read_run(run), "me/half", private=True, api=HfApi(hub.address, token="hf_x"))
    assert hub.committed == expected(run)
    assert url.endswith("/me/half/commit/1")
    assert hub.validated == [(run / "student" / "README.md").read_text()]
    (created,) = hub.created  # whose key for it differs between versions of huggingface_hub
    assert (created["name"], created["organization"]) == ("half", "me")
    assert created.get("visibility") == "private" or created.get("private") is True


def test_a_dry_run_lists_the_same_files_offline_and_sends_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "me/half", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {row["to"]: row["bytes"] for row in facts["files"]} == {
        f"me/half/{name}": len(content) for name, content in expected(run).items()
    }
    assert facts["bytes"] == sum(map(len, expected(run).values()))
    assert main(["push", str(run), "me/half", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "\n7 files, " in said and said.endswith("; nothing was sent\n")
    assert "me/half/run-Q4_K_M.gguf" in said


def test_a_public_repository_is_not_taken_for_a_private_one(run: Path, hub: Hub) -> None:
    hub.public, api = True, HfApi(hub.address, token="hf_x")
    with pytest.raises(MinitronError, match="me/half is there already and is public, which --private does not change"):
        push(read_run(run), "me/half", private=True, api=api)
    assert not hub.committed
    push(read_run(run), "me/half", private=False, api=api)
    assert hub.committed


def test_a_refusal_of_the_hub_is_one_line(run: Path, hub: Hub) -> None:
    hub.refuses = 403
    with pytest.raises(MinitronError, match=r"cannot push to me/half: .*403 Forbidden") as refused:
        push(read_run(run), "me/half", private=False, api=HfApi(hub.address, token="hf_x"))
    assert "\n" not in str(refused.value)


def test_without_network_or_token_the_message_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MinitronError, match=r"cannot push to me/half: .*offline mode is enabled"):
        push(read_run(run), "me/half", private=False, api=HfApi(token="hf_x"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(MinitronError, match=r"not logged in to the hub: run `hf auth login`, or set HF_TOKEN"):
        push(read_run(run), "me/half", private=False)


@pytest.mark.parametrize("repo", ["me/you/half", "me/ha lf", "-half", "", "me/half.git"])
def test_a_bad_name_is_refused_before_anything_is_read(
    tmp_path: Path, repo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tmp_path), "--dry-run", "--", repo]) == 1
    assert f"REPO {repo!r} is no name on the hub, such as me/my-model-4b" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_refused(run: Path, tmp_path: Path) -> None:
    records = read_run(run)
    wanted = records.recipe.model_copy(update={"gguf": FilesRecipe(types=["Q4_K_M"])})
    with pytest.raises(MinitronError, match=r"GGUF files that the recipe .* asks for are not there yet"):
        planned_uploads(type(records)(**{**vars(records), "recipe": wanted}))
    (run / "gguf" / GGUF[0]).unlink()
    with pytest.raises(MinitronError, match=r"run-Q4_K_M.gguf is not there: the run .* was changed"):
        planned_uploads(records)
    (run / "student" / "README.md").unlink()
    with pytest.raises(MinitronError, match="has no student with a card yet"):
        planned_uploads(records)
    assert main(["push", str(tmp_path / "nowhere"), "me/half"]) == 1


def test_the_hubs_own_parser_finds_every_measured_value_in_the_card(run: Path) -> None:
    facts = metadata_load(run / "student" / "README.md")
    assert facts is not None
    assert (facts["base_model"], facts["base_model_relation"]) == ("acme/parent-3M", "finetune")
    name, results = model_index_to_eval_results(facts["model-index"])
    loss, bits, kl, agreement = example_run.QUALITY["student"]
    found = {result.metric_type: result.metric_value for result in results}
    assert found.pop("perplexity") == pytest.approx(2.718281828**loss)
    assert found == {"lm_loss": loss, "bits_per_byte": bits, "kl_to_teacher": kl, "top1_agreement": agreement}
    assert name == "parent-3M-minitron-1.70M"
    assert all(result.dataset_type and result.dataset_name and result.task_type for result in results)
