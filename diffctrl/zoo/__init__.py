"""Embedded models, the generated worlds that they know, and the judge that reads their pictures.

Importing this package loads neither torch nor diffusers; `registry.load` does when it is called.
"""

from . import registry

__all__ = ["registry"]
