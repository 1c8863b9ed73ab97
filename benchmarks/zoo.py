"""25 networks of torchvision and timm: pruned, compared, saved, and timed at 1, 2 and 4×.

    pip install timm openvino
    python benchmarks/zoo.py --check        # pruned, compared and saved; nothing is timed
    python benchmarks/zoo.py --save         # all of it, with one thread and with two
    python benchmarks/zoo.py --save --only resnet18 "timm levit_256" --again

Every network has random weights. The method's own pruner sets columns to 0, without training, and
the compact network's outputs are compared with the pruned one's in float64, before and after a
file. The unpruned network is timed in onnxruntime, OpenVINO (float32) and torch.compile, in turns
with the compact networks; batch 1; with one thread by the CPU's time, which other work on the
machine hardly changes. A row that is saved already is left as it is, unless ``--again``
is given. Exits with 1 if a network fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.arguments import Options, make_parser, quiet
from harness.context import context
from harness.dense import compiled_call, onnx_bytes, onnx_session_call, openvino_call
from harness.results import Results, Row, markdown_table
from harness.rounds import Call, in_turns, keep_freed_memory, now, quantiles
from harness.zoo import ZOO, Network, error_of, is_equal_after_file, prepared, pruned
from torch import nn

from spp_lightning import compact, compact_report, count_macs

SPEEDUPS = (1, 2, 4)
WORST_ERROR = 1e-4  # relative to the largest output; or
WORST_ROUNDINGS = 2  # times the network's own rounding error
DENSE = ("onnxruntime", "OpenVINO", "torch.compile")


def check(name: str, network: Network) -> tuple[Row, dict[str, Call], nn.Module]:
    """What doesn't depend on time, the compact networks, and the unpruned one."""
    dense, example = prepared(network), network.example()
    row: Row = {"name": name, "family": network.family, "kind": network.kind}
    row |= {"size": network.size, "macs": {}, "error": {}}
    calls: dict[str, Call] = {}
    for speedup in SPEEDUPS:
        net = dense if speedup == 1 else pruned(dense, network, speedup)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = compact(net, example)
        key = f"{speedup}×"
        row["macs"][key] = sum(count_macs(fast, example).values())
        error, rounding = row["error"][key] = error_of(net, fast, network)
        allowed = max(WORST_ERROR, WORST_ROUNDINGS * rounding)
        assert error < allowed, f"{name} at {key}: error {error}, rounding {rounding}"
        calls[key] = partial(fast, example)
        if speedup == SPEEDUPS[-1]:
            with tempfile.TemporaryDirectory() as folder:
                row["file"] = is_equal_after_file(fast, network, Path(folder))
            assert row["file"], f"{name}: another output after a file"
            row["parts"] = list(compact_report(fast, example).parts)
    row["macs"]["dense"] = sum(count_macs(dense, example).values())
    return row, calls, dense


def dense_calls(
    dense: nn.Module, network: Network, threads: int, without: list[str]
) -> Iterator[tuple[str, Call]]:
    """The unpruned network in other runtimes; those that fail for it are left out, and said."""
    example = network.example()
    try:
        content = onnx_bytes(dense, example)
    except Exception as error:  # whatever an exporter raises
        print(f"  ONNX: {type(error).__name__}: {str(error).splitlines()[:1]}")
    else:
        image = example[0] if network.takes_list else example
        for key, make in (("onnxruntime", onnx_session_call), ("OpenVINO", openvino_call)):
            try:
                call = make(content, image, threads)
                call()
                yield key, call
            except Exception as error:
                print(f"  {key}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    if "torch.compile" in without:
        return
    try:
        yield "torch.compile", compiled_call(dense, example)
    except Exception as error:
        print(f"  torch.compile: {type(error).__name__}: {str(error).splitlines()[:1]}")


def measure(
    row: Row, ours: dict[str, Call], dense: nn.Module, network: Network, options: Options
) -> Iterator[Row]:
    """A row per number of threads."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        calls = ours | dict(dense_calls(dense, network, threads, options.without))
        with torch.no_grad():
            clock = time.process_time if threads == 1 else now
            times = in_turns(calls, options.rounds, clock)
        best = {key: quantiles(values) for key, values in times.items()}
        yield row | {"threads": threads, "milliseconds": best, "rounds": options.rounds}


def report(rows: list[Row]) -> str:
    """The rows as Markdown: MACs, then times by the number of threads."""
    head = ["network", "family", "MACs, millions: dense", "2×", "4×", "error", "in float32", "file"]
    firsts = {row["name"]: row for row in rows}
    facts = [
        [
            row["name"],
            row["family"],
            *(f"{row['macs'][key] / 1e6:,.0f}" for key in ("dense", "2×", "4×")),
            *(f"{max(pair[i] for pair in row['error'].values()):.0e}" for i in (0, 1)),
            "parts: " + ", ".join(row["parts"]) if row["parts"] else "equal",
        ]
        for row in firsts.values()
    ]
    lines = [markdown_table(head, facts)]
    for threads in sorted({row["threads"] for row in rows if "threads" in row}):
        clock = " of the CPU" if threads == 1 else ""
        lines += ["", f"Milliseconds{clock}, batch 1, threads: {threads}", ""]
        head = ["network", *DENSE, *(f"compact {s}×" for s in SPEEDUPS)]
        head += [f"fastest dense / {s}×" for s in SPEEDUPS]
        lines.append(markdown_table(head, [_times(x) for x in rows if x.get("threads") == threads]))
    return "\n".join(lines)


def _times(row: Row) -> list[str]:
    times = {key: value["p50"] for key, value in row["milliseconds"].items()}
    fastest = min((times[key] for key in DENSE if key in times), default=float("nan"))
    ours = [times[f"{s}×"] for s in SPEEDUPS]
    cells = [f"{times[key]:.2f}" if key in times else "–" for key in DENSE]
    return [
        row["name"],
        *cells,
        *(f"{ms:.2f}" for ms in ours),
        *(f"{fastest / ms:.2f}" for ms in ours),
    ]


def one(name: str, options: Options, results: Results) -> None:
    """Check, measure and save one network, in this process."""
    network = ZOO[name]
    row, ours, dense = check(name, network)
    print(name, {key: f"{error:.0e}" for key, (error, _) in row["error"].items()}, row["parts"])
    if options.check:
        return
    about: dict[str, Any] = {"batch": 1, "weights": "random", "seed": 0}
    versions = ("torchvision", "timm", "onnxruntime", "openvino")
    for measured in measure(row, ours, dense, network, options):
        print({key: value["p50"] for key, value in measured["milliseconds"].items()}, flush=True)
        if options.save:
            words = ["--rounds", options.rounds, "--threads", measured["threads"]]
            words += ["--without", *options.without] if options.without else []
            command = " ".join(map(str, ["python benchmarks/zoo.py --save", *words]))
            results.add(measured | {"context": context(*versions, **about) | {"command": command}})


def main() -> int:
    """Run each network in a process of its own; 1 if one of them fails."""
    parser = make_parser(__doc__, rounds=9, threads=[1, 2])
    parser.add_argument("--only", nargs="+", choices=ZOO, metavar="NAME", help="of these networks")
    parser.add_argument(
        "--without",
        choices=["torch.compile"],
        nargs="+",
        default=[],
        help="leave out what takes long to compile",
    )
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--again", action="store_true", help="also the networks that have rows")
    parser.add_argument(
        "--here", action="store_true", help="in this process, not in one of its own"
    )
    options = parser.parse_args()
    results = Results("zoo_avx2", report)
    quiet()
    keep_freed_memory()
    if options.here:
        one(options.only[0], options, results)
        return 0
    there = {(row["name"], row["threads"]) for row in results.rows()}
    failed = []
    for name in options.only or ZOO:
        wanted = [t for t in options.threads if options.again or (name, t) not in there]
        if not wanted and not options.check:
            continue
        flags = ["--save"] * options.save + ["--check"] * options.check
        flags += ["--without", *options.without] if options.without else []
        command = [sys.executable, __file__, "--here", "--only", name, *flags]
        command += ["--rounds", str(options.rounds), "--threads", *map(str, wanted or [1])]
        if subprocess.run(command).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all networks agree")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
