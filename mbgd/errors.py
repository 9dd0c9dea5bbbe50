"""The one exception type for mistakes of the user's."""


class UsageError(ValueError):
    """A mistake of the user's, whose message alone teaches: what was wrong, what was got, the rule, the remedy."""
