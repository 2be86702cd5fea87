"""The few computations that carry the architectures, each behind one public function."""

from pallas_kernels.attention import attention as attention
from pallas_kernels.delta_rule import delta_rule as delta_rule
from pallas_kernels.linear_attention import linear_attention as linear_attention
from pallas_kernels.selective_scan import selective_scan as selective_scan
from pallas_kernels.wkv import wkv as wkv
