"""The committed results: the Markdown is what the rows give, and each row has its context."""

import ablation
import choices
import cifar10
import control_group
import deployed
import kill_resume
import latency_targets
import overhead
import pytest
import real_networks
import speed
import steps
import torch
import training_matrix
import zoo
from harness.context import RESULTS
from harness.results import Results
from torch import nn

REPORTS = {
    "choices": choices.report,
    "ablation_avx2": ablation.report,
    "cifar10_short": cifar10.report,
    "control_group": control_group.report,
    "kill_resume": kill_resume.report,
    "latency_targets": latency_targets.report,
    "onnx_avx2": deployed.report,
    "overhead_cpu": overhead.report,
    "real_networks": real_networks.report,
    "speed_avx2": speed.report,
    "speed_avx512": speed.report,
    "steps_cpu": steps.report,
    "training_matrix": training_matrix.report,
    "zoo_avx2": zoo.report,
}


@pytest.mark.parametrize("stem", REPORTS)
def test_committed_markdown_is_that_of_the_rows(stem, tmp_path):
    (tmp_path / f"{stem}.json").write_text((RESULTS / f"{stem}.json").read_text())
    copy = Results(stem, REPORTS[stem], tmp_path)
    copy.write_report()
    assert (tmp_path / f"{stem}.md").read_text() == (RESULTS / f"{stem}.md").read_text()
    for row in copy.rows():
        assert {"command", "date", "commit"} <= row["context"].keys()


@pytest.mark.filterwarnings("ignore")  # what the exporter to ONNX says
def test_a_row_of_speed_is_checked_and_complete():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 9, 9)
    row = speed.row_of("tiny", {0.5: 2.0}, conv, x, speed._column_layer, rounds=2, threads=1)
    assert row["error"] < 1e-6
    assert all(kernels.endswith(" ×1") for kernels in row["kernels"].values())
    assert row["theory"] == {"0.0": 1, "0.5": 2, "0.75": 4, "0.9": pytest.approx(10)}
    times = {key: value["p50"] for key, value in row["milliseconds"].items()}
    dense = ("eager", "eager, channels-last", "oneDNN, packed", "onnxruntime")
    assert tuple(times)[:4] == dense
    assert times[row["dense"]] == min(times[key] for key in dense)
