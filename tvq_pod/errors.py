"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A wrong setting, corpus or folder. `str()` is one line that names the setting, its value and what would be right.

    main prints it and exits with 1; nothing that was saved before has been touched.
    """
