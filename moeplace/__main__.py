"""``python -m moeplace``."""

from moeplace.cli import main

main()
