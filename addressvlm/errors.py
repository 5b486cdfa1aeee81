"""The one error that people see: a sentence that says what is wrong, where, and what to do."""


class InputError(Exception):
    """Something given from outside (a file, a row, a setting, a machine) can't be used as it is.

    The message is one sentence for a person: what, where (file, row, key), what to do. Jobs and the service print it
    without a traceback; every other exception is a defect of ours.
    """
