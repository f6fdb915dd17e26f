"""Int8 plans (W8A8), made from a float32 plan alone.

`sites` finds what is quantized, `statistics` measures activations while the plan draws images, `calibrate` chooses
scales, zero points and smoothing, `rewrite` puts QuantizeLinear and DequantizeLinear into a graph, and `int8` is the
whole way from plan to verified plan.
"""
