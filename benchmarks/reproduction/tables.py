"""The report in Markdown: our numbers beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from reproduction import paper
from reproduction.results import Results, Sample, layer_spread
from reproduction.rows import (
    BASELINE,
    BEYOND,
    CAUSES,
    COMPARED,
    CONTROL,
    DEFAULT,
    METHODS,
    PLAIN_L1,
    RECIPES,
    SPEEDUPS,
    Configuration,
    by_worth,
)
from reproduction.schedules import Schedule

__all__ = ["report"]

MISSING = "not measured"
WORTH = 0.5  # points of accuracy that count as a difference


def report(schedule: Schedule, results: Results, charts: list[str]) -> str:
    """The whole report of a schedule."""
    sections = {
        "table1": ("Table 1: criterion and speedup", _table1),
        "table2": ("Table 2: pruning interval, 4×", _table2),
        "table3": ("Table 3: A and u, 4×", _table3),
        "figure1": ("Figure 1: ranks against plain L1, R = 0.75", _figure1),
        "comparison": ("Is SPP better than what is simpler?", _comparison),
        "beyond": ("Beyond the paper: 10×", _beyond),
        "causes": ("Why the drop is larger than the paper's: one cause at a time", _causes),
        "recipes": ("What to add to SPP, and to what is simpler", _recipes),
    }
    parts = [f"# The appendix on the {schedule.name} schedule", _context(schedule, results)]
    parts += ["## Baseline", _baselines(results)]
    for name, (title, section) in sections.items():
        if name in schedule.tables:
            parts += [f"## {title}", section(results)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in charts]
    return "\n\n".join(parts) + "\n"


def _context(schedule: Schedule, results: Results) -> str:
    lines = results.every_line
    rows = by_worth(schedule.tables)
    missing = [row for row in rows if row not in results.lines]
    command = f"python benchmarks/appendix.py --schedule {schedule.name}"
    if not lines:
        return f"Nothing measured yet; `{command}` does it."
    seeds = sorted({line["seed"] for line in lines})
    hours = sum(line["seconds"] for line in lines) / 3600
    versions = {f"{name} {v}" for line in lines for name, v in line["versions"].items()}
    fewer = (
        ""
        if schedule.divisor == 1
        else f" Pruning intervals are a {schedule.divisor}th of the paper's t, which the rows name."
        f" This isn't the paper's schedule, and its accuracies aren't the paper's to compare with."
    )
    left = f" {len(missing)} of {len(rows)} configurations: {MISSING}." if missing else ""
    return (
        f"ConvNet, {_all(line['data'] for line in lines)}; baseline {schedule.baseline_steps:,}"
        f" steps, every other run {schedule.steps:,} more from its weights, precision"
        f" {_all(line['precision'] for line in lines)}.{fewer} {len(lines)} runs, seeds"
        f" {_all(seeds)}, {hours:.1f} hours of training in all;"
        f" {_all(line['device'] for line in lines)}; {_all(versions)};"
        f" {_all(line['date'] for line in lines)}; commits"
        f" {_all(line['commit'] for line in lines)}; `{command}`.{left}"
    )


def _baselines(results: Results) -> str:
    base, control = results.accuracy(BASELINE), results.accuracy(CONTROL)
    return _table(
        ("network", "accuracy, %", "paper"),
        [
            ("baseline", _show(base), f"{paper.BASELINE}"),
            ("control: baseline trained on, not pruned", _show(control), ""),
        ],
    )


def _table1(results: Results) -> str:
    rows = []
    for criterion in ("l1", "l2"):
        for speedup in SPEEDUPS:
            row = replace(DEFAULT, criterion=criterion, speedup=speedup)
            theirs = paper.TABLE1[criterion][speedup]
            rows.append(
                (
                    f"{criterion.upper()}, {speedup}×",
                    _show(results.accuracy(row)),
                    f"{theirs}",
                    _show(results.drop(row)),
                    f"{paper.BASELINE - theirs:.1f}",
                    _show(results.drop(row, CONTROL)),
                )
            )
    head = ("row", "accuracy, %", "paper", "drop to baseline", "paper's drop", "drop to control")
    return _table(head, rows)


def _table2(results: Results) -> str:
    rows = {replace(DEFAULT, interval=t): (f"t = {t}", p) for t, p in paper.TABLE2.items()}
    return _iterations(results, rows)


def _table3(results: Results) -> str:
    return _iterations(
        results,
        {replace(DEFAULT, A=A): (f"A = {A:g}", p) for A, p in paper.TABLE3_A.items()}
        | {replace(DEFAULT, u=u): (f"u = {u:g}", p) for u, p in paper.TABLE3_U.items()}
        # The defaults' row is in both halves of the paper's table, with the same numbers.
        | {DEFAULT: ("A = 0.05, u = 0.25", paper.TABLE3_A[DEFAULT.A])},
    )


def _iterations(
    results: Results, rows: Mapping[Configuration, tuple[str, tuple[int, float]]]
) -> str:
    table = []
    for row, (name, (iterations, accuracy)) in rows.items():
        ours = results.pruning_iterations(row)
        off = "" if ours is None else f"{100 * (ours.mean / iterations - 1):+.1f} %"
        updates = "" if ours is None else f"{ours.mean / row.interval:.0f}"
        table.append(
            (
                name if ours is None or results.finished(row) else f"{name} (target not reached)",
                updates,
                "" if ours is None else f"{ours.mean:,.0f}",
                f"{iterations:,}",
                off,
                _show(results.accuracy(row)),
                f"{accuracy}",
            )
        )
    head = ("row", "updates", "updates × t", "paper", "off by", "accuracy, %", "paper")
    text = _table(head, table)
    found = [(row, results.pruning_iterations(row)) for row in rows if results.finished(row)]
    known = [(row, sample) for row, sample in found if sample is not None]
    if known:
        within = sum(
            abs(sample.mean / rows[row][1][0] - 1) <= paper.TOLERANCE for row, sample in known
        )
        text += f"\n\n{within} of {len(known)} cells within {100 * paper.TOLERANCE:.0f} %."
        means = [sample.mean for row, _ in known if (sample := results.accuracy(row))]
        text += f" Accuracies from {min(means):.2f} to {max(means):.2f} %."
    return text


def _figure1(results: Results) -> str:
    rows = []
    for name, row in (("ranks", DEFAULT), ("plain L1", PLAIN_L1)):
        spreads = [layer_spread(line["curve"]) for line in results.of(row)]
        mean = Sample(tuple(100 * spread for spread, _ in spreads)) if spreads else None
        most = Sample(tuple(100 * distance for _, distance in spreads)) if spreads else None
        rows.append(
            (
                name,
                _show(mean),
                _show(most),
                _show(results.accuracy(row)),
                f"{paper.FIGURE1[name]}",
            )
        )
    head = (
        "criterion",
        "standard deviation over layers, mean over iterations, points",
        "largest distance of two layers, points",
        "accuracy, %",
        "paper",
    )
    return _table(head, rows)


def _comparison(results: Results) -> str:
    rows = []
    for name, method in METHODS.items():
        for speedup in COMPARED:
            row = replace(method, speedup=speedup)
            lines = results.of(row)
            macs = f"{lines[0]['conv_macs_dense'] / lines[0]['conv_macs']:.2f}×" if lines else ""
            latency = results.latencies.get(row)
            rows.append(
                (
                    f"{name}, {speedup}×",
                    macs,
                    _show(results.accuracy(row)),
                    _show(results.drop(row, CONTROL)),
                    f"{latency['speedup_64']:.2f}×" if latency else "",
                    f"{latency['speedup_1']:.2f}×" if latency else "",
                )
            )
    head = (
        "method",
        "fewer MACs",
        "accuracy, %",
        "drop to control",
        "faster, batch 64",
        "faster, batch 1",
    )
    timed = list(results.latencies.values())
    if not timed:
        return _table(head, rows)
    line = timed[-1]
    return (
        f"{_table(head, rows)}\n\nFaster: than the fastest dense network, `compact`'s kernels"
        f" included, all in turns; {line['device']}, {line['threads']} threads, torch"
        f" {line['versions']['torch']}, {line['date']}, commit {line['commit']};"
        " `python benchmarks/latency.py`."
    )


def _beyond(results: Results) -> str:
    rows = [
        (name, _show(results.accuracy(row)), _show(results.drop(row)), _gain(results, row))
        for name, row in BEYOND.items()
    ]
    head = ("what", "accuracy, %", "drop to baseline", "against the method's own, same seed")
    return (
        f"{_table(head, rows)}\n\nAll are compared on the test images, so the lead of the best one"
        " is a little too large."
    )


def _causes(results: Results) -> str:
    rows = []
    for name, row in CAUSES.items():
        if results.of(row):
            plain = CONTROL if row.method == "control" else replace(DEFAULT, speedup=row.speedup)
            rows.append(
                (
                    name,
                    _show(results.accuracy(row), 2),
                    _signed(None if row == plain else results.drop(plain, row), 2),
                    _show(results.drop(row), 2),
                    _show(results.numbers(row, "train_accuracy"), 2),
                    str(len(results.of(row))),
                )
            )
    head = (
        "row",
        "accuracy, %",
        "against plain SPP (control: against control)",
        "drop to baseline",
        "accuracy on training images, %",
        "seeds",
    )
    base = _show(results.numbers(BASELINE, "train_accuracy"), 2)
    parts = [
        _table(head, rows),
        f"Accuracy on training images: of every fifth one. The baseline's: {base}. Of {len(CAUSES)}"
        f" rows {len(CAUSES) - len(rows)} are {MISSING}.",
        *(_worth(results, speedup) for speedup in (4, 10)),
    ]
    return "\n\n".join(parts)


def _recipes(results: Results) -> str:
    rows = [
        (
            *(name, f"{row.weight_decay:g}", _show(results.accuracy(row), 2)),
            *(_show(results.drop(row), 2), str(len(results.of(row)))),
        )
        for name, row in RECIPES.items()
        if results.of(row)
    ]
    head = ("row", "weight decay", "accuracy, %", "drop to baseline", "seeds")
    return (
        f"{_table(head, rows)}\n\nOf {len(RECIPES)} rows {len(RECIPES) - len(rows)} are {MISSING}."
    )


def _worth(results: Results, speedup: float) -> str:
    """What each lead is worth, in a sentence for each sign."""
    plain = replace(DEFAULT, speedup=speedup)
    gains = {
        name.removeprefix(f"SPP, {speedup:g}×, "): gain.mean
        for name, row in CAUSES.items()
        if (row.method, row.speedup) == ("spp", speedup) and row != plain
        if (gain := results.drop(plain, row)) is not None
    }
    kinds = {
        "raise the accuracy by": [x for x in gains.items() if x[1] >= WORTH],
        "lower it by": [x for x in gains.items() if x[1] <= -WORTH],
        f"change it by less than {WORTH} points": [x for x in gains.items() if abs(x[1]) < WORTH],
    }
    said = [
        f"{what}: " + ", ".join(f"{lead} ({gain:+.2f})" for lead, gain in sorted(found, key=_last))
        for what, found in kinds.items()
        if found
    ]
    return f"At {speedup:g}×, from plain SPP: {'; '.join(said) or 'no lead measured'}."


def _last(pair: tuple[str, float]) -> float:
    return -pair[1]


def _gain(results: Results, row: Configuration) -> str:
    own = next(iter(BEYOND.values()))
    gain = None if row == own else results.drop(own, row)  # what its accuracy lacks to the row's
    return _signed(gain)


def _signed(sample: Sample | None, digits: int = 1) -> str:
    return "" if sample is None else f"{'+' if sample.mean > 0 else ''}{sample.show(digits)}"


def _show(sample: Sample | None, digits: int = 1) -> str:
    return MISSING if sample is None else sample.show(digits)


def _all(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in sorted(set(values), key=str))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
