"""Codecs: signals to columns of bytes and back. All rounding of the project happens here.

``codec_for(spec, order=…)`` gives the codec of a selection. To add one: one file with a
``SignalCodec`` subclass, one line in ``registry.py``, one test file, one golden directory.
"""

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.order import IdOrder
from kdstore.codecs.planes import Plane
from kdstore.codecs.registry import codec_for, codec_named

__all__ = ["IdOrder", "Plane", "Positions", "SignalCodec", "codec_for", "codec_named"]
