"""The exceptions that main turns into an exit code and one line."""


class UserError(Exception):
    """A wrong setting, corpus or folder. `str()` is one line that names the setting, its value and a remedy.

    main prints it and exits with 1; nothing that was saved before is changed.
    """


class Preempted(Exception):
    """The run was asked to end, and everything is saved: main exits with 75, which means "run me again"."""
