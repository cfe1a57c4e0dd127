"""python -m minimath: the command line of cli.py."""
import runpy

if __name__ == "__main__":
    runpy.run_module("minimath.cli", run_name="__main__", alter_sys=True)
