"""The two exceptions that a user meets: what can be put right, and a run that was asked to end."""


class UserError(Exception):
    """Something the user can put right. The message says what was wrong, where, and what to do next."""


class Interrupted(Exception):
    """Raised with the number of the signal by interrupt.check inside long phases; the trainer catches it and saves."""
