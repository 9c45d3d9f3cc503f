"""Policies: a Hugging Face causal language model, loaded for packed training."""

from pyrl.models.lora import Adapters
from pyrl.models.named import model_folder
from pyrl.models.policy import Head, Policy, load_policy
from pyrl.models.probe import check_model
from pyrl.models.reference import AdapterSnapshot, FrozenCopy, Reference
from pyrl.models.smollm2 import pyrl_cache_dir, smollm2_folder

__all__ = [
    "AdapterSnapshot",
    "Adapters",
    "FrozenCopy",
    "Head",
    "Policy",
    "Reference",
    "check_model",
    "load_policy",
    "model_folder",
    "pyrl_cache_dir",
    "smollm2_folder",
]
