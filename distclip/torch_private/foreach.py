"""The foreach operators: one call for a whole list of tensors. In 2.6 already, all of them as used.

torch's own objects, so that a call costs what it did and ``torch.compile`` knows them. (The kernels use them:
nothing here may know of other ranks.)
"""

from __future__ import annotations

import torch

foreach_norm = torch._foreach_norm
"""``(tensors, p, dtype=...)``: the norm of each, 0-dim."""

foreach_mul_ = torch._foreach_mul_
"""``(tensors, factor)``: multiply each by a 0-dim tensor, or by the tensor in its place in a list."""

foreach_add_ = torch._foreach_add_
"""``(tensors, numbers)``: add to each the Python number in its place, exactly where it is an int64."""

foreach_copy_ = torch._foreach_copy_
"""``(tensors, sources)``: copy each."""
