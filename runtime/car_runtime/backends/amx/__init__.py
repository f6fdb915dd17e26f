"""Transformer, control encoder and decoder in C, for CPUs with AMX: what `amx` and `amx-fp32` run."""
