"""The stages room: what a device, an edge and the cloud do, and everything they need of a model.

Imports `bus` only; the load generator and the command line may import it. Start with `node` (the loop of every stage),
`device`, and `hop` (edge and cloud). Wings: `models` cuts, checks, measures and loads models; `zoo` holds the models that
DeePar ships.
"""
