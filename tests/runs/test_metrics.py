"""The line of a round, as a person reads it."""

import math

from fdpg_fast.runs.metrics import progress_line

METRICS = {
    "loss": -0.0,
    "target/f": math.nan,
    "target/f_se": math.nan,
    "z/log_z": -0.004,
    "z/log_z_se": 0.0,
    "z/ess": 64.0,
    "target/ess": 8.0,
    "policy/kl_to_base": -0.001,
    "time/tokens_per_second": 1234.5,
}


def test_nothing_is_minus_zero_or_nan():
    """A feature that applied to no completion of the round has no mean, and a KL of 0 is estimated a little below."""
    start = "round  1/10  loss +0.000  E[f] – ± –  log Z 0.00 ± 0.00  ESS 8  KL(π‖a) 0.00  "
    assert progress_line(1, 10, METRICS, ["f"], 61.0) == start + "1,234 tok/s  1:01 left"
