"""`python -m internvit_cli` and the `internvit` command."""

from internvit_cli.cli.app import main

if __name__ == "__main__":
    main()
