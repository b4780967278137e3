"""What every test shares: one thread, so that tiny operations do not fight over cores and sums keep their order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
