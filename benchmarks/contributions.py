"""What the contributions of atoms tell, on properties of which each atom's part is known, beside other ways to get them.

    python benchmarks/contributions.py table ZINC.csv.gz TABLE.csv [--molecules 6000]
    moleblend finetune task.name=crippen task.source=TABLE.csv 'task.columns=[logP,MR,TPSA]' task.kind=regression task.split=random \\
      task.conformers=0 model=mini finetune.learning_rate=5e-4 finetune.epochs=15 'seeds=[0,1,2]' 'baseline.kinds=[]' out=OUT
    python benchmarks/contributions.py measure OUT [--molecules 150]

``table`` draws molecules and computes logP and molar refractivity by Wildman and Crippen (J. Chem. Inf. Comput. Sci. 39, 868 (1999)),
and the polar surface by Ertl et al. (J. Med. Chem. 43, 3714 (2000)): sums over atoms, of which the model is told the sum alone.
``measure`` compares the terms of the sums (with those of an atom's hydrogens) with what each way says of the atoms of test molecules:

- ``without_atom``: the prediction minus that without the atom (``moleblend predict atom_contributions=true``)
- ``integrated_gradients``: from the mean token to each atom's token in 16 steps (Sundararajan et al., ICML 2017)
- ``gradient``: the first of these steps alone, at the molecule
- ``mean_of_element``: knows no model, but the mean term of the element in these molecules

For each: the correlation within a molecule (mean over molecules), that of sums over each atom and its neighbours, and that over all
atoms of all molecules; also how many times longer predictions take with contributions. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors
from torch import Tensor

import moleblend_ray as mb
from moleblend_ray.data.batches.batch import build_micro_batches
from moleblend_ray.data.dataset.block import block_from_table
from moleblend_ray.data.files import storage
from moleblend_ray.evaluation.models.property_model import SavedProperty
from moleblend_ray.evaluation.results.result_files import RESULTS_NAME
from moleblend_ray.evaluation.results.runs import read_of_seeds
from moleblend_ray.inference import _featurize
from moleblend_ray.model.batch import MoleculeBatch

COLUMNS: Final = ("logP", "MR", "TPSA")
STEPS: Final = 16

Parts = list[NDArray[np.float64]]
"""For each molecule (N, 3): the part of each atom in each property."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table")
    table.add_argument("source")
    table.add_argument("out")
    table.add_argument("--molecules", type=int, default=6000)
    measuring = commands.add_parser("measure")
    measuring.add_argument("out")
    measuring.add_argument("--molecules", type=int, default=150)
    arguments = parser.parse_args()
    if arguments.command == "table":
        write_table(arguments.source, arguments.out, arguments.molecules)
    else:
        print(
            json.dumps(
                {"benchmark": "contributions", **measure(arguments.out, arguments.molecules)}
            )
        )


def write_table(source: str, out: str, molecules: int) -> None:
    """Properties of molecules drawn from the column ``smiles`` of the table ``source``."""
    smiles = pd.read_csv(source)["smiles"].str.strip().sample(molecules, random_state=0)
    mols = [Chem.MolFromSmiles(text) for text in smiles]
    rows = [
        (text, *rdMolDescriptors.CalcCrippenDescriptors(mol), rdMolDescriptors.CalcTPSA(mol))
        for text, mol in zip(smiles, mols, strict=True)
    ]
    pd.DataFrame(rows, columns=["smiles", *COLUMNS]).to_csv(out, index=False)


def measure(out: str, molecules: int) -> dict[str, object]:
    """The figures of the models in ``out`` on ``molecules`` of its test part."""
    torch.set_num_threads(1)
    results = storage.read_object(storage.join(out, RESULTS_NAME), {"final.seeds": list[Any]})
    seeds = [seed["seed"] for seed in results["final"]["seeds"]]
    smiles = read_of_seeds(out, seeds, "test", list(COLUMNS))[0].smiles[:molecules]
    predictor = mb.PropertyPredictor.from_pretrained(out, interval=None)
    models = [member.saved for member in predictor.predictor.members]
    predictor.predict(smiles[:1])  # compiles what is not compiled yet
    began = time.perf_counter()
    predictor.predict(smiles)
    alone = time.perf_counter() - began
    table = predictor.predict(smiles, atom_contributions=True).to_pandas()
    both = time.perf_counter() - began - alone
    mols = [Chem.MolFromSmiles(text) for text in table["canonical_smiles"]]
    lists = [table[f"atom_contributions:{column}"] for column in COLUMNS]
    ways: dict[str, Parts] = {
        "without_atom": [np.stack(parts, axis=1) for parts in zip(*lists, strict=True)]
    }
    for name, steps in (("integrated_gradients", STEPS), ("gradient", 1)):
        ways[name] = [gradients(models, batch, steps) for batch in batches(predictor, smiles)]
    truth = [terms(mol) for mol in mols]
    ways["mean_of_element"] = mean_of_element(mols, truth)
    return {
        "molecules": len(mols),
        "atoms": sum(map(len, truth)),
        "models": len(models),
        "times_longer": round(both / alone, 1),
        "correlation": {
            name: {
                column: agreement(mols, parts, truth, place) for place, column in enumerate(COLUMNS)
            }
            for name, parts in ways.items()
        },
    }


def terms(mol: Chem.Mol) -> NDArray[np.float64]:
    """(N, 3) the terms of each atom and its hydrogens."""
    with_hydrogens = Chem.AddHs(mol)
    crippen = np.array(rdMolDescriptors._CalcCrippenContribs(with_hydrogens))
    polar = np.array(rdMolDescriptors._CalcTPSAContribs(with_hydrogens))
    of_all = np.column_stack([crippen, polar])
    N = mol.GetNumAtoms()
    owner = [
        atom.GetIdx() if atom.GetIdx() < N else atom.GetNeighbors()[0].GetIdx()
        for atom in with_hydrogens.GetAtoms()
    ]
    found = np.zeros((N, len(COLUMNS)))
    np.add.at(found, owner, of_all)
    return found


def batches(predictor: mb.PropertyPredictor, smiles: Sequence[str]) -> list[MoleculeBatch]:
    """One for each molecule, as the models see it with ``atom_contributions``."""
    asked = predictor.predictor.with_contributions(asked=True)
    table = _featurize(smiles, asked.conformers, asked, 256).molecules
    blocks = (
        block_from_table(table.slice(row, 1), np.zeros(1, np.int64)) for row in range(len(table))
    )
    return [
        MoleculeBatch.from_micro_batch(build_micro_batches(block, 0, 0, 1)[0]) for block in blocks
    ]


def gradients(models: list[SavedProperty], batch: MoleculeBatch, steps: int) -> NDArray[np.float64]:
    """(N, 3) mean over models of integrated gradients of the tokens of atoms, from their mean."""
    found = []
    for saved in models:
        tokens = run(saved, batch, unchanged)[0].detach()
        mean = tokens[batch.atom_token].mean(dim=0)
        start = tokens.index_copy(0, batch.atom_token, mean.expand(batch.max_atoms, -1))
        total = torch.zeros(batch.max_atoms, len(COLUMNS))
        for step in range(steps):
            share = (step + 0.5) / steps if steps > 1 else 1.0
            between = (start + share * (tokens - start)).requires_grad_()
            outputs = run(saved, batch, partial(replaced, between))[1]
            for place in range(len(COLUMNS)):
                (slope,) = torch.autograd.grad(outputs[0, place], between, retain_graph=True)
                total[:, place] += ((tokens - start) * slope).sum(dim=1)[batch.atom_token] / steps
        found.append(total.double().numpy() * saved.trained.standardisation.std)
    mean_of_models: NDArray[np.float64] = np.mean(found, axis=0)
    return mean_of_models


def unchanged(tokens: Tensor) -> Tensor:
    """The tokens themselves."""
    return tokens


def replaced(by: Tensor, _tokens: Tensor) -> Tensor:
    """Other tokens."""
    return by


def run(
    saved: SavedProperty, batch: MoleculeBatch, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The tokens that enter the first block, which ``change`` may replace, and the outputs of the model."""
    seen: list[Tensor] = []

    def hook(_module: object, _inputs: object, output: Tensor) -> Tensor:
        seen.append(change(output))
        return seen[0]

    handle = saved.model.encoder.input_norm.register_forward_hook(hook)
    try:
        outputs: Tensor = saved.model(batch)
    finally:
        handle.remove()
    return seen[0], outputs


def mean_of_element(mols: list[Chem.Mol], truth: Parts) -> Parts:
    """The mean of ``truth`` over all atoms of an element, for each of its atoms."""
    elements = [np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()]) for mol in mols]
    of_all, values = np.concatenate(elements), np.concatenate(truth)
    means = {number: values[of_all == number].mean(axis=0) for number in np.unique(of_all)}
    return [np.stack([means[number] for number in numbers]) for numbers in elements]


def agreement(mols: list[Chem.Mol], found: Parts, truth: Parts, place: int) -> dict[str, float]:
    """Correlations of ``found`` with ``truth`` for one property; molecules whose atoms have all the same term have none."""
    pairs = [(ours[:, place], theirs[:, place]) for ours, theirs in zip(found, truth, strict=True)]
    around = [Chem.GetAdjacencyMatrix(mol) + np.eye(mol.GetNumAtoms()) for mol in mols]
    summed = [
        (near @ ours, near @ theirs) for near, (ours, theirs) in zip(around, pairs, strict=True)
    ]
    within, neighbours = (
        [
            np.corrcoef(ours, theirs)[0, 1]
            for ours, theirs in some
            if np.ptp(ours) > 0 < np.ptp(theirs)
        ]
        for some in (pairs, summed)
    )
    ours, theirs = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return {
        "within_molecule": round(float(np.mean(within)), 3),
        "with_neighbours": round(float(np.mean(neighbours)), 3),
        "all_atoms": round(float(np.corrcoef(ours, theirs)[0, 1]), 3),
    }


if __name__ == "__main__":
    main()
