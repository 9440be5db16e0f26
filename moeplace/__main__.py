"""The command ``moeplace``, also ``python -m moeplace``."""

import os
import signal

INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C ends it in the same way while it is still being imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from moeplace.cli import main as command_line

    command_line()


def _end(number: int, frame: object) -> None:
    """End at once: nothing is begun yet that would have to be tidied up."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
