"""Solves a target of the whole network before a fit, and measures what was reached after it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from spp_lightning.method.groups import weight_of
from spp_lightning.method.pruner import SPPPruner
from spp_lightning.planning.coupled import CoupledPlanner
from spp_lightning.planning.latency import Bench, on_device, using_threads
from spp_lightning.planning.plan import Plan
from spp_lightning.planning.solve import Planner
from spp_lightning.planning.target import Target, TargetSettings
from spp_lightning.training.losses import MOST_MACS, step_loss

__all__ = ["given_plan", "report_end", "shape_of_inputs", "solved_plans"]

_BATCHES = 2  # of training data, on which the loss is computed
_LEAST_IMAGES = 8

Inputs = tuple[Tensor, ...]


def solved_plans(
    trainer: Trainer,
    pl_module: LightningModule,
    settings: TargetSettings,
    targets: Sequence[Target],
) -> list[Plan]:
    """Solve targets on rank 0; every rank gets the plans.

    Args:
        trainer: A Trainer at the start of a fit.
        pl_module: The network, on its device.
        settings: The settings.
        targets: The targets, by ascending speedup. Each plan prunes what the one before it prunes,
            and more.

    Returns:
        The plans of the targets that can be reached, at least one.

    Raises:
        ValueError: On every rank, if there is no example input or no target can be reached.
    """
    trainer.fit_loop.setup_data()  # on all ranks: they wait for each other
    outcome: tuple[list[dict[str, Any]], str] = ([], "")
    if trainer.is_global_zero:
        try:
            plans = _solve(trainer, pl_module, settings, targets)
            outcome = [plan.as_dict() for plan in plans], ""
        except ValueError as error:
            outcome = [], str(error)
    plain, problem = trainer.strategy.broadcast(outcome)
    if not plain:
        raise ValueError(problem)
    return [Plan.from_dict(plan) for plan in plain]


def given_plan(
    trainer: Trainer, pl_module: LightningModule, settings: TargetSettings
) -> Plan | None:
    """The MACs that the given ratios leave, and the latency if ``input_shape`` is given.

    Returns:
        A plan of the given ratios; None on other ranks than 0, or if nothing tells the shape of the
        inputs.
    """
    shown = settings.input_shape is not None
    if not trainer.is_global_zero or not (shown or pl_module.example_input_array is not None):
        return None
    try:
        inputs = _example_inputs(trainer, pl_module, settings)
        if settings.granularity == "coupled-channel":
            return CoupledPlanner(pl_module, inputs, settings).solve(None)
        return Planner(pl_module, inputs, settings).solve(None, latency=shown)
    except Exception as error:  # nobody has asked for MACs, so that nothing of them stops a fit
        if shown:
            raise
        rank_zero_info(f"SPP can't count the network's MACs: {error}")
        return None


def report_end(
    trainer: Trainer,
    pl_module: LightningModule,
    settings: TargetSettings,
    plan: Plan,
    pruner: SPPPruner,
) -> None:
    """Say what the fit reached, on rank 0: MACs and measured latency, dense and pruned."""
    if not trainer.is_global_zero:
        return
    try:
        dense_ms, ms = _measured_end(trainer, pl_module, settings, pruner)
    except Exception as error:  # a trained network must not be lost to a measurement
        rank_zero_warn(f"SPP could not measure the pruned network's latency: {error}")
        ended = plan.ended(pruner.num_pruned)
    else:
        ended = plan.ended(pruner.num_pruned, dense_ms, ms)
    rank_zero_info(f"SPP ends with:\n{ended.summary()}")


def _measured_end(
    trainer: Trainer, pl_module: LightningModule, settings: TargetSettings, pruner: SPPPruner
) -> tuple[float, float]:
    """Milliseconds of the network, unpruned and pruned, each as ``compact`` makes it."""
    device = on_device(settings.device, pl_module)
    inputs = tuple(x.to(device) for x in _example_inputs(trainer, pl_module, settings))
    pruned = copy.deepcopy(pl_module).eval().to(device)
    unpruned = copy.deepcopy(pruned)
    for name in pruner.layers:
        weight = weight_of(unpruned.get_submodule(name)).detach()
        weight[weight == 0] = 1e-3 * float(weight.abs().max()) or 1e-3
    with using_threads(settings.threads):
        bench = Bench(unpruned, inputs)
        return bench.dense_ms, bench.ms(bench.compacted(pruned))


def _solve(
    trainer: Trainer,
    pl_module: LightningModule,
    settings: TargetSettings,
    targets: Sequence[Target],
) -> list[Plan]:
    inputs = _example_inputs(trainer, pl_module, settings)
    if settings.granularity == "coupled-channel":
        return _reachable(CoupledPlanner(pl_module, inputs, settings), targets)
    planner = Planner(pl_module, inputs, settings)
    rank_zero_info(f"SPP measures the network, for {', '.join(map(str, targets))}.")
    if any(target.quantity != "layers" for target in targets):
        planner.loss = _step_loss(trainer, pl_module, planner)
    if any(target.quantity == "latency" for target in targets):
        planner.measure()
    return _reachable(planner, targets)


def _reachable(planner: Planner | CoupledPlanner, targets: Sequence[Target]) -> list[Plan]:
    """The plans of the first targets, up to one that can't be reached."""
    plans: list[Plan] = []
    for target in targets:
        try:
            plans.append(planner.solve(target))
        except ValueError as error:
            if not plans:
                raise
            rank_zero_info(f"SPP leaves out what can't be reached: {error}")
            break
        planner.go_beyond(plans[-1])
    return plans


def _step_loss(
    trainer: Trainer, pl_module: LightningModule, planner: Planner
) -> Callable[[nn.Module], float] | None:
    """The loss of ``training_step`` on a few batches; None if it gives none outside of a step."""
    batches = list(itertools.islice(_batches(trainer), _BATCHES))
    most = MOST_MACS["cuda" if pl_module.device.type == "cuda" else "cpu"]
    images = max(_LEAST_IMAGES, int(most / planner.loss_macs))
    loss = step_loss(batches, images, trainer.precision_plugin.train_step_context)
    try:
        loss(copy.deepcopy(pl_module).eval())
    except Exception as error:  # whatever a training_step raises outside of a training loop
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        rank_zero_info(
            "SPP estimates by the weights what layers cost: training_step gives no loss before the"
            f" fit ({why})."
        )
        return None
    return loss


def shape_of_inputs(
    trainer: Trainer, pl_module: LightningModule, settings: TargetSettings
) -> Sequence[int] | None:
    """The shape of a batch, where coupled channels need one and only the training data tells it."""
    coupled = settings.granularity == "coupled-channel"
    if not coupled or settings.input_shape or pl_module.example_input_array is not None:
        return settings.input_shape
    trainer.fit_loop.setup_data()  # on all ranks: they wait for each other
    return _example_inputs(trainer, pl_module, settings)[0].shape


def _example_inputs(
    trainer: Trainer, pl_module: LightningModule, settings: TargetSettings
) -> Inputs:
    """What the network is to be fast for: positional arguments on its device."""
    example: Any = pl_module.example_input_array
    if settings.input_shape is not None:
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(tuple(settings.input_shape), generator=generator)
    found = ""
    if example is None:
        first = next(_batches(trainer), None)
        image = first[0] if isinstance(first, (list, tuple)) and first else first
        example = image[:1] if isinstance(image, Tensor) and image.dim() else None
        found = f", and the first training batch is {_kind(first)}"
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        if pl_module.example_input_array is not None:
            found = f" that is a tensor or a tuple of tensors, but {_kind(example)}"
        raise ValueError(
            "`input_shape` must be given for a target of the whole network and for coupled"
            " channels, such as (1, 3, 224, 224): got None, the module has no `example_input_array`"
            f"{found}."
        )
    like = next((p for p in pl_module.parameters() if p.is_floating_point()), torch.empty(0))
    return tuple(x.to(like) if x.is_floating_point() else x.to(like.device) for x in inputs)


def _kind(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {', '.join(type(x).__name__ for x in value)}"
    return f"a {type(value).__name__}"


def _batches(trainer: Trainer) -> Iterator[Any]:
    """The first training batches; the fit starts with the same ones afterwards."""
    loaders = trainer.train_dataloader
    if loaders is None:
        return
    combined = CombinedLoader(loaders, "min_size")
    with _kept_generators(combined.flattened), isolate_rng():
        batches = [batch for batch, *_ in itertools.islice(combined, _BATCHES)]
    for batch in batches:
        yield trainer.strategy.batch_to_device(batch)


@contextmanager
def _kept_generators(loaders: list[Any]) -> Iterator[None]:
    """Set the loaders' own generators back afterwards, so that the fit sees the same order."""
    owners = [x for loader in loaders for x in (loader, getattr(loader, "sampler", None))]
    generators = {id(g): g for x in owners if (g := getattr(x, "generator", None)) is not None}
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        yield
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])
