from pallas_kernels.delta_rule.api import delta_rule as delta_rule
