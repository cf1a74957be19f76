"""`.tflite` files as bytes: validation, the schema's layout, writing, building by hand, and the user's cache folder.

Imports `bus` only; may be imported by all that handles models.
"""
