"""``python -m eagle_offline`` is the command line."""

from eagle_offline.cli import main

main()
