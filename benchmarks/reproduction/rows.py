"""The rows of every table: one configuration each, in the paper's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

__all__ = [
    "ALL_TABLES",
    "BASELINE",
    "CAUSES",
    "CONTROL",
    "DEFAULT",
    "METHODS",
    "PLAIN_L1",
    "RECIPES",
    "SPEEDUPS",
    "Configuration",
    "by_worth",
]

Method = Literal[
    "baseline", "control", "spp", "one-shot columns", "gradual columns", "magnitude", "filters"
]
Masking = Literal["sample", "scale", "penalize"]  # the last one exists in the benchmark only


@dataclass(frozen=True)
class Configuration:
    """What one run does. The defaults are plain SPP at 4×, with the paper's settings.

    Args:
        method: ``"baseline"`` trains from scratch. All others start from the baseline.
        speedup: Factor by which the MACs of the convolutions are to fall.
        criterion, use_rank, A, u, crossing, recovery, masking: SPP's options. With
            ``masking="penalize"`` a column's weight decay grows with p, and no masks are drawn.
            With ``criterion="taylor"`` a column's importance is its weights times their gradients.
        interval: The pruning interval t, in steps of the full schedule.
        ratios: Share of columns to prune, by layer. None: the same in every layer.
        distillation: Share of the baseline's outputs in the loss, in [0, 1).
        lr: Factor of the learning rate throughout.
        pruning_lr: Another factor of it while pruning.
        retraining_lr: Another one in retraining, until it falls the first time.
        weight_decay: Weight decay of the convolutions while pruning and retraining. The last
            layer's is 250 times as large.
        classifier_decay: Weight decay of the last layer. None: 250 times ``weight_decay``.
        last_batch: Factor of the batch size from the first fall of the learning rate on.
        straight_through: Whether masks act in the forward pass only.
        score_decay: Importance is L1 norm + ``score_decay`` · importance at the update before.
        dead_filters: Whether filters whose output no layer reads count in columns' importance.
    """

    method: Method = "spp"
    speedup: float = 4
    criterion: Literal["l1", "l2", "taylor"] = "l1"  # the last one exists in the benchmark only
    use_rank: bool = True
    interval: int = 180
    A: float = 0.05
    u: float = 0.25
    crossing: float = 0.5
    recovery: bool = True
    masking: Masking = "sample"
    ratios: tuple[tuple[str, float], ...] | None = None
    distillation: float = 0.0
    lr: float = 1.0
    pruning_lr: float = 1.0
    retraining_lr: float = 1.0
    weight_decay: float = 0.004
    classifier_decay: float | None = None
    last_batch: int = 1
    straight_through: bool = False
    score_decay: float = 0.0
    dead_filters: bool = True

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
# Shares of columns that leave a tenth of the MACs, but prune less of the first layer, which has
# few columns and a fifth of the MACs.
LAYERS = ("conv1", "conv2", "conv3")
SHARED = tuple(zip(LAYERS, (0.76, 0.9375, 0.93), strict=True))
# Changes to plain SPP at 10×, each of which might raise the accuracy.
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

# Possible causes of the difference between the paper's accuracies and ours: one change each.
LEADS: dict[str, dict[str, Any]] = {
    "weight decay 0.002": {"weight_decay": 0.002},
    "weight decay 0.001": {"weight_decay": 0.001},
    "weight decay 0.0005": {"weight_decay": 0.0005},
    "weight decay 0.25 of the last layer instead of 1": {"classifier_decay": 0.25},
    "masks in the forward pass only": {"straight_through": True},
    "learning rate × 2 in retraining": {"retraining_lr": 2.0},
    "learning rate / 20 while pruning": {"pruning_lr": 0.05},
    "learning rate / 20 while pruning and retraining": {"pruning_lr": 0.05, "retraining_lr": 0.05},
    "last batches of 800": {"last_batch": 8},
    "importance as a running sum, 0.9": {"score_decay": 0.9},
    "filters that nothing reads don't count": {"dead_filters": False},
    "zero crossing nearer to R": {"crossing": 0.2},
    "scaled by 1 - p, not sampled": {"masking": "scale"},
    "penalties in the place of masks": {"masking": "penalize"},
}
# Also measured for the control and the simpler methods, to compare fairly.
LEADS_OF_OTHERS = ("weight decay 0.002", "weight decay 0.001", "weight decay 0.0005")
# Shares of columns that leave the same MACs, but more of the first layer; and all of it.
CONV1 = {
    4: {"more of conv1 kept": (0.6, 0.7875, 0.7875), "conv1 whole": (0.0, 0.75, 0.75)},
    10: {"more of conv1 kept": (0.76, 0.9375, 0.93), "conv1 whole": (0.0, 0.9, 0.9)},
}


def _causes() -> dict[str, Configuration]:
    rows = {"control": CONTROL}
    rows |= {f"control, {lead}": replace(CONTROL, **LEADS[lead]) for lead in LEADS_OF_OTHERS}
    for speedup in (4, 10):
        for method in ("SPP", "gradual L1 columns", "one-shot L1 columns"):
            plain = replace(METHODS[method], speedup=speedup)
            rows[f"{method}, {speedup}×"] = plain
            for lead, options in LEADS.items():
                if method == "SPP" or lead in LEADS_OF_OTHERS:
                    rows[f"{method}, {speedup}×, {lead}"] = replace(plain, **options)
        for lead, shares in CONV1[speedup].items():
            ratios = tuple(zip(LAYERS, shares, strict=True))
            rows[f"SPP, {speedup}×, {lead}"] = replace(TEN, speedup=speedup, ratios=ratios)
    return rows


CAUSES = _causes()

# Ways to train on, all with an eighth of the baseline's weight decay: what is added to SPP, and
# what of it simpler methods can have as well.
DECAY = 0.0005
SCALED: dict[str, Any] = {"masking": "scale"}
DISTILLED: dict[str, Any] = {"distillation": 0.7}
ADDED: dict[str, dict[str, Any]] = {
    "": {},
    ", scaled by 1 - p": SCALED,
    ", scaled, zero crossing nearer to R": SCALED | {"crossing": 0.2},
    ", scaled, twice the learning rate in retraining": SCALED | {"retraining_lr": 2.0},
    ", scaled, four times the learning rate in retraining": SCALED | {"retraining_lr": 4.0},
    ", scaled, twice the learning rate": SCALED | {"lr": 2.0},
    ", scaled, four times the learning rate": SCALED | {"lr": 4.0},
    ", scaled and distilled, twice the learning rate": SCALED | DISTILLED | {"lr": 2.0},
    ", scaled and distilled, four times the learning rate": SCALED | DISTILLED | {"lr": 4.0},
    ", twice the learning rate": {"lr": 2.0},
    ", four times the learning rate": {"lr": 4.0},
    ", scaled, importance by Taylor expansion": SCALED | {"criterion": "taylor"},
    ", penalties in the place of masks": {"masking": "penalize"},
    ", zero crossing nearer to R": {"crossing": 0.2},
    ", half as many pruning iterations": {"interval": 90},
    ", twice as many pruning iterations": {"interval": 360},
    ", scaled and distilled": SCALED | DISTILLED,
    ", distilled": DISTILLED,
}
ADDED_TO_OTHERS = (
    "",
    ", distilled",
    ", twice the learning rate",
    ", four times the learning rate",
)


def _recipes() -> dict[str, Configuration]:
    rows = {}
    for speedup in (10, 4, 2):
        added = dict(ADDED)
        if speedup in CONV1:
            shares = CONV1[speedup]["more of conv1 kept"]
            kept = {"ratios": tuple(zip(LAYERS, shares, strict=True))}
            more = {", scaled, more of conv1 kept": SCALED | kept}
            added = more | added | {", more of conv1 kept": kept}
            added[", scaled, distilled, more of conv1 kept"] = SCALED | DISTILLED | kept
        for method in ("SPP", "gradual L1 columns", "one-shot L1 columns"):
            plain = replace(METHODS[method], speedup=speedup)
            rows[f"{method}, {speedup}×, weight decay 0.004"] = plain
            for what, options in added.items():
                if method == "SPP" or what in ADDED_TO_OTHERS:
                    row = replace(plain, weight_decay=DECAY, **options)
                    rows[f"{method}, {speedup}×{what}"] = row
    return rows


RECIPES = _recipes()
RECOMMENDED = replace(DEFAULT, weight_decay=DECAY, **SCALED, **DISTILLED)

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
    "causes": list(CAUSES.values()),
    "recipes": list(RECIPES.values()),
}


def by_worth(tables: Sequence[str]) -> list[Configuration]:
    """The configurations of some tables, each once, the most informative ones first.

    The baseline, which all are compared with, comes first.
    """
    first = [BASELINE, DEFAULT]
    for speedup in (10, 4):
        first.append(replace(RECOMMENDED, speedup=speedup))
        gradual = METHODS["gradual L1 columns"]
        first.append(replace(gradual, speedup=speedup, weight_decay=DECAY))
    for name in ("SPP", "gradual L1 columns", "one-shot L1 columns"):
        plain = [replace(METHODS[name], speedup=speedup) for speedup in (4, 10)]
        first += [*plain, *(replace(row, weight_decay=DECAY) for row in plain)]
    first += [replace(DEFAULT, speedup=speedup) for speedup in (2, 6, 8)]
    criterion = [row for row in ALL_TABLES["table1"] if row.criterion == "l2"]
    ordered = [*first, *RECIPES.values(), CONTROL]
    for name in ("figure1", "table3", "table2"):
        ordered += ALL_TABLES[name]
    ordered += [*criterion, *(row for rows in ALL_TABLES.values() for row in rows)]
    wanted = {BASELINE, CONTROL, *(row for table in tables for row in ALL_TABLES[table])}
    return [row for row in dict.fromkeys(ordered) if row in wanted]
