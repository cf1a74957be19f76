"""The serving benchmark (`deepar loadgen bench serve`): an endpoint and its peers under the same requests, in turn.

`deploy.commands.loadgen.serve` starts the processes; this wing sends the requests and judges. `deploy` may import it.
"""
