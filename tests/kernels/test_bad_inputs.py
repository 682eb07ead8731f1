"""Wrong arguments of the ops: a ValueError whose message names the argument and what would fit."""

import pytest
import torch

from fdpg_kernels import fdpg_loss, linear_logprob, sequence_weights
from support.kernel_cases import batch, head_batch

HEAD = {  # changed argument → what the message must say
    "hidden [N]": (dict(hidden=torch.zeros(6).double()), r"hidden must be \[N, D\].*\(6,\)"),
    "other D": (dict(weight=torch.zeros(11, 4).double()), r"one D; got \(6, 5\) and \(11, 4\)"),
    "weight 3-d": (dict(weight=torch.zeros(1, 11, 5).double()), r"weight \[V, D\]"),
    "mixed dtypes": (dict(weight=torch.zeros(11, 5)), "one floating dtype; got torch.float64 and torch.float32"),
    "integer hidden": (dict(hidden=torch.zeros(6, 5).long()), "floating dtype"),
    "target_ids short": (dict(target_ids=torch.zeros(5).long()), r"target_ids must be \[N\]=\[6\].*\(5,\)"),
    "target_ids float": (dict(target_ids=torch.zeros(6)), "target_ids must be .* integers"),
    "target_ids uint8": (dict(target_ids=torch.zeros(6, dtype=torch.uint8)), "signed integers; got .* torch.uint8"),
    "target = V": (dict(target_ids=torch.tensor([0, 1, 2, 3, 4, 11])), r"\[0, V=11\) or be -100"),
    "target −1": (dict(target_ids=torch.tensor([0, 1, 2, 3, 4, -1])), r"they span \[-1, 4\]"),
    "target −101": (dict(target_ids=torch.tensor([0, 1, 2, 3, -100, -101])), r"span \[-101, 3\]"),
    "bias [D]": (dict(bias=torch.zeros(5).double()), r"bias must be \[V\]=\[11\]; got \(5,\)"),
    "temperature 0": (dict(temperature=0.0), "temperature=0.0; it must be a positive number"),
    "temperature nan": (dict(temperature=float("nan")), "temperature=nan"),
    "softcap −1": (dict(softcap=-1.0), "softcap=-1.0; it must be a positive number"),
    "impl": (dict(impl="nonsense"), "impl='nonsense'; choose auto.*chunked.*reference"),
}
SEQUENCES = {
    "divergence": (dict(divergence="kl"), "unknown divergence 'kl'; choose one of forward_kl"),
    "ratio": (dict(ratio="token"), "ratio='token'; choose one of sequence, none"),
    "ratio_cap": (dict(ratio_cap=0.0), "ratio_cap=0.0; a cap must be a positive number, or None"),
    "ratio_drop": (dict(ratio_drop=0.0), "ratio_drop=0.0; it must be a positive number, or None"),
    "ratio_drop ratio_cap": (dict(ratio_drop=2.0, ratio_cap=2.0), "ratio_drop=2.0 leaves ratio_cap=2.0 nothing to cap"),
    "reward_cap": (dict(reward_cap=-2.0), "reward_cap=-2.0; a cap must be a positive number"),
    "impl": (dict(impl="nonsense"), "impl='nonsense'; choose auto.*chunked.*reference"),
    "behavior short": (dict(behavior_logprob=torch.zeros(5)), r"\(6,\) and \(5,\)"),
    "behavior elsewhere": (dict(behavior_logprob=torch.zeros(6, device="meta")), "on one device; got cpu, meta"),
    "score elsewhere": (dict(target_log_score=torch.zeros(2, device="meta")), "on one device; got cpu, meta"),
    "not from 0": (dict(cu_seqlens=torch.tensor([1, 3, 6])), "must rise from 0 to N=6; it runs from 1 to 6"),
    "not to N": (dict(cu_seqlens=torch.tensor([0, 3, 5])), "must rise from 0 to N=6; it runs from 0 to 5"),
    "falls": (dict(cu_seqlens=torch.tensor([0, 7, 6])), "must rise from 0 to N=6"),
    "cu_seqlens float": (dict(cu_seqlens=torch.tensor([0.0, 3.0, 6.0])), r"cu_seqlens must be a \[B\+1\] int32"),
    "no sequence": (dict(cu_seqlens=torch.tensor([0])), "B ≥ 1"),
    "score [B+1]": (dict(target_log_score=torch.zeros(3)), r"target_log_score must be \[B\]=\[2\]; got \(3,\)"),
    "log_z [B+1]": (dict(log_z=torch.zeros(3)), r"log_z must be a scalar or \[B\]=\[2\]; got \(3,\)"),
    "baseline [N]": (dict(baseline=torch.zeros(6)), r"baseline must be a scalar or \[B\]=\[2\]; got \(6,\)"),
}
PACKED = {
    "[B, T]": (dict(hidden=torch.zeros(2, 3, 5).double(), target_ids=torch.zeros(2, 3).long()), r"end to end; .*2, 3"),
    "ids [N, K]": (dict(target_ids=torch.zeros(6, 2).long()), r"target_ids must be \[N\].*\(6, 2\)"),
}
ACCUMULATION = {
    "total_sequences": (dict(total_sequences=0), "total_sequences=0; it must be a positive number, or None for B"),
    "weight_grad_out [D, V]": (dict(weight_grad_out=torch.zeros(5, 11)), r"weight_grad_out must be \(11, 5\) on cpu"),
    "weight_grad_out float16": (dict(weight_grad_out=torch.zeros(11, 5).half()), "must be a torch.float64 or"),
}


def cases(table):
    return pytest.mark.parametrize(("change", "message"), table.values(), ids=table.keys())


@cases(HEAD)
def test_linear_logprob(change, message):
    arguments = {k: v for k, v in head_batch([2, 4]).items() if k in ("hidden", "weight", "target_ids", "bias")}
    linear_logprob(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments | change)


@cases(SEQUENCES)
def test_sequence_weights(change, message):
    sequence_weights(**batch([2, 4]))
    with pytest.raises(ValueError, match=message):
        sequence_weights(**batch([2, 4]) | change)


@cases(HEAD | SEQUENCES | PACKED | ACCUMULATION)
def test_fdpg_loss(change, message):
    fdpg_loss(**head_batch([2, 4]))
    with pytest.raises(ValueError, match=message):
        fdpg_loss(**head_batch([2, 4]) | change)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "neyman_chi2"])
def test_an_infinite_price_of_zeros_is_refused_with_both_remedies(divergence, impl):
    for op, arguments in ((sequence_weights, batch([2, 4], zeros=True)), (fdpg_loss, head_batch([2, 4], zeros=True))):
        with pytest.raises(ValueError) as error:
            op(**arguments, divergence=divergence, impl=impl)
        for remedy in (divergence, "exp(b/beta)", "alpha:a with a < 1"):
            assert remedy in str(error.value)
