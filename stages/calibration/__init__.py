"""Codecs measured on a model's own activations: their sizes, their speed on this machine, and what they do to the outputs.

Start at `measurement`. Imports `bus`, `stages.models` and `stages.zoo`; the runner of a stage and the commands import it.
"""
