"""`minitron push` uploads a run's student to the Hugging Face hub."""

import argparse

from minitron.cli import parse
from minitron.cli.command import Command
from minitron.cli.console import Console


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=parse.path, metavar="RUN", help="directory of a finished run")
    parser.add_argument(
        "repo", metavar="REPO", help="a name on the hub, such as me/my-model-4b; made if it is not there"
    )
    parser.add_argument("--private", action="store_true", help="seen by nobody else, where REPO is made")
    parser.add_argument("--dry-run", action="store_true", help="print what would go, and send nothing")


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron.core.text import size
    from minitron.report.hub import planned_uploads, push, require_repo_id
    from minitron.report.records import read_run

    require_repo_id(args.repo)
    records = read_run(args.run)
    uploads = [(upload, upload.file.stat().st_size) for upload in planned_uploads(records)]
    files = [
        {"file": str(upload.file), "bytes": num_bytes, "to": f"{args.repo}/{upload.destination}"}
        for upload, num_bytes in uploads
    ]
    total = sum(num_bytes for _, num_bytes in uploads)
    facts = {"repo": args.repo, "private": args.private, "bytes": total, "files": files}
    if not args.dry_run:
        url = push(records, args.repo, private=args.private)
        return console.result(facts | {"url": url}, f"{len(files)} files, {size(total)}: {url}")
    lines = [f"{size(num_bytes):>10}  {args.repo}/{upload.destination}" for upload, num_bytes in uploads]
    console.result(facts, "\n".join([*lines, f"{len(files)} files, {size(total)}; nothing was sent"]))


COMMAND = Command(
    help="upload the student, its card and its GGUF files to the Hugging Face hub",
    example="minitron push runs/half me/my-model-4b --private --dry-run",
    add_options=_add_options,
    run=_run,
)
