"""Without a GPU, Triton kernels run in its interpreter: chosen before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread: the tensors here are small, and on a busy machine two threads wait for each other.
torch.set_num_threads(1)
