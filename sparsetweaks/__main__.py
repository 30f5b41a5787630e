"""`python -m sparsetweaks`: the same as the command `sparsetweaks`."""

from sparsetweaks.lottery.cli import main

if __name__ == "__main__":
    main()
