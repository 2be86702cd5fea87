"""Softmax attention; see `api.attention`."""

from pallas_kernels.attention.api import attention
from pallas_kernels.attention.options import merge

__all__ = ["attention", "merge"]
