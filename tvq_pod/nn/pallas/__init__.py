"""The attention core as Pallas TPU kernels: three kernels that do what attend.py and cache.py do in XLA.

core.py has the function that attn.py calls, with its gradient; start.py makes the kernels' initial state; forward.py
and backward.py have the kernels; tile.py has their shared code; call.py has the layout of their operands in memory;
fit.py decides, before anything is compiled, whether a config can use them, and with which sizes.
"""
