"""python -m qncd_deploy: the same as the `qncd` command."""

from qncd_deploy.cli import main

if __name__ == "__main__":
    main()
