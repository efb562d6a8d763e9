# SPDX-License-Identifier: Apache-2.0
# Exceptions, one class for each status of the C interface.
"""What Halfstep raises.

Every exception is a `HalfstepError` and, where Python has a word for it, also that builtin: a wrong
shape is caught by ``except ValueError``. ``status`` is the number and ``code`` the name that the C
interface gives the failure; the message names the file, node or tensor concerned.

>>> import halfstep
>>> try:
...     halfstep.Model.load("no_such_file.onnx")
... except OSError as error:
...     print(type(error).__name__, error.status, error.code)
FileAccessError 20 HS_ERR_FILE_ACCESS
"""

from __future__ import annotations


class HalfstepError(Exception):
    """Base of everything that Halfstep raises.

    Attributes
    ----------
    status : int
        Number of the failure in the C interface.
    code : str
        Name of that number, such as ``"HS_ERR_SHAPE_MISMATCH"``.
    """

    status: int = 82
    code: str = "HS_ERR_INTERNAL"

    def __str__(self) -> str:
        # KeyError would show the message quoted.
        return Exception.__str__(self)


class InvalidArgumentError(HalfstepError, ValueError):
    """An argument is outside its documented range."""

    status = 1
    code = "HS_ERR_INVALID_ARGUMENT"


class ShapeMismatchError(HalfstepError, ValueError):
    """A tensor's shape is not the expected one."""

    status = 2
    code = "HS_ERR_SHAPE_MISMATCH"


class TypeMismatchError(HalfstepError, TypeError):
    """A tensor's element type is not the expected one."""

    status = 3
    code = "HS_ERR_TYPE_MISMATCH"


class UnknownNameError(HalfstepError, KeyError):
    """A tensor, node, scheme or configuration is not known."""

    status = 4
    code = "HS_ERR_UNKNOWN_NAME"


class InvalidStateError(HalfstepError, RuntimeError):
    """A call came too early, such as exporting before calibrating, or while another one runs."""

    status = 5
    code = "HS_ERR_INVALID_STATE"


class FileAccessError(HalfstepError, OSError):
    """A file could not be opened, read or written."""

    status = 20
    code = "HS_ERR_FILE_ACCESS"


class MalformedFileError(HalfstepError, ValueError):
    """A file's bytes do not follow its format."""

    status = 21
    code = "HS_ERR_MALFORMED_FILE"


class UnsupportedVersionError(HalfstepError, ValueError):
    """A version of a format that is not supported."""

    status = 22
    code = "HS_ERR_UNSUPPORTED_VERSION"


class UnsafePathError(HalfstepError, ValueError):
    """An external-data path leaves the model's folder."""

    status = 23
    code = "HS_ERR_UNSAFE_PATH"


class InvalidConfigurationError(HalfstepError, ValueError):
    """A runtime configuration is wrong; the message gives the key."""

    status = 24
    code = "HS_ERR_INVALID_CONFIGURATION"


class EncodingMismatchError(HalfstepError, ValueError):
    """Encodings do not fit the model they are loaded into."""

    status = 25
    code = "HS_ERR_ENCODING_MISMATCH"


class InvalidGraphError(HalfstepError, ValueError):
    """A cycle, a duplicate name, a missing tensor."""

    status = 40
    code = "HS_ERR_INVALID_GRAPH"


class UnsupportedOperatorError(HalfstepError, NotImplementedError):
    """Operators that cannot run; the message names all of them."""

    status = 41
    code = "HS_ERR_UNSUPPORTED_OPERATOR"


class NonFiniteValueError(HalfstepError, ValueError):
    """A value is NaN or infinite."""

    status = 60
    code = "HS_ERR_NON_FINITE_VALUE"


class EmptyStatisticsError(HalfstepError, ValueError):
    """A range cannot be chosen because no data was seen."""

    status = 61
    code = "HS_ERR_EMPTY_STATISTICS"


class NumericFailureError(HalfstepError, ArithmeticError):
    """A numeric routine failed."""

    status = 62
    code = "HS_ERR_NUMERIC_FAILURE"


class OutOfMemoryError(HalfstepError, MemoryError):
    """Memory could not be allocated."""

    status = 80
    code = "HS_ERR_OUT_OF_MEMORY"


class CancelledError(HalfstepError):
    """A progress callback returned False. What it raises itself travels out unchanged."""

    status = 81
    code = "HS_ERR_CANCELLED"


class InternalError(HalfstepError, RuntimeError):
    """A defect in the library or one below it."""


_CLASSES: dict[int, type[HalfstepError]] = {
    cls.status: cls for cls in HalfstepError.__subclasses__()
}


def from_status(status: int, code: str, message: str) -> HalfstepError:
    """Return the exception of a status; a number of a later library gives the base class."""
    cls = _CLASSES.get(status)
    if cls is not None:
        return cls(message)
    error = HalfstepError(message)
    error.status, error.code = status, code
    return error
