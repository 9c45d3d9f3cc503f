"""What is certified: objectives, options and heads, by name."""

from __future__ import annotations

from typing import Any

from pyrl.ops.spec import LossSpec

#: Every policy term at every ratio level it knows.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "reinforce": {"objective": "reinforce"},
    "clip": {"objective": "clip", "clip_high": 0.28},
    "clip, dual clip, delta": {"objective": "clip", "dual_clip": 1.5, "delta": 1.4},
    "clip, sequence": {"objective": "clip", "ratio_level": "sequence", "clip_low": 0.02},
    "clip, sequence_token": {"objective": "clip", "ratio_level": "sequence_token"},
    "cispo": {"objective": "cispo", "cispo_low": 0.7, "cispo_high": 1.4},
    "cispo, sequence": {"objective": "cispo", "ratio_level": "sequence"},
    "sapo": {"objective": "sapo"},
    "sapo, sequence": {"objective": "sapo", "ratio_level": "sequence"},
    "gmpo": {"objective": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
    "vespo": {"objective": "vespo"},
    "dppo, tv": {"objective": "dppo", "dppo_low": 0.05, "dppo_high": 0.05},
    "dppo, kl": {"objective": "dppo", "dppo_divergence": "kl", "dppo_low": 0.02, "dppo_high": 0.02},
}

_KL = {"kl_coef": 0.1}
_BOUNDS = {"correction_low": 0.8, "correction_high": 1.25}

#: Options that combine with every objective.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "kl k1": {"kl": "k1", **_KL},
    "kl k2": {"kl": "k2", **_KL},
    "kl k3": {"kl": "k3", **_KL},
    "kl abs": {"kl": "abs", **_KL},
    "kl k3_st": {"kl": "k3_st", **_KL},
    "kl k3, ratio weighted": {"kl": "k3", "kl_ratio_weighted": True, **_KL},
    "kl k3, clamped": {"kl": "k3", "kl_clamp": 0.05, **_KL},
    "entropy bonus": {"entropy_coef": 0.03},
    "kl and entropy": {"entropy_coef": 0.02, **_KL},
    "tis, token": {"correction": "tis", **_BOUNDS},
    "mis, token": {"correction": "mis", **_BOUNDS},
    "icepop, token": {"correction": "icepop", **_BOUNDS},
    "tis, sequence": {"correction": "tis", "correction_level": "sequence", **_BOUNDS},
    "mis, sequence": {"correction": "mis", "correction_level": "sequence", **_BOUNDS},
    "icepop, geometric": {"correction": "icepop", "correction_level": "geometric", **_BOUNDS},
    "off-policy mask": {"off_policy_threshold": 0.05},
    "sequence_mean": {"aggregation": "sequence_mean"},
    "sequence_sum": {"aggregation": "sequence_sum"},
    "constant": {"aggregation": "constant", "max_length": 16},
    "weighted": {"aggregation": "weighted"},
    "all at once": {
        "kl": "k3",
        "kl_ratio_weighted": True,
        "kl_clamp": 0.3,
        "entropy_coef": -0.02,
        "correction": "tis",
        "off_policy_threshold": 0.05,
        "aggregation": "sequence_mean",
        **_KL,
    },
}

#: The option under which everything but the objective is tried: both waists have work to do.
BOTH = "kl and entropy"
#: Objectives on which heads, shapes and supports are tried: one that is formed in a single pass,
#: one that couples the tokens of a sequence.
TWO = ("clip", "clip, sequence")
#: In their place for so many tokens that some lie on clip's edge, whatever the batch.
MANY = ("cispo", "clip, sequence")

#: Heads: settings of the spec, and options of the batch (see `measure.linear_row`).
HEADS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "bias": ({}, ("bias",)),
    "temperature 0.7": ({"temperature": 0.7}, ()),
    "temperature per token": ({}, ("temperature per token",)),
    "softcap 5": ({"softcap": 5.0}, ()),
    "logit scale 0.25": ({"logit_scale": 0.25}, ()),
    "padded vocabulary": ({}, ("bias", "padded vocabulary")),
    "LoRA, not merged": ({}, ("lora",)),
    "ref_hidden, ref_weight": ({}, ("bias", "reference head")),
    "all": (
        {"temperature": 1.3, "softcap": 4.0, "logit_scale": 1.7},
        ("bias", "lora", "padded vocabulary", "temperature per token"),
    ),
}
#: The same for `logits_policy_loss`.
LOGITS_HEADS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "in-place gradient": ({}, ("in place",)),
    "temperature, softcap, scale": (
        {"softcap": 4.0, "logit_scale": 1.7},
        ("temperature per token",),
    ),
}


def spec(*parts: dict[str, Any]) -> LossSpec | None:
    """The spec that joins the parts; None where the combination is refused."""
    joined: dict[str, Any] = {}
    for part in parts:
        joined |= part
    try:
        return LossSpec(**joined)
    except ValueError:
        return None
