"""An expression made ready to run: nodes bound to the series there are, brought up to date by what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from interlock.coordinator.rules.cells import FILTERED, Cell, ScalarNode, VectorNode
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Negate,
    Number,
    Selector,
    Window,
    is_scalar,
)
from interlock.coordinator.rules.matching import Combined, Paired
from interlock.coordinator.rules.nodes import (
    Aggregated,
    Computed,
    Constant,
    Constantly,
    EachElement,
    Latest,
    NoElements,
    OnlyElement,
    OverWindow,
    Ranked,
    Time,
)
from interlock.coordinator.rules.operators import ARITHMETIC, COMPARISONS, ELEMENTWISE, RANKINGS, SETS, WINDOWED
from interlock.coordinator.rules.series import SeriesStore, Watch

_KEEP_NAME = ("last_over_time",)  # the only function that gives the sample itself


class Program:
    """`root.cells` are the expression's value after `update`. `timed`: it changes also where no sample comes."""

    def __init__(self, expression: Expression, store: SeriesStore, owner: int = 0) -> None:
        self.watches: list[Watch] = []
        self.timed = False
        self.judges_absence = False
        self._store = store
        self._owner = owner
        self._full = True
        self.scalar = self._build_scalar(expression) if is_scalar(expression) else None
        self.root = Constantly(self.scalar) if self.scalar is not None else self._vector(expression)
        self._started = False

    def update(self, at: float) -> tuple[bool, Sequence[int]]:
        """Bring `root.cells` up to date: (whether its slots are new ones, the slots that may have changed).

        EvaluationError where the series can't be evaluated; the next update then starts anew.
        """
        rebound = not self._started or any(watch.unbound for watch in self.watches)
        if rebound:
            self.root.bind()
            self._started = True
        full, self._full = self._full or rebound, True
        changed = self.root.update(at, full=full)
        self._full = False
        return rebound, changed

    # --- building

    def _watch(self, selector: Selector, window_s: float = 0.0) -> Watch:
        made = self._store.watch(selector, self._owner, window_s)
        self.watches.append(made)
        return made

    def _build_scalar(self, expression: Expression) -> ScalarNode:
        match expression:
            case Number(value):
                return Constant(value)
            case Negate(operand):
                return Computed(float.__neg__, [self._build_scalar(operand)])
            case Binary(op, left, right):
                function = ARITHMETIC.get(op) or _as_number(COMPARISONS[op])
                return Computed(function, [self._build_scalar(left), self._build_scalar(right)])
            case Call("time"):
                self.timed = True
                return Time()
            case Call("scalar", (inner,)):
                return OnlyElement(self._vector(inner))
        raise AssertionError(f"no scalar: {expression}")

    def _vector(self, expression: Expression) -> VectorNode:
        match expression:
            case Selector():
                return Latest(self._store, self._watch(expression))
            case Negate(operand):
                return EachElement(self._vector(operand), float.__neg__, (), keeps_name=False)
            case Binary():
                return self._binary(expression)
            case Aggregate(op, operand, names, excluded, parameter):
                value = None if parameter is None else self._build_scalar(parameter)
                inner = self._vector(operand)
                if op in RANKINGS and value is not None:
                    return Ranked(op, inner, names, value, excluded=excluded)
                return Aggregated(op, inner, names, value, excluded=excluded)
            case Call():
                return self._call(expression)
        raise AssertionError(f"no vector: {expression}")

    def _binary(self, expression: Binary) -> VectorNode:
        op, left, right = expression.op, expression.left, expression.right
        if op in SETS:
            return Combined(op, self._vector(left), self._vector(right), expression.matching)
        keeps_name = op in COMPARISONS and not expression.bool
        if not is_scalar(left) and not is_scalar(right):
            function = _cell_function(op, returns_bool=expression.bool)
            return Paired(function, self._vector(left), self._vector(right), expression.matching, keeps_name=keeps_name)
        if is_scalar(right):
            function = _cell_function(op, returns_bool=expression.bool)
            return EachElement(self._vector(left), function, [self._build_scalar(right)], keeps_name=keeps_name)
        function = _mirrored(op, returns_bool=expression.bool)
        return EachElement(self._vector(right), function, [self._build_scalar(left)], keeps_name=keeps_name)

    def _call(self, call: Call) -> VectorNode:
        name, arguments = call.function, call.arguments
        match name, arguments:
            case "vector", (scalar,):
                return Constantly(self._build_scalar(scalar))
            case "absent", (inner,):
                self.judges_absence = True
                return NoElements(self._vector(inner), inner if isinstance(inner, Selector) else None)
            case "absent_over_time", (Window() as window,):
                self.judges_absence = True
                return NoElements(self._over_window("present_over_time", window, ()), window.selector)
            case "timestamp", (Selector() as selector,):
                return Latest(self._store, self._watch(selector), timestamps=True)
        for argument in arguments:
            if isinstance(argument, Window):
                return self._over_window(name, argument, [other for other in arguments if other is not argument])
        function = _optional(ELEMENTWISE[name])
        scalars = [self._build_scalar(argument) for argument in arguments[1:]]
        return EachElement(self._vector(arguments[0]), function, scalars, keeps_name=False)

    def _over_window(self, name: str, window: Window, parameters: Sequence[Expression]) -> VectorNode:
        self.timed = True
        return OverWindow(
            self._store,
            self._watch(window.selector, window.seconds),
            WINDOWED[name],
            [self._build_scalar(parameter) for parameter in parameters],
            keeps_name=name in _KEEP_NAME,
        )


def _as_number(test: Callable[[float, float], bool]) -> Callable[[float, float], float]:
    return lambda a, b: 1.0 if test(a, b) else 0.0


def _cell_function(op: str, *, returns_bool: bool) -> Callable[[float, float], Cell]:
    """The operator on two elements, or an element and a number; a comparison keeps its left side."""
    if op in ARITHMETIC:
        return ARITHMETIC[op]
    test = COMPARISONS[op]
    if returns_bool:
        return _as_number(test)
    return lambda a, b: a if test(a, b) else FILTERED


def _mirrored(op: str, *, returns_bool: bool) -> Callable[[float, float], Cell]:
    """The operator with a number on its left; called with (element, number). A comparison keeps the element."""
    if op in COMPARISONS and not returns_bool:
        test = COMPARISONS[op]
        return lambda element, number: element if test(number, element) else FILTERED
    function = _cell_function(op, returns_bool=returns_bool)
    return lambda element, number: function(number, element)


def _optional(function: Callable[..., float | None]) -> Callable[..., Cell]:
    def applied(*values: float) -> Cell:
        result = function(*values)
        return FILTERED if result is None else result

    return applied
