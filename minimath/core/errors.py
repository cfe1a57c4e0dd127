"""The two exceptions that a user meets: what can be put right, and a run that was asked to end; and lack of memory."""

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
             "CUBLAS_STATUS_NOT_INITIALIZED", "cudaErrorMemoryAllocation")  # a handle's workspace does not fit


class UserError(Exception):
    """Says what was wrong, where, and what to do: something the user can put right."""


class Interrupted(Exception):
    """Carries the number of the signal out of a long phase; the trainer saves."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out; a CPU's allocator says so in a plain RuntimeError.

    torch's own class goes by its name, so that a command can end with a line before torch is imported."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in NO_MEMORY))
