"""Nothing turns bytes from elsewhere into code; see docs/security.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    file
    for folder in ("moleblend_ray", "jobs", "benchmarks", "infra")
    for file in (REPOSITORY / folder).rglob("*.py")
)

# Whatever turns bytes into code or objects of any class, or writes where a file's own names say.
DANGEROUS: Final = {
    "cloudpickle.load",
    "cloudpickle.loads",
    "dill.load",
    "dill.loads",
    "eval",
    "exec",
    "joblib.load",
    "marshal.load",
    "marshal.loads",
    "os.popen",
    "os.system",
    "pandas.read_pickle",
    "pickle.Unpickler",
    "pickle.load",
    "pickle.loads",
    "shelve.open",
    "shutil.unpack_archive",
    "ssl._create_unverified_context",
    "tempfile.mktemp",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
}
DANGEROUS_METHODS: Final = {"extractall", "extract", "read_pickle"}

# Where it is not a file from elsewhere.
ADMITTED: Final = {
    ("moleblend_ray/chemistry/killable.py", "pickle.loads"): "a pipe to and from a child process",
    (
        "moleblend_ray/orchestration/library/parts.py",
        "pickle.loads",
    ): "what an actor of the same job made",
    (
        "moleblend_ray/orchestration/downstream/sweep.py",
        "pickle.loads",
    ): "the search's state in the sweep's own folder, which Ray Tune unpickles next",
}


def dangers(tree: ast.AST) -> Iterator[str]:
    """Calls of the kind, in order."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        is_loose = (
            (name == "torch.load" and options.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False")
            or (options.get("shell") == "True")
            or (options.get("verify") == "False")
        )
        method = name.rsplit(".", 1)[-1]
        is_method = isinstance(node.func, ast.Attribute) and method in DANGEROUS_METHODS
        if name in DANGEROUS or is_loose or is_method:
            yield name


def found_in(file: Path) -> set[tuple[str, str]]:
    where = file.relative_to(REPOSITORY).as_posix()
    return {(where, name) for name in dangers(ast.parse(file.read_text()))}


def test_only_safetensors_and_weights_are_loaded_and_nothing_is_executed() -> None:
    found = {danger for file in SOURCES for danger in found_in(file)}
    assert found - ADMITTED.keys() == set()
    assert ADMITTED.keys() - found == set(), "no longer needed"


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "pickle.loads(content)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "archive.extractall(folder)",
        "subprocess.run(command, shell=True)",
        "requests.get(url, verify=False)",
    ],
)
def test_the_scan_sees_what_is_not_allowed(code: str) -> None:
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "model.eval()",
        "re.compile(text)",
        "safetensors.torch.load(content)",
    ],
)
def test_the_scan_lets_pass_what_is_safe(code: str) -> None:
    assert list(dangers(ast.parse(code))) == []
