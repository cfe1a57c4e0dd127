"""The two exceptions that a user meets: what can be put right, and a run that was asked to end."""


class UserError(Exception):
    """Says what was wrong, where, and what to do: something the user can put right."""


class Interrupted(Exception):
    """Carries the number of the signal out of a long phase; the trainer saves."""
