"""`python -m meshdiff` is the command `meshdiff`."""

from meshdiff.cli.main import main

if __name__ == "__main__":
    main()
