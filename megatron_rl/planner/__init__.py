# SPDX-License-Identifier: Apache-2.0
"""What a recipe needs, before anyone rents a GPU: memory of every phase, FLOPs, predicted times. Imports no torch."""
