"""Where, when and why two runs part ways.

`record` hashes everything that a training step changes, step after step; `compare`, and on the
command line `churn-audit diff A B`, find the first difference of two such traces. `find_operator`
replays a step and names the operator that first makes different outputs of the same inputs.
"""

from churn_kernels.audit.compare import Comparison, Difference, compare
from churn_kernels.audit.manifest import manifest, manifest_hash
from churn_kernels.audit.operators import (
    Differences,
    Finding,
    Operation,
    OperatorLog,
    differences,
    find_operator,
    snapshot,
)
from churn_kernels.audit.record import Recorder, record
from churn_kernels.audit.stress import AXES, Split, Stressed, split_batch, stress
from churn_kernels.audit.trace import Step, Trace, TraceError
from churn_kernels.hashing import HASH_SPEC, hash_of_words, hash_words, tensor_hash

__all__ = [
    "AXES",
    "HASH_SPEC",
    "Comparison",
    "Difference",
    "Differences",
    "Finding",
    "Operation",
    "OperatorLog",
    "Recorder",
    "Split",
    "Step",
    "Stressed",
    "Trace",
    "TraceError",
    "compare",
    "differences",
    "find_operator",
    "hash_of_words",
    "hash_words",
    "manifest",
    "manifest_hash",
    "record",
    "snapshot",
    "split_batch",
    "stress",
    "tensor_hash",
]
