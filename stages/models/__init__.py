"""Models: reading, hashing, cutting, verifying and measuring `.tflite` files.

Start with `model` and `slicer`. The wing imports `bus`, `stages.models.files` and `stages.models.runtime`; the stages, the
zoo, the load generator and the command line may import it.
"""
