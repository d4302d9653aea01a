"""The alarm about log-probabilities that trainer and servers do not share."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from megatron_trd.objectives.drift import watch_drift

OURS = torch.tensor([-1.0, -2.0, -3.0, -4.0])
SERVED = torch.tensor([-1.0, -2.25, -3.0, -3.5], dtype=torch.float64)


def test_mean_and_largest_difference() -> None:
    assert watch_drift(OURS, SERVED, 1.0) == {"weights/logprob_gap_mean": 0.1875, "weights/logprob_gap_max": 0.5}


@pytest.mark.parametrize(("alarm_nats", "warns"), [(0.5, False), (0.49, True)])
def test_the_alarm_names_tags_flag_and_remedies(
    alarm_nats: float, warns: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_trd"), "propagate", True)
    watch_drift(OURS, SERVED, alarm_nats)
    assert bool(caplog.records) == warns
    for word in ("weights/logprob_gap_max 0.5", "weights/logprob_gap_mean 0.19", "--drift-alarm-nats"):
        assert (word in caplog.text) == warns
    assert ("--check-weight-update-equal" in caplog.text) == warns


def test_nan_is_an_alarm(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_trd"), "propagate", True)
    assert math.isnan(watch_drift(torch.tensor([math.nan, 0.0]), torch.zeros(2), 1.0)["weights/logprob_gap_max"])
    assert "disagree" in caplog.text
