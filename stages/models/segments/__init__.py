"""Loaded segments of models: the store of pieces, their interpreters, and the check of batches.

Start with `store`. Imports `bus`, `stages.models`, `stages.models.files` and `stages.models.runtime`; the stages, the load
generator and the demonstration may import it.
"""
