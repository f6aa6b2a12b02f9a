"""What a run ran on: everything outside the script that may move a bit."""

import hashlib
import json
import os
import platform
import sys
from typing import Any

import numpy as np
import torch

from churn_kernels._backend import build_info
from churn_kernels.exact import EXACT_SPEC
from churn_kernels.hashing import HASH_SPEC
from churn_kernels.modes import get_reduction_mode

# Environment variables that change what libraries compute, or the order they do it in.
_VARIABLES = (
    "CHURN_BACKEND",
    "CHURN_CPU_ISA",
    "CHURN_REDUCTION_MODE",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "KMP_AFFINITY",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def manifest() -> dict[str, Any]:
    """Versions, devices, flags and threads of this process, as plain data.

    Two processes whose manifests have one `manifest_hash` differ in none of it.
    """
    backends = torch.backends
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "mkldnn": backends.mkldnn.is_available() and backends.mkldnn.enabled,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "flush_denormal": _flushes_subnormals(),
        "default_dtype": str(torch.get_default_dtype()),
        "churn_kernels": build_info(),
        "reduction_mode": get_reduction_mode(),
        "exact_spec": EXACT_SPEC,
        "hash_spec": HASH_SPEC,
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "devices": [],
    }
    if torch.cuda.is_available():
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        found["devices"] = [f"{p.name} {p.major}.{p.minor}" for p in properties]
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["cudnn"] = backends.cudnn.version()
        found["cudnn_deterministic"] = backends.cudnn.deterministic
        found["cudnn_benchmark"] = backends.cudnn.benchmark
        found["tf32"] = [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]
        found["driver"] = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return found


def manifest_hash(found: dict[str, Any]) -> str:
    """128 bits of a manifest, as 32 hexadecimal digits: what two laboratories can compare."""
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _flushes_subnormals() -> bool:
    smallest = torch.full((1,), 2.0**-126, device="cpu")
    return not bool((smallest * 0.5).item())
