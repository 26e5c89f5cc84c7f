"""Complete models that others wrote, on a mesh, without a plan.

`parallelize` makes the tokens of a model's blocks DTensors. Their placement
says where data lies, never what it means, so the model's own code goes on as
before. The files, in the order in which a call goes through them:

- `parallelize`: the call, what is learnt in the first one of a kind, and that it starts again where that is needed
  (`fallback`). `patching` brings it here, `call_key` says which calls are of a kind.
- `block_inputs`: where tokens become shards (`dtensor_utils`).
- `function_mode`: torch functions on shards; those in `registry` are done in `ops`: `slicing` by exchanges of rows
  (`reshard`), `concat`, `nn`.
- `lazy`: rows that move only when they are read.
- `op_cache`: what DTensor makes of an operation, by its operands.
- `dispatch_mode`: which operations are known to be right on shards; all others run on replicated tensors.
- `aliasing`: a write to what is a view on one device and a copy here is noticed before it happens.
- `recorder`, `report`: what was done, and what was sent for it. `numerics` compares outputs.
- `stored_weights`: weights that ranks store in parts, or in host memory, and fetch a block at a time.
- `capture`: calls that have settled as graphs of one rank, without all of this.
- `cfg`: the branches of a guided step at once, on the ranks of another mesh dim.
- `snapshot`: a module and all that it holds, to see if it has changed and to put it back, with a policy for each use.
"""

from __future__ import annotations

from meshdiff.autoshard.capture.graph_capture import Backend
from meshdiff.autoshard.cfg.batching import Guidance
from meshdiff.autoshard.parallelize import parallelize, storage_of
from meshdiff.autoshard.parallelized import NO_CAPTURE, Parallelized
from meshdiff.autoshard.report import Report
from meshdiff.autoshard.stored_weights import StoredWeights

__all__ = [
    "NO_CAPTURE",
    "Backend",
    "Guidance",
    "Parallelized",
    "Report",
    "StoredWeights",
    "parallelize",
    "storage_of",
]
