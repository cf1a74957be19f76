"""The models supplied with DeePar, and the loader for any model."""

from stages.models.model import Model
from stages.zoo.registry import ZooEntry, digits, list_models, load_model

__all__ = ["Model", "ZooEntry", "digits", "list_models", "load_model"]
