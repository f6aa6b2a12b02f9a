"""Where, when and why two runs differ.

`record` hashes everything that a training step changes, step after step; `compare`, and on the
command line `churn-audit diff A B`, find the first difference of two such traces. `find_operator`
replays a step and names the operator that first makes different outputs of the same inputs. With a
`Training` that can be run again, `replay` does so for the step in which two traces part,
`attribute` says how much each suspect causes, `amplify` what becomes of a difference, and
`examine`, on the command line `churn-audit run`, all of it.
"""

from churn_kernels.audit.amplify import Amplification, amplify
from churn_kernels.audit.attribute import STRESS, Attribution, Share, attribute
from churn_kernels.audit.compare import Comparison, Difference, Generator, compare
from churn_kernels.audit.examine import Axis, Examination, examine
from churn_kernels.audit.iterators import Rewindable
from churn_kernels.audit.log import Operation, OperatorLog
from churn_kernels.audit.manifest import manifest, manifest_hash
from churn_kernels.audit.operators import (
    Differences,
    Finding,
    differences,
    find_operator,
)
from churn_kernels.audit.pairs import Pair, run_pair
from churn_kernels.audit.record import Recorder, record
from churn_kernels.audit.replay import Replayed, ReplayError, Training, load_target, replay
from churn_kernels.audit.report import write_report
from churn_kernels.audit.state import snapshot
from churn_kernels.audit.stress import AXES, Split, Stressed, split_batch, stress
from churn_kernels.audit.text import of_examination as describe
from churn_kernels.audit.trace import Step, Trace, TraceError
from churn_kernels.audit.twins import TWINS, Pins
from churn_kernels.hashing import HASH_SPEC, hash_of_words, hash_words, tensor_hash

__all__ = [
    "AXES",
    "HASH_SPEC",
    "STRESS",
    "TWINS",
    "Amplification",
    "Attribution",
    "Axis",
    "Comparison",
    "Difference",
    "Differences",
    "Examination",
    "Finding",
    "Generator",
    "Operation",
    "OperatorLog",
    "Pair",
    "Pins",
    "Recorder",
    "ReplayError",
    "Replayed",
    "Rewindable",
    "Share",
    "Split",
    "Step",
    "Stressed",
    "Trace",
    "TraceError",
    "Training",
    "amplify",
    "attribute",
    "compare",
    "describe",
    "differences",
    "examine",
    "find_operator",
    "hash_of_words",
    "hash_words",
    "load_target",
    "manifest",
    "manifest_hash",
    "record",
    "replay",
    "run_pair",
    "snapshot",
    "split_batch",
    "stress",
    "tensor_hash",
    "write_report",
]
