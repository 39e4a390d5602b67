# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron_rl.plan_sync`: what a weight sync moves between two layouts."""

import sys

from megatron_rl.weight_sync.command_line import main

if __name__ == "__main__":
    sys.exit(main())
