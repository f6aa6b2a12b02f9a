"""The losses as modules: each stores the keyword arguments of its function.

The options are attributes, checked when set: after `criterion.beta = ramp` the next call uses the
new value. They are saved in and restored from `state_dict`; `class_weight` is a buffer, so it
moves with the module. A call may override any: `criterion(logits, target, beta=0.5)`.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from churn_kernels import _checks, losses
from churn_kernels._compiler import with_compile_errors


class _LossModule(nn.Module):
    """Base class: stores and checks the keyword arguments of a loss, and calls it."""

    _function: ClassVar[Callable[..., Any]]
    _option_checks: ClassVar[Mapping[str, Callable[[str, object], Any]]]
    _defaults: ClassVar[dict[str, Any]]
    _has_class_weight: ClassVar[bool]

    class_weight: Tensor | None

    def __init_subclass__(
        cls, function: Callable[..., Any] | None = None, **checks: Callable[[str, object], Any]
    ) -> None:
        """Take the options of `function`; `checks` replace the default checks of some options.

        A user's class derived from one of these passes no function.
        """
        super().__init_subclass__()
        if function is None:
            return
        parameters = signature(function).parameters.values()
        keywords = [option for option in parameters if option.kind is Parameter.KEYWORD_ONLY]
        cls._function = staticmethod(function)
        cls._defaults = {option.name: option.default for option in keywords}
        cls._has_class_weight = cls._defaults.pop("class_weight", function) is not function
        cls._option_checks = {
            name: checks.get(name, _checks.OPTIONS[name]) for name in cls._defaults
        }
        for name in cls._defaults:
            setattr(cls, name, property(_reader(name), doc=f"`{name}` of the next call."))
        cls.__init__ = _with_signature(cls, keywords)  # type: ignore[method-assign]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._reject_unknown(options)
        if self._has_class_weight:
            weight = options.pop("class_weight", None)
            self.register_buffer(
                "class_weight", None if weight is None else _checks.class_weights(weight)
            )
        options = {**self._defaults, **options}
        for name, value in options.items():
            if value is Parameter.empty:
                raise TypeError(
                    f"{type(self).__name__}() requires {name}, got none; pass {name}=..., "
                    f"as in {self._function.__name__}"
                )
        self._options = {name: self._checked(name, value) for name, value in options.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._option_checks:
            self._options = {**self._options, name: self._checked(name, value)}
            return
        if name == "class_weight" and value is not None:
            value = _checks.class_weights(value)
        super().__setattr__(name, value)

    @with_compile_errors
    def _checked(self, name: str, value: object) -> Any:
        return self._option_checks[name](name, value)

    @with_compile_errors
    def _reject_unknown(self, options: Mapping[str, Any]) -> None:
        known = [*self._defaults, *["class_weight"] * self._has_class_weight]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} got an unexpected keyword argument {name!r}; "
                    f"its options are {', '.join(known)}"
                )

    def _evaluate(self, *inputs: Any, **overrides: Any) -> Any:
        options = self._options
        if self._has_class_weight:
            options = {**options, "class_weight": self.class_weight}
        if overrides:
            self._reject_unknown(overrides)
            options = {**options, **overrides}
        return self._function(*inputs, **options)

    def get_extra_state(self) -> dict[str, Any]:
        """The options, for `state_dict`: plain numbers, strings and None."""
        return dict(self._options)

    def set_extra_state(self, state: Any) -> None:
        """Set the options of a `state_dict`; options that it lacks stay unchanged.

        Raises: TypeError, ValueError for an unknown option or an invalid value.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"the state of {type(self).__name__} must be a dict of its options, got "
                f"{type(state).__name__}; load what state_dict() returned"
            )
        self._reject_unknown(state)
        checked = {name: self._checked(name, value) for name, value in state.items()}
        self._options = {**self._options, **checked}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # A state saved without options leaves them unchanged.
        state_dict.setdefault(prefix + _EXTRA_STATE_KEY_SUFFIX, {})
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """The keyword arguments that differ from the defaults, as written in a call."""
        shown = [
            f"{name}={value!r}"
            for name, value in self._options.items()
            if value != self._defaults[name]
        ]
        if self._has_class_weight and self.class_weight is not None:
            shown.append(f"class_weight=<{self.class_weight.numel()} weights>")
        return ", ".join(shown)


def _reader(name: str) -> Callable[[_LossModule], Any]:
    return lambda module: module._options[name]


def _with_signature(cls: type[_LossModule], keywords: Sequence[Parameter]) -> Callable[..., None]:
    """The constructor of a module, with its keyword arguments in the signature."""

    def __init__(self: _LossModule, **options: Any) -> None:
        super(cls, self).__init__(**options)

    own = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = Signature([own, *keywords])  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


class CodistillationLoss(_LossModule, function=losses.codistillation_loss):
    """`codistillation_loss` as a module.

    Args: the keyword arguments of `codistillation_loss`; also attributes.
    Shapes: logits, K tensors (N, C) or (..., C), or one (K, N, C); target (N,) or (...) int64 or
        None; the loss (), or of the target's shape.
    Raises: as `codistillation_loss`, when constructed, when an option is set, and when called.
    """

    def forward(
        self, logits: Sequence[Tensor] | Tensor, target: Tensor | None = None, **overrides: Any
    ) -> Any:
        """The loss of K models' logits, as `codistillation_loss` returns it."""
        return self._evaluate(logits, target, **overrides)


class RegularizedCrossEntropy(_LossModule, function=losses.regularized_cross_entropy):
    """`regularized_cross_entropy` as a module.

    Args: the keyword arguments of `regularized_cross_entropy`; also attributes.
    Shapes: logits (N, C) or (..., C); target (N,) or (...) int64; the loss (), or of the target's
        shape.
    Raises: as `regularized_cross_entropy`, when constructed, when an option is set, and when
        called.
    """

    def forward(self, logits: Tensor, target: Tensor, **overrides: Any) -> Any:
        """The loss of one model's logits, as `regularized_cross_entropy` returns it."""
        return self._evaluate(logits, target, **overrides)


class SymmetricKL(_LossModule, function=losses.symmetric_kl):
    """`symmetric_kl` as a module.

    Args: the keyword arguments of `symmetric_kl`; also attributes.
    Shapes: p_logits, q_logits (N, C) or (..., C); the divergence (), or (N,) or (...).
    Raises: as `symmetric_kl`, when constructed, when an option is set, and when called.
    """

    def forward(self, p_logits: Tensor, q_logits: Tensor, **overrides: Any) -> Tensor:
        """The divergence of two models' softmaxes, in nats."""
        return self._evaluate(p_logits, q_logits, **overrides)


class SoftmaxEntropy(_LossModule, function=losses.softmax_entropy):
    """`softmax_entropy` as a module.

    Args: the keyword arguments of `softmax_entropy`; also attributes.
    Shapes: logits (N, C) or (..., C); the entropy (), or (N,) or (...).
    Raises: as `softmax_entropy`, when constructed, when an option is set, and when called.
    """

    def forward(self, logits: Tensor, **overrides: Any) -> Tensor:
        """The entropy of one model's softmax, in nats."""
        return self._evaluate(logits, **overrides)


class UniformSKL(_LossModule, function=losses.uniform_skl):
    """`uniform_skl` as a module.

    Args: the keyword arguments of `uniform_skl`; also attributes.
    Shapes: logits (N, C) or (..., C); the divergence (), or (N,) or (...).
    Raises: as `uniform_skl`, when constructed, when an option is set, and when called.
    """

    def forward(self, logits: Tensor, **overrides: Any) -> Tensor:
        """The symmetric KL of one model's softmax to uniform, in nats."""
        return self._evaluate(logits, **overrides)


class DistillationLoss(
    _LossModule,
    function=losses.distillation_loss,
    alpha=_checks.share,
    temperature=_checks.squared_temperature,
):
    """`distillation_loss` as a module.

    Args: the keyword arguments of `distillation_loss`, of which `alpha` is required; also
        attributes.
    Shapes: student_logits (N, C) or (..., C); teacher_logits of the same shape, M of them, or one
        tensor with M along a dimension in front; target (N,) or (...) int64 or None; the loss (),
        or of the target's shape.
    Raises: as `distillation_loss`, when constructed, when an option is set, and when called.
    """

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        target: Tensor | None,
        **overrides: Any,
    ) -> Any:
        """The loss of the student's logits, as `distillation_loss` returns it."""
        return self._evaluate(student_logits, teacher_logits, target, **overrides)
