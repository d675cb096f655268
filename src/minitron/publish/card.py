from pathlib import Path


def write_card(records) -> Path: ...
