"""The attention core as Pallas TPU kernels: what attend.py and cache.py do in XLA, in three kernels.

core.py is the function that attn.py calls, with its gradient; start.py makes what they start with; forward.py and
backward.py have the kernels; tile.py has what they share; call.py says how their operands lie in memory; fit.py says,
before anything is compiled, whether a config can use them, and with which sizes.
"""
