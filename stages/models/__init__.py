"""Models: read and hash a `.tflite` file, cut it into parts, verify and measure the parts, load them ready to run.

Start with `model` and `slicer`. Imports `bus`, `stages.models.files` and `stages.models.runtime`; stages, the zoo, the
load generator and the command line may import it.
"""
