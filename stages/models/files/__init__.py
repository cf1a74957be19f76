"""`.tflite` files as bytes: validation, schema layout, writing, building by hand, and the user's cache folder.

Imports only `bus`; every module that handles models may import it.
"""
