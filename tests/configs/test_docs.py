"""The pages for users: every command in them is accepted, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moleblend_ray import cli
from moleblend_ray.errors import MoleBlendError

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "infra" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


def commands(page: Path) -> list[str]:
    """The `moleblend JOB ...` lines of a page's code blocks, without comments and optional parts."""
    joined = re.sub(r"\\\n\s*", "", page.read_text())
    lines = re.findall(r"^(?: {4})?(moleblend [a-z].*)$", joined, flags=re.MULTILINE)
    return [re.sub(r"\s+(#|\[--).*", "", line) for line in lines]


COMMANDS = [
    pytest.param(command, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, command in enumerate(commands(page))
    # Not whole: what stands for `...` or for a file's checksum.
    if " ... " not in command and "sha256: ..." not in command
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_pages_is_accepted(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    arguments = shlex.split(command)[1:]
    if arguments[:1] == ["submit"] and arguments[1] in ("--follow", "--stop"):
        pytest.skip("asks the cluster")
    try:
        status = cli.main([*arguments, "--dry-run"])
    except MoleBlendError as error:
        pytest.fail(str(error))
    assert status == 0, capsys.readouterr().err


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 30


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text())
    lost = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []
