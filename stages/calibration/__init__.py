"""Codecs measured on a model's own activations: their sizes, their speed on this machine, and what they do to the outputs;
and the speed of layers in batches.

Start at `measurement`. Imports `bus`, `stages.models` and `stages.zoo`; the runner of a stage and the commands import it.
"""
