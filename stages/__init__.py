"""The stages room: what a device, an edge and the cloud do, and everything they need of a model.

It may import `bus` only. `zoo` holds the models, `slicer`, `verify` and `profiler` cut, check and time them, `runner` is the
port through which a stage computes (`litert` for real, modelled for play), `shaper` holds links to their grants, `node` is
the loop that all roles share, `device` and `hop` (edge and cloud) are the roles.
"""
