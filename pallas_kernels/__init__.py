"""The few computations that carry the architectures, each behind one public function."""

from pallas_kernels.selective_scan import selective_scan as selective_scan
