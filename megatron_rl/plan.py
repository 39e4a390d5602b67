# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron_rl.plan RECIPE`: whether a recipe fits on given GPUs."""

import sys

from megatron_rl.planner.command_line import main

if __name__ == "__main__":
    sys.exit(main())
