# SPDX-License-Identifier: Apache-2.0
# PyTorch face of the package.
"""Quantization simulation and training of live PyTorch modules."""

from .quantizer import Quantizer

__all__ = ["Quantizer"]
