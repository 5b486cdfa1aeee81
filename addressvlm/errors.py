"""The one exception that users see: a sentence that says what is wrong, where, and what to do."""


class InputError(Exception):
    """An input from outside (a file, a row, a setting, a machine) can't be used.

    The message is one sentence: what, where (file, row, key), what to do. Jobs and the service print it without a traceback;
    every other exception is a bug.
    """
