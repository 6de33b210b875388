"""Arithmetic on this rank's own tensors. Nothing here knows of other ranks."""

from distclip._kernels.foreach import clamp_, clamp_each_, fill_where_, power_sums, scale_, scale_each_

__all__ = ["clamp_", "clamp_each_", "fill_where_", "power_sums", "scale_", "scale_each_"]
