from pallas_kernels.wkv.api import WKVState as WKVState
from pallas_kernels.wkv.api import wkv as wkv
