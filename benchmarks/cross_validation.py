"""What a cross-validation tells of new molecules, and what its models predict, beside a single split with as many models; and what
a refit of each predicts, whose models were trained on all molecules that are not held out.

    python benchmarks/cross_validation.py TABLE --column COLUMN --out DIR [--repeats 3] [--folds 5] [--split random]
        [--only single_split] [SETTING=VALUE ...]

Each repeat holds out a fifth of the molecules at random, which nothing sees. With the others, one command cross-validates and
another trains as many models (seeds) on one split. Of both: how far the reported score is from that of their models on the
molecules held out, whether the interval of the score holds that, the error of the mean of all models there, and how many labels
are inside the intervals of `predict`. Of the models of `refit`: their error, one by one and together, and the labels inside. SETTING=VALUE is for both commands (`model=tiny finetune.epochs=20`). Finished commands in DIR
are not repeated. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moleblend_ray.config.compose import load_config
from moleblend_ray.config.downstream import FinetuneConfig, RefitConfig
from moleblend_ray.inference import PropertyPredictor
from moleblend_ray.orchestration.downstream.refit import refit
from moleblend_ray.orchestration.downstream.task_groups import TasksSummary, finetune_or_tasks

HELD_OUT = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table")
    parser.add_argument("--column", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--split", default="random")
    parser.add_argument("--only", choices=("cross_validation", "single_split"))
    arguments, settings = parser.parse_known_args()
    found = [measure(repeat, arguments, settings) for repeat in range(arguments.repeats)]
    config = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    print(
        json.dumps(
            {"benchmark": "cross_validation", **config, "settings": settings, "repeats": found}
        )
    )


def measure(repeat: int, arguments: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Both ways for one choice of the molecules that are held out."""
    folder = arguments.out / f"repeat-{repeat}"
    folder.mkdir(parents=True, exist_ok=True)
    hold_out(pd.read_csv(arguments.table), repeat, folder)
    common = [
        "task.name=property",
        f"task.source={folder / 'known.csv'}",
        f"task.columns=['{arguments.column}']",
        "task.kind=regression",
        f"task.split={arguments.split}",
        "task.conformers=0",
        "baseline.kinds=[]",
        *settings,
    ]
    seeds = list(range(arguments.folds))
    ways = {
        "cross_validation": [f"task.folds={arguments.folds}", "seeds=[0]"],
        "single_split": [f"seeds={seeds}"],
    }
    return {
        name: judged(folder, name, [*common, *own], arguments.column)
        for name, own in ways.items()
        if arguments.only in (None, name)
    }


def hold_out(table: pd.DataFrame, repeat: int, folder: Path) -> None:
    """Write the molecules that are held out, and all others; rows with equal SMILES stay together."""
    smiles = table["smiles"].drop_duplicates().to_numpy()
    chosen = np.random.default_rng(repeat).permutation(smiles)[: round(HELD_OUT * len(smiles))]
    is_new = table["smiles"].isin(chosen)
    table[is_new].to_csv(folder / "new.csv", index=False)
    table[~is_new].to_csv(folder / "known.csv", index=False)


def judged(folder: Path, name: str, overrides: list[str], column: str) -> dict[str, Any]:
    """The reported score of one way, and what its models give for the molecules that were held out."""
    out = str(folder / name)
    summary = finetune_or_tasks(load_config(FinetuneConfig, "finetune", [*overrides, f"out={out}"]))
    assert not isinstance(summary, TasksSummary)
    results = json.loads(Path(summary.results).read_text())
    new = pd.read_csv(folder / "new.csv")
    # The score is the mean of those of single models, so it is compared with theirs.
    scored = on_new(out, results["final"]["seeds"], new, column)
    alone = scored["new_molecules"]
    low, high = summary.test_interval or (np.nan, np.nan)
    of_all = refit(RefitConfig(results=out, out=f"{out}-refit"))
    seeds = json.loads(Path(of_all.out, "refit.json").read_text())["final"]["seeds"]
    return {
        "reported": round(summary.test_score, 4),
        "interval": [round(low, 4), round(high, 4)],
        "off_by": round(summary.test_score - alone, 4),
        "interval_holds": bool(low <= alone <= high),
        **scored,
        "seconds": round(summary.seconds),
        "refit": {
            "epochs": list(of_all.epochs),
            **on_new(of_all.out, seeds, new, column),
            "seconds": round(of_all.seconds),
        },
    }


def on_new(out: str, seeds: list[dict[str, Any]], new: pd.DataFrame, column: str) -> dict[str, Any]:
    """What the models in ``out`` give for the molecules that were held out: mean error of each, error of their mean, intervals."""
    labels = new[column].to_numpy()
    own = [predicted(f"{out}/{seed['model']}", new, column) for seed in seeds]
    together = predicted(out, new, column)
    inside = (together["lower"] <= labels) & (labels <= together["upper"])
    return {
        "new_molecules": round(float(np.mean([rmse(one["prediction"], labels) for one in own])), 4),
        "mean_of_models": round(rmse(together["prediction"], labels), 4),
        "half_width": round(float((together["upper"] - together["lower"])[0]) / 2, 4),
        "inside": round(float(inside.mean()), 4),
    }


def predicted(models: str, new: pd.DataFrame, column: str) -> dict[str, NDArray[np.float64]]:
    """Prediction and interval (M,) of each of the molecules that were held out."""
    table = PropertyPredictor.from_pretrained(models).predict(new["smiles"])
    return {
        kind: table[f"{kind}:{column}"].to_numpy().astype(np.float64)
        for kind in ("prediction", "lower", "upper")
    }


def rmse(predictions: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    return float(np.sqrt(((predictions - labels) ** 2).mean()))


if __name__ == "__main__":
    main()
