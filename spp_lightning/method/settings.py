"""The settings of a pruning run: what each one means, its default, and its check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spp_lightning.method.checks import check, check_choice, is_whole, number
from spp_lightning.method.groups import Criterion, Granularity
from spp_lightning.method.masks import Masking

__all__ = ["SPPSettings"]

_DEFAULT_SPEEDUP = 4.0


@dataclass(frozen=True)
class SPPSettings:
    """What to prune, how far, and how fast.

    :class:`~spp_lightning.SPPCallback` and :class:`~spp_lightning.SPPPruner` take these as
    arguments of their own.

    Args:
        prune_ratio: Target sparsity in [0, 1). A float applies to every layer. A dict maps
            layer-name patterns (``fnmatch``) to ratios: the first matching pattern wins, and
            layers that match none are not pruned. Default: that of ``speedup=4``.
        speedup: Target speedup of the layers, dense MACs / pruned MACs, at least 1. Speedup S is
            the ratio 1 − 1/S. With coupled channels it is the speedup of the whole network, for
            which one ratio is solved. Give ``prune_ratio`` or ``speedup``, not both. Default: 4.
        granularity: The weight group that is pruned: ``"column"`` of the weight matrix (one
            position ``(c, i, j)`` across all filters that read channel ``c``), input
            ``"channel"``, ``"filter"``, or ``"coupled-channel"``: a channel with all that belongs
            to it in all layers that write, normalise and read it. Patterns of layers then match
            the layers that write channels.
        criterion: Importance of a group: its ``"l1"`` or ``"l2"`` norm.
        use_rank: Update p by the rank of the importance. False: by the importance itself, scaled
            like ranks.
        interval: Optimizer steps between two updates of p, at least 1.
        A: Change of p in one update for the least important group, in (0, 1].
        u: Flatness of the update, in (0, 1). A smaller ``u`` takes more updates to the target.
        crossing: Where the update changes sign, in (0, 1]: 0 is the rank of the last group to be
            pruned, 1 the rank of the most important group. SPP uses 0.5.
        recovery: Whether p may fall again, as in SPP.
        masking: ``"sample"`` draws a mask from p at every step, as in SPP. ``"scale"`` multiplies
            every group by 1 − p instead.
        layers: Patterns (``fnmatch``) of the layers to prune, convolutions and linear layers.
            Default: every convolution that is not depthwise, and linear layers of tokens where
            those take more MACs than the convolutions of the network (for which it must have an
            ``example_input_array``).
        start_step: Optimizer step of the first update.
        seed: Seed of the masks. The mask of a step depends on p, the seed and the step only.
        input_shape: Shape of a batch of inputs, ``(B, C, H, W)``. It shows how channels are
            coupled, and targets of the whole network are for such a batch. Default: the shape of
            the network's ``example_input_array``; in a fit else one image of the first training
            batch.

    Raises:
        ValueError: If an argument has the wrong type or is out of range, or if both
            ``prune_ratio`` and ``speedup`` are given.

    >>> SPPSettings(speedup=4).ratio, SPPSettings().ratio
    (0.75, 0.75)
    """

    prune_ratio: float | dict[str, float] | None = None
    speedup: float | None = None
    granularity: Granularity = "column"
    criterion: Criterion = "l1"
    use_rank: bool = True
    interval: int = 180
    A: float = 0.05
    u: float = 0.25
    crossing: float = 0.5
    recovery: bool = True
    masking: Masking = "sample"
    layers: Sequence[str] | None = None
    start_step: int = 0
    seed: int = 0
    input_shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.prune_ratio is not None and self.speedup is not None:
            raise ValueError(
                "`prune_ratio` and `speedup` must not both be given: a speedup S is the ratio"
                f" 1 - 1/S. Got prune_ratio={self.prune_ratio} and speedup={self.speedup}."
            )
        if isinstance(self.prune_ratio, Mapping):
            if not self.prune_ratio:
                raise ValueError("`prune_ratio` must name at least one layer pattern, got {}.")
            for pattern, ratio in self.prune_ratio.items():
                check("prune_ratio", pattern, "a dict by layer pattern", isinstance(pattern, str))
                check(f"prune_ratio[{pattern!r}]", ratio, "in [0, 1)", 0 <= number(ratio) < 1)
        elif self.prune_ratio is not None:
            ratio = self.prune_ratio
            check("prune_ratio", ratio, "in [0, 1)", 0 <= number(ratio) < 1)
        if self.speedup is not None:
            speedup = number(self.speedup)
            finite = 1 <= speedup < math.inf
            check("speedup", self.speedup, "a finite number of at least 1", finite)
        check_choice("granularity", self.granularity, Granularity)
        check_choice("criterion", self.criterion, Criterion)
        check("use_rank", self.use_rank, "True or False", isinstance(self.use_rank, bool))
        check("interval", self.interval, "a whole number of at least 1", is_whole(self.interval, 1))
        check("A", self.A, "in (0, 1]", 0 < number(self.A) <= 1)
        check("u", self.u, "in (0, 1)", 0 < number(self.u) < 1)
        check("crossing", self.crossing, "in (0, 1]", 0 < number(self.crossing) <= 1)
        check("recovery", self.recovery, "True or False", isinstance(self.recovery, bool))
        check_choice("masking", self.masking, Masking)
        if self.layers is not None:
            is_list = isinstance(self.layers, Sequence) and not isinstance(self.layers, str)
            rule = "a list of at least one layer pattern"
            names = is_list and all(isinstance(pattern, str) for pattern in self.layers)
            check("layers", self.layers, rule, names and len(self.layers) > 0)
        start = self.start_step
        check("start_step", start, "a whole number of at least 0", is_whole(start, 0))
        check("seed", self.seed, "a whole number of at least 0", is_whole(self.seed, 0))
        shape = self.input_shape
        if shape is not None:
            is_shape = isinstance(shape, Sequence) and not isinstance(shape, str) and len(shape) > 1
            counts = is_shape and all(is_whole(size, 1) for size in shape)
            check("input_shape", shape, "a shape such as (1, 3, 224, 224)", counts)

    @property
    def factor(self) -> float:
        """``speedup``, or its default."""
        return self.speedup or _DEFAULT_SPEEDUP

    @property
    def ratio(self) -> float | Mapping[str, float]:
        """Target sparsity, of all layers or by pattern: ``prune_ratio``, or 1 − 1/``speedup``."""
        if self.prune_ratio is not None:
            return self.prune_ratio
        return 1 - 1 / self.factor

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain numbers, strings, lists and dicts; ``speedup`` as its ratio.

        Coupled channels have no ratio that a speedup stands for: both are there.
        """
        ratio = self.ratio
        plain = asdict(self) | {
            "prune_ratio": (
                {pattern: float(share) for pattern, share in ratio.items()}
                if isinstance(ratio, Mapping)
                else float(ratio)
            ),
            **{name: int(getattr(self, name)) for name in ("interval", "start_step", "seed")},
            **{name: float(getattr(self, name)) for name in ("A", "u", "crossing")},
            "layers": None if self.layers is None else list(self.layers),
        }
        del plain["input_shape"]  # the groups that follow from it are compared by themselves
        if self.granularity == "coupled-channel" and self.prune_ratio is None:
            return plain | {"prune_ratio": None, "speedup": float(self.factor)}
        del plain["speedup"]
        return plain
