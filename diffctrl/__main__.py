"""`python -m diffctrl`: the command line from a checkout in which nothing is installed."""

from diffctrl.cli import main

if __name__ == "__main__":
    main()
