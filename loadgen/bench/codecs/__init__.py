"""The codec benchmark (`deepar loadgen bench codecs`): codecs of the links on trained models.

Start with `benchmark`; `portraits` makes the inputs of the landmark models. Only the command line imports this wing.
"""

from loadgen.bench.codecs.benchmark import run

__all__ = ["run"]
