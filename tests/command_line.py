"""A script's command line, in this process."""

import io
import sys

import pytest

import configurator


def run(main, argv, stdin=""):
    """-> (exit code, stdout, stderr) of `main` under these arguments, the script's name first."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, argv)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            configurator.run_script(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()
