"""What intervals of one width hold on test molecules, beside intervals whose widths follow the spread over models.

    python benchmarks/intervals.py OUT [OUT ...]

Each OUT is the finished `out` of a fine-tuning or sweep for one property, with at least two seeds. Both kinds are calibrated on
its validation molecules. For the test molecules: the share of labels inside, the mean width, and the mean interval score (width,
plus 2 / (1 - coverage) times what a label lies outside; smaller is better: Gneiting and Raftery, J. Am. Stat. Assoc. 102, 359
(2007)). Widths that follow the spread are multiples of the standard deviation over models plus its median. Prints one JSON line
last.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.results.result_files import RESULTS_NAME
from moleblend_ray.evaluation.results.runs import read_of_seeds
from moleblend_ray.evaluation.scoring.intervals import Calibration, mean_of
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
from moleblend_ray.evaluation.settings import COVERAGE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="+")
    found = [measure(out) for out in parser.parse_args().out]
    print(json.dumps({"benchmark": "intervals", "coverage": COVERAGE, "outs": found}))


def measure(out: str) -> dict[str, Any]:
    """The figures of one ``out``; ConfigError if it has several properties or a single seed."""
    results = storage.read_object(storage.join(out, RESULTS_NAME), {"final.seeds": list[Any]})
    columns = results["task"]["columns"]
    seeds = [seed["seed"] for seed in results["final"]["seeds"]]
    if len(columns) != 1 or len(seeds) < 2 or "folds" in results:
        raise ConfigError(
            f"{out}: expected one property and several seeds on one split, found {len(columns)} and {len(seeds)}"
        )
    valid, test = (read_of_seeds(out, seeds, part, columns) for part in ("valid", "test"))
    typical = float(np.median(spread(valid)))
    kinds = {
        "one_width": (np.ones_like(mean_of(valid).labels), np.ones_like(mean_of(test).labels)),
        "by_spread": (spread(valid) + typical, spread(test) + typical),
    }
    return {
        "task": results["task"]["name"],
        "split": results["data"]["split"]["kind"],
        "split_hash": results["data"]["split"]["hash"],
        "seeds": seeds,
        "valid": len(valid[0].smiles),
        "test": len(test[0].smiles),
        **{name: judged(mean_of(valid), mean_of(test), *scales) for name, scales in kinds.items()},
    }


def spread(parts: list[PartPredictions]) -> NDArray[np.float64]:
    """(M, 1) standard deviation over models."""
    found: NDArray[np.float64] = np.std([part.predictions for part in parts], axis=0, ddof=1)
    return found


def judged(
    valid: PartPredictions,
    test: PartPredictions,
    valid_scale: NDArray[np.float64],
    test_scale: NDArray[np.float64],
) -> dict[str, float]:
    """Intervals whose half widths are multiples of a scale (M, 1), of test molecules."""
    scaled = PartPredictions(
        mol_ids=valid.mol_ids,
        smiles=valid.smiles,
        labels=valid.labels / valid_scale,
        predictions=valid.predictions / valid_scale,
    )
    calibration = Calibration.of([scaled])
    assert calibration is not None
    half = calibration.half_widths(COVERAGE) * test_scale
    outside = np.maximum(np.abs(test.predictions - test.labels) - half, 0.0)
    known = ~np.isnan(test.labels)
    score = 2 * half + 2 / (1 - COVERAGE) * outside
    return {
        "inside": round(float((outside[known] == 0).mean()), 4),
        "width": round(float(2 * half[known].mean()), 4),
        "interval_score": round(float(score[known].mean()), 4),
    }


if __name__ == "__main__":
    main()
