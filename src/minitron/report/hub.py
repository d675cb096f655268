"""A run is uploaded in one commit: the student, its card and licence files, and the files of its exporters."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from minitron.core.errors import MinitronError, RunError
from minitron.core.run_layout import RunLayout
from minitron.model.weight_files import model_files
from minitron.report.exporters import EXPORTERS
from minitron.report.records import RunRecords, exported


@dataclass(frozen=True)
class Upload:
    """A file and its path in the repository, whose root is the model's directory."""

    file: Path
    destination: str


def planned_uploads(records: RunRecords) -> list[Upload]:
    """Plan the upload, without resumable states, text and statistics.

    Raises: RunError if the run has not made all of it yet.
    """
    run = RunLayout(records.path)
    if not run.card.is_file():
        raise RunError(
            f"the run in {records.path} has no student with a card yet; the same command that started it goes on"
        )
    for name, row in EXPORTERS.items():
        if row.section is not None and row.wanted(records.recipe) and name not in records.stages:
            raise RunError(
                f"the {row.title} that the recipe of {records.path} asks for are not there yet; the same command that "
                "started it goes on with it"
            )
    files = [run.card, *model_files(run.stage("student"))]
    for name, row in exported(records):
        files += row.files(records.exports[name], run.stage(name))
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise RunError(f"{missing[0]} is not there: the run in {records.path} was changed after it ended")
    return [Upload(file, file.name) for file in files]


def require_repo_id(repo: str) -> None:
    """Raises: MinitronError for a name that the hub does not allow."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise MinitronError(f"REPO {repo!r} is no name on the hub, such as me/my-model-4b: {_line(error)}") from None


def push(records: RunRecords, repo: str, *, private: bool, api: HfApi | None = None) -> str:
    """Create the repository if it is not there, and upload; returns the commit's address.

    Raises: MinitronError where the hub cannot be reached, or refuses.
    """
    require_repo_id(repo)
    uploads = planned_uploads(records)
    api = api or HfApi()
    if not (api.token or _stored_token()):
        raise MinitronError("not logged in to the hub: run `hf auth login`, or set HF_TOKEN; --dry-run needs neither")
    try:
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise MinitronError(
                f"{repo} is there already and is public, which --private does not change: make it private on its page, "
                "choose another REPO, or leave --private out"
            )
        added = [CommitOperationAdd(upload.destination, upload.file) for upload in uploads]
        return str(api.create_commit(repo, added, commit_message="Upload with minitron").commit_url)
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:  # ValueError: the hub does not accept the card
        raise MinitronError(f"cannot push to {repo}: {_line(error)}") from None


def _stored_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
