"""Whether trainer and servers hold the same model: log-probabilities of the same tokens, from both."""

from __future__ import annotations

from torch import Tensor

from megatron_trd.log import get_logger

logger = get_logger(__name__)

ALARM_NATS = {"fp32": 1e-3, "bf16": 0.5}
"""Beyond rounding: a healthy pair differs by 1e-5 in fp32 and by some hundredths in bf16."""


def watch_drift(ours_R: Tensor, served_R: Tensor, alarm_nats: float) -> dict[str, float]:
    """Return mean and largest difference of log-probabilities in nats, and warn about a large one.

    Args:
        ours_R: the trainer's, at the temperature that the tokens were sampled with.
        served_R: what the servers reported when they sampled them.
        alarm_nats: largest difference without a warning.
    """
    gap_R = (ours_R.double().cpu() - served_R.double().cpu()).abs()
    metrics = {"weights/logprob_gap_mean": gap_R.mean().item(), "weights/logprob_gap_max": gap_R.max().item()}
    if not metrics["weights/logprob_gap_max"] <= alarm_nats:  # a NaN is an alarm too
        logger.warning(
            "trainer and servers disagree on the log-probabilities of the same tokens: weights/logprob_gap_max %.2g, "
            "weights/logprob_gap_mean %.2g nats, alarm at %.2g (--drift-alarm-nats). Compare the servers with "
            "--check-weight-update-equal; see that they serve --hf-checkpoint in the trainer's precision, without "
            "quantization; where rounding alone explains it, raise the alarm",
            metrics["weights/logprob_gap_max"],
            metrics["weights/logprob_gap_mean"],
            alarm_nats,
        )
    return metrics
