"""The one error meant for people: what was given, what was expected, the override that mends it."""


class ConfigError(ValueError):
    """A value of the user's that cannot work; the command line prints it as one line, without a traceback.

    Args:
        what: the offending value and where it stands, for instance ``data.group_size=1``.
        expected: what would be accepted.
        fix: the override that mends it.
    """

    def __init__(self, what: str, expected: str, fix: str) -> None:
        super().__init__(f"{what}: expected {expected}; try {fix}")
