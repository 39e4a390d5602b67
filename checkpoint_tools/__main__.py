# SPDX-License-Identifier: Apache-2.0
"""Entry point of `python -m checkpoint_tools`."""

import sys

from checkpoint_tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
