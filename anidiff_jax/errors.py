"""Mistakes of the user, as opposed to ours."""


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""
