"""Transformer, control encoder and decoder in C, for CPUs with AMX: what the `amx` backends run instead of an engine."""
