"""Every wrong argument: the exception, what it wants, what it got, and the remedy."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import churn_kernels as ck
from churn_kernels import _backend, _checks, _constants, _ops, reference

Z = torch.zeros(4, 5)
T = torch.zeros(4, dtype=torch.long)


def raises(error, message):
    return pytest.raises(error, match="^" + re.escape(message))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 1.0}, ValueError, "alpha must be in [0, 1), got 1.0; it moves weight"),
        ({"alpha": -0.1}, ValueError, "alpha must be in [0, 1), got -0.1; "),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, got '0.1'; pass a float"),
        ({"alpha": True}, TypeError, "alpha must be a number, got True; pass a float"),
        ({"alpha": [0.1]}, TypeError, "alpha must be a number, got [0.1]; pass a float"),
        (
            {"alpha": torch.tensor(0.1)},
            TypeError,
            "alpha must be a number, got a tensor; pass alpha.item()",
        ),
        (
            {"alpha": float("nan")},
            ValueError,
            "alpha must be finite, got nan; check how it was computed",
        ),
        ({"beta": -1}, ValueError, "beta must be >= 0, got -1.0; 0 switches the term off"),
        ({"beta": float("inf")}, ValueError, "beta must be finite, got inf; check how"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0; 1 leaves the logits"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite, got nan; "),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be in [0, 1], got 1.1; it is"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1], got -0.1; "),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0; pass None for all classes"),
        (
            {"top_k": 6},
            ValueError,
            "top_k must be at most the number of classes C = 5, got 6; pass None for all classes",
        ),
        ({"top_k": 2.0}, TypeError, "top_k must be an int, got 2.0; pass int(top_k)"),
        (
            {"top_k": torch.tensor(2)},
            TypeError,
            "top_k must be an int, got a tensor; pass top_k.item()",
        ),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None; pass int"),
        (
            {"renormalize_top_k": 1},
            TypeError,
            "renormalize_top_k must be True or False, got 1; pass bool(renormalize_top_k)",
        ),
        (
            {"regularizer": "max"},
            ValueError,
            "regularizer must be one of 'entropy', 'uniform_skl', got 'max'; pass one of these",
        ),
        (
            {"divergence": None},
            ValueError,
            "divergence must be one of 'skl', 'ce', 'l1', got None; pass one of these names",
        ),
        (
            {"reduction": "avg"},
            ValueError,
            "reduction must be one of 'none', 'mean', 'sum', got 'avg'; pass one of these names",
        ),
        (
            {"mode": "slow"},
            ValueError,
            "mode must be one of 'fast', 'run_to_run', 'invariant', 'exact', got 'slow'; pass one",
        ),
        (
            {"class_weight": [1.0] * 5},
            TypeError,
            "class_weight must be a tensor of shape (5,), got list; pass torch.as_tensor(",
        ),
        (
            {"class_weight": torch.ones(4)},
            ValueError,
            "class_weight must have shape (5,), one weight for each class, got (4,); list the",
        ),
        (
            {"class_weight": torch.ones(5, dtype=torch.long)},
            TypeError,
            "class_weight must be floating point, got int64; pass class_weight.float()",
        ),
        (
            {"class_weight": torch.ones(5, requires_grad=True)},
            ValueError,
            "class_weight must not require a gradient, the losses do not compute one for it; pass ",
        ),
        (
            {"class_weight": torch.ones(5, device="meta")},
            ValueError,
            "class_weight must be on the logits' device, cpu, got meta; pass class_weight.to(",
        ),
    ],
)
def test_options(backend, options, error, message):
    with raises(error, message):
        ck.codistillation_loss([Z, Z], T, **options)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        ([], ValueError, "logits must hold at least one model, got an empty sequence; pass [model"),
        (
            Z,
            ValueError,
            "logits must be a sequence of (N, C) tensors or one (K, N, C) tensor, got one tensor "
            "of shape (4, 5); pass [logits] for a single model",
        ),
        (
            torch.zeros(0, 4, 5),
            ValueError,
            "logits must hold at least one model, got shape (0, 4, 5); stack the models along",
        ),
        (
            {"a": Z},
            TypeError,
            "logits must be a list or tuple of (N, C) tensors or one (K, N, C) tensor, got dict; "
            "pass list(logits)",
        ),
        (
            [Z, np.zeros((4, 5))],
            TypeError,
            "logits[1] must be a tensor of shape (N, C), got ndarray; pass the model's output",
        ),
        (
            [Z[None], Z],
            ValueError,
            "logits[1] must have the shape of logits[0], (1, 4, 5), got (4, 5); all models must",
        ),
        (
            [Z[0]],
            ValueError,
            "logits[0] must have shape (N, C) or (..., C), got (5,); for one row of classes pass "
            "logits[0][None], for the single logit z (N,) of a binary classifier "
            "torch.stack([torch.zeros_like(z), z], -1)",
        ),
        (
            torch.zeros(4, 5, 2, 3),
            ValueError,
            "logits must be a sequence of (N, C) tensors or one (K, N, C) tensor, got one tensor "
            "of shape (4, 5, 2, 3); pass [logits] for a single model, list(logits) for K models of "
            "logits (..., C), with the classes in the last dimension: for (N, C, H, W) pass "
            "[logits.movedim(1, -1)]",
        ),
        (
            [Z.long(), Z.long()],
            TypeError,
            "logits[0] must be float32, float64, bfloat16 or float16, got int64; pass logits[0]",
        ),
        (
            torch.zeros(2, 4, 5, dtype=torch.long),
            TypeError,
            "logits must be float32, float64, bfloat16 or float16, got int64; pass logits.float()",
        ),
        (
            [torch.zeros(4, 0)],
            ValueError,
            "logits[0] must have at least one class, got shape (4, 0); the last dimension holds",
        ),
        (
            [Z, torch.zeros(4, 6)],
            ValueError,
            "logits[1] must have the shape of logits[0], (4, 5), got (4, 6); all models must see",
        ),
        (
            [Z, Z, Z.double()],
            TypeError,
            "logits[2] must have the dtype of logits[0], float32, got float64; pass logits[2].to(",
        ),
        (
            [Z, Z.to("meta")],
            ValueError,
            "logits[1] must be on the device of logits[0], cpu, got meta; pass logits[1].to(",
        ),
    ],
)
def test_logits(backend, logits, error, message):
    with raises(error, message):
        ck.codistillation_loss(logits, T)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            [0, 1, 2, 3],
            TypeError,
            "target must be an int64 tensor of shape (4,), got list; pass torch.as_tensor(target)",
        ),
        (T.int(), TypeError, "target must be int64 class indices, got int32; pass target.long()"),
        (
            torch.zeros(4, 5),
            TypeError,
            "target must be int64 class indices, got float32; pass class indices; class "
            "probabilities are not supported: for one-hot rows pass target.argmax(-1), for others "
            "distillation_loss with teacher_logits=target.log()",
        ),
        (
            torch.zeros(4),
            TypeError,
            "target must be int64 class indices, got float32; pass target.long()",
        ),
        (
            T.bool(),
            TypeError,
            "target must be int64 class indices, got bool; pass target.long()",
        ),
        (
            torch.zeros(4, 5).long(),
            ValueError,
            "target must have shape (4,), one class for each row of the logits, got (4, 5); for "
            "one-hot rows pass target.argmax(-1)",
        ),
        (
            T.view(2, 2),
            ValueError,
            "target must have shape (4,), one class for each row of the logits, got (2, 2); pass "
            "target.reshape(4,)",
        ),
        (
            T.to_sparse(),
            TypeError,
            "target must be a dense tensor, got one of layout sparse_coo; pass target.to_dense()",
        ),
        (
            T[:3],
            ValueError,
            "target must have shape (4,), one class for each row of the logits, got (3,); pass 4",
        ),
        (
            T[:, None],
            ValueError,
            "target must have shape (4,), one class for each row of the logits, got (4, 1); pass "
            "target.squeeze(-1)",
        ),
        (
            T.to("meta"),
            ValueError,
            "target must be on the logits' device, cpu, got meta; pass target.to(logits.device)",
        ),
    ],
)
def test_target(backend, target, error, message):
    with raises(error, message):
        ck.codistillation_loss([Z, Z], target)


@pytest.mark.parametrize("wrong", [5, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_target_out_of_range(backend, wrong, reduction, requires_grad):
    target = T.clone()
    target[2] = wrong
    message = (
        f"target must hold class indices in [0, 5), got {wrong} at row 2; "
        f"pass ignore_index for rows without a label"
    )
    z = Z.clone().requires_grad_(requires_grad)
    with raises(ck.TargetError, message) as caught:
        ck.codistillation_loss([z, z], target, reduction=reduction)
    assert isinstance(caught.value, IndexError)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value) == message
    assert ck.codistillation_loss([z, z], target, ignore_index=wrong).isfinite()


READING = (
    "one logits tensor of shape (4, 6, 5) holds K = 4 models' logits of N = 6 rows, whose target "
    "has shape (6,), got {}; for one model's logits of shape (B, T, C), and a target (B, T), pass "
    "[logits]"
)
TWO_CLASSES = (
    "logits must have at least 2 classes if there is a target, got C = 1, whose probability is "
    "always 1; for the single logit z (N, 1) of a binary classifier pass "
    "torch.cat([torch.zeros_like(z), z], -1)"
)
LAST = (
    "target must have shape {}, one class for each row of the logits, got {}; the classes are the "
    "last dimension of the logits: for (N, C, H, W), and a target (N, H, W), pass {}"
)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(4, 6, 5), (4, 6), READING.format("(4, 6)")),
        (torch.zeros(4, 6, 5), (24,), READING.format("(24,)")),
        (
            [torch.zeros(2, 5, 8, 9)],
            (2, 8, 9),
            LAST.format("(2, 5, 8)", "(2, 8, 9)", "logits.movedim(1, -1)"),
        ),
        (
            [torch.zeros(2, 5, 8)],
            (2, 8),
            LAST.format("(2, 5)", "(2, 8)", "logits.movedim(1, -1)"),
        ),
        (
            torch.zeros(2, 5, 8),
            (2, 8),
            LAST.format("(5,)", "(2, 8)", "[logits.movedim(1, -1)]"),
        ),
        (
            [torch.zeros(2, 3, 5)],
            (6,),
            "target must have shape (2, 3), one class for each row of the logits, got (6,); pass "
            "target.reshape(2, 3)",
        ),
        (
            [torch.zeros(4, 3)],
            (5,),
            "target must have shape (4,), one class for each row of the logits, got (5,); pass 4 "
            "labels, or the logits of 5 rows",
        ),
        ([torch.zeros(4, 1)], (4,), TWO_CLASSES),
        (torch.zeros(2, 4, 1), (4,), TWO_CLASSES),
        (
            [torch.zeros(4, 5, 1)],
            (4, 1),
            TWO_CLASSES + "; for classes in dimension 1 pass logits.movedim(1, -1)",
        ),
    ],
)
def test_shapes_that_mean_something_else(backend, logits, target, message):
    with raises(ValueError, message) as caught:
        ck.codistillation_loss(logits, torch.zeros(target, dtype=torch.long))
    assert str(caught.value) == message


def test_a_single_logit_is_refused_before_its_labels(backend):
    z = torch.randn(4, 1)
    for target in (torch.ones(4), torch.ones(4, 1), T + 1):  # as binary_cross_entropy takes them
        with raises(ValueError, TWO_CLASSES):
            ck.regularized_cross_entropy(z, target)
    two = torch.cat([torch.zeros_like(z), z], -1)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(z, torch.ones(4, 1))
    torch.testing.assert_close(ck.regularized_cross_entropy(two, T + 1), wanted)
    assert ck.codistillation_loss([z, z]) == 0  # without a target, one class is a distribution


UNBIND = "must be a dense tensor, got a nested one; pass torch.cat("


# PyTorch calls these prototypes, or deprecated.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Z.to_sparse(),
            TypeError,
            "must be a dense tensor, got one of layout sparse_coo; pass ",
        ),
        (
            lambda: Z.to_sparse_csr(),
            TypeError,
            "must be a dense tensor, got one of layout sparse_csr; ",
        ),
        (lambda: torch.nested.nested_tensor([Z, Z[:2]]), TypeError, UNBIND),
        (lambda: torch.nested.nested_tensor([Z, Z[:2]], layout=torch.jagged), TypeError, UNBIND),
        (
            lambda: torch.quantize_per_tensor(Z, 0.1, 0, torch.quint8),
            TypeError,
            "must be float32, float64, bfloat16 or float16, got quint8; pass logits.dequantize()",
        ),
        (
            lambda: Z.to("meta"),
            ValueError,
            "must hold data, got a tensor on the meta device, which has none; allocate the model "
            "with model.to_empty(device='cpu'), and load its weights",
        ),
    ],
)
def test_logits_that_are_not_dense(backend, make, error, message):
    kind = make()
    with raises(error, f"logits {message}"):
        ck.softmax_entropy(kind)
    first = "" if kind.is_meta else "[0]"
    with raises(error, f"logits{first} {message.replace('logits', 'logits' + first)}"):
        ck.codistillation_loss([kind, kind])
    if not kind.is_meta and not kind.is_quantized:
        with raises(error, f"logits[1] {message}"):
            ck.codistillation_loss([Z, kind])
        with raises(error, f"teacher_logits {message}"):
            ck.distillation_loss(Z, kind, T, alpha=0.5)
        with raises(error, f"runs[0] {message}"):
            ck.metrics.churn_report([kind, kind])
        with raises(error, f"logits {message}"):
            ck.metrics.prediction_confidence(kind)
    if kind.is_sparse:
        with raises(error, f"logits {message}"):
            ck.codistillation_loss(torch.stack([kind, kind]))
        with raises(error, f"class_weight {message}"):
            ck.codistillation_loss([Z, Z], T, class_weight=torch.ones(5).to_sparse())
        with raises(error, f"x {message}"):
            ck.exact_sum(kind)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN")
def test_logits_of_mkldnn(backend):
    with raises(TypeError, "logits must be a dense tensor, got one of layout _mkldnn; pass logits"):
        ck.softmax_entropy(Z.to_mkldnn())


def test_functions_of_one_model(backend):
    wrong = Z[0]
    with raises(ValueError, "logits must have shape (N, C) or (..., C), got (5,); for one row"):
        ck.regularized_cross_entropy(wrong, T)
    with raises(TypeError, "target must be an int64 tensor of class indices, got None; for the"):
        ck.regularized_cross_entropy(Z, None)
    for function in (ck.softmax_entropy, ck.uniform_skl):
        with raises(ValueError, "logits must have shape (N, C) or (..., C), got (5,); for one row"):
            function(wrong)
        with raises(ValueError, "top_k must be at most the number of classes C = 5, got 6; "):
            function(Z, top_k=6)
        with raises(ValueError, "reduction must be one of 'none', 'mean', 'sum', got None; "):
            function(Z, reduction=None)


def test_symmetric_kl(backend):
    with raises(TypeError, "p_logits must be a tensor of shape (N, C), got list; pass the model's"):
        ck.symmetric_kl([Z], Z)
    with raises(ValueError, "q_logits must have the shape of p_logits, (4, 5), got (3, 5); all"):
        ck.symmetric_kl(Z, Z[:3])
    with raises(TypeError, "q_logits must have the dtype of p_logits, float32, got float16; pass"):
        ck.symmetric_kl(Z, Z.half())


def test_distillation_loss(backend):
    with raises(ValueError, "teacher_logits must have the shape of student_logits, (4, 5), got"):
        ck.distillation_loss(Z, Z[:3], T, alpha=0.5)
    with raises(ValueError, "teacher_logits must hold at least one model, got an empty sequence"):
        ck.distillation_loss(Z, [], T, alpha=0.5)
    for wrong in (Z[0], torch.zeros(0, 4, 5), Z[None, None]):
        with raises(ValueError, "teacher_logits must be a tensor of the student's shape, a "):
            ck.distillation_loss(Z, wrong, T, alpha=0.5)
    with raises(ValueError, "alpha must be in [0, 1], got 1.5; it is a fraction"):
        ck.distillation_loss(Z, Z, T, alpha=1.5)
    with raises(ValueError, "temperature must be > 0, got -1.0; 1 leaves the logits as they are"):
        ck.distillation_loss(Z, Z, T, alpha=0.5, temperature=-1)


def test_numbers_of_other_libraries_are_numbers(backend):
    expected = ck.codistillation_loss([Z, Z], T, alpha=0.5, beta=2.0, top_k=2)
    numbers = {"alpha": np.float32(0.5), "beta": np.int64(2), "top_k": np.int32(2)}
    assert ck.codistillation_loss([Z, Z], T, **numbers) == expected


def test_a_cached_option_does_not_hide_a_wrong_one(backend):
    ck.codistillation_loss([Z, Z], T, beta=1, top_k=1)
    with raises(TypeError, "beta must be a number, got True; pass a float"):
        ck.codistillation_loss([Z, Z], T, beta=True, top_k=1)
    with raises(TypeError, "top_k must be an int, got 1.0; pass int(top_k)"):
        ck.codistillation_loss([Z, Z], T, beta=1, top_k=1.0)


def test_every_dtype_that_is_supported_is_accepted(backend):
    for dtype in _checks.DTYPES:
        assert ck.codistillation_loss([Z.to(dtype)] * 2, T).isfinite()


class TestBackends:
    def test_unknown(self):
        with (
            raises(
                ValueError,
                "backend must be one of 'cpu', 'cuda', 'triton', 'reference', got 'gpu'; available",
            ),
            ck.backend("gpu"),
        ):
            pass

    def test_not_part_of_this_version(self):
        with (
            raises(
                ValueError,
                "backend 'cuda' is not available; this version does not have it, GPUs use",
            ),
            ck.backend("cuda"),
        ):
            pass

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ("Triton is not installed; `pip install triton`", "pip install triton`; choose one"),
            (None, "PyTorch sees no CUDA device, and TRITON_INTERPRET=1 was not set"),
        ],
    )
    def test_triton_is_not_available(self, monkeypatch, missing, message):
        monkeypatch.delitem(_backend._OPS, "triton", raising=False)
        monkeypatch.setattr(_ops, "triton_missing", lambda: missing)
        with raises(ValueError, "backend 'triton' is not available; "), ck.backend("triton"):
            pass
        with pytest.raises(ValueError, match=message), ck.backend("triton"):
            pass

    @pytest.mark.parametrize(("found", "old"), [("3.5.1", True), ("3.6.0", False), ("4.0", False)])
    def test_an_old_triton_is_not_imported(self, monkeypatch, found, old):
        monkeypatch.setattr(_ops, "version", lambda name: found)
        want = "Triton 3.5.1 is too old: `pip install 'triton>=3.6'`" if old else None
        if _constants.CONSTANTS is not None:
            assert _ops.triton_missing() == want

    def test_triton_takes_cpu_tensors_only_in_its_interpreter(self, monkeypatch):
        monkeypatch.setitem(_backend._OPS, "triton", None)
        monkeypatch.setattr(_backend, "_INTERPRETED", False)
        message = "backend 'triton' takes CUDA tensors, got logits on cpu; pass logits.cuda"
        with ck.backend("triton"), raises(ValueError, message):
            ck.softmax_entropy(Z)

    def test_triton_takes_so_many_models(self, monkeypatch):
        monkeypatch.setitem(_backend._OPS, "triton", None)
        monkeypatch.setattr(_backend, "_INTERPRETED", True)
        message = (
            "backend 'triton' takes at most 8 models, teachers included, got 9; choose backend"
        )
        with ck.backend("triton"), raises(ValueError, message):
            ck.codistillation_loss([Z] * 9)

    @pytest.mark.parametrize(
        ("ops", "capability", "message"),
        [
            ({}, (9, 0), "Triton is not installed; `pip install triton`"),
            ({"triton": None}, (7, 5), "the kernels need a GPU of compute capability 8.0 or later"),
        ],
    )
    def test_a_gpu_that_cannot_run_the_kernels(self, monkeypatch, ops, capability, message):
        """The GPU is made up; what is asked of it is not."""
        monkeypatch.setattr(_backend, "_OPS", ops)
        monkeypatch.setattr(
            _ops, "triton_missing", lambda: "Triton is not installed; `pip install triton`"
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        assert message in _backend._gpu_problem(0)

    def test_a_gpu_that_can(self, monkeypatch):
        monkeypatch.setattr(_backend, "_OPS", {"triton": None})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        assert _backend._gpu_problem(0) is None

    def test_the_choice_ends_with_its_block(self, backend):
        def loss():
            return ck.codistillation_loss([Z.requires_grad_(), Z], T).grad_fn.name()

        before = loss()
        with ck.backend("reference"):
            assert "Fused" not in loss()
        with pytest.raises(KeyError), ck.backend("reference"):
            raise KeyError
        assert loss() == before
        assert ("Fused" in before) == (backend != "reference")

    def test_a_device_without_a_kernel_falls_back_once(self, monkeypatch):
        monkeypatch.setattr(_backend, "_chosen", None)
        monkeypatch.setattr(_backend, "_warned_devices", set())
        # What the reference would compute there, PyTorch cannot without the device.
        monkeypatch.setattr(reference, "loss", lambda logits, *others: (logits[0], None))
        with FakeTensorMode():
            z = torch.zeros(4, 5, device="xpu")
            with pytest.warns(
                RuntimeWarning, match="churn_kernels has no kernel for xpu tensors"
            ) as caught:
                loss = ck.codistillation_loss([z])
            assert loss.device.type == "xpu"
            assert caught[0].filename == __file__
            ck.codistillation_loss([z])  # a second warning would be an error

    def test_the_cpu_backend_refuses_other_devices(self):
        if "cpu" not in ck.available_backends():
            pytest.skip("the cpu backend was not built")
        with (
            ck.backend("cpu"),
            FakeTensorMode(),
            raises(ValueError, "backend 'cpu' takes CPU tensors, got logits on"),
        ):
            ck.softmax_entropy(torch.zeros(4, 5, device="xpu"))

    @pytest.mark.parametrize(
        ("variable", "value", "message"),
        [
            ("CHURN_BACKEND", "gpu", "CHURN_BACKEND=gpu: backend must be one of 'cpu', 'cuda',"),
            ("CHURN_BACKEND", "cuda", "CHURN_BACKEND=cuda: backend 'cuda' is not available;"),
            ("CHURN_REDUCTION_MODE", "best", "CHURN_REDUCTION_MODE=best: mode must be one of"),
        ],
    )
    def test_a_wrong_environment_variable_stops_the_import(
        self, monkeypatch, variable, value, message
    ):
        monkeypatch.setenv(variable, value)
        command = [sys.executable, "-c", "import churn_kernels"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 1
        assert message in result.stderr

    def test_the_environment_chooses(self, monkeypatch):
        monkeypatch.setenv("CHURN_BACKEND", "reference")
        monkeypatch.setenv("CHURN_REDUCTION_MODE", "run_to_run")
        program = (
            "import torch, churn_kernels as ck; z = torch.zeros(2, 3, requires_grad=True);"
            "print(ck.softmax_entropy(z).grad_fn.name(), ck.get_reduction_mode())"
        )
        command = [sys.executable, "-W", "error", "-c", program]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "Fused" not in result.stdout
        assert "run_to_run" in result.stdout
