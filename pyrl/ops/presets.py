"""Named losses: data only, no code of their own."""

from __future__ import annotations

from typing import Any

#: Names for points of the space; no code of their own. RAFT, RAFT++ and RLOO differ from reinforce
#: and clip in their advantages (`group_advantage(method="positive")`, `"rloo"`).
PRESETS: dict[str, dict[str, Any]] = {
    "reinforce": {"objective": "reinforce"},
    "raft": {"objective": "reinforce"},
    "raft++": {"objective": "clip"},
    "rloo": {"objective": "reinforce", "aggregation": "sequence_sum"},
    "ppo": {"objective": "clip"},
    "grpo": {"objective": "clip", "aggregation": "sequence_mean"},
    "bnpo": {"objective": "clip", "aggregation": "token_mean"},
    "dapo": {"objective": "clip", "clip_high": 0.28, "aggregation": "token_mean"},
    "dr_grpo": {"objective": "clip", "aggregation": "constant"},
    "gspo": {
        "objective": "clip",
        "ratio_level": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
    },
    "gspo_token": {
        "objective": "clip",
        "ratio_level": "sequence_token",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
    },
    "luspo": {"objective": "clip", "ratio_level": "sequence", "aggregation": "sequence_sum"},
    "cispo": {"objective": "cispo", "aggregation": "token_mean"},
    "sapo": {"objective": "sapo", "aggregation": "sequence_mean"},
    "gmpo": {
        "objective": "gmpo",
        "clip_low": 0.4,
        "clip_high": 0.4,
        "aggregation": "sequence_mean",
    },
    "vespo": {"objective": "vespo", "aggregation": "token_mean"},
    "dppo": {"objective": "dppo", "aggregation": "token_mean"},
}
