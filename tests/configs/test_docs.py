"""The pages for users: every command in them is accepted, and every link leads somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from source_files import records_of, smiles_of

import moleblend_ray as mb
from moleblend_ray import cli
from moleblend_ray.errors import MoleBlendError
from moleblend_ray.settings import leaf_paths

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "infra" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
FILE_ENDINGS = (".csv", ".json", ".md", ".npz", ".parquet", ".png", ".py", ".safetensors", ".yaml")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`((?:\w+/)+[a-z]\w*\.py)\b", page.read_text()))
    # Those of the package also without its name, those beside the page without its folder.
    folders = REPOSITORY, REPOSITORY / "moleblend_ray", page.parent
    assert [path for path in named if not any((one / path).exists() for one in folders)] == []


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_that_the_python_of_a_page_takes_from_the_package_exists(page: Path) -> None:
    text = page.read_text()
    imports = re.findall(r"^\s*from (moleblend_ray[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
    named = {
        (module, name) for module, names in imports for name in re.split(r",\s*", names.strip())
    }
    named |= {("moleblend_ray", name) for name in re.findall(r"\bmb\.(\w+)", text)}
    lost = [
        f"{module}.{name}"
        for module, name in sorted(named)
        if not hasattr(importlib.import_module(module), name)
    ]
    assert lost == []


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


def settings() -> set[str]:
    """Every setting of every command, with its section."""
    classes = [cli.load_reference(job.config) for job in cli.JOBS.values()]
    return {path for cls in classes for path in leaf_paths(cls)}


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    """`section.name` or `section.name=value`; what stands behind a mapping (`search.ranges.NAME`) is free."""
    known = settings()
    mappings = {
        "search.ranges",
        "search.choices",
        "search.searcher_options",
        "search.scheduler_options",
    }
    assert mappings <= known
    sections = {path.partition(".")[0] for path in known if "." in path}
    unknown = []
    for span in re.findall(r"`([^`\n]+)`", page.read_text()):
        for name in re.findall(r"(?<![\w./-])[a-z_]+(?:\.[a-z_0-9]+)+(?=[=\s]|$)", span):
            is_setting = name.partition(".")[0] in sections and not name.endswith(FILE_ENDINGS)
            if is_setting and name not in known and name.rpartition(".")[0] not in mappings:
                unknown.append(name)
    assert unknown == []


def test_the_table_of_the_model_names_every_module() -> None:
    text = (REPOSITORY / "docs" / "model.md").read_text()
    modules = [file.name for file in (REPOSITORY / "moleblend_ray" / "model").glob("*.py")]
    named = [*re.findall(r"`(\w+\.py)`", text), "__init__.py"]
    lacking = [name for name in modules if name not in named and not name.endswith("_kernels.py")]
    assert lacking == []


def test_the_recipe_for_an_export_of_chembl_turns_every_relation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A concentration above a bound is a pIC50 below it."""
    pytest.importorskip("pandas")
    text = (REPOSITORY / "docs" / "downstream.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (recipe,) = (block for block in blocks if "Standard Units" in block)
    relations = ("'='", "'>'", "'>='", "'>>'", "'<'", "'<='", "'<<'", "'~'", "")
    rows = [f'"{"C" * size}";"IC50";"{sign}";"100";"nM"' for size, sign in enumerate(relations, 1)]
    rows += ['"N";"Ki";"\'=\'";"100";"nM"', '"O";"Inhibition";"\'=\'";"50";"%"']
    names = "Smiles", "Standard Type", "Standard Relation", "Standard Value", "Standard Units"
    header = ";".join(f'"{name}"' for name in names)
    (tmp_path / "export.csv").write_text("\n".join([header, *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    records = records_of(
        tmp_path / "assay.csv",
        label_columns=("pIC50",),
        relation_column="relation",
        censored_labels=True,
    )
    assert smiles_of(records) == ["C" * size for size in range(1, 10)]
    at_most = [record.bounds is not None and record.bounds[1, 0] == 7.0 for record in records]
    at_least = [record.bounds is not None and record.bounds[0, 0] == 7.0 for record in records]
    assert at_most == [False] + [True] * 3 + [False] * 5
    assert at_least == [False] * 4 + [True] * 3 + [False] * 2
    assert [record.labels[0] == 7.0 for record in records] == [True] + [False] * 6 + [True] * 2


def test_the_training_loop_of_the_python_page_trains_what_it_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (loop,) = (block for block in blocks if "loss.backward()" in block)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = mb.ModelConfig(
        num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2
    )
    mb.MoleBlend(config).save_pretrained("first")
    batches = [(["CCO", "C"], torch.ones(2)), (["c1ccccc1"], torch.zeros(1))]
    exec(loop.replace("s3://bucket/runs/first", "first"), {"batches": batches})
    before, after = (mb.load_model(uri).encoder.state_dict() for uri in ("first", "runs/own"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
