"""The extension in C. Addresses are ints, of memory that the caller keeps alive and has checked."""

class Copying:
    """Copies under way, by a few threads, in their order.

    Args:
        copies: for each copy three numbers: the address to copy to, that to copy from, and how many bytes.
    """

    def __init__(self, copies: list[int]) -> None: ...
    def advance(self, until: int, /) -> int:
        """Take part until the first so many bytes have arrived, and return how many have."""

    def close(self) -> None:
        """Leave the rest, and wait until nobody reads or writes for it any more. May be called more than once."""

def after_fork() -> None:
    """Forget the threads, which a forked process does not have."""
