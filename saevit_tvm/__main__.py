"""`python -m saevit_tvm` is the command `saevit-tvm`."""

from __future__ import annotations

from saevit_tvm.cli import main

if __name__ == "__main__":
    main()
