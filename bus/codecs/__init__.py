"""Codecs of activations on the links: `coding.encode` and `coding.decode` turn a sample's tensors into bytes and back.

Start at `coding`. Imports `bus.errors`, `bus.tensors` and `bus.values`; every room may import it.
"""
