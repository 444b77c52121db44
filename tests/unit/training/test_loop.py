"""The loop in one process, on toy molecules."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import toy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moleblend_ray.data.batches.batch import StepBatch, build_micro_batches
from moleblend_ray.data.batches.order import DataOrder
from moleblend_ray.errors import ConfigError, TrainingError
from moleblend_ray.model.flops import pretraining_flops
from moleblend_ray.model.losses import LossConfig
from moleblend_ray.training import loop, optim
from moleblend_ray.training import step as step_module
from moleblend_ray.training.anomalies import NotFiniteError
from moleblend_ray.training.checkpoint import training_state
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import Record, read_records
from moleblend_ray.training.optim import learning_rate
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.saving import CheckpointWriter
from moleblend_ray.training.step import dropout_seed, molecules_checksum, train_step


def losses(records: Any) -> list[float]:
    return [record["loss"] for record in records]


def test_the_loss_falls_on_one_repeated_batch() -> None:
    learner = toy.learner(num_steps=20)
    batch = next(toy.steps())
    records = [train_step(learner, learner.prepare(batch))[0] for _ in range(20)]
    for name in ("loss", "loss_spd", "loss_edge", "loss_direction", "loss_denoise"):
        assert records[-1][name] < records[0][name]


def test_the_optimised_loss_is_the_weighted_sum_of_the_heads() -> None:
    learner = toy.learner()
    record, _ = train_step(learner, learner.prepare(next(toy.steps())))
    weights = learner.loss
    assert record["loss"] == pytest.approx(
        sum(
            weights.weight(name) * record[f"loss_{name}"]
            for name in ("spd", "edge", "direction", "denoise")
        ),
        rel=1e-6,
    )
    assert "loss_distance" not in record


def test_grouping_into_micro_batches_changes_neither_loss_nor_update() -> None:
    def one_batch_a_step() -> Any:
        order = DataOrder(toy.NUM_MOLECULES, toy.ORDER)
        for step in range(3):
            block = toy.concat([toy.molecule(int(i)) for i in order.global_batch(step)])
            micro = build_micro_batches(block, step, 0, len(block))
            yield StepBatch(step=step, micro_batches=tuple(micro))

    many = toy.records(toy.learner(num_steps=3), toy.steps())
    one = toy.records(toy.learner(num_steps=3), one_batch_a_step())
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    norms = [[record["grad_norm"] for record in records] for records in (many, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_an_update_follows_the_clipped_gradient_at_the_recorded_rate() -> None:
    learner = toy.learner(num_steps=6)
    learner = replace(learner, optim=replace(learner.optim, clip_norm=0.01))
    record, _ = train_step(learner, learner.prepare(next(toy.steps())))
    assert record["grad_norm"] > 1
    # Adam's first moment is a tenth of the first gradient.
    moments = [state["exp_avg"].norm() for state in learner.optimizer.state.values()]
    assert torch.stack(moments).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert {group["lr"] for group in learner.optimizer.param_groups} == {record["learning_rate"]}
    assert record["learning_rate"] == learning_rate(0, learner.optim, 6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_have_the_precision_asked_for_and_weights_and_gradients_stay_float32(
    precision: str,
) -> None:
    learner = toy.learner(precision=precision)
    products, gradients = set(), set()
    for layer in learner.model.encoder.layers:
        qkv = layer.get_submodule("attention.qkv")
        qkv.register_forward_hook(lambda *call: products.add(call[-1].dtype))
    for parameter in learner.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.add(p.grad.dtype))
    train_step(learner, learner.prepare(next(toy.steps())))
    assert products == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert gradients == {torch.float32}
    moments = tree_leaves(list(learner.optimizer.state.values()))
    assert {tensor.dtype for tensor in (*learner.model.parameters(), *moments)} == {torch.float32}


def test_records_say_what_a_step_saw() -> None:
    order = DataOrder(toy.NUM_MOLECULES, toy.ORDER)
    learner = toy.learner(num_steps=2)
    forward = pretraining_flops(learner.model.config)
    records = toy.records(learner, toy.steps())
    assert len(records) == 2
    for record in records:
        ids = order.global_batch(int(record["step"]))
        num_atoms = np.concatenate([toy.molecule(int(i)).num_atoms for i in ids])
        assert record["molecules"] == toy.ORDER.global_batch_size
        assert record["atoms"] == num_atoms.sum()
        assert record["model_flops"] == pytest.approx(3 * forward.of(num_atoms).sum())
        assert record["atoms_per_s"] == pytest.approx(record["atoms"] / record["step_s"])
        assert 0 < record["mfu"] < 1
        assert record["peak_memory_mib"] > 100
        assert (
            record["molecules_checksum"] == molecules_checksum(ids) != molecules_checksum(ids + 1)
        )
        slots = sum(
            len(micro) * micro.num_atoms.max()
            for micro in next(toy.steps(start=int(record["step"]))).micro_batches
        )
        assert record["padding_share"] == pytest.approx(1 - num_atoms.sum() / slots)
        assert 0 <= record["data_wait_s"] <= record["step_s"]


def test_a_batch_without_coordinates_has_no_geometry_losses() -> None:
    blocks = [
        replace(toy.molecule(i), position_mask=np.zeros(int(toy.molecule(i).num_atoms[0]), bool))
        for i in range(4)
    ]
    micro = build_micro_batches(toy.concat(blocks), 0, 0, 4)
    batch = StepBatch(step=0, micro_batches=tuple(micro))
    record, _ = train_step(toy.learner(), toy.learner().prepare(batch))
    assert {"loss", "loss_spd", "loss_edge"} <= record.keys()
    assert not {"loss_direction", "loss_denoise"} & record.keys()


def test_a_stream_that_ends_early_is_an_error_naming_the_step() -> None:
    with pytest.raises(TrainingError, match="ended before step 2 of 8"):
        fit(toy.learner(num_steps=8), islice(toy.steps(), 2))


def test_no_step_after_the_last_is_asked_of_the_stream() -> None:
    # Steps are prepared ahead; what follows the last one would wait for data that nobody makes.
    taken: list[int] = []

    def noted() -> Iterator[StepBatch]:
        for batch in toy.steps(start=2):
            taken.append(batch.step)
            yield batch

    fit(toy.learner(num_steps=5, prefetch_steps=4), noted(), start_step=2)
    assert taken == [2, 3, 4]


def test_a_stream_at_another_step_than_the_model_is_an_error_naming_both() -> None:
    with pytest.raises(TrainingError, match=r"gives step 4 where the model is at step 3"):
        fit(toy.learner(num_steps=8), toy.steps(start=4), start_step=3)


@pytest.mark.parametrize("gpu_code", [False, True])
def test_a_non_finite_loss_names_its_molecules_and_changes_nothing(
    gpu_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "on_gpu", lambda _: gpu_code)
    learner = toy.learner()
    first, batch = islice(toy.steps(), 2)
    train_step(learner, learner.prepare(first))
    micro = batch.micro_batches[1]
    micro.positions[:] = np.inf
    micro.position_mask[:] = True
    before = copy.deepcopy(training_state(learner.model, learner.optimizer))
    with pytest.raises(NotFiniteError) as caught:
        train_step(learner, learner.prepare(batch))
    assert f"molecule ids {[micro.molecule_ids.tolist()]}" in str(caught.value)
    after = training_state(learner.model, learner.optimizer)
    assert after.keys() == before.keys()
    assert len(after) > 20
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    counts = [value for name, value in after.items() if name.startswith("optimizer.step.")]
    assert max(counts).item() == 1.0


@pytest.mark.parametrize("overflows", ["loss", "gradient"])
def test_a_loss_or_gradient_that_overflows_alone_changes_nothing_either(
    overflows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = toy.learner()
    first, batch = islice(toy.steps(), 2)
    train_step(learner, learner.prepare(first))
    before = copy.deepcopy(training_state(learner.model, learner.optimizer))
    if overflows == "gradient":
        learner.model.spd_head.bias.register_hook(lambda gradient: gradient * torch.inf)
        told = "every micro-batch's loss is finite: the gradient overflowed"
    else:
        backward = step_module._backward
        monkeypatch.setattr(
            step_module, "_backward", lambda *given, **how: backward(*given, **how) + torch.inf
        )
        told = "in the micro-batches with molecule ids"
    with pytest.raises(NotFiniteError, match=told):
        train_step(learner, learner.prepare(batch))
    for name, value in training_state(learner.model, learner.optimizer).items():
        assert torch.equal(value, before[name]), name


def test_a_prepared_step_can_be_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = toy.learner()
    step = learner.prepare(next(toy.steps()))
    before = step.counts.clone()
    # In place, as over two ranks that have the same molecules.
    monkeypatch.setattr(step_module, "sum_over_ranks", lambda values: values.mul_(2.0))
    for _ in range(2):
        train_step(learner, step)
        torch.testing.assert_close(step.counts, before, rtol=0, atol=0)


def test_a_stop_ends_after_the_current_step() -> None:
    answers = iter([False, False, True])
    result = fit(
        toy.learner(num_steps=8), toy.steps(), hooks=Hooks(should_stop=lambda: next(answers))
    )
    assert (result.step, result.stopped) == (3, True)


def test_records_are_kept_no_longer_than_until_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Traced(dict[str, Any]):
        """A dict that can be watched."""

        __hash__ = object.__hash__  # type: ignore[assignment]

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def traced_step(*arguments: Any, **options: Any) -> tuple[Traced, bool]:
        nonlocal most
        most = max(most, len(alive))
        record, stop = train_step(*arguments, **options)
        traced = Traced(record)
        alive.add(traced)
        return traced, stop

    monkeypatch.setattr(loop, "train_step", traced_step)
    checkpoints = CheckpointWriter(
        CheckpointConfig(every_steps=2),
        str(tmp_path),
        Ranks(),
        identity={},
        config_fingerprint="",
        start_step=0,
    )
    fit(toy.learner(num_steps=8), toy.steps(), checkpoints=checkpoints)
    # Those since the last commit, and those of the save under way.
    assert 1 <= most <= 4
    assert [record["step"] for record in read_records(str(tmp_path))] == list(range(8))


def test_reports_come_at_their_interval_and_at_the_end() -> None:
    reported: list[int] = []
    fit(
        toy.learner(num_steps=7, log_every=3),
        toy.steps(),
        hooks=Hooks(report=lambda record: reported.append(int(record["step"]))),
    )
    assert reported == [2, 5, 6]


def test_validation_joins_the_record_of_its_step() -> None:
    records = toy.records(
        toy.learner(num_steps=5, validate_every=2),
        toy.steps(),
        validate=lambda: {"valid_loss": 1.5},
    )
    assert [r["step"] for r in records if "valid_loss" in r] == [1, 3, 4]


def test_every_validation_is_reported_whatever_the_interval_of_reports() -> None:
    records = toy.records(
        toy.learner(num_steps=7, validate_every=3, log_every=4),
        toy.steps(),
        validate=lambda: {"valid_loss": 1.5},
    )
    assert [r["step"] for r in records] == [2, 3, 5, 6]
    assert ["valid_loss" in r for r in records] == [True, False, True, True]


@pytest.mark.parametrize(("asked_at", "stopped", "validated"), [(1, True, []), (3, False, [1, 3])])
def test_a_stop_leaves_out_a_validation_but_not_the_last_one(
    asked_at: int, stopped: bool, validated: list[int]
) -> None:
    answers = iter(step == asked_at for step in range(4))
    records: list[Record] = []
    result = fit(
        toy.learner(num_steps=4, validate_every=2),
        toy.steps(),
        validate=lambda: {"valid_loss": 1.5},
        hooks=Hooks(should_stop=lambda: next(answers), report=records.append),
    )
    assert (result.step, result.stopped) == (asked_at + 1, stopped)
    assert [record["step"] for record in records if "valid_loss" in record] == validated


def test_dropout_differs_between_micro_batches_and_repeats_with_its_key() -> None:
    batch = next(toy.steps())
    seeds = {dropout_seed(5, micro) for micro in batch.micro_batches}
    assert len(seeds) == len(batch.micro_batches)
    again = {dropout_seed(5, micro) for micro in next(toy.steps()).micro_batches}
    assert seeds == again
    assert not seeds & {dropout_seed(6, micro) for micro in batch.micro_batches}


def test_dropout_does_not_depend_on_what_was_drawn_before() -> None:
    first, second = islice(toy.steps(), 2)

    def losses_of(batches: list[StepBatch]) -> float:
        learner = toy.learner(model=toy.DROPOUT_MODEL)
        # The same weights in each step.
        learner.optimizer.step = lambda **_: None  # type: ignore[method-assign]
        return losses(train_step(learner, learner.prepare(batch))[0] for batch in batches)[-1]

    assert losses_of([second]) == losses_of([first, second])


def test_ignored_bonds_are_counted() -> None:
    learner = toy.learner(
        model=replace(toy.MODEL, edge_other_class=False), loss=LossConfig(ignore_other_bonds=True)
    )
    record, _ = train_step(learner, learner.prepare(next(toy.steps())))
    assert record["other_bonds"] == 0
    block = toy.concat([toy.molecule(i) for i in range(8)])
    block.bond_features[:, 0] = 4  # a type of bond that the paper does not have
    step = learner.prepare(
        StepBatch(step=1, micro_batches=tuple(build_micro_batches(block, 1, 0, 3)))
    )
    record, _ = train_step(learner, step)
    hops = sum(int(part.spd[part.pair_mask].clamp(max=5).sum()) for part in step.molecules)
    assert record["other_bonds"] == hops > 0


def test_several_workers_without_a_strategy_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.strategy is none but 2 workers"):
        toy.learner(Ranks(world_size=2), strategy="none")


def test_activation_checkpointing_changes_no_number_and_keeps_less() -> None:
    """Dropout included: recomputing draws the same masks."""
    batch = next(toy.steps())

    def trained(*, checkpointing: bool) -> tuple[list[float], list[torch.Tensor], int]:
        learner = toy.learner(
            num_steps=3, model=toy.DROPOUT_MODEL, activation_checkpointing=checkpointing
        )
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            part = learner.prepare(batch).molecules[0]
            learner.model.encoder(part, None)
        steps = toy.records(learner, toy.steps())
        return losses(steps), list(learner.model.parameters()), sum(kept.values())

    plain, checkpointed = trained(checkpointing=False), trained(checkpointing=True)
    assert checkpointed[0] == plain[0]
    for one, other in zip(checkpointed[1], plain[1], strict=True):
        assert torch.equal(one, other)
    assert checkpointed[2] < 0.8 * plain[2]


class HostWaits(TorchDispatchMode):
    """Notes the operations for which the host must wait for the device."""

    WAITING: Final = {
        torch.ops.aten._local_scalar_dense.default,  # item, float, bool
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
        torch.ops.aten._unique2.default,
        torch.ops.aten.unique_consecutive.default,
        torch.ops.aten.bincount.default,
        torch.ops.aten.repeat_interleave.Tensor,
    }
    INDEXING: Final = {
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put_.default,
        torch.ops.aten._index_put_impl_.default,
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        by_mask = operator in self.INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if operator in self.WAITING or by_mask:
            self.found.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("ignore_other_bonds", [False, True])
def test_a_step_asks_the_device_for_nothing_until_its_record(
    ignore_other_bonds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = toy.learner(model=toy.DROPOUT_MODEL)
    learner = replace(learner, loss=replace(learner.loss, ignore_other_bonds=ignore_other_bonds))
    step = learner.prepare(next(toy.steps()))
    before_record: list[int] = []
    record = step_module._record

    def noted_record(*arguments: Any) -> Any:
        before_record.append(len(waits.found))
        return record(*arguments)

    monkeypatch.setattr(step_module, "_record", noted_record)
    # As on a GPU: on a CPU the optimizer looks at the step counts.
    monkeypatch.setattr(optim, "on_gpu", lambda _: True)
    with HostWaits() as waits:
        train_step(learner, step)
        after_record = len(waits.found)
        torch.ones(1)[torch.ones(1) > 0].item()
    assert before_record == [0]
    assert len(waits.found) == after_record + 2, "the counter counts nothing"
    # The values of the record itself: the gradient's norm, and the mean of each loss.
    assert set(waits.found[:after_record]) <= {"aten._local_scalar_dense.default"}
