"""Whole models that others wrote, on a mesh, untouched and without a plan.

`parallelize` makes the tokens of a model's blocks DTensors. Their placement
says where data lies, never what it means, so the model's own code goes on as
before. What keeps that right and fast:

- `blocks`: where tokens become shards.
- `functions`: torch functions on shards; some are done here (`handlers`): `cuts` by exchanges of
  `rows`, and `layers`.
- `pending`: rows that move only when somebody looks at them; `joins`, of which attention takes the parts.
- `known`: what DTensor has found out about an operation, kept.
- `guard`: which operations are known to be right on shards; all others run on whole tensors.
- `aliases`: a write to what is a view on one device and a copy here is noticed before it happens.
- `capture`: calls that have settled as programs of one rank, without all of this; `watch` sees what these would miss.
- `guidance`: the branches of a guided step at once, on the ranks of another mesh dim: calls (`branch_calls`) that are
  deferred (`deferred`) or rows of a batch (`branch_rows`), and the exchange of what they return (`branch_exchange`).
- `recorder`, `report`: what was done, and what was sent for it.
"""

from __future__ import annotations

from meshdiff.untouched.capture import Make
from meshdiff.untouched.guidance import Guidance
from meshdiff.untouched.parallel import Parallelized, parallelize
from meshdiff.untouched.report import Report

__all__ = ["Guidance", "Make", "Parallelized", "Report", "parallelize"]
