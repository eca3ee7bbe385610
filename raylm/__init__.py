"""raylm: from raw text to a served, compressed language model on Ray.

The package root imports nothing heavy: ``import raylm`` stays well under half a second.
"""

__version__ = "0.2.0"
