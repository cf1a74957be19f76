"""The side of edge and cloud: how they receive activations, compute or pass on, and send the outputs.

Start with `hop`; `edge_stage` and `cloud_stage` hold what differs. It imports the modules of `stages` and the wings
`measuring` and `network`; `loadgen` and `deploy` may import it.
"""
