"""`python -m pluglm.cli` is `pluglm`."""

from pluglm.cli.main import main

main()
