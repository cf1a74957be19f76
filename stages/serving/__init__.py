"""The serving wing: the endpoint through which applications send their own input to a device and get the answers.

It speaks the Open Inference Protocol (KServe version 2). `values` holds the requests and answers that every transport shares,
`inference` computes them on a device; the wings `http` and `grpc` are the transports. It imports the wings `devices` and
`models` of `stages`; `deploy` may import it.
"""
