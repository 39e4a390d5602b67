# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron_rl.inspect_data RECIPE.yaml`: see megatron_rl/reading/command_line.py."""

import sys

from megatron_rl.reading.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
