"""The stages room: the work of devices, edges and the cloud, and the handling of models.

Imports `bus` only; the load generator and the command line may import it. Start with `node` (the loop of every stage).
Wings: `devices` holds the device's side, `hops` that of edge and cloud; `models` cuts, checks, measures and loads models;
`calibration` measures codecs on them; `zoo` holds the models that DeePar ships.
"""
