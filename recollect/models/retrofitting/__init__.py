"""Retrofit: Multi-Token Attention or a memory in a trained Hugging Face model. Importing it registers the retrofitted classes."""

from recollect.models.retrofitting.convert import load_retrofitted, new_parameters, retrofit
from recollect.models.retrofitting.families import FAMILIES

__all__ = ["FAMILIES", "load_retrofitted", "new_parameters", "retrofit"]
