"""Errors meant for people: what was given, what was expected, the override that mends it."""


class ConfigError(ValueError):
    """A value of the user's that cannot work; the command line prints it as one line, without a traceback.

    Args:
        what: the offending value and where it stands, for instance ``data.group_size=1``.
        expected: what would be accepted.
        fix: the override that mends it.
    """

    def __init__(self, what: str, expected: str, fix: str) -> None:
        super().__init__(f"{what}: expected {expected}; try {fix}")
        self._given = (what, expected, fix)

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, str, str]]:
        """One rank tells the others."""
        return type(self), self._given


class RunError(RuntimeError):
    """What ends a run that was configured well: its last checkpoint stands, and it can be continued."""


class EngineDiedError(RuntimeError):
    """A rollout engine is gone in the middle of its work; ``load_weights`` starts it again."""


def require_numbers(node: str, *, optional: tuple[str, ...] = (), **values: object) -> None:
    """Refuse what is no number before it is compared with one.

    Args:
        node: where the values stand, for instance ``data``.
        optional: names of values that may be None.
        values: by name.

    Raises:
        ConfigError: for the first that is none.
    """
    for name, value in values.items():
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{node}.{name}={value}", "a number", f"{node}.{name}=1")
