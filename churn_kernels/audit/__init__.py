"""Where, when and why two runs part ways.

`record` hashes everything that a training step changes, step after step; `compare`, and on the
command line `churn-audit diff A B`, find the first difference of two such traces.
"""

from churn_kernels.audit.compare import Comparison, Difference, compare
from churn_kernels.audit.manifest import manifest, manifest_hash
from churn_kernels.audit.record import Recorder, record
from churn_kernels.audit.trace import Step, Trace, TraceError
from churn_kernels.hashing import HASH_SPEC, hash_of_words, hash_words, tensor_hash

__all__ = [
    "HASH_SPEC",
    "Comparison",
    "Difference",
    "Recorder",
    "Step",
    "Trace",
    "TraceError",
    "compare",
    "hash_of_words",
    "hash_words",
    "manifest",
    "manifest_hash",
    "record",
    "tensor_hash",
]
