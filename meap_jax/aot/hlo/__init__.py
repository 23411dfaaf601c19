"""The costs of one run of a compiled program, counted from its text: FLOPs, memory traffic, collectives.

XLA's own `cost_analysis()` counts the body of a loop once and a kernel at next to nothing, and is empty on GPUs. Here
a loop's body counts as often as it runs, and attention kernels count by formula. All figures are of one device.
"""

from meap_jax.aot.hlo.costs import Costs, analyze

__all__ = ["Costs", "analyze"]
