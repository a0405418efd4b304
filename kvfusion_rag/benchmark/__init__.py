"""Measures speed on this machine, with random weights of published shapes.

Cases (numbers of questions, documents and tokens) come in. Times, memory and their ratios to the machine's limits go
out. ``workload`` describes cases, ``shapes`` builds models and texts, ``hardware_limits`` computes the limits,
``speed`` and ``store_speed`` measure, and ``speed_table`` shows the figures. The room must not know real models or the
quality of answers.
"""
