"""The rows of every table: one configuration each, in the paper's own units."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

__all__ = [
    "ALL_TABLES",
    "BASELINE",
    "CONTROL",
    "DEFAULT",
    "METHODS",
    "PLAIN_L1",
    "SPEEDUPS",
    "Configuration",
]

Method = Literal[
    "baseline", "control", "spp", "one-shot columns", "gradual columns", "magnitude", "filters"
]


@dataclass(frozen=True)
class Configuration:
    """What one run does; the defaults are the method's own at 4x.

    Args:
        method: ``"baseline"`` trains from scratch; the others go on from it.
        speedup: Factor by which the MACs of the convolutions are to fall.
        criterion, use_rank, A, u, crossing, recovery, masking: SPP's options.
        interval: The pruning interval t, in steps of the full schedule.
        ratios: Share of columns to prune by layer, where it isn't the same everywhere.
        distillation: Share of the baseline's answers in the loss, in [0, 1).
        pruning_lr: Factor of the learning rate while pruning.
    """

    method: Method = "spp"
    speedup: float = 4
    criterion: Literal["l1", "l2"] = "l1"
    use_rank: bool = True
    interval: int = 180
    A: float = 0.05
    u: float = 0.25
    crossing: float = 0.5
    recovery: bool = True
    masking: Literal["sample", "scale"] = "sample"
    ratios: tuple[tuple[str, float], ...] | None = None
    distillation: float = 0.0
    pruning_lr: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """What differs from the method's own settings at 4x."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("method", "speedup")
            and getattr(self, field.name) != field.default
        }

    @property
    def name(self) -> str:
        """A name for people, tables and folders."""
        parts = [self.method.replace(" ", "-")]
        if self.method not in ("baseline", "control"):
            parts.append(f"{self.speedup:g}x")
        for option, value in self.options.items():
            if option == "ratios":
                value = ",".join(f"{ratio:g}" for _, ratio in value)
            parts.append(f"{option}={value}")
        return " ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain, for JSON."""
        plain = asdict(self)
        plain["ratios"] = None if self.ratios is None else [list(pair) for pair in self.ratios]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Configuration:
        """The configuration that :meth:`as_dict` made plain."""
        ratios = plain.get("ratios")
        pairs = None if ratios is None else tuple((str(name), float(r)) for name, r in ratios)
        return cls(**{**plain, "ratios": pairs})


BASELINE = Configuration("baseline")
CONTROL = Configuration("control")
DEFAULT = Configuration()
PLAIN_L1 = replace(DEFAULT, use_rank=False)
SPEEDUPS = (2, 4, 6, 8, 10)
INTERVALS = (90, 120, 150, 180, 210, 240, 270)
SIZES = (0.01, 0.025, 0.05, 0.075, 0.1)
FLATNESS = (0.05, 0.125, 0.25, 0.375, 0.5)

# The methods that are compared, each at 2, 4 and 10 times fewer MACs.
METHODS: dict[str, Configuration] = {
    "SPP": DEFAULT,
    "SPP without recovery": replace(DEFAULT, recovery=False),
    "one-shot L1 columns": Configuration("one-shot columns"),
    "gradual L1 columns": Configuration("gradual columns"),
    "gradual unstructured magnitude": Configuration("magnitude"),
    "one-shot L1 filters": Configuration("filters"),
}
COMPARED = (2, 4, 10)

TEN = replace(DEFAULT, speedup=10)
# Shares of columns to prune that leave a tenth of the MACs, but more of the
# first layer, which has few columns and a fifth of the MACs.
SHARED = tuple(zip(("conv1", "conv2", "conv3"), (0.76, 0.9375, 0.93), strict=True))
# What might bring 10x nearer to the baseline, from the method's own on.
BEYOND: dict[str, Configuration] = {
    "the method's own": TEN,
    "scaled by 1 - p, not sampled": replace(TEN, masking="scale"),
    "zero crossing nearer to R": replace(TEN, crossing=0.25),
    "half as many pruning iterations": replace(TEN, interval=90),
    "three times as many pruning iterations": replace(TEN, interval=540),
    "a third of the learning rate while pruning": replace(TEN, pruning_lr=1 / 3),
    "distillation from the baseline": replace(TEN, distillation=0.7),
    "more of conv1 kept (10.0× fewer MACs, the others 10.1×)": replace(TEN, ratios=SHARED),
    "scaled and distilled": replace(TEN, masking="scale", distillation=0.7),
    "scaled, distilled, more of conv1": replace(
        TEN, masking="scale", distillation=0.7, ratios=SHARED
    ),
}

ALL_TABLES: dict[str, list[Configuration]] = {
    "table1": [
        replace(DEFAULT, speedup=speedup, criterion=criterion)
        for criterion in ("l1", "l2")
        for speedup in SPEEDUPS
    ],
    "table2": [replace(DEFAULT, interval=t) for t in INTERVALS],
    "table3": [replace(DEFAULT, A=A) for A in SIZES] + [replace(DEFAULT, u=u) for u in FLATNESS],
    "figure1": [DEFAULT, PLAIN_L1],
    "comparison": [
        replace(configuration, speedup=speedup)
        for speedup in COMPARED
        for configuration in METHODS.values()
    ],
    "beyond": list(BEYOND.values()),
}
