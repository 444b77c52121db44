"""The layers import one way, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "moleblend_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a module imports from its own layer and those before it.
LAYERS = (
    "errors",
    "checks",
    "settings",
    "compilation",
    "vocabulary",
    "quantities",
    "host",
    "chemistry",
    "relations",
    "data",
    "model",
    "training",
    "evaluation",
    "inference",
    "planning",
    "config",
    "orchestration",
    "cli",
    "stages",
    "__main__",
)

# Of a layer with folders, likewise.
WITHIN = {
    "data": (
        "config",
        "files",
        "dataset",
        "sources",
        "preparation",
        "batches",
        "inspect",
        "status",
    ),
    "evaluation": (
        "tasks",
        "settings",
        "search",
        "sources",
        "molecules",
        "splits",
        "scoring",
        "models",
        "results",
        "reports",
        "prediction",
    ),
    "orchestration": (
        "identity",
        "progress",
        "cluster",
        "preparation",
        "streaming",
        "pretraining",
        "downstream",
        "library",
        "samples",
        "download",
        "data",
        "checkpoints",
        "export",
        "leaderboard",
        "plan",
        "plan_tables",
        "status",
        "follow",
        "submit",
    ),
}

# Library or module -> path prefixes, below the package, of the modules that may import it.
HOMES = {
    "ray": ("orchestration/",),
    "rdkit": ("chemistry/",),
    "torch": ("model/", "training/", "evaluation/", "inference.py", "config/", "orchestration/"),
    "hydra": ("config/compose.py",),
    "omegaconf": ("config/compose.py",),
    # Temporary folders are those of scratch.py, which do not stay behind a killed process. The others: files shared by processes,
    # and a file without a name.
    "tempfile": (
        "data/files/scratch.py",
        "data/dataset/node_cache.py",
        "orchestration/cluster/session.py",
    ),
}

# What of data/ turns raw molecules into shards; the rest must run without chemistry.
USES_CHEMISTRY = (
    "data/sources/",
    "data/preparation/options.py",
    "data/preparation/shard_writer.py",
)


def imports_of(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at module level and at run time) of every import, those inside functions included."""
    tree = ast.parse(file.read_text())
    for node, runs in walk(tree, runs=True):
        if isinstance(node, ast.Import):
            yield from ((alias.name, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or "", runs


def walk(node: ast.AST, *, runs: bool) -> Iterator[tuple[ast.AST, bool]]:
    yield node, runs
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        runs = False
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        runs = False
    for child in ast.iter_child_nodes(node):
        yield from walk(child, runs=runs)


def layer_of(parts: tuple[str, ...]) -> int:
    return LAYERS.index(parts[0])


def own_name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", MODULES, ids=own_name)
def test_imports_go_down_the_layers(file: Path) -> None:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    for module, _ in imports_of(file):
        top, *below = module.split(".")
        if top == "moleblend_ray" and below:
            assert layer_of(tuple(below)) <= layer_of(parts), f"{own_name(file)} imports {module}"


@pytest.mark.parametrize("layer", WITHIN)
def test_imports_go_down_the_folders_of_a_layer(layer: str) -> None:
    folders = WITHIN[layer]
    for file in (PACKAGE / layer).rglob("*.py"):
        own = file.relative_to(PACKAGE / layer).with_suffix("").parts
        if own == ("__init__",):
            continue
        for module, _ in imports_of(file):
            _, *names = module.split(".")
            if names[:1] == [layer] and len(names) > 1:
                assert folders.index(names[1]) <= folders.index(own[0]), (
                    f"{own_name(file)} imports {module}"
                )


@pytest.mark.parametrize("file", MODULES, ids=own_name)
def test_libraries_are_imported_in_their_own_layers(file: Path) -> None:
    name = own_name(file)
    for module, _ in imports_of(file):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or name.startswith(homes), f"{name} imports {module}"


@pytest.mark.parametrize("file", MODULES, ids=own_name)
def test_only_the_makers_of_shards_import_chemistry_in_data(file: Path) -> None:
    name = own_name(file)
    if not name.startswith(("data/", "relations/", "model/", "training/")):
        return
    if name.startswith(USES_CHEMISTRY):
        return
    for module, _ in imports_of(file):
        assert not module.startswith("moleblend_ray.chemistry"), f"{name} imports {module}"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("__init__.py")), ids=own_name)
def test_package_files_import_nothing_of_the_project(file: Path) -> None:
    at_run_time = [
        module for module, runs in imports_of(file) if runs and module.startswith("moleblend_ray")
    ]
    assert at_run_time == []


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_training_from_shards_imports_neither_rdkit_nor_chemistry() -> None:
    modules = modules_after(
        "import moleblend_ray.training.loop, moleblend_ray.data.batches.builder, moleblend_ray.model.hub\n"
        "import moleblend_ray.config.pretrain, moleblend_ray.orchestration.pretraining.pretrain"
    )
    assert "moleblend_ray.training.loop" in modules
    assert not [name for name in modules if name.split(".")[0] == "rdkit"]
    assert not [name for name in modules if name.startswith("moleblend_ray.chemistry")]


def test_processes_of_the_stream_import_neither_torch_nor_chemistry_nor_ray_train() -> None:
    # Ray Data's own processes and the data actors get by with what these two modules bring.
    modules = modules_after(
        "import moleblend_ray.orchestration.streaming.stream, moleblend_ray.orchestration.streaming.stream_metrics"
        # The controller of Ray Train, which starts it.
        ", moleblend_ray.orchestration.pretraining.pretrain_group"
    )
    assert "moleblend_ray.data.batches.builder" in modules
    assert not {"torch", "rdkit", "ray.train"} & modules


def test_actors_import_ray_train_and_tune_only_where_they_train() -> None:
    modules = modules_after(
        "import moleblend_ray.orchestration.library.embed, moleblend_ray.orchestration.library.predict"
        ", moleblend_ray.orchestration.pretraining.stopping, moleblend_ray.orchestration.progress.progress"
    )
    assert "moleblend_ray.orchestration.library.part_writer" in modules
    assert not {"ray.train", "ray.tune"} & modules


def test_molecules_are_embedded_and_models_fine_tuned_without_what_shards_and_compiles_models() -> (
    None
):
    modules = modules_after(
        "import moleblend_ray.orchestration.library.embed, moleblend_ray.orchestration.library.predict"
        ", moleblend_ray.orchestration.downstream.finetune\n"
        "import torch\n"
        "from moleblend_ray.model.moleblend import ModelConfig, MoleBlendModel\n"
        "from moleblend_ray.training import optim\n"
        "model = MoleBlendModel(ModelConfig(dim=8, num_heads=2, ffn_dim=8, num_layers=1))\n"
        "MoleBlendModel.without_weights(model.config).load_state_dict(model.state_dict())\n"
        "optimizer = optim.build_optimizer(model, optim.OptimConfig())\n"
        "sum(weight.sum() for weight in model.parameters()).backward()\n"
        "optimizer.step()\n"
        "optimizer.zero_grad()"
    )
    assert "moleblend_ray.evaluation.models.finetune" in modules
    assert not {"torch.distributed.tensor", "torch._dynamo", "sympy"} & modules


def test_configurations_compose_without_torch_rdkit_ray_or_numba() -> None:
    modules = modules_after(
        "import moleblend_ray.config.prepare, moleblend_ray.config.pretrain, moleblend_ray.config.downstream"
        ", moleblend_ray.config.plan, moleblend_ray.config.status"
    )
    assert not {"torch", "rdkit", "ray", "numba"} & modules


def test_importing_the_package_imports_no_part_of_it() -> None:
    modules = modules_after("import moleblend_ray")
    assert not [name for name in modules if name.startswith("moleblend_ray.")]
