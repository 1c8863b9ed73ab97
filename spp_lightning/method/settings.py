"""The settings of a pruning run, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, get_args

from spp_lightning.method.groups import Criterion, Granularity
from spp_lightning.method.masks import Masking

__all__ = ["SPPSettings"]

_DEFAULT_SPEEDUP = 4.0


@dataclass(frozen=True)
class SPPSettings:
    """What to prune, how far and how fast. :class:`~spp_lightning.SPPPruner` tells what each is.

    Raises:
        ValueError: If an argument is outside its range or of another type, or both
            ``prune_ratio`` and ``speedup`` are given.

    >>> SPPSettings(speedup=4).ratio, SPPSettings().ratio
    (0.75, 0.75)
    """

    prune_ratio: float | Mapping[str, float] | None = None
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

    def __post_init__(self) -> None:
        if self.prune_ratio is not None and self.speedup is not None:
            raise ValueError(
                "`prune_ratio` and `speedup` must not both be given, as a speedup S means a ratio"
                f" of 1 - 1/S; got prune_ratio={self.prune_ratio} and speedup={self.speedup}."
            )
        if isinstance(self.prune_ratio, Mapping):
            if not self.prune_ratio:
                raise ValueError("`prune_ratio` must name at least one layer pattern, got {}.")
            for pattern, ratio in self.prune_ratio.items():
                _check("prune_ratio", pattern, "a dict by layer pattern", isinstance(pattern, str))
                _check(f"prune_ratio[{pattern!r}]", ratio, "in [0, 1)", 0 <= _number(ratio) < 1)
        elif self.prune_ratio is not None:
            ratio = self.prune_ratio
            _check("prune_ratio", ratio, "in [0, 1)", 0 <= _number(ratio) < 1)
        if self.speedup is not None:
            speedup = _number(self.speedup)
            finite = 1 <= speedup < math.inf
            _check("speedup", self.speedup, "a finite number of at least 1", finite)
        _check_choice("granularity", self.granularity, Granularity)
        _check_choice("criterion", self.criterion, Criterion)
        _check("use_rank", self.use_rank, "True or False", isinstance(self.use_rank, bool))
        _check("interval", self.interval, "a whole number of at least 1", _whole(self.interval, 1))
        _check("A", self.A, "in (0, 1]", 0 < _number(self.A) <= 1)
        _check("u", self.u, "in (0, 1)", 0 < _number(self.u) < 1)
        _check("crossing", self.crossing, "in (0, 1]", 0 < _number(self.crossing) <= 1)
        _check("recovery", self.recovery, "True or False", isinstance(self.recovery, bool))
        _check_choice("masking", self.masking, Masking)
        if self.layers is not None:
            is_list = isinstance(self.layers, Sequence) and not isinstance(self.layers, str)
            rule = "a list of at least one layer pattern"
            names = is_list and all(isinstance(pattern, str) for pattern in self.layers)
            _check("layers", self.layers, rule, names and len(self.layers) > 0)
        start = self.start_step
        _check("start_step", start, "a whole number of at least 0", _whole(start, 0))
        _check("seed", self.seed, "a whole number of at least 0", _whole(self.seed, 0))

    @property
    def ratio(self) -> float | Mapping[str, float]:
        """The pruning ratio asked for, of all layers or by pattern: given, or 1 − 1/speedup."""
        if self.prune_ratio is not None:
            return self.prune_ratio
        return 1 - 1 / (self.speedup or _DEFAULT_SPEEDUP)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain numbers, strings, lists and dicts, ``speedup`` as the ratio."""
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
        del plain["speedup"]
        return plain


def _number(value: object) -> float:
    """The value, if it is a number; else NaN, which is in no range."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return math.nan


def _whole(value: object, lowest: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= lowest


def _check(name: str, value: object, rule: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def _check_choice(name: str, value: object, choices: Any) -> None:
    allowed = get_args(choices)
    rule = "one of " + ", ".join(f'"{choice}"' for choice in allowed)
    _check(name, value, rule, value in allowed)
