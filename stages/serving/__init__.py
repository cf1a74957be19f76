"""The serving wing: the endpoint through which applications send their own input to a device and get the answers.

It speaks the Open Inference Protocol (KServe version 2). `values` holds the requests and answers that every transport shares.
It uses the device through ports and imports no other wing of `stages` but `models`. `deploy` may import it.
"""
